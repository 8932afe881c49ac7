"""What one rank computes of a nowcast that ranks share: the edges of its rows, and its share of everything else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ..graph.restriction import restrict, taps_cross_rows
from ..graph.structure import ConstantEdges, EdgeBlock, NeuralGraph
from .owners import rounds
from .shards import Ranks, Rows, Shards

_known: WeakKeyDictionary[NeuralGraph, WeakKeyDictionary[Shards, Portion]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Portion:
    """One rank's part of a neural graph; the parts of all ranks are the graph, each edge once.

    Args:
        blocks: edges of this rank, as blocks of the rows that it holds, or of a whole parameter that it owns.
        moved: parameters with an owner, by round (see :mod:`hf_nino.nowcaster.owners`): those of which an edge may
            have taps in several rows, so that no rank would have all of it.
        ranks: with whom the sums over nodes are shared.
    """

    blocks: tuple[EdgeBlock, ...]
    moved: tuple[tuple[str, ...], ...]
    ranks: Ranks

    def nodes(self, total: int) -> slice:
        """The nodes whose self loops are this rank's."""
        rank, size = self.ranks.rank, self.ranks.size
        return slice(total * rank // size, total * (rank + 1) // size)

    def constants(self, graph: NeuralGraph) -> tuple[ConstantEdges, ...]:
        """The constant edges that are this rank's."""
        return graph.constants[self.ranks.rank :: self.ranks.size]


def portion_of(graph: NeuralGraph, shards: Shards) -> Portion:
    """The portion of this rank, which is remembered as long as the graph and the shards live."""
    known = _known.setdefault(graph, WeakKeyDictionary())
    if shards not in known:
        known[shards] = _portion(graph, shards)
    return known[shards]


def _portion(graph: NeuralGraph, shards: Shards) -> Portion:
    rank, size = shards.ranks.rank, shards.ranks.size
    rows = {name: math.prod(graph.shapes[name][1:]) for name in graph.parameter_names}
    cut = {
        block.parameter: math.prod(graph.shapes[block.parameter])
        for block in graph.trainable_blocks
        if taps_cross_rows(block, rows[block.parameter])
    }
    moved = tuple(rounds(cut, size))
    owned = {names[rank] for names in moved if rank < len(names)}
    blocks: list[EdgeBlock] = []
    for block in graph.trainable_blocks:
        name = block.parameter
        if name in owned:
            blocks.append(block)
        elif name not in cut:
            blocks.extend(restrict_to_rows(block, shards.local(name)))
    return Portion(tuple(blocks), moved, shards.ranks)


def restrict_to_rows(block: EdgeBlock, rows: Rows) -> list[EdgeBlock]:
    """The part of a block that lies in these rows of its parameter, as blocks of them."""
    row = math.prod(rows.shape[1:])
    return list(restrict(block, rows.start * row, rows.stop * row))
