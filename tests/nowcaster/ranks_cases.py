"""Ranks that are threads of one process, ways to divide parameters among them, and networks to divide."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from nowcaster_cases import Builder
from torch import Tensor

from hf_nino.graph import EdgeType, NeuralGraph
from hf_nino.nowcaster import Ranks, Rows, Shards

SECONDS = 60
"""After which a rank that waits for the others gives up."""


class Meeting:
    """Where the threads meet, and a record of what they said."""

    def __init__(self, size: int, forget: frozenset[int] = frozenset()) -> None:
        self.size, self.forget = size, forget
        self.barrier = threading.Barrier(size)
        self.said: list[Any] = [None] * size
        self.sums: list[int] = []  # numbers in each sum
        self.sent = 0  # numbers in all exchanges


class ThreadRanks(Ranks):
    """One thread of a :class:`Meeting`; fails if ranks say different things, as real ones would hang."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        tensors = list(tensors)
        all_said = self._say(("sum", [(each.shape, each.dtype) for each in tensors]), [t.clone() for t in tensors])
        number = len(self.meeting.sums)
        self.meeting.barrier.wait(SECONDS)
        if self.rank == 0:
            self.meeting.sums.append(sum(each.numel() for each in tensors))
        if number not in self.meeting.forget:
            for position, tensor in enumerate(tensors):
                total = all_said[0][position].clone()
                for others in all_said[1:]:
                    total += others[position]
                tensor.copy_(total)
        self.meeting.barrier.wait(SECONDS)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        assert len(outgoing) == len(incoming) == self.size
        assert all(each.is_contiguous() for each in (*outgoing, *incoming))
        (dtype,) = {each.dtype for each in (*outgoing, *incoming)}
        all_said = self._say(("exchange", dtype), list(outgoing))
        for rank, tensor in enumerate(incoming):
            assert tensor.shape == all_said[rank][self.rank].shape
            tensor.copy_(all_said[rank][self.rank])
        self.meeting.barrier.wait(SECONDS)
        if self.rank == 0:
            self.meeting.sent += sum(each.numel() for every in all_said for each in every)

    def _say(self, what: tuple[str, Any], value: list[Tensor]) -> list[list[Tensor]]:
        self.meeting.said[self.rank] = what, value
        self.meeting.barrier.wait(SECONDS)
        assert all(heard == what for heard, _ in self.meeting.said), "ranks take part in different collectives"
        all_said = [value for _, value in self.meeting.said]
        self.meeting.barrier.wait(SECONDS)
        return all_said


class Mute(Ranks):
    """A rank that may not say anything."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        raise AssertionError("a collective where there must be none")

    exchange = sum_


Ranges = Mapping[str, tuple[Rows, ...]]


def divided(shapes: Mapping[str, tuple[int, ...]], size: int, seed: int | None = None) -> Ranges:
    """Rows for each rank: as even as can be, or (with a seed) anyhow, some ranks without any of some."""
    generator = torch.Generator().manual_seed(seed or 0)
    ranges = {}
    for name, shape in sorted(shapes.items()):
        shape = tuple(shape)
        total = Rows.all(shape).total
        cuts = [total * rank // size for rank in range(size + 1)]
        if seed is not None:
            cuts[1:-1] = torch.randint(total + 1, (size - 1,), generator=generator).sort().values.tolist()
        ranges[name] = tuple(Rows(shape, start, stop) for start, stop in pairwise(cuts))
    return ranges


def rows_of(ranges: Ranges, rank: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A rank's rows of a state, new tensors."""
    return {name: ranges[name][rank].of(tensor).clone() for name, tensor in state.items()}


def put_together(ranges: Ranges, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole state of which each rank has a part."""
    whole = {}
    for name, rows in ranges.items():
        assert [tuple(part[name].shape) for part in parts] == [each.local_shape for each in rows], name
        whole[name] = torch.cat([part[name].reshape(-1) for part in parts]).view(rows[0].shape)
    return whole


def on_ranks(ranges: Ranges, size: int, work: Callable[[Shards], Any], meeting: Meeting | None = None) -> list[Any]:
    """What each rank's ``work`` returns; all work at the same time, in threads that are called by their rank."""
    meeting = meeting or Meeting(size)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Shards(ranges, ThreadRanks(rank, meeting)))
        except BaseException as failure:
            failures.append(failure)
            meeting.barrier.abort()

    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision  # a setting of the process, which the engine puts back one thread at a time
    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    matmul.fp32_precision = before
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    assert not failures
    return results


def worst(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> float:
    """The largest difference of a nowcast from the expected one, relative to the largest step of its parameter."""
    assert ours.keys() == expected.keys()
    steps = {name: float((expected[name] - last[name]).abs().max()) for name in expected}
    assert all(step > 0 for step in steps.values())
    return max(float((ours[name] - expected[name]).abs().max()) / steps[name] for name in expected)


def taps_in_rows_graph() -> NeuralGraph:
    """A matrix [positions of 4 channels, outputs] whose positions are taps: rows cut every edge."""
    b = Builder()
    channels, hidden, out = b.group("c", 4, "input", "input"), b.group("h", 6), b.group("y", 5, pinned="output")
    b.shapes["flat.weight"] = (12, 6)
    b.block("flat.weight", EdgeType.LINEAR, channels, hidden, (6,), (1,), feature_sizes=(3,), feature_strides=(24,))
    b.shapes["other.weight"] = (8, 6)
    b.block("other.weight", EdgeType.LINEAR, channels, hidden, (12,), (1,), feature_sizes=(2,), feature_strides=(6,))
    b.linear("head", hidden, out)
    return b.build()
