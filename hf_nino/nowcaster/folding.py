"""The graph network with every pair of linear maps that meet multiplied into one: what the engine computes with.

Each linear map that reads edge features e^l is folded with the map that made them, so that the engine never leaves the
insides of the edge updates (see :mod:`hf_nino.nowcaster.blockwise` for the notation)::

    e^0 = Win s + type          e^l = L1 u^(l-1) + b1          delta = rows act(Wh e^L + bh) + rows_bias

Shape letters: D components of an edge's states (taps x snapshots), H hidden, F taps, K horizons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from .conditions import Conditions

if TYPE_CHECKING:
    from .modeling import NiNoModel


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


@dataclass(frozen=True)
class ConditionedDecoder:
    """The same for several horizons, or samples, that it is told different things of."""

    hidden: Tensor  # [H, H]
    biases: Tensor  # [S or 1, K, H]
    rows: Tensor  # [S or 1, K, F, H]
    rows_bias: Tensor  # [S or 1, K, F]


@dataclass(frozen=True)
class Folded:
    """A whole network for one horizon; differentiable in the network's weights, and worth sharing between graphs."""

    layers: tuple[Layer, ...]
    decoder: Decoder | ConditionedDecoder
    node_bias: Tensor | None  # [S or 1, 1, H]


def fold(network: NiNoModel, horizon: float | None, conditions: Conditions | None = None) -> Folded:
    """Everything that the engine needs of a network's weights, on their device and in their dtype.

    Args:
        horizon: 1 .. ``network.max_horizon``, or ``None`` for all of them.
        conditions: see :meth:`NiNoModel.conditions`; ``None``: those of ``horizon``.
    """
    conditions = conditions or network.conditions(horizon)
    layers = tuple(fold_layer(network, depth) for depth in range(len(network.convolutions)))
    return Folded(layers, fold_decoder(network, horizon, conditions), network.node_bias(conditions))


def fold_layer(network: NiNoModel, depth: int) -> Layer:
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


def fold_decoder(
    network: NiNoModel, horizon: float | None, conditions: Conditions | None
) -> Decoder | ConditionedDecoder:
    """The decoder for one horizon, or for all, with the output map of the last edge update multiplied in, and with
    what it is told."""
    before, hidden = network.edge_updates[-1].output, network.edge_hidden
    weight, bias = _exact(hidden.weight), _exact(hidden.bias)
    product = (weight @ _exact(before.weight)).to(hidden.weight)
    summed = linear(_exact(before.bias), weight, bias).to(hidden.weight)
    if conditions is None:
        return Decoder(product, summed, *network.decoder_rows(horizon))
    biases, rows, rows_bias = network.conditioned_rows(conditions)
    biases = summed + biases
    if biases.shape[:2] == (1, 1):
        return Decoder(product, biases[0, 0], rows[0].transpose(0, 1), rows_bias[0].t())
    return ConditionedDecoder(product, biases, rows, rows_bias)


def _exact(weight: Tensor) -> Tensor:
    """Folding happens in float64, which makes the result three times closer; where there is none, on the CPU."""
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    return weight.to(device, torch.float64)
