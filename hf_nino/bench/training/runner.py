"""Runs a matrix: in parallel, one JSON a run, and on from where it stopped."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ...training.estimate import in_words
from ...workers import cores, workers
from . import methods, tasks
from .loop import train
from .plan import Choices, Matrix, Plan, plan, rehearse
from .results import CHOICES
from .spec import RunSpec

logger = logging.get_logger(__name__)

JOBS_ON_GPU = 4


@dataclass(frozen=True)
class Outcome:
    """What the plan needs to know of a finished run.

    Args:
        loss: final validation loss; infinity if it diverged or failed.
        error: why it failed; ``None`` if it did not.
    """

    loss: float
    error: str | None = None


def run_benchmark(
    matrix: Matrix,
    out: Path,
    *,
    jobs: int | None = None,
    device: str | None = None,
    say: Callable[[str], Any] = logger.info,
) -> Plan:
    """Do all runs of ``matrix`` that are not done, and leave ``out/choices.json`` beside them.

    The choices are written as they are made, and added to those of other matrices.

    Args:
        out: folder of the benchmark; other matrices may have left runs there, which are used.
        jobs: processes at once; default: one for each core, or 4 that share a GPU.
        device: ``"cpu"`` or ``"cuda"``; default: what there is.
        say: is told what it will cost, and what could not be done.

    Returns:
        The finished plan.

    Raises:
        ValueError: an unknown task, method or device.
        ImportError: a package is missing that a task or method needs.
        ChildProcessError: a process was killed, for want of memory perhaps.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', but PyTorch finds no GPU here; use 'cpu'")
    if jobs is None:
        jobs = JOBS_ON_GPU if device == "cuda" else cores()
    if jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, got {jobs}")
    out.mkdir(parents=True, exist_ok=True)
    _check(matrix, out)
    expected = rehearse(matrix, tasks.task, methods.method)
    outcomes = {spec: outcome for spec in expected if (outcome := read(spec, out)) is not None}
    say(_cost(expected - outcomes.keys(), out, jobs, torch.device(device)))
    found = _work(matrix, out, outcomes, jobs, device, len(expected))
    for sweep in found.unbracketed:
        say(f"Not bracketed: {sweep}, which may not be its best learning rate.")
    failed = [(spec, read(spec, out)) for spec in sorted(found.wanted, key=str)]
    for spec, outcome in failed:
        if outcome is not None and outcome.error is not None:
            say(f"Failed, and counted as diverged: {spec}: {outcome.error.strip().splitlines()[-1]}")
    return found


def _check(matrix: Matrix, out: Path) -> None:
    """Look every name up and load every task's data once, before hours of work."""
    missing = [f"{name}: {reason}" for name in matrix.methods if (reason := methods.method(name).missing())]
    if missing:
        raise ImportError(f"`methods` that cannot be used here: {'; '.join(missing)}")
    for name in dict.fromkeys((*matrix.tasks, *matrix.selection.values())):
        tasks.task(name).load(_cache(out) / name)


def _cache(out: Path) -> Path:
    return out / "data"


def read(spec: RunSpec, out: Path) -> Outcome | None:
    """The outcome of a run; ``None`` if it is not finished."""
    try:
        record = json.loads(spec.path(out).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if "error" in record:
        return Outcome(math.inf, record["error"])
    return Outcome(math.inf if record["diverged"] else record["evaluations"][-1]["loss"])


def _work(matrix: Matrix, out: Path, outcomes: dict[RunSpec, Outcome], jobs: int, device: str, expected: int) -> Plan:
    """Runs until the plan wants no more."""
    pending: dict[Future, RunSpec] = {}
    progress = tqdm(total=expected, initial=len(outcomes), desc="runs", unit="run", smoothing=0.1)
    with progress, workers(jobs) as pool:
        while True:
            found = _plan(matrix, out, outcomes)
            _choose(out / CHOICES, found.choices)
            running = set(pending.values())
            for spec in [spec for spec in found.runs if spec not in running][: jobs - len(pending)]:
                pending[pool.submit(_run, spec, out, device)] = spec
            if not pending:
                return found
            progress.total = max(len(found.wanted), expected)
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                spec = pending.pop(future)
                future.result()
                outcomes[spec] = _finished(spec, out)
                progress.update()
                progress.set_postfix_str(f"{spec.task} {spec.method}", refresh=False)


def _plan(matrix: Matrix, out: Path, outcomes: dict[RunSpec, Outcome]) -> Plan:
    """The plan, after results that earlier calls left for runs which it wants have been read."""
    while True:
        losses = {spec: outcome.loss for spec, outcome in outcomes.items()}
        found = plan(matrix, tasks.task, methods.method, losses)
        there = {spec: outcome for spec in found.runs if (outcome := read(spec, out)) is not None}
        if not there:
            return found
        outcomes.update(there)


def _choose(path: Path, choices: Choices) -> None:
    """Add choices to those in a file, or replace them there."""
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    merged = {**before}
    for protocol, tasks_there in choices.items():
        merged[protocol] = {**before.get(protocol, {})}
        for task, chosen in tasks_there.items():
            merged[protocol][task] = {**before.get(protocol, {}).get(task, {}), **chosen}
    if merged != before:
        _write(path, merged)


def _finished(spec: RunSpec, out: Path) -> Outcome:
    outcome = read(spec, out)
    if outcome is None:
        raise OSError(f"{spec.path(out)}, the result of a run, is gone")
    return outcome


def _run(spec: RunSpec, out: Path, device: str) -> None:
    """In a worker: train, and write the record.  An error is a result: the matrix goes on without the run."""
    try:
        record = train(spec, _cache(out), torch.device(device))
    except Exception:
        record = {"spec": spec.to_dict(), "error": traceback.format_exc()}
    _write(spec.path(out), record)


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(_shortened(content), separators=(",", ":")), "utf-8")
    temporary.replace(path)


def _shortened(content: Any) -> Any:
    """With 6 digits of every number: hundreds of runs are kept, and no measurement has more."""
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {name: _shortened(value) for name, value in content.items()}
    return [_shortened(value) for value in content] if isinstance(content, list | tuple) else content


def _cost(missing: set[RunSpec], out: Path, jobs: int, device: torch.device) -> str:
    """What the runs that are left will take, from the fastest of a few steps of each task."""
    seconds, measured = 0.0, {}
    for spec in sorted(missing, key=str):
        if spec.task not in measured:
            measured[spec.task] = _step_seconds(spec.task, out, device)
        seconds += measured[spec.task] * spec.steps
    if not missing:
        return "No run is missing, unless learning rates have to be swept further."
    packed = 1 if device.type == "cuda" else jobs
    return (
        f"About {len(missing)} runs, {in_words(seconds / packed)} with {jobs} at once, evaluations and "
        f"nowcasts not counted. Everything goes to {out}; the same command goes on where it was interrupted."
    )


def _step_seconds(name: str, out: Path, device: torch.device) -> float:
    task = tasks.task(name)
    data = task.load(_cache(out) / name)
    model = task.build_model(data).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = task.batches(data, 0, device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        task.training_loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
