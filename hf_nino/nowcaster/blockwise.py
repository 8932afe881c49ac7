"""The graph network over edge blocks: the same function as :mod:`message_passing`, without anything of size E x H.

Notation (design: "The nowcaster, exactly and fast"): s are the scaled states of an edge j -> i (all taps and
snapshots), x^l the nodes before layer l, and ``u^l`` the inside of edge update l, before its output map::

    e^0 = Win s + type          e^l = L1 u^(l-1) + b1
    u^l = act(Le e^l + Ls x_j^(l+1) + Lt x_i^(l+1) + b)
    m^l = (A e^l + a) * (P_t x_i^l + P_s x_j^l + p) + (C e^l + c)

Every linear map that reads e^l is folded with the one that made it, so that each tile works on z^0 = s and z^l =
u^(l-1). The mean of messages needs only two sums over the sources of a target,

    S_i = sum_j z_ij                B_i = sum_j (A z_ij) * (P_s x_j)

and for layer 0, where z has few components, ``B_i = sum_c A[:, c] * (sum_j z_ijc P_s x_j)``: matrix products over
nodes instead of anything per edge and hidden unit.  u^l is never stored, it is computed again, tile by tile,
wherever it is read. The last message-passing layer changes nothing and does not exist.

Shape letters: N nodes, E edges, J sources and I targets of a block, F taps, C snapshots, D = F * C, H hidden, T rows
of a tile, K horizons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..graph.structure import SELF_LOOP_VALUE, EdgeBlock, EdgeType, NeuralGraph, Nodes
from .scaling import Scale

if TYPE_CHECKING:
    from .modeling import NiNoModel

TILE = 4096
"""Edges per tile.  T x H float32 numbers should stay in a core's cache (2 MiB at H = 128)."""


def blockwise(
    network: NiNoModel,
    graph: NeuralGraph,
    states: Sequence[Mapping[str, Tensor]],
    scales: Mapping[str, Scale],
    horizon: int | None,
    pos: Tensor,
    *,
    token: Tensor | None = None,
    tile: int = TILE,
) -> Iterator[tuple[EdgeBlock, Tensor]]:
    """Scaled deltas of every trainable block, in the order of ``graph.trainable_blocks``.

    Differentiable in the weights of ``network`` (autograd then keeps the tiles, and memory is no longer bounded).

    Args:
        network: weights; everything is computed on its device and in its dtype.
        states: C snapshots, oldest first, unscaled.
        scales: of every parameter in ``graph.parameter_names``.
        horizon: 1 .. ``network.max_horizon``, or ``None`` for all of them.
        pos: positional encoding [N, positional_size].
        token: int64 [N], row of the token position table for every node; only for networks that have one.
        tile: edges that are worked on at a time.

    Yields:
        (block, delta) with delta [J, I, F], or [J, I, F, K] for all horizons.  To be added to the scaled last state.
    """
    edges = _Edges(network, graph, states, scales, tile)
    in_degree = graph.in_degree.to(edges.device, edges.dtype)[:, None]
    x = network.embed_nodes(pos.to(edges.device, edges.dtype), None if token is None else token.to(edges.device))
    for depth in range(len(network.convolutions)):
        layer = fold(network, depth)
        x = network.update_nodes(depth, x, _message_sums(edges, layer, x) / in_degree)
        edges.update(layer, x)
    decoder = fold_decoder(network, horizon)
    for block in graph.trainable_blocks:
        yield block, _decode_block(edges, block, decoder)


@dataclass(frozen=True)
class Layer:
    """One message-passing layer and the edge update that follows it, folded over the edge features they read.

    ``[types, H]`` tables hold what is added for each edge type; beyond layer 0 all rows are equal.
    """

    pair_target: Tensor  # P_t [H, H]
    pair_source: Tensor  # P_s [H, H]
    pair_bias: Tensor  # p [H]
    scale: Tensor  # A [H, D or H]
    scale_bias: Tensor  # a [types, H]
    shift: Tensor  # C [H, D or H]
    shift_bias: Tensor  # c [types, H]
    edge: Tensor  # Le [H, D or H]
    edge_bias: Tensor  # b [types, H]
    to_sources: Tensor  # Ls [H, H]
    to_targets: Tensor  # Lt [H, H]


@dataclass(frozen=True)
class Decoder:
    """``delta = rows act(hidden u + hidden_bias) + rows_bias``, folded over the last edge update."""

    hidden: Tensor  # [H, H]
    hidden_bias: Tensor  # [H]
    rows: Tensor  # [F, K or 1, H]
    rows_bias: Tensor  # [F, K or 1]
    all_horizons: bool


