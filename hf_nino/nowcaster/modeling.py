"""Nowcasters with weights: :class:`NiNoModel` sees the neural graph, :class:`WNNModel` each parameter alone.

Shape letters: N nodes, E edges, F kernel taps, C snapshots, H hidden width, K horizons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..graph import EdgeType, NeuralGraph
from .base import check_states
from .blockwise import predict
from .conditions import Conditions, decode_conditioned
from .configuration import NowcasterConfig
from .edge_types import edge_types_of, edge_types_of_blocks
from .engine import Engine
from .message_passing import EdgeUpdate, ModulatedConvolution
from .network import NowcasterNetwork
from .portion import restrict_to_rows
from .rates import Rates
from .scaling import Scale, measure_scales
from .sharded import predict_rows
from .shards import Rows, Shards

if TYPE_CHECKING:
    from torch_geometric.data import Data

WNN_TILE = 8192
"""Elements that :class:`WNNModel` works on at a time."""

_positional_encodings: WeakKeyDictionary[NeuralGraph, dict[int, Tensor]] = WeakKeyDictionary()


class NiNoModel(
    NowcasterNetwork,
    library_name="hf_nino",
    license="mit",
    tags=["nino", "nowcasting", "learned-optimizer", "arxiv:2409.04434"],
    paper_url="https://arxiv.org/abs/2409.04434",
):
    """NiNo: a graph network over the neural graph predicts where every parameter goes (arXiv 2409.04434).

    ``forward`` is the readable reference on an explicit graph; :meth:`nowcast` computes the same function over edge
    blocks, in memory that does not grow with the number of edges.

    Args:
        config: with ``nowcaster_type="nino"``.

    Attributes:
        engine: how nowcasts are computed, see :class:`Engine`: ``model.engine = Engine(precision="fast")``.  No part
            of the configuration: it says what a machine should do, not what the nowcaster is.
    """

    nowcaster_type = "nino"
    needs_graph = True

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__(config)
        self.engine = Engine()
        hidden, depth = config.hidden_size, config.num_layers - 1
        self.edge_in = nn.Linear(config.max_features * config.context, hidden)
        self.edge_type = nn.Embedding(config.edge_types, hidden)
        self.node_in = nn.Linear(config.positional_size, hidden)
        self.token_position = None
        if config.token_position_vocabulary is not None:
            self.token_position = nn.Embedding(config.token_position_vocabulary + 1, hidden)
        self.convolutions = nn.ModuleList(ModulatedConvolution(hidden) for _ in range(depth))
        self.edge_updates = nn.ModuleList(EdgeUpdate(hidden, self.activation) for _ in range(depth))
        self.edge_hidden = nn.Linear(hidden, hidden)
        rows = 1 if config.horizon_input else config.max_horizon
        self.edge_out = nn.Linear(hidden, config.max_features * rows)
        self._init_weights()
        self._add_conditions()

    def forward(self, data: Data, horizon: float | None = None, *, conditions: Conditions | None = None) -> Tensor:
        """Scaled deltas of an explicit graph.

        Args:
            data: PyG data with ``edge_index`` int64 [2, E] (source, target), ``edge_type`` int64 [E], ``edge_attr``
                [E, F * C] scaled states, taps first and snapshots within a tap, ``pos`` [N, positional_size], and, for
                nowcasters with a table of token positions, ``token`` int64 [N] (see :func:`token_rows`).  F may be
                less than ``config.max_features``.
            horizon: 1 .. ``max_horizon`` intervals, or ``None`` for all of them.
            conditions: of one sample and K horizons, for networks that are told any (:meth:`conditions`); ``None``:
                those of ``horizon`` and a constant learning rate.

        Returns:
            [E, F], or [E, F, K] for all horizons or given conditions: what to add to the scaled last state.

        Raises:
            ValueError: a horizon out of range, or ``data`` without what is needed.
        """
        self._check_horizon(horizon)
        one = horizon is not None and conditions is None
        conditions = conditions or self.conditions(horizon)
        states = self._edge_states(data)
        self._check_features(states.shape[1], "`data.edge_attr`")
        edge_index, edge_type = data.edge_index, data.edge_type
        states = states.flatten(1).to(self.edge_in.weight.dtype)
        e = nn.functional.linear(states, self.edge_in.weight[:, : states.shape[1]], self.edge_in.bias)
        e = e + self.edge_type(edge_type)
        x = self.embed_nodes(data.pos.to(states.dtype), getattr(data, "token", None))
        bias = self.node_bias(conditions)
        if bias is not None:
            x = x + bias[0]
        for convolution, update in zip(self.convolutions, self.edge_updates, strict=True):
            x = self.activation(convolution(x, edge_index, e))
            e = update(x, edge_index, e)
        features = states.shape[1] // self.context
        if conditions is not None:
            biases, rows, bias = self.conditioned_rows(conditions)
            told = biases, rows[:, :, :features], bias[..., :features]
            deltas = decode_conditioned(self.edge_hidden(e)[None], *told, self.activation)[0]
        else:
            rows, bias = (part[:features] for part in self.decoder_rows(horizon))
            hidden = self.activation(self.edge_hidden(e))
            deltas = nn.functional.linear(hidden, rows.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)
        return deltas[..., 0] if one else deltas

    @torch.no_grad()
    def nowcast(
        self,
        graph: NeuralGraph | None,
        states: Sequence[Mapping[str, Tensor]],
        horizon: float,
        *,
        pos: Tensor | None = None,
        engine: Engine | None = None,
        shards: Shards | None = None,
        rates: Rates | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`; computed on the nowcaster's device, block by block.

        Args:
            pos: positional encoding [N, positional_size] instead of the graph's own, which is computed once per graph.
            engine: precision, memory and threads of this nowcast; ``None`` for the attribute ``engine``.
        """
        check_states(self, states, horizon, shards)
        self._check_graph(graph, states[-1], shards)
        conditions = self.conditions(horizon, rates)
        if pos is None:
            pos = _positional_encoding(graph, self.config.positional_size)
        token = None if self.token_position is None else token_rows(graph, self.config.token_position_vocabulary)
        last = states[-1]
        result = {name: torch.empty_like(last[name], memory_format=torch.contiguous_format) for name in last}
        told = {"token": token, "engine": engine, "conditions": conditions}
        if shards is None:
            predict(self, graph, states, measure_scales(states), horizon, pos, result, **told)
        else:
            predict_rows(self, graph, states, horizon, pos, result, shards, **told)
        return result

    def embed_nodes(self, pos: Tensor, token: Tensor | None) -> Tensor:
        """Initial nodes [N, H] from their positional encoding and, where the network has the table, token rows [N]."""
        x = self.node_in(pos)
        if self.token_position is None:
            return x
        if token is None:
            raise ValueError("this nowcaster has a table of token positions and needs `data.token`, see `token_rows`")
        return x + self.token_position(token)

    def node_bias(self, conditions: Conditions | None) -> Tensor | None:
        """What past learning rates add to all initial nodes of each sample, [S, 1, H]; ``None``: nothing."""
        if self.rate_in is None:
            return None
        return self.rate_in(conditions.history().to(self.rate_in.weight)).unsqueeze(1)

    def update_nodes(self, depth: int, x: Tensor, mean: Tensor) -> Tensor:
        """Nodes [N, H] after layer ``depth``, from the nodes before it and the mean of their messages."""
        convolution = self.convolutions[depth]
        return self.activation(convolution.output(convolution.combine(torch.cat([x, mean], dim=-1))))

    def _check_features(self, features: int, what: str) -> None:
        if features > self.config.max_features:
            raise ValueError(
                f"{what} has {features} kernel taps on an edge, this nowcaster knows {self.config.max_features}"
            )

    def _check_graph(self, graph: NeuralGraph | None, state: Mapping[str, Tensor], shards: Shards | None) -> None:
        if graph is None:
            raise ValueError(
                "`graph` must be the model's NeuralGraph for NiNoModel, got None; see NeuralGraph.from_model"
            )
        self._check_features(graph.max_features, "`graph`")
        check_graph(graph, state, shards)


