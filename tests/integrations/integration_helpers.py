"""What the tests of this folder share: a rule, a small graph nowcaster, settings of a short run, and what it left."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback, set_seed

from hf_nino import NiNoCallback
from hf_nino.nowcaster import NiNoModel, NowcasterConfig

# Tiny tensors: more threads only get in each other's way.
torch.set_num_threads(1)

STEPS, PERIOD = 16, 5

NOWCASTERS = pytest.mark.parametrize("nowcaster", ["linear", "graph"])
"""A rule, and a network on the neural graph."""


def make_nowcaster(name: str):
    """A rule by its name; ``"graph"`` is a NiNoModel of random weights, whose steps are small."""
    if name != "graph":
        return name
    set_seed(0)
    return NiNoModel(NowcasterConfig(hidden_size=8, positional_size=4))


def settings(**others):
    """Of a run on the CPU that nothing random or slow disturbs."""
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return defaults | others


def nowcasts(**others):
    """The same, with nowcasts at steps 5, 10 and 15 that must not fail and are not taken back."""
    ours = {"nowcaster": "linear", "nowcast_period": PERIOD, "nowcast_horizon": "2", "nowcast_patience": 0}
    ours["nowcast_on_invalid"] = "raise"
    return settings() | ours | others


def callback(nowcaster: str) -> NiNoCallback:
    """The same nowcasts from a callback."""
    return NiNoCallback(make_nowcaster(nowcaster), period=PERIOD, horizon=2, patience=0, on_invalid="raise")


class Moves(TrainerCallback):
    """The trainable parameters after every step; after those of NiNo, if that comes first."""

    def __init__(self):
        self.states = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }


def same(first, second):
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def written(trainer):
    """Steps of the nowcasts that were written, by the log."""
    return [entry["nino_step"] for entry in trainer.state.log_history if entry.get("nino_accepted") == 1]


def uncovered(nowcasting, model):
    """Names of trainable parameters that the nowcaster does not see in full: in its snapshots, and, if it reads a
    graph, as edges."""
    graph = nowcasting.graph
    snapshots = {name: tuple(shape) for name, shape, _ in nowcasting.store.signature()}
    edges = snapshots if graph is None else {name: tuple(graph.shapes[name]) for name in graph.parameter_names}
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return [name for name, shape in trainable.items() if not snapshots.get(name) == edges.get(name) == shape]
