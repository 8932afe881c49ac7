"""The measurements themselves, each a function of plain values that a process of its own calls.

Two clocks run: ``wall`` and ``process`` (of all threads).  One thread on a shared machine is measured by the second,
which does not count the time that others took; :func:`busy` says which.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from ...graph import NeuralGraph
from ...nowcaster import Engine, NiNoModel, NowcasterConfig, convert_original, load_nowcaster
from ...nowcaster.operations import operations
from ...nowcaster.precision import products, rounds
from ...training.history import History
from .models import WEIGHTLESS, Shape, trajectory

ENOUGH_SECONDS, MOST_NOWCASTS = 2.0, 5
"""In one process nowcasts are repeated until they took this long, and at most so often; on CUDA two at least."""
COPIED_BYTES = 1 << 28
RATE_SECONDS, RATE_SIDE = 0.05, 8192

Seconds = tuple[float, float]
"""Wall and process."""


def busy(seconds: Seconds, threads: int, device: str) -> float:
    """What counts: process time where all work is done by one thread, else wall time."""
    return seconds[1] if threads == 1 and device == "cpu" else seconds[0]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, Seconds]:
    """The result of ``work()`` and how long it took, everything done that it asked of the device."""
    _synchronize(device)
    wall, process = perf_counter(), process_time()
    result = work()
    _synchronize(device)
    return result, (perf_counter() - wall, process_time() - process)


class PeakMemory:
    """Bytes that ``work`` needs at most beyond what is there when it begins.

    On CUDA, of the device's memory; on a CPU, of resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def of(self, work: Callable[[], Any]) -> tuple[Any, int]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = work()
            return result, torch.cuda.max_memory_allocated(self.device) - before
        before = _forget_peak()
        result = work()
        return result, max(_peak() - before, 0)


def floors(device: str, threads: int) -> dict[str, float]:
    """What no nowcast can beat: rates of matrix products in FLOP/s, by precision, and bytes copied per second.

    Reads and writes both count.  The rate of ``fast`` is that of the matrix units: bfloat16 on a CPU that has them,
    TF32 on CUDA, and the rate of ``float32`` elsewhere.
    """
    place = torch.device(device)
    found = {"float32": _matrix_rate(place, threads, torch.float32, False)}
    found["fast"] = found["float32"]
    if rounds("fast", place, torch.float32):
        dtype = torch.bfloat16 if place.type == "cpu" else torch.float32
        found["fast"] = _matrix_rate(place, threads, dtype, True)
    source = torch.ones(COPIED_BYTES // 4, device=place)
    goal = torch.empty_like(source).copy_(source)
    best = min(busy(timed(lambda: goal.copy_(source), place)[1], threads, device) for _ in range(5))
    found["bandwidth"] = 2 * COPIED_BYTES / best
    return found


def nowcasts(
    shape: Mapping[str, Any],
    mode: str,
    place: str,
    dtype: str,
    device: str,
    nowcaster: str | None,
    horizon: int,
) -> dict[str, Any]:
    """Seconds of several nowcasts of a model, memory of the first, and what is known of their work.

    Graph and positional encoding, which are made once for a run, are made before the clock starts.
    """
    home = torch.device(device)
    network = network_of(nowcaster, home)
    network.engine = Engine(precision=mode)
    _warm_up(network, home)
    parameters, graph, history, seconds = prepare(Shape(**shape), network, place, getattr(torch, dtype), home)
    pos, states = graph.positional_encoding(network.config.positional_size), history.states()

    def nowcast() -> Mapping[str, Tensor]:
        return network.nowcast(graph, states, horizon, pos=pos)

    (result, first), memory = PeakMemory(home).of(lambda: timed(nowcast, home))
    if not all(bool(tensor.isfinite().all()) for tensor in result.values()):
        raise ValueError(f"the nowcast of {shape['name']} has numbers that are not finite")
    taken = [first]
    least = 1 if home.type == "cpu" else 2
    while len(taken) < least or (sum(wall for wall, _ in taken) < ENOUGH_SECONDS and len(taken) < MOST_NOWCASTS):
        taken.append(timed(nowcast, home)[1])
    counted = operations(graph, network)
    passes = 2 + len(network.convolutions)
    return {
        "parameters": parameters,
        "seconds": taken,
        "extra_bytes": memory,
        "graph_seconds": seconds,
        "edge_operations": counted.edges,
        "operations": counted.total,
        # Scales, messages of every layer and the prediction each read all states; the prediction is written.
        "moved_bytes": parameters * getattr(torch, dtype).itemsize * (passes * network.context + 1),
        "state_bytes": parameters * getattr(torch, dtype).itemsize,
    }


def fast_error(
    shape: Mapping[str, Any], place: str, dtype: str, device: str, nowcaster: str | None, horizon: int
) -> dict[str, float]:
    """How far ``fast`` is from ``float32``: norm of the difference over the norm of the predicted step."""
    home = torch.device(device)
    network = network_of(nowcaster, home)
    _, graph, history, _ = prepare(Shape(**shape), network, place, getattr(torch, dtype), home)
    states = history.states()
    exact, fast = (
        network.nowcast(graph, states, horizon, engine=Engine(precision=mode)) for mode in ("float32", "fast")
    )
    return {"fast_error": relative_difference(fast, exact, states[-1])}


def relative_difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], last: Mapping[str, Tensor]
) -> float:
    """``|found - expected| / |expected - last|`` over all parameters together."""
    difference = sum(float((found[name].double() - expected[name]).square().sum()) for name in expected)
    step = sum(float((expected[name].double() - last[name]).square().sum()) for name in expected)
    return (difference / step) ** 0.5


