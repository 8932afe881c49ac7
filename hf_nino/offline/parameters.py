"""Which of a checkpoint's tensors are parameters, and what the model calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..graph import NeuralGraph
from ..graph.source import configuration, graph_of, model_class
from ..graph.wrappers import canonical_name, inner_module
from .weights import Weights

logger = logging.get_logger(__name__)

STATISTICS = ("running_mean", "running_var")
"""Ends of names of buffers that move during training; where no model says so, the names do."""

WRAPPER = "module."


@dataclass(frozen=True)
class Naming:
    """Which tensors of a checkpoint are to be predicted.

    Attributes:
        names: {parameter: name in the checkpoint}.
        aliases: {another name in the checkpoint: parameter}, of tied weights that it holds in two copies.
    """

    names: Mapping[str, str]
    aliases: Mapping[str, str]


class NamesDiffer(ValueError):
    """The checkpoint's names are not those of the model's parameters."""


def names_in_file(weights: Weights, model: nn.Module | None) -> Naming:
    """All tensors of a checkpoint but for buffers, by the names that they have in it.

    Args:
        model: says which are buffers and which are tied; ``None``: the names do, and memory that is shared.
    """
    buffers, tied = set(), {}
    if model is not None:
        buffers = {canonical_name(name) for name, _ in model.named_buffers(remove_duplicate=False)}
        tied = tied_names(model)
    in_file = _by_name(weights)
    names, aliases = {}, {}
    for name in weights:
        bare = _bare(name)
        if bare in buffers or bare.rpartition(".")[2] in STATISTICS:
            continue
        home = in_file.get(tied.get(bare, ""))
        if home is None:
            names[name] = name
        else:
            aliases[name] = home
    return Naming(names, aliases)


def names_in_model(weights: Weights, wanted: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> Naming:
    """A checkpoint's tensors by the names of the model's parameters.

    Args:
        wanted: {parameter: shape}.
        tied: {another name of it: parameter}.

    Raises:
        NamesDiffer: a parameter is missing or has another shape; transformers fuses or renames some tensors when it
            loads them.
    """
    in_file = _by_name(weights)
    also: dict[str, list[str]] = {}
    for alias, name in tied.items():
        also.setdefault(name, []).append(alias)
    names, aliases = {}, {}
    for name, shape in wanted.items():
        present = [in_file[n] for n in (name, *also.get(name, ())) if n in in_file]
        held = [weights.aliases.get(n, n) for n in present]
        if not held:
            raise NamesDiffer(f"the checkpoint has no parameter {name!r}, which the model has")
        if weights.shape(held[0]) != tuple(shape):
            found = f"shape {weights.shape(held[0])}, in the model {tuple(shape)}"
            raise NamesDiffer(f"parameter {name!r} has in the checkpoint {found}")
        names[name] = held[0]
        aliases |= {other: name for other in held[1:] if other != held[0]}
    return Naming(names, aliases)


def tied_names(model: nn.Module) -> dict[str, str]:
    """{another name: the parameter's name} of every parameter that has several."""
    names = {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    return {
        canonical_name(name): names[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] != canonical_name(name)
    }


def model_graph(model: nn.Module | str | Path | None, checkpoint: Path) -> NeuralGraph:
    """The neural graph of the model whose checkpoints are read.

    Args:
        model: it, or a folder, ``config.json``, model type or repository with its configuration; ``None``: the
            checkpoint's own ``config.json``.

    Raises:
        ValueError: nothing says what model it is.
    """
    if isinstance(model, nn.Module):
        return NeuralGraph.from_model(model)
    if model is None:
        if not (checkpoint / "config.json").is_file():
            adapter = (checkpoint / "adapter_config.json").is_file()
            raise ValueError(
                f"{checkpoint} holds a PEFT adapter, whose graph is not known without the model around it; use a "
                "nowcaster that needs no graph"
                if adapter
                else f"this nowcaster needs the model's neural graph, and {checkpoint} has no config.json: name the "
                "model (`--model`: a folder or config.json, a model type, or a repository)"
            )
        model = checkpoint
    return graph_of(model)[0]


def loadable(checkpoint: Path) -> type[PreTrainedModel] | None:
    """The class whose ``from_pretrained`` reads a checkpoint, if there is one."""
    if not (checkpoint / "config.json").is_file():
        return None
    try:
        return model_class(configuration(checkpoint)[0], checkpoint)
    except ValueError:
        return None


def bare_model(model: nn.Module | str | Path | None, checkpoint: Path) -> nn.Module | None:
    """The module given, or one without weights from a configuration: that of ``model``, or the checkpoint's own.

    ``None`` if there is no configuration, or the model cannot be built so.
    """
    if isinstance(model, nn.Module):
        return inner_module(model)
    if model is None and not (checkpoint / "config.json").is_file():
        return None
    source = checkpoint if model is None else model
    try:
        config, _ = configuration(source)
        with torch.device("meta"):
            return model_class(config, source)(config)
    except Exception as error:
        logger.info(f"No model from {source}: {type(error).__name__}: {error}")
        return None


def _by_name(weights: Weights) -> dict[str, str]:
    """{name in the model: name in the checkpoint}."""
    names = (*weights.aliases, *weights)
    return {_bare(name): name for name in names} | {name: name for name in names}


def _bare(name: str) -> str:
    """A name as the model inside wrappers has it."""
    return canonical_name(name.removeprefix(WRAPPER))
