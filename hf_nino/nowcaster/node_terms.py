"""The nodes as the engine reads them: split by group, selected per block, and what each update adds for them.

Shapes: S samples, N nodes, n nodes of a selection, J sources and I targets of a block, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..graph.structure import EdgeBlock, NeuralGraph, Nodes
from .folding import Layer
from .tiles import Grid, Tile


class Selections:
    """Where the nodes of blocks and constant edges are within their groups; on the device before the first pass."""

    def __init__(self, graph: NeuralGraph, blocks: Sequence[EdgeBlock], device: torch.device) -> None:
        self.sizes = [group.size for group in graph.groups]
        edges = (*blocks, *graph.constants)
        parts = {nodes for edge in edges for nodes in (edge.source, edge.target) if not self._is_whole(nodes)}
        self._index = {nodes: nodes.index().to(device) for nodes in parts}

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[S, N, H] -> [S, n, H] of every group."""
        return x.split(self.sizes, dim=1)

    def of(self, groups: Sequence[Tensor], nodes: Nodes) -> Tensor:
        """The selected nodes, [S, n, H]; a view where they are one slice of their group."""
        group = groups[nodes.group]
        if self._is_whole(nodes):
            return group
        if nodes.is_contiguous():
            return group.narrow(1, nodes.offset, len(nodes))
        return group.index_select(1, self._index[nodes])

    def add(self, groups: list[Tensor], nodes: Nodes, values: Tensor) -> None:
        """Add [S, n, H] to the selected nodes, which may be selected more than once."""
        group = groups[nodes.group]
        whole = self._is_whole(nodes)
        groups[nodes.group] = group + values if whole else group.index_add(1, self._index[nodes], values)

    def _is_whole(self, nodes: Nodes) -> bool:
        return nodes.offset == 0 and len(nodes) == self.sizes[nodes.group] and nodes.is_contiguous()


@dataclass(frozen=True)
class Update:
    """One edge update: its layer, and the nodes that it reads, whole [S, N, H] and by group."""

    layer: Layer
    x: Tensor
    groups: tuple[Tensor, ...]


@dataclass(frozen=True)
class BlockTerms:
    """What the updates so far add to the edges of one block, cut like its tiles.

    Args:
        rows: for every update, [S, 1, r, H] of every row of tiles.
        columns: for every update, [S, c, 1, H] of every column of tiles, bias included.
        weights: of every update, the first one narrowed to the components that the block has.
    """

    grid: Grid
    rows: tuple[tuple[Tensor, ...], ...]
    columns: tuple[tuple[Tensor, ...], ...]
    weights: tuple[Tensor, ...]

    def of(self, tile: Tile) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
        """Row terms, column terms and weights for :func:`hf_nino.nowcaster.kernels.update_edges`."""
        row, column = tile.rows.start // self.grid.rows, tile.columns.start // self.grid.columns
        return [rows[row] for rows in self.rows], [columns[column] for columns in self.columns], self.weights


def block_terms(
    selections: Selections, updates: Sequence[Update], block: EdgeBlock, cut: Grid, width: int
) -> BlockTerms:
    """The terms of a block whose edges have ``width`` components."""
    rows, columns, weights = [], [], []
    for number, update in enumerate(updates):
        layer = update.layer
        source = linear(selections.of(update.groups, block.source), layer.to_sources)
        bias = layer.edge_bias[block.edge_type]
        target = linear(selections.of(update.groups, block.target), layer.to_targets, bias)
        rows.append(source.unsqueeze(1).split(cut.rows, dim=2))
        columns.append(target.unsqueeze(2).split(cut.columns, dim=1))
        weights.append(layer.edge if number else layer.edge[:, :width])
    return BlockTerms(cut, tuple(rows), tuple(columns), tuple(weights))
