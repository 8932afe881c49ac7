"""``hf-nino bench``: benchmarks, from the shell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bench.engine.benchmark import Settings, run_engine_benchmark
from ..bench.engine.picture import draw
from ..bench.engine.report import as_dict, markdown
from ..bench.training.plan import Matrix
from ..bench.training.presets import PRESETS
from ..bench.training.report import write_report
from ..bench.training.runner import run_benchmark

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def bench_engine(out: Path, say: Callable[[str], None], *, as_json: bool = False, **settings: Any) -> None:
    """Measure the engine, leave ``results.json``, ``report.md`` and ``engine.png`` in a folder, and say the report.

    Args:
        say: prints; with ``as_json`` it is given JSON, once, and nothing else.
        settings: of :meth:`hf_nino.bench.engine.benchmark.Settings.of`.

    Raises:
        ValueError: see :class:`hf_nino.bench.engine.benchmark.Settings` and
            :func:`hf_nino.bench.engine.benchmark.run_engine_benchmark`.
        ChildProcessError: nothing can be measured here.
        ImportError: matplotlib is missing.
    """
    results = run_engine_benchmark(Settings.of(**settings), out, (lambda text: None) if as_json else say)
    report = markdown(results, "engine.png")
    (out / "report.md").write_text(report, "utf-8")
    draw(results, out / "engine.png")
    say(json.dumps(as_dict(results), indent=2) if as_json else report)


def bench_training(
    preset: str,
    out: Path,
    say: Callable[[str], None],
    *,
    tasks: str | None = None,
    methods: str | None = None,
    protocols: str | None = None,
    seeds: str | None = None,
    steps: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
) -> None:
    """Run a preset, or what is named instead of its parts, and write the report.

    Args:
        tasks, methods, protocols, seeds: comma-separated; methods may have settings (``spectral:growth=1,period=50``).

    Raises:
        ValueError: see :class:`hf_nino.bench.training.plan.Matrix` and
            :func:`hf_nino.bench.training.runner.run_benchmark`.
        ImportError, ChildProcessError: see there.
    """
    matrix = chosen(PRESETS[preset], tasks=tasks, methods=methods, protocols=protocols, seeds=seeds, steps=steps)
    run_benchmark(matrix, out, jobs=jobs, device=device, say=say)
    report_training(out, say)


def chosen(
    matrix: Matrix,
    *,
    tasks: str | None,
    methods: str | None,
    protocols: str | None,
    seeds: str | None,
    steps: int | None,
) -> Matrix:
    """``matrix`` with other parts."""
    parts: dict[str, Any] = {"tasks": _names(tasks), "methods": _names(methods), "protocols": _names(protocols)}
    if seeds is not None:
        try:
            parts["seeds"] = tuple(int(seed) for seed in seeds.split(","))
        except ValueError:
            raise ValueError(f"`seeds` must be whole numbers such as 0,1,2, got {seeds!r}") from None
    parts["steps"] = steps
    return replace(matrix, **{name: part for name, part in parts.items() if part is not None})


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names between commas; ``rule:one=1,two=2`` is one name with two settings."""
    if text is None:
        return None
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and ":" in names[-1] and "=" in part and ":" not in part:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return tuple(names)


def report_training(out: Path, say: Callable[[str], None], *, readme: Path | None = None) -> None:
    """Write the report of the runs in ``out``, and say where it is.

    Args:
        readme: a Markdown file whose marked part is replaced by the headline table.

    Raises:
        ValueError: there are no runs, or ``readme`` has no marks.
    """
    say(f"Report: {write_report(out, readme=readme)}")


def count(text: str | None) -> int | None:
    """``"100M"`` as a number.

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"`max_parameters` must be a number such as 3000000, 100M or 8B, got {text!r}")
    return round(float(match[1]) * UNITS[match[2].upper()])
