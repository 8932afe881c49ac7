"""What a nowcast costs, counted: floating-point operations of its matrix products, and bytes that it works in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..graph.structure import NeuralGraph
from .engine import Engine
from .portion import Portion
from .tiles import BUFFERS

if TYPE_CHECKING:
    from .modeling import NiNoModel


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one nowcast, multiplications and additions counted apart.

    Args:
        edges: products of hidden units, for every edge; nearly all of them are what ``precision="fast"`` rounds.
        states: products that read states.
        nodes: products for nodes, alone and at the ends of blocks and constant edges.
        activations: activation functions of edges, which are no operations but take as long as tens of them.
    """

    edges: int
    states: int
    nodes: int
    activations: int

    @property
    def total(self) -> int:
        return self.edges + self.states + self.nodes


def operations(graph: NeuralGraph, network: NiNoModel, portion: Portion | None = None) -> Operations:
    """The operations of ``network.nowcast(graph, ...)`` for one horizon, or those of a rank that has a portion of it.

    With 3 layers, as the paper counts them, that is 3 products with a matrix H x H and 4 activations for every edge.
    Folding the weights is left out: it takes the same few operations for every graph.  Ranks divide edges and states
    among them, and nodes only as far as edges without parameters go: all of them know all nodes.
    """
    hidden, updates = network.config.hidden_size, len(network.convolutions)
    square = 2 * hidden * hidden
    # Message pass d computes edges again through d updates, the prediction through all.
    chain = sum(range(updates))
    edges = states = nodes = activations = 0
    for block in graph.trainable_blocks if portion is None else portion.blocks:
        sources, targets, taps = block.shape
        reading = 2 * hidden * taps * network.context
        # The first update of a chain reads states; each pass but the first multiplies by A, the prediction decodes.
        edges += block.edges * (square * (chain + updates) + 2 * hidden * taps)
        states += block.edges * reading * (1 + updates) + targets * reading * 2
        nodes += (sources + targets) * square * (chain + 2 * updates) + targets * square * 2 * (updates - 1)
        activations += block.edges * hidden * (chain + updates + 1)
    loops = range(graph.num_nodes) if portion is None else range(graph.num_nodes)[portion.nodes(graph.num_nodes)]
    mine = graph.constants if portion is None else portion.constants(graph)
    constants = len(loops) + sum(constant.edges for constant in mine)
    nodes += constants * square * (2 * chain + sum(range(updates - 1)) + 2 * (updates - 1) + 2 * updates)
    nodes += graph.num_nodes * (3 * square * updates + 2 * hidden * network.config.positional_size)
    return Operations(edges, states, nodes, activations)


def working_memory(
    graph: NeuralGraph, network: NiNoModel, engine: Engine | None = None, portion: Portion | None = None
) -> int:
    """Bytes that a nowcast needs beside the states and its result: tiles and nodes.  Close, and not less.

    The nodes after every layer stay; a layer in work has its sums, its messages and twice the nodes it reads, and the
    largest block the terms of its ends.  For a rank with a portion, parameters that it owns come on top.
    """
    engine = engine or network.engine
    weight, hidden = network.edge_in.weight, network.config.hidden_size
    size = weight.element_size()
    updates = len(network.convolutions)
    tile = engine.tile_edges(weight.device, weight.dtype, hidden)
    tiles = tile * (BUFFERS + 1) * hidden * size
    blocks = graph.trainable_blocks if portion is None else portion.blocks
    ends = max((sum(block.shape[:2]) for block in blocks), default=0)
    return tiles + hidden * size * (graph.num_nodes * (updates + 4) + ends * (updates + 1))
