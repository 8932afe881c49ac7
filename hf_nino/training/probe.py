"""The loss on a few fixed batches, measured without a trace in the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .losses import as_loss
from .rng import preserved_rng
from .stores import ParameterStore

Batches = Callable[[], float] | Sequence[Mapping[str, Any]]


class Probe:
    """Measures the loss, and leaves random numbers, modes and statistics as they are.

    Args:
        batches: a function without arguments that returns the loss; or batches of keyword arguments for the model,
            which must return a loss (``model(**batch).loss``, or under the key ``"loss"``).  Under
            ``torch.distributed`` each rank may have batches of its own: the mean over the ranks counts.
        model: the model, for batches.
        store: says where it is.

    Raises:
        ValueError: ``batches`` is neither, or empty.
    """

    def __init__(self, batches: Batches, model: nn.Module, store: ParameterStore) -> None:
        if not callable(batches):
            batches = list(batches) if isinstance(batches, Sequence) else []
            if not batches or not all(isinstance(batch, Mapping) for batch in batches):
                raise ValueError(
                    "`probe_batches` must be a function that returns a loss, or a list of batches (mappings of the "
                    f"model's keyword arguments), got {type(batches).__name__ if batches else 'none'}"
                )
        self._batches, self._model, self._store = batches, model, store

    def __call__(self) -> float:
        """The loss now, on this rank; it may be nan.

        Raises:
            Exception: whatever the model or the function raises.
        """
        with preserved_rng():
            return float(self._batches()) if callable(self._batches) else self._mean()

    @torch.no_grad()
    def _mean(self) -> float:
        training = [module for module in self._model.modules() if module.training]
        device = self._store.device
        self._model.eval()
        try:
            losses = [_loss(self._model(**_to(batch, device))) for batch in self._batches]
        finally:
            for module in training:
                module.training = True
        return sum(float(loss) for loss in losses) / len(losses)


def _loss(output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = as_loss(loss)
    if found is None:
        raise ValueError("the model returns no loss for the batches of `probe_batches`; do they have labels?")
    return found


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
