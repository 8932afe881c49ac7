"""The trajectories of a meta-training: opened, told apart, described."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .sampling import Sampler
from .split import Split, task_of
from .trajectory import Trajectory, find_trajectories


def fingerprint(trajectories: Sequence[Trajectory]) -> str:
    """Of names and lengths: the same data gives the same draws."""
    rows = [
        (task_of(one), one.folder.parent.name, one.folder.name, one.interval, one.steps[-1]) for one in trajectories
    ]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


def describe_data(
    source: str | Path, sampler: Sampler, split: Split, diverged: Sequence[Trajectory]
) -> dict[str, Any]:
    """What was learned from and what was held out, by task."""
    parts = {"train": sampler.trajectories, "held_out_runs": split.runs, "held_out_tasks": split.tasks}
    tasks: dict[str, dict[str, int]] = {}
    for part, members in parts.items():
        for one in members:
            counts = tasks.setdefault(task_of(one), dict.fromkeys(parts, 0))
            counts[part] += 1
    return {
        "source": Path(source).name,
        "trajectories": len(sampler.trajectories),
        "snapshots": sum(len(one) for one in sampler.trajectories),
        "tasks": tasks,
        "fingerprint": fingerprint(sampler.trajectories),
        "diverged_left_out": len(diverged),
        "too_short_left_out": len(sampler.left_out),
        "interval_range": list(sampler.interval_range),
    }


def open_trajectories(source: str | Path) -> tuple[list[Trajectory], list[Trajectory]]:
    """The trajectories of a folder, or of a dataset repository on the Hub: those to use, and those that diverged.

    Raises:
        ValueError: there is none.
        OSError: there is no such folder, and no such repository can be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        paths: Sequence[str | Path] = find_trajectories(folder)
    else:
        from .dataset import load_trajectories  # `datasets` takes seconds to import

        paths = load_trajectories(source)["path"]
    every = [one for one in map(Trajectory, paths) if len(one)]
    if not every:
        raise ValueError(f"`trajectories` must be a folder with trajectories, at any depth, but {source} has none")
    diverged = [one for one in every if one.description.get("diverged", False)]
    return [one for one in every if one not in diverged], diverged
