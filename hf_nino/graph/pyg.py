"""The explicit graph: a NeuralGraph as ``torch_geometric.data.Data``, and edge values back as parameters.

One row per edge, so only for networks of modest size: an edge costs 16 bytes for its ends alone.  Edges come block by
block in the order of ``graph.trainable_blocks``, row-major over [J, I]; then the constant edges; then a self loop for
every node.

Shape letters: N nodes, E edges, J source and I target nodes of a block, F features per edge (kernel taps), S states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch_geometric.data import Data

from .structure import SELF_LOOP_VALUE, EdgeBlock, EdgeType, NeuralGraph


def to_pyg(
    graph: NeuralGraph,
    states: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    features: int | None = None,
    pos: int = 8,
) -> Data:
    """The neural graph, edge by edge.

    Args:
        graph: the network.
        states: S states of its parameters, oldest first, each {parameter name: tensor of any float dtype}.
        features: features per edge F, at least ``graph.max_features`` (the default); fewer taps are padded with 0.
        pos: columns of the Laplacian positional encoding; 0 for none.

    Returns:
        Data with ``num_nodes``, ``edge_index`` int64 [2, E] (row 0 sources), ``edge_type`` int64 [E] (numbers of
        :class:`~hf_nino.graph.EdgeType`), ``group`` int64 [N] (number of each node's neuron group), ``pos`` float32
        [N, pos] unless ``pos`` is 0, and ``edge_attr`` float32 [E, F * S] unless ``states`` is None.  Its column
        ``f * S + s`` holds kernel tap f at state s; constant edges and self loops carry their value in the first tap
        of every state and 0 in the others.  Everything is on the device of the states.

    Raises:
        ValueError: ``features`` is below ``graph.max_features``; ``states`` is empty, lacks a parameter or holds one
            of another shape.
    """
    width = graph.max_features if features is None else features
    if width < graph.max_features:
        raise ValueError(
            f"`features` must be at least {graph.max_features}, the kernel taps of this graph, got {features}"
        )
    data = Data(
        edge_index=edge_index(graph), edge_type=edge_type(graph), group=node_groups(graph), num_nodes=graph.num_nodes
    )
    if pos:
        data.pos = graph.positional_encoding(pos)
    if states is not None:
        data.edge_attr = edge_attr(graph, states, width)
        data = data.to(data.edge_attr.device)
    return data


def from_pyg(graph: NeuralGraph, edge_values: Tensor) -> dict[str, Tensor]:
    """Values on edges as tensors in the shapes of the parameters; undoes :func:`edge_attr` of one state.

    Args:
        graph: the network.
        edge_values: [E, F] with F at least ``graph.max_features``; what constant edges, self loops and padded taps
            hold is ignored.

    Returns:
        {parameter name: tensor} with dtype and device of ``edge_values``; elements on no trainable edge are 0.

    Raises:
        ValueError: ``edge_values`` has another number of edges or too few features.
    """
    if edge_values.dim() != 2 or len(edge_values) != graph.num_edges or edge_values.shape[1] < graph.max_features:
        raise ValueError(
            f"`edge_values` must have shape [E, F] with E = {graph.num_edges} and F at least {graph.max_features}, "
            f"got {tuple(edge_values.shape)}"
        )
    parameters = {name: edge_values.new_zeros(graph.shapes[name]) for name in graph.parameter_names}
    for block, edges in edge_slices(graph).items():
        block.write(parameters[block.parameter], edge_values[edges, : block.shape[2]])
    return parameters


def edge_slices(graph: NeuralGraph) -> dict[EdgeBlock, slice]:
    """Where each trainable block's edges are in ``edge_index``, in order."""
    slices, start = {}, 0
    for block in graph.trainable_blocks:
        slices[block] = slice(start, start + block.edges)
        start += block.edges
    return slices


def edge_index(graph: NeuralGraph) -> Tensor:
    """Source and target node of every edge, int64 [2, E]."""
    parts = []
    for block in graph.trainable_blocks:
        source, target = graph.node_index(block.source), graph.node_index(block.target)
        parts.append(torch.stack([source.repeat_interleave(len(target)), target.repeat(len(source))]))
    parts += [torch.stack([graph.node_index(c.source), graph.node_index(c.target)]) for c in graph.constants]
    parts.append(torch.arange(graph.num_nodes).expand(2, -1))
    return torch.cat(parts, dim=1)


def edge_type(graph: NeuralGraph) -> Tensor:
    """The :class:`~hf_nino.graph.EdgeType` of every edge, int64 [E]."""
    runs = [(part.edge_type, part.edges) for part in (*graph.trainable_blocks, *graph.constants)]
    runs.append((EdgeType.SELF_LOOP, graph.num_nodes))
    types, lengths = (torch.tensor(column, dtype=torch.int64) for column in zip(*runs, strict=True))
    return types.repeat_interleave(lengths)


def node_groups(graph: NeuralGraph) -> Tensor:
    """The number of every node's neuron group, int64 [N]."""
    return torch.arange(len(graph.groups)).repeat_interleave(torch.tensor([group.size for group in graph.groups]))


def edge_attr(graph: NeuralGraph, states: Sequence[Mapping[str, Tensor]], features: int) -> Tensor:
    """The states on the edges, float32 [E, F * S]; see :func:`to_pyg`."""
    _check_states(graph, states)
    device = next((states[0][name].device for name in graph.parameter_names), torch.device("cpu"))
    values = torch.zeros(graph.num_edges, features, len(states), device=device)
    slices = edge_slices(graph)
    for block, edges in slices.items():
        for s, state in enumerate(states):
            values[edges, : block.shape[2], s] = block.view(state[block.parameter]).flatten(0, 1).to(values)
    start = sum(block.edges for block in slices)
    for constant in graph.constants:
        values[start : start + constant.edges, 0] = constant.value
        start += constant.edges
    values[start:, 0] = SELF_LOOP_VALUE
    return values.flatten(1)


def _check_states(graph: NeuralGraph, states: Sequence[Mapping[str, Tensor]]) -> None:
    if not states:
        raise ValueError("`states` must hold at least one state, or be None for a graph without edge_attr; got none")
    for s, state in enumerate(states):
        for name in graph.parameter_names:
            if name not in state:
                raise ValueError(f"`states` must hold every parameter of the graph, but state {s} lacks {name!r}")
            if tuple(state[name].shape) != tuple(graph.shapes[name]):
                raise ValueError(
                    f"`states` must hold parameters in the graph's shapes, but {name!r} has shape "
                    f"{tuple(state[name].shape)} in state {s} instead of {tuple(graph.shapes[name])}"
                )
