"""The graph network in PyG's terms: messages over an explicit ``edge_index``.  The readable reference.

Shape letters: N nodes, E edges, H hidden width.  Everything here holds tensors of size E x H; the path that runs is
:mod:`hf_nino.nowcaster.blockwise`, which computes the same function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

Activation = Callable[[Tensor], Tensor]


class ModulatedConvolution(MessagePassing):
    """Nodes hear from their sources, each message scaled and shifted by its edge (FiLM), mean over incoming edges.

    For an edge j -> i with features e (Kofinas et al., 2024, arXiv 2403.12143; Knyazev et al., 2025, section 4)::

        m_ij = scale(e) * message([x_i; x_j]) + shift(e)
        x_i' = output(combine([x_i; mean_j m_ij]))

    without an activation at the end; :class:`hf_nino.nowcaster.NiNoModel` applies it.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(aggr="mean", flow="source_to_target")
        self.pair = nn.Linear(2 * hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.combine = nn.Linear(2 * hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """Nodes [N, H], edges [2, E] (source, target) and edge features [E, H] -> nodes [N, H]."""
        mean = self.propagate(edge_index, x=x, edge_attr=edge_attr)
        return self.output(self.combine(torch.cat([x, mean], dim=-1)))

    def message(self, x_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        scale, shift = self.modulation(edge_attr).chunk(2, dim=-1)
        return scale * self.pair(torch.cat([x_i, x_j], dim=-1)) + shift


class EdgeUpdate(nn.Module):
    """Edges hear from both of their nodes: ``e' = output(act(edge(e) + source(x_j) + target(x_i)))``."""

    def __init__(self, hidden_size: int, activation: Activation) -> None:
        super().__init__()
        self.edge = nn.Linear(hidden_size, hidden_size)
        self.source = nn.Linear(hidden_size, hidden_size)
        self.target = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.activation = activation

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """Nodes [N, H], edges [2, E] and edge features [E, H] -> edge features [E, H]."""
        source, target = edge_index
        return self.output(self.activation(self.edge(edge_attr) + self.source(x)[source] + self.target(x)[target]))
