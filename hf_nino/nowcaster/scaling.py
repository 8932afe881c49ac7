"""One scale for all elements and all snapshots of a parameter: what every nowcaster with weights sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6
PIECE = 1 << 20
"""Elements that moments are computed of at a time."""


class Scale(NamedTuple):
    """Mean and unbiased standard deviation of a parameter over all its elements and all snapshots.

    Scaled is ``(w - mean) / (std + 1e-6)`` and back is ``w * std + mean``, as in the original release: the two are not
    quite inverse, and a constant parameter comes back constant.
    """

    mean: float
    std: float

    def apply(self, values: Tensor) -> Tensor:
        return (values - self.mean) / (self.std + EPSILON)

    def apply_(self, values: Tensor) -> Tensor:
        """:meth:`apply` in place."""
        return values.sub_(self.mean).div_(self.std + EPSILON)

    def undo(self, values: Tensor) -> Tensor:
        return values * self.std + self.mean


def measure_scale(snapshots: Sequence[Tensor]) -> Scale:
    """The :class:`Scale` of one parameter, from its snapshots."""
    return measure_scales([{"": snapshot} for snapshot in snapshots])[""]


def measure_scales(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Scale]:
    """The :class:`Scale` of every parameter, from the same snapshots of all.

    float32 moments of pieces of a million elements, joined in float64 (Chan et al., 1979): no copy of a parameter is
    made, and the host waits once for each device that holds snapshots.
    """
    sizes: dict[str, list[int]] = {name: [] for name in states[0]}
    moments: dict[torch.device, list[Tensor]] = {}
    places: dict[str, list[tuple[torch.device, int]]] = {name: [] for name in states[0]}
    for name in sizes:
        for state in states:
            for piece in state[name].detach().reshape(-1).split(PIECE):
                if piece.numel() == 0:
                    continue
                queue = moments.setdefault(piece.device, [])
                places[name].append((piece.device, len(queue)))
                sizes[name].append(piece.numel())
                queue.append(torch.stack(torch.var_mean(piece.float(), correction=0)))
    known = {device: torch.stack(queue).cpu().double() for device, queue in moments.items()}
    return {name: _join(sizes[name], [known[device][number] for device, number in places[name]]) for name in sizes}


def _join(sizes: Sequence[int], moments: Sequence[Tensor]) -> Scale:
    """One mean and unbiased deviation from the (biased variance, mean) of pieces of these sizes."""
    if not sizes:
        return Scale(0.0, 0.0)
    weights = torch.tensor(sizes, dtype=torch.float64)
    variances, means = torch.stack(list(moments)).unbind(1)
    total = weights.sum()
    mean = (weights * means).sum() / total
    spread = (weights * (variances + (means - mean).square())).sum()
    return Scale(float(mean), float((spread / (total - 1).clamp(min=1)).sqrt()))
