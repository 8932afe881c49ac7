"""How often to nowcast, and how far apart the snapshots are."""

from __future__ import annotations

from transformers.utils import logging

from ..nowcaster.base import Nowcaster

logger = logging.get_logger(__name__)

# A run of known length gets at least this many nowcasts, by a shorter period if need be.
MIN_NOWCASTS = 4


def resolve_schedule(
    nowcaster: Nowcaster, period: int | None, interval: int | None, max_steps: int | None
) -> tuple[int, int]:
    """``(period, interval)`` in optimizer steps.

    ``period=None`` is the nowcaster's own, or less in a run so short that fewer than 4 nowcasts would fit: then
    ``max_steps // 4``, rounded down to a multiple of the nowcaster's context.  ``interval=None`` is
    ``period // context``.

    Raises:
        ValueError: a period below the context, or an interval at which the snapshots do not fit into a period.
    """
    context, kind = nowcaster.context, type(nowcaster).__name__
    if period is None:
        period = nowcaster.period
        if max_steps is not None and max_steps < MIN_NOWCASTS * period:
            shorter = max(max_steps // MIN_NOWCASTS // context, 1) * context
            if shorter < period:
                logger.warning(
                    f"A nowcast every {shorter} steps instead of {kind}'s usual {period}, because the run has only "
                    f"{max_steps} steps; pass `period` to choose another."
                )
                period = shorter
    if period < context:
        raise ValueError(f"`period` must be at least the {context} snapshots that {kind} reads, got {period} steps")
    if interval is None:
        interval = period // context
    if interval < 1 or (context - 1) * interval >= period:
        most = (period - 1) // (context - 1) if context > 1 else period
        raise ValueError(
            f"`interval` must leave room for {context} snapshots within a period of {period} steps (1 to {most}), "
            f"got {interval}"
        )
    return period, interval


def resolve_stop(stop_step: int | None, stop_fraction: float | None, max_steps: int | None) -> int | None:
    """The step after which there is no nowcast: the earlier of the two ends, ``None`` without any.

    Raises:
        ValueError: a share out of range, or of a run whose length is not known.
    """
    if stop_fraction is None:
        return stop_step
    if not 0 < stop_fraction <= 1:
        raise ValueError(f"`stop_fraction` must be above 0 and at most 1, got {stop_fraction}")
    if max_steps is None:
        raise ValueError("`stop_fraction` needs `max_steps`, the length of the run, got None")
    end = int(stop_fraction * max_steps)
    return end if stop_step is None else min(stop_step, end)
