"""What is known of a run: plain frozen data, whatever it was read from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Series = tuple[tuple[float, float], ...]
"""(optimizer step, value) pairs, in order."""

# What became of a nowcast that was due.
ACCEPTED, SHORTENED, TAKEN_BACK, REFUSED = "accepted", "shortened", "taken back", "refused"
OBSERVED, NOT_TRIED = "observed", "not tried"
FATES = (ACCEPTED, SHORTENED, TAKEN_BACK, REFUSED, OBSERVED, NOT_TRIED)


@dataclass(frozen=True)
class Gain:
    """The training loss some steps after a nowcast, against the forecast of the optimizer alone.

    Attributes:
        observed, expected: mean loss, and what was foretold for the same steps.
        error: standard error of their difference.
        recorded: whether training itself compared them, from the loss of every step; else from the logged means.
    """

    observed: float
    expected: float
    error: float
    recorded: bool

    @property
    def excess(self) -> float:
        """Loss above the forecast; below 0 the nowcast paid off."""
        return self.observed - self.expected


@dataclass(frozen=True)
class Nowcast:
    """A nowcast that was due, and what became of it.

    Attributes:
        step: optimizer steps done.
        horizon: intervals; 0 when none was allowed.
        horizon_steps: the same in optimizer steps; ``None`` if not known.
        seconds: spent on it.
        accepted: whether it was written into the model, were it to be taken back later.
        reason: why not; empty if accepted, or not known.
        relative_step_norm: length of its step over the norm of the parameters.
        loss_before, loss_after: on fixed batches, where measured.
        shortened: parameter tensors whose step was too long and was shortened, or left out.
        taken_back_at: the step at which it was taken back; ``None``: it stayed.
        gain: ``None`` if nobody compared.
    """

    step: int
    horizon: int
    seconds: float
    accepted: bool
    horizon_steps: int | None = None
    reason: str = ""
    relative_step_norm: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    shortened: int = 0
    taken_back_at: int | None = None
    gain: Gain | None = None

    @property
    def fate(self) -> str:
        """One of :data:`FATES`."""
        if self.taken_back_at is not None:
            return TAKEN_BACK
        if self.accepted:
            return SHORTENED if self.shortened else ACCEPTED
        if self.relative_step_norm is not None:
            return OBSERVED  # predicted, measured and not written
        return REFUSED if self.horizon else NOT_TRIED


@dataclass(frozen=True)
class Place:
    """A projection of the parameters at one moment.

    Attributes:
        step: optimizer steps done.
        point: the numbers.
        arrived: how: ``"training"``, ``"nowcast"`` (from the place before) or ``"taken back"``.
    """

    step: int
    point: tuple[float, ...]
    arrived: str = "training"


@dataclass(frozen=True)
class Memory:
    """Bytes of one kind, and where they lie."""

    what: str
    where: str
    size: int


@dataclass(frozen=True)
class RunFacts:
    """Everything that a page is made of.  What is not known is empty or ``None``.

    Attributes:
        title: the run's name.
        kind: what it was read from, in words.
        settings: (name, value) pairs worth showing.
        steps, max_steps: optimizer steps done, and of the whole run.
        train_loss, eval_loss: training loss (means of the steps before), evaluation loss.
        plain_loss: evaluation loss of the same run without nowcasts.
        learning_rate: of the first parameter group.
        nowcasts: those that were due, in order.
        nowcast_seconds: spent on nowcasting.
        train_seconds: of the run; ``timed`` says what is in both.
        stopped: whether nowcasting was given up before the end.
        memory: what nowcasting keeps.
        path: projections of the parameters, in order.
        absent: {part of the page: why it is left out}, where the source can say it better than the page.
    """

    title: str
    kind: str
    settings: tuple[tuple[str, str], ...] = ()
    steps: int = 0
    max_steps: int | None = None
    train_loss: Series = ()
    eval_loss: Series = ()
    plain_loss: Series = ()
    learning_rate: Series = ()
    nowcasts: tuple[Nowcast, ...] = ()
    nowcast_seconds: float | None = None
    train_seconds: float | None = None
    timed: str = ""
    stopped: bool = False
    memory: tuple[Memory, ...] = ()
    path: tuple[Place, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def overhead(self) -> float | None:
        """Share of the run's seconds that went into nowcasting."""
        if self.nowcast_seconds is None or not self.train_seconds:
            return None
        return self.nowcast_seconds / self.train_seconds


def nowcasts_from_events(events: Iterable[Mapping[str, Any]]) -> tuple[Nowcast, ...]:
    """Nowcasts from the fields of :class:`~hf_nino.training.event.NowcastEvent`.

    An event that takes one back marks every nowcast since: they come within its probation and share its fate.
    """
    found: list[Nowcast] = []
    for event in events:
        back = event.get("taken_back_to")
        if back is not None:
            found = [
                replace(nowcast, taken_back_at=int(event["step"]), reason=event.get("reason") or "")
                if nowcast.accepted and nowcast.taken_back_at is None and nowcast.step >= back
                else nowcast
                for nowcast in found
            ]
            continue
        found.append(
            Nowcast(
                step=int(event["step"]),
                horizon=int(event["horizon"]),
                seconds=float(event["seconds"]),
                accepted=bool(event["accepted"]),
                horizon_steps=event.get("horizon_steps"),
                reason=event.get("reason") or "",
                relative_step_norm=event.get("relative_step_norm"),
                loss_before=event.get("loss_before"),
                loss_after=event.get("loss_after"),
                shortened=int(event.get("shortened", 0)) + int(event.get("left_alone", 0)),
            )
        )
    return tuple(found)


def count_fates(nowcasts: Sequence[Nowcast]) -> dict[str, int]:
    """{fate: how many}, without those that did not occur."""
    counts = {fate: sum(nowcast.fate == fate for nowcast in nowcasts) for fate in FATES}
    return {fate: count for fate, count in counts.items() if count}
