"""The invariants of a neural graph, checked whenever one is constructed."""

from __future__ import annotations

import math

import torch

from .structure import EdgeBlock, NeuralGraph, Nodes


def validate(graph: NeuralGraph) -> None:
    """Check the invariants of :class:`NeuralGraph`.

    Raises:
        ValueError: with the parameter or group, the rule and what was found.
    """
    seen: set[str] = set()
    for group in graph.groups:
        if group.size < 1:
            raise ValueError(f"neuron group {group.name!r} must have at least one neuron, got {group.size}")
        if group.name in seen:
            raise ValueError(f"neuron groups must have unique names, {group.name!r} occurs twice")
        seen.add(group.name)
    for block in graph.blocks:
        if block.parameter not in graph.shapes:
            raise ValueError(f"block refers to parameter {block.parameter!r}, which has no entry in `shapes`")
        for side, strides in ((block.source, block.source_strides), (block.target, block.target_strides)):
            _validate_nodes(graph, side, f"a block of parameter {block.parameter!r}")
            if len(strides) != len(side.sizes):
                raise ValueError(
                    f"a block of parameter {block.parameter!r} has {len(strides)} strides for {side.sizes=}"
                )
            if not side.is_contiguous() and side.index().unique().numel() != len(side):
                raise ValueError(f"a block of parameter {block.parameter!r} must name each neuron once per side")
    for constant in graph.constants:
        _validate_nodes(graph, constant.source, "constant edges")
        _validate_nodes(graph, constant.target, "constant edges")
        if len(constant.source) != len(constant.target):
            raise ValueError(
                "constant edges must pair as many sources as targets, "
                f"got {len(constant.source)} and {len(constant.target)}"
            )
    _validate_coverage(graph)
    for symmetry in graph.symmetries:
        if symmetry.units.dim() != 3:
            raise ValueError(
                f"symmetry {symmetry.name!r} must have units [blocks, units, nodes], got {symmetry.units.shape}"
            )
        if symmetry.units.max() >= graph.num_nodes or symmetry.units.unique().numel() != symmetry.units.numel():
            raise ValueError(f"symmetry {symmetry.name!r} must name each existing node at most once")


def _validate_nodes(graph: NeuralGraph, nodes: Nodes, where: str) -> None:
    if not 0 <= nodes.group < len(graph.groups):
        raise ValueError(f"{where}: group {nodes.group} is selected, but there are {len(graph.groups)} groups")
    group = graph.groups[nodes.group]
    if nodes.offset < 0 or nodes.last() >= group.size:
        raise ValueError(
            f"{where}: neuron {nodes.last()} of group {group.name!r} is selected, but the group has {group.size}"
        )


def _validate_coverage(graph: NeuralGraph) -> None:
    """Every element of every parameter with a trainable block lies on exactly one edge."""
    blocks: dict[str, list[EdgeBlock]] = {}
    for block in graph.blocks:
        blocks.setdefault(block.parameter, []).append(block)
    for name, shape in graph.shapes.items():
        size = math.prod(shape)
        mine = blocks.get(name, [])
        if not mine:
            raise ValueError(f"parameter {name!r} of shape {tuple(shape)} lies on no edge of the graph")
        if any(block.offset < 0 or min(block._strides) < 0 or _last_element(block) >= size for block in mine):
            raise ValueError(f"a block of parameter {name!r} reaches beyond the parameter's {size} elements")
        if len(mine) == 1 and _is_whole(mine[0], size):
            continue
        count, piece = _counts(mine, size)
        if int(count.min()) != 1 or int(count.max()) != 1:
            none, several = int((count == 0).sum()) * piece, int((count > 1).sum()) * piece
            raise ValueError(
                f"every element of parameter {name!r} must lie on exactly one edge, "
                f"but {none} lie on none and {several} on several"
            )


def _last_element(block: EdgeBlock) -> int:
    return block.offset + sum((n - 1) * stride for n, stride in zip(block._sizes, block._strides, strict=True))


def _runs(block: EdgeBlock) -> tuple[int, list[tuple[int, int]]]:
    """A block's elements as runs of neighbours: their length, and (stride, size) of the axes that repeat them."""
    axes = sorted((stride, n) for stride, n in zip(block._strides, block._sizes, strict=True) if n > 1)
    length = 1
    while axes and axes[0][0] == length:
        length *= axes.pop(0)[1]
    return length, axes


def _is_whole(block: EdgeBlock, size: int) -> bool:
    """Whether a block is all of a parameter of ``size`` elements, in any order of its axes."""
    length, axes = _runs(block)
    return block.offset == 0 and length == size and not axes


def _counts(blocks: list[EdgeBlock], size: int) -> tuple[torch.Tensor, int]:
    """On how many edges each piece of a parameter lies, int8, and the number of elements in a piece.

    Pieces are the largest such that every block is made of whole ones: a row of a matrix, the slice of an expert.
    """
    runs = [_runs(block) for block in blocks]
    ends = [n for (length, axes), block in zip(runs, blocks, strict=True) for n in (length, block.offset, *dict(axes))]
    piece = math.gcd(size, *ends)
    count = torch.zeros(size // piece, dtype=torch.int8)
    for block, (length, axes) in zip(blocks, runs, strict=True):
        sizes, strides = [length // piece], [1]
        for stride, n in axes:
            sizes.append(n)
            strides.append(stride // piece)
        pieces = count.as_strided(sizes, strides, block.offset // piece)
        pieces += 1
    return count, piece
