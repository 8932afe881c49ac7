"""Where a race to an accuracy ends, found without looking at every row at every look."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .measuring import ROWS, evaluating

ROUGH = 0.005
"""Share of the rows by which errors in bfloat16 may be more than in float32.  Of FM/16 in training, it changed the
accuracy by 0.0016 at most (30 evaluations)."""

# Of how often a row was wrong, from one look to the next; and that of rows never looked at: they come before those
# that were right all along.
_FORGET, _UNSEEN = 0.9, 0.5


class FinishLine:
    """Whether a classifier has reached an accuracy; exactly, and mostly from a small part of the rows.

    Rows that the model got wrong in earlier looks come first.  A look is over as soon as there are more errors than
    the accuracy allows: what the other rows would say does not matter then.  Errors are counted in bfloat16, and
    allowed to be ``ROUGH`` more; a model that passes is evaluated in float32, which decides.

    Args:
        accuracy: to be reached, between 0 and 1.
        labels: int64 ``[rows]``.
        logits: of a copy of the model in bfloat16, for the rows of these indices: ``[indices, classes]``.
        exactly: the accuracy of the model itself, on all rows.
    """

    def __init__(
        self,
        accuracy: float,
        labels: Tensor,
        logits: Callable[[nn.Module, Tensor], Tensor],
        exactly: Callable[[nn.Module], float],
    ) -> None:
        self.accuracy, self.labels = accuracy, labels
        self._logits, self._exactly = logits, exactly
        self._missed = torch.full((len(labels),), _UNSEEN)
        self.looked_at = 0

    def crossed(self, model: nn.Module, rough: nn.Module) -> bool:
        """Look at a model, and at its copy in bfloat16."""
        allowed = (1 - self.accuracy + ROUGH) * len(self.labels)
        errors = 0
        with evaluating(rough) as device:
            for rows in self._missed.argsort(descending=True, stable=True).split(ROWS):
                found = self._logits(rough, rows).argmax(-1)
                wrong = found != self.labels[rows].to(device)
                self._missed[rows] = self._missed[rows] * _FORGET + wrong.cpu()
                self.looked_at += len(rows)
                errors += int(wrong.sum())
                if errors > allowed:
                    return False
        return self._exactly(model) >= self.accuracy
