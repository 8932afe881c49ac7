r"""A few dozen numbers that stand for all parameters: a random projection that keeps distances.

Entry :math:`j` of the projection of a tensor :math:`x` with :math:`P` elements is

.. math:: \sum_{r} s_r \, x_{r D + j}, \qquad s_r = \pm 1,

and the projections of all tensors are summed: a count sketch (Charikar et al., 2002) whose buckets take turns.  The
signs are independent, so inner products and squared distances come out right on average, with a relative error of
about :math:`\sqrt{2 / D}`: 18% for 64 numbers, which is enough to see a path.  One pass over the parameters, one
matrix-vector product, no matrix kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

DIMENSIONS = 64
# Elements that are converted to float32 at once.
_CHUNK = 2**22


@torch.no_grad()
def project(state: Mapping[str, Tensor], dimensions: int = DIMENSIONS) -> list[float]:
    """The projection of ``state``: the same function of the same names and shapes, on every device and in every run.

    Args:
        state: {name: tensor}, floating point.
        dimensions: D.

    Returns:
        D numbers, rounded to 8 digits.
    """
    total: dict[torch.device, Tensor] = {}
    for name, tensor in state.items():
        part = _project(tensor.detach().reshape(-1), zlib.crc32(name.encode()), dimensions)
        total[part.device] = total[part.device] + part if part.device in total else part
    numbers = torch.stack([part.double().cpu() for part in total.values()]).sum(0).tolist()
    return [float(f"{number:.8g}") for number in numbers]


def _project(flat: Tensor, seed: int, dimensions: int) -> Tensor:
    # Signs are drawn on the host, whose generator is the same everywhere.
    generator = torch.Generator().manual_seed(seed)
    rows_at_once = max(_CHUNK // dimensions, 1)
    total = flat.new_zeros(dimensions, dtype=torch.float32)
    for start in range(0, flat.numel(), rows_at_once * dimensions):
        chunk = flat[start : start + rows_at_once * dimensions].float()
        rows = -(-chunk.numel() // dimensions)
        chunk = torch.nn.functional.pad(chunk, (0, rows * dimensions - chunk.numel())).view(rows, dimensions)
        signs = torch.randint(2, (rows,), generator=generator, dtype=torch.int8).to(flat.device).float()
        total += (2 * signs - 1) @ chunk
    return total
