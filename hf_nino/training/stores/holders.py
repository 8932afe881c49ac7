"""What this process's memory holds of one parameter, and how it is read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    span: Span
    copy: Holder | None = None

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
