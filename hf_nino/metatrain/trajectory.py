"""A parameter trajectory: the states of a model during one run, equally spaced in steps, in a folder.

====================  ==============================================================================================
``trajectory.json``   what was trained and how: see :data:`FORMAT_VERSION` and the attributes of :class:`Trajectory`
``index.jsonl``       one line a snapshot: ``step``, ``learning_rate``, ``learning_rate_sum``, ``loss``, ``shard``,
                      ``position``
``shard-*.safetensors``  ``"parameter/NAME"``, and perhaps ``"exp_avg/NAME"`` and so on, each ``[S, *shape]``: the
                      snapshots at positions 0 to S - 1 of that shard
====================  ==============================================================================================

Shards appear under their names only when they are whole, and the index names them afterwards, so a run that was killed
leaves a trajectory that is shorter, and nothing else.  No pickle.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from ..training.snapshot_file import TEMPORARY, verify_snapshot

logger = logging.get_logger(__name__)

DESCRIPTION = "trajectory.json"
INDEX = "index.jsonl"
SHARD = "shard-{:05d}.safetensors"
FORMAT = "hf_nino trajectory"
FORMAT_VERSION = 1
PARAMETER = "parameter"

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
# Shards of one trajectory that are kept open at once.
_OPEN = 4


class Trajectory:
    """Reads a recorded trajectory; nothing of a tensor is read before it is asked for.

    Args:
        folder: as :class:`~hf_nino.metatrain.recorder.TrajectoryRecorder` left it.  It may still grow; what was there
            when it was opened is seen.

    Attributes:
        description: all of ``trajectory.json``.
        names: of the recorded parameters, in the order of the model.
        shapes: {name: shape as recorded}, after rows were subsampled.
        rows: {name: int64 tensor of the rows that were kept}, only for parameters of which not all were.
        moments: names of the optimizer's moments that were recorded too (``exp_avg``, ``exp_avg_sq``, ...).
        dtype, moments_dtype: of the recorded parameters and moments.
        interval: steps between snapshots.
        steps: optimizer steps done when each snapshot was taken.
        learning_rates: of the last of these steps; at step 0, of the first step to come.
        learning_rate_sums: summed over all these steps: between two snapshots lies the difference.
        losses: mean training loss of the steps since the snapshot before; NaN where it is not known.
        finished: whether the run came to its end.

    Raises:
        FileNotFoundError: there is no trajectory in ``folder``.
        ValueError: its files are malformed, or of another format version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        try:
            parameters = self.description["parameters"]
            self.shapes = {name: tuple(map(int, entry["shape"])) for name, entry in parameters.items()}
            rows = {name: entry["rows"] for name, entry in parameters.items() if "rows" in entry}
            self.rows = {name: torch.tensor(kept, dtype=torch.int64) for name, kept in rows.items()}
            self.moments: tuple[str, ...] = tuple(self.description["moments"])
            self.dtype: torch.dtype = getattr(torch, self.description["dtype"])
            self.moments_dtype: torch.dtype = getattr(torch, self.description["moments_dtype"])
            self.interval = int(self.description["interval"])
            self.finished = bool(self.description["finished"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.folder / DESCRIPTION} is malformed ({type(error).__name__}: {error})") from error
        index = _without_torn_shards(self.folder, read_index(self.folder))
        if any(later["step"] - row["step"] != self.interval for row, later in itertools.pairwise(index)):
            raise ValueError(f"{self.folder / INDEX} must have a snapshot every {self.interval} steps, but has not")
        self._places = [(row["shard"], row["position"]) for row in index]
        self.steps: list[int] = [row["step"] for row in index]
        self.learning_rates = [float(row["learning_rate"]) for row in index]
        self.learning_rate_sums = [float(row["learning_rate_sum"]) for row in index]
        self.losses = [math.nan if row["loss"] is None else float(row["loss"]) for row in index]
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __repr__(self) -> str:
        return f"Trajectory({str(self.folder)!r}, {len(self)} snapshots every {self.interval} steps)"

    def __len__(self) -> int:
        return len(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files do not travel to other processes

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of one recorded state."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def states(
        self, start: int, stop: int, names: Iterable[str] | None = None, kind: str = PARAMETER
    ) -> dict[str, Tensor]:
        """Snapshots ``start`` to ``stop - 1``: {name: ``[stop - start, *shape]``}, in the dtype that was recorded.

        Args:
            names: of the parameters; nothing of the others is read.  ``None`` for all.
            kind: ``"parameter"``, or one of :attr:`moments`; a moment that did not exist yet is 0.

        Raises:
            IndexError: there are no such snapshots.
            ValueError: an unknown name or kind.
        """
        return self._read(range(start, stop), names, kind)

    def window(
        self, start: int, context: int, stride: int = 1, names: Iterable[str] | None = None, kind: str = PARAMETER
    ) -> dict[str, Tensor]:
        """``context`` snapshots that are ``stride`` apart, the first of them ``start``: {name: ``[context, *shape]``}.

        Between two of them lie ``stride * interval`` steps.

        Raises:
            IndexError: the window does not lie in the trajectory.
            ValueError: ``stride`` below 1, an unknown name or kind.
        """
        if stride < 1:
            raise ValueError(f"`stride` must be at least 1 snapshot, got {stride}")
        return self._read(range(start, start + context * stride, stride), names, kind)

    def verify(self) -> None:
        """Read everything once and compare it with the checksums.

        Raises:
            hf_nino.training.snapshot_file.TornSnapshot: a shard is not what was written.
        """
        for shard in dict.fromkeys(shard for shard, _ in self._places):
            verify_snapshot(self.folder / shard)

    def build_model(self) -> nn.Module:
        """A new model of the recorded shapes, with random weights: what a neural graph is built from.

        Embeddings of which rows were subsampled have as many rows as were kept.

        Raises:
            ValueError: the trajectory does not say how to build it.
        """
        from .rebuild import rebuild_model

        return rebuild_model(self)

    def _read(self, wanted: Sequence[int], names: Iterable[str] | None, kind: str) -> dict[str, Tensor]:
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            text = f"{wanted[0]} to {wanted[-1]}" if wanted else "none at all"
            raise IndexError(f"{self.folder} has snapshots 0 to {len(self) - 1}; asked for {text}")
        if kind != PARAMETER and kind not in self.moments:
            known = ", ".join((PARAMETER, *self.moments))
            raise ValueError(f"`kind` must be one of {known} in {self.folder}, got {kind!r}")
        names = self.names if names is None else list(names)
        unknown = [name for name in names if name not in self.shapes]
        if unknown:
            raise ValueError(f"`names` must be recorded parameters of {self.folder}, got {unknown[0]!r}")
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        for shard, first, last in _stretches([self._places[i] for i in wanted]):
            file, keys = self._file(shard)
            for name in names:
                key = f"{kind}/{name}"
                if key in keys:
                    piece = file.get_slice(key)[first : last + 1]
                else:  # only moments: the optimizer had none yet
                    piece = torch.zeros(last + 1 - first, *self.shapes[name], dtype=self.moments_dtype)
                pieces[name].append(piece)
        return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in pieces.items()}

    def _file(self, shard: str) -> tuple[Any, frozenset[str]]:
        if shard not in self._open:
            file = safe_open(str(self.folder / shard), framework="pt", device="cpu")
            self._open[shard] = file, frozenset(file.keys())
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def find_trajectories(folder: str | Path) -> list[Path]:
    """All folders at or below ``folder`` that hold a trajectory, sorted."""
    return sorted(path.parent for path in Path(folder).rglob(DESCRIPTION))


