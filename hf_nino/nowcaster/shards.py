"""Which rank works on which rows of which parameter, and what ranks say to each other during a nowcast.

A nowcaster that is given :class:`Shards` reads and returns, for every parameter, only the rows of this rank: a range
of the first axis.  Whatever it needs to know of the others goes through :class:`Ranks`.  How a backend (DDP, FSDP,
ZeRO, tensor parallel) brings its own layout into rows is the business of ``hf_nino.training``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A range of the first axis of a parameter; a scalar has one row.

    Args:
        shape: of the whole parameter.
        start, stop: rows, ``0 <= start <= stop <= number of rows``; none if they are equal.

    Raises:
        ValueError: a range that is not within the parameter.
    """

    shape: tuple[int, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.total:
            raise ValueError(
                f"`start` and `stop` must be rows of a parameter of shape {self.shape}, got {self.start}, {self.stop}"
            )

    @classmethod
    def all(cls, shape: tuple[int, ...]) -> Rows:
        """Every row of a parameter."""
        return cls(shape, 0, shape[0] if shape else 1)

    @property
    def total(self) -> int:
        """Rows of the whole parameter."""
        return self.shape[0] if self.shape else 1

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of these rows: that of the parameter but for the first axis; ``()`` or ``(0,)`` for a scalar."""
        if not self.shape:
            return () if self.count else (0,)
        return (self.count, *self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    def of(self, whole: Tensor) -> Tensor:
        """These rows of a whole parameter, a view."""
        if not self.shape:
            return whole if self.count else whole.reshape(1)[:0]
        return whole[self.start : self.stop]


class Ranks(ABC):
    """The processes that train one model together.

    Every method is collective: all ranks call it in the same order, with tensors of the same number, shapes and dtypes
    where nothing else is said.  Tensors may be on any device, whatever the backend that carries them can send.

    A call may raise because another rank has failed since the last one: whoever is told so lets it pass, and is asked
    nothing more.

    Attributes:
        rank: of this process, 0 .. size - 1.
        size: number of processes.
    """

    rank: int
    size: int

    @abstractmethod
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the ranks, in place; afterwards every rank holds the same bits."""

    @abstractmethod
    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Send ``outgoing[r]`` to rank r and receive ``incoming[r]`` from it, contiguous tensors of one dtype.

        Sizes may differ between ranks, and be 0; ``incoming[r]`` here has the size of ``outgoing[self.rank]`` there.
        """


@dataclass(frozen=True, eq=False)
class Shards:
    """The rows of every rank.

    Args:
        ranges: for every parameter the rows of each rank, in the order of ranks: adjoining and together the whole.
        ranks: how to talk to the others.

    Raises:
        ValueError: ranges that leave rows out, overlap, or are not one for each rank.
    """

    ranges: Mapping[str, tuple[Rows, ...]]
    ranks: Ranks

    def __post_init__(self) -> None:
        for name, ranges in self.ranges.items():
            if len(ranges) != self.ranks.size:
                raise ValueError(f"`ranges` of {name!r} must be one for each of {self.ranks.size} ranks: {ranges}")
            position = 0
            for rows in ranges:
                if rows.start != position and rows.count:
                    raise ValueError(f"`ranges` of {name!r} must adjoin, from row 0 on, got {ranges}")
                position = rows.stop if rows.count else position
            if position != ranges[0].total:
                raise ValueError(f"`ranges` of {name!r} must hold all {ranges[0].total} rows, got {ranges}")

    def local(self, name: str) -> Rows:
        """The rows of this rank."""
        return self.ranges[name][self.ranks.rank]
