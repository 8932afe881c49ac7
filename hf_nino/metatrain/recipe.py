"""How a run is recorded: how often, in which dtype, and what of the parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How runs are recorded.

    Args:
        every: steps between snapshots.
        dtype: of the recorded parameters: ``"float32"``, ``"bfloat16"`` or ``"float16"``; the narrow ones round small
            moves away.
        max_rows: of an embedding with more rows so many are kept, the same ones at every step; ``None``: all.
        moments: whether those of the optimizer are recorded too.

    Raises:
        ValueError: a setting is out of range.
    """

    every: int = 10
    dtype: str = "float32"
    max_rows: int | None = 1024
    moments: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {self.every}")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, or None to keep all, got {self.max_rows}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the recorded parameters."""
        return DTYPES[self.dtype]

    @property
    def moments_dtype(self) -> torch.dtype:
        """Of recorded moments: squared gradients vanish in float16, so beside float16 states they are bfloat16."""
        return torch.bfloat16 if self.torch_dtype == torch.float16 else self.torch_dtype
