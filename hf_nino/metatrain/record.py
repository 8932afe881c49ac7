"""``hf-nino record``: trains many small models at once, and leaves a folder of trajectories."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..bench.training.tasks.base import Task
from ..training.estimate import in_words, readable
from ..workers import cores, threads_of_each, workers
from .card import write_dataset
from .recipe import Recipe
from .shards import write_text
from .stack_recording import record_stack
from .stacked import StackedTraining, faster_engine, in_stacks
from .tasks import expand, recording_task
from .trajectory import DESCRIPTION, Trajectory, read_description
from .variation import RunSettings, draw_settings

logger = logging.get_logger(__name__)

SUMMARY = "summary.json"
RUN = "run-{:04d}"


@dataclass(frozen=True)
class Cost:
    """What the runs that are left will take.

    Args:
        runs, steps: of all of them together.
        seconds: of one process that does everything.
        size: bytes of the trajectories.
    """

    runs: int
    steps: int
    seconds: float
    size: int


def record_tasks(
    tasks: Sequence[str],
    out: Path,
    *,
    runs: int = 8,
    steps: int | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    stack: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    cache: Path | None = None,
    say: Callable[[str], Any] = logger.info,
) -> dict[str, Any]:
    """Train ``runs`` models of each task, with settings drawn for each
    (:func:`~hf_nino.metatrain.variation.draw_settings`), and record all of them.

    Each run has a folder ``out/TASK/run-NNNN``; runs that are finished there are skipped, others begun anew.  At the
    end ``out`` is a dataset with a card (:mod:`hf_nino.metatrain.card`) and a ``summary.json``.

    Args:
        tasks: names of tasks or of groups (:mod:`hf_nino.metatrain.tasks`).
        runs: models of each task; more of them later leave the first ones as they are.
        steps: of each run; default: the task's.
        recipe: how they are recorded.
        seed: of the distribution that settings are drawn from.
        stack: models trained in one vectorised pass, at most; default 8, on a GPU 64.
        jobs: processes at once; default: one for each core, or one on a GPU.
        device: ``"cpu"`` or ``"cuda"``; default: what there is.
        cache: folder for texts and their tokens; default: next to ``out``, with ``-data`` after its name.
        say: is told what it will cost, and where things are.

    Returns:
        What is in ``summary.json``.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds runs of the same names with other settings.
        ImportError: a package that holds a task's data is not installed.
        ChildProcessError: runs failed; the others are there, and the same command tries these again.
    """
    recipe = recipe or Recipe()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"`device` must be 'cpu', or 'cuda' where PyTorch finds a GPU, got {device!r}")
    stack = stack or (64 if device == "cuda" else 8)
    jobs = jobs or (1 if device == "cuda" else cores())
    for name, value in {"runs": runs, "steps": steps, "stack": stack, "jobs": jobs}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    cache = cache or out.with_name(f"{out.name}-data")
    chosen = {name: recording_task(name) for name in expand(tasks)}
    if steps is not None:
        chosen = {name: replace(task, steps=steps) for name, task in chosen.items()}
    wanted = [draw_settings(task, index, seed) for task in chosen.values() for index in range(runs)]
    missing = [one for one in wanted if not is_recorded(one, recipe, out)]
    done = len(wanted) - len(missing)
    stacks = list(in_stacks(missing, stack))
    say(f"{len(wanted)} runs of {len(chosen)} tasks; {done} are recorded already.")
    threads = torch.get_num_threads() if jobs == 1 else threads_of_each(jobs)
    engines, cost = plan_cost(stacks, chosen, recipe, cache, torch.device(device), threads)
    if missing:
        say(_told(cost, jobs, out))
    started = time.perf_counter()
    failures = _work(stacks, engines, recipe, out, cache, device, jobs)
    summary = _summary(wanted, recipe, out, engines, failures, time.perf_counter() - started, device)
    write_text(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    if len(failures) < len(stacks) or done:
        write_dataset(out)
    say(f"{summary['recorded']} trajectories with {summary['snapshots']} snapshots in {out}.")
    if failures:
        last = failures[0].strip().splitlines()[-1]
        raise ChildProcessError(
            f"{len(failures)} of {len(stacks)} stacks of runs failed, the first with: {last}. The others are "
            "recorded; the same command tries the rest again"
        )
    return summary


def run_folder(settings: RunSettings, out: Path) -> Path:
    """Where a run's trajectory lies."""
    return out / settings.task / RUN.format(settings.index)


def is_recorded(settings: RunSettings, recipe: Recipe, out: Path) -> bool:
    """Whether that run is there, and finished.

    Raises:
        ValueError: a run of that name is there that was recorded with other settings.
    """
    folder = run_folder(settings, out)
    if not (folder / DESCRIPTION).is_file():
        return False
    there = read_description(folder)
    ours = {"settings": settings.to_dict(), "recipe": asdict(recipe)}
    for part, values in ours.items():
        found = there.get(part, {})
        different = [key for key, value in values.items() if found.get(key) != value]
        if different:
            key = different[0]
            raise ValueError(
                f"`out` must be a folder for runs with these settings, but {folder} was recorded with another "
                f"`{key}` ({found.get(key)}, now {values[key]}): choose another folder"
            )
    return bool(there["finished"])


