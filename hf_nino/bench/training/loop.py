"""One run: a plain training loop that measures, the same for every method."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import set_seed

from ... import __version__
from .methods import method as find_method
from .methods.base import Conditions
from .spec import RunSpec
from .tasks import shortened
from .tasks import task as find_task
from .tasks.base import Task


@dataclass
class Clock:
    """Training time without evaluations: wall time, and processor time of this process."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _started: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]


def train(spec: RunSpec, cache: Path, device: torch.device) -> dict[str, Any]:
    """Train as ``spec`` says, and give back the run's record.

    A loss that is not finite ends the run; it is then recorded as diverged.  So does, at a constant learning rate, the
    finish line of a task that has one; an evaluation follows.

    Args:
        cache: folder where tasks keep their prepared data, one folder each.

    Returns:
        ``spec``, ``task``, ``parameters``, ``diverged``, ``evaluations`` (``step``, ``loss``, perhaps ``accuracy``,
        ``seconds`` and ``cpu_seconds`` of training until then), ``train_losses`` (means between evaluations),
        ``events``, ``nowcast_seconds``, ``train_seconds``, ``train_cpu_seconds``, ``machine``.
    """
    task = shortened(find_task(spec.task), spec.steps)
    method = find_method(spec.method)
    data = task.load(cache / task.name)
    set_seed(spec.seed)
    model = task.build_model(data).to(device).train()
    batches = task.batches(data, spec.seed, device)
    first = next(batches)
    conditions = Conditions(
        steps=spec.steps,
        learning_rate=spec.learning_rate * method.learning_rate_scale,
        schedule=spec.schedule,
        warmup_steps=task.warmup_steps,
        weight_decay=task.weight_decay,
        example_inputs=task.example_inputs(first),
    )
    training = method.begin(model, conditions, dict(spec.settings))
    finish_line = task.finish_line(data) if spec.schedule == "constant" else None
    record = _Record(task, model, data, training)
    batch = first
    try:
        for step in range(1, spec.steps + 1):
            record.clock.start()
            loss = task.training_loss(model, batch)
            loss.backward()
            if task.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), task.max_grad_norm)
            training.step(loss.detach())
            batch = next(batches)
            record.clock.stop()
            record.add(loss.detach())
            over = finish_line is not None and step % task.look_every == 0 and record.look(finish_line)
            if over or step % task.evaluate_every == 0 or step == spec.steps:
                record.evaluate(step)
                if over or record.diverged:
                    break
    finally:
        training.close()
    return {
        "spec": spec.to_dict(),
        "task": task.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "diverged": record.diverged,
        "evaluations": record.evaluations,
        "train_losses": record.train_losses,
        "events": [],
        "nowcast_seconds": 0.0,
        **training.report(),
        "train_seconds": record.clock.seconds,
        "train_cpu_seconds": record.clock.cpu_seconds,
        "machine": machine(device),
    }


class _Record:
    """Evaluations and mean training losses of a run, as they come in."""

    def __init__(self, task: Task, model: nn.Module, data: Any, training: Any) -> None:
        self.task, self.model, self.data, self.training = task, model, data, training
        self.clock = Clock()
        self.evaluations: list[dict[str, float]] = []
        self.train_losses: list[dict[str, float]] = []
        self.diverged = False
        self._sum: Tensor | None = None
        self._count = 0
        self.evaluate(0)

    def add(self, loss: Tensor) -> None:
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    def look(self, finish_line: Callable[[nn.Module], bool]) -> bool:
        with self.training.evaluation():
            return finish_line(self.model)

    def evaluate(self, step: int) -> dict[str, float]:
        with self.training.evaluation():
            measured = self.task.evaluate(self.model, self.data)
        times = {"seconds": self.clock.seconds, "cpu_seconds": self.clock.cpu_seconds}
        mean = float(self._sum) / self._count if self._sum is not None else measured["loss"]
        self._sum, self._count = None, 0
        self.diverged = not (math.isfinite(measured["loss"]) and math.isfinite(mean))
        # JSON has no infinity: a run that diverged ends with its last finite evaluation.
        if not self.diverged:
            self.evaluations.append({"step": step, **measured, **times})
            if step:
                self.train_losses.append({"step": step, "loss": mean})
        return measured


def machine(device: torch.device) -> dict[str, Any]:
    """What seconds depend on, and the versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"hf_nino": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
