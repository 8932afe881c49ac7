"""Edge blocks restricted to a piece of their parameter: what is left of the graph for who holds some rows only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .structure import EdgeBlock, Nodes


def restrict(block: EdgeBlock, start: int, stop: int) -> Iterator[EdgeBlock]:
    """The elements of a block that lie in a piece of its parameter, as blocks of that piece.

    A block of rows of a matrix is one block with fewer sources or targets; axes that are several at once (heads and
    their channels) may be cut within one of them and then make several.  Where the taps of an edge lie in different
    pieces, a part has some of the taps only, see :func:`taps_cross_rows`.

    Args:
        block: of the whole parameter.
        start, stop: flat range of elements of the parameter, row-major.

    Yields:
        Blocks with each element once, whose ``offset`` counts from ``start``.
    """
    sizes, strides = block._sizes, block._strides
    yield from _within(block, start, stop, [(0, size) for size in sizes], strides)


def taps_cross_rows(block: EdgeBlock, row: int) -> bool:
    """Whether rows of the parameter may cut edges: taps of one edge that lie in different rows.

    Args:
        row: elements of a row, the product of all axes but the first.
    """
    if block.shape[2] == 1 or row == 0:
        return False
    features = zip(block.feature_sizes, block.feature_strides, strict=True)
    if any(size > 1 and stride % row == 0 for size, stride in features):
        return True
    # What does not move by whole rows stays within one if it ends before the next begins.
    within = sum((n - 1) * stride for n, stride in zip(block._sizes, block._strides, strict=True) if stride % row)
    return block.offset % row + within >= row


def _within(
    block: EdgeBlock, start: int, stop: int, ranges: list[tuple[int, int]], strides: tuple[int, ...]
) -> Iterator[EdgeBlock]:
    """The part of a block with these (first, count) along each axis, as far as it lies in the piece."""
    lowest = block.offset + sum(first * stride for (first, _), stride in zip(ranges, strides, strict=True))
    highest = lowest + sum((count - 1) * stride for (_, count), stride in zip(ranges, strides, strict=True))
    if highest < start or lowest >= stop:
        return
    if start <= lowest and highest < stop:
        yield _part(block, ranges, lowest - start)
        return
    axis = max((axis for axis, (_, count) in enumerate(ranges) if count > 1), key=lambda axis: strides[axis])
    (first, count), stride = ranges[axis], strides[axis]
    rest = highest - lowest - (count - 1) * stride
    # Along the axis: those that touch the piece, and among them those that lie in it with all of the other axes.
    touching = max(-(-(start - rest - lowest) // stride), 0), min((stop - 1 - lowest) // stride + 1, count)
    inside = max(-(-(start - lowest) // stride), 0), min((stop - 1 - rest - lowest) // stride + 1, count)
    if inside[0] >= inside[1]:
        inside = touching[1], touching[1]
    singles = [(position, 1) for position in (*range(touching[0], inside[0]), *range(inside[1], touching[1]))]
    parts = [*singles, (inside[0], inside[1] - inside[0])] if inside[0] < inside[1] else singles
    for position, length in sorted(parts):
        part = [*ranges[:axis], (first + position, length), *ranges[axis + 1 :]]
        yield from _within(block, start, stop, part, strides)


def _part(block: EdgeBlock, ranges: list[tuple[int, int]], offset: int) -> EdgeBlock:
    """The block with (first, count) of each axis; axes of which one position is left are no axes any more."""
    if all(count == size for (_, count), size in zip(ranges, block._sizes, strict=True)):
        return replace(block, offset=offset)
    sources, targets = len(block.source.sizes), len(block.target.sizes)
    cut = ranges[:sources], ranges[sources : sources + targets], ranges[sources + targets :]

    def left(strides: tuple[int, ...], ranges: list[tuple[int, int]]) -> tuple[int, ...]:
        return tuple(stride for stride, (_, count) in zip(strides, ranges, strict=True) if count > 1)

    def nodes(whole: Nodes, ranges: list[tuple[int, int]]) -> Nodes:
        moved = sum(first * stride for (first, _), stride in zip(ranges, whole.strides, strict=True))
        sizes = tuple(count for _, count in ranges if count > 1)
        return Nodes(whole.group, sizes, left(whole.strides, ranges), whole.offset + moved)

    return replace(
        block,
        source=nodes(block.source, cut[0]),
        target=nodes(block.target, cut[1]),
        source_strides=left(block.source_strides, cut[0]),
        target_strides=left(block.target_strides, cut[1]),
        feature_sizes=tuple(count for _, count in cut[2] if count > 1),
        feature_strides=left(block.feature_strides, cut[2]),
        offset=offset,
    )