class WNNModel(
    NowcasterNetwork,
    library_name="hf_nino",
    license="mit",
    tags=["nino", "wnn", "nowcasting", "learned-optimizer", "arxiv:2409.04434"],
    paper_url="https://arxiv.org/abs/2409.04434",
):
    """WNN+: every element of every parameter alone, with the type of its edge (arXiv 2409.04434, section 5).

    Args:
        config: with ``nowcaster_type="wnn"``.
    """

    nowcaster_type = "wnn"
    needs_graph = False

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.edge_in = nn.Linear(config.context, hidden)
        self.edge_type = nn.Embedding(config.edge_types, hidden)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(3))
        self.edge_out = nn.Linear(hidden, 1 if config.horizon_input else config.max_horizon)
        self._init_weights()
        self._add_conditions()

    def forward(self, data: Data, horizon: float | None = None, *, conditions: Conditions | None = None) -> Tensor:
        """Scaled deltas of an explicit graph; ``edge_index`` and ``pos`` are not read.

        Args:
            data: PyG data with ``edge_type`` int64 [E] and ``edge_attr`` [E, F * C], see :meth:`NiNoModel.forward`.
            horizon: 1 .. ``max_horizon`` intervals, or ``None`` for all of them.
            conditions: see :meth:`NiNoModel.forward`.

        Returns:
            [E, F], or [E, F, K] for all horizons or given conditions.

        Raises:
            ValueError: a horizon out of range or ``edge_attr`` of the wrong shape.
        """
        self._check_horizon(horizon)
        states = self._edge_states(data)
        one = horizon is not None and conditions is None
        conditions = conditions or self.conditions(horizon)
        if conditions is None:
            return self._deltas(states, data.edge_type[:, None], horizon)
        types = data.edge_type.repeat_interleave(states.shape[1])
        found = self.conditioned_deltas(states.flatten(0, 1)[None], types, conditions)[0]
        found = found.unflatten(0, states.shape[:2])
        return found[..., 0] if one else found

    def conditioned_deltas(self, states: Tensor, types: Tensor, conditions: Conditions) -> Tensor:
        """Scaled states [S, n, C] and edge types [n] -> deltas [S, n, K]."""
        x = self.edge_in(states.to(self.edge_in.weight.dtype)) + self.edge_type(types.long())
        if self.rate_in is not None:
            x = x + self.rate_in(conditions.history().to(x)).unsqueeze(1)
        *hidden, last = self.hidden
        for layer in hidden:
            x = self.activation(layer(x))
        return decode_conditioned(last(x), *self.conditioned_rows(conditions), self.activation)[:, :, 0]

    @torch.no_grad()
    def nowcast(
        self,
        graph: NeuralGraph | None,
        states: Sequence[Mapping[str, Tensor]],
        horizon: float,
        *,
        shards: Shards | None = None,
        rates: Rates | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`.  Edge types come from the graph, without one from names and shapes."""
        check_states(self, states, horizon, shards)
        last = states[-1]
        if graph is not None:
            check_graph(graph, last, shards)
        conditions = self.conditions(horizon, rates)
        scales = measure_scales(states, None if shards is None else shards.ranks)
        result = {}
        for name, tensor in last.items():
            rows = Rows.all(tuple(tensor.shape)) if shards is None else shards.local(name)
            types = self._edge_types(graph, name, rows).flatten()
            snapshots = [state[name] for state in states]
            result[name] = self._nowcast_tensor(snapshots, scales[name], types, horizon, conditions)
        return result

    def _edge_types(self, graph: NeuralGraph | None, name: str, rows: Rows) -> Tensor:
        """Edge types of some rows of a parameter."""
        if graph is None:
            return rows.of(edge_types_of(name, rows.shape))
        blocks = (block for block in graph.trainable_blocks if block.parameter == name)
        parts = [part for block in blocks for part in restrict_to_rows(block, rows)]
        return edge_types_of_blocks(parts, rows.local_shape)

    def _nowcast_tensor(
        self,
        snapshots: Sequence[Tensor],
        scale: Scale,
        types: Tensor,
        horizon: float,
        conditions: Conditions | None,
    ) -> Tensor:
        last = snapshots[-1]
        like = self.edge_in.weight
        result = torch.empty_like(last, memory_format=torch.contiguous_format)
        flat = [snapshot.reshape(-1) for snapshot in snapshots]
        for first in range(0, last.numel(), WNN_TILE):
            part = slice(first, first + WNN_TILE)
            tile = scale.apply(torch.stack([snapshot[part].to(like) for snapshot in flat], dim=-1))
            kinds = types[part].to(like.device)
            if conditions is None:
                delta = self._deltas(tile, kinds, int(horizon))
            else:
                delta = self.conditioned_deltas(tile[None], kinds, conditions)[0, :, 0]
            result.view(-1)[part] = scale.undo(tile[:, -1] + delta).to(result)
        return result

    def _deltas(self, states: Tensor, types: Tensor, horizon: int | None) -> Tensor:
        """Scaled states [..., C] and edge types [...] -> deltas [...] or [..., K]."""
        x = self.edge_in(states.to(self.edge_in.weight.dtype)) + self.edge_type(types.long())
        for layer in self.hidden:
            x = self.activation(layer(x))
        if horizon is None:
            return self.edge_out(x)
        return x @ self.edge_out.weight[horizon - 1] + self.edge_out.bias[horizon - 1]


def token_rows(graph: NeuralGraph, vocabulary: int) -> Tensor:
    """Row of the token position table for every node, int64 [N]: 1 + token for tokens, 0 for all other neurons.

    Raises:
        ValueError: the model has more tokens than the table.
    """
    rows = torch.zeros(graph.num_nodes, dtype=torch.int64)
    for block in graph.trainable_blocks:
        if block.edge_type != EdgeType.TOKEN_EMBEDDING:
            continue
        for side in (block.source, block.target):
            group = graph.groups[side.group]
            if group.kind != "row":
                continue
            if group.size > vocabulary:
                raise ValueError(
                    f"neuron group {group.name!r} has {group.size} tokens, but this nowcaster's table of token "
                    f"positions knows {vocabulary}; use a nowcaster without such a table"
                )
            first = graph.group_offsets[side.group]
            rows[first : first + group.size] = torch.arange(1, group.size + 1)
    return rows


def check_graph(graph: NeuralGraph, state: Mapping[str, Tensor], shards: Shards | None = None) -> None:
    """Raise ``ValueError`` unless the state, or its shards, has the graph's parameters, no others, in its shapes."""
    missing = [name for name in graph.parameter_names if name not in state]
    unknown = sorted(state.keys() - set(graph.parameter_names))
    if missing or unknown:
        raise ValueError(
            "`states` must hold exactly the parameters of the graph; "
            f"missing {missing[:3] or 'none'}, not in the graph {unknown[:3] or 'none'}"
        )
    for name in graph.parameter_names:
        shape = tuple(state[name].shape if shards is None else shards.local(name).shape)
        if shape != tuple(graph.shapes[name]):
            what = "`states`" if shards is None else "`shards`"
            raise ValueError(
                f"{what} must hold {name!r} in the graph's shape {tuple(graph.shapes[name])}, got {shape}"
            )


def _positional_encoding(graph: NeuralGraph, size: int) -> Tensor:
    """The graph's positional encoding, computed once per graph and size."""
    sizes = _positional_encodings.setdefault(graph, {})
    if size not in sizes:
        sizes[size] = graph.positional_encoding(size)
    return sizes[size]
