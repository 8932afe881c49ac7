"""Files of weights: tensors are mapped when they are asked for, and a copy of a file is changed in place.

A safetensors file is mapped tensor by tensor, and no longer than somebody holds the tensor, so that what a process
takes of memory does not grow with the file.  Pickles are only ever read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLED = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)

NESTED = ("model", "state_dict", "module", "model_state_dict")
"""Keys under which a pickled dictionary may hold the state dict, one within another."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of parameters; tensors of any other dtype are passed on as they are."""


class TensorFile(ABC):
    """The tensors of one file.

    Attributes:
        path: of the file.
        shapes: {name: shape} of every tensor of a dtype in :data:`DTYPES`.
        others: names of the tensors of other dtypes.
        aliases: {name: the name, among ``shapes``, of the tensor that it shares memory with}.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    others: tuple[str, ...]
    aliases: dict[str, str]

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor of ``shapes``, memory-mapped where the file allows it; not to be written to."""

    @abstractmethod
    def draft(self, target: Path) -> Draft:
        """A copy of the file at ``target``, whose tensors can be changed."""


class Draft(ABC):
    """A copy of a file of weights that is being changed; it is whole once :meth:`finish` returns."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A contiguous tensor to write to; it holds what the original holds."""

    @abstractmethod
    def finish(self) -> None:
        """Write everything to the disk."""


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a file, by its suffix.

    Raises:
        ValueError: it is no file of weights, or not a whole one.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights must be in a file ending in {', '.join(SUFFIXES)}, got {path}")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


# -- safetensors ----------------------------------------------------------------------------------------------------


class SafetensorsFile(TensorFile):
    """See :class:`TensorFile`; every tensor is mapped from its own part of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.aliases = path, {}
        try:
            with safe_open(str(path), framework="pt", device="cpu"):
                pass  # checks the header and the length
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is no whole safetensors file ({error})") from error
        header.pop("__metadata__", None)
        known = {name: entry for name, entry in header.items() if entry["dtype"] in DTYPES}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in known.items()}
        self.others = tuple(name for name in header if name not in known)
        self._entries = {
            name: (DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0]) for name, entry in known.items()
        }

    def tensor(self, name: str) -> Tensor:
        return self.map(self.path, name, mmap.ACCESS_COPY)

    def draft(self, target: Path) -> Draft:
        return _SafetensorsDraft(self, target)

    def map(self, path: Path, name: str, access: int) -> Tensor:
        """A tensor, from this file or from a copy of it."""
        (dtype, offset), shape = self._entries[name], self.shapes[name]
        number = torch.Size(shape).numel()
        if number == 0:
            return torch.empty(shape, dtype=dtype)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset - start + number * dtype.itemsize
        with open(path, "r+b" if access == mmap.ACCESS_WRITE else "rb") as file:
            mapped = mmap.mmap(file.fileno(), length, access=access, offset=start)
        return torch.frombuffer(mapped, dtype=dtype, count=number, offset=offset - start).view(shape)


class _SafetensorsDraft(Draft):
    def __init__(self, source: SafetensorsFile, target: Path) -> None:
        self.source, self.target = source, target
        shutil.copyfile(source.path, target)

    def tensor(self, name: str) -> Tensor:
        return self.source.map(self.target, name, mmap.ACCESS_WRITE)

    def finish(self) -> None:
        _sync(self.target)


# -- pickles --------------------------------------------------------------------------------------------------------


class PickledFile(TensorFile):
    """See :class:`TensorFile`; the state dict may lie under one of :data:`NESTED`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _state_dict(self.load(), path)
        self.shapes, self.aliases, others = {}, {}, []
        first: dict[tuple, str] = {}
        for name, tensor in self._tensors.items():
            if tensor.dtype not in DTYPES.values():
                others.append(name)
                continue
            same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            known = first.setdefault(same, name) if tensor.numel() else name
            if known == name:
                self.shapes[name] = tuple(tensor.shape)
            else:
                self.aliases[name] = known
        self.others = tuple(others)

    def load(self) -> Any:
        """All of it, memory-mapped if the file is of the format that can be."""
        try:
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6
                return torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
            said = str(error).strip().splitlines()
            raise ValueError(
                f"{self.path} cannot be read as tensors alone (torch.load with weights_only=True), which is the only "
                f"way that pickles are read here: {said[0] if said else type(error).__name__}"
            ) from error

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def draft(self, target: Path) -> Draft:
        return _PickledDraft(self, target)


class _PickledDraft(Draft):
    """Holds what is changed in memory until it is written: the pages of the mapped file that were written to."""

    def __init__(self, source: PickledFile, target: Path) -> None:
        self.target = target
        self._content = source.load()
        self._tensors = _state_dict(self._content, source.path)
        self._apart: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor if tensor.is_contiguous() else self._apart.setdefault(name, tensor.contiguous())

    def finish(self) -> None:
        for name, tensor in self._apart.items():
            self._tensors[name].detach().copy_(tensor)
        torch.save(self._content, self.target)
        _sync(self.target)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for inner in _inside(content):
        tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
        if any(tensor.dtype in DTYPES.values() for tensor in tensors.values()):
            return tensors
    raise ValueError(
        f"{path} must hold a state dict, at its top or under one of {', '.join(map(repr, NESTED))}; found "
        f"{sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__}"
    )


def _inside(content: Any) -> Iterator[Mapping]:
    """The innermost dictionary first: beside it there may be a learning rate that is a tensor too."""
    if isinstance(content, Mapping):
        for key in NESTED:
            yield from _inside(content.get(key))
        yield content


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
