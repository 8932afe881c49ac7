"""States on their way to the device that computes, and predictions on their way back, a strip of a block at a time.

A *strip* is all sources of some targets of a block, or all targets of some sources, whichever lies together in memory;
tiles are cut from strips.  States that are where the network is are read in place, as one strip per block.  From host
memory (or a memory-mapped file) to CUDA, strips travel on a stream of their own while the strip before is computed
with: straight from pinned memory where the history is pinned, through two pinned buffers otherwise.  The host waits
for a copy to leave such a buffer, and for what it takes back, never for anything else that the device computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.structure import EdgeBlock
from .kernels import Workspace
from .scaling import Scale
from .tiles import BUFFERS, Grid, Tile

STRIP_BYTES = 64 << 20
"""Bytes of all snapshots of a strip: long against the latency of a copy, short against the memory of a device."""

History = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Strip:
    """A part of block ``number``: some columns (targets) and rows (sources); ``by_source``: it lies as [J', I', F]."""

    number: int
    block: EdgeBlock
    grid: Grid
    columns: slice
    rows: slice
    by_source: bool

    def of(self, view: Tensor) -> Tensor:
        """The strip of a block's elements [J, I, F], as [I', J', F] or, ``by_source``, as [J', I', F]."""
        part = view[self.rows, self.columns]
        return part if self.by_source else part.transpose(0, 1)

    def by_target(self, part: Tensor) -> Tensor:
        """What :meth:`of` gave, as [I', J', F]."""
        return part.transpose(0, 1) if self.by_source else part

    def tiles(self) -> Iterator[Tile]:
        return self.grid.within(self.columns, self.rows)

    def local(self, tile: Tile) -> tuple[slice, slice]:
        """The tile's columns and rows, counted from the strip's corner."""
        column, row = self.columns.start, self.rows.start
        return (
            slice(tile.columns.start - column, tile.columns.stop - column),
            slice(tile.rows.start - row, tile.rows.stop - row),
        )