def read_description(folder: Path) -> dict[str, Any]:
    """``trajectory.json`` of a folder.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is malformed, or of another format version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no trajectory: {DESCRIPTION} is absent")
    try:
        description = json.loads(path.read_text("utf-8"))
        version = description["format_version"]
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is malformed ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}; this version of hf_nino reads {FORMAT_VERSION}")
    return description


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``index.jsonl``; none if it is absent.

    Raises:
        ValueError: a line is malformed.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            whole = {"step", "position"} <= {key for key, value in row.items() if type(value) is int}
            # A name with a path in it would lead out of the folder, and folders come from the Hub.
            if not whole or not _SHARD.fullmatch(row["shard"]) or not {"learning_rate_sum", "loss"} <= row.keys():
                raise ValueError("it is no snapshot")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is malformed ({type(error).__name__}: {error})") from error
        rows.append(row)
    return rows


def _without_torn_shards(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The snapshots before the first shard that is absent or torn; a warning says what is lost."""
    lengths: dict[str, int] = {}
    for row in rows:
        if row["shard"] not in lengths:
            lengths[row["shard"]] = _length(folder / row["shard"])
    kept = next((i for i, row in enumerate(rows) if row["position"] >= lengths[row["shard"]]), len(rows))
    if kept < len(rows):
        logger.warning(
            f"{folder / rows[kept]['shard']} is absent or torn: the trajectory ends before step {rows[kept]['step']}, "
            f"and its last {len(rows) - kept} snapshots are lost."
        )
    elif any(folder.glob(f"*.safetensors{TEMPORARY}")):
        logger.warning(f"{folder} was left while a shard was being written: the trajectory ends before it.")
    return rows[:kept]


def _length(shard: Path) -> int:
    """Snapshots in a shard; 0 if it is absent or its length is not what its header says."""
    try:
        with safe_open(str(shard), framework="pt", device="cpu") as file:
            return min((file.get_slice(key).get_shape()[0] for key in file.keys()), default=0)  # noqa: SIM118
    except Exception:  # safetensors has an exception of its own for each way of being torn
        return 0


def _stretches(places: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """(shard, first position, last position) of snapshots that lie side by side and can be read at once."""
    found: list[tuple[str, int, int]] = []
    for shard, position in places:
        if found and found[-1][0] == shard and found[-1][2] + 1 == position:
            found[-1] = (shard, found[-1][1], position)
        else:
            found.append((shard, position, position))
    return found
