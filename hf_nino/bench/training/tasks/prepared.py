"""What tasks share in handling data: files that are prepared once, and the order of batches."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file that others see whole or not at all: under another name in the same folder, then renamed.

    Of several processes that write it at once, the last one's file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def prepared(path: Path, prepare: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in ``path``, a safetensors file; if it is absent, those that ``prepare`` makes, kept there."""
    if not path.is_file():
        tensors = {name: tensor.contiguous() for name, tensor in prepare().items()}
        publish(path, lambda draft: save_file(tensors, draft))
    return load_file(path)


def shuffled_rows(rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end, int64 ``[batch_size]``: every epoch is all rows in a new order that ``seed``
    decides, but for a remainder of fewer than ``batch_size``.

    Raises:
        ValueError: there are fewer rows than a batch takes.
    """
    if rows < batch_size:
        raise ValueError(f"`batch_size` must be at most the number of training rows, {rows}, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(rows, generator=generator)
        for batch in order.split(batch_size):
            if len(batch) == batch_size:
                yield batch
