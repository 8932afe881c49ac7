"""What meta-training minimises: the L1 distance of scaled moves, at all horizons at once.

For a slice with last state w, scale (mean, std) of its past, and states w_k at the horizons k that it has::

    loss = mean over k, elements |delta_k - (w_k - w) / (std + 1e-6)|

where delta are the nowcaster's scaled deltas (Knyazev et al., ICLR 2025, arXiv 2409.04434).  Constant edges have no
parameter and take no part; nor does a parameter that did not move in the slice's past, for which every nowcast is its
last state.  The loss of a batch is the mean over its slices.

Shape letters: S slices, C context, K horizons; J sources, I targets and F taps of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Data

from ..graph import EdgeBlock, NeuralGraph
from ..nowcaster.blockwise import blockwise_samples
from ..nowcaster.engine import Engine
from ..nowcaster.modeling import NiNoModel, WNNModel, token_rows
from .sampling import Batch
from .shapes import ModelShape

KEPT_BYTES = 2 << 30
"""Tiles are computed again in the backward pass where keeping them would take more."""

WNN_PART = 1 << 16
"""Elements that a WNN works on at a time."""


class Losses(NamedTuple):
    """Scalars of a batch: the loss, and what it would be if nothing moved any more."""

    loss: Tensor
    persistence: Tensor


class Objective(nn.Module):
    """The loss of a nowcaster on a batch, as a module, so that whatever wraps modules can wrap it.

    Args:
        network: the nowcaster that learns.
        mask_rounding: leave out parameters that only move by rounding.
    """

    def __init__(self, network: NiNoModel | WNNModel, mask_rounding: bool = True) -> None:
        super().__init__()
        self.network, self.mask_rounding = network, mask_rounding

    def forward(self, shape: ModelShape, batch: Batch, signs: Tensor | None = None) -> Losses:
        """The loss of a batch.

        Args:
            signs: ``[S, 1, positional_size]``, of the columns of the positional encoding; see
                :func:`~hf_nino.metatrain.sampling.draw_signs`.
        """
        skip = shape.rounding if self.mask_rounding else frozenset()
        errors = persistence = elements = torch.zeros((), device=batch.mask.device)
        for number, block, delta in scaled_deltas(self.network, shape, batch, signs):
            if number in skip:
                continue
            counted = batch.moves[block.parameter].float()
            move = scaled_moves(block, batch)
            errors = errors + counted[:, None] * (delta - move).abs().sum((1, 2, 3))
            persistence = persistence + counted[:, None] * move.abs().sum((1, 2, 3))
            elements = elements + counted * block.edges * block.shape[2]
        weight = batch.mask / (elements[:, None] * batch.mask.sum(1, keepdim=True)).clamp(min=1)
        return Losses((weight * errors).sum(1).mean(), (weight * persistence).sum(1).mean())


def scaled_deltas(
    network: NiNoModel | WNNModel, shape: ModelShape, batch: Batch, signs: Tensor | None = None
) -> Iterator[tuple[int, EdgeBlock, Tensor]]:
    """What a nowcaster predicts of a batch: number, block and scaled deltas ``[S, J, I, F, K]`` of all trainable
    blocks, K as in the batch; differentiable in its weights."""
    horizons = batch.mask.shape[1]
    conditions = None if network.modulation is None else batch.conditions
    edges = sum(block.edges for block in shape.graph.trainable_blocks) * len(batch)
    recompute = edges * kept_per_edge(network, horizons) > KEPT_BYTES
    if isinstance(network, WNNModel):
        found = _wnn_deltas(network, shape.graph, batch, recompute)
    else:
        pos = shape.positions(network.config.positional_size, network.edge_in.weight.device)
        pos = pos if signs is None else signs.to(pos) * pos
        token = None
        if network.token_position is not None:
            token = token_rows(shape.graph, network.config.token_position_vocabulary)
        told = {"token": token, "engine": Engine(recompute=recompute), "conditions": conditions}
        found = blockwise_samples(network, shape.graph, batch.histories, batch.scales, None, pos, **told)
    for number, (block, delta) in enumerate(found):
        yield number, block, delta[..., :horizons]


def scaled_moves(block: EdgeBlock, batch: Batch) -> Tensor:
    """What there was to predict of a block: ``(w_k - w) / (std + 1e-6)``, ``[S, J, I, F, K]``."""
    last = as_edges(block, batch.past[block.parameter][:, -1:])
    move = as_edges(block, batch.future[block.parameter]) - last
    return move / batch.spread[block.parameter].view(-1, 1, 1, 1, 1)


def as_edges(block: EdgeBlock, states: Tensor) -> Tensor:
    """States of one parameter ``[S, K, *shape]`` as a block's edges, ``[S, J, I, F, K]``."""
    flat = states.contiguous().flatten(2) if states.dim() > 2 else states.contiguous().unsqueeze(2)
    sizes = block.source.sizes + block.target.sizes + block.feature_sizes
    strides = block.source_strides + block.target_strides + block.feature_strides
    edges = flat.as_strided(
        (*flat.shape[:2], *sizes), (*flat.stride()[:2], *strides), flat.storage_offset() + block.offset
    )
    return edges.reshape(*flat.shape[:2], *block.shape).movedim(1, -1)


def kept_per_edge(network: NiNoModel | WNNModel, horizons: int) -> int:
    """Bytes that autograd keeps of an edge of one slice, about: hidden units of all products and activations."""
    config = network.config
    layers = 4 if isinstance(network, WNNModel) else config.num_layers * (config.num_layers + 1)
    if network.modulation is not None:  # decodes for each horizon
        layers += horizons
    return 4 * (2 * layers * config.hidden_size + config.max_horizon * config.max_features)


def _wnn_deltas(
    network: WNNModel, graph: NeuralGraph, batch: Batch, recompute: bool
) -> Iterator[tuple[EdgeBlock, Tensor]]:
    told = network.modulation is not None

    def run(states: Tensor, types: Tensor) -> Tensor:
        if told:
            return network.conditioned_deltas(states, types, batch.conditions)
        return network(Data(edge_attr=states, edge_type=types))[:, 0]

    for block in graph.trainable_blocks:
        mean, spread = (table[block.parameter].view(-1, 1, 1, 1, 1) for table in (batch.mean, batch.spread))
        states = (as_edges(block, batch.past[block.parameter]) - mean) / spread
        # What a network is told differs between slices: they stay apart.
        flat = states.flatten(1, 3) if told else states.flatten(0, 3)
        parts = []
        for part in flat.split(max(WNN_PART // len(batch), 1) if told else WNN_PART, dim=-2):
            types = torch.full((part.shape[-2],), int(block.edge_type), device=part.device)
            kept = torch.is_grad_enabled() and recompute
            parts.append(checkpoint(run, part, types, use_reentrant=False) if kept else run(part, types))
        yield block, torch.cat(parts, dim=-2).view(*states.shape[:4], -1)
