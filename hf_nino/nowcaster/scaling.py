"""One scale for all elements and all snapshots of a parameter: what every nowcaster with weights sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .shards import Ranks

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


def measure_scales(states: Sequence[Mapping[str, Tensor]], ranks: Ranks | None = None) -> dict[str, Scale]:
    """The :class:`Scale` of every parameter, from the same snapshots of all.

    float32 moments of pieces of a million elements, joined in float64 (Chan et al., 1979): no copy of a parameter is
    made, and the host waits once for each device that holds snapshots.

    Args:
        ranks: those that hold the other rows of the same parameters; scales are of all rows, the same on every rank.
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
    found = {name: [known[device][number] for device, number in places[name]] for name in sizes}
    if ranks is None:
        return {name: _join(sizes[name], found[name]) for name in sizes}
    return _join_over_ranks(sizes, found, ranks)


def _join_over_ranks(
    sizes: Mapping[str, Sequence[int]], moments: Mapping[str, Sequence[Tensor]], ranks: Ranks
) -> dict[str, Scale]:
    """:func:`_join` of the pieces that all ranks have, for all parameters together.

    First the means, then the squares about them: sums of squares about 0 would lose the spread of a parameter that is
    small against its mean.
    """
    names = sorted(sizes)
    weights = [torch.tensor(sizes[name], dtype=torch.float64) for name in names]
    pieces = [torch.stack([*moments[name]]) if moments[name] else torch.empty(0, 2).double() for name in names]
    sums = torch.stack(
        [torch.stack([w.sum(), (w * piece[:, 1]).sum()]) for w, piece in zip(weights, pieces, strict=True)]
    )
    ranks.sum_([sums])
    totals, means = sums[:, 0], sums[:, 1] / sums[:, 0].clamp(min=1)
    about = zip(weights, pieces, means, strict=True)
    spreads = torch.stack([(w * (piece[:, 0] + (piece[:, 1] - mean).square())).sum() for w, piece, mean in about])
    ranks.sum_([spreads])
    deviations = (spreads / (totals - 1).clamp(min=1)).sqrt()
    return {name: Scale(float(mean), float(std)) for name, mean, std in zip(names, means, deviations, strict=True)}


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
