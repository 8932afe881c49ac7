"""What a method is: something that turns gradients into parameters, with at most one choice of settings to make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Settings = Mapping[str, Any]
"""Keyword arguments of a method, JSON-able; part of a run's name."""


@dataclass(frozen=True)
class Conditions:
    """What a method is told about the run.

    Args:
        steps: optimizer steps of the run.
        learning_rate: peak learning rate, in AdamW's units times :attr:`Method.learning_rate_scale`.
        schedule: ``"constant"`` (no warm-up) or ``"cosine"`` (linear warm-up, then a cosine to 0).
        warmup_steps: of the cosine schedule.
        weight_decay: decoupled, as in AdamW.
        example_inputs: a batch, for methods that trace the model.
    """

    steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    example_inputs: Mapping[str, Tensor] | None = None


class Training:
    """One run's optimizer, with all that belongs to it.

    The loop calls, for every step: ``backward`` on the loss, then :meth:`step`, which also clears the gradients; and
    evaluates inside :meth:`evaluation`.

    Args:
        optimizer: does the steps.
        scheduler: stepped after it, if any.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler

    def step(self, loss: Tensor) -> None:
        """One optimizer step after ``loss.backward()``."""
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, the model holds the parameters that this method would hand out now (an average, say); afterwards
        those that it trains, bit for bit."""
        yield

    def report(self) -> dict[str, Any]:
        """What happened beyond steps, JSON-able: ``events`` (of nowcasts) and ``nowcast_seconds`` where there are."""
        return {}

    def close(self) -> None:
        """Give memory back."""


class Method(ABC):
    """A way to train.

    Attributes:
        name: in results; no spaces.
        title: in tables.
        learning_rate_scale: its learning rates in AdamW's units: 1 for what AdamW drives, more for SGD.
        grid: settings to choose among, the default first; one choice is made for each protocol, by validation loss on
            another seed.
        base: the method that nowcasts are put on; ``None`` for one of its own.
    """

    name: str
    title: str
    learning_rate_scale: float = 1.0
    base: Method | None = None
    grid: tuple[Settings, ...] = ({},)

    @abstractmethod
    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> Training:
        """The run's optimizer over the model's trainable parameters.

        Args:
            settings: one of :attr:`grid`, or others that were asked for by hand.

        Raises:
            ImportError: a package is missing; the message names it.
        """

    def missing(self) -> str | None:
        """Why the method cannot be used here (a package that is not installed, a file that is absent), or ``None``."""
        return None
