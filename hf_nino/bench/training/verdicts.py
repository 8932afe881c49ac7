"""What nowcasting on AdamW was meant to reach, and whether it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .plan import BASELINE
from .summary import Comparison, Summary

LARGE = 10_000_000
"""Parameters from which on overhead counts."""

BEHIND = 0.01


@dataclass(frozen=True)
class Aim:
    """What is asked of one nowcaster.

    Args:
        text: what, in words.
        short: the same as a column's head.
        protocol: in which it is measured; ``None`` for all.
        least: value that a majority of the language tasks must come to; ``None`` where every case counts.
        most: value that no case may exceed; ``None`` where a majority counts.
    """

    text: str
    short: str
    protocol: str | None = None
    least: float | None = None
    most: float | None = None


AIMS: Mapping[str, Aim] = {
    "fixed": Aim(
        "`fixed`: at least 25% fewer steps to AdamW's final loss, on a majority of language tasks",
        "`fixed` 25%",
        "fixed",
        least=0.25,
    ),
    "tuned": Aim(
        "`tuned`: at least 10% fewer steps to AdamW's final loss, on a majority of language tasks",
        "`tuned` 10%",
        "tuned",
        least=0.10,
    ),
    "robust": Aim(
        "`robust`: at a quarter of AdamW's best learning rate, at least 70% of the loss that the sweep recovers, on a "
        "majority of language tasks",
        "`robust` 70%",
        "robust",
        least=0.70,
    ),
    "overhead": Aim(
        "nowcasts take at most 1% of the training time, on every task with at least 10 million parameters, in every "
        "protocol",
        "overhead 1%",
        most=0.01,
    ),
    "loss": Aim(
        "never behind in loss: in no protocol and on no task a final loss more than 1% above AdamW's",
        "loss behind 1%",
        most=BEHIND,
    ),
    "steps": Aim(
        "never behind in steps: in no protocol and on no task more than 1% of AdamW's steps late",
        "steps behind 1%",
        most=BEHIND,
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What was found of one aim.

    Args:
        passed: ``None``: not measured.
        values: task -> median over seeds (for aims about all protocols, the worst of them); infinite on the worse
            side where it did not get there.
    """

    aim: Aim
    passed: bool | None
    values: Mapping[str, float]

    @property
    def word(self) -> str:
        """``pass``, ``fail`` or ``not measured``."""
        return "not measured" if self.passed is None else "pass" if self.passed else "fail"

    @property
    def passing(self) -> int:
        """Tasks that come to the aim."""
        return sum(_good(self.aim, value) for value in self.values.values())


def verdicts(summary: Summary, method: str) -> dict[str, Verdict]:
    """All of :data:`AIMS` for one nowcaster on AdamW, by name."""
    found = {}
    for name, aim in AIMS.items():
        values: dict[str, float] = {}
        for comparison in summary.find(aim.protocol, method, "language" if aim.least is not None else None):
            value = _value(summary, name, comparison)
            if value is not None:
                values[comparison.task] = max(value, values.get(comparison.task, -math.inf))
        good = sum(_good(aim, value) for value in values.values())
        enough = good == len(values) if aim.least is None else 2 * good > len(values)
        found[name] = Verdict(aim, enough if values else None, values)
    return found


def best_nowcaster(summary: Summary) -> str | None:
    """The nowcaster on AdamW that reaches most aims; of several, the one that saves most steps in ``fixed``, then in
    ``tuned``, then in ``paper`` (median over language tasks).  One for all aims, not one for each."""

    def rank(name: str) -> tuple[float, ...]:
        passed = sum(verdict.passed is True for verdict in verdicts(summary, name).values())
        spreads = [summary.over_tasks(p, name, "language", "steps_saved") for p in ("fixed", "tuned", "paper")]
        return passed, *(-math.inf if spread is None else spread.median for spread in spreads)

    return max((name for name in summary.nowcasters if summary.find(method=name)), key=rank, default=None)


def loss_behind(summary: Summary, comparison: Comparison) -> float | None:
    """Median difference of final losses as a share of AdamW's median final loss; negative if lower."""
    plain = summary.get(comparison.protocol, comparison.task, BASELINE)
    difference = comparison.measures.get("loss_difference")
    if plain is None or difference is None or not plain.measures["final_loss"].reached:
        return None
    return difference.median / plain.measures["final_loss"].median


def _value(summary: Summary, name: str, comparison: Comparison) -> float | None:
    """What an aim looks at, of one comparison; ``None`` if that was not measured, or does not count."""
    if name == "loss":
        return loss_behind(summary, comparison)
    if name == "overhead" and summary.tasks[comparison.task].parameters < LARGE:
        return None
    measure = {"robust": "recovered", "overhead": "overhead", "steps": "steps_behind"}.get(name, "steps_saved")
    spread = comparison.measures.get(measure)
    return None if spread is None else spread.median


def _good(aim: Aim, value: float) -> bool:
    return value >= aim.least if aim.least is not None else value <= (aim.most or 0.0)
