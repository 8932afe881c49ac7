"""Read a checkpoint that other ranks, or more or fewer of them, have written: only the rows that are needed here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..nowcaster.shards import Rows
from .checkpoint import HISTORY_NAME, SNAPSHOT_NAME, STATE_NAME, UnreadableCheckpoint, part_name, parts_of


class Redivision:
    """The files of all ranks of a checkpoint; a context manager that closes them.

    Raises:
        UnreadableCheckpoint: a file is absent, malformed, or does not belong to this state.
    """

    def __init__(self, directory: str | os.PathLike, state: Mapping[str, Any]) -> None:
        self._directory, self._state = Path(directory), state
        self._stack = ExitStack()
        # For every key, (file, key in the file), by rank.
        self._places: dict[str, list[tuple[Any, str]]] = {}

    def __enter__(self) -> Redivision:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _open(self) -> None:
        parts, steps = parts_of(self._state), self._state["snapshot_steps"]
        for part in range(parts):
            self._add(part_name(HISTORY_NAME, part, parts), self._state["step"], "")
            for position, step in enumerate(steps if self._state.get("snapshot_files") else ()):
                self._add(part_name(SNAPSHOT_NAME.format(step=step), part, parts), step, f"{position}/")

    def _add(self, name: str, step: int, prefix: str) -> None:
        path = self._directory / name
        if not path.is_file():
            raise UnreadableCheckpoint(f"{name} is not in {self._directory}")
        try:
            file = self._stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
        except Exception as error:
            raise UnreadableCheckpoint(f"{path} is malformed ({type(error).__name__}: {error})") from error
        found = (file.metadata() or {}).get("step")
        if found != str(step):
            raise UnreadableCheckpoint(f"{path} is of step {found}, not {step}, and does not belong to {STATE_NAME}")
        for key in file.keys():  # noqa: SIM118
            self._places.setdefault(prefix + key, []).append((file, key))

    def keys(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def first(self, key: str) -> Tensor:
        """A tensor that is the same on all ranks, or that only the first has."""
        file, name = self._places[key][0]
        return file.get_tensor(name)

    def rows(self, key: str, rows: Rows) -> Tensor:
        """Rows of a tensor that the ranks have divided.

        Raises:
            ValueError: all rows together are not those of the parameter.
        """
        shapes = [tuple(file.get_slice(name).get_shape()) for file, name in self._places[key]]
        counts = [_rows(shape, rows.shape) for shape in shapes]
        if None in counts or sum(counts) != rows.total:
            raise ValueError(f"{key!r} has rows of shapes {shapes}, which do not make {rows.shape}")
        found, position = [], 0
        for (file, name), count in zip(self._places[key], counts, strict=True):
            first, last = max(rows.start, position), min(rows.stop, position + count)
            if first < last:
                whole = not rows.shape or (first == position and last == position + count)
                found.append(
                    file.get_tensor(name) if whole else file.get_slice(name)[first - position : last - position]
                )
            position += count
        if not rows.shape:
            return found[0] if found else self.first(key).reshape(-1)[:0]
        return torch.cat(found) if found else self.first(key)[:0]

    def divided(self, key: str, shape: Sequence[int]) -> bool:
        """Whether the ranks have divided the rows of a tensor of this shape."""
        counts = [_rows(tuple(file.get_slice(name).get_shape()), tuple(shape)) for file, name in self._places[key]]
        return None not in counts and sum(counts) == (shape[0] if shape else 1)


def _rows(found: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """How many rows of a parameter of ``shape`` a tensor of shape ``found`` has; ``None``: it has none of them."""
    if not shape:
        return 1 if found == () else 0 if found == (0,) else None
    return found[0] if len(found) == len(shape) and found[1:] == shape[1:] else None
