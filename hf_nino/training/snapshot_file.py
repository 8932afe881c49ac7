"""One snapshot as one safetensors file: written tensor by tensor, never half, and memory-mapped when read.

The file appears under its name only when all of it is on the disk, and it carries a checksum over every byte, so that
a copy that was cut short or has rotted is told from a whole one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Written and summed at a time: what a released snapshot may still cost, and the memory that verifying takes.
CHUNK = 16 * 2**20

TEMPORARY = ".tmp"
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# The checksum is at the same place in every file: 8 bytes of length, then this.
_PREFIX = b'{"__metadata__":{"crc32":"'
_NO_CHECKSUM = b"00000000"
_CHECKSUM_AT = 8 + len(_PREFIX)


class TornSnapshot(Exception):
    """A snapshot file is not what was written; the message says which one and what is wrong."""


def write_snapshot(
    path: Path, tensors: Mapping[str, Tensor], step: int, *, wanted: Callable[[], bool] = lambda: True
) -> bool:
    """Write ``tensors`` to ``path`` as safetensors: a temporary file, synced to the disk, then renamed.

    Args:
        path: may exist, and is then replaced at once.
        tensors: {name: contiguous CPU tensor}; float64, float32, bfloat16 or float16.
        step: kept in the file's metadata.
        wanted: asked between chunks; once it says no, the temporary file is removed.

    Returns:
        Whether the file was written.

    Raises:
        OSError: it could not be.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    header = _header(tensors, step)
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            checksum = zlib.crc32(header)
            for tensor in tensors.values():
                for chunk in _chunks(tensor):
                    if not wanted():
                        return False
                    file.write(chunk)
                    checksum = zlib.crc32(chunk, checksum)
            file.seek(_CHECKSUM_AT)
            file.write(b"%08x" % checksum)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def map_snapshot(path: Path) -> dict[str, Tensor]:
    """{name: tensor}, memory-mapped: a page is read when it is touched, and the system may drop it again."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def verify_snapshot(path: Path) -> int:
    """The step of a snapshot file, once every byte of it has been checked.

    Raises:
        TornSnapshot: it is shorter or longer than its header says, its checksum is wrong, or it is no such file.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:  # checks the header and the length
            step = int((file.metadata() or {})["step"])
        with open(path, "rb") as file:
            start = file.read(_CHECKSUM_AT)
            found = file.read(len(_NO_CHECKSUM))
            checksum = zlib.crc32(_NO_CHECKSUM, zlib.crc32(start))
            while chunk := file.read(CHUNK):
                checksum = zlib.crc32(chunk, checksum)
    except Exception as error:
        raise TornSnapshot(f"{path} is torn ({type(error).__name__}: {error})") from error
    if found != b"%08x" % checksum:
        raise TornSnapshot(f"{path} is torn (its bytes do not give the checksum in its header)")
    return step


def sync_directory(directory: Path) -> None:
    """Make renames and links in ``directory`` last, where the system can be asked to."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(tensors: Mapping[str, Tensor], step: int) -> bytes:
    """Length and JSON; padded so that the data is aligned, with zeros for the checksum."""
    metadata = {"crc32": _NO_CHECKSUM.decode(), "format": "pt", "step": str(step)}
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    for first in range(0, len(data), CHUNK):
        yield data[first : first + CHUNK]
