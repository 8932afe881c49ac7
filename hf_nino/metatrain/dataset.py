"""Folders of trajectories as a ``datasets`` dataset: one row a trajectory, states read when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from huggingface_hub import snapshot_download

from ..nowcaster.hub_errors import hub_error
from .card import trajectory_rows
from .trajectory import Trajectory

FEATURES = Features(
    {
        "folder": Value("string"),
        "task": Value("string"),
        "model": Value("string"),
        "parameters": Value("int64"),
        "snapshots": Value("int64"),
        "interval": Value("int64"),
        "last_step": Value("int64"),
        "dtype": Value("string"),
        "moments": List(Value("string")),
        "optimizer": Value("string"),
        "learning_rate": Value("float64"),
        "schedule": Value("string"),
        "warmup_steps": Value("int64"),
        "weight_decay": Value("float64"),
        "batch_size": Value("int64"),
        "initialisation": Value("float64"),
        "seed": Value("int64"),
        "final_loss": Value("float64"),
        "finished": Value("bool"),
        "diverged": Value("bool"),
    }
)
"""Columns of the rows; what a trajectory does not say is null.  ``learning_rate`` is the highest of all snapshots."""


def load_trajectories(path: str | Path, *, revision: str | None = None) -> Dataset:
    """The trajectories in a folder, or in a dataset repository on the Hub, which is downloaded.

    Rows can be filtered, split and shuffled as in any dataset; :func:`open_trajectory` reads one, and :func:`windows`
    all of them.

    Args:
        path: a folder with trajectories at any depth, or a repo id.
        revision: of the repository.

    Returns:
        A dataset with the columns of :data:`FEATURES` and ``path``, the folder of the trajectory on this machine.

    Raises:
        ValueError: there is no trajectory in the folder, or one that is malformed; or ``path`` is neither a folder nor
            the name of a repository.
        OSError: there is no such folder, and no such repository can be reached.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(path), repo_type="dataset", revision=revision))
        except Exception as error:
            what = f"the dataset {str(path)!r} (there is no such folder)"
            raise hub_error(error, what, f"dataset repository {str(path)!r}") from error
    rows = [{**row, "path": str(folder / row["folder"])} for row in trajectory_rows(folder)]
    return Dataset.from_list(rows, features=Features({**FEATURES, "path": Value("string")}))


def open_trajectory(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row of :func:`load_trajectories`."""
    return Trajectory(row["path"])


def windows(
    dataset: Dataset,
    context: int,
    *,
    stride: int = 1,
    every: int = 1,
    names: Sequence[str] | None = None,
    seed: int | None = None,
) -> IterableDataset:
    """All windows of ``context`` snapshots, ``stride`` apart, as a stream; nothing else is read.

    Each is a dictionary: ``path``; ``steps``, ``learning_rates``, ``learning_rate_sums`` and ``losses`` with
    ``context`` numbers each; and ``states``, {name: ``[context, *shape]``}.  Workers of a ``DataLoader`` share the
    trajectories; pass it ``batch_size=None``, for states of different models cannot be stacked.

    Args:
        dataset: of :func:`load_trajectories`, perhaps filtered.
        every: snapshots from the start of one window to that of the next.
        names: of parameters; those that a trajectory does not have are left out.  ``None``: all.
        seed: of a random order of trajectories, and of windows in each; ``None``: as they lie.

    Raises:
        ValueError: ``context``, ``stride`` or ``every`` below 1.
    """
    for name, value in {"context": context, "stride": stride, "every": every}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1 snapshot, got {value}")
    paths = list(dataset["path"])
    if seed is not None:
        random.Random(seed).shuffle(paths)
    # A list among these is what `datasets` deals out to workers, so `names` must be none.
    settings = {"context": context, "stride": stride, "every": every, "seed": seed}
    settings["names"] = None if names is None else tuple(names)
    return IterableDataset.from_generator(_windows, gen_kwargs={"paths": paths, **settings})


def _windows(
    paths: list[str], context: int, stride: int, every: int, names: tuple[str, ...] | None, seed: int | None
) -> Iterator[dict[str, Any]]:
    for path in paths:
        trajectory = Trajectory(path)
        chosen = None if names is None else [name for name in names if name in trajectory.shapes]
        starts = list(range(0, len(trajectory) - (context - 1) * stride, every))
        if seed is not None:
            random.Random(f"{seed}/{path}").shuffle(starts)
        for start in starts:
            part = slice(start, start + (context - 1) * stride + 1, stride)
            yield {
                "path": path,
                "steps": trajectory.steps[part],
                "learning_rates": trajectory.learning_rates[part],
                "learning_rate_sums": trajectory.learning_rate_sums[part],
                "losses": trajectory.losses[part],
                "states": trajectory.window(start, context, stride, chosen),
            }
