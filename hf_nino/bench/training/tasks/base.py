"""What a task is: a model, its data, a loss to train by and a loss to measure by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Everything that decides a task's numbers, but for seed, learning rate and method.

    Args:
        name: of the task in results; no spaces.
        steps: optimizer steps of a run.
        batch_size: rows of a batch.
        learning_rate: peak learning rate of AdamW in the ``fixed`` protocol: what a careful user takes unswept.
        constant_learning_rate: of the ``paper`` protocol.
        warmup_steps: before the cosine, in the ``fixed`` and ``tuned`` protocols.
        weight_decay: of AdamW.
        evaluate_every: steps between evaluations.
        look_every: steps between looks whether a run is over, where :meth:`finish_line` says that it may be.
        max_grad_norm: gradients are clipped to this norm, as Trainer does; ``None``: not at all.
        bf16: train under autocast to bfloat16, as Trainer does with the argument of this name; evaluations are not.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    constant_learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    evaluate_every: int = 50
    look_every: int = 20
    max_grad_norm: float | None = 1.0
    bf16: bool = False

    kind = "task"
    """``language``, ``images``, ``fine-tuning`` or another; also names the rows of the report."""

    @abstractmethod
    def load(self, cache: Path) -> Any:
        """The data, prepared once and kept in ``cache`` (the task's own folder); what the other methods are given.

        Several processes may call it at once: files are written under another name first, then renamed.

        Raises:
            ImportError: a package that holds the data is not installed; the message names it.
        """

    @abstractmethod
    def build_model(self, data: Any) -> nn.Module:
        """A new model on the CPU in training mode, random where it is random from torch's global generator; no
        dropout, so that methods differ in nothing else."""

    @abstractmethod
    def batches(self, data: Any, seed: int, device: torch.device) -> Iterator[Batch]:
        """Training batches without end: shuffled epochs in an order that ``seed`` decides."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean training loss of a batch, a scalar with a gradient."""

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """:meth:`loss` in the precision that the task trains in."""
        device = next(iter(batch.values())).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(model, batch)

    @abstractmethod
    def evaluate(self, model: nn.Module, data: Any) -> dict[str, float]:
        """``loss`` (and ``accuracy`` where there is one) on held-back data, always the same; no gradient, training
        mode restored, no random number drawn."""

    def finish_line(self, data: Any) -> Callable[[nn.Module], bool] | None:
        """Says of a model, in training mode, whether a run at a constant learning rate is over before its last step;
        of one run only.  ``None``: no such run is."""
        return None

    def example_inputs(self, batch: Batch) -> Batch:
        """What the neural graph is traced with, from a batch."""
        return batch

    def to_dict(self) -> dict[str, Any]:
        """All settings, for a run's JSON."""
        return {"kind": self.kind, **asdict(self)}