def network_of(nowcaster: str | None, device: torch.device) -> NiNoModel:
    """The nowcaster that is measured: random weights, a ``.pt`` file of the original release, or a folder.

    Raises:
        ValueError: it is no :class:`NiNoModel`, or a file that cannot be read.
        OSError: no such file or folder.
    """
    if nowcaster is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = NiNoModel(NowcasterConfig())
    else:
        network = convert_original(nowcaster) if nowcaster.endswith(".pt") else load_nowcaster(nowcaster)
    if not isinstance(network, NiNoModel):
        raise ValueError(f"`nowcaster` must be a graph network (NiNoModel), got {type(network).__name__} {nowcaster}")
    return network.to(device)


def prepare(
    shape: Shape, network: NiNoModel, place: str, dtype: torch.dtype, device: torch.device
) -> tuple[int, NeuralGraph, History, float]:
    """Number of parameters, graph, full history and the seconds that the graph took."""
    parameters = shape.parameters()
    started = perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shape.model("meta" if parameters > WEIGHTLESS else "cpu")
        graph = NeuralGraph.from_model(model)
    seconds = perf_counter() - started
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    del model
    history = History(network.context, dtype, "model" if place == "device" else "cpu")
    for step, state in enumerate(trajectory(sizes, network.context, device, dtype)):
        history.append(state, step)
    return parameters, graph, history, seconds


def _matrix_rate(device: torch.device, threads: int, dtype: torch.dtype, rounded: bool) -> float:
    """FLOP/s of a square product, large enough to take a while; the best of three."""
    side = 512
    with products(rounded):
        while True:
            matrix = torch.ones(side, side, device=device, dtype=dtype)
            result = matrix @ matrix
            best = min(
                busy(timed(lambda m=matrix, r=result: torch.mm(m, m, out=r), device)[1], threads, device.type)
                for _ in range(3)
            )
            if best >= RATE_SECONDS or side >= RATE_SIDE:
                return 2 * side**3 / best
            side *= 2


def _warm_up(network: NiNoModel, device: torch.device) -> None:
    """A nowcast of next to nothing: libraries are loaded and tiles chosen before anything is measured."""
    model = torch.nn.Linear(3, 3)
    graph = NeuralGraph.from_model(model, torch.zeros(1, 3))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    states = [
        {name: tensor.clone() for name, tensor in state.items()}
        for state in trajectory(shapes, network.context, device, torch.float32)
    ]
    network.nowcast(graph, states, 1)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _forget_peak() -> int:
    """Resident bytes; from now on :func:`_peak` counts from here, where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    """The most bytes that were resident."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
