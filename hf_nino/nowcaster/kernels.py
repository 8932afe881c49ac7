"""What is computed for one tile: pure functions of its states, its nodes' terms and the folded weights.

Shapes, with S samples, c targets (columns) and r sources (rows) of a tile, D components of a state, H hidden::

    z [S, D, c, r]     row terms [S, 1, r, H]     column terms [S, c, 1, H]     u [S, c, r, H]

Without gradients everything of size T x H is written into the two buffers of a :class:`Workspace`: fresh memory of
this size costs more than the products (the system hands out zeroed pages one by one).  With gradients, nothing is
written in place.

``rounded`` says whether products of hidden units are, see :mod:`hf_nino.nowcaster.precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from .precision import products

Activation = Callable[[Tensor], Tensor]

_IN_PLACE: dict[Activation, Activation] = {
    silu: lambda x: silu(x, inplace=True),
    relu: torch.relu_,
    gelu: torch.ops.aten.gelu_,
    torch.tanh: torch.tanh_,
}


class Workspace:
    """Buffers by number; they grow to the largest tile and are used again for every tile."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._buffers: dict[int, Tensor] = {}

    def take(self, number: int, shape: Sequence[int]) -> Tensor:
        """Buffer ``number`` in this shape, with whatever is in it."""
        numel = torch.Size(shape).numel()
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() < numel:
            self._buffers.pop(number, None)
            buffer = self._buffers[number] = torch.empty(numel, device=self.device, dtype=self.dtype)
        return buffer[:numel].view(shape)


def activate(x: Tensor, activation: Activation, workspace: Workspace | None) -> Tensor:
    """``activation(x)``, in place where there is a workspace."""
    return activation(x) if workspace is None else _IN_PLACE.get(activation, activation)(x)


def update_edges(
    z: Tensor | None,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    weights: Sequence[Tensor],
    activation: Activation,
    workspace: Workspace | None,
    rounded: bool,
) -> Tensor:
    """u^L: the edges of a tile after as many updates as there are terms, ``u = act(Le z + row_j + column_i)``.

    Args:
        z: states [S, D, c, r]; ``None`` for edges whose constant states are part of the column terms.
        rows, columns: for every update, what it adds for the source and for the target of an edge.
        weights: ``Le`` of every update, [H, D] and then [H, H].
    """
    edges = None if z is None else z.flatten(2).transpose(1, 2).reshape(-1, z.shape[1])
    for number, (row, column, weight) in enumerate(zip(rows, columns, weights, strict=True)):
        if workspace is None:
            terms = row + column
        else:
            shape = torch.broadcast_shapes(row.shape, column.shape)
            terms = torch.add(row, column, out=workspace.take(number % 2, shape))
        if edges is not None:
            # The product is added to the terms where they are: one pass over memory less than adding them to it.
            flat = terms.view(-1, terms.shape[-1])
            with products(rounded and number > 0):
                flat = (flat.addmm if workspace is None else flat.addmm_)(edges, weight.t())
            terms = flat.view(terms.shape)
        u = activate(terms, activation, workspace)
        edges = u.view(-1, u.shape[-1])
    return u


def sums_of_states(z: Tensor, heard: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """B [S, c, H] and S [S, c, D] of layer 0: products of states and nodes, no work per edge and hidden unit.

    ``B_i = sum_d A[:, d] * (sum_j z_ijd P_s x_j)`` with the heard ``P_s x_j`` [S, 1, r, H] and A = ``scale`` [H, D].
    """
    moments = (z.flatten(1, 2) @ heard.squeeze(1)).unflatten(1, z.shape[1:3])
    return (moments * scale.t().unsqueeze(1)).sum(1), z.sum(-1).transpose(1, 2)


def sums_of_features(
    u: Tensor, heard: Tensor, scale: Tensor, workspace: Workspace | None, number: int, rounded: bool
) -> tuple[Tensor, Tensor]:
    """B and S [S, c, H] of a later layer: ``B_i = sum_j (A u_ij) * (P_s x_j)``, ``S_i = sum_j u_ij``.

    ``number`` is a buffer that u does not lie in.
    """
    scaled = _product(u, scale, workspace, number, rounded)
    scaled = scaled * heard if workspace is None else scaled.mul_(heard)
    return scaled.sum(-2), u.sum(-2)


def decode(
    u: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    rows: Tensor,
    rows_bias: Tensor,
    activation: Activation,
    workspace: Workspace | None,
    number: int,
    rounded: bool,
) -> Tensor:
    """Scaled deltas [S, c, r, F, K]: ``rows act(hidden u + hidden_bias) + rows_bias``, rows [F, K, H]."""
    inside = _product(u, hidden, workspace, number, rounded)
    inside = inside + hidden_bias if workspace is None else inside.add_(hidden_bias)
    inside = activate(inside, activation, workspace)
    return linear(inside, rows.flatten(0, 1), rows_bias.flatten()).unflatten(-1, rows_bias.shape)


def _product(u: Tensor, weight: Tensor, workspace: Workspace | None, number: int, rounded: bool) -> Tensor:
    """``weight u`` of every edge, in buffer ``number``."""
    with products(rounded):
        if workspace is None:
            return linear(u, weight)
        result = workspace.take(number, u.shape)
        torch.mm(u.view(-1, u.shape[-1]), weight.t(), out=result.view(-1, u.shape[-1]))
        return result
