"""Watching the run after a nowcast: is it where the optimizer alone would be, some steps later?  If not, go back.

Right after a nowcast the loss says nothing: good ones raise it, sometimes a lot, and fall below the optimizer's own
curve some steps later.  So a nowcast is on probation for ``patience`` steps; then the losses of the last third of
them are compared with a forecast from the losses before it (:mod:`hf_nino.training.forecast`).  Nowcasts that come
meanwhile share its probation and its fate.

A nowcast whose step goes *astray*, not at all where the history went, has to show more than that it did no harm: it
must have paid off.  Averages of past states do so at once; noise and old states do not, and what they cost is too
little to be told from luck each time, but not in sum.  Once one had to be taken back, further ones are refused.

What a wrong nowcast costs is thereby bounded by ``patience`` steps.  What all of them cost is bounded by
:data:`BUDGET`: nowcasting stops before a further one could exceed it, and after ``max_failures`` in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .forecast import WORSE, Comparison, compare
from .losses import LossMeter

# Share of a run's steps that nowcasts which were taken back may cost together.
BUDGET = 0.03
# Patience unless told otherwise: this share of the run, within these bounds; without a known end, UNKNOWN steps.
SHARE, LEAST, MOST, UNKNOWN = 0.01, 30, 200, 100
# The window of losses before a nowcast, in multiples of the patience.
WINDOW = 2.5
# Losses a window has at least, even if it then reaches back over an earlier nowcast.
FEWEST = 20
# Below this cosine between its step and the move of the history, a nowcast is astray.
ASTRAY = 0.1
# A loss this many standard errors below the forecast: it paid off; above: it did not.
CLEARLY = 1.0
# Without losses, only a probe: the relative rise over a probation that is too much.
PROBE_RISE = 0.02


def default_patience(max_steps: int | None) -> int:
    """Steps of probation in a run of ``max_steps``; 0 in one too short to learn anything from a probation."""
    if max_steps is None:
        return UNKNOWN
    return 0 if max_steps < 10 * LEAST else min(max(round(SHARE * max_steps), LEAST), MOST)


@dataclass(frozen=True)
class Outcome:
    """How a probation ended.

    Attributes:
        worse: whether the nowcast is to be taken back.
        reason: why, in numbers.
        paid_off: ``True`` if the loss is clearly below the forecast, ``False`` if clearly above, else ``None``.
    """

    worse: bool
    reason: str = ""
    paid_off: bool | None = None


class Probation:
    """The probation of one nowcast at a time, and the record of those before.

    Args:
        patience: steps; 0: never.
        max_failures: nowcasts taken back in a row after which nowcasting stops.
        max_steps: length of the run, if known.

    Attributes:
        opened: the step of the nowcast on probation; ``None`` without one.
        failures: nowcasts refused or taken back in a row.
        lost: steps that were spent on nowcasts which were taken back.
        last_nowcast: step of the last nowcast, or of the last that was taken back.
        barred: whether nowcasts that are astray are refused.
        judged: the nowcast that was last judged by its losses (the step it was opened at), and how it compared.
    """

    def __init__(self, patience: int, max_failures: int, max_steps: int | None) -> None:
        self.patience, self.max_failures, self.max_steps = patience, max_failures, max_steps
        self.opened: int | None = None
        self.failures = 0
        self.lost = 0
        self.last_nowcast = 0
        self.barred = False
        self.judged: tuple[int, Comparison] | None = None
        self._start = 0
        self._astray = False
        self._probe: float | None = None
        self._horizon = 0

    @property
    def window(self) -> int:
        """Losses before a nowcast that are looked at, at most."""
        return max(round(WINDOW * self.patience), FEWEST)

    def opens(self, step: int, first: int) -> None:
        """A nowcast is about to be written at ``step``; losses up to ``first`` (warm-up) are of no use."""
        middle = self.last_nowcast + (step - self.last_nowcast) // 2 if self.last_nowcast > first else first
        self._start = max(min(middle, step - FEWEST), step - self.window, first)
        self.opened, self._astray, self._probe, self._horizon = step, False, None, 0

    def describe(self, horizon: int, alignment: float, probe: float | None) -> None:
        """What is known of the nowcast on probation.

        Args:
            horizon: intervals.
            alignment: cosine between its step and the move of the history; nan if unknown.
            probe: the loss on the fixed batches before it.
        """
        self._horizon, self._astray, self._probe = horizon, alignment < ASTRAY, probe

    @property
    def horizon(self) -> int:
        return self._horizon

    def ends(self, step: int) -> bool:
        """Whether a probation ends at ``step``."""
        return self.opened is not None and step >= self.opened + self.patience

    def too_late(self, step: int) -> bool:
        """Whether the run ends before a probation that begins at ``step``."""
        return self.patience > 0 and self.max_steps is not None and step + self.patience > self.max_steps

    def judge(self, losses: LossMeter, probe: float | None) -> Outcome:
        """Judge the nowcast on probation, at its end; on all ranks at once."""
        comparison = self._compare(losses)
        if comparison is not None:
            self.judged = self.opened, comparison
            return self._by_losses(comparison)
        if probe is None or self._probe is None:
            return Outcome(False, "there were too few losses to judge it by")
        worse = not probe <= self._probe + PROBE_RISE * abs(self._probe)
        found = (
            f"the loss on the fixed batches is {probe:.4g} after {self.patience} steps, before it {self._probe:.4g}"
        )
        return Outcome(worse, found if worse else "", paid_off=probe < self._probe)

    def _compare(self, losses: LossMeter) -> Comparison | None:
        entries = losses.read()
        late = self.opened + 2 * self.patience // 3
        before = [(a, b, y) for a, b, y in entries if a > self._start and b <= self.opened]
        after = [(a, b, y) for a, b, y in entries if a > late and b <= self.opened + self.patience]
        return compare(
            [(a + b) / 2 for a, b, _ in before],
            [y for _, _, y in before],
            [(a + b) / 2 for a, b, _ in after],
            [y for _, _, y in after],
        )

    def _by_losses(self, found: Comparison) -> Outcome:
        paid_off = True if found.z < -CLEARLY else False if found.z > CLEARLY else None
        if found.z <= (-CLEARLY if self._astray else WORSE):
            return Outcome(False, paid_off=paid_off)
        text = f"{self.patience} steps later the loss is {found.observed:.4g}, where {found.expected:.4g} was foretold"
        above = f"{abs(found.z):.1f} standard errors {'above' if found.z > 0 else 'below'}"
        rule = f"more than {WORSE:g} are no accident"
        if self._astray:
            rule = f"its step does not go where the history went, so it has to be {CLEARLY:g} below"
        return Outcome(True, f"{text} ({above}; {rule})", paid_off)

    def closes(self, worse: bool, step: int) -> None:
        """The probation is over at ``step``."""
        if worse:
            self.failures += 1
            self.lost += step - self.opened
            self.barred = self.barred or self._astray
        else:
            self.failures = 0
        self.opened = None

    def refuses(self, alignment: float) -> str:
        """Why a nowcast is not even tried; empty: it is."""
        if not (self.barred and alignment < ASTRAY):
            return ""
        return "its step does not go where the history went, and one like that had to be taken back"

    def refused(self) -> None:
        """A nowcast was not written."""
        self.failures += 1

    def hopeless(self) -> str:
        """Why nowcasting should stop; empty: it should not."""
        if self.failures >= self.max_failures:
            return f"{self.failures} nowcasts in a row were refused or taken back"
        if self.lost and self.max_steps is not None and self.lost + self.patience > BUDGET * self.max_steps:
            return f"{self.lost} of {self.max_steps} steps went into nowcasts that were taken back"
        return ""

    def abandon(self) -> None:
        """Forget the nowcast on probation."""
        self.opened = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name.lstrip("_"): getattr(self, name) for name in self._KEPT}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        for name in self._KEPT:
            setattr(self, name, state[name.lstrip("_")])

    _KEPT = ("opened", "failures", "lost", "last_nowcast", "barred", "_start", "_astray", "_probe", "_horizon")
