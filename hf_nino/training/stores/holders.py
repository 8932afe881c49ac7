"""What this process's memory holds of one parameter, and how it is read and written."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from .layout import Span


class Holder(ABC):
    """One parameter, as this process holds it.

    Attributes:
        shape: of the whole parameter.
        dtype: of what is read.
        device: where it is.
        span: the elements of the flattened parameter that are here.
        copy: where a second copy is, to be written as well, if there is one.
        travels: whether reading and writing are collective operations: all ranks begin them together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    span: Span
    copy: Holder | None = None
    travels: ClassVar[bool] = False

    def reserve(self) -> None:
        """Take the memory that reading and writing need on the way, and give it back, where they are collective.

        What has to be allocated inside of such an operation comes after the others have begun it: a rank that runs out
        of memory there would leave them waiting.  After this, allocators that keep what they are given have it.
        """
        if self.travels:
            torch.empty(2 * math.prod(self.shape), dtype=self.dtype, device=self.device)

    @abstractmethod
    def read(self) -> Tensor:
        """The elements of :attr:`span`, flat; a view where possible.  Called on all ranks, parameter by parameter."""

    @abstractmethod
    def write(self, flat: Tensor) -> None:
        """Copy the elements of :attr:`span` into the model.  Called on all ranks, parameter by parameter."""


class Replica(Holder):
    """A parameter that is here whole.

    Attributes:
        id: of the parameter object.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self.id = id(parameter)
        self.shape, self.dtype, self.device = tuple(parameter.shape), parameter.dtype, parameter.device
        self.span = (0, parameter.numel())

    def read(self) -> Tensor:
        return self._parameter.detach().reshape(-1)

    def write(self, flat: Tensor) -> None:
        self._parameter.copy_(flat.view(self.shape))


class Slice(Holder):
    """A parameter of which a part of a flat tensor is here.

    Args:
        shape: of the whole parameter.
        part: one-dimensional view of the memory.
        start: its first element in the flattened parameter.
    """

    def __init__(self, shape: tuple[int, ...], part: Tensor, start: int) -> None:
        self._part = part.detach()
        self.shape, self.dtype, self.device = tuple(shape), part.dtype, part.device
        self.span = (start, start + part.numel())

    def read(self) -> Tensor:
        return self._part

    def write(self, flat: Tensor) -> None:
        self._part.copy_(flat)
