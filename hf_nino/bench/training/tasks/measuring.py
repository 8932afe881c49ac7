"""How models are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 125
"""Evaluated at a time: so few that what is between the layers of a small network stays in a processor's cache."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in.  Gives the device."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def accuracy_and_loss(
    model: nn.Module, logits: Callable[..., Tensor], inputs: Sequence[Tensor], labels: Tensor
) -> dict[str, float]:
    """``loss`` (mean cross-entropy) and ``accuracy`` (0 to 1) in evaluation mode.

    Args:
        logits: what the model says, ``[rows, classes]``, of some rows of each of ``inputs``.
        inputs: tensors of as many rows as ``labels``, on any device.
        labels: int64 ``[rows]``.
    """
    with evaluating(model) as device:
        loss = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        for *rows, truth in zip(*(tensor.split(ROWS) for tensor in (*inputs, labels)), strict=True):
            truth = truth.to(device)
            found = logits(*(tensor.to(device) for tensor in rows))
            loss += functional.cross_entropy(found, truth, reduction="sum")
            correct += (found.argmax(-1) == truth).sum()
    return {"loss": loss.item() / len(labels), "accuracy": correct.item() / len(labels)}
