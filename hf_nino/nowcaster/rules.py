"""Nowcasters without weights: continue the mean move, or keep the momentum of past displacements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import NeuralGraph
from .base import Nowcaster, check_states
from .displacements import DisplacementNowcaster
from .shards import Shards


class LinearNowcaster(Nowcaster):
    """Continues the mean move: ``last + factor * min(horizon, max_intervals) * (last - first) / (C - 1)``.

    Stronger than it looks: with a small GPT-2 it saved about as many optimizer steps as the original NiNo checkpoint
    at the same period.  Further than about 4 intervals ahead a straight line does harm (10 intervals: almost no
    gain), hence ``max_intervals``.  The default period is 250 steps because nowcasts every 100 to 250 steps, 3
    intervals ahead, saved 24 to 29 percent of the steps and nowcasts every 1000 steps 12 to 20 percent; at 250 they
    cost least.

    Computed in float32; bfloat16 and float16 states come back in their own dtype.

    Args:
        context: snapshots in the history, C, at least 2.
        max_intervals: how far ahead it goes at most, in intervals.
        factor: multiplies the move; 1 is plain continuation.
        period: usual optimizer steps between nowcasts.
        max_horizon: the largest horizon that it accepts (and treats as ``max_intervals``).

    Raises:
        ValueError: an argument out of range.
    """

    works_on_shards = True
    elementwise = True

    def __init__(
        self,
        context: int = 5,
        max_intervals: float = 4,
        factor: float = 1.0,
        period: int = 250,
        max_horizon: int = 40,
    ) -> None:
        self.context = check_whole("context", context, 2)
        self.max_intervals = check_number("max_intervals", max_intervals)
        self.factor = check_number("factor", factor)
        self.period = check_whole("period", period, 1)
        self.max_horizon = check_whole("max_horizon", max_horizon, 1)
        if self.max_intervals <= 0:
            raise ValueError(f"`max_intervals` of a LinearNowcaster must be above 0, got {max_intervals}")

    @property
    def reach(self) -> int:
        return min(math.ceil(self.max_intervals), self.max_horizon)

    @torch.no_grad()
    def nowcast(
        self,
        graph: NeuralGraph | None,
        states: Sequence[Mapping[str, Tensor]],
        horizon: int,
        *,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`; ``graph`` is not read, and ranks have nothing to say to each other."""
        check_states(self, states, horizon, shards)
        moves = self.factor * min(horizon, self.max_intervals) / (self.context - 1)
        first, last = states[0], states[-1]
        result = {}
        for name, tensor in last.items():
            start, end = _float(first[name]).to(tensor.device), _float(tensor)
            result[name] = torch.add(end, end - start, alpha=moves).to(tensor.dtype)
        return result

    def __repr__(self) -> str:
        return (
            f"LinearNowcaster(context={self.context}, max_intervals={self.max_intervals}, factor={self.factor}, "
            f"period={self.period})"
        )


class MomentumNowcaster(DisplacementNowcaster):
    """SNOO: Nesterov momentum on the displacements between nowcasts (Kallusky et al., 2025, arXiv 2510.15830).

    With the anchor w (the state that training carried on from after the last nowcast) and the state w~ that the base
    optimizer reached since then::

        d = w~ - w          b = momentum * b + d
        new = w + factor * (momentum * b + d)       (nesterov)
        new = w + factor * b                        (heavy ball)

    ``momentum=0`` is Lookahead (Zhang et al., 2019, arXiv 1907.08610) with slow step size ``factor``.  Anchor and
    buffer are float32 and as large as the parameters, each.

    The default momentum of 0.5 is the one that also helped at well tuned learning rates; at small, constant ones 0.8
    saved more steps.

    Args:
        momentum: 0 .. below 1.
        factor: outer learning rate; above 0.
        nesterov: whether to look ahead along the buffer once more.
        period: optimizer steps between nowcasts, K in the paper.

    Raises:
        ValueError: an argument out of range.
    """

    parts: ClassVar[tuple[str, ...]] = ("buffer",)
    works_on_shards = True
    elementwise = True

    def __init__(self, momentum: float = 0.5, factor: float = 1.0, nesterov: bool = True, period: int = 50) -> None:
        super().__init__()
        self.momentum = check_number("momentum", momentum)
        self.factor = check_number("factor", factor)
        self.nesterov = bool(nesterov)
        self.period = check_whole("period", period, 1)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` of a MomentumNowcaster must be from 0 to below 1, got {momentum}")
        if self.factor <= 0:
            raise ValueError(f"`factor` of a MomentumNowcaster must be above 0, got {factor}")

    def begin(self, anchor: Tensor) -> dict[str, Tensor]:
        return {"buffer": torch.zeros_like(anchor, memory_format=torch.contiguous_format)}

    def shape(self, part: str, anchor: Tensor) -> torch.Size:
        return anchor.shape

    def move(self, displacement: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        buffer = kept["buffer"].mul_(self.momentum).add_(displacement)
        step = torch.add(displacement, buffer, alpha=self.momentum) if self.nesterov else buffer
        return self.factor * step

    def __repr__(self) -> str:
        return (
            f"MomentumNowcaster(momentum={self.momentum}, factor={self.factor}, nesterov={self.nesterov}, "
            f"period={self.period})"
        )


def _float(tensor: Tensor) -> Tensor:
    """Detached and in float32 (float64 stays)."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_whole(name: str, value: int, low: int) -> int:
    """``value``, if it is a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` of a nowcaster must be a whole number of at least {low}, got {value!r}")
    return value


def check_number(name: str, value: float) -> float:
    """``value``, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` of a nowcaster must be a finite number, got {value!r}")
    return value
