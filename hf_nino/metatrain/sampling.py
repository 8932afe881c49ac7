"""Slices of trajectories: what a nowcaster sees of a run, and what came after.

A *slice* is ``context`` snapshots, a *stride* of recorded snapshots apart, and the snapshots that follow at the same
distance: the states at horizons 1, 2, .., as far as the run went.  A slice lies in one run.

Shape letters: S slices of one trajectory, C context, K horizons.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..nowcaster.conditions import Conditions
from ..nowcaster.rates import Rates
from ..nowcaster.scaling import EPSILON, Scale, measure_scales
from .split import task_of
from .trajectory import Trajectory


@dataclass(frozen=True)
class Slice:
    """Where a slice lies in its trajectory.

    Args:
        start: the first of its snapshots.
        stride: recorded snapshots from one of its snapshots to the next.
        only: the horizons that are wanted of it; ``None``: all.
    """

    start: int
    stride: int
    only: tuple[int, ...] | None = None

    def horizons(self, snapshots: int, context: int) -> int:
        """How many horizons a trajectory of so many snapshots has behind the context of this slice."""
        return (snapshots - 1 - self.start) // self.stride - (context - 1)


@dataclass(frozen=True, eq=False)
class Batch:
    """S slices of one trajectory, float32.

    Args:
        past: {name: ``[S, C, *shape]``}, oldest first.
        future: {name: ``[S, K, *shape]``}, the states at horizons 1 to K, or at those wanted of each slice; the
            last of the past where there is none.
        mask: bool ``[S, K]``, where there is one.
        scales: of each slice, those of every parameter, measured on its past.
        mean, spread: {name: ``[S]``}, the same as tensors; ``spread`` is what moves are divided by, std + 1e-6.
        moves: {name: bool ``[S]``}, whether the parameter differs within its past at all, beyond what scaling sees.
        conditions: horizons, and the recorded learning rates around them.
    """

    past: dict[str, Tensor]
    future: dict[str, Tensor]
    mask: Tensor
    scales: list[dict[str, Scale]]
    mean: dict[str, Tensor]
    spread: dict[str, Tensor]
    moves: dict[str, Tensor]
    conditions: Conditions

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
        return replace(self, mask=self.mask.to(device), conditions=self.conditions.to(device), **moved)


def read_batch(
    trajectory: Trajectory, slices: Sequence[Slice], context: int, horizons: int, neighbours: int = 0
) -> Batch:
    """The states of slices of one trajectory.

    States that are not finite are no targets, and a slice with one in its past has none at all: its ``mask`` is False.

    Args:
        context: snapshots of the past, C.
        horizons: at most; K is the largest number that any of the slices has, or 1.
        neighbours: recorded snapshots on each side that a target is averaged with; fewer, but as many on both, next to
            the end of the past and to that of the run.

    Raises:
        IndexError: the past of a slice does not lie in the trajectory.
    """
    # A trajectory keeps its shards open, and there may be more trajectories than files that may be open; a copy closes
    # them when it goes.
    reader = copy.copy(trajectory)
    counts = [min(piece.horizons(len(reader), context), horizons) for piece in slices]
    wanted = [
        [k for k in range(1, count + 1) if piece.only is None or k in piece.only]
        for piece, count in zip(slices, counts, strict=True)
    ]
    most = max(1, *map(len, wanted))
    past: dict[str, list[Tensor]] = {name: [] for name in reader.names}
    future: dict[str, list[Tensor]] = {name: [] for name in reader.names}
    mask = torch.zeros(len(slices), most, dtype=torch.bool)
    for number, (piece, ahead) in enumerate(zip(slices, wanted, strict=True)):
        if counts[number] < 0:
            raise IndexError(f"{reader.folder} has {len(reader)} snapshots, too few for {context} of them at {piece}")
        last = (context - 1) * piece.stride
        targets = [last + k * piece.stride for k in ahead]
        widths = [min(neighbours, t - last, len(reader) - 1 - piece.start - t) for t in targets]
        ends = [t + width for t, width in zip(targets, widths, strict=True)]
        finite = torch.ones(context + len(ahead), dtype=torch.bool)
        # Read side by side and then thinned out: one call a parameter instead of one a snapshot.
        for name, tensor in reader.states(piece.start, piece.start + max([last, *ends]) + 1).items():
            means = [tensor[t - w : t + w + 1].float().mean(0) for t, w in zip(targets, widths, strict=True)]
            thin = torch.cat([tensor[: last + 1 : piece.stride].float(), *(mean.unsqueeze(0) for mean in means)])
            finite &= thin.flatten(1).isfinite().all(1)
            filler = thin[context - 1].expand(most - len(ahead), *thin.shape[1:])
            past[name].append(thin[:context])
            future[name].append(torch.cat([thin[context:], filler]))
        mask[number, : len(ahead)] = finite[context:] & finite[:context].all()
    stacked = {name: torch.stack(tensors).nan_to_num(posinf=0.0, neginf=0.0) for name, tensors in past.items()}
    targets = {name: torch.stack(tensors).nan_to_num(posinf=0.0, neginf=0.0) for name, tensors in future.items()}
    told = [
        _conditions(reader, piece, context, [*ahead, *[1] * (most - len(ahead))])
        for piece, ahead in zip(slices, wanted, strict=True)
    ]
    parts = ([getattr(one, name) for one in told] for name in ("horizons", "past", "ahead"))
    return _measured(stacked, targets, mask, Conditions(*map(torch.cat, parts)))


def recorded_rates(trajectory: Trajectory, piece: Slice, context: int, horizon: int) -> Rates:
    """The learning rates of a slice and the way to a horizon, as far as the run goes.

    Those of the steps before the first snapshot are taken for those after it where there are none, and all for
    constant if the history had none: nothing moved then.
    """
    sums, stride = trajectory.learning_rate_sums, piece.stride
    places = [piece.start + c * stride for c in range(context)]
    past = [(sums[later] - sums[place]) / stride for place, later in itertools.pairwise(places)]
    unit = math.fsum(past) / len(past)
    if unit <= 0:
        return Rates.constant(context, horizon)
    before = min(piece.start, stride)
    first = (sums[piece.start] - sums[piece.start - before]) / before if before else past[0]
    end = min(places[-1] + horizon * stride, len(sums) - 1)
    # Sums are rounded: that of no further steps may come out below 0.
    rates = [max(rate, 0.0) for rate in (first, *past)]
    return Rates(tuple(rates), max(sums[end] - sums[places[-1]], 0.0) / (unit * stride))


def _conditions(trajectory: Trajectory, piece: Slice, context: int, horizons: Sequence[int]) -> Conditions:
    return Conditions.of(horizons, [recorded_rates(trajectory, piece, context, k) for k in horizons])


def _measured(past: dict[str, Tensor], future: dict[str, Tensor], mask: Tensor, conditions: Conditions) -> Batch:
    batch = Batch(past, future, mask, [], {}, {}, {}, conditions)
    scales = [measure_scales(history) for history in batch.histories]
    mean = {name: torch.tensor([scale[name].mean for scale in scales]) for name in past}
    spread = {name: torch.tensor([scale[name].std + EPSILON for scale in scales]) for name in past}
    moves = {
        name: (tensor != tensor[:, :1]).flatten(1).any(1) & (spread[name] > 2 * EPSILON)
        for name, tensor in past.items()
    }
    return Batch(past, future, mask, scales, mean, spread, moves, conditions)


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


def draw_horizons(source: random.Random, piece: Slice, available: int, count: int) -> Slice:
    """The slice with ``count`` of its ``available`` horizons, all equally likely: the mean loss over them is, on
    average, that over all."""
    chosen = source.sample(range(1, available + 1), min(count, available))
    return replace(piece, only=tuple(sorted(chosen)))


def draw_signs(source: random.Random, slices: int, size: int) -> Tensor:
    """Signs of the columns of a positional encoding for each slice, float32 ``[S, 1, size]`` of 1 and -1.

    The sign of an eigenvector means nothing (Dwivedi et al., arXiv 2003.00982).
    """
    signs = [source.choices((-1.0, 1.0), k=size) for _ in range(slices)]
    return torch.tensor(signs).unsqueeze(1)
