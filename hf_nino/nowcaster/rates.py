"""Learning rates as a nowcaster is told them: what they were over its history, and how much is still to come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """The learning rates around a nowcast.  Only their ratios count: ten times as much everywhere is the same.

    Args:
        past: mean learning rates, oldest first, in any unit: of the steps before the first snapshot (as many as an
            interval has), then of each of the C - 1 intervals between snapshots.
        ahead: learning rate that the horizon covers, in intervals at the mean rate of the history: the sum over the
            steps to the horizon, divided by the mean over the C - 1 intervals and by the steps of one.  With a
            constant learning rate it is the horizon.

    Raises:
        ValueError: fewer than two past rates, one that is negative or not finite, or a history without any.
    """

    past: tuple[float, ...]
    ahead: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "past", tuple(float(rate) for rate in self.past))
        for name, values in (("past", self.past), ("ahead", (self.ahead,))):
            wrong = next((value for value in values if not (math.isfinite(value) and value >= 0)), None)
            if wrong is not None:
                raise ValueError(f"`{name}` of learning rates must be at least 0 and finite, got {wrong}")
        if len(self.past) < 2:
            raise ValueError(f"`past` of learning rates must have one for every snapshot, got {len(self.past)}")
        if not self.unit:
            raise ValueError("`past` of learning rates must be above 0 somewhere between the snapshots, got only 0")

    @property
    def unit(self) -> float:
        """The mean over the intervals between snapshots, which everything else is measured in."""
        return math.fsum(self.past[1:]) / (len(self.past) - 1)

    @classmethod
    def constant(cls, context: int, horizon: float) -> Rates:
        """Those of a constant schedule."""
        return cls((1.0,) * context, float(horizon))

    @classmethod
    def at_snapshots(cls, rates: Sequence[float], future: float, interval: int) -> Rates:
        """From the learning rate at each of C snapshots, which is taken to change evenly between two of them.

        Args:
            future: sum of the learning rates of the steps to the horizon, in the unit of ``rates``.
            interval: steps between snapshots.
        """
        between = [(before + after) / 2 for before, after in itertools.pairwise(rates)]
        unit = math.fsum(between) / max(len(between), 1)
        # A history without a learning rate is refused by the class.
        return cls((rates[0], *between), future / (unit * interval) if unit > 0 else 0.0)
