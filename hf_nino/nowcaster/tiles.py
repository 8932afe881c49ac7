"""How many edges are worked on at a time: from the device's cache, or measured, and never more than memory allows.

A tile is a rectangle of a block, some targets times some sources, of at most T edges; what is computed for it lies in
two buffers of T x H numbers.

* CPU: both buffers take four times the second-level cache of the cores that PyTorch uses, read from the system.  That
  is what measurements say: on two cores of 2 MiB each, time per edge was flat from half that size (8 thousand edges at
  H = 128) to twice as much, and 15 percent more at an eighth of it, where calling the operators costs too much.  Being
  no timing, it gives the same tiles, hence the same rounding, in every process: a resumed run stays exact.
* CUDA and others: the smallest tile within 5 percent of the fastest, timed once per process, device and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

BUFFERS = 2
"""Buffers of T x H numbers that a tile needs."""
CACHES = 4
"""How many times the cores' second-level caches the buffers of a tile take."""
MEMORY = 256 << 20
"""Bytes of a tile's buffers on CPUs with many cores."""
DEFAULT_CACHE = 1 << 20
"""Bytes of second-level cache where the system does not say."""
CANDIDATES = tuple(1 << exponent for exponent in range(14, 20))
"""Tiles that are timed on accelerators, in edges."""


@dataclass(frozen=True)
class Tile:
    """Targets (columns) and sources (rows) of a tile, as ranges within the block."""

    columns: slice
    rows: slice

    @property
    def edges(self) -> int:
        return (self.columns.stop - self.columns.start) * (self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Grid:
    """A block of J sources and I targets cut into tiles of ``columns`` targets and ``rows`` sources."""

    sources: int
    targets: int
    columns: int
    rows: int

    def __iter__(self) -> Iterator[Tile]:
        """Tiles column by column: all sources of the first targets, then the next targets."""
        return self.within(slice(0, self.targets), slice(0, self.sources))

    def within(self, columns: slice, rows: slice) -> Iterator[Tile]:
        """The tiles of a part of the block that begins at the corner of a tile."""
        for column in range(columns.start, columns.stop, self.columns):
            for row in range(rows.start, rows.stop, self.rows):
                yield Tile(
                    slice(column, min(column + self.columns, columns.stop)),
                    slice(row, min(row + self.rows, rows.stop)),
                )


def grid(sources: int, targets: int, edges: int, max_columns: int | None = None) -> Grid:
    """Tiles of at most ``edges`` edges, as square as the block allows, so that what rows and columns add is small."""
    side = 1 << (max(edges, 1).bit_length() // 2)
    columns = min(targets, max(side, edges // max(sources, 1)), max(edges, 1), max_columns or targets)
    rows = min(sources, max(edges // max(columns, 1), 1))
    return Grid(sources, targets, max(columns, 1), max(rows, 1))


def tile_edges(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    *,
    memory: int | None = None,
    edges: int | None = None,
) -> int:
    """Edges of a tile on this device.

    Args:
        hidden_size: H of the network.
        memory: bytes that a tile may take; ``None`` for at most :data:`MEMORY`.
        edges: what to use instead of the rule, within ``memory``.
    """
    edge = BUFFERS * hidden_size * dtype.itemsize
    if edges is None and device.type == "cpu":
        edges = CACHES * cache_bytes() * torch.get_num_threads() // edge
        memory = memory or MEMORY
    elif edges is None:
        edges = calibrated(device, dtype, hidden_size)
    if memory is not None:
        edges = min(edges, memory // edge)
    return max(edges, 1)


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """Bytes of second-level cache that one core has."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) << (10 if text.endswith("K") else 0)
    except (OSError, ValueError):
        return DEFAULT_CACHE


@lru_cache(maxsize=64)
def calibrated(device: torch.device, dtype: torch.dtype, hidden_size: int) -> int:
    """The tile that a timing on the device chose, once per process; tens of milliseconds."""
    return choose(CANDIDATES, lambda edges: _seconds_per_edge(device, dtype, hidden_size, edges))


def choose(candidates: tuple[int, ...], cost: Callable[[int], float]) -> int:
    """The smallest candidate whose cost is within 5 percent of the least; one that does not fit costs infinity."""
    costs = [cost(candidate) for candidate in candidates]
    least = min(costs)
    if math.isinf(least):
        return candidates[0]
    return next(candidate for candidate, spent in zip(candidates, costs, strict=True) if spent <= 1.05 * least)


def _seconds_per_edge(device: torch.device, dtype: torch.dtype, hidden_size: int, edges: int) -> float:
    """Time of one product and one activation on a tile, per edge; the best of three."""
    try:
        first, second = (torch.zeros(edges, hidden_size, device=device, dtype=dtype) for _ in range(BUFFERS))
    except torch.OutOfMemoryError:
        return math.inf
    weight = torch.zeros(hidden_size, hidden_size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):  # the first one warms up
        started = _now(first)
        for _ in range(4):
            torch.mm(first, weight, out=second)
            torch.nn.functional.silu(second, inplace=True)
        best = min(best, _now(second) - started)
    return best / edges


def _now(tensor: Tensor) -> float:
    """The time when everything that was asked of the tensor's device is done."""
    torch.accelerator.synchronize(tensor.device) if tensor.device.type != "cpu" else None
    return time.perf_counter()
