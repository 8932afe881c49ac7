"""The passes of one nowcast over the states: messages of every layer, then predictions.

See :mod:`hf_nino.nowcaster.blockwise` for the notation, and for what calls this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from ..graph.structure import SELF_LOOP_VALUE, EdgeBlock, EdgeType, NeuralGraph
from .conditions import Conditions, decode_conditioned
from .engine import Engine
from .folding import ConditionedDecoder, Folded, Layer, fold
from .kernels import Workspace, decode, sums_of_features, sums_of_states, update_edges
from .node_terms import Selections, Update, block_terms
from .portion import Portion
from .precision import products
from .scaling import Scale
from .streaming import History, Results, States, Strip
from .tiles import Grid, Tile, grid

if TYPE_CHECKING:
    from .modeling import NiNoModel

Result = TypeVar("Result")
Strips = Iterator[tuple[Strip, list[list[Tensor]]]]

NODES = 1 << 14
"""Nodes that are updated at a time."""


class Passes:
    """One nowcast: :meth:`messages` first, then :meth:`deltas` or :meth:`write` for every block of :meth:`blocks`.

    Arguments as for :func:`hf_nino.nowcaster.blockwise.blockwise_samples`, and:

    Args:
        portion: what this rank has of the graph, where ranks share the work; ``samples`` then hold what its blocks
            read.  Without gradients.
    """

    def __init__(
        self,
        network: NiNoModel,
        graph: NeuralGraph,
        samples: Sequence[History],
        scales: Sequence[Mapping[str, Scale]],
        horizon: float | None,
        engine: Engine | None = None,
        folded: Folded | None = None,
        portion: Portion | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        self.network, self.graph, self.portion = network, graph, portion
        self.edge_blocks = graph.trainable_blocks if portion is None else portion.blocks
        self.engine = engine or network.engine
        self.device, self.dtype = network.edge_in.weight.device, network.edge_in.weight.dtype
        self.rounded = self.engine.rounds(self.device, self.dtype)
        self.differentiable = torch.is_grad_enabled()
        self.hidden_size, self.num_samples = network.config.hidden_size, len(samples)
        self.edges = max(self.engine.tile_edges(self.device, self.dtype, self.hidden_size) // len(samples), 1)
        self.states = States(samples, scales, self.device, self.dtype)
        self.selections = Selections(graph, self.edge_blocks, self.device)
        self.in_degree = graph.in_degree.to(self.device, self.dtype)[:, None]
        self.workspace = None if self.differentiable else Workspace(self.device, self.dtype)
        with self._exactly():
            self.folded = folded or fold(network, horizon, conditions)
        self.updates: list[Update] = []

    def messages(self, pos: Tensor, token: Tensor | None) -> None:
        """All passes but the last: from now on, edges are as many updates further as the network has layers."""
        with self._exactly():
            pos = pos.to(self.device, self.dtype)
            x = self.network.embed_nodes(pos, None if token is None else token.to(self.device))
            if self.folded.node_bias is not None:
                x = x + self.folded.node_bias
            x = x.expand(self.num_samples, *x.shape[-2:])
            for depth, layer in enumerate(self.folded.layers):
                x = self._next_nodes(depth, layer, x)
                self.updates.append(Update(layer, x, self.selections.split(x)))

    def blocks(self) -> Iterator[tuple[EdgeBlock, Strips]]:
        """Every block with its strips, which must be taken before the next block is."""
        blocks = self.edge_blocks
        for number, strips in groupby(
            self.states.stream((block, self._grid(block)) for block in blocks), key=lambda item: item[0].number
        ):
            yield blocks[number], strips

    def deltas(self, block: EdgeBlock, strips: Strips) -> Tensor:
        """Scaled deltas of a block, [S, J, I, F, K]."""
        parts: dict[int, list[Tensor]] = {}  # by column of tiles, in the order of rows
        with self._exactly():
            decode_tile = self._decoder(block)
            for strip, snapshots in strips:
                for tile, delta in self._over_tiles(strip, snapshots, decode_tile):
                    parts.setdefault(tile.columns.start, []).append(delta)
        whole = [torch.cat(column, dim=2) for _, column in sorted(parts.items())]
        return torch.cat(whole, dim=1).transpose(1, 2)

    def write(self, block: EdgeBlock, strips: Strips, results: Results) -> None:
        """Predict a block: scaled last states plus deltas, scaled back; for one sample and one horizon."""
        scale = self.states.scales[0][block.parameter]
        with self._exactly():
            decode_tile = self._decoder(block)
            for strip, snapshots in strips:
                part = results.place(strip)
                out = strip.by_target(part)

                def predict(tile: Tile, scaled: Tensor, out=out, strip=strip) -> None:
                    last, delta = scaled[0, :, -1].movedim(0, -1), decode_tile(tile, scaled)[0, ..., 0]
                    out[strip.local(tile)] = scale.undo(last + delta)

                for _ in self._over_tiles(strip, snapshots, predict):
                    pass
                results.done(part)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _next_nodes(self, depth: int, layer: Layer, x: Tensor) -> Tensor:
        """Nodes after a layer, [S, N, H]."""
        mean = self._message_sums(layer, x) / self.in_degree
        parts = zip(x.split(NODES, dim=1), mean.split(NODES, dim=1), strict=True)
        return torch.cat([self.network.update_nodes(depth, *part) for part in parts], dim=1)

    def _message_sums(self, layer: Layer, x: Tensor) -> Tensor:
        """Sum of the messages to every node, self loops and constant edges included, [S, N, H]."""
        select, groups = self.selections.of, self.selections.split(x)
        nodes = slice(None) if self.portion is None else self.portion.nodes(x.shape[1])
        everyone = [each[:, nodes] for each in (*(update.x for update in self.updates), x)]
        loops = self._constant(layer, everyone, everyone, EdgeType.SELF_LOOP, SELF_LOOP_VALUE)
        if self.portion is not None:
            loops = pad(loops, (0, 0, nodes.start, x.shape[1] - nodes.stop))
        totals = list(self.selections.split(loops))
        for block, strips in self.blocks():
            self.selections.add(totals, block.target, self._received(layer, groups, block, strips))
        for edge in self.graph.constants if self.portion is None else self.portion.constants(self.graph):
            ends = [[select(nodes, end) for nodes in self._node_states(groups)] for end in (edge.source, edge.target)]
            self.selections.add(totals, edge.target, self._constant(layer, *ends, edge.edge_type, edge.value))
        sums = torch.cat(totals, dim=1)
        if self.portion is not None:
            self.portion.ranks.sum_([sums])
        return sums

    def _received(self, layer: Layer, groups: Sequence[Tensor], block: EdgeBlock, strips: Strips) -> Tensor:
        """Sum of a block's messages to its targets, [S, I, H]."""
        kind, num_sources, width = block.edge_type, block.shape[0], self._width(block)
        scale, shift = layer.scale, layer.shift
        if not self.updates:
            scale, shift = (weight[:, :width] for weight in (scale, shift))
        heard = linear(self.selections.of(groups, block.source), layer.pair_source)
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        sum_tile = self._summer(block, heard, scale)
        for strip, snapshots in strips:
            for tile, new in self._over_tiles(strip, snapshots, sum_tile):
                column = tile.columns.start
                sums[column] = (sums[column][0] + new[0], sums[column][1] + new[1]) if column in sums else new
        bilinear, summed = (torch.cat(parts, dim=1) for parts in zip(*(sums[c] for c in sorted(sums)), strict=True))
        own = linear(self.selections.of(groups, block.target), layer.pair_target, layer.pair_bias)
        scales = linear(summed, scale) + num_sources * layer.scale_bias[kind]
        shifts = linear(summed, shift) + num_sources * layer.shift_bias[kind]
        return own * scales + bilinear + layer.scale_bias[kind] * heard.sum(1, keepdim=True) + shifts

    def _constant(
        self, layer: Layer, sources: Sequence[Tensor], targets: Sequence[Tensor], kind: EdgeType, value: float
    ) -> Tensor:
        """Messages along edges without a parameter, one by one, [S, n, H].

        Constant in all snapshots, their value is in the first tap.

        Args:
            sources, targets: nodes at both ends, [S, n, H], before every layer that was and before this one.
        """
        taps, updates = self.network.context, tuple(self.updates)

        def messages(ends: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Tensor:
            *read_by_sources, source = ends[0]
            *read_by_targets, target = ends[1]
            rows, columns = [], []
            for number, (update, row, column) in enumerate(
                zip(updates, read_by_sources, read_by_targets, strict=True)
            ):
                bias = update.layer.edge_bias[kind]
                if number == 0:
                    bias = bias + value * update.layer.edge[:, :taps].sum(1)
                rows.append(linear(row, update.layer.to_sources))
                columns.append(linear(column, update.layer.to_targets, bias))
            scale, shift = layer.scale_bias[kind], layer.shift_bias[kind]
            if rows:
                weights = [update.layer.edge for update in updates]
                u = update_edges(None, rows, columns, weights, self.network.activation, None, False)
                scale, shift = linear(u, layer.scale, scale), linear(u, layer.shift, shift)
            else:
                scale = scale + value * layer.scale[:, :taps].sum(1)
                shift = shift + value * layer.shift[:, :taps].sum(1)
            both = linear(target, layer.pair_target, layer.pair_bias) + linear(source, layer.pair_source)
            return scale * both + shift

        run = self._recomputed(messages)
        size = max(self.edges // 4, 1)  # all terms of these edges are held, not two buffers of hidden units
        cut = [zip(*(x.split(size, dim=1) for x in ends), strict=True) for ends in (sources, targets)]
        return torch.cat([run(ends) for ends in zip(*cut, strict=True)], dim=1)

    # -- tiles ------------------------------------------------------------------------------------------------------

    def _summer(
        self, block: EdgeBlock, heard: Tensor, scale: Tensor
    ) -> Callable[[Tile, Tensor], tuple[Tensor, Tensor]]:
        """What gives a tile's share of B and S; ``heard`` is P_s x_j [S, J, H]."""
        cut, activation = self._grid(block), self.network.activation
        terms = block_terms(self.selections, self.updates, block, cut, self._width(block))
        heard = heard.unsqueeze(1).split(cut.rows, dim=2)

        def sums(tile: Tile, scaled: Tensor) -> tuple[Tensor, Tensor]:
            z, listened = scaled.flatten(1, 2), heard[tile.rows.start // cut.rows]
            if not terms.weights:
                return sums_of_states(z, listened, scale)
            u = update_edges(z, *terms.of(tile), activation, self.workspace, self.rounded)
            return sums_of_features(u, listened, scale, self.workspace, len(terms.weights) % 2, self.rounded)

        return sums

    def _decoder(self, block: EdgeBlock) -> Callable[[Tile, Tensor], Tensor]:
        """What gives the scaled deltas of a tile, [S, c, r, F, K]."""
        cut, activation, decoder = self._grid(block), self.network.activation, self.folded.decoder
        terms = block_terms(self.selections, self.updates, block, cut, self._width(block))
        taps = block.shape[2]
        if isinstance(decoder, ConditionedDecoder):
            told = decoder.biases, decoder.rows[:, :, :taps], decoder.rows_bias[..., :taps]
        else:
            rows, rows_bias = decoder.rows[:taps], decoder.rows_bias[:taps]

        def deltas(tile: Tile, scaled: Tensor) -> Tensor:
            u = update_edges(scaled.flatten(1, 2), *terms.of(tile), activation, self.workspace, self.rounded)
            if isinstance(decoder, ConditionedDecoder):
                with products(self.rounded):
                    inside = linear(u.flatten(1, 2), decoder.hidden)
                return decode_conditioned(inside, *told, activation).unflatten(1, u.shape[1:3])
            weights = decoder.hidden, decoder.hidden_bias, rows, rows_bias
            return decode(u, *weights, activation, self.workspace, len(terms.weights) % 2, self.rounded)

        return deltas

    def _over_tiles(
        self, strip: Strip, snapshots: list[list[Tensor]], function: Callable[[Tile, Tensor], Result]
    ) -> Iterator[tuple[Tile, Result]]:
        """``function(tile, scaled states)`` of every tile of a strip."""

        def of_tile(tile: Tile) -> Result:
            with self._exactly():  # here too: the backward pass comes by
                return function(tile, self.states.features(strip, snapshots, tile, self.workspace))

        run = self._recomputed(of_tile)
        for tile in strip.tiles():
            yield tile, run(tile)

    def _recomputed(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, which in the backward pass runs again instead of having kept anything."""
        if not (self.differentiable and self.engine.recompute):
            return function

        def run(item: object) -> Result:
            return checkpoint(function, item, use_reentrant=False, preserve_rng_state=False)

        return run

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _width(self, block: EdgeBlock) -> int:
        """Components of an edge's states, D."""
        return block.shape[2] * self.network.context

    def _grid(self, block: EdgeBlock) -> Grid:
        """Tiles of a block: T x H numbers of hidden units, or as many of states and their products with nodes."""
        sources, targets, _ = block.shape
        if self.updates:
            return grid(sources, targets, self.edges)
        width = self._width(block)
        return grid(sources, targets, self.edges * self.hidden_size // width, max(self.edges // width, 1))

    def _node_states(self, groups: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The nodes by group before every layer that was and before this one."""
        return [*(update.groups for update in self.updates), groups]

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """In the network's own dtype, whatever surrounds the nowcast: no autocast, no rounded products."""
        with products(rounded=False), torch.autocast(self.device.type, enabled=False):
            yield
