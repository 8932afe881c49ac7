"""The runs that a benchmark left, and which of them count."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...demo.measures import Curve
from .plan import BASELINE, PROTOCOLS, Matrix
from .spec import RunSpec

logger = logging.get_logger(__name__)

CHOICES = "choices.json"
UNKNOWN_KIND = "task"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        spec: what identifies it.
        kind: of its task: ``language``, ``images``, ``fine-tuning``.
        parameters: trained ones; 0 for a run that failed.
        diverged: a loss was not finite, or the run failed with an error.
        curve: evaluation loss over steps and seconds; ``None`` with fewer than two evaluations.
        cpu_seconds: processor time of training up to each evaluation.
        accuracies: at each evaluation, 0 to 1; empty where the task has none.
        target: accuracy at which the task counts as done, if there is one.
        written: steps at which a nowcast was written.
        taken_back: those of them that did not stay.
        nowcasts: whether the method reported on nowcasts at all.
        nowcast_seconds, train_seconds: wall time of nowcasts, and of training with them, evaluations excluded.
        device: ``"cpu"``, or a GPU's name.
        error: last line of the error that ended it; empty for none.
    """

    spec: RunSpec
    kind: str = UNKNOWN_KIND
    parameters: int = 0
    diverged: bool = True
    curve: Curve | None = None
    cpu_seconds: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    target: float | None = None
    written: tuple[int, ...] = ()
    taken_back: tuple[int, ...] = ()
    nowcasts: bool = False
    nowcast_seconds: float = 0.0
    train_seconds: float = 0.0
    device: str = ""
    error: str = ""

    @property
    def final_loss(self) -> float:
        """The last evaluation; infinity if the run diverged."""
        return math.inf if self.diverged or self.curve is None else self.curve.losses[-1]

    @property
    def over_early(self) -> bool:
        """Whether the run ended before its last step because its task was over."""
        return not self.diverged and self.curve is not None and self.curve.steps[-1] < self.spec.steps

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds up to each evaluation that can be compared: processor time on a CPU, which other work on the machine
        does not change; wall time on a GPU."""
        if self.curve is None:
            return ()
        return self.cpu_seconds if self.device == "cpu" else self.curve.seconds

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Run:
        """From the JSON of a run.

        Raises:
            KeyError, TypeError, ValueError: it is no such record.
        """
        spec = RunSpec.from_dict(record["spec"])
        if "error" in record:
            return cls(spec, error=record["error"].strip().splitlines()[-1])
        evaluations, task, events = record["evaluations"], record["task"], record["events"]
        columns = {key: tuple(e[key] for e in evaluations) for key in ("step", "loss", "seconds", "cpu_seconds")}
        curve = Curve(columns["step"], columns["loss"], columns["seconds"]) if len(evaluations) > 1 else None
        written = tuple(event["step"] for event in events if event["accepted"])
        return cls(
            spec,
            kind=task["kind"],
            parameters=record["parameters"],
            diverged=record["diverged"],
            curve=curve,
            cpu_seconds=columns["cpu_seconds"],
            accuracies=tuple(e["accuracy"] for e in evaluations if "accuracy" in e),
            target=task.get("target"),
            written=written,
            taken_back=tuple(step for step in written if any(_undone(step, event) for event in events)),
            nowcasts=bool(events),
            nowcast_seconds=record["nowcast_seconds"],
            train_seconds=record["train_seconds"],
            device=record["machine"]["device"],
        )


def _undone(step: int, event: Mapping[str, Any]) -> bool:
    """Whether the nowcast of ``step`` went when this event put an earlier state back: nowcasts that come within the
    probation of another share its fate."""
    back = event["taken_back_to"]
    return back is not None and back <= step <= event["step"]


@dataclass(frozen=True)
class Results:
    """All runs of a benchmark.

    Args:
        runs: in no particular order.
        choices: protocol -> task -> method -> ``settings`` and ``learning_rate`` of the runs that count.
    """

    runs: tuple[Run, ...]
    choices: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]

    @property
    def protocols(self) -> list[str]:
        """Those with a choice, in the order in which they are always reported."""
        return [protocol for protocol in PROTOCOLS if self.choices.get(protocol)]

    @property
    def tasks(self) -> list[str]:
        """Tasks of all protocols."""
        return list(dict.fromkeys(task for protocol in self.protocols for task in self.choices[protocol]))

    @property
    def methods(self) -> list[str]:
        """Methods of all protocols, the plain optimizer first."""
        cells = (methods for protocol in self.protocols for methods in self.choices[protocol].values())
        found = dict.fromkeys(method for methods in cells for method in methods)
        return sorted(found, key=lambda name: name != BASELINE)

    def kind(self, task: str) -> str:
        """Of a task; ``"task"`` if all of its runs failed."""
        kinds = (run.kind for run in self.runs if run.spec.task == task)
        return next((kind for kind in kinds if kind != UNKNOWN_KIND), UNKNOWN_KIND)

    def cell(self, protocol: str, task: str, method: str) -> dict[int, Run]:
        """Seed -> the run that counts; empty where nothing was chosen.

        The seed of the runs that settings were chosen by does not count.  Where runs of several lengths lie together,
        those of the longest do.
        """
        choice = self.choices.get(protocol, {}).get(task, {}).get(method)
        if choice is None:
            return {}
        found = self._like(protocol, task, method, choice)
        longest = max((run.spec.steps for run in found), default=0)
        return {run.spec.seed: run for run in found if run.spec.steps == longest}

    def sweep(self, task: str, method: str) -> dict[float, dict[int, Run]]:
        """Learning rate -> seed -> run, under the schedule and with the settings of ``tuned``; sorted.  Empty where
        the method was not tuned on the task."""
        choice = self.choices.get("tuned", {}).get(task, {}).get(method)
        if choice is None:
            return {}
        rates = sorted({run.spec.learning_rate for run in self.runs if run.spec.task == task})
        steps = max((run.spec.steps for run in self._like("tuned", task, method, choice)), default=0)
        found: dict[float, dict[int, Run]] = {}
        for rate in rates:
            runs = self._like("tuned", task, method, {**choice, "learning_rate": rate})
            if runs := [run for run in runs if run.spec.steps == steps]:
                found[rate] = {run.spec.seed: run for run in runs}
        return found

    def _like(self, protocol: str, task: str, method: str, choice: Mapping[str, Any]) -> list[Run]:
        wanted = RunSpec.of(
            task=task,
            method=method,
            settings=choice["settings"],
            schedule="constant" if protocol == "paper" else "cosine",
            learning_rate=choice["learning_rate"],
            seed=0,
            steps=0,
        )
        return self._alike.get(wanted, [])

    @cached_property
    def _alike(self) -> dict[RunSpec, list[Run]]:
        """Runs that count, by all that identifies them but for seed and steps."""
        found: dict[RunSpec, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.spec.seed):
            if run.spec.seed != Matrix.selection_seed:
                found.setdefault(replace(run.spec, seed=0, steps=0), []).append(run)
        return found


def load_results(out: Path) -> Results:
    """Everything in a benchmark's folder.  A file that is not a whole record is left out, with a warning.

    Raises:
        ValueError: there is no run, or no choices.
    """
    runs = tuple(_readable(sorted(out.glob("runs/*/*.json"))))
    if not runs:
        raise ValueError(
            f"`out` must be the folder of a benchmark with finished runs in it (runs/TASK/*.json), found none in "
            f"{out}; run `hf-nino bench --out {out}` first"
        )
    path = out / CHOICES
    try:
        choices = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`out` must hold {CHOICES}, which a benchmark leaves when all of its runs are done, but {path} cannot be "
            f"read ({error}); the same `hf-nino bench` command as before goes on where it stopped"
        ) from error
    return Results(runs, choices)


def _readable(paths: Iterable[Path]) -> Iterable[Run]:
    for path in paths:
        try:
            yield Run.from_record(json.loads(path.read_text("utf-8")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning(f"{path} is not a whole record of a run and is left out ({type(error).__name__}: {error}).")
