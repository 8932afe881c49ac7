"""Which trajectories a nowcaster learns from, and which ones it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from .trajectory import Trajectory

Key = TypeVar("Key", bound=Hashable)

FEWEST_TASKS = 3
"""From so many tasks on, one or more are held out unless the user says which."""


@dataclass(frozen=True)
class Split:
    """Trajectories in three parts that have none in common.

    Args:
        train: to learn from.
        runs: further runs of tasks that are learned from.
        tasks: all runs of tasks that nothing is learned from.
    """

    train: tuple[Trajectory, ...]
    runs: tuple[Trajectory, ...]
    tasks: tuple[Trajectory, ...]


def task_of(trajectory: Trajectory) -> str:
    """Name of what was trained: the recorded task, or else class and size of the model."""
    task = trajectory.description.get("task")
    if task is not None:
        return task["name"]
    return f"{trajectory.description['model']['class']}-{trajectory.num_parameters}"


def split_trajectories(
    trajectories: Sequence[Trajectory],
    *,
    share: float = 0.1,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> Split:
    """Hold out whole tasks, and of every other task some of its runs.

    What is held out depends on names and seed, not on the order of ``trajectories``.

    Args:
        share: of the runs of each task that are held out: at least one where there are two.  0: none.
        tasks: patterns (``"*-kjv"``) of the tasks to hold out; ``None``: that share of all tasks, at least one where
            there are three.
        seed: which ones.

    Raises:
        ValueError: ``share`` is not in [0, 1), a pattern fits no task, or nothing would be left to learn from.
    """
    if not 0 <= share < 1:
        raise ValueError(f"`held_out_share` must be from 0 to below 1, got {share}")
    by_task: dict[str, list[Trajectory]] = {}
    for one in sorted(trajectories, key=lambda one: one.folder):
        by_task.setdefault(task_of(one), []).append(one)
    if tasks is None:
        held = set(_some({name: name for name in by_task}, share, FEWEST_TASKS, seed))
    else:
        for pattern in tasks:
            if not any(fnmatchcase(name, pattern) for name in by_task):
                raise ValueError(
                    f"`held_out_tasks` must be patterns of recorded tasks, but {pattern!r} fits none of "
                    f"{', '.join(sorted(by_task))}"
                )
        held = {name for name in by_task if any(fnmatchcase(name, pattern) for pattern in tasks)}
    if held == set(by_task):
        raise ValueError(f"`held_out_tasks` must leave a task to learn from, but holds out all of {len(held)}")
    train: list[Trajectory] = []
    runs: list[Trajectory] = []
    for name in sorted(by_task.keys() - held):
        members = {i: f"{name}/{one.folder.parent.name}/{one.folder.name}" for i, one in enumerate(by_task[name])}
        apart = set(_some(members, share, 2, seed))
        for i, one in enumerate(by_task[name]):
            (runs if i in apart else train).append(one)
    return Split(tuple(train), tuple(runs), tuple(one for name in sorted(held) for one in by_task[name]))


def _some(names: Mapping[Key, str], share: float, fewest: int, seed: int) -> list[Key]:
    """Keys of a share of the names, at least one where there are ``fewest``; those with the lowest hashes."""
    count = round(share * len(names))
    if share > 0 and len(names) >= fewest:
        count = max(1, count)
    order = sorted(names, key=lambda key: hashlib.sha256(f"{seed}/{names[key]}".encode()).hexdigest())
    return order[: min(count, len(names) - 1)]
