"""Writes a trajectory: collects snapshots, and puts them on the disk shard by shard."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.snapshot_file import TEMPORARY, sync_directory, write_snapshot
from ..training.storage import DTYPES, HostPlace, Snapshot
from .trajectory import (
    DESCRIPTION,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    PARAMETER,
    SHARD,
    read_description,
    read_index,
)

SHARD_BYTES = 32 * 2**20
"""Snapshots are kept in memory until there are so many bytes of them, and then written as one shard."""

# What two parts of one trajectory must have in common.
_TIES = ("interval", "dtype", "moments_dtype", "with_moments", "parameters")


class TrajectoryWriter:
    """Puts the snapshots of one run into a folder (:mod:`hf_nino.metatrain.trajectory` says how they lie there).

    What has been flushed survives a crash.  After each shard the index is replaced as a whole.

    Args:
        folder: created if need be.
        description: of the run, for ``trajectory.json``; see
            :func:`hf_nino.metatrain.describe.describe_run`.
        resume_at: steps that the run has done before it goes on; snapshots of later steps, which an interrupted part
            of it may have left, are dropped.  ``None`` for a new run.
        overwrite: a new run may replace a trajectory that is there.
        shard_bytes: of a shard; a snapshot that is larger has one of its own.

    Raises:
        ValueError: a new run, and the folder holds a trajectory; or one to be resumed that does not fit.
        OSError: nothing can be written there.
    """

    def __init__(
        self,
        folder: str | Path,
        description: Mapping[str, Any],
        *,
        resume_at: int | None = None,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.description = {"format": FORMAT, "format_version": FORMAT_VERSION, "moments": [], **description}
        self.description["finished"] = False
        self.shard_bytes = shard_bytes
        self._rows: list[dict[str, Any]] = []
        self._waiting: list[list[Snapshot]] = []
        self._kept = HostPlace(_dtype(self.description["dtype"]))
        self._kept_moments = HostPlace(_dtype(self.description["moments_dtype"]))
        self._means = IntervalMeans()
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / DESCRIPTION).is_file():
            self._take_over(resume_at, overwrite)
        self._write_description()

    def __len__(self) -> int:
        """Snapshots, those that still wait for a shard included."""
        return len(self._rows)

    @property
    def last_step(self) -> int | None:
        """Of the last snapshot; ``None`` if there is none."""
        return self._rows[-1]["step"] if self._rows else None

    @property
    def learning_rate_sum(self) -> float:
        """At the last snapshot."""
        return self._rows[-1]["learning_rate_sum"] if self._rows else 0.0

    def add(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        moments: Mapping[str, Tensor] | None = None,
        learning_rate: float,
        learning_rate_sum: float,
    ) -> None:
        """Take a snapshot; the tensors may change afterwards.

        Args:
            tensors: {name: tensor}, with the shapes of the description.
            moments: {``"exp_avg/NAME"``: tensor}.

        Raises:
            OSError: the shard that is now full could not be written.
        """
        parts = [self._kept.keep({f"{PARAMETER}/{name}": tensor for name, tensor in tensors.items()}, step)]
        if moments:
            parts.append(self._kept_moments.keep(moments, step))
        self._waiting.append(parts)
        self._rows.append(
            {"step": step, "learning_rate": learning_rate, "learning_rate_sum": learning_rate_sum, "loss": None}
        )
        self._means.close_interval(step)
        size = sum(tensor.numel() for tensor in tensors.values()) * self._kept.dtype.itemsize
        size += sum(tensor.numel() for tensor in (moments or {}).values()) * self._kept_moments.dtype.itemsize
        if (len(self._waiting) + 1) * size > self.shard_bytes:
            self.flush()

    def add_loss(self, loss: float, first: int, last: int) -> None:
        """Tell the mean training loss of the steps ``first`` to ``last``, in any pieces, before or after snapshots."""
        self._means.add(loss, first, last)

    @property
    def open_losses(self) -> list[list[float]]:
        """What was told of steps after the last snapshot: [loss, first, last]; for :meth:`add_loss` when resuming."""
        return [list(piece) for piece in self._means.open]

    def flush(self) -> None:
        """Write what waits as a shard, and the index.

        Raises:
            OSError: the disk would not have it.
        """
        if self._waiting:
            shards = [int(re.findall(r"\d+", row["shard"])[0]) for row in self._rows if "shard" in row]
            name = SHARD.format(max(shards, default=-1) + 1)
            states = [{k: t for part in parts for k, t in part.tensors().items()} for parts in self._waiting]
            keys = dict.fromkeys(key for state in states for key in state)
            stacked = {key: _stack([state.get(key) for state in states]) for key in keys}
            write_snapshot(self.folder / name, stacked, self._rows[-1]["step"])
            for position, row in enumerate(self._rows[-len(states) :]):
                row |= {"shard": name, "position": position}
            self.discard()
            self._learn_moments(keys)
        self._write_index()

    def discard(self) -> None:
        """Forget what has not been written."""
        for parts in self._waiting:
            for part in parts:
                part.release()
        self._waiting.clear()
        self._rows = [row for row in self._rows if "shard" in row]

    def close(self, finished: bool = True) -> None:
        """Write what is left.

        Args:
            finished: whether the run came to its end.

        Raises:
            OSError: the disk would not have it.
        """
        self.flush()
        self.description["finished"] = finished
        self._write_description()
        self._kept.close()
        self._kept_moments.close()

    def _take_over(self, resume_at: int | None, overwrite: bool) -> None:
        if resume_at is None and not overwrite:
            raise ValueError(
                f"`folder` must not hold a trajectory when a new run begins, found one in {self.folder}: choose "
                "another folder, resume that run, or pass overwrite=True to replace it"
            )
        rows: list[dict[str, Any]] = []
        if resume_at is not None:
            there = read_description(self.folder)
            ours = json.loads(json.dumps(self.description))
            different = [key for key in _TIES if there.get(key) != ours[key]]
            if different:
                raise ValueError(
                    f"`folder` must hold a trajectory that fits the resumed run, but in {self.folder} "
                    f"{different[0]!r} is another: resume with the settings that it was begun with, or choose another "
                    "folder"
                )
            rows = [row for row in read_index(self.folder) if row["step"] <= resume_at]
            if rows and rows[-1]["step"] + self.description["interval"] <= resume_at:
                raise ValueError(
                    f"`folder` must hold the trajectory up to step {resume_at}, where the run resumes, but that in "
                    f"{self.folder} ends at step {rows[-1]['step']}: choose another folder, or resume an earlier "
                    "checkpoint"
                )
            self.description["moments"] = there["moments"]
        self._rows = rows
        self._means = IntervalMeans(rows[-1]["step"] if rows else 0)
        self._write_index()
        wanted = {row["shard"] for row in rows}
        for path in [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(f"shard-*{TEMPORARY}")]:
            if path.name not in wanted:
                path.unlink()

    def _learn_moments(self, keys: Mapping[str, None]) -> None:
        kinds = dict.fromkeys(key.split("/", 1)[0] for key in keys)
        new = [kind for kind in kinds if kind != PARAMETER and kind not in self.description["moments"]]
        if new:
            self.description["moments"] = [*self.description["moments"], *new]
            self._write_description()

    def _write_index(self) -> None:
        for row in self._rows:
            row["loss"] = self._means.means.get(row["step"], row["loss"])
        written = [row for row in self._rows if "shard" in row]
        write_text(self.folder / INDEX, "".join(json.dumps(row) + "\n" for row in written))

    def _write_description(self) -> None:
        write_text(self.folder / DESCRIPTION, json.dumps(self.description, indent=1) + "\n")


class IntervalMeans:
    """Mean losses of the steps between snapshots, from losses of single steps or means of many, in any order.

    Args:
        since: step of the last snapshot; steps up to it are nobody's.

    Attributes:
        means: {step of a snapshot: mean loss of the steps since the one before}, as far as known; only finite ones.
        open: (loss, first, last) of what was told of steps that no snapshot has followed yet.
    """

    def __init__(self, since: int = 0) -> None:
        self.means: dict[int, float] = {}
        self.open: list[tuple[float, int, int]] = []
        self._bounds = [since]
        self._sums: dict[int, tuple[float, int]] = {}

    def close_interval(self, step: int) -> None:
        """A snapshot was taken after ``step``."""
        self._bounds.append(step)
        pieces, self.open = self.open, []
        for piece in pieces:
            self.add(*piece)

    def add(self, loss: float, first: int, last: int) -> None:
        """The mean loss of the steps ``first`` to ``last``."""
        if last > self._bounds[-1]:
            self.open.append((loss, max(first, self._bounds[-1] + 1), last))
        for i in range(len(self._bounds) - 1, 0, -1):
            before, step = self._bounds[i - 1], self._bounds[i]
            if step < first:
                break
            steps = min(last, step) - max(first, before + 1) + 1
            if steps > 0:
                total, count = self._sums.get(step, (0.0, 0))
                self._sums[step] = total, count = total + loss * steps, count + steps
                if math.isfinite(total):
                    self.means[step] = total / count
                else:
                    self.means.pop(step, None)


def _stack(tensors: list[Tensor | None]) -> Tensor:
    """``[S, *shape]``; a moment that did not exist yet is 0."""
    like = next(tensor for tensor in tensors if tensor is not None)
    return torch.stack([torch.zeros_like(like) if tensor is None else tensor for tensor in tensors])


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype in DTYPES if str(dtype) == f"torch.{name}")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
