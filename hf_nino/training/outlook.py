"""What the learning rate did during the history, and how far it will still carry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from ..nowcaster import Rates
from .horizon import Horizon
from .learning_rate import foresee, learning_rates, optimizer_of, warmup_steps

# The warm-up of a schedule is looked for in this many steps.
_FORESIGHT = 100_000


class Outlook:
    """Chooses horizons: remembers the learning rates of the history and foresees those of the steps that are left.

    Args:
        horizon: the policy.
        max_steps: length of the run in optimizer steps, if known.
        lr_scheduler: the run's scheduler, or ``None``: the learning rate is then taken to be constant.
        say: told, once each, what cannot be foreseen.

    Attributes:
        warmup_end: the step at which the learning rate stops rising; ``None`` until :meth:`find_warmup` knew it.
    """

    def __init__(self, horizon: Horizon, max_steps: int | None, lr_scheduler: Any, say: Callable[[str], None]) -> None:
        self.horizon = horizon
        self.max_steps = max_steps
        self.lr_scheduler = lr_scheduler
        self.warmup_end: int | None = None
        self._say = say
        self._rates: list[tuple[float, ...]] = []

    def record(self, optimizer: Any) -> None:
        """Remember the learning rates that belong to a snapshot."""
        self._rates.append(learning_rates(optimizer_of(self.lr_scheduler) if optimizer is None else optimizer))

    def clear(self) -> None:
        """Forget the history's learning rates."""
        self._rates.clear()

    def find_warmup(self, step: int, optimizer: Any, scheduler_stepped: bool) -> None:
        """Find the step at which the learning rate stops rising, once there is a scheduler to ask."""
        if self.warmup_end is not None or self.lr_scheduler is None:
            return
        rates = foresee(self.lr_scheduler, optimizer, stepped=scheduler_stepped, say=self._say)
        steps = _FORESIGHT if self.max_steps is None else min(self.max_steps, _FORESIGHT)
        rising = warmup_steps(math.fsum(groups) / len(groups) for groups in itertools.islice(rates, steps))
        self.warmup_end = step + rising if rising else 0

    def choose(
        self,
        *,
        step: int,
        scheduled_step: int,
        period: int,
        interval: int,
        max_horizon: int,
        optimizer: Any,
        scheduler_stepped: bool,
    ) -> int:
        """Intervals to look ahead now; 0 means no nowcast.

        Args:
            step: optimizer steps done.
            scheduled_step: the same by the schedule's count, which includes steps that a gradient scaler skipped.
            period, interval: steps between nowcasts and between snapshots.
            max_horizon: the nowcaster's largest.
            optimizer: its parameter groups hold the learning rates of now.
            scheduler_stepped: whether the scheduler has already been stepped for the last optimizer step.
        """
        rates = [entry for entry in self._rates if len(entry) == len(self._rates[-1])]
        return self.horizon.now(
            step=step,
            period=period,
            interval=interval,
            max_horizon=max_horizon,
            max_steps=self.max_steps,
            past=tuple(math.fsum(group) / len(rates) for group in zip(*rates, strict=True)),
            future=self._future(scheduled_step, interval * max_horizon, optimizer, scheduler_stepped),
        )

    def rates(
        self, *, scheduled_step: int, horizon: int, interval: int, optimizer: Any, scheduler_stepped: bool
    ) -> Rates | None:
        """What a nowcaster is told of the learning rates around a nowcast, means over the parameter groups; ``None``
        if those of the history are not known for every snapshot, or all 0.

        Args:
            horizon: intervals that the nowcast looks ahead.
        """
        known = [entry for entry in self._rates if len(entry) == len(self._rates[-1])]
        means = [math.fsum(groups) / len(groups) for groups in known]
        if len(means) < max(len(self._rates), 2) or sum(means) <= 0:
            return None
        steps = itertools.islice(
            self._future(scheduled_step, interval * horizon, optimizer, scheduler_stepped), interval * horizon
        )
        return Rates.at_snapshots(means, math.fsum(math.fsum(step) / len(step) for step in steps), interval)

    def _future(self, step: int, wanted: int, optimizer: Any, scheduler_stepped: bool) -> Iterator[tuple[float, ...]]:
        """Learning rates of the steps that are left; as many as wanted when the end is unknown."""
        rates = foresee(self.lr_scheduler, optimizer, stepped=scheduler_stepped, say=self._say)
        return itertools.islice(rates, wanted if self.max_steps is None else max(self.max_steps - step, 0))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"learning_rates": [list(rates) for rates in self._rates], "warmup_end": self.warmup_end}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the learning rates that :meth:`state` gave."""
        self._rates = [tuple(rates) for rates in state["learning_rates"]]
