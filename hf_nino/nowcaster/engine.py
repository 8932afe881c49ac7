"""How a nowcast is computed, apart from what: precision and memory.  No setting changes the function."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .precision import check_precision, rounds
from .tiles import tile_edges


@dataclass(frozen=True)
class Engine:
    """Settings of :func:`hf_nino.nowcaster.blockwise.blockwise`; the defaults suit every device.

    Args:
        precision: ``"float32"`` (the default: equal to the reference) or ``"fast"``, see
            :mod:`hf_nino.nowcaster.precision`.
        memory: bytes that tiles may take; ``None`` leaves it to the device's rule, see
            :mod:`hf_nino.nowcaster.tiles`.  What does not depend on tiles comes on top: the nodes, N x H numbers a
            few times over, and the prediction itself.
        tile: edges of a tile, instead of the rule; ``memory`` bounds it all the same.
        recompute: with gradients, compute every tile again in the backward pass instead of keeping it: memory stays
            bounded, for a third more time.

    Raises:
        ValueError: an unknown precision, or a number that is not a positive whole one.
    """

    precision: str = "float32"
    memory: int | None = None
    tile: int | None = None
    recompute: bool = True

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for name in ("memory", "tile"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` of an Engine must be a positive whole number or None, got {value!r}")

    def rounds(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the products of edges are rounded on this device."""
        return rounds(self.precision, device, dtype)

    def tile_edges(self, device: torch.device, dtype: torch.dtype, hidden_size: int) -> int:
        """Edges of a tile, samples counted."""
        return tile_edges(device, dtype, hidden_size, memory=self.memory, edges=self.tile)
