"""All numbers of a report, small enough to be kept with the code; tables and verdicts are made of nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .methods import method as find_method
from .methods.nowcasts import LearnedNowcasts, NowcastMethod
from .plan import BASELINE
from .results import Results, Run
from .statistics import LOWER_IS_BETTER, MEASURES, Spread, measure

KINDS = ("language", "images", "fine-tuning")


@dataclass(frozen=True)
class TaskInfo:
    """Of a task: kind, trained parameters, optimizer steps of a run, target accuracy if it has one."""

    kind: str
    parameters: int
    steps: int
    target: float | None = None


@dataclass(frozen=True)
class MethodInfo:
    """Of a method.

    Args:
        title: in tables.
        label: in pictures, short.
        base: for nowcasts, the method whose optimizer trains between them; ``None`` for others.
    """

    title: str
    label: str
    base: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One method on one task in one protocol, over seeds.

    Args:
        settings, learning_rate: what counts for the protocol, the latter in AdamW's units.
        seeds: of its runs.
        diverged: those seeds whose runs did, or failed.
        measures: some of :data:`hf_nino.bench.training.statistics.MEASURES`.
    """

    protocol: str
    task: str
    method: str
    settings: Mapping[str, Any]
    learning_rate: float
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    measures: Mapping[str, Spread]


