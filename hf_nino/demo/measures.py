"""What two loss curves say about each other: pure functions on lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Evaluation loss over a run, in order.

    Args:
        steps: optimizer steps done, increasing, from 0.
        losses: evaluation loss at these steps, in nats per token.
        seconds: training time up to these steps, nowcasts included, evaluation excluded.
    """

    steps: tuple[float, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.losses) == len(self.seconds) >= 2:
            raise ValueError(
                "`steps`, `losses` and `seconds` must have the same length, at least 2, got "
                f"{len(self.steps)}, {len(self.losses)} and {len(self.seconds)}"
            )
        if any(after <= before for before, after in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"`steps` must increase, got {self.steps}")


def first_reach(xs: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The x at which the loss first is at most ``target``, on straight lines between the points.

    ``None`` when it never is.  A loss that is not finite counts as above every target.
    """
    return next((_crossing(xs, losses, target, i) for i, loss in enumerate(losses) if loss <= target), None)


def last_reach(xs: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The x from which on the loss stays at or below ``target``; like :func:`first_reach` otherwise."""
    above = max((i for i, loss in enumerate(losses) if not loss <= target), default=-1)
    return _crossing(xs, losses, target, above + 1) if above + 1 < len(losses) else None


def _crossing(xs: Sequence[float], losses: Sequence[float], target: float, i: int) -> float:
    """Where between points i - 1 and i the line crosses ``target``, given that point i does not lie above it."""
    if i == 0:
        return float(xs[0])
    drop = losses[i - 1] - losses[i]
    share = (losses[i - 1] - target) / drop if 0 < drop < float("inf") else 1.0
    return xs[i - 1] + share * (xs[i] - xs[i - 1])


@dataclass(frozen=True)
class Race:
    """How two runs got to the same evaluation loss; ``None`` where one did not.

    Args:
        target: the loss, in nats per token.
        plain_steps, nowcast_steps: steps to reach it for the first time.
        plain_steps_for_good, nowcast_steps_for_good: steps after which no evaluation was above it any more: the rise
            right after a nowcast counts.
        plain_seconds, nowcast_seconds: training seconds to reach it for the first time.
    """

    target: float
    plain_steps: float | None
    nowcast_steps: float | None
    plain_steps_for_good: float | None
    nowcast_steps_for_good: float | None
    plain_seconds: float | None
    nowcast_seconds: float | None

    @property
    def steps_saved(self) -> float | None:
        """Share of the plain run's steps that the nowcasts saved; negative when they cost steps."""
        return saved(self.plain_steps, self.nowcast_steps)

    @property
    def steps_saved_for_good(self) -> float | None:
        """The same for the steps after which the loss stayed there."""
        return saved(self.plain_steps_for_good, self.nowcast_steps_for_good)

    @property
    def seconds_saved(self) -> float | None:
        """The same for training seconds to the first time, those spent nowcasting included."""
        return saved(self.plain_seconds, self.nowcast_seconds)


def saved(plain: float | None, nowcast: float | None) -> float | None:
    """``1 - nowcast / plain``; ``None`` if either is unknown or ``plain`` is 0."""
    return None if plain is None or nowcast is None or plain == 0 else 1 - nowcast / plain


def race(plain: Curve, nowcast: Curve, target: float) -> Race:
    """Steps and seconds that each run needed to reach an evaluation loss of ``target``."""
    return Race(
        target=target,
        plain_steps=first_reach(plain.steps, plain.losses, target),
        nowcast_steps=first_reach(nowcast.steps, nowcast.losses, target),
        plain_steps_for_good=last_reach(plain.steps, plain.losses, target),
        nowcast_steps_for_good=last_reach(nowcast.steps, nowcast.losses, target),
        plain_seconds=first_reach(plain.seconds, plain.losses, target),
        nowcast_seconds=first_reach(nowcast.seconds, nowcast.losses, target),
    )
