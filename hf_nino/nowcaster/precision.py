"""How exactly the engine multiplies: modes by name, and what keeps the fast one close.

``"float32"``
    Every product in full float32, whatever the process allows elsewhere (TF32 for training, say).  Scaled deltas equal
    the reference to 1e-5.  **The default**: a nowcast takes little of a run's time, and a prediction that does not
    depend on the machine is worth more than the rest of it.

``"fast"``
    Tensors and sums stay float32; matrix products round their factors to what the device's matrix units take: bfloat16
    on CPUs that have them (AMX, AVX512-BF16), TF32 on CUDA.  Other devices compute as in ``"float32"``.  With the
    original release's network, on real trajectories and in bfloat16, the predicted step was off by 0.5 percent of its
    norm, and by 2 percent for the worst parameter; a test holds it to 1 and 4 percent.

Only the products of edges with matrices H x H are rounded, which are nearly all of the work.  Products that read
states never are: snapshots differ by a percent of their spread or less, and that is what bfloat16 rounds away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

PRECISIONS = ("float32", "fast")


def check_precision(precision: str) -> str:
    """``precision`` itself.

    Raises:
        ValueError: no mode of this name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}, got {precision!r}")
    return precision


def rounds(precision: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products of this dtype on this device are rounded in this mode."""
    if precision != "fast" or dtype != torch.float32:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_multiplies_bfloat16()


@contextmanager
def products(rounded: bool) -> Iterator[None]:
    """Within it, float32 matrix products are rounded to what matrix units take, or else exact, on all devices.

    These are settings of the process, so the block must not give control back to anyone (no ``yield`` inside).
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision, cpu.fp32_precision = ("tf32", "bf16") if rounded else ("ieee", "ieee")
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


@lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    """Whether a product on this CPU is rounded when it may be: without the instructions it stays in float32."""
    factor = torch.full((64, 64), 1 + 2**-12)
    with products(rounded=True):
        return bool((factor @ torch.eye(64) != factor).any())
