"""Parameters on which a model's outputs do not depend, and which only move because gradients are rounded.

The bias of the keys is the usual one: it adds the same number to all scores of a query, which a softmax takes away
again (where no rotary embedding comes between).  Its gradient is 0 but for rounding, and AdamW makes steps of full
length out of that.  Nobody can predict them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from ..graph import NeuralGraph
from ..graph.inputs import split_inputs
from ..graph.trace import output_tensors, quiet_forward
from ..graph.verify import random_state

logger = logging.get_logger(__name__)

NOTHING = 1e-5
"""A block's gradient that is so small against that of the others is rounding: softmaxes compute in float32 even in a
float64 model."""


def blocks_moved_by_rounding(model: nn.Module, graph: NeuralGraph, example_inputs: Any = None) -> frozenset[int]:
    """Numbers of the ``graph.trainable_blocks`` on which the outputs do not depend, though they take part.

    One forward and backward pass with random parameters in float64, as in training; a block's gradient is compared
    with the median block's, root mean squares both.  Blocks without any gradient at all took no part in this pass and
    are not among them.

    Args:
        model: left as it is.
        example_inputs: as for :meth:`NeuralGraph.from_model`.
    """
    arguments, keywords = split_inputs(model, example_inputs)
    arguments, keywords = tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, (arguments, keywords)
    )
    state = random_state(model, graph, torch.float64, torch.Generator().manual_seed(0))
    try:
        gradients = _gradients(model, state, arguments, keywords)
    except (RuntimeError, ValueError) as error:
        logger.warning(
            f"What moves by rounding alone in {type(model).__name__} could not be found out "
            f"({type(error).__name__}: {error}); nothing of it is masked."
        )
        return frozenset()
    sizes = {}
    for number, block in enumerate(graph.trainable_blocks):
        gradient = gradients.get(block.parameter)
        size = 0.0 if gradient is None else float(block.view(gradient).nan_to_num().square().mean().sqrt())
        if size > 0:
            sizes[number] = size
    if not sizes:
        return frozenset()
    usual = torch.tensor(list(sizes.values())).median().item()
    return frozenset(number for number, size in sizes.items() if size < NOTHING * usual)


def _gradients(
    model: nn.Module, state: Mapping[str, Tensor], arguments: tuple, keywords: Mapping[str, Any]
) -> dict[str, Tensor | None]:
    """Of a random sum of all outputs with respect to the parameters, by name."""
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    leaves = {name: state[name].requires_grad_() for name in names}
    generator = torch.Generator().manual_seed(1)
    with quiet_forward(model), torch.enable_grad():
        model.train()  # `quiet_forward` puts it back; batch normalization depends on it
        outputs = output_tensors(functional_call(model, dict(state), arguments, dict(keywords)))
        total = sum(
            (output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
            for output in outputs
            if output.requires_grad
        )
        return dict(zip(names, torch.autograd.grad(total, [*leaves.values()], allow_unused=True), strict=True))
