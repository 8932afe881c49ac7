"""The training loss of each step, observed without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .ranks import OneVoice
from .stores import ParameterStore

logger = OneVoice(logging.get_logger(__name__))


class LossMeter:
    """Remembers the training losses of the last steps.

    Losses stay on the device as they come; :meth:`read` brings them to the host in one transfer and, where several
    ranks train, averages them over the ranks, so that every rank sees the same numbers.

    Args:
        store: whose ranks are averaged over.
        keep: entries that are remembered at most.
    """

    def __init__(self, store: ParameterStore, keep: int) -> None:
        self._store = store
        self._current: Tensor | float | None = None
        # (first step, last step, loss); the loss is a tensor until it is read.
        self._entries: deque[tuple[int, int, Tensor | float]] = deque(maxlen=keep)

    def __len__(self) -> int:
        return len(self._entries)

    @torch.no_grad()
    def record(self, loss: Tensor | float) -> None:
        """Add to the loss of the current optimizer step: the losses of its micro-batches are summed."""
        if isinstance(loss, Tensor):
            # A copy: the caller may go on to change the tensor in place, as the Trainer does.
            loss = loss.detach().float().mean() if loss.dim() else loss.detach().float().clone()
        self._current = loss if self._current is None else self._current + loss

    @property
    def recorded(self) -> bool:
        """Whether anything was recorded for the current step."""
        return self._current is not None

    def drop(self) -> None:
        """Forget what was recorded for the current step, which does not count."""
        self._current = None

    def step(self, step: int) -> None:
        """The current optimizer step is done; it is number ``step``."""
        if self._current is not None:
            self._entries.append((step, step, self._current))
            self._current = None

    def record_mean(self, loss: float, first: int, last: int) -> None:
        """The mean loss of steps ``first`` to ``last``, from a log; the same on every rank."""
        if last >= first:
            self._entries.append((first, last, float(loss)))

    def read(self) -> list[tuple[int, int, float]]:
        """(first step, last step, mean loss), oldest first; on all ranks at once.

        If they did not record losses of the same steps, all of them forget theirs.
        """
        steps = [(a, b, isinstance(loss, Tensor)) for a, b, loss in self._entries]
        if self._store.ranks is not None and not self._store.ranks.alike(str(steps)):
            logger.warning("Losses were not recorded on all ranks for the same steps, and cannot be used.")
            self._entries.clear()
        waiting = [loss for _, _, loss in self._entries if isinstance(loss, Tensor)]
        if waiting:
            device = waiting[0].device
            values = iter(self._store.average(torch.stack([loss.to(device) for loss in waiting])))
            self._entries = deque(
                ((a, b, next(values) if isinstance(loss, Tensor) else loss) for a, b, loss in self._entries),
                maxlen=self._entries.maxlen,
            )
        return [(a, b, float(loss)) for a, b, loss in self._entries]

    def forget_after(self, step: int) -> None:
        """Forget the losses of the steps after ``step``."""
        self._entries = deque((entry for entry in self._entries if entry[1] <= step), maxlen=self._entries.maxlen)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._current = None

    def state(self) -> list[list[float]]:
        """What a checkpoint keeps.  Where several ranks train, call :meth:`read` on all of them before."""
        return [[a, b, float(loss)] for a, b, loss in self._entries]

    def load(self, state: list[list[float]]) -> None:
        """Restore what :meth:`state` gave."""
        self.clear()
        self._entries.extend((int(a), int(b), float(loss)) for a, b, loss in state)


def as_loss(value: Any) -> Tensor | float | None:
    """``value`` if it is one number, as a closure or a model may return it; else ``None``."""
    if isinstance(value, Tensor):
        return value if value.numel() == 1 and value.is_floating_point() else None
    return float(value) if isinstance(value, float | int) and not isinstance(value, bool) else None
