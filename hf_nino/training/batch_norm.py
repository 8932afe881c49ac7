"""The statistics of batch normalization after a nowcast: they are no parameters, and belong to the ones before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .rng import preserved_rng

_Kind = nn.modules.batchnorm._BatchNorm


def with_statistics(model: nn.Module) -> list[nn.Module]:
    """The batch normalizations of ``model`` that are training and collect statistics."""
    return [m for m in model.modules() if isinstance(m, _Kind) and m.training and m.running_mean is not None]


@torch.no_grad()
def recompute(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]) -> None:
    """Compute the statistics anew, as the plain mean over ``batches``, with the parameters as they are now.

    Everything but batch normalization runs in evaluation mode, and random numbers stay as they are.  If there is no
    batch, or ``forward`` fails, the statistics stay as well.

    Args:
        batches: read once.
        forward: runs the model on one of them.

    Raises:
        Exception: whatever ``forward`` raises.
    """
    norms = with_statistics(model)
    batches = list(batches)
    if not norms or not batches:
        return
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
        with preserved_rng():
            for batch in batches:
                forward(batch)
    except BaseException:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module in training:
            module.training = True
    for norm, buffers in zip(norms, kept, strict=True):
        norm.num_batches_tracked.copy_(buffers["num_batches_tracked"])
