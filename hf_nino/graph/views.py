"""Tensors all of whose elements are elements of one parameter, and which of them lies where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST = 2**24
"""Elements beyond which a view that strides cannot describe is not followed any further."""


@dataclass(frozen=True)
class ParameterView:
    """A view, or a copy in another order, of a parameter.

    The element at place (i, j, ..) has the flat index ``start + dim_elements(0)[i] + dim_elements(1)[j] + ..``.
    """

    parameter: str
    shadow: Tensor
    """Meta tensor with the strides and offset of the view in the contiguous, flattened parameter."""
    slice: int | None = None
    """The index along the parameter's first axis, where one was selected: the expert."""
    slices: int = 0
    """How many there are."""
    gains: tuple[ParameterView, ...] = ()
    """Other parameters that its elements were multiplied with, in the same shape (expanded): weight normalisation."""
    lists: tuple[Tensor, ...] | None = None
    """Offsets along each dimension where strides cannot say them (two axes flattened in another order); of the shadow
    only the shape counts then."""
    base: int = 0
    """Flat index of the first element; only with ``lists``."""

    @property
    def start(self) -> int:
        """Flat index of the first element."""
        return self.shadow.storage_offset() if self.lists is None else self.base

    @property
    def elements_dims(self) -> tuple[int, ...]:
        """Dimensions along which different elements of the parameter lie."""
        return tuple(dim for dim, size in enumerate(self.shadow.shape) if size > 1 and self._moves(dim))

    def _moves(self, dim: int) -> bool:
        return self.shadow.stride(dim) != 0 if self.lists is None else bool(self.lists[dim].any())

    def dim_elements(self, dim: int) -> Tensor:
        """Offsets of the elements along one dimension, int64 [size]."""
        if self.lists is not None:
            return self.lists[dim]
        return torch.arange(self.shadow.shape[dim]) * self.shadow.stride(dim)

    def with_shadow(self, shadow: Tensor) -> ParameterView:
        """The same elements in another shape: dimensions of size 1 added or removed, or such dimensions expanded."""
        if self.lists is None:
            return replace(self, shadow=shadow)
        left = [offsets for offsets in self.lists if len(offsets) > 1]
        lists = []
        for size in reversed(shadow.shape):
            lists.append(left.pop() if left and len(left[-1]) == size else torch.zeros(size, dtype=torch.int64))
        return replace(self, shadow=shadow, lists=tuple(reversed(lists)))

    def at(self, index: int) -> ParameterView:
        """The view at one index of its first dimension, which becomes its slice."""
        first = int(self.dim_elements(0)[index])
        lists = None if self.lists is None else self.lists[1:]
        slices = self.shadow.shape[0]
        return replace(
            self, shadow=self.shadow[index], slice=index, slices=slices, lists=lists, base=self.base + first
        )

    def elements(self) -> Tensor:
        """Flat indices, int64 of the view's shape."""
        total = torch.tensor(self.start)
        for dim in range(self.shadow.dim()):
            total = total[..., None] + self.dim_elements(dim)
        return total

    def reordered(self, elements: Tensor) -> ParameterView | None:
        """The view whose flat indices these are; ``None`` where they are no sum of one list for each dimension."""
        if elements.numel() == 0 or elements.numel() > LARGEST:
            return None
        base = elements.flatten()[0]
        corner = [0] * elements.dim()
        lists = []
        for dim in range(elements.dim()):
            line: Sequence[int | slice] = [*corner[:dim], slice(None), *corner[dim + 1 :]]
            lists.append(elements[tuple(line)] - base)
        view = replace(
            self, shadow=torch.empty(elements.shape, device="meta"), lists=tuple(lists), base=int(base), gains=()
        )
        return view if view.elements().equal(elements) else None

    @property
    def is_small(self) -> bool:
        """Whether its elements may be listed."""
        return math.prod(self.shadow.shape) <= LARGEST
