"""What meta-training will take: told before it begins, from a few timed batches."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..training.estimate import extrapolate, synchronize
from .held_out import measure
from .meta_loop import MetaTraining
from .sampling import Slice
from .split import task_of
from .trajectory import Trajectory


@dataclass(frozen=True)
class MetaCost:
    """Seconds.

    Args:
        step: of a step, on average over tasks.
        evaluation: of one evaluation.
    """

    step: float
    evaluation: float


def plan_cost(training: MetaTraining, held_out: Sequence[Trajectory], slices: int, interval: int) -> MetaCost:
    """Time the smallest and the largest model; others lie on the line through them.  No weight is changed.

    Args:
        held_out: trajectories of an evaluation in this process.
        slices: of each of them.
    """
    every = sorted(training.sampler.trajectories, key=lambda one: one.num_parameters)
    ends = every[0], every[-1]
    sizes = (ends[0].num_parameters, ends[1].num_parameters)
    _seconds(training, ends[0])  # pays for what happens once
    learnt = tuple(_seconds(training, one) for one in ends)
    measured = (0.0, 0.0)
    if held_out:
        measured = tuple(_evaluation_seconds(training, one, slices, interval) for one in ends)
    of_tasks = {task_of(one): one.num_parameters for one in every}
    mean = sum(extrapolate(sizes, learnt, size) for size in of_tasks.values()) / len(of_tasks)
    evaluation = sum(extrapolate(sizes, measured, one.num_parameters) for one in held_out) if held_out else 0.0
    return MetaCost(mean * training.settings.batch_size, evaluation)


def _seconds(training: MetaTraining, trajectory: Trajectory) -> float:
    """Of learning from one trajectory."""
    device, settings = training.accelerator.device, training.settings
    stride = training.sampler.strides(trajectory)[0]
    shape = training.shapes.of(trajectory)
    synchronize(device)
    started = time.perf_counter()
    slices = [Slice(0, stride)] * settings.slices
    batch = training.read(trajectory, slices, random.Random(0)).to(device)
    training.objective(shape, batch).loss.backward()
    training.optimizer.zero_grad()
    synchronize(device)
    return time.perf_counter() - started


def _evaluation_seconds(training: MetaTraining, trajectory: Trajectory, slices: int, interval: int) -> float:
    started = time.perf_counter()
    measure(training.network, [trajectory], training.shapes, interval, slices=slices)
    return time.perf_counter() - started