@dataclass(frozen=True)
class Summary:
    """A benchmark's numbers.

    Args:
        tasks, methods: by name, in the order of the report; AdamW first.
        comparisons: every choice that has runs.
        missing: choices that lack runs which others have, in words.
        failed: runs that ended with an error, and it.
        devices: where runs were made.
    """

    tasks: Mapping[str, TaskInfo]
    methods: Mapping[str, MethodInfo]
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def protocols(self) -> list[str]:
        """That have comparisons."""
        return list(dict.fromkeys(comparison.protocol for comparison in self.comparisons))

    @property
    def kinds(self) -> list[str]:
        """Of the tasks, language first."""
        found = {info.kind for info in self.tasks.values()}
        return sorted(found, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))

    @property
    def nowcasters(self) -> list[str]:
        """Methods that nowcast on top of AdamW."""
        return [name for name, info in self.methods.items() if info.base == BASELINE]

    def find(
        self, protocol: str | None = None, method: str | None = None, kind: str | None = None
    ) -> list[Comparison]:
        """Comparisons of a protocol, a method, a kind of task, or all."""
        return [
            comparison
            for comparison in self.comparisons
            if (protocol is None or comparison.protocol == protocol)
            and (method is None or comparison.method == method)
            and (kind is None or self.tasks[comparison.task].kind == kind)
        ]

    def get(self, protocol: str, task: str, method: str) -> Comparison | None:
        """One comparison."""
        return next((one for one in self.find(protocol, method) if one.task == task), None)

    def over_tasks(self, protocol: str, method: str, kind: str, name: str) -> Spread | None:
        """Median and range over tasks of the medians over seeds of one measure; of one task, the spread over its
        seeds."""
        found = [comparison.measures.get(name) for comparison in self.find(protocol, method, kind)]
        return found[0] if len(found) == 1 else Spread.of(spread.median for spread in found if spread is not None)

    def to_json(self) -> dict[str, Any]:
        """As plain values: protocol -> task -> method -> place in ``settings``, learning rate, seeds, seeds that
        diverged, and a list for each of ``measures``: median, low, high; and where some seeds did not get there, or do
        not count, how many count and how many of these did not get there.  What is not finite is ``null``."""
        settings: list[dict[str, Any]] = []
        found: dict[str, dict[str, dict[str, list[Any]]]] = {}
        for one in self.comparisons:
            if one.settings not in settings:
                settings.append(dict(one.settings))
            row = [settings.index(dict(one.settings)), one.learning_rate, list(one.seeds), list(one.diverged)]
            spreads = [one.measures.get(name) for name in MEASURES]
            while spreads and spreads[-1] is None:
                spreads.pop()
            row += [[] if spread is None else _as_list(spread, len(one.seeds)) for spread in spreads]
            found.setdefault(one.protocol, {}).setdefault(one.task, {})[one.method] = row
        return {
            "measures": dict(MEASURES),
            "tasks": {name: asdict(info) for name, info in self.tasks.items()},
            "methods": {name: asdict(info) for name, info in self.methods.items()},
            "settings": settings,
            "comparisons": found,
            "missing": list(self.missing),
            "failed": list(self.failed),
            "devices": list(self.devices),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """The inverse of :meth:`to_json`."""
        names = list(values["measures"])
        comparisons = []
        for protocol, tasks in values["comparisons"].items():
            for task, methods in tasks.items():
                for method, (settings, rate, seeds, diverged, *spreads) in methods.items():
                    measures = {
                        name: _from_list(name, spread, len(seeds))
                        for name, spread in zip(names, spreads, strict=False)
                        if spread
                    }
                    chosen = values["settings"][settings], rate, tuple(seeds), tuple(diverged)
                    comparisons.append(Comparison(protocol, task, method, *chosen, measures))
        return cls(
            {name: TaskInfo(**info) for name, info in values["tasks"].items()},
            {name: MethodInfo(**info) for name, info in values["methods"].items()},
            tuple(comparisons),
            tuple(values["missing"]),
            tuple(values["failed"]),
            tuple(values["devices"]),
        )


def summarise(results: Results) -> Summary:
    """All comparisons of a benchmark.

    Names of methods that hold a path (``nino:PATH``) are shortened to what tells them apart.

    Raises:
        ValueError: none of the runs is one that was chosen.
    """
    public = public_names(results.methods)
    comparisons, missing = [], []
    for protocol in results.protocols:
        for task in results.choices[protocol]:
            cells = {name: results.cell(protocol, task, name) for name in results.methods}
            seeds = {seed for cell in cells.values() for seed in cell}
            plain = cells.get(BASELINE, {})
            swept = results.cell("tuned", task, BASELINE) if protocol == "robust" else None
            for name, cell in cells.items():
                choice = results.choices[protocol][task].get(name)
                if choice is None:
                    continue
                if lacking := sorted(seeds - cell.keys()):
                    missing.append(f"{protocol}, {task}, {public[name]}: seed {', '.join(map(str, lacking))}")
                if cell:
                    diverged = tuple(seed for seed, run in cell.items() if run.diverged)
                    chosen = (dict(choice["settings"]), choice["learning_rate"])
                    measures = measure(cell, plain, swept)
                    one = Comparison(protocol, task, public[name], *chosen, tuple(cell), diverged, measures)
                    comparisons.append(one)
    if not comparisons:
        raise ValueError("`out` holds runs, but none that choices.json names: it belongs to another benchmark")
    tasks = {name: _task_info(results, name) for name in results.tasks}
    shown = {comparison.task for comparison in comparisons}
    return Summary(
        {name: info for name, info in tasks.items() if name in shown},
        {public[name]: _method_info(name, public[name]) for name in results.methods},
        tuple(comparisons),
        tuple(missing),
        tuple(sorted({_failure(run, public) for run in results.runs if run.error and run.spec.method in public})),
        tuple(sorted({run.device for run in results.runs if run.device})),
    )


def public_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> the name without folders (``nino:/a/b/c.pt`` -> ``nino:c``), with as many of them as tell it apart."""
    found: dict[str, str] = {}
    for name in names:
        before, colon, spec = name.partition("nino:")
        if not colon:
            found[name] = name
            continue
        path = Path(spec)
        parts = path.with_suffix("").parts if path.suffix == ".pt" else path.parts
        found[name] = next(
            short
            for length in range(1, len(parts) + 1)
            if (short := f"{before}nino:{'/'.join(parts[-length:])}") not in found.values() or length == len(parts)
        )
    return found


def _method_info(name: str, public: str) -> MethodInfo:
    label = public.replace("nino:", "")
    try:
        method = find_method(name)
    except ValueError:
        return MethodInfo(public, label)
    if not isinstance(method, NowcastMethod):
        return MethodInfo(method.title, label)
    title = method.title
    if isinstance(method, LearnedNowcasts):
        title = f"{method.base.title} + {method.words} {public.partition('nino:')[2]}"
    return MethodInfo(title, label, method.base.name)


def _task_info(results: Results, name: str) -> TaskInfo:
    cells = [results.cell(protocol, name, method) for protocol in results.protocols for method in results.methods]
    runs = [run for cell in cells for run in cell.values()]
    return TaskInfo(
        results.kind(name),
        max((run.parameters for run in runs), default=0),
        max((run.spec.steps for run in runs), default=0),
        next((run.target for run in runs if run.target is not None), None),
    )


def _failure(run: Run, public: Mapping[str, str]) -> str:
    spec = run.spec
    where = f"{spec.task}, {public[spec.method]}, {spec.schedule} {spec.learning_rate:g}, seed {spec.seed}"
    return f"{where}: {run.error[:160]}"


def _as_list(spread: Spread, seeds: int) -> list[float | None]:
    numbers = [spread.median, spread.low, spread.high]
    values: list[float | None] = [number if math.isfinite(number) else None for number in numbers]
    return values + ([spread.count, spread.missed] if spread.missed or spread.count != seeds else [])


def _from_list(name: str, values: Sequence[float | None], seeds: int) -> Spread:
    worst = math.inf if name in LOWER_IS_BETTER else -math.inf
    numbers = [worst if value is None else value for value in values[:3]]
    count, missed = values[3:] or (seeds, 0)
    return Spread(*numbers, int(count), int(missed))