def fold(network: NiNoModel, depth: int) -> Layer:
    """Layer ``depth`` with the map that produced its edge features multiplied in."""
    convolution, update = network.convolutions[depth], network.edge_updates[depth]
    types = _exact(network.edge_type.weight)
    if depth == 0:
        weight, table = _exact(network.edge_in.weight), _exact(network.edge_in.bias) + types
    else:
        before = network.edge_updates[depth - 1].output
        weight, table = _exact(before.weight), _exact(before.bias).expand_as(types)
    pair_target, pair_source = _exact(convolution.pair.weight).chunk(2, dim=1)
    scale, shift = _exact(convolution.modulation.weight).chunk(2, dim=0)
    scale_bias, shift_bias = _exact(convolution.modulation.bias).chunk(2, dim=0)
    edge = _exact(update.edge.weight)
    biases = sum(_exact(part.bias) for part in (update.edge, update.source, update.target))
    folded = {
        "pair_target": pair_target,
        "pair_source": pair_source,
        "pair_bias": convolution.pair.bias,
        "scale": scale @ weight,
        "scale_bias": linear(table, scale, scale_bias),
        "shift": shift @ weight,
        "shift_bias": linear(table, shift, shift_bias),
        "edge": edge @ weight,
        "edge_bias": linear(table, edge, biases),
        "to_sources": update.source.weight,
        "to_targets": update.target.weight,
    }
    return Layer(**{name: tensor.to(network.edge_in.weight) for name, tensor in folded.items()})


def fold_decoder(network: NiNoModel, horizon: int | None) -> Decoder:
    """The decoder for one horizon, or for all, with the output map of the last edge update multiplied in."""
    before, hidden = network.edge_updates[-1].output, network.edge_hidden
    weight, bias = _exact(hidden.weight), _exact(hidden.bias)
    rows, rows_bias = network.decoder_rows(horizon)
    return Decoder(
        hidden=(weight @ _exact(before.weight)).to(hidden.weight),
        hidden_bias=linear(_exact(before.bias), weight, bias).to(hidden.weight),
        rows=rows,
        rows_bias=rows_bias,
        all_horizons=horizon is None,
    )


def _exact(weight: Tensor) -> Tensor:
    """Folding happens in float64 (on the CPU: not every device has it), which makes the result three times closer."""
    return weight.to("cpu", torch.float64)


@dataclass(frozen=True)
class _Update:
    """One edge update: its layer, and what it adds for the source and for the target node of an edge, both [N, H]."""

    layer: Layer
    source: Tensor
    target: Tensor