def strips(number: int, block: EdgeBlock, cut: Grid, bytes_per_edge: int | None) -> Iterator[Strip]:
    """The strips of a block, whole tiles each, that take at most :data:`STRIP_BYTES` where a tile does.

    Args:
        bytes_per_edge: of all snapshots; ``None`` for one strip, for states that need not travel.
    """
    sources, targets, _ = block.shape
    by_source = max(block.source_strides, default=0) > max(block.target_strides, default=0)
    everything = slice(0, targets), slice(0, sources)
    if bytes_per_edge is None:
        yield Strip(number, block, cut, *everything, by_source)
        return
    step, length, across = (cut.rows, sources, targets) if by_source else (cut.columns, targets, sources)
    width = max(STRIP_BYTES // max(bytes_per_edge * across * step, 1), 1) * step
    for first in range(0, length, width):
        part = slice(first, min(first + width, length))
        yield Strip(number, block, cut, *((everything[0], part) if by_source else (part, everything[1])), by_source)


class States:
    """The snapshots of S samples of one graph, read as scaled states on the network's device.

    Args:
        samples: S histories of C snapshots, oldest first, unscaled, on any device and of any floating dtype.
        scales: for each sample, of every parameter.
        lane: how strips travel; ``None`` chooses.
    """

    def __init__(
        self,
        samples: Sequence[History],
        scales: Sequence[Mapping[str, Scale]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        lane: PlainLane | None = None,
    ) -> None:
        self.samples, self.scales, self.device, self.dtype = samples, scales, device, dtype
        self.lane = lane or (CudaLane(device) if device.type == "cuda" else PlainLane(device))

    def travel(self, block: EdgeBlock) -> bool:
        """Whether the block's snapshots are anywhere but on the device."""
        tensors = (state[block.parameter] for history in self.samples for state in history)
        return self.lane.always or any(tensor.device != self.device for tensor in tensors)

    def stream(self, cuts: Iterable[tuple[EdgeBlock, Grid]]) -> Iterator[tuple[Strip, list[list[Tensor]]]]:
        """The strips of all blocks and their snapshots, S lists of C tensors [I', J', F] each.

        When one is handed out, the next is on its way.
        """
        current = None
        for strip in self._strips(cuts):
            following = strip, self._send(strip)
            if current is not None:
                yield current[0], current[1]()
            current = following
        if current is not None:
            yield current[0], current[1]()

    def features(self, strip: Strip, snapshots: list[list[Tensor]], tile: Tile, workspace: Workspace | None) -> Tensor:
        """Scaled states of a tile, [S, F, C, c, r]."""
        columns, rows = strip.local(tile)
        taps, context = strip.block.shape[2], len(snapshots[0])
        shape = (len(snapshots), taps, context, columns.stop - columns.start, rows.stop - rows.start)
        if workspace is None:
            scaled = torch.empty(shape, device=self.device, dtype=self.dtype)
        else:
            scaled = workspace.take(BUFFERS, shape)
        for values, history, scales in zip(scaled, snapshots, self.scales, strict=True):
            for number, snapshot in enumerate(history):
                values[:, number].copy_(snapshot[columns, rows].movedim(-1, 0))
            scales[strip.block.parameter].apply_(values)
        return scaled

    def _strips(self, cuts: Iterable[tuple[EdgeBlock, Grid]]) -> Iterator[Strip]:
        for number, (block, cut) in enumerate(cuts):
            size = None
            if self.travel(block):
                snapshots = [state[block.parameter] for history in self.samples for state in history]
                size = block.shape[2] * sum(snapshot.element_size() for snapshot in snapshots)
            yield from strips(number, block, cut, size)

    def _send(self, strip: Strip) -> Callable[[], list[list[Tensor]]]:
        name, context = strip.block.parameter, len(self.samples[0])
        pieces = [strip.of(strip.block.view(state[name].detach())) for history in self.samples for state in history]
        receive = self.lane.send(pieces) if self.travel(strip.block) else lambda: pieces

        def snapshots() -> list[list[Tensor]]:
            arrived = [strip.by_target(piece) for piece in receive()]
            return [arrived[first : first + context] for first in range(0, len(arrived), context)]

        return snapshots


class PlainLane:
    """Copies that the host waits for: the reference, and the way to devices without streams.

    Args:
        always: whether what is on the device already is copied all the same.
    """

    def __init__(self, device: torch.device, *, always: bool = False) -> None:
        self.device, self.always = device, always

    def send(self, pieces: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """Begin to bring pieces to the device; the result waits until they are there and returns them."""
        arrived = [piece.to(self.device, copy=self.always) for piece in pieces]
        return lambda: arrived

    def fetch(self, piece: Tensor, destination: Tensor) -> Callable[[], None]:
        """Begin to bring a piece back to where it belongs; the result waits until it is there."""
        destination.copy_(piece)
        return lambda: None


class CudaLane(PlainLane):
    """Copies on a stream of their own, through two pinned buffers in turn where the host's memory is not pinned."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._buffers = (_Pinned(), _Pinned())
        self._sent = 0

    def send(self, pieces: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        buffer = self._buffers[self._sent % 2]
        self._sent += 1
        buffer.wait()
        staged = [
            buffer.fill(number, piece)
            if piece.device.type == "cpu" and not (piece.is_contiguous() and piece.is_pinned())
            else piece
            for number, piece in enumerate(pieces)
        ]
        with torch.cuda.stream(self._stream):
            arrived = [piece.to(self.device, non_blocking=True) for piece in staged]
            event = self._stream.record_event()
        buffer.used_until(event)

        def receive() -> Sequence[Tensor]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for piece in arrived:
                piece.record_stream(current)
            return arrived

        return receive

    def fetch(self, piece: Tensor, destination: Tensor) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        host = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(piece, non_blocking=True)
            piece.record_stream(self._stream)
            event = self._stream.record_event()

        def finish() -> None:
            event.synchronize()
            destination.copy_(host)

        return finish


class _Pinned:
    """Pinned host memory for the pieces of one strip, which grows to the largest, and when it is free again."""

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        self._event: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def used_until(self, event: torch.cuda.Event) -> None:
        self._event = event

    def fill(self, number: int, piece: Tensor) -> Tensor:
        size = piece.numel() * piece.element_size()
        memory = self._memory.get(number)
        if memory is None or memory.numel() < size:
            memory = self._memory[number] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return memory[:size].view(piece.dtype).view(piece.shape).copy_(piece)


class Results:
    """Where predictions go: written in place by whoever computes them, or brought back strip by strip.

    Args:
        tensors: contiguous, by parameter name, on any device.
        device: the one that computes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, lane: PlainLane) -> None:
        self.tensors, self.device, self.lane = tensors, device, lane
        self._number, self._block = -1, None
        self._view = self._home = torch.empty(0)
        self._finish: Callable[[], None] | None = None

    def place(self, strip: Strip) -> Tensor:
        """Room for a strip's prediction on the device, in its parameter's dtype, shaped as :meth:`Strip.of`."""
        if strip.number != self._number:
            self._end_block()
            self._number, self._block = strip.number, strip.block
            self._view = strip.block.view(self.tensors[strip.block.parameter])
        self._home = home = strip.of(self._view)
        away = self.lane.always or home.device != self.device
        return torch.empty_like(home, device=self.device) if away else home

    def done(self, part: Tensor) -> None:
        """The prediction is in what :meth:`place` gave last, or will be once the device gets there."""
        if part is not self._home:
            self._wait()
            self._finish = self.lane.fetch(part, self._home)

    def close(self) -> None:
        """Wait until everything is where it belongs."""
        self._end_block()
        self._number, self._block = -1, None

    def _wait(self) -> None:
        if self._finish is not None:
            self._finish()
            self._finish = None

    def _end_block(self) -> None:
        if self._block is None:
            return
        tensor = self.tensors[self._block.parameter]
        self._wait()
        if self._view.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            self._block.write(tensor, self._view)  # compound axes: what looked like a view is a copy
