"""``hf-nino bench scaling``: what nowcasts cost on many ranks, from the shell."""

from __future__ import annotations

import json
from collections.abc import Callable

from ..bench.scaling import graphs, table, usual_nowcasters
from ..bench.scaling_measured import measure
from ..bench.scaling_report import measured_markdown, paper_markdown


def bench_scaling(say: Callable[[str], None], *, measured: bool = False, as_json: bool = False) -> None:
    """Say the tables on paper, for models of 1, 8 and 70 billion parameters on up to 512 ranks; about a minute.

    Args:
        say: prints; with ``as_json`` it is given JSON, once, and nothing else.
        measured: run a small model on 1, 2 and 4 processes instead, and compare with what paper says of it.

    Raises:
        Exception: with ``measured``: what a process raised.
    """
    rows = measure() if measured else table(graphs(), usual_nowcasters())
    say(json.dumps(rows, indent=2) if as_json else (measured_markdown if measured else paper_markdown)(rows).rstrip())
