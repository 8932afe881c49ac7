"""Which elements of a parameter each rank holds, which rows are its own, and what has to travel between ranks.

A backend cuts parameters where it likes: FSDP2 between rows, FSDP1 and ZeRO anywhere, DDP not at all.  In all of them
each rank holds one *span* of the flattened parameter.  Nowcasts work on whole rows, each on one rank: where the spans
allow it, rows that this rank holds anyway.  A row that is cut in two goes to the rank that holds its end.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...nowcaster.shards import Rows

Span = tuple[int, int]
"""First element, and the one after the last, of a flattened parameter."""


@dataclass(frozen=True)
class Move:
    """Elements ``start`` to ``stop`` of the flattened parameter go from rank ``source`` to rank ``target``."""

    source: int
    target: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Layout:
    """How the ranks share one parameter.

    Args:
        shape: of the whole parameter.
        held: the span that each rank's memory holds; equal spans are replicas, all others are disjoint.

    Raises:
        ValueError: spans that overlap, or leave elements out.
    """

    shape: tuple[int, ...]
    held: tuple[Span, ...]

    def __post_init__(self) -> None:
        position = 0
        for start, stop in self._spans:
            if start != position:
                break
            position = stop
        if position != self.numel:
            raise ValueError(f"the ranks hold elements {self._spans} of {self.numel}, which do not adjoin")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def _spans(self) -> list[Span]:
        """The spans that are not empty, in order, each once."""
        return sorted({span for span in self.held if span[0] < span[1]})

    @cached_property
    def rows(self) -> tuple[Rows, ...]:
        """The rows of each rank, in the order of ranks."""
        total = self.shape[0] if self.shape else 1
        width = self.numel // total if total else 0
        place = {span: index for index, span in enumerate(self._spans)}
        groups = [place[span] for span in self.held if span in place]
        if not groups or groups != sorted(groups):  # replicas of one span do not follow each other
            size = len(self.held)
            return tuple(Rows(self.shape, total * i // size, total * (i + 1) // size) for i in range(size))
        members, seen = Counter(groups), Counter()
        rows, position = [], 0
        for span in self.held:
            if span in place:
                group = place[span]
                seen[group] += 1
                first, last = -(-span[0] // width), -(-span[1] // width)
                stop = first + (last - first) * seen[group] // members[group]
                rows.append(Rows(self.shape, position, stop))
                position = stop
            else:
                rows.append(Rows(self.shape, position, position))
        return tuple(rows)

    @cached_property
    def own(self) -> tuple[Span, ...]:
        """The elements of each rank's rows."""
        total = self.shape[0] if self.shape else 1
        width = self.numel // total if total else 0
        return tuple((rows.start * width, rows.stop * width) for rows in self.rows)

    @cached_property
    def holds_own(self) -> bool:
        """Whether every rank holds its own rows: nothing has to travel to read them."""
        return all(_within(own, held) for own, held in zip(self.own, self.held, strict=True))

    @cached_property
    def owns_held(self) -> bool:
        """Whether every rank holds nothing but its own rows: nothing has to travel to write them."""
        return all(_within(held, own) for own, held in zip(self.own, self.held, strict=True))

    def reads(self, rank: int) -> list[Move]:
        """What ``rank`` sends and receives for every rank to have its own rows."""
        wanted = [self.own[rank]] if self.holds_own else self.own
        first = rank if self.holds_own else 0
        return [m for target, span in enumerate(wanted, first) for m in self._fetch(span, target) if rank in _ends(m)]

    def writes(self, rank: int) -> list[Move]:
        """What ``rank`` sends and receives for every rank to have what it holds, from the owners of the rows."""
        return list(_deliver(self.own, self.held, rank))

    def gathers(self, rank: int) -> list[Move]:
        """What ``rank`` sends and receives for every rank to have everything."""
        return list(_deliver(self.own, [(0, self.numel)] * len(self.held), rank))

    def reordered(self, order: Sequence[int]) -> Layout:
        """The same with ranks in another order."""
        return Layout(self.shape, tuple(self.held[rank] for rank in order))

    def copied(self, held: Sequence[Span]) -> Layout:
        """The same rows, for another copy of the parameter, of which each rank holds ``held``."""
        layout = Layout(self.shape, tuple(held))
        layout.__dict__["rows"] = self.rows
        return layout

    def _fetch(self, span: Span, target: int) -> Iterator[Move]:
        position, stop = span
        mine = self.held[target]
        while position < stop:
            if mine[0] <= position < mine[1]:
                end, source = min(stop, mine[1]), target
            else:
                found = self._spans[bisect.bisect_right(self._spans, (position, self.numel)) - 1]
                end, source = min(stop, found[1]), self._first_holder[found]
            yield Move(source, target, position, end)
            position = end

    @cached_property
    def _first_holder(self) -> dict[Span, int]:
        return {span: rank for rank, span in reversed(list(enumerate(self.held)))}


def row_order(layouts: Iterable[Layout]) -> tuple[int, ...]:
    """Ranks in the order of the rows that they hold, those with equal spans next to each other.

    The largest parameter decides.  It is the order of ranks but where shards are replicated across them (HSDP).
    """
    largest = max(layouts, key=lambda layout: layout.numel)

    def place(rank: int) -> tuple[bool, Span, int]:
        start, stop = largest.held[rank]
        return start == stop, (start, stop) if start < stop else (0, 0), rank

    return tuple(sorted(range(len(largest.held)), key=place))


def _deliver(own: Sequence[Span], wanted: Sequence[Span], rank: int) -> Iterator[Move]:
    """From the owners of disjoint spans to all who want some of them: what ``rank`` sends, then what it receives."""
    for target, span in enumerate(wanted):
        if target != rank:
            yield from _overlap(rank, target, own[rank], span)
    for source, span in enumerate(own):
        yield from _overlap(source, rank, span, wanted[rank])


def _overlap(source: int, target: int, first: Span, second: Span) -> Iterator[Move]:
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    if start < stop:
        yield Move(source, target, start, stop)


def _within(inner: Span, outer: Span) -> bool:
    return inner[0] >= inner[1] or (outer[0] <= inner[0] and inner[1] <= outer[1])


def _ends(move: Move) -> tuple[int, int]:
    return move.source, move.target
