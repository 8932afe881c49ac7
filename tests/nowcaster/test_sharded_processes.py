"""Nowcasts on shards in two real processes, through a process group."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from nowcaster_cases import attention_graph, positions, random_nowcaster, trajectory
from ranks_cases import divided, put_together, rows_of, worst
from torch import Tensor

from hf_nino.nowcaster import Ranks, Shards, SpectralNowcaster

SIZE = 2


class ProcessRanks(Ranks):
    """The processes of the default group; gloo exchanges tensors of different sizes as one tensor in parts only."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in incoming]
        received = torch.empty(sum(sizes), dtype=incoming[0].dtype)
        sent = torch.cat([tensor.flatten() for tensor in outgoing])
        dist.all_to_all_single(received, sent, sizes, [tensor.numel() for tensor in outgoing])
        for tensor, part in zip(incoming, received.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


def both(states, shards=None):
    """Last nowcasts of a graph network and of three whitened jumps, of whole states or of a rank's rows."""
    graph, spectral = attention_graph(), SpectralNowcaster()
    network = random_nowcaster()
    foreseen = network.nowcast(graph, states, 3, pos=positions(graph), shards=shards)
    jumps = [spectral.nowcast(None, [state], shards=shards) for state in states[:4]]
    return foreseen, jumps[-1]


def ranges():
    graph = attention_graph()
    return divided({name: graph.shapes[name] for name in graph.parameter_names}, SIZE, seed=1)


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
    try:
        assert dist.get_world_size() == SIZE
        rows = [rows_of(ranges(), rank, state) for state in trajectory(attention_graph())]
        torch.save(both(rows, Shards(ranges(), ProcessRanks())), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_foresee_what_one_does(tmp_path):
    """The rows of two processes, put together, are the nowcasts of one, to 1e-5 of their steps."""
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=SIZE)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    states = trajectory(attention_graph())
    for ours, expected, last in zip(zip(*parts, strict=True), both(states), (states[-1], states[3]), strict=True):
        assert worst(put_together(ranges(), ours), expected, last) < 1e-5
        # Negative control: a rank's rows are not both ranks' rows.
        assert not any(part["c_attn.weight"].shape == expected["c_attn.weight"].shape for part in ours)
