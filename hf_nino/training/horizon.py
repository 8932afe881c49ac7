r"""How far to look ahead now: decay schedule, learning-rate budget, feedback.

Four policies, all in intervals, all bounded by the nowcaster's ``max_horizon``:

* ``"lr-budget"`` (default): :math:`k = \min(K, \lfloor \sum_{t' > t} \eta_{t'} \,/\, (\bar\eta \cdot \text{interval})
  \rfloor)`, the sum over the learning rates of all steps that are left and :math:`\bar\eta` the mean over the history.
  An interval of history moved the parameters at rate :math:`\bar\eta`; the rest of the run cannot move them further
  than the learning rate that is left allows.  0 means no nowcast.
* ``"paper"``: the decay of the original release, :math:`k_i = \mathrm{round}(\mathrm{linspace}(\sqrt K, 1, n)_i^2)`,
  with ``n = max_steps // period`` nowcasts (arXiv 2409.04434).  It assumes a constant learning rate.
* ``"constant:8"``, or the number alone: always this many intervals.
* ``"adaptive"``: that of ``"lr-budget"``, times a share that begins at a half, grows after nowcasts that paid off and
  falls after those that did not (:class:`Trust`).

Under every policy a nowcast that had to be taken back halves the next one's reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

POLICIES = ("lr-budget", "paper", "adaptive")

# A budget of 2.9999999 intervals is 3: learning rates are sums of rounded floats.
_ROUNDING = 1e-6


def paper_horizons(max_horizon: int, nowcasts: int) -> list[int]:
    """The horizons of ``nowcasts`` nowcasts, in intervals: 40 33 26 21 16 11 8 5 3 1 for 10 and ``max_horizon`` 40."""
    first = math.sqrt(max_horizon)
    slope = (1 - first) / max(nowcasts - 1, 1)
    return [round((first + slope * i) ** 2) for i in range(nowcasts)]


def budget_horizon(future: Iterable[Sequence[float]], past: Sequence[float], interval: int, max_horizon: int) -> int:
    """Intervals that the learning rate that is left allows, 0 .. ``max_horizon``.

    Args:
        future: learning rates of the steps to come, one per parameter group; read no further than needed.
        past: mean learning rate over the history, per group.  Groups at 0 do not move and are not asked; the most
            restricted of the others decides.
        interval: optimizer steps per interval.
        max_horizon: the most that is wanted.
    """
    groups = [group for group, rate in enumerate(past) if rate > 0]
    if not groups:
        return 0
    needed = {group: past[group] * interval * max_horizon for group in groups}
    left = dict.fromkeys(groups, 0.0)
    for rates in future:
        for group in groups:
            left[group] += rates[group]
        if all(left[group] >= needed[group] for group in groups):
            return max_horizon
    share = min(left[group] / needed[group] for group in groups)
    return min(max_horizon, math.floor(share * max_horizon + _ROUNDING))


@dataclass(frozen=True)
class Horizon:
    """A policy for the horizon; see the module.

    Args:
        policy: ``"lr-budget"``, ``"paper"``, ``"adaptive"``, or a number of intervals (also as a string, and as
            ``"constant:NUMBER"``).

    Raises:
        ValueError: any other policy, or a number below 1.
    """

    policy: str | int = "lr-budget"

    def __post_init__(self) -> None:
        policy = self.policy
        text = policy.removeprefix("constant:").strip() if isinstance(policy, str) else ""
        if text.isdigit():
            policy = int(text)
        number = isinstance(policy, int) and not isinstance(policy, bool)
        if not (number and policy >= 1) and policy not in POLICIES:
            raise ValueError(f"`horizon` must be one of {POLICIES} or a number of intervals, got {self.policy!r}")
        object.__setattr__(self, "policy", policy)

    def now(
        self,
        *,
        step: int,
        period: int,
        interval: int,
        max_horizon: int,
        max_steps: int | None = None,
        past: Sequence[float] = (1.0,),
        future: Iterable[Sequence[float]] = (),
    ) -> int:
        """Intervals to look ahead at ``step``, 0 .. ``max_horizon``; 0 means no nowcast.

        Args:
            step: optimizer steps done.
            period: steps between nowcasts.
            interval: steps between snapshots.
            max_horizon: the nowcaster's largest.
            max_steps: length of the run; ``"paper"`` needs it.
            past: mean learning rate over the history, per parameter group (``"lr-budget"``, ``"adaptive"``).
            future: learning rates of the steps that are left, per parameter group (the same).
        """
        if self.policy in ("lr-budget", "adaptive"):
            return budget_horizon(future, past, interval, max_horizon)
        if self.policy == "paper":
            if max_steps is None:
                raise ValueError("`horizon='paper'` needs `max_steps`, the length of the run, got None")
            schedule = paper_horizons(max_horizon, max(max_steps // period, 1))
            return schedule[min(max(step // period - 1, 0), len(schedule) - 1)]
        return min(int(self.policy), max_horizon)


class Trust:
    """How much of a horizon is used: a share that follows what became of the last nowcasts.

    Args:
        adaptive: begin at a half, and move with every nowcast; else begin at 1, and return there by doubling.

    Attributes:
        share: above 0, at most 1.
    """

    _GROW, _SHRINK, _LEAST = 1.5, 0.75, 1 / 64

    def __init__(self, adaptive: bool) -> None:
        self.adaptive = adaptive
        self.share = 0.5 if adaptive else 1.0

    def reach(self, horizon: int) -> tuple[int, float]:
        """The horizon to use instead, at least 1, and the share of the step there that is to be taken.

        Below one interval the horizon can get no shorter; then the step does.
        """
        wanted = horizon * self.share
        shorter = max(math.floor(wanted + _ROUNDING), min(horizon, 1))
        return shorter, min(wanted / shorter, 1.0) if shorter else 1.0

    def taken_back(self) -> None:
        """A nowcast was taken back."""
        self.share = max(self.share / 2, self._LEAST)

    def kept(self, paid_off: bool | None) -> None:
        """A nowcast has passed its probation; ``paid_off``: whether clearly (``None``: neither nor)."""
        if not self.adaptive:
            self.share = min(self.share * 2, 1.0)
        elif paid_off is not None:
            self.share = min(max(self.share * (self._GROW if paid_off else self._SHRINK), self._LEAST), 1.0)
