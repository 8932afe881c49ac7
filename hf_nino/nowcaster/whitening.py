"""The polar factor of a matrix by matrix products alone, and how even singular values are."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Coefficients of x <- a x + b xx'x + c (xx')^2 x.  Five steps of Muon's (Jordan et al., 2024) take every singular
# value that is not tiny from (0, 1] to 0.7 .. 1.2; two of Newton and Schulz take it from there to within 3% of 1.
STEPS = ((3.4445, -4.7750, 2.0315),) * 5 + ((1.5, -0.5, 0.0),) * 2
# So many times as wide as tall, a matrix is whitened by way of its Gram matrix: fewer operations from about 1.75 on.
_LONG = 2
# The shorter side from which products are in bfloat16 where that is several times as fast.  Smaller matrices take next
# to nothing, and are the same everywhere.  So many times as wide as tall, the Gram matrix in float32 is faster still.
_LARGE, _VERY_LONG = 256, 16


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between two tensors, a scalar on their device; NaN if one of them is 0."""
    return torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())


def whiteness_of_noise(shape: tuple[int, ...]) -> float:
    """``cos(A, polar(A))``, the mean singular value over its root mean square, of a large matrix of Gaussian noise.

    8 / (3 pi) for a square one and nearly 1 for a narrow one, by the law of Marchenko and Pastur; in between within
    0.01 of it.  1 is a matrix whose singular values are all equal.

    Args:
        shape: two axes or more; all but the first are taken together.
    """
    short, long = _sides(shape)
    return 1 - (1 - 8 / (3 * math.pi)) * short / long


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shorter and the longer side of a matrix or a kernel."""
    rows, columns = shape[0], math.prod(shape[1:])
    return min(rows, columns), max(rows, columns)


def whitened(matrix: Tensor) -> Tensor:
    """``|A| polar(A) / sqrt(rank)``: the same Frobenius norm, spread evenly over all singular directions.

    By matrix products alone; :func:`whitened_exactly` is the same by a singular value decomposition.  Singular values
    come out within 3% of equal, but for those below about 1/1000 of the norm, which stay smaller.

    Args:
        matrix: of two axes or more, float32; all but the first are taken together.  The products are in
            :func:`whitening_dtype`.

    Returns:
        The same shape and dtype; 0 for 0.
    """
    flat = matrix.flatten(1)
    wide = flat if flat.shape[0] <= flat.shape[1] else flat.mT
    tiny = torch.finfo(flat.dtype).tiny
    largest = torch.linalg.vector_norm(wide, torch.inf).clamp_min(tiny)
    x = wide / largest
    norm = x.norm().clamp_min(tiny)
    x.div_(norm)
    if whitening_dtype(matrix.shape, matrix.device) == torch.bfloat16:
        x = polar_by_steps(x.to(torch.bfloat16)).to(x.dtype)
    else:
        x = polar_by_gram(x) if x.shape[1] >= _LONG * x.shape[0] else polar_by_steps(x)
    x = x if wide is flat else x.mT
    return (x * (largest * (norm / math.sqrt(min(flat.shape))))).reshape(matrix.shape)


def polar_by_steps(x: Tensor) -> Tensor:
    """``U V'`` of ``x = U S V'`` with S in (0, 1], at most as tall as wide: every step is applied to x."""
    for a, b, c in STEPS:
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def polar_by_gram(x: Tensor) -> Tensor:
    """The same with the steps gathered in ``q``, for which ``x`` becomes ``q x`` and ``x x'`` becomes ``q x x' q``:
    only two products are as long as x is, where :func:`polar_by_steps` has two in every step."""
    gram = x @ x.mT
    q: Tensor | None = None
    for a, b, c in STEPS:
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        step.diagonal().add_(a)
        q = step if q is None else step @ q
        gram = step @ gram @ step
    return q @ x


def whitened_exactly(matrix: Tensor) -> Tensor:
    """The readable reference of :func:`whitened`."""
    flat = matrix.flatten(1)
    u, _, v = torch.linalg.svd(flat, full_matrices=False)
    return (u @ v * (flat.norm() / math.sqrt(min(flat.shape)))).reshape(matrix.shape)


def whitening_dtype(shape: tuple[int, ...], device: torch.device | str) -> torch.dtype:
    """In which :func:`whitened` multiplies a matrix of this shape: bfloat16 if that is worth it, on GPUs and on CPUs
    that have instructions for it; else float32."""
    fast = worth_bfloat16(shape) and _multiplies_bfloat16(torch.device(device).type)
    return torch.bfloat16 if fast else torch.float32


def worth_bfloat16(shape: tuple[int, ...]) -> bool:
    """Whether a matrix is large, and no longer than a feed-forward layer's.

    In bfloat16 it is 5 to 7 times as fast (384 x 384 to 1024 x 1024, one core with AMX), and the direction is as good:
    its cosine with the exact one was lower by at most 0.0004 where singular values fall by 100 times, and by 0.003
    where they fall by 1000 times, where that of float32 is 0.96.  The way by the Gram matrix is not for bfloat16: it
    loses what is small.
    """
    short, long = _sides(shape)
    return short >= _LARGE and long < _VERY_LONG * short


@cache
def _multiplies_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device == "cpu" and has_tiles is not None and bool(has_tiles())


def whitening_operations(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Floating-point operations of the products in :func:`whitened`, in the dtype that they have there."""
    short, long = _sides(shape)
    cubic = sum(bool(c) for _, _, c in STEPS)
    if dtype != torch.float32 or long < _LONG * short:
        return 4 * short**2 * long * len(STEPS) + 2 * short**3 * cubic
    return 4 * short**2 * long + 2 * short**3 * (cubic + 3 * len(STEPS) - 1)
