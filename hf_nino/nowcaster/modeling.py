"""Nowcasters with weights: :class:`NiNoModel` sees the neural graph, :class:`WNNModel` each parameter alone.

Shape letters: N nodes, E edges, F kernel taps, C snapshots, H hidden width, K horizons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..graph import EdgeType, NeuralGraph
from .base import Nowcaster, check_states
from .blockwise import predict
from .configuration import ACTIVATIONS, NowcasterConfig
from .edge_types import edge_types_of, edge_types_of_blocks
from .engine import Engine
from .hub import HubNowcaster
from .message_passing import EdgeUpdate, ModulatedConvolution
from .scaling import measure_scale, measure_scales

if TYPE_CHECKING:
    from torch_geometric.data import Data

INITIALIZER_RANGE = 0.02
WNN_TILE = 8192
"""Elements that :class:`WNNModel` works on at a time."""

_positional_encodings: WeakKeyDictionary[NeuralGraph, dict[int, Tensor]] = WeakKeyDictionary()


class _NowcasterModel(nn.Module, Nowcaster, HubNowcaster):
    """What both models share: sizes from the configuration, initial weights, checks of their input."""

    nowcaster_type: ClassVar[str]

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__()
        if config.nowcaster_type != self.nowcaster_type:
            raise ValueError(
                f"`config.nowcaster_type` must be {self.nowcaster_type!r} for {type(self).__name__}, "
                f"got {config.nowcaster_type!r}"
            )
        self.config = config
        self.context = config.context
        self.period = config.period
        self.max_horizon = config.max_horizon
        self.activation = ACTIVATIONS[config.activation]

    def _init_weights(self) -> None:
        """Normal weights of deviation 0.02 and no biases, as in the original release."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _check_horizon(self, horizon: int | None) -> None:
        if horizon is not None and (type(horizon) is not int or not 1 <= horizon <= self.max_horizon):
            raise ValueError(
                f"`horizon` must be a whole number from 1 to {self.max_horizon}, or None for all, got {horizon}"
            )

    def _edge_states(self, data: Data) -> Tensor:
        """``data.edge_attr`` as [E, F, C]."""
        states = data.edge_attr
        if states.dim() != 2 or states.shape[1] == 0 or states.shape[1] % self.context:
            raise ValueError(
                f"`data.edge_attr` must be [edges, taps * {self.context} snapshots], got {tuple(states.shape)}"
            )
        return states.unflatten(1, (-1, self.context))


