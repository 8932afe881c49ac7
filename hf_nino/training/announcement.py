"""Says once, early in a run, what nowcasting costs."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

from transformers.utils import logging

from ..nowcaster.base import Nowcaster
from .estimate import TOO_MUCH, Estimate, calibrate, estimate, synchronize
from .ranks import is_first_rank

if TYPE_CHECKING:
    from .nowcasting import Nowcasting

logger = logging.get_logger(__name__)

# The first steps are slow: compilation, autotuning, data loaders that start.
SKIPPED = 3
# Steps that are timed: as many as an interval has, within these bounds; the fewest where nowcasts are bounded by time.
FEWEST, MOST = 5, 50

# Seconds of the longest trial nowcast: all of them take about ten times as long.
TRIAL = 0.02


class Announcement:
    """Times the first steps of a run, calibrates, and logs the :class:`Estimate`; a warning above 5% of training time.

    On the first rank only, and only once.  Nothing that goes wrong here reaches the run.

    Args:
        nowcaster: one with a memory has nothing in it yet; then a copy is kept until the estimate is made.
        interval: optimizer steps between snapshots.
        soon: after 8 steps at the latest: nowcasts wait for it.
    """

    def __init__(self, nowcaster: Nowcaster, interval: int, soon: bool = False) -> None:
        self.estimate: Estimate | None = None
        self._steps = FEWEST if soon else min(max(interval, FEWEST), MOST)
        self._ticks = 0
        self._started = self._busy = 0.0
        self._nowcaster: Nowcaster | None = None
        if is_first_rank():
            try:
                self._nowcaster = copy.deepcopy(nowcaster) if nowcaster.has_memory else nowcaster
            except Exception as error:
                self._give_up(error)

    @property
    def expected(self) -> float | None:
        """Seconds of the first nowcast; ``None`` before the estimate, 0 where there is none, as on other ranks."""
        if self.estimate is not None:
            return self.estimate.seconds_of_the_first
        return 0.0 if self._nowcaster is None else None

    def tick(self, nowcasting: Nowcasting) -> None:
        """Call at every optimizer step, before anything else is done."""
        if self._nowcaster is None:
            return
        self._ticks += 1
        if self._ticks == SKIPPED:
            self._started, self._busy = self._now(nowcasting), nowcasting.seconds
        elif self._ticks == SKIPPED + self._steps:
            elapsed = self._now(nowcasting) - self._started - (nowcasting.seconds - self._busy)
            nowcaster, self._nowcaster = self._nowcaster, None
            started = time.perf_counter()
            try:
                self._announce(nowcasting, nowcaster, max(elapsed, 1e-9) / self._steps)
            except Exception as error:
                self._give_up(error)
            nowcasting.seconds += time.perf_counter() - started

    def _announce(self, nowcasting: Nowcasting, nowcaster: Nowcaster, seconds: float) -> None:
        history, parameters = nowcasting.history, nowcasting.own_parameters
        settings = {"history_device": history.device, "history_dtype": history.dtype}
        calibration = calibrate(nowcaster, parameters, device=nowcasting.store.device, long_enough=TRIAL, **settings)
        self.estimate = estimate(
            calibration,
            nowcaster,
            parameters,
            work=_own_work(nowcasting, nowcaster),
            watched=nowcasting.probation.patience > 0,
            period=nowcasting.period,
            interval=nowcasting.interval,
            seconds_per_step=seconds,
            steps_are=f"measured over {self._steps} steps",
            **settings,
        )
        if self.estimate.overhead <= TOO_MUCH:
            logger.info(f"NiNo: {self.estimate}.")
        elif nowcasting.overhead.bounded:
            logger.info(f"NiNo: {self.estimate}; they will be fewer, to stay within `max_overhead`.")
        else:
            logger.warning(
                f"NiNo: {self.estimate}. That is more than {TOO_MUCH:.0%}: a longer period, or a nowcaster without "
                "weights ('linear'), costs less."
            )

    @staticmethod
    def _now(nowcasting: Nowcasting) -> float:
        synchronize(nowcasting.store.device)
        return time.perf_counter()

    @staticmethod
    def _give_up(error: Exception) -> None:
        logger.info(f"The cost of nowcasts cannot be estimated ({type(error).__name__}: {error}).")


def _own_work(nowcasting: Nowcasting, nowcaster: Nowcaster) -> float:
    """This rank's share of the work of a nowcast."""
    shapes = [shape for _, shape, _ in nowcasting.store.signature()]
    return (
        nowcaster.work(shapes, nowcasting.store.device)
        * nowcasting.own_parameters
        / max(nowcasting.store.elements(own=False), 1)
    )
