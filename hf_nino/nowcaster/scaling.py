"""One scale for all elements and all snapshots of a parameter: what every nowcaster with weights sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6


class Scale(NamedTuple):
    """Mean and unbiased standard deviation of a parameter over all its elements and all snapshots.

    Scaled is ``(w - mean) / (std + 1e-6)`` and back is ``w * std + mean``, as in the original release: the two are not
    quite inverse, and a constant parameter comes back constant.
    """

    mean: float
    std: float

    def apply(self, values: Tensor) -> Tensor:
        return (values - self.mean) / (self.std + EPSILON)

    def undo(self, values: Tensor) -> Tensor:
        return values * self.std + self.mean


def measure_scale(snapshots: Sequence[Tensor]) -> Scale:
    """The :class:`Scale` of one parameter, from its snapshots; float32 sums per snapshot, joined in float64.

    Joining per-snapshot moments (Chan et al., 1979) avoids a copy of all snapshots side by side.
    """
    size = snapshots[0].numel()
    if size == 0:
        return Scale(0.0, 0.0)
    moments = [torch.stack(torch.var_mean(s.detach().float(), correction=0)).cpu() for s in snapshots]
    variances, means = torch.stack(moments).double().unbind(1)
    mean = means.mean()
    total = size * (variances.sum() + (means - mean).square().sum())
    return Scale(float(mean), float((total / max(size * len(snapshots) - 1, 1)).sqrt()))
