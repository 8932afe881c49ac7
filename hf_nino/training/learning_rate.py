"""The learning rates of the steps to come, from a dry run of a copy of the scheduler."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class UnforeseeableSchedule(Exception):
    """The future of this scheduler cannot be computed; the message says why."""


def warmup_steps(rates: Iterable[float]) -> int:
    """Index at which the learning rate stops rising: the first peak of the stretch, at the start, that never falls."""
    peak, at, last = -math.inf, 0, -math.inf
    for index, rate in enumerate(rates):
        if rate < last * (1 - 1e-9):
            break
        if index == 0 or rate > peak * (1 + 1e-9):
            peak, at = rate, index
        last = rate
    return at


def learning_rates(optimizer: Any) -> tuple[float, ...]:
    """The learning rate of each parameter group now; 1 where an optimizer keeps none."""
    groups = getattr(optimizer, "param_groups", None) or [{}]
    rates = (group.get("lr") for group in groups)
    return tuple(1.0 if rate is None else float(rate) for rate in rates)


def future_learning_rates(scheduler: Any, *, stepped: bool = False) -> Iterator[tuple[float, ...]]:
    """Learning rates of the optimizer steps to come, one per parameter group, from a dry run of a copy.

    Neither the scheduler nor its optimizer is touched, and the optimizer's state is not copied.

    Args:
        scheduler: an ``LRScheduler`` or accelerate's wrapper of one.
        stepped: whether ``scheduler.step()`` has already been called for the last optimizer step, so that the
            optimizer's learning rate is that of the next one.

    Yields:
        A tuple per step, without end, or until the schedule's own end (``OneCycleLR``).

    Raises:
        UnforeseeableSchedule: on the first item: the learning rate depends on what training brings
            (``ReduceLROnPlateau``), or the copy failed.
    """
    stride = 1
    if hasattr(scheduler, "scheduler") and hasattr(scheduler, "split_batches"):  # accelerate's AcceleratedScheduler
        if scheduler.step_with_optimizer and not scheduler.split_batches:
            from accelerate.state import AcceleratorState

            stride = AcceleratorState().num_processes
        scheduler = scheduler.scheduler
    kind = type(scheduler).__name__
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise UnforeseeableSchedule(f"{kind} cannot be run ahead of training")
    try:
        rehearsal = _rehearsal(scheduler)
    except Exception as error:
        raise UnforeseeableSchedule(f"{kind} cannot be copied ({type(error).__name__}: {error})") from error
    if stepped:
        yield learning_rates(rehearsal.optimizer)
    while True:
        for _ in range(stride):
            if getattr(rehearsal, "last_epoch", -1) + 1 >= getattr(rehearsal, "total_steps", math.inf):
                return
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rehearsal.step()
            except Exception as error:
                raise UnforeseeableSchedule(f"{kind} cannot be run ahead ({type(error).__name__}: {error})") from error
        yield learning_rates(rehearsal.optimizer)


def foresee(
    scheduler: Any, optimizer: Any, *, stepped: bool = False, say: Callable[[str], None]
) -> Iterator[tuple[float, ...]]:
    """:func:`future_learning_rates`; constant without a scheduler, or from where one cannot be foreseen.

    Args:
        scheduler: the run's scheduler, or ``None``.
        optimizer: its parameter groups hold the learning rates of now; ``None``: the scheduler's optimizer.
        stepped: see :func:`future_learning_rates`.
        say: told why a scheduler cannot be foreseen.
    """
    if scheduler is not None:
        try:
            yield from future_learning_rates(scheduler, stepped=stepped)
            return
        except UnforeseeableSchedule as reason:
            say(f"{reason}: when choosing the horizon, the learning rate is taken to stay as it is.")
    if optimizer is None:
        optimizer = optimizer_of(scheduler)
    yield from itertools.repeat(learning_rates(optimizer))


def optimizer_of(scheduler: Any) -> Any:
    """The optimizer of a scheduler, or of the one inside accelerate's wrapper; ``None`` if there is none."""
    return getattr(getattr(scheduler, "scheduler", scheduler), "optimizer", None)


def _rehearsal(scheduler: LRScheduler) -> LRScheduler:
    """A copy of ``scheduler`` on an optimizer that holds the groups' settings but no parameters and no state."""
    dummy = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    dummy.param_groups = [
        {"params": [], **{key: copy.deepcopy(value) for key, value in group.items() if key != "params"}}
        for group in scheduler.optimizer.param_groups
    ]
    memo: dict[int, Any] = {}
    for part in _parts(scheduler):
        memo[id(part.optimizer)] = dummy
        # Shared, not copied: a bound method would drag its object, perhaps a whole model, into the copy.
        memo.update({id(function): function for function in getattr(part, "lr_lambdas", ())})
    return copy.deepcopy(scheduler, memo)


def _parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        yield from _parts(part)