class NiNoModel(
    _NowcasterModel,
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
        self.edge_out = nn.Linear(hidden, config.max_features * config.max_horizon)
        self._init_weights()

    def forward(self, data: Data, horizon: int | None = None) -> Tensor:
        """Scaled deltas of an explicit graph.

        Args:
            data: PyG data with ``edge_index`` int64 [2, E] (source, target), ``edge_type`` int64 [E], ``edge_attr``
                [E, F * C] scaled states, taps first and snapshots within a tap, ``pos`` [N, positional_size], and, for
                nowcasters with a table of token positions, ``token`` int64 [N] (see :func:`token_rows`).  F may be
                less than ``config.max_features``.
            horizon: 1 .. ``max_horizon`` intervals, or ``None`` for all of them.

        Returns:
            [E, F], or [E, F, K] for all horizons: what to add to the scaled last state.

        Raises:
            ValueError: a horizon out of range, or ``data`` without what is needed.
        """
        self._check_horizon(horizon)
        states = self._edge_states(data)
        self._check_features(states.shape[1], "`data.edge_attr`")
        edge_index, edge_type = data.edge_index, data.edge_type
        states = states.flatten(1).to(self.edge_in.weight.dtype)
        e = nn.functional.linear(states, self.edge_in.weight[:, : states.shape[1]], self.edge_in.bias)
        e = e + self.edge_type(edge_type)
        x = self.embed_nodes(data.pos.to(states.dtype), getattr(data, "token", None))
        for convolution, update in zip(self.convolutions, self.edge_updates, strict=True):
            x = self.activation(convolution(x, edge_index, e))
            e = update(x, edge_index, e)
        rows, bias = self.decoder_rows(horizon)
        features = states.shape[1] // self.context
        rows, bias = rows[:features], bias[:features]
        hidden = self.activation(self.edge_hidden(e))
        deltas = nn.functional.linear(hidden, rows.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)
        return deltas if horizon is None else deltas[..., 0]

    @torch.no_grad()
    def nowcast(
        self,
        graph: NeuralGraph | None,
        states: Sequence[Mapping[str, Tensor]],
        horizon: int,
        *,
        pos: Tensor | None = None,
        engine: Engine | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`; computed on the nowcaster's device, block by block.

        Args:
            pos: positional encoding [N, positional_size] instead of the graph's own, which is computed once per graph.
            engine: precision, memory and threads of this nowcast; ``None`` for the attribute ``engine``.
        """
        check_states(self, states, horizon)
        self._check_graph(graph, states[-1])
        if pos is None:
            pos = _positional_encoding(graph, self.config.positional_size)
        token = None if self.token_position is None else token_rows(graph, self.config.token_position_vocabulary)
        scales = measure_scales(states)
        last = states[-1]
        result = {name: torch.empty_like(last[name], memory_format=torch.contiguous_format) for name in last}
        predict(self, graph, states, scales, horizon, pos, result, token=token, engine=engine)
        return result

    def embed_nodes(self, pos: Tensor, token: Tensor | None) -> Tensor:
        """Initial nodes [N, H] from their positional encoding and, where the network has the table, token rows [N]."""
        x = self.node_in(pos)
        if self.token_position is None:
            return x
        if token is None:
            raise ValueError("this nowcaster has a table of token positions and needs `data.token`, see `token_rows`")
        return x + self.token_position(token)

    def update_nodes(self, depth: int, x: Tensor, mean: Tensor) -> Tensor:
        """Nodes [N, H] after layer ``depth``, from the nodes before it and the mean of their messages."""
        convolution = self.convolutions[depth]
        return self.activation(convolution.output(convolution.combine(torch.cat([x, mean], dim=-1))))

    def decoder_rows(self, horizon: int | None) -> tuple[Tensor, Tensor]:
        """Weights [F, K, H] and biases [F, K] of the last map; K = 1 for a given horizon."""
        sizes = (self.config.max_features, self.max_horizon)
        chosen = slice(None) if horizon is None else slice(horizon - 1, horizon)
        return self.edge_out.weight.unflatten(0, sizes)[:, chosen], self.edge_out.bias.unflatten(0, sizes)[:, chosen]

    def _check_features(self, features: int, what: str) -> None:
        if features > self.config.max_features:
            raise ValueError(
                f"{what} has {features} kernel taps on an edge, this nowcaster knows {self.config.max_features}"
            )

    def _check_graph(self, graph: NeuralGraph | None, state: Mapping[str, Tensor]) -> None:
        if graph is None:
            raise ValueError(
                "`graph` must be the model's NeuralGraph for NiNoModel, got None; see NeuralGraph.from_model"
            )
        self._check_features(graph.max_features, "`graph`")
        check_graph(graph, state)


class WNNModel(
    _NowcasterModel,
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
        self.edge_out = nn.Linear(hidden, config.max_horizon)
        self._init_weights()

    def forward(self, data: Data, horizon: int | None = None) -> Tensor:
        """Scaled deltas of an explicit graph; ``edge_index`` and ``pos`` are not read.

        Args:
            data: PyG data with ``edge_type`` int64 [E] and ``edge_attr`` [E, F * C], see :meth:`NiNoModel.forward`.
            horizon: 1 .. ``max_horizon`` intervals, or ``None`` for all of them.

        Returns:
            [E, F], or [E, F, K] for all horizons.

        Raises:
            ValueError: a horizon out of range or ``edge_attr`` of the wrong shape.
        """
        self._check_horizon(horizon)
        return self._deltas(self._edge_states(data), data.edge_type[:, None], horizon)

    @torch.no_grad()
    def nowcast(
        self, graph: NeuralGraph | None, states: Sequence[Mapping[str, Tensor]], horizon: int
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`.  Edge types come from the graph, without one from names and shapes."""
        check_states(self, states, horizon)
        last = states[-1]
        if graph is not None:
            check_graph(graph, last)
        result = {}
        for name, tensor in last.items():
            shape = tuple(tensor.shape)
            types = edge_types_of(name, shape) if graph is None else edge_types_of_blocks(graph, name)
            result[name] = self._nowcast_tensor([state[name] for state in states], types.flatten(), horizon)
        return result

    def _nowcast_tensor(self, snapshots: Sequence[Tensor], types: Tensor, horizon: int) -> Tensor:
        scale = measure_scale(snapshots)
        last = snapshots[-1]
        like = self.edge_in.weight
        result = torch.empty_like(last, memory_format=torch.contiguous_format)
        flat = [snapshot.reshape(-1) for snapshot in snapshots]
        for first in range(0, last.numel(), WNN_TILE):
            part = slice(first, first + WNN_TILE)
            tile = scale.apply(torch.stack([snapshot[part].to(like) for snapshot in flat], dim=-1))
            delta = self._deltas(tile, types[part].to(like.device), horizon)
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


def check_graph(graph: NeuralGraph, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless the state has the graph's parameters, no others, in its shapes."""
    missing = [name for name in graph.parameter_names if name not in state]
    unknown = sorted(state.keys() - set(graph.parameter_names))
    if missing or unknown:
        raise ValueError(
            "`states` must hold exactly the parameters of the graph; "
            f"missing {missing[:3] or 'none'}, not in the graph {unknown[:3] or 'none'}"
        )
    for name in graph.parameter_names:
        if tuple(state[name].shape) != tuple(graph.shapes[name]):
            raise ValueError(
                f"`states` must hold {name!r} in the graph's shape {tuple(graph.shapes[name])}, "
                f"got {tuple(state[name].shape)}"
            )


def _positional_encoding(graph: NeuralGraph, size: int) -> Tensor:
    """The graph's positional encoding, computed once per graph and size."""
    sizes = _positional_encodings.setdefault(graph, {})
    if size not in sizes:
        sizes[size] = graph.positional_encoding(size)
    return sizes[size]
