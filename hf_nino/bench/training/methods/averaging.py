"""Averages over AdamW's trajectory, which training does not see: they are only what is evaluated and handed out."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....training.undo import saved_buffers
from .base import Conditions, Method, Settings, Training
from .optimizers import AdamW, make_scheduler, resolve_settings, trainable, write


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """What is averaged: trainable parameters, and floating point buffers that are saved (statistics of batch
    normalization), which belong to them."""
    buffers = [buffer for buffer in saved_buffers(model).values() if buffer.is_floating_point()]
    return [*trainable(model), *buffers]


class AveragingTraining(Training):
    """Trains as the optimizer does, and swaps an average in for evaluation.

    Args:
        optimizer, scheduler: of the trajectory.
        tensors: averaged, in place in the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, tensors: list[Tensor]) -> None:
        super().__init__(optimizer, scheduler)
        self.tensors = tensors
        self.steps = 0

    def step(self, loss: Tensor) -> None:
        super().step(loss)
        self.steps += 1
        self.observe([tensor.detach() for tensor in self.tensors])

    @abstractmethod
    def observe(self, state: list[Tensor]) -> None:
        """Take in the state after step :attr:`steps`; copy what is kept."""

    @abstractmethod
    def average(self) -> list[Tensor] | None:
        """The average now, or ``None`` while there is none."""

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        average = self.average()
        if average is None:
            yield
            return
        kept = [tensor.detach().clone() for tensor in self.tensors]
        write(self.tensors, average)
        try:
            yield
        finally:
            write(self.tensors, kept)


class EMATraining(AveragingTraining):
    """``average <- d * average + (1 - d) * state`` after step t, with ``d = min(decay, t / (t + 9))``.

    The decay grows with t so that the initial state is forgotten (as in TensorFlow's moving averages); the first
    average is the first state.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scheduler: Any, tensors: list[Tensor], *, decay: float
    ) -> None:
        super().__init__(optimizer, scheduler, tensors)
        self.decay = decay
        self._average: list[Tensor] | None = None

    @torch.no_grad()
    def observe(self, state: list[Tensor]) -> None:
        if self._average is None:
            self._average = [tensor.clone() for tensor in state]
            return
        decay = min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_(self._average, state, 1 - decay)

    def average(self) -> list[Tensor] | None:
        return self._average


class LAWATraining(AveragingTraining):
    """The mean of the last ``last`` snapshots, one every ``every`` steps; the state itself until there are so many."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, scheduler: Any, tensors: list[Tensor], *, every: int, last: int
    ) -> None:
        super().__init__(optimizer, scheduler, tensors)
        self.every = every
        self._snapshots: deque[list[Tensor]] = deque(maxlen=last)

    def observe(self, state: list[Tensor]) -> None:
        if self.steps % self.every == 0:
            self._snapshots.append([tensor.clone() for tensor in state])

    def average(self) -> list[Tensor] | None:
        if len(self._snapshots) < self._snapshots.maxlen:
            return None
        return [torch.stack(tensors).mean(0) for tensors in zip(*self._snapshots, strict=True)]


class EMA(Method):
    """Exponential moving average of AdamW's trajectory.  Settings: ``decay``, from 0 to below 1."""

    name = "ema"
    title = "AdamW, EMA"
    defaults: Mapping[str, Any] = {"decay": 0.99}
    # Windows of about 100, 200 and 1000 steps, for runs of some thousand.
    grid = ({}, {"decay": 0.995}, {"decay": 0.999})

    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> EMATraining:
        decay = resolve_settings(self.name, settings, self.defaults)["decay"]
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` of method 'ema' must be from 0 to below 1, got {decay}")
        optimizer = AdamW().make_optimizer(model, conditions)
        scheduler = make_scheduler(optimizer, conditions)
        return EMATraining(optimizer, scheduler, averaged_tensors(model), decay=decay)


class LAWA(Method):
    """Latest weight averaging (Kaddour, 2022, arXiv 2209.14981; Sanyal et al., 2023, arXiv 2306.03241).

    Settings: ``every`` so many steps a snapshot, and how many of the ``last`` are averaged.
    """

    name = "lawa"
    title = "AdamW, LAWA"
    defaults: Mapping[str, Any] = {"every": 50, "last": 5}
    grid = ({}, {"every": 20}, {"every": 100}, {"last": 10}, {"every": 10, "last": 10})

    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> LAWATraining:
        resolved = resolve_settings(self.name, settings, self.defaults)
        for name, value in resolved.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` of method 'lawa' must be a whole number of at least 1, got {value!r}")
        optimizer = AdamW().make_optimizer(model, conditions)
        scheduler = make_scheduler(optimizer, conditions)
        return LAWATraining(optimizer, scheduler, averaged_tensors(model), **resolved)
