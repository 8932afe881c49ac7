"""Which runs a matrix needs, given those that are finished: choices of settings and learning rates included.

A pure function of results: :func:`plan` is asked again whenever runs have finished, until nothing is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .methods.base import Method, Settings
from .spec import RunSpec
from .tasks.base import Task

PROTOCOLS = ("paper", "fixed", "tuned", "robust")
BASELINE = "adamw"
ROBUST_FACTOR = 4
"""How many times below AdamW's best the learning rate of the ``robust`` protocol is."""

WIDEST = 10
"""A sweep ends, bracketed or not, this many factors of 2 from where it began."""

Choice = dict[str, Any]
Choices = dict[str, dict[str, dict[str, Choice]]]


@dataclass(frozen=True)
class Matrix:
    """What is asked for.

    * ``paper``: constant learning rate, that of the task;
    * ``fixed``: warm-up and cosine, at the task's unswept learning rate;
    * ``tuned``: the same at the best learning rate, swept in factors of 2 until there are worse ones on both sides,
      first with one seed and from there on by the median of all; AdamW's sweep begins at the task's learning rate,
      that of other methods at AdamW's best; AdamW is also run, once, wherever a nowcaster on it was;
    * ``robust``: the same at a quarter of AdamW's best, with the settings of ``fixed``: a learning rate that is too
      small is not known to be.

    Where a method has settings to choose among, they are chosen by final loss on the selection task of the same kind,
    with a seed of its own, at the protocol's learning rate there (``tuned``: AdamW's best there).  Kinds without a
    selection task use the method's defaults.

    Args:
        tasks, methods: names, the baseline ``adamw`` included or not (it is always run).
        protocols: some of ``paper``, ``fixed``, ``tuned``, ``robust``.
        seeds: of the runs that count.
        selection: kind of task -> name of its selection task.
        selection_seed: none of ``seeds``.
        steps: of every run; default: the task's.

    Raises:
        ValueError: an empty or unknown entry, or a selection seed that counts.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    protocols: tuple[str, ...] = PROTOCOLS
    seeds: tuple[int, ...] = (0, 1, 2)
    selection: Mapping[str, str] = field(default_factory=dict)
    selection_seed: int = 1000
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "protocols", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` of a benchmark must name at least one, got none")
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown:
            raise ValueError(f"`protocols` must be some of {', '.join(PROTOCOLS)}, got {', '.join(unknown)}")
        if self.selection_seed in self.seeds:
            raise ValueError(f"`selection_seed` must not be one of `seeds`, got {self.selection_seed}")
        if self.steps is not None and self.steps < 10:
            raise ValueError(f"`steps` must be at least 10, got {self.steps}")


@dataclass
class Plan:
    """Args:
    runs: missing runs that can be started now, in order of need; empty when the matrix is finished.
    choices: protocol -> task -> method -> ``settings`` and ``learning_rate``, as far as they are known.
    wanted: every run that is known to be needed, finished or not.
    unbracketed: sweeps that ended at their widest, in words.
    """

    runs: list[RunSpec] = field(default_factory=list)
    choices: Choices = field(default_factory=dict)
    wanted: set[RunSpec] = field(default_factory=set)
    unbracketed: list[str] = field(default_factory=list)


def plan(
    matrix: Matrix,
    task: Callable[[str], Task],
    method: Callable[[str], Method],
    losses: Mapping[RunSpec, float],
) -> Plan:
    """The next runs.

    Args:
        task, method: look a name up.
        losses: final validation loss of every finished run; infinity for one that diverged or failed.
    """
    planner = _Planner(matrix, task, method, losses)
    for protocol in matrix.protocols:
        for task_name in matrix.tasks:
            for method_name in dict.fromkeys((BASELINE, *matrix.methods)):
                planner.cell(protocol, task_name, method_name)
    return planner.plan


class _Planner:
    """One pass over the matrix; an answer that needs runs which are not finished is ``None``, and they are noted."""

    def __init__(self, matrix, task, method, losses) -> None:
        self.matrix: Matrix = matrix
        self.task, self.method, self.losses = task, method, losses
        self.plan = Plan()

    def cell(self, protocol: str, task: str, method: str) -> None:
        """The runs of one protocol, task and method."""
        settings = self._settings(protocol, task, method)
        if settings is None:
            return
        rate = self._learning_rate(protocol, task, method, settings, self.matrix.seeds)
        if rate is None:
            return
        self._losses(self._spec(task, method, settings, protocol, rate, seed) for seed in self.matrix.seeds)
        if protocol == "tuned":
            self._plain_beside(task, method)
        chosen = self.plan.choices.setdefault(protocol, {}).setdefault(task, {})
        chosen[method] = {"settings": dict(settings), "learning_rate": rate}

    def _plain_beside(self, task: str, method: str) -> None:
        """The plain runs at every learning rate of a nowcaster's sweep: what it is worth where it is too large."""
        base = self.method(method).base
        if base is None or base.name != BASELINE:
            return
        seed, plain = self.matrix.seeds[0], self.method(BASELINE).grid[0]
        mine = {"task": task, "method": method, "schedule": "cosine", "seed": seed}
        swept = [spec for spec in self.losses if all(getattr(spec, name) == value for name, value in mine.items())]
        rates = sorted({spec.learning_rate for spec in swept})
        self._losses(self._spec(task, BASELINE, plain, "tuned", rate, seed) for rate in rates)

    def _settings(self, protocol: str, task: str, method: str) -> Settings | None:
        grid = self.method(method).grid
        selection = self.matrix.selection.get(self.task(task).kind)
        if len(grid) == 1 or selection is None:
            return grid[0]
        protocol = "fixed" if protocol == "robust" else protocol
        seed = self.matrix.selection_seed
        if protocol == "tuned":
            rate = self._learning_rate("tuned", selection, BASELINE, self.method(BASELINE).grid[0], (seed,))
        else:
            rate = self._learning_rate(protocol, selection, method, grid[0], (seed,))
        if rate is None:
            return None
        losses = self._losses(self._spec(selection, method, settings, protocol, rate, seed) for settings in grid)
        return None if losses is None else grid[losses.index(min(losses))]

    def _learning_rate(
        self, protocol: str, task: str, method: str, settings: Settings, seeds: tuple[int, ...]
    ) -> float | None:
        found = self.task(task)
        if protocol == "paper":
            return _rounded(found.constant_learning_rate)
        if protocol == "fixed":
            return _rounded(found.learning_rate)
        centre: float | None = found.learning_rate
        if method != BASELINE or protocol == "robust":
            centre = self._learning_rate("tuned", task, BASELINE, self.method(BASELINE).grid[0], seeds)
        if centre is None or protocol == "robust":
            return centre and _rounded(centre / ROBUST_FACTOR)

        def spec(rate: float, seed: int) -> RunSpec:
            return self._spec(task, method, settings, protocol, rate, seed)

        # One seed may be lucky where others diverge: it only finds the neighbourhood.
        best = self._sweep(spec, centre, seeds[:1])
        return best if best is None or len(seeds) == 1 else self._sweep(spec, best, seeds)

    def _sweep(self, spec: Callable[[float, int], RunSpec], centre: float, seeds: tuple[int, ...]) -> float | None:
        """The best learning rate among ``centre`` times powers of 2, by the median over seeds, once both of its
        neighbours are worse."""
        low, high = -1, 1
        while True:
            powers = list(range(low, high + 1))
            found = self._losses(spec(centre * 2.0**power, seed) for power in powers for seed in seeds)
            if found is None:
                return None
            losses = [median(found[i : i + len(seeds)]) for i in range(0, len(found), len(seeds))]
            best = powers[losses.index(min(losses))]
            if best == low > -WIDEST and math.isfinite(losses[0]):
                low -= 1
            elif best == high < WIDEST:
                high += 1
            elif not math.isfinite(min(losses)) and low > -WIDEST:
                low -= 1  # everything diverged: only smaller learning rates are left
            else:
                if best in (low, high):
                    self.plan.unbracketed.append(f"{spec(centre * 2.0**best, seeds[0])} ends a sweep")
                return _rounded(centre * 2.0**best)

    def _spec(
        self, task: str, method: str, settings: Settings, protocol: str, learning_rate: float, seed: int
    ) -> RunSpec:
        return RunSpec.of(
            task=task,
            method=method,
            settings=settings,
            schedule="constant" if protocol == "paper" else "cosine",
            learning_rate=learning_rate,
            seed=seed,
            steps=self.matrix.steps or self.task(task).steps,
        )

    def _losses(self, specs: Iterable[RunSpec]) -> list[float] | None:
        """Final losses, or ``None`` and a note of what is missing."""
        specs = list(specs)
        missing = [spec for spec in specs if spec not in self.losses]
        self.plan.wanted.update(specs)
        self.plan.runs.extend(spec for spec in dict.fromkeys(missing) if spec not in self.plan.runs)
        return None if missing else [self.losses[spec] for spec in specs]


def rehearse(matrix: Matrix, task: Callable[[str], Task], method: Callable[[str], Method]) -> set[RunSpec]:
    """The runs that the matrix would need if AdamW's best learning rate were four times the task's, and everybody
    else's the same: an estimate, made without training."""
    losses: dict[RunSpec, float] = {}
    while True:
        found = plan(matrix, task, method, losses)
        if not found.runs:
            return found.wanted
        for spec in found.runs:
            losses[spec] = abs(math.log2(spec.learning_rate / task(spec.task).learning_rate) - 2)


def _rounded(learning_rate: float) -> float:
    """As in :class:`RunSpec`."""
    return float(f"{learning_rate:.4g}")
