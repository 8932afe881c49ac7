"""What nowcasts cost on many ranks, on paper: memory, bytes between ranks and seconds, for models that fit no machine.

Everything is counted from the neural graph and from the rows that each rank would have, by the rules that the real
thing follows; nothing is trained, and no weights are made.  Only the seconds rest on rates, those of :class:`Machine`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from ..graph import NeuralGraph
from ..graph.build import build_graph
from ..nowcaster import (
    Engine,
    LinearNowcaster,
    NiNoModel,
    Nowcaster,
    NowcasterConfig,
    Ranks,
    Shards,
    SpectralNowcaster,
)
from ..nowcaster.operations import operations, working_memory
from ..nowcaster.owners import rounds
from ..nowcaster.portion import portion_of
from ..nowcaster.whitening import whitening_operations, worth_bfloat16
from ..training.stores.layout import Layout
from .engine.models import SHAPES, Shape

RANKS = (1, 8, 64, 512)
STATE = torch.float32
"""Of snapshots, and of parameters as their optimizer sees them."""
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
LLAMA_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = (
    *(shape for shape in SHAPES if shape.name in {"llama-1B", "llama-8B"}),
    Shape("llama-70B", "llama", LLAMA_70B),
)
"""The shapes of Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B."""

TILE = 1 << 16
"""Edges of a tile; on a real machine its cache or a timing says."""
TRAFFIC = 3 * STATE.itemsize
"""Bytes per parameter of snapshots and predictions: two are read (by a spectral nowcast one twice), one is written."""
SPECTRAL_MEMORY = 148
"""Bytes per parameter that the elementwise operators of a spectral nowcast read and write beside these."""


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.  Assumptions, to be replaced by what a machine really does.

    Args:
        flops: float32 operations per second of matrix products, as far as nowcasts reach them.  Default: a third of
            an H100's 67 TFLOP/s outside its tensor cores; on CPUs the engine reaches 32 to 40 percent.
        half_flops: the same in bfloat16, for large matrices that are whitened.  Default: a third of an H100's 989.
        states: bytes per second at which snapshots are read and predictions written.  Default: they are in host
            memory, behind PCIe 5 x16.  With ``history_device="model"`` it is the device's memory, 60 times as fast.
        memory: bytes per second of the memory that the model is in, which is where nowcasters keep what they carry.
            Default: an H100's.
        network: bytes per second that a rank sends, while it receives as many.  Default: 400 Gbit/s for each rank.
        latency: seconds of one step of a collective, which takes log2 of the number of ranks of them.
    """

    flops: float = 22e12
    half_flops: float = 330e12
    states: float = 50e9
    memory: float = 3e12
    network: float = 50e9
    latency: float = 20e-6


@dataclass(frozen=True)
class Cost:
    """What one rank has to do for a nowcast, the busiest one (the first).

    Attributes:
        parameters: of the whole model.
        ranks: that share it.
        own_parameters: elements of the rows of this rank.
        history_bytes: of a full history.
        carried_bytes: that the nowcaster carries from one nowcast to the next.
        working_bytes: during a nowcast, the prediction included.
        summed_bytes: that it puts into sums over ranks.
        exchanged_bytes: that it sends to others one by one, in the nowcast and when it is written.
        collectives: sums and exchanges.
        operations: float32 operations in matrix products.
        half_operations: bfloat16 ones.
        traffic_bytes: of snapshots and predictions, read and written.
        memory_bytes: of all else that is no matrix product, read and written.
    """

    parameters: int
    ranks: int
    own_parameters: int
    history_bytes: int
    carried_bytes: int
    working_bytes: int
    summed_bytes: int
    exchanged_bytes: int
    collectives: int
    operations: int
    traffic_bytes: int
    memory_bytes: int
    half_operations: int = 0

    @property
    def sent_bytes(self) -> float:
        """What leaves this rank: a sum sends every number nearly twice (a ring: 2 (R - 1) / R), an exchange once."""
        return 2 * (self.ranks - 1) / self.ranks * self.summed_bytes + self.exchanged_bytes

    def seconds(self, machine: Machine) -> float:
        """Of a nowcast, nothing overlapping."""
        steps = self.collectives * math.ceil(math.log2(self.ranks))
        talking = self.sent_bytes / machine.network + steps * machine.latency
        moving = self.traffic_bytes / machine.states + self.memory_bytes / machine.memory
        multiplying = self.operations / machine.flops + self.half_operations / machine.half_flops
        return multiplying + moving + talking


