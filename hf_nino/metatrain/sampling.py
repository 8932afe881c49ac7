"""Slices of trajectories: what a nowcaster sees of a run, and what came after.

A *slice* is ``context`` snapshots, a *stride* of recorded snapshots apart, and the snapshots that follow at the same
distance: the states at horizons 1, 2, .., as far as the run went.  A slice lies in one run.

Shape letters: S slices of one trajectory, C context, K horizons.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..nowcaster.scaling import EPSILON, Scale, measure_scales
from .split import task_of
from .trajectory import Trajectory


@dataclass(frozen=True)
class Slice:
    """Where a slice lies in its trajectory.

    Args:
        start: the first of its snapshots.
        stride: recorded snapshots from one of its snapshots to the next.
    """

    start: int
    stride: int

    def horizons(self, snapshots: int, context: int) -> int:
        """How many horizons a trajectory of so many snapshots has behind the context of this slice."""
        return (snapshots - 1 - self.start) // self.stride - (context - 1)


@dataclass(frozen=True, eq=False)
class Batch:
    """S slices of one trajectory, float32.

    Args:
        past: {name: ``[S, C, *shape]``}, oldest first.
        future: {name: ``[S, K, *shape]``}, the states at horizons 1 to K; the last of the past where there is none.
        mask: bool ``[S, K]``, where there is one.
        scales: of each slice, those of every parameter, measured on its past.
        mean, spread: {name: ``[S]``}, the same as tensors; ``spread`` is what moves are divided by, std + 1e-6.
        moves: {name: bool ``[S]``}, whether the parameter differs within its past at all, beyond what scaling sees.
    """

    past: dict[str, Tensor]
    future: dict[str, Tensor]
    mask: Tensor
    scales: list[dict[str, Scale]]
    mean: dict[str, Tensor]
    spread: dict[str, Tensor]
    moves: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def histories(self) -> list[list[dict[str, Tensor]]]:
        """S histories of C states each, as nowcasters take them."""
        context = next(iter(self.past.values())).shape[1]
        return [
            [{name: tensor[number, i] for name, tensor in self.past.items()} for i in range(context)]
            for number in range(len(self))
        ]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        tables = ("past", "future", "mean", "spread", "moves")
        moved = {table: {name: tensor.to(device) for name, tensor in getattr(self, table).items()} for table in tables}
        return replace(self, mask=self.mask.to(device), **moved)


def read_batch(trajectory: Trajectory, slices: Sequence[Slice], context: int, horizons: int) -> Batch:
    """The states of slices of one trajectory.

    States that are not finite are no targets, and a slice with one in its past has none at all: its ``mask`` is False.

    Args:
        context: snapshots of the past, C.
        horizons: at most; K is the largest number that any of the slices has, or 1.

    Raises:
        IndexError: the past of a slice does not lie in the trajectory.
    """
    # A trajectory keeps its shards open, and there may be more trajectories than files that may be open; a copy closes
    # them when it goes.
    reader = copy.copy(trajectory)
    counts = [min(piece.horizons(len(reader), context), horizons) for piece in slices]
    most = max(1, *counts)
    past: dict[str, list[Tensor]] = {name: [] for name in reader.names}
    future: dict[str, list[Tensor]] = {name: [] for name in reader.names}
    mask = torch.zeros(len(slices), most, dtype=torch.bool)
    for number, (piece, count) in enumerate(zip(slices, counts, strict=True)):
        if count < 0:
            raise IndexError(f"{reader.folder} has {len(reader)} snapshots, too few for {context} of them at {piece}")
        stop = piece.start + (context - 1 + count) * piece.stride + 1
        finite = torch.ones(context + count, dtype=torch.bool)
        # Read side by side and then thinned out: one call a parameter instead of one a snapshot.
        for name, tensor in reader.states(piece.start, stop).items():
            tensor = tensor[:: piece.stride].float()
            finite &= tensor.flatten(1).isfinite().all(1)
            filler = tensor[context - 1].expand(most - count, *tensor.shape[1:])
            past[name].append(tensor[:context])
            future[name].append(torch.cat([tensor[context:], filler]))
        mask[number, :count] = finite[context:] & finite[:context].all()
    stacked = {name: torch.stack(tensors).nan_to_num(posinf=0.0, neginf=0.0) for name, tensors in past.items()}
    targets = {name: torch.stack(tensors).nan_to_num(posinf=0.0, neginf=0.0) for name, tensors in future.items()}
    return _measured(stacked, targets, mask)


def _measured(past: dict[str, Tensor], future: dict[str, Tensor], mask: Tensor) -> Batch:
    batch = Batch(past, future, mask, [], {}, {}, {})
    scales = [measure_scales(history) for history in batch.histories]
    mean = {name: torch.tensor([scale[name].mean for scale in scales]) for name in past}
    spread = {name: torch.tensor([scale[name].std + EPSILON for scale in scales]) for name in past}
    moves = {
        name: (tensor != tensor[:, :1]).flatten(1).any(1) & (spread[name] > 2 * EPSILON)
        for name, tensor in past.items()
    }
    return Batch(past, future, mask, scales, mean, spread, moves)


class Sampler:
    """Draws slices: a task, a run of it and places in the run, each uniformly.

    What is drawn depends on the seed, the step and the process alone: there is no state to checkpoint.

    Args:
        trajectories: to draw from.
        context: snapshots of the past of a slice.
        interval_range: steps between the snapshots of a slice, from and to; drawn log-uniformly from what the recorded
            snapshots allow, for each slice.
        seed: of everything that is drawn.

    Attributes:
        trajectories: those that have room for a slice.
        left_out: folders of the others.

    Raises:
        ValueError: none has.
    """

    def __init__(
        self, trajectories: Sequence[Trajectory], context: int, interval_range: tuple[int, int], seed: int
    ) -> None:
        self.context, self.interval_range, self.seed = context, interval_range, seed
        self.trajectories = [one for one in trajectories if self.strides(one)]
        self.left_out = [one.folder for one in trajectories if not self.strides(one)]
        self._tasks: dict[str, list[Trajectory]] = {}
        for one in self.trajectories:
            self._tasks.setdefault(task_of(one), []).append(one)
        if not self.trajectories:
            raise ValueError(
                f"`trajectories` must hold runs with {context + 1} snapshots that are {interval_range[0]} to "
                f"{interval_range[1]} steps apart, but none of {len(trajectories)} has: record longer runs or more "
                "often, or choose another interval"
            )

    def strides(self, trajectory: Trajectory) -> list[int]:
        """Strides that lie in the range and leave room for at least one horizon."""
        low, high = self.interval_range
        last = min(high // trajectory.interval, (len(trajectory) - 1) // self.context)
        return list(range(max(1, math.ceil(low / trajectory.interval)), last + 1))

    def draw(
        self, step: int, number: int, slices: int, process: int = 0
    ) -> tuple[Trajectory, list[Slice], random.Random]:
        """The trajectory and the slices that are number ``number`` of a step, and a source of further randomness."""
        source = random.Random(f"{self.seed}/{step}/{process}/{number}")
        trajectory = source.choice(self._tasks[source.choice(sorted(self._tasks))])
        strides = self.strides(trajectory)
        chosen = source.choices(strides, [1 / stride for stride in strides], k=slices)
        return trajectory, [self._place(trajectory, stride, source) for stride in chosen], source

    def _place(self, trajectory: Trajectory, stride: int, source: random.Random) -> Slice:
        return Slice(source.randint(0, len(trajectory) - 1 - self.context * stride), stride)


def draw_signs(source: random.Random, slices: int, size: int) -> Tensor:
    """Signs of the columns of a positional encoding for each slice, float32 ``[S, 1, size]`` of 1 and -1.

    The sign of an eigenvector means nothing (Dwivedi et al., arXiv 2003.00982).
    """
    signs = [source.choices((-1.0, 1.0), k=size) for _ in range(slices)]
    return torch.tensor(signs).unsqueeze(1)