class _Edges:
    """The edges of a graph after the updates so far, computed tile by tile on the network's device, in its dtype.

    Edge features z are [j, i, D] scaled states before the first update and [j, i, H] after it.
    """

    def __init__(
        self,
        network: NiNoModel,
        graph: NeuralGraph,
        states: Sequence[Mapping[str, Tensor]],
        scales: Mapping[str, Scale],
        tile: int,
    ) -> None:
        self.graph, self.states, self.scales, self.tile = graph, states, scales, tile
        self.context, self.hidden_size, self.activation = (
            network.context,
            network.config.hidden_size,
            network.activation,
        )
        self.device, self.dtype = network.edge_in.weight.device, network.edge_in.weight.dtype
        self.updates: list[_Update] = []

    def update(self, layer: Layer, x: Tensor) -> None:
        """From now on the edges are one update further, one that reads the nodes x [N, H]."""
        self.updates.append(_Update(layer, linear(x, layer.to_sources), linear(x, layer.to_targets)))

    def nodes(self, selection: Nodes) -> Tensor:
        """Global node numbers, int64 [len(selection)]."""
        return self.graph.node_index(selection).to(self.device)

    def tiles(self, block: EdgeBlock, size: int, max_targets: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Source rows, target columns and features z of tiles that cover a block.

        A tile has at most ``size`` edges and ``max_targets`` targets (but at least one).
        """
        num_sources, num_targets, _ = block.shape
        columns = min(num_targets, max(max_targets, 1))
        rows = min(num_sources, max(size // columns, 1))
        views = [block.view(state[block.parameter]) for state in self.states]
        source, target = self.nodes(block.source), self.nodes(block.target)
        for first_column in range(0, num_targets, columns):
            for first_row in range(0, num_sources, rows):
                part = slice(first_row, min(first_row + rows, num_sources))
                column = slice(first_column, min(first_column + columns, num_targets))
                snapshots = [view[part, column].to(self.device, self.dtype) for view in views]
                z = self.scales[block.parameter].apply(torch.stack(snapshots, dim=-1)).flatten(2)
                yield part, column, self._follow(z, block.edge_type, source[part, None], target[None, column])

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, EdgeType, Tensor]]:
        """Edges without a parameter, self loops last: source and target nodes [n], their type and features z.

        Constant in all snapshots, their value is in the first tap: z is [C], one for all, before the first update.
        """
        everyone = torch.arange(self.graph.num_nodes, device=self.device)
        runs = [(self.nodes(c.source), self.nodes(c.target), c.edge_type, c.value) for c in self.graph.constants]
        for sources, targets, kind, value in [*runs, (everyone, everyone, EdgeType.SELF_LOOP, SELF_LOOP_VALUE)]:
            z = torch.full((self.context,), value, device=self.device, dtype=self.dtype)
            for source, target in zip(sources.split(self.tile), targets.split(self.tile), strict=True):
                yield source, target, kind, self._follow(z, kind, source, target)

    def _follow(self, z: Tensor, edge_type: int, source: Tensor, target: Tensor) -> Tensor:
        """The chain of updates z^0 -> z^1 -> ... of edges between nodes, given as numbers that broadcast."""
        for update in self.updates:
            z = linear(z, update.layer.edge[:, : z.shape[-1]])
            z = z + (update.target[target] + update.layer.edge_bias[edge_type])
            z = self.activation(z.add_(update.source[source]))
        return z


def _message_sums(edges: _Edges, layer: Layer, x: Tensor) -> Tensor:
    """Sum of the messages to every node, self loops and constant edges included, [N, H]."""
    from_source = linear(x, layer.pair_source)
    from_target = linear(x, layer.pair_target, layer.pair_bias)
    total = torch.zeros_like(x)
    for block in edges.graph.trainable_blocks:
        source, target, kind = edges.nodes(block.source), edges.nodes(block.target), block.edge_type
        heard = from_source[source]
        bilinear, summed = (_sums_of_features if edges.updates else _sums_of_states)(edges, block, layer, heard)
        scale, shift = layer.scale[:, : summed.shape[1]], layer.shift[:, : summed.shape[1]]
        scales = linear(summed, scale) + len(source) * layer.scale_bias[kind]
        shifts = linear(summed, shift) + len(source) * layer.shift_bias[kind]
        received = from_target[target] * scales + bilinear + layer.scale_bias[kind] * heard.sum(0) + shifts
        total = total.index_add(0, target, received)
    for source, target, kind, z in edges.pairs():
        scales = linear(z, layer.scale[:, : z.shape[-1]], layer.scale_bias[kind])
        shifts = linear(z, layer.shift[:, : z.shape[-1]], layer.shift_bias[kind])
        total = total.index_add(0, target, scales * (from_target[target] + from_source[source]) + shifts)
    return total


def _sums_of_states(edges: _Edges, block: EdgeBlock, layer: Layer, heard: Tensor) -> tuple[Tensor, Tensor]:
    """B [I, H] and S [I, D] of layer 0, from products of states and nodes: no work per edge and hidden unit.

    ``heard`` is what the block's sources say, P_s x_j [J, H].
    """
    num_targets, width = block.shape[1], block.shape[2] * edges.context
    bilinear = heard.new_zeros(num_targets, edges.hidden_size)
    summed = heard.new_zeros(num_targets, width)
    weight = layer.scale[:, :width].t()
    # Both the states [j, i, D] and their products [i, D, H] get the room of a tile, T x H numbers.
    for rows, columns, z in edges.tiles(block, edges.tile * edges.hidden_size // width, edges.tile // width):
        states = z.flatten(1)
        product = (states.t() @ heard[rows]).view(-1, width, edges.hidden_size)
        bilinear[columns] += (product * weight).sum(1)
        summed[columns] += z.sum(0)
    return bilinear, summed


def _sums_of_features(edges: _Edges, block: EdgeBlock, layer: Layer, heard: Tensor) -> tuple[Tensor, Tensor]:
    """B and S [I, H] of a later layer, from edge features that are computed again tile by tile."""
    bilinear = heard.new_zeros(block.shape[1], edges.hidden_size)
    summed = torch.zeros_like(bilinear)
    for rows, columns, z in edges.tiles(block, edges.tile, edges.tile):
        summed[columns] += z.sum(0)
        bilinear[columns] += (linear(z, layer.scale) * heard[rows, None]).sum(0)
    return bilinear, summed


def _decode_block(edges: _Edges, block: EdgeBlock, decoder: Decoder) -> Tensor:
    """Scaled deltas of a block, [J, I, F] or [J, I, F, K]."""
    weight, bias = decoder.rows[: block.shape[2]], decoder.rows_bias[: block.shape[2]]
    deltas = weight.new_empty(*block.shape, weight.shape[1])
    for rows, columns, z in edges.tiles(block, edges.tile, edges.tile):
        hidden = edges.activation(linear(z, decoder.hidden, decoder.hidden_bias))
        delta = linear(hidden, weight.flatten(0, 1), bias.flatten())
        deltas[rows, columns] = delta.unflatten(-1, bias.shape)
    return deltas if decoder.all_horizons else deltas[..., 0]
