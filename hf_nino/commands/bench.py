"""``hf-nino bench``: benchmarks, from the shell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bench.engine.benchmark import Settings, run_engine_benchmark
from ..bench.engine.picture import draw
from ..bench.engine.report import as_dict, markdown

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
