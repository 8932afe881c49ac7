"""What differs from run to run of a task: what users vary, drawn from a seeded distribution."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from ..bench.training.tasks.base import Task
from .schedules import SCHEDULES, schedule_factor

SGD_RATE = 50.0
"""SGD with momentum takes learning rates so many times as high as AdamW."""


@dataclass(frozen=True)
class RunSettings:
    """All that decides one recorded run, but for its task's data.

    Args:
        task: name of a recording task.
        index: of the run among those of its task.
        optimizer: ``"adamw"`` or ``"sgd"`` (with momentum 0.9).
        learning_rate: at its peak.
        schedule: one of :data:`~hf_nino.metatrain.schedules.SCHEDULES`.
        warmup_steps: in which the learning rate rises from 0.
        weight_decay: of all parameters.
        max_grad_norm: longer gradients are shortened; ``None``: never.
        initialisation: factor of the initial weight matrices (of all parameters with at least two axes).
        seed: of the initial parameters and of the data order.
    """

    task: str
    index: int
    steps: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    batch_size: int
    max_grad_norm: float | None
    initialisation: float
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of the optimizer step after ``step`` steps."""
        return self.learning_rate * schedule_factor(self.schedule, step, self.steps, self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def draw_settings(task: Task, index: int, seed: int) -> RunSettings:
    """The settings of a run: always the same for the same task, index and seed, whatever other runs there are.

    =============== ==================================================================================
    optimizer       AdamW (3 in 4), SGD with momentum
    learning rate   log-uniform over two decades around the task's (SGD: 50 times that)
    schedule        constant, cosine, linear, warm-up-stable-decay
    warm-up         none (1 in 4), or log-uniform between 0.5% and 10% of the steps
    weight decay    none (1 in 3), or log-uniform over two decades up to 0.1 (SGD: 0.001)
    batch size      half, once or twice the task's
    gradient norm   at most 1 (1 in 2), or unbounded
    initialisation  usual (1 in 2), or its matrices times log-uniform between 1/2 and 2
    =============== ==================================================================================

    Args:
        task: its name, steps, batch size and learning rate are used.
    """
    draw = random.Random(f"{seed}/{task.name}/{index}")
    optimizer = "adamw" if draw.random() < 3 / 4 else "sgd"
    center = task.learning_rate * (SGD_RATE if optimizer == "sgd" else 1.0)
    largest_decay = 1e-3 if optimizer == "sgd" else 1e-1
    return RunSettings(
        task=task.name,
        index=index,
        steps=task.steps,
        optimizer=optimizer,
        learning_rate=_log_uniform(draw, center / 10, center * 10),
        schedule=draw.choice(SCHEDULES),
        warmup_steps=0 if draw.random() < 1 / 4 else round(_log_uniform(draw, 0.005, 0.1) * task.steps),
        weight_decay=0.0 if draw.random() < 1 / 3 else _log_uniform(draw, largest_decay / 100, largest_decay),
        batch_size=draw.choice((max(1, task.batch_size // 2), task.batch_size, 2 * task.batch_size)),
        max_grad_norm=1.0 if draw.random() < 1 / 2 else None,
        initialisation=1.0 if draw.random() < 1 / 2 else _log_uniform(draw, 0.5, 2.0),
        seed=draw.randrange(2**31),
    )


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))
