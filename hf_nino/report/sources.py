"""Find out what a path is, and read it: a Trainer's run, a record of the benchmark, or a demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bench_source import from_benchmark
from .demo_source import METRICS, RUN, SETTINGS, from_demo
from .facts import RunFacts
from .trainer_source import STATE, from_trainer, newest_state


def read_run(path: str | Path) -> RunFacts:
    """The facts of a run.

    Args:
        path: a folder that a Trainer wrote (its output folder or a checkpoint), a folder of ``hf-nino demo`` (or one
            of its two runs), or the JSON of a run of ``hf-nino bench``.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is nothing of these, or malformed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"RUN must be a folder or a JSON file of a run, but {path} does not exist")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        if (path / RUN).is_file() or ((path / SETTINGS).is_file() and (path / "nowcast").is_dir()):
            return from_demo(path)
        if (state := newest_state(path)) is not None:
            return from_trainer(state)
        raise ValueError(_unknown(path, _hint(path)))
    if path.name == STATE:
        return from_trainer(path)
    if path.name in (METRICS, SETTINGS, RUN):
        return from_demo(folder)
    record = read_json(path)
    if isinstance(record, dict) and "spec" in record:
        return from_benchmark(path, record)
    raise ValueError(_unknown(path, ""))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


def _hint(folder: Path) -> str:
    if any(folder.glob("runs/*/*.json")) or any(folder.glob("*,seed=*.json")):
        return "; it looks like a benchmark: name one of its runs, such as FOLDER/runs/TASK/RUN.json"
    return ""


def _unknown(path: Path, hint: str) -> str:
    return (
        f"RUN must be a Trainer's folder (with {STATE} or checkpoint-*/{STATE}), a demo's, or a run of the benchmark "
        f"(runs/TASK/*.json), got {path}{hint}"
    )
