"""What nowcasting will cost: memory of snapshots, seconds per nowcast, share of training time; known before training.

The cost of a nowcast grows linearly with its work: with the parameters, for most nowcasters.  So it is measured on one
small matrix, with the nowcaster itself and a real :class:`~hf_nino.training.history.History`, and carried over to the
model (:func:`calibrate`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..graph import EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Nodes
from ..nowcaster.base import Nowcaster
from .guard import judge
from .history import History
from .rng import preserved_rng

# Above this share of training time, people are warned.
TOO_MUCH = 0.05

# Parameters of the smallest and the largest trial: beyond the latter only memory would grow.
SMALLEST, LARGEST = 2**14, 2**24


@dataclass(frozen=True)
class Calibration:
    """What was measured on one matrix.

    Attributes:
        sizes: work (:meth:`~hf_nino.nowcaster.base.Nowcaster.work`) of the last two trials, the smaller first; both
            the same if the model is small itself.
        nowcast: seconds of a nowcast with guard and writing, at each size.
        snapshot: seconds per parameter that training waits for a snapshot.
        memory: bytes per parameter that the nowcaster carries from one nowcast to the next.
        first: seconds per parameter that the first snapshot takes longer, into memory that is new.
    """

    sizes: tuple[float, float]
    nowcast: tuple[float, float]
    snapshot: float
    memory: float = 0.0
    first: float = 0.0

    def snapshot_seconds(self, parameters: int) -> float:
        return self.snapshot * parameters

    def nowcast_seconds(self, work: float) -> float:
        return extrapolate(self.sizes, self.nowcast, work)


@dataclass(frozen=True)
class Estimate:
    """What nowcasting costs in a run.

    Attributes:
        parameters: trainable parameters.
        context, period, interval: snapshots per nowcast, steps between nowcasts and between snapshots.
        history_device, history_dtype: where snapshots live, and their dtype.
        seconds_per_nowcast: guard and writing included.
        seconds_per_snapshot: that training waits.
        seconds_per_step: of the base optimizer; ``steps_are`` says where the number comes from.
        carried_bytes: memory of the nowcaster from one nowcast to the next.
        watched: whether what a nowcast replaces is kept, to take it back.
        seconds_of_new_memory: that a snapshot takes longer into memory that was not used before.
    """

    parameters: int
    context: int
    period: int
    interval: int
    history_device: str
    history_dtype: str
    seconds_per_nowcast: float
    seconds_per_snapshot: float
    seconds_per_step: float
    steps_are: str
    carried_bytes: int = 0
    watched: bool = True
    seconds_of_new_memory: float = 0.0

    @property
    def snapshot_bytes(self) -> int:
        """Of one snapshot."""
        return self.parameters * getattr(torch, self.history_dtype).itemsize

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by place and kind of memory, when the history is full.

        The prediction (one more copy, where the last snapshot is read) and a copy on its way to host or disk are not
        in these numbers; ``disk`` keeps one snapshot in host memory until it is written.
        """
        full = self.context * self.snapshot_bytes
        return {"device": {"device": full}, "cpu": {"host": full}, "disk": {"disk": full, "host": self.snapshot_bytes}}

    @property
    def undo_bytes(self) -> int:
        """What is kept to take a nowcast back: float32 parameters and the two moments of Adam, where snapshots are."""
        return 3 * 4 * self.parameters

    @property
    def seconds_per_undo(self) -> float:
        """That keeping what a nowcast replaces takes: what is copied, at the rate of a snapshot."""
        return self._copied * self.seconds_per_snapshot

    @property
    def _copied(self) -> float:
        """What is kept to take a nowcast back, in snapshots."""
        return (self.undo_bytes + self.carried_bytes) / max(self.snapshot_bytes, 1) if self.watched else 0.0

    @property
    def seconds_in_all(self) -> float:
        """Of a nowcast, its snapshots, and keeping what it replaces."""
        return self.seconds_per_nowcast + self.context * self.seconds_per_snapshot + self.seconds_per_undo

    @property
    def seconds_of_the_first(self) -> float:
        """Of the first nowcast: snapshots, the prediction and what is kept go into memory that is new."""
        return self.seconds_in_all + (self.context + 1 + self._copied) * self.seconds_of_new_memory

    @property
    def overhead(self) -> float:
        """What a nowcast takes in all over the seconds of the steps between two nowcasts."""
        return self.seconds_in_all / (self.period * self.seconds_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, derived ones included."""
        names = ("snapshot_bytes", "memory", "undo_bytes", "seconds_per_undo", "overhead")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        text = (
            f"a nowcast every {self.period} steps costs about {100 * self.overhead:.2g}% of training time: "
            f"{self.seconds_per_nowcast:.2g} s, {self.context} snapshots of {self.seconds_per_snapshot:.2g} s, "
            f"{self.seconds_per_undo:.2g} s to be able to take it back, steps of {self.seconds_per_step:.2g} s "
            f"({self.steps_are}). Snapshots take {readable(self.context * self.snapshot_bytes)} on "
            f"{self.history_device}"
        )
        return text + (f", the nowcaster {readable(self.carried_bytes)}" if self.carried_bytes else "")


def estimate(
    calibration: Calibration,
    nowcaster: Nowcaster,
    parameters: int,
    *,
    work: float,
    period: int,
    interval: int,
    history_device: str,
    history_dtype: torch.dtype,
    seconds_per_step: float,
    steps_are: str,
    watched: bool = True,
) -> Estimate:
    """The cost for a model with ``parameters`` trainable parameters, from a calibration of the same nowcaster.

    Args:
        work: of a nowcast of these parameters, as the nowcaster says.
    """
    return Estimate(
        parameters=parameters,
        context=nowcaster.context,
        period=period,
        interval=interval,
        history_device=history_device,
        history_dtype=str(history_dtype).removeprefix("torch."),
        seconds_per_nowcast=calibration.nowcast_seconds(work),
        seconds_per_snapshot=calibration.snapshot_seconds(parameters),
        seconds_per_step=seconds_per_step,
        steps_are=steps_are,
        carried_bytes=round(calibration.memory * parameters),
        watched=watched,
        seconds_of_new_memory=calibration.first * parameters,
    )


def extrapolate(sizes: tuple[float, float], seconds: tuple[float, float], size: float) -> float:
    """The line through two measurements, at ``size``; never below the larger one if ``size`` is larger.

    A slope that noise has turned negative counts as the mean cost per parameter of the larger measurement.
    """
    (small, large), (before, after) = sizes, seconds
    slope = (after - before) / (large - small) if large > small else 0.0
    if slope <= 0:
        slope = after / large
    return max(after + (size - large) * slope, 0.0)


def calibrate(
    nowcaster: Nowcaster,
    parameters: int,
    *,
    device: torch.device | str = "cpu",
    history_device: str = "cpu",
    history_dtype: torch.dtype = torch.float32,
    long_enough: float = 0.05,
) -> Calibration:
    """Time snapshots and nowcasts of square matrices, each size 4 times the last, until one takes long enough.

    The streams of random numbers stay as they are.  Snapshots on the disk are timed as those in host memory: what
    training waits for is the same, and files that were just written are still in memory.

    Args:
        nowcaster: its memory is lost.
        parameters: of the model; nothing larger is tried.
        device: where the model's parameters are.
        long_enough: seconds; all of it takes about ten times as long.

    Raises:
        Exception: whatever the nowcaster raises.
    """
    place = "cpu" if history_device.startswith("disk:") else history_device
    device = torch.device(device)
    timed: list[tuple[float, float]] = []
    carried = 0.0
    with preserved_rng(), torch.no_grad():
        size = SMALLEST
        while True:
            side = max(math.isqrt(min(size, parameters)), 1)
            trial = _Trial(nowcaster, _Matrix(side, device), History(nowcaster.context, history_dtype, place))
            trial.run()  # pays for what happens once: memory, kernels, encodings
            timed.append((nowcaster.work([(side, side)], device), min(trial.run() for _ in range(2))))
            if nowcaster.has_memory:
                carried = sum(t.numel() * t.element_size() for t in nowcaster.memory().values()) / side**2
                nowcaster.load_memory({})
            if timed[-1][1] >= long_enough or size >= min(parameters, LARGEST):
                break
            size *= 4
        # At once as large as may be: a copy that stays in cache says nothing about one that does not.
        matrix = _Matrix(max(math.isqrt(min(parameters, LARGEST)), 1), device)
        first, snapshot = (
            seconds / matrix.weight.numel() for seconds in _snapshot_seconds(matrix, History(1, history_dtype, place))
        )
    sizes, nowcasts = zip(*(timed[-2:] if len(timed) > 1 else timed * 2), strict=True)
    return Calibration(sizes, nowcasts, snapshot, carried, max(first - snapshot, 0.0))


class _Matrix:
    """A model of one square matrix."""

    def __init__(self, side: int, device: torch.device) -> None:
        self.device = device
        self.weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)

    def seconds(self, work: Callable[[], Any]) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - started


def _snapshot_seconds(matrix: _Matrix, history: History) -> tuple[float, float]:
    """Of the first snapshot, and of others: where memory is used again."""
    taken = []
    for step in range(3):
        history.clear()
        taken.append(matrix.seconds(lambda step=step: history.append({"weight": matrix.weight}, step)))
    return taken[0], min(taken)


class _Trial:
    """Nowcasts of a matrix that moves a little between snapshots."""

    def __init__(self, nowcaster: Nowcaster, matrix: _Matrix, history: History) -> None:
        self.nowcaster, self.matrix, self.history = nowcaster, matrix, history
        side = len(matrix.weight)
        source, target = (NeuronGroup(name, side) for name in ("source", "target"))
        nodes = (Nodes.all(group, side) for group in range(2))
        block = EdgeBlock("weight", EdgeType.LINEAR, *nodes, source_strides=(1,), target_strides=(side,))
        self.graph = NeuralGraph((source, target), (block,), (), (), {"weight": (side, side)})
        self.move = matrix.weight.flip(0) * 0.01
        self._settle()

    def run(self) -> float:
        """Seconds of a nowcast."""
        self.history.clear()
        for step in range(self.nowcaster.context):
            self.matrix.weight += self.move
            self.history.append({"weight": self.matrix.weight}, step)
        return self.matrix.seconds(self._nowcast)

    def _nowcast(self) -> None:
        states = self.history.states()
        prediction = self.nowcaster.nowcast(self.graph, states, 1)
        judge(states, prediction, 1)
        self.matrix.weight.copy_(prediction["weight"])
        self._settle()

    def _settle(self) -> None:
        if self.nowcaster.has_memory:
            self.nowcaster.settle({"weight": self.matrix.weight})


def matrix_rate(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> float:
    """Floating-point operations per second of a matrix product; bfloat16 on CUDA, float32 elsewhere, if not said."""
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    size = 256
    while True:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        best = math.inf
        for _ in range(3):
            synchronize(device)
            started = time.perf_counter()
            matrix @ matrix
            synchronize(device)
            best = min(best, time.perf_counter() - started)
        if best >= 0.02 or size >= 8192:
            return 2 * size**3 / best
        size *= 2


def step_seconds(parameters: int, tokens: int, rate: float) -> float:
    """Least seconds of an optimizer step: 6 operations per parameter and token (Kaplan et al., 2020) at ``rate``."""
    return 6 * parameters * tokens / rate


def synchronize(device: torch.device) -> None:
    """Wait for the training stream of ``device``; what travels beside it may still be under way."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def in_words(seconds: float) -> str:
    """``"90 seconds"``, ``"12 minutes"``, ``"3.5 hours"``."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def readable(size: float) -> str:
    """``"2.3 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