class OnPaper(Ranks):
    """A rank without the others, for plans; it cannot say anything.

    Args:
        rank, size: which, of how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum_(self, tensors: Any) -> None:
        """Not on paper.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("ranks on paper cannot say anything to each other")

    exchange = sum_


def fully_sharded(shapes: Mapping[str, tuple[int, ...]], size: int) -> dict[str, Layout]:
    """How FSDP2 divides parameters: equal chunks of the first axis, as ``torch.chunk`` cuts them."""
    layouts = {}
    for name, shape in shapes.items():
        shape = tuple(shape)
        total, width = shape[0] if shape else 1, math.prod(shape[1:])
        chunk = -(-total // size)
        cuts = [min(chunk * rank, total) * width for rank in range(size + 1)]
        layouts[name] = Layout(shape, tuple(pairwise(cuts)))
    return layouts


def replicated(shapes: Mapping[str, tuple[int, ...]], size: int) -> dict[str, Layout]:
    """How DDP does: every rank holds everything."""
    return {name: Layout(tuple(shape), ((0, math.prod(shape)),) * size) for name, shape in shapes.items()}


def plan(layouts: Mapping[str, Layout], rank: int = 0) -> Shards:
    """The rows of all ranks, as this one sees them."""
    size = len(next(iter(layouts.values())).held)
    return Shards({name: layout.rows for name, layout in layouts.items()}, OnPaper(rank, size))


def cost_of(nowcaster: Nowcaster, graph: NeuralGraph, layouts: Mapping[str, Layout], rank: int = 0) -> Cost:
    """What a nowcast costs one rank, and to write it; counted, not measured.

    Left out: a few numbers with which ranks agree that all is well, and what the guard sums up.

    Args:
        nowcaster: linear, spectral or a graph network.
        layouts: how the ranks hold the model.

    Raises:
        TypeError: another kind of nowcaster.
    """
    shards = plan(layouts, rank)
    size = shards.ranks.size
    own = sum(shards.local(name).numel for name in layouts)
    state = own * STATE.itemsize
    if isinstance(nowcaster, NiNoModel):
        found = _network(nowcaster, graph, shards)
    elif isinstance(nowcaster, SpectralNowcaster):
        found = _spectral(nowcaster, shards)
    elif isinstance(nowcaster, LinearNowcaster):
        found = {"working_bytes": state, "traffic_bytes": own * TRAFFIC}
    else:
        raise TypeError(f"`nowcaster` must be linear, spectral or a graph network, got {type(nowcaster).__name__}")
    zero = ("summed_bytes", "exchanged_bytes", "collectives", "operations", "memory_bytes")
    counts = dict.fromkeys(zero, 0) | found
    if size == 1:
        counts |= {"summed_bytes": 0, "exchanged_bytes": 0, "collectives": 0}
    counts["exchanged_bytes"] += STATE.itemsize * sum(_written(layout, rank) for layout in layouts.values())
    return Cost(
        parameters=sum(layout.numel for layout in layouts.values()),
        ranks=size,
        own_parameters=own,
        history_bytes=nowcaster.context * state,
        carried_bytes=_carried(nowcaster, shards),
        **counts,
    )


def table(
    models: Mapping[str, NeuralGraph], nowcasters: Mapping[str, Nowcaster], sizes: tuple[int, ...] = RANKS
) -> list[dict[str, Any]]:
    """One row for every model, nowcaster and number of ranks, fully sharded: :class:`Cost` and what it comes to."""
    rows = []
    for model, graph in models.items():
        shapes = {name: graph.shapes[name] for name in graph.parameter_names}
        for size in sizes:
            layouts = fully_sharded(shapes, size)
            for name, nowcaster in nowcasters.items():
                cost = cost_of(nowcaster, graph, layouts)
                derived = {"sent_bytes": cost.sent_bytes, "seconds": cost.seconds(Machine())}
                rows.append({"model": model, "nowcaster": name, **asdict(cost), **derived})
    return rows


def graphs(shapes: tuple[Shape, ...] = MODELS) -> dict[str, NeuralGraph]:
    """The graphs of models that are never made; symmetries, which no count needs, are not proven."""
    return {shape.name: build_graph(shape.model("meta"), verify=False) for shape in shapes}


def usual_nowcasters() -> dict[str, Nowcaster]:
    """Those of the table; the network has random weights, which cost what others do, and tiles of a stated size."""
    with torch.random.fork_rng(devices=[]):
        network = NiNoModel(NowcasterConfig())
    network.engine = Engine(tile=TILE)
    return {"linear": LinearNowcaster(), "spectral": SpectralNowcaster(), "network": network}


def _network(network: NiNoModel, graph: NeuralGraph, shards: Shards) -> dict[str, int]:
    portion, rank = portion_of(graph, shards), shards.ranks.rank
    names, layers, context = list(graph.parameter_names), len(network.convolutions), network.context
    item = network.edge_in.weight.element_size()
    own = sum(shards.local(name).numel for name in names)
    # Two sums of float64 moments (how many and their mean, then squares), and the nodes after every layer.
    moments = len(names) * 3 * torch.float64.itemsize
    sent = sum(_to_owners(shards, together) * context + _from_owners(shards, together) for together in portion.moved)
    brought = [math.prod(graph.shapes[names[rank]]) for names in portion.moved if rank < len(names)]
    return {
        "working_bytes": working_memory(graph, network, portion=portion)
        + own * STATE.itemsize
        + sum(brought) * item * (context + 1),
        "summed_bytes": moments + layers * graph.num_nodes * network.config.hidden_size * item,
        "exchanged_bytes": sent * item,
        "collectives": 2 + layers + (context + 1) * len(portion.moved),
        "operations": operations(graph, network, portion).total,
        # Scales, messages of every layer and the prediction read all states; the prediction is written.
        "traffic_bytes": own * STATE.itemsize * ((2 + layers) * context + 1),
    }


def _spectral(nowcaster: SpectralNowcaster, shards: Shards) -> dict[str, int]:
    item = torch.float32.itemsize
    shapes = {name: shards.local(name).shape for name in shards.ranges}
    matrices = {name: whitening_operations(shape) for name, shape in shapes.items() if nowcaster.whitens(shape)}
    together = rounds(matrices, shards.ranks.size)
    own = sum(shards.local(name).numel for name in shapes)
    largest = max((math.prod(shapes[name]) for name in matrices), default=0)
    return {
        # The prediction; a matrix, its powers and its direction.
        "working_bytes": own * STATE.itemsize + 4 * largest * item,
        # Whether all remember, and five sums for the two cosines of every parameter.
        "summed_bytes": item + 5 * len(shapes) * item,
        "exchanged_bytes": item * sum(_to_owners(shards, names) + _from_owners(shards, names) for names in together),
        "collectives": 2 + 2 * len(together),
        # All wait for the costliest of a round, whichever kind that is.
        "operations": sum(_costliest(names, shapes, torch.float32) for names in together),
        "half_operations": sum(_costliest(names, shapes, torch.bfloat16) for names in together),
        "traffic_bytes": own * TRAFFIC,
        "memory_bytes": own * SPECTRAL_MEMORY,
    }


def _costliest(names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Operations of the costliest matrix among those that are multiplied in this dtype."""
    half = dtype == torch.bfloat16
    return max((whitening_operations(shapes[n], dtype) for n in names if worth_bfloat16(shapes[n]) == half), default=0)


def _to_owners(shards: Shards, names: tuple[str, ...]) -> int:
    """Elements that this rank sends to the owners of a round."""
    return sum(shards.local(name).numel for place, name in enumerate(names) if place != shards.ranks.rank)


def _from_owners(shards: Shards, names: tuple[str, ...]) -> int:
    """Elements of its own result that this rank sends back."""
    rank = shards.ranks.rank
    if rank >= len(names):
        return 0
    rows = shards.local(names[rank])
    return math.prod(rows.shape) - rows.numel


def _written(layout: Layout, rank: int) -> int:
    """Elements that this rank sends for all to have what they hold."""
    if layout.owns_held:
        return 0
    moves = layout.writes(rank)
    return sum(move.stop - move.start for move in moves if move.source == rank != move.target)


def _carried(nowcaster: Nowcaster, shards: Shards) -> int:
    """Bytes of a nowcaster's memory of this rank's rows; it is asked, with tensors that take no memory."""
    if not nowcaster.has_memory:
        return 0
    rows = {name: torch.empty(shards.local(name).local_shape, dtype=STATE, device="meta") for name in shards.ranges}
    nowcaster.load_memory({})
    nowcaster.settle(rows)
    found = sum(tensor.numel() * tensor.element_size() for tensor in nowcaster.memory().values())
    nowcaster.load_memory({})
    return found
