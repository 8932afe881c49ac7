"""A method against plain AdamW: pure functions on runs of the same task, protocol and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ...demo.measures import first_reach, race, saved
from .results import Run

LOWER_IS_BETTER = ("final_loss", "loss_difference", "steps_behind", "overhead", "target_steps")
MEASURES: Mapping[str, str] = {
    "final_loss": "evaluation loss at the end",
    "accuracy": "evaluation accuracy at the end",
    "loss_difference": "the same minus AdamW's, after equally many steps",
    "steps_saved": "share of AdamW's steps to its own final loss that were not needed to reach it for the first time",
    "steps_saved_for_good": "the same for the step after which no evaluation was above it any more",
    "time_saved": "the same for training time to the first time: processor time on a CPU, wall time on a GPU",
    "steps_behind": "share of its steps by which AdamW was earlier at the worse of the two final losses",
    "target_steps": "steps to the task's target accuracy",
    "target_steps_saved": "share of AdamW's steps to it",
    "recovered": "share of the loss that a sweep brings AdamW over a quarter of its best learning rate",
    "overhead": "wall time of nowcasts as a share of all training time",
    "written": "nowcasts written into the model",
    "taken_back": "nowcasts taken back",
}
"""What is measured on one task in one protocol, each as a :class:`Spread` over seeds."""


@dataclass(frozen=True)
class Spread:
    """One number over seeds, or over tasks.

    Infinite on the worse side: a run did not get there, or diverged.  It is then worse than any that did, so that the
    median is infinite too unless more than half of them got there.

    Args:
        median, low, high: all as plain numbers, 4 digits of them.
        count: of seeds, or tasks.
        missed: how many of them did not get there.
    """

    median: float
    low: float
    high: float
    count: int
    missed: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of some numbers; ``None`` for none."""
        found = sorted(values)
        if not found:
            return None
        middle, low, high = (float(f"{value:.4g}") for value in (median(found), found[0], found[-1]))
        return cls(middle, low, high, len(found), sum(math.isinf(value) for value in found))

    @property
    def reached(self) -> bool:
        """Whether there is a median."""
        return math.isfinite(self.median)

    @property
    def width(self) -> float | None:
        """From the lowest to the highest that got there; ``None`` for fewer than two."""
        return self.high - self.low if self.count > 1 and math.isfinite(self.high - self.low) else None


def measure(runs: Mapping[int, Run], plain: Mapping[int, Run], swept: Mapping[int, Run] | None) -> dict[str, Spread]:
    """All of :data:`MEASURES` that there are for a method on one task in one protocol.

    Args:
        runs: seed -> run of the method.
        plain: seed -> run of AdamW; the method's own for AdamW itself.  A seed that it lacks, or on which it diverged,
            only counts for what needs no comparison.
        swept: AdamW's runs at its best learning rate, if ``runs`` and ``plain`` are those at a quarter of it.
    """
    swept = {} if swept is None or plain is runs else swept
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed, run in sorted(runs.items()):
        for values in (
            alone(run),
            {} if plain is runs or seed not in plain else against(run, plain[seed]),
            recovery(run, plain[seed], swept[seed]) if seed in plain and seed in swept else {},
        ):
            for name, value in values.items():
                found[name].append(value)
    spreads = {name: Spread.of(values) for name, values in found.items()}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def alone(run: Run) -> dict[str, float]:
    """What a run says by itself."""
    found = {"final_loss": run.final_loss}
    if run.accuracies:
        found["accuracy"] = -math.inf if run.diverged else run.accuracies[-1]
    if run.target is not None:
        found["target_steps"] = _or(steps_to_accuracy(run, run.target), math.inf)
    if run.nowcasts:
        found |= {"written": len(run.written), "taken_back": len(run.taken_back)}
        if run.train_seconds > 0:
            found["overhead"] = run.nowcast_seconds / run.train_seconds
    return found


def against(run: Run, plain: Run) -> dict[str, float]:
    """What a run says beside AdamW's of the same seed; empty if that one diverged.

    Where one of the two was over before its last step, their losses at the end are not of equally many steps: then
    only the steps to the target accuracy are compared.
    """
    if plain.diverged or plain.curve is None:
        return {}
    found = {}
    if run.target is not None and (steps := steps_to_accuracy(plain, run.target)):
        found["target_steps_saved"] = _or(saved(steps, steps_to_accuracy(run, run.target)), -math.inf)
    if run.over_early or plain.over_early:
        return found
    target = plain.final_loss
    found["loss_difference"] = run.final_loss - target
    if target >= plain.curve.losses[0]:
        return found  # AdamW learned nothing: there is no way to be faster
    if run.diverged or run.curve is None:
        found |= {"steps_saved": -math.inf, "steps_saved_for_good": -math.inf, "time_saved": -math.inf}
        found["steps_behind"] = math.inf
    else:
        result = race(plain.curve, run.curve, target)
        found["steps_saved"] = _or(result.steps_saved, -math.inf)
        found["steps_saved_for_good"] = _or(result.steps_saved_for_good, -math.inf)
        times = (first_reach(r.times, r.curve.losses, target) for r in (plain, run) if r.curve is not None)
        found["time_saved"] = _or(saved(*times), -math.inf)
        found["steps_behind"] = _or(steps_behind(run, plain), math.inf)
    return found


def recovery(run: Run, plain: Run, swept: Run) -> dict[str, float]:
    """How much of what AdamW loses by a quarter of its best learning rate a method does not lose there.

    ``(L(plain) - L(run)) / (L(plain) - L(swept))``; empty if AdamW lost nothing on this seed.
    """
    lost = plain.final_loss - swept.final_loss
    if not (lost > 0 and math.isfinite(lost)):
        return {}
    return {"recovered": (plain.final_loss - run.final_loss) / lost}


def steps_behind(run: Run, plain: Run) -> float | None:
    """By which share of AdamW's steps to its own final loss the method is late; negative if it is early.

    At AdamW's final loss if the method got there; else at the method's own, at which AdamW was earlier.  (Both runs
    are equally long, so a method that is late at AdamW's final loss has not got there when its run ends.)  ``None`` if
    AdamW's loss never fell.
    """
    if run.curve is None or plain.curve is None:
        return None
    losses = plain.curve.losses
    end = first_reach(plain.curve.steps, losses, losses[-1])
    if not end:
        return None
    reached = first_reach(run.curve.steps, run.curve.losses, losses[-1])
    if reached is not None:
        return reached / end - 1
    earlier = first_reach(plain.curve.steps, losses, run.final_loss)
    return None if earlier is None else 1 - earlier / end


def steps_to_accuracy(run: Run, target: float) -> float | None:
    """Steps at which an accuracy was reached for the first time, on straight lines between evaluations; ``None`` if
    never, or if the run diverged."""
    if run.diverged or run.curve is None or len(run.accuracies) != len(run.curve.steps):
        return None
    return first_reach(run.curve.steps, [-accuracy for accuracy in run.accuracies], -target)


def middle_run(runs: Sequence[Run]) -> Run | None:
    """The run whose final loss is the median over seeds (the worse of the middle two); ``None`` if it diverged."""
    ordered = sorted(runs, key=lambda run: run.final_loss)
    run = ordered[len(ordered) // 2] if ordered else None
    return None if run is None or run.diverged else run


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
