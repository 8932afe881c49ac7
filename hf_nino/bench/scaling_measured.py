"""What :mod:`hf_nino.bench.scaling` counts on paper, measured: real processes that talk over gloo, small models."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..graph import NeuralGraph
from ..graph.build import build_graph
from ..nowcaster import Nowcaster, Ranks
from ..training.history import History
from ..training.stores import make_store
from .engine.models import SHAPES, Shape, trajectory
from .scaling import cost_of, fully_sharded, usual_nowcasters

MEASURED = next(shape for shape in SHAPES if shape.name == "gpt2-1M")
SIZES = (1, 2, 4)


class Counted:
    """Counts what a rank says, while it says it.

    Attributes:
        summed_bytes, exchanged_bytes, collectives: see :class:`hf_nino.bench.scaling.Cost`.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.summed_bytes = self.exchanged_bytes = self.collectives = 0
        self.ranks = ranks
        if ranks is not None:
            self._sum, self._exchange = ranks.sum_, ranks.exchange

    def __enter__(self) -> Counted:
        if self.ranks is not None:
            self.ranks.sum_, self.ranks.exchange = self._count_sum, self._count_exchange
        return self

    def __exit__(self, *_: Any) -> None:
        if self.ranks is not None:
            del self.ranks.sum_, self.ranks.exchange

    def _count_sum(self, tensors: Sequence[Tensor]) -> None:
        self.collectives += 1
        self.summed_bytes += sum(_size(tensor) for tensor in tensors)
        self._sum(tensors)

    def _count_exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        self.collectives += 1
        self.exchanged_bytes += sum(_size(part) for rank, part in enumerate(outgoing) if rank != self.ranks.rank)
        self._exchange(outgoing, incoming)


def measured(nowcaster: Nowcaster, shape: Shape, backend: str = "fsdp2") -> dict[str, float]:
    """What this rank keeps, says and works for one nowcast that is written; the process group is running.

    Args:
        backend: ``"fsdp2"`` or ``"ddp"``.

    Returns:
        The counts of :class:`hf_nino.bench.scaling.Cost` that can be measured, collectives of the nowcast alone, and
        ``seconds``, of this process's own work.
    """
    torch.manual_seed(0)
    model = shape.model()
    graph = build_graph(model, verify=False)
    store = make_store(_wrapped(model, backend))
    shards = store.shards()
    shapes = {name: graph.shapes[name] for name, *_ in store.signature()}
    history = History(nowcaster.context)
    if nowcaster.has_memory:
        nowcaster.settle(store.live(), **_told(shards))
    for step, state in enumerate(trajectory(shapes, nowcaster.context + 1, torch.device("cpu"), torch.float32)):
        own = state if shards is None else {name: shards.local(name).of(tensor) for name, tensor in state.items()}
        if step:
            history.append(own, step)
    states = history.states()
    ranks = None if shards is None else shards.ranks
    started = time.process_time()
    with Counted(ranks) as nowcasting:
        prediction = nowcaster.nowcast(graph, states, 1, **_told(shards))
    seconds = time.process_time() - started
    with Counted(ranks) as writing:
        store.write(prediction)
    return {
        "own_parameters": sum(tensor.numel() for tensor in prediction.values()),
        "history_bytes": sum(_size(tensor) for state in states for tensor in state.values()),
        "carried_bytes": sum(_size(tensor) for tensor in nowcaster.memory().values()),
        "summed_bytes": nowcasting.summed_bytes,
        "exchanged_bytes": nowcasting.exchanged_bytes + writing.exchanged_bytes,
        "collectives": nowcasting.collectives,
        "seconds": seconds,
    }


def measure(shape: Shape = MEASURED, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """Fully sharded over as many processes, one thread each: the first rank's counts, on paper and measured.

    Returns:
        For every nowcaster and number of processes: what :func:`measured` found, ``on_paper`` the same counts of
        :func:`hf_nino.bench.scaling.cost_of`, and ``share``, the seconds over those of one process.

    Raises:
        Exception: what a process raised.
    """
    graph, nowcasters = build_graph(shape.model("meta"), verify=False), usual_nowcasters()
    rows, alone = [], dict.fromkeys(nowcasters, math.nan)
    for size in sizes:
        for name, found in _in_processes(shape, size).items():
            paper = cost_of(nowcasters[name], graph, fully_sharded(_shapes(graph), size))
            alone[name] = found["seconds"] if size == 1 else alone[name]
            counts = {key: getattr(paper, key) for key in found if key != "seconds"}
            share = found["seconds"] / alone[name]
            rows.append({"nowcaster": name, "ranks": size, **found, "on_paper": counts, "share": share})
    return sorted(rows, key=lambda row: list(nowcasters).index(row["nowcaster"]))


def _in_processes(shape: Shape, size: int) -> dict[str, dict[str, Any]]:
    """What the first of so many processes found, by nowcaster."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (size, folder, shape), nprocs=size)
        return json.loads(Path(folder, "0.json").read_text())


def _process(rank: int, size: int, folder: str, shape: Shape) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        best = {}
        for name, nowcaster in usual_nowcasters().items():
            found = [measured(nowcaster, shape) for _ in range(2)]
            best[name] = min(found, key=lambda each: each["seconds"])
        Path(folder, f"{rank}.json").write_text(json.dumps(best))
        dist.barrier()  # others may still be reading what this rank has sent
    finally:
        dist.destroy_process_group()
    # An interpreter that goes down ends threads that ask for the GIL, as those of gloo may to forget a tensor: this
    # unwinds through C++ that does not allow it, and aborts.  A process aborted so once (torch 2.13).
    os._exit(0)


def _wrapped(model: nn.Module, backend: str) -> nn.Module:
    if backend == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _shapes(graph: NeuralGraph) -> Mapping[str, tuple[int, ...]]:
    return {name: graph.shapes[name] for name in graph.parameter_names}


def _told(shards: Any) -> dict[str, Any]:
    return {} if shards is None else {"shards": shards}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
