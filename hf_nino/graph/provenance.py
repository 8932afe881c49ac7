"""What a trace writes down: neurons, the edges that parameters make between them, and how neurons move together.

A *neuron id* is an integer handed out by :class:`Record`.  Ids may turn out to be the same neuron (query and key
channels, the two factors of a gate) and are then united; everything stored earlier is read through
:meth:`Record.find`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from .structure import EdgeType

NONE = -1
"""Stands in an id tensor where an activation belongs to no neuron."""


class Role(IntEnum):
    """What an attention layer uses a neuron for."""

    PLAIN = 0
    QUERY = 1
    KEY = 2
    VALUE = 3


@dataclass(frozen=True)
class Allocation:
    """Ids ``start .. start + size - 1``, handed out together because one axis of one parameter made them.

    Allocations of one ``family`` (the units of all experts) are one group of neurons, in the order of their ``rank``.
    """

    name: str
    kind: str
    start: int
    size: int
    family: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class ParameterUse:
    """One parameter (or a slice of it) between two lists of neurons.

    The element for source j, target i, feature f has flat index ``source_elements[j] + target_elements[i] +
    feature_elements[f]``.
    """

    parameter: str
    edge_type: EdgeType
    source: Tensor
    target: Tensor
    source_elements: Tensor
    target_elements: Tensor
    feature_elements: Tensor
    slice: int | None = None
    """Which matrix of a batch of them this is: the expert."""

    def elements(self) -> Tensor:
        """Flat indices, int64 [J, I, F]."""
        return self.source_elements[:, None, None] + self.target_elements[:, None] + self.feature_elements

    def range(self) -> tuple[int, int]:
        """The smallest and the largest flat index."""
        parts = (self.source_elements, self.target_elements, self.feature_elements)
        return sum(int(part.min()) for part in parts), sum(int(part.max()) for part in parts)


@dataclass
class Record:
    """The growing result of a trace."""

    allocations: list[Allocation] = field(default_factory=list)
    uses: list[ParameterUse] = field(default_factory=list)
    constants: list[tuple[EdgeType, Tensor, Tensor]] = field(default_factory=list)
    repeats: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stars: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shared: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    coarse: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    confined: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pin_reasons: list[str] = field(default_factory=list)
    routers: dict[str, Tensor] = field(default_factory=dict)
    """Parameter with one slice for each expert -> the neurons of the router that chooses among them."""
    held: dict[int, Tensor] = field(default_factory=dict)
    """A router's neuron -> the units of its expert."""
    last_router: Tensor | None = None
    choosers: list[Tensor] = field(default_factory=list)
    """Neurons among which the highest was chosen, by its number: all routers."""
    complex_pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Neurons that were read as real and imaginary part of one number."""
    count: int = 0

    def __post_init__(self) -> None:
        self._parent = np.empty(0, dtype=np.int64)
        self._read = np.empty(0, dtype=bool)
        self._pin = np.empty(0, dtype=np.int32)
        self._lost = np.empty(0, dtype=bool)
        self._role = np.empty(0, dtype=np.int8)

    def new_neurons(
        self,
        name: str,
        size: int,
        kind: str = "neuron",
        pinned: str | None = None,
        family: str | None = None,
        rank: int = 0,
    ) -> Tensor:
        """Hand out ``size`` fresh ids, int64 [size]."""
        start, self.count = self.count, self.count + size
        self.allocations.append(Allocation(name, kind, start, size, family, rank))
        if self.count > len(self._parent):
            self._reserve(self.count + self.count // 4)
        ids = torch.arange(start, self.count)
        if pinned is not None:
            self.pin(ids, pinned)
        return ids

    def _reserve(self, capacity: int) -> None:
        """Room for more ids than there are, so that a million of them are not copied for every new group."""
        more = capacity - len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(len(self._parent), capacity)])
        self._read, self._pin, self._lost, self._role = (
            np.concatenate([flags, np.zeros(more, dtype=flags.dtype)])
            for flags in (self._read, self._pin, self._lost, self._role)
        )

    def allocation(self, neuron: int) -> Allocation:
        """Which allocation an id comes from."""
        return self.allocations[bisect.bisect_right(self.allocations, neuron, key=lambda made: made.start) - 1]

    def find(self, ids: Tensor) -> Tensor:
        """The representative of each id; ``NONE`` stays ``NONE``."""
        flat = ids.numpy()
        found = np.where(flat >= 0, flat, 0)
        if self.count:
            while True:
                parents = self._parent[found]
                if np.array_equal(parents, found):
                    break
                found = parents
        return torch.from_numpy(np.where(flat >= 0, found, NONE))

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Declare the neurons of two lists, paired one to one, to be the same."""
        a, b = self.find(first).numpy(), self.find(second).numpy()
        low, high = np.minimum(a, b), np.maximum(a, b)
        self._parent[high] = low
        self._read[low] |= self._read[high]
        self._pin[low] = np.maximum(self._pin[low], self._pin[high])
        self._lost[low] |= self._lost[high]

    def mark_read(self, ids: Tensor) -> None:
        """Remember that a linear map has read these neurons: what is added to them later is a new place."""
        self._read[self._roots(ids)] = True

    def is_read(self, ids: Tensor) -> bool:
        return bool(self._read[self._roots(ids)].any())

    def pin(self, ids: Tensor, reason: str, lost: bool = False) -> None:
        """Give neurons an identity of their own; the first reason stays.

        With ``lost``, it is because they could not be followed any further: the heads that they belong to are not
        proposed for permutations either.
        """
        roots = self._roots(ids)
        self._lost[roots] |= lost
        if reason not in self.pin_reasons:
            self.pin_reasons.append(reason)
        number = self.pin_reasons.index(reason) + 1
        self._pin[roots] = np.where(self._pin[roots] == 0, number, self._pin[roots])

    def lose(self, ids: Tensor) -> None:
        """Leave the heads that these neurons belong to out of what is proposed."""
        self._lost[self._roots(ids)] = True

    def is_lost(self, ids: Tensor) -> bool:
        return bool(self._lost[self._roots(ids)].any())

    def pin_reasons_of(self, neurons: np.ndarray) -> list[str]:
        """Why some of these representatives are pinned, in the order of their first occurrence."""
        numbers, first = np.unique(self._pin[neurons], return_index=True)
        return [self.pin_reasons[n - 1] for n in numbers[np.argsort(first)] if n]

    def pinned(self, ids: Tensor) -> np.ndarray:
        return self._pin[self._roots(ids)] > 0

    def pinned_flags(self, neurons: np.ndarray) -> np.ndarray:
        """Whether each of these representatives is pinned, bool of the same shape."""
        return self._pin[neurons] > 0

    def lost_flags(self, neurons: np.ndarray) -> np.ndarray:
        """Whether each of these representatives was lost from sight, bool of the same shape."""
        return self._lost[neurons]

    def set_role(self, ids: Tensor, role: Role) -> None:
        """Give a role to every id of these neurons so far.

        Roles stay with the ids that parameters made, not with the neuron, which may be a query and a key at once.
        """
        roots = self._roots(ids)
        if not len(roots):
            return
        # The representative of a neuron is the lowest of its ids.
        candidates = torch.arange(int(roots[0]), self.count)
        same = candidates.numpy()[np.isin(self.find(candidates).numpy(), roots)]
        self._role[same[self._role[same] == Role.PLAIN]] = role

    def roles(self, ids: Tensor) -> np.ndarray:
        return self._role[ids.numpy()]

    def connect(self, edge_type: EdgeType, source: Tensor, target: Tensor) -> None:
        """Constant edges, paired element by element."""
        self.constants.append((edge_type, source.clone(), target.clone()))

    def repeat(self, parent: Tensor, child: Tensor) -> None:
        """Each parent neuron is copied to several children, which move with it."""
        self.repeats.append((parent.clone(), child.clone()))
        self.connect(EdgeType.RESIDUAL, parent, child)

    def _roots(self, ids: Tensor) -> np.ndarray:
        flat = self.find(ids.flatten()).numpy()
        return np.unique(flat[flat >= 0])


def compact(ids: Tensor) -> Tensor:
    """Shrink every dimension along which the ids do not change to size 1."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) == 0:
                ids = first
                continue
            if bool((ids == first).all()):
                ids = first
    return ids


def varying(ids: Tensor) -> tuple[int, ...]:
    """The dimensions along which compact ids change."""
    return tuple(dim for dim in range(ids.dim()) if ids.shape[dim] > 1)


def unique_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct pairs of two id tensors of the same shape, leaving out those with ``NONE``."""
    first, second = first.flatten(), second.flatten()
    valid = (first >= 0) & (second >= 0)
    base = int(second.max()) + 1 if second.numel() else 1
    code = (first * base + second)[valid].unique()
    return code // base, code % base


def is_function(source: Tensor) -> bool:
    """Whether no source occurs twice in a list of distinct pairs."""
    return source.unique().numel() == source.numel()
