"""What is inside wrappers that change how a model runs, not what it computes: its module, and its names."""

from __future__ import annotations

import torch
from torch import nn

COMPONENTS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What wrappers of submodules put into the names of the parameters below them."""


def canonical_name(name: str) -> str:
    """``name`` without the components that compiled or checkpointed submodules put into it."""
    return ".".join(part for part in name.split(".") if part not in COMPONENTS)


def inner_module(model: nn.Module) -> nn.Module:
    """The bare model inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def traceable(model: nn.Module) -> nn.Module:
    """The bare model, if its forward pass can be traced.

    Raises:
        ValueError: a model that cannot be run with other parameters than its own (TorchScript), or whose parameters
            have no shape yet (lazy modules).
    """
    model = inner_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "`model` must be a plain module, got a TorchScript one, which runs with its own parameters only: build "
            "the graph from the module that it was made of; their parameters have the same names"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"`model` must know the shapes of its parameters, but {name!r} is lazy and has none yet: "
                "run one forward pass of the model first"
            )
    return model