def plan_cost(
    stacks: Sequence[Sequence[RunSettings]],
    tasks: dict[str, Task],
    recipe: Recipe,
    cache: Path,
    device: torch.device,
    threads: int,
) -> tuple[dict[str, str], Cost]:
    """{task: how to compute gradients}, and the cost of all stacks: from a few steps of each task's largest stack.

    Args:
        threads: of each process.
    """
    engines: dict[str, str] = {}
    per_row: dict[str, float] = {}  # seconds of one step for one row of a batch
    every = [one for group in stacks for one in group]
    left = dict.fromkeys(one.task for one in every)
    size, before = 0, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in tqdm(left, desc="timing", unit="task", leave=False, disable=len(left) < 2):
            settings = max((group for group in stacks if group[0].task == name), key=len)
            engines[name], seconds, numbers = _timed(tasks[name], load(tasks[name], cache), settings, device)
            per_row[name] = seconds / (len(settings) * settings[0].batch_size)
            kept = numbers * recipe.torch_dtype.itemsize * (3 if recipe.moments else 1)
            size += kept * sum(1 + one.steps // recipe.every for one in every if one.task == name)
    finally:
        torch.set_num_threads(before)
    seconds = sum(per_row[one.task] * one.batch_size * one.steps for one in every)
    return engines, Cost(len(every), sum(one.steps for one in every), seconds, size)


def load(task: Task, cache: Path) -> Any:
    """The data of a task; tasks with the same text and vocabulary share what is prepared."""
    return task.load(cache / task.kind)


def _timed(task: Task, data: Any, settings: Sequence[RunSettings], device: torch.device) -> tuple[str, float, int]:
    trainings: list[StackedTraining] = []

    def make(engine: str) -> StackedTraining:
        trainings[:] = [StackedTraining(task, data, settings, device, engine)]
        return trainings[0]

    engine, seconds = faster_engine(make, device)
    return engine, seconds, trainings[0].flat.shape[1]


def _work(
    stacks: Sequence[Sequence[RunSettings]],
    engines: dict[str, str],
    recipe: Recipe,
    out: Path,
    cache: Path,
    device: str,
    jobs: int,
) -> list[str]:
    """Do all stacks; the tracebacks of those that failed."""
    failures: list[str] = []
    steps = sum(one.steps for settings in stacks for one in settings)
    with tqdm(total=steps, desc="recording", unit="step", smoothing=0.05) as progress:
        if jobs == 1:
            for settings in stacks:
                failed = _do(settings, engines[settings[0].task], recipe, out, cache, device, progress.update)
                failures += [failed] if failed else []
            return failures
        with workers(jobs) as pool:
            pending = {
                pool.submit(_do, settings, engines[settings[0].task], recipe, out, cache, device): settings
                for settings in stacks
            }
            for future in as_completed(pending):
                failed = future.result()
                failures += [failed] if failed else []
                progress.update(sum(one.steps for one in pending[future]))
    return failures


def _do(
    settings: Sequence[RunSettings],
    engine: str,
    recipe: Recipe,
    out: Path,
    cache: Path,
    device: str,
    progress: Callable[[int], Any] = lambda steps: None,
) -> str | None:
    """Record a stack; an error is given back as text, so that the other stacks go on."""
    try:
        task = replace(recording_task(settings[0].task), steps=settings[0].steps)
        training = StackedTraining(task, load(task, cache), settings, torch.device(device), engine)
        record_stack(training, recipe, [run_folder(one, out) for one in settings], progress)
    except Exception:
        return traceback.format_exc()
    return None


def _told(cost: Cost, jobs: int, out: Path) -> str:
    return (
        f"{cost.runs} runs are left, {cost.steps:,} steps in all: about {in_words(cost.seconds / jobs)} with {jobs} "
        f"{'process' if jobs == 1 else 'processes'}, and at most {readable(cost.size)} in {out}. The "
        "same command goes on where it was interrupted."
    )


def _summary(
    wanted: Sequence[RunSettings],
    recipe: Recipe,
    out: Path,
    engines: dict[str, str],
    failures: Sequence[str],
    seconds: float,
    device: str,
) -> dict[str, Any]:
    runs = []
    for one in wanted:
        if not is_recorded(one, recipe, out):
            continue
        trajectory = Trajectory(run_folder(one, out))
        losses = [loss for loss in trajectory.losses if math.isfinite(loss)]
        runs.append(
            {
                "folder": run_folder(one, out).relative_to(out).as_posix(),
                "settings": one.to_dict(),
                "parameters": trajectory.num_parameters,
                "snapshots": len(trajectory),
                "final_loss": losses[-1] if losses else None,
                "diverged": trajectory.description["diverged"],
            }
        )
    return {
        "recorded": len(runs),
        "snapshots": sum(run["snapshots"] for run in runs),
        "diverged": sum(run["diverged"] for run in runs),
        "recipe": asdict(recipe),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "engines": engines,
        "failures": list(failures),
        "runs": runs,
    }
