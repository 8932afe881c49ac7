"""Momentum across jumps with equal weight for every direction of a matrix, as far as training agrees with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .displacements import DisplacementNowcaster
from .rules import check_number, check_whole

# Coefficients of x <- a x + b xx'x + c (xx')^2 x.  Five steps of Muon's (Jordan et al., 2024) take every singular
# value that is not tiny from (0, 1] to 0.7 .. 1.2; two of Newton and Schulz take it from there to within 3% of 1.
_STEPS = ((3.4445, -4.7750, 2.0315),) * 5 + ((1.5, -0.5, 0.0),) * 2


class SpectralNowcaster(DisplacementNowcaster):
    """Continues along the momentum of past displacements, whitened, at a length that feedback decides.

    For every parameter tensor, with the anchor w, the state w~ that the base optimizer reached since then, and the
    direction m of its last jump::

        d = w~ - w
        g = clip(g * exp(rate * (cos(d, m) - target)), 1 / 20, max_gain)
        b = momentum * b + (1 - momentum) * d
        m = |b| * polar(b) / sqrt(rank)          (matrices and kernels; else m = b)
        new = w~ + g * m

    * ``polar(b) = U V'`` for ``b = U S V'``: all directions in which a matrix moves get equal weight, where the base
      optimizer favours a few.  Muon (Jordan et al., 2024) and Shampoo do so with gradients; here it is done with the
      optimizer's own moves, once every ``period`` steps instead of in each.  It commutes with every permutation of
      neurons.  Kernels are taken as matrices of their first axis against all others.
    * ``cos(d, m)`` says whether the steps after the last jump went on in its direction, in which case it was too
      short, or came back: delta-bar-delta (Jacobs, 1988) and hypergradient descent (Baydin et al., 2018, arXiv
      1703.04782) between jumps.  With a learning rate that is too small the gain grows, else it shrinks.

    Anchor and buffer are float32, ``m`` is bfloat16: 10 bytes per parameter.

    Args:
        momentum: 0 .. below 1.
        period: optimizer steps between nowcasts.
        gain: first g.
        rate: of its feedback; 0 keeps it.
        target: agreement at which the gain stays as it is.
        max_gain: largest g.
        whiten: whether matrices are whitened; without it this is momentum with feedback.

    Raises:
        ValueError: an argument out of range.
    """

    parts: ClassVar[tuple[str, ...]] = ("buffer", "direction", "gain")
    min_gain: ClassVar[float] = 1 / 20

    def __init__(
        self,
        momentum: float = 0.5,
        period: int = 25,
        gain: float = 0.5,
        rate: float = 0.5,
        target: float = 0.05,
        max_gain: float = 8.0,
        whiten: bool = True,
    ) -> None:
        super().__init__()
        kind = "SpectralNowcaster"
        self.momentum = check_number("momentum", momentum)
        self.period = check_whole("period", period, 1)
        self.gain = check_number("gain", gain)
        self.rate = check_number("rate", rate)
        self.target = check_number("target", target)
        self.max_gain = check_number("max_gain", max_gain)
        self.whiten = bool(whiten)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` of a {kind} must be from 0 to below 1, got {momentum}")
        if self.rate < 0:
            raise ValueError(f"`rate` of a {kind} must be at least 0, got {rate}")
        if not -1 <= self.target <= 1:
            raise ValueError(f"`target` of a {kind} must be a cosine, from -1 to 1, got {target}")
        if not self.min_gain <= self.gain <= self.max_gain:
            raise ValueError(f"`gain` of a {kind} must be from {self.min_gain} to `max_gain` = {max_gain}, got {gain}")

    def begin(self, anchor: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(anchor, memory_format=torch.contiguous_format)
        return {
            "buffer": zeros,
            "direction": zeros.to(torch.bfloat16),
            "gain": torch.full((), self.gain, device=anchor.device),
        }

    def shape(self, part: str, anchor: Tensor) -> torch.Size:
        return torch.Size() if part == "gain" else anchor.shape

    def move(self, displacement: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        buffer, direction, gain = kept["buffer"], kept["direction"], kept["gain"]
        # Nothing can be said before the first jump, nor for a tensor that does not move: its gain stays.
        agreement = cosine(displacement, direction.to(displacement))
        factor = torch.exp(self.rate * (agreement - self.target))
        gain.mul_(torch.where(agreement.isnan(), 1.0, factor)).clamp_(self.min_gain, self.max_gain)
        buffer.lerp_(displacement, 1 - self.momentum)
        new = whitened(buffer) if self.whiten and buffer.ndim > 1 else buffer
        direction.copy_(new)
        return displacement.addcmul_(gain, new)

    def __repr__(self) -> str:
        return (
            f"SpectralNowcaster(momentum={self.momentum}, period={self.period}, gain={self.gain}, rate={self.rate}, "
            f"target={self.target}, max_gain={self.max_gain}, whiten={self.whiten})"
        )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between two tensors, a scalar on their device; NaN if one of them is 0."""
    return (a * b).sum() / (a.norm() * b.norm())


def whitened(matrix: Tensor) -> Tensor:
    """``|A| polar(A) / sqrt(rank)``: the same Frobenius norm, spread evenly over all singular directions.

    By matrix products alone; :func:`whitened_exactly` is the same by a singular value decomposition.  Singular values
    come out within 3% of equal, but for those below about 1/1000 of the norm, which stay smaller.

    Args:
        matrix: of two axes or more, float32; all but the first are taken together.

    Returns:
        The same shape and dtype; 0 for 0.
    """
    flat = matrix.flatten(1)
    wide = flat if flat.shape[0] <= flat.shape[1] else flat.mT
    tiny = torch.finfo(flat.dtype).tiny
    largest = wide.abs().amax().clamp_min(tiny)
    x = wide / largest
    norm = x.norm().clamp_min(tiny)
    x = x / norm
    for a, b, c in _STEPS:
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = torch.addmm(x, polynomial, x, beta=a)
    x = x if wide is flat else x.mT
    return (x * (largest * (norm / math.sqrt(min(flat.shape))))).reshape(matrix.shape)


def whitened_exactly(matrix: Tensor) -> Tensor:
    """The readable reference of :func:`whitened`."""
    flat = matrix.flatten(1)
    u, _, v = torch.linalg.svd(flat, full_matrices=False)
    return (u @ v * (flat.norm() / math.sqrt(min(flat.shape)))).reshape(matrix.shape)
