"""Trajectories that were made up, of a network with 117 parameters, for the tests of meta-training."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from hf_nino.metatrain import Recipe, Trajectory
from hf_nino.metatrain.describe import describe_run
from hf_nino.metatrain.meta_loop import MetaTraining
from hf_nino.metatrain.meta_settings import MetaSettings
from hf_nino.metatrain.meta_training import start_network
from hf_nino.metatrain.sampling import Sampler
from hf_nino.metatrain.shapes import Shapes
from hf_nino.metatrain.shards import TrajectoryWriter
from hf_nino.metatrain.tasks import recording_task
from hf_nino.nowcaster import NowcasterConfig

torch.set_num_threads(1)

TASK = "conv-2-3"
SHAPES = Shapes()
"""Shared by all tests: a graph takes longer than the rest."""


def config(**values):
    usual = {"hidden_size": 8, "num_layers": 2, "context": 3, "max_horizon": 4, "period": 6, "positional_size": 4}
    return NowcasterConfig(**(usual | values))


def settings(**values):
    usual = {"steps": 6, "batch_size": 2, "slices": 2, "warmup_steps": 2, "interval_range": (1, 2)}
    return MetaSettings(**(usual | values))


def write_run(folder, motion, snapshots=12, interval=1, task=TASK, named=None, rate_sums=None, **more):
    """A run whose parameter ``name`` at snapshot t is ``motion(name, shape, t)``.

    Args:
        rate_sums: of the learning rates before each snapshot; default: they are constant.
        named: what the task is called, instead of its own name.
    """
    torch.manual_seed(0)
    built = recording_task(task)
    model = built.build_model(None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    extra = {"task": built.to_dict() | {"name": named or task}, "diverged": False} | more
    description = describe_run(
        model, optimizer={"name": "AdamW", "groups": []}, recipe=Recipe(every=interval), rows={}, seed=0, more=extra
    )
    writer = TrajectoryWriter(folder, description)
    for t in range(snapshots):
        state = {name: motion(name, shape, t) for name, shape in shapes.items()}
        total = 1e-3 * interval * t if rate_sums is None else rate_sums[t]
        writer.add(interval * t, state, learning_rate=1e-3, learning_rate_sum=total)
    writer.close()
    return Trajectory(folder)


def waves(seed=0, period=9.0):
    """Every element swings about a level of its own, with a phase of its own: no straight line follows it."""

    def motion(name, shape, t):
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * seed)
        level, phase = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) * 2 * math.pi
        return level + torch.sin(2 * math.pi * t / period + phase)

    return motion


def lines(seed=0):
    """Every element moves along a line."""

    def motion(name, shape, t):
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * seed)
        return torch.randn(shape, generator=generator) + 0.1 * t * torch.randn(shape, generator=generator)

    return motion


def ramp(run):
    """All elements are ``1000 * run + t``: a state says which run and which snapshot it is of."""
    return lambda name, shape, t: torch.full(shape, 1000.0 * run + t)


def training(trajectories, nowcaster=None, recipe=None, network=None):
    """A meta-training on these, on one CPU process, ready to run."""
    recipe = recipe or settings()
    network = network or start_network(nowcaster or config(), None, recipe.seed)
    sampler = Sampler(trajectories, network.context, recipe.intervals(2), recipe.seed)
    found = MetaTraining(network, sampler, SHAPES, recipe, Accelerator(cpu=True))
    found.prepare()
    return found
