"""The weights of a checkpoint: one file or several shards, seen as one state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from .tensor_files import SUFFIXES, Draft, TensorFile, open_tensors

WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
"""Files that hold the weights of a checkpoint, or with ``.index.json`` appended name its shards; best first."""

SHARDED_BY_OTHERS = ("pytorch_model_fsdp*", "global_step*/*_states.pt", "*_states.pt", "*.distcp")
"""What FSDP and DeepSpeed write: the parameters of each rank, which a resumed run reads instead."""

SEVERAL_MODELS = ("model_1.safetensors", "pytorch_model_1.bin")
"""What accelerate writes when several models were prepared."""


class Weights(Mapping[str, Tensor]):
    """The tensors of files, by name, read when they are asked for; those of integers and the like are left out.

    Args:
        files: all files of one checkpoint.

    Attributes:
        others: names of the tensors that are left out.
        aliases: {name: name of the tensor that it shares memory with}.

    Raises:
        ValueError: two files hold a tensor of the same name, or none holds any.
    """

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self.files = tuple(files)
        self._home: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.shapes:
                if name in self._home:
                    raise ValueError(f"{file.path} and {self._home[name].path} both hold {name!r}")
                self._home[name] = file
        if not self._home:
            raise ValueError(f"{', '.join(str(file.path) for file in self.files)} hold no parameters")
        self.others = tuple(name for file in self.files for name in file.others)
        self.aliases = {alias: name for file in self.files for alias, name in file.aliases.items()}

    @classmethod
    def at(cls, path: Path) -> Weights:
        """The weights of a checkpoint; see :func:`weight_files`."""
        return cls(open_tensors(file) for file in weight_files(path))

    def __getitem__(self, name: str) -> Tensor:
        return self._home[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return self._home[name].shapes[name]


class Drafts(Mapping[str, Tensor]):
    """Copies of all files of some :class:`Weights` in another folder, whose tensors can be written to."""

    def __init__(self, weights: Weights, folder: Path) -> None:
        self._home: dict[str, Draft] = {}
        self._drafts: list[Draft] = []
        self._last: tuple[str, Tensor] | None = None
        for file in weights.files:
            draft = file.draft(folder / file.path.name)
            self._drafts.append(draft)
            self._home |= dict.fromkeys(file.shapes, draft)

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:  # whoever asks twice in a row gets the same memory
            self._last = None
            self._last = name, self._home[name].tensor(name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def finish(self) -> None:
        """Write everything to the disk."""
        self._last = None
        for draft in self._drafts:
            draft.finish()


class Renamed(Mapping[str, Tensor]):
    """Some tensors of a mapping under other names.

    Args:
        tensors: still read when they are asked for.
        names: {new name: name in ``tensors``}.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def holds_weights(path: Path) -> bool:
    """Whether a path is a checkpoint: a file of weights, or a folder with some under a usual name."""
    if path.is_file():
        return path.suffix in SUFFIXES
    return any((path / name).is_file() or (path / f"{name}.index.json").is_file() for name in WEIGHTS) or (
        path.is_dir() and _sharded(path)
    )


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint.

    Args:
        path: a file of weights, or a folder with one of :data:`WEIGHTS` or an index of shards.

    Raises:
        ValueError: there are none, a shard is missing, or only FSDP or DeepSpeed can put them together.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}")
    if _sharded(path):
        raise ValueError(
            f"{path} holds weights that FSDP or DeepSpeed have split over ranks; put them together first (accelerate "
            "merge-weights, or zero_to_fp32.py of the checkpoint) and name the files that come out"
        )
    for name in SEVERAL_MODELS:
        if (path / name).is_file():
            raise ValueError(f"{path} holds several models ({name}); name the file of the one that is meant")
    for name in WEIGHTS:
        if (path / f"{name}.index.json").is_file():
            return _shards(path / f"{name}.index.json")
        if (path / name).is_file():
            return [path / name]
    raise ValueError(f"{path} is no checkpoint: it holds none of {', '.join(WEIGHTS)}, nor an index of shards")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is malformed ({type(error).__name__}: {error})") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index} names the shard {name!r}, which is not beside it")
    return [index.parent / name for name in names]


def _sharded(path: Path) -> bool:
    return any(next(path.glob(pattern), None) is not None for pattern in SHARDED_BY_OTHERS)
