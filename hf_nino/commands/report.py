"""``hf-nino report``: one run as one page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..report.page import page_of, summary
from ..report.sources import read_run

PAGE = "nino_report.html"


def report_run(run: Path, say: Callable[[str], None], *, out: Path | None = None, as_json: bool = False) -> Path:
    """Write the page of a run, and say where it is; the path of the page.

    Args:
        run: see :func:`hf_nino.report.sources.read_run`.
        say: prints; with ``as_json`` it is given JSON, once, and nothing else.
        out: the file; default: :data:`PAGE` in the run's folder, and for a run that is one file ``NAME.html`` beside
            it.

    Raises:
        FileNotFoundError, ValueError: see :func:`hf_nino.report.sources.read_run`; or ``out`` is a folder.
        OSError: the page cannot be written.
    """
    facts = read_run(run)
    if out is None:
        out = run / PAGE if run.is_dir() else run.with_suffix(".html")
    if out.is_dir():
        raise ValueError(f"`out` must be a file such as {out / PAGE}, got the folder {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(facts), encoding="utf-8")
    say(json.dumps({"page": str(out), **summary(facts)}, indent=2) if as_json else f"Report: {out}")
    return out
