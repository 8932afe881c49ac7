"""Keeps nowcasts within a share of training time, where they are dear: in large models, with small batches."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

# In smaller models nowcasts take milliseconds, and when they fall should not depend on a clock.
LARGE = 10_000_000
NOT_KNOWN = "what a nowcast takes is not known yet"
# Steps whose median is what a step takes: evaluations and checkpoints between two of them do not count.
TIMED = 50


class Overhead:
    """What nowcasts have cost so far, against what training has.

    A nowcast costs as much as the model has parameters; a step, as it has parameters times tokens.  So a nowcast every
    25 steps is next to nothing with large batches, and a good part of the run with tiny ones.  Here it has to wait for
    the next multiple of the period at which everything spent on nowcasts, itself included, is at most ``limit`` of the
    time that the steps have taken.  It is taken to cost what the last one did, and the first one what is expected.

    Times are this process's, without waiting for a GPU: in the steady state the host is as slow as the GPU is.

    Args:
        limit: share of training time, above 0; ``None``: whatever they cost.
        parameters: of the whole model; below 10 million there is no limit.

    Attributes:
        step_seconds: median of the last steps, nowcasts excluded; ``None`` before the first.

    Raises:
        ValueError: ``limit`` is not above 0.
    """

    def __init__(self, limit: float | None, parameters: int) -> None:
        self.limit = check_overhead(limit)
        self.bounded = limit is not None and parameters >= LARGE
        self._steps: deque[float] = deque(maxlen=TIMED)
        self._saved: float | None = None
        self._last: tuple[float, float] | None = None
        self._before = self._cost = 0.0

    def tick(self, spent: float) -> None:
        """Call at every optimizer step.

        Args:
            spent: seconds spent on nowcasting so far.
        """
        if not self.bounded:
            return
        now = time.perf_counter()
        if self._last is not None:
            at, then = self._last
            self._steps.append(max(now - at - (spent - then), 0.0))
        self._last = now, spent

    def nowcast_made(self, spent: float) -> None:
        """Call after every nowcast, with the seconds spent on nowcasting so far, this one's snapshots included."""
        if not self.bounded:
            return
        self._cost, self._before = spent - self._before, spent

    @property
    def step_seconds(self) -> float | None:
        return median(self._steps) if self._steps else self._saved

    def too_dear(self, step: int, spent: float, expected: float | None = 0.0) -> str:
        """Why a nowcast at ``step`` has to wait, in words; empty if it has not to.

        Args:
            spent: seconds spent on nowcasting so far.
            expected: what the first nowcast will take; 0 if nobody can say, and then it does not wait; ``None`` if
                that is not known yet.
        """
        if self.bounded and not self._cost and expected is None:
            return NOT_KNOWN
        seconds, cost = self.step_seconds, self._cost or expected
        if not self.bounded or not cost or not seconds or self.limit is None:
            return ""
        if spent + cost <= self.limit * step * seconds:
            return ""
        apart = math.ceil(cost / (self.limit * seconds))
        return (
            f"a nowcast takes {cost:.2g} s and an optimizer step {seconds:.2g} s. There will be one about every "
            f"{apart:,} steps, so that nowcasts take at most {self.limit:.3g} of training time (`max_overhead`; None "
            "for as many as the period says)"
        )

    def forget(self) -> None:
        """What was spent belongs to another run."""
        self._saved, self._last = None, None
        self._before = self._cost = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing without a limit: states of equal runs are equal."""
        if not self.bounded:
            return {}
        return {"step_seconds": self.step_seconds, "before": self._before, "cost": self._cost}

    def load(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state` gave."""
        if state:
            self._saved = state["step_seconds"]
            self._before, self._cost = float(state["before"]), float(state["cost"])


def check_overhead(limit: float | None, name: str = "max_overhead") -> float | None:
    """The share as a number.

    Raises:
        ValueError: it is not above 0.
    """
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise ValueError(f"`{name}` must be a share of training time, above 0, or None for any, got {limit!r}")
    return float(limit)
