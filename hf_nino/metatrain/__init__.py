"""Makes nowcasters: parameter trajectories of training runs, recorded and read, and meta-training on them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ablation import ablate
    from .card import push_trajectories, write_dataset
    from .dataset import load_trajectories, open_trajectory, windows
    from .meta_settings import MetaSettings
    from .meta_training import meta_train
    from .recipe import Recipe
    from .record import record_tasks
    from .recorder import TrajectoryRecorder
    from .recording import Recording
    from .remake import Making, making_of, remake_nowcaster
    from .trajectory import Trajectory, find_trajectories

# Imported when they are asked for: `datasets` takes seconds.
_HOME = {
    "Making": "remake",
    "MetaSettings": "meta_settings",
    "Recipe": "recipe",
    "Recording": "recording",
    "Trajectory": "trajectory",
    "TrajectoryRecorder": "recorder",
    "ablate": "ablation",
    "find_trajectories": "trajectory",
    "load_trajectories": "dataset",
    "making_of": "remake",
    "meta_train": "meta_training",
    "open_trajectory": "dataset",
    "push_trajectories": "card",
    "record_tasks": "record",
    "remake_nowcaster": "remake",
    "windows": "dataset",
    "write_dataset": "card",
}

__all__ = [
    "Making",
    "MetaSettings",
    "Recipe",
    "Recording",
    "Trajectory",
    "TrajectoryRecorder",
    "ablate",
    "find_trajectories",
    "load_trajectories",
    "making_of",
    "meta_train",
    "open_trajectory",
    "push_trajectories",
    "record_tasks",
    "remake_nowcaster",
    "windows",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
