"""Learning-rate schedules as pure functions of the step, equal to those of transformers."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "linear", "wsd")

DECAY = 0.2
"""Share of a ``wsd`` run in which the learning rate falls, at its end."""


def schedule_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """By what the peak learning rate is multiplied in the optimizer step after ``step`` steps.

    From 0 it rises in ``warmup`` steps to 1.  Then it stays (``constant``), falls as half a cosine (``cosine``) or a
    line (``linear``) to 0 at ``steps``, or stays and falls as a line in the last fifth of the run (``wsd``: warm-up,
    stable, decay).

    Args:
        schedule: one of :data:`SCHEDULES`.
        step: from 0.
        steps: of the whole run.
        warmup: 0: none.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    decay = round(DECAY * steps) if schedule == "wsd" else steps - warmup
    progress = min(max(0.0, (step - (steps - decay)) / max(1, decay)), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
