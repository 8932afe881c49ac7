"""The parameters of models to merge, whatever they are: modules, state dicts, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..graph import NeuralGraph
from ..graph.wrappers import canonical_name, inner_module
from ..offline.parameters import (
    STATISTICS,
    NamesDiffer,
    Naming,
    bare_model,
    model_graph,
    names_in_file,
    names_in_model,
    tied_names,
)
from ..offline.predicting import State
from ..offline.weights import Renamed, Weights

Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike
"""A module, a state dict, or a checkpoint: its folder or its file."""


def check_count(fine_tuned: Sequence[Model]) -> list[Model]:
    """The task models as a list.

    Raises:
        ValueError: fewer than two, or not a list.
    """
    if isinstance(fine_tuned, (nn.Module, Mapping, str, os.PathLike)) or len(fine_tuned) < 2:
        count = len(fine_tuned) if isinstance(fine_tuned, (list, tuple)) else f"one {type(fine_tuned).__name__}"
        raise ValueError(f"`fine_tuned` must be a list of at least 2 models, got {count}")
    return list(fine_tuned)


def states_of(models: Sequence[Model], graph: NeuralGraph | None) -> list[State]:
    """{parameter: tensor} of base and task models, without what is no parameter, tied ones once.

    Args:
        models: the base first; if it is a module, it says which names of a state dict are buffers or tied.
        graph: in whose names, if it is given.
    """
    if all(isinstance(model, (str, os.PathLike)) for model in models):
        folders = [Path(model).expanduser() for model in models]
        weights = [Weights.at(folder) for folder in folders]
        return named_alike(weights, naming_of(weights[0], folders[0], None, graph))
    known = inner_module(models[0]) if isinstance(models[0], nn.Module) else None
    return [_state(model, known, graph) for model in models]


def naming_of(
    weights: Weights, folder: Path, model: nn.Module | str | Path | None, graph: NeuralGraph | None
) -> Naming:
    """Which tensors of the base are merged: those of the graph, or else all but buffers.

    Raises:
        ValueError: the graph's parameters are not in the checkpoint under their names.
    """
    if graph is None:
        return names_in_file(weights, bare_model(model, folder))
    wanted = {name: graph.shapes[name] for name in graph.parameter_names}
    try:
        return names_in_model(weights, wanted, graph.aliases)
    except NamesDiffer as error:
        raise ValueError(
            f"{folder}: {error}; load the models with transformers and pass them to hf_nino.merge_models"
        ) from error


def named_alike(weights: Sequence[Weights], naming: Naming) -> list[State]:
    """Base and task models by the names of the base; what a task model has beyond them is there, to be noticed."""
    states: list[State] = [Renamed(weights[0], naming.names)]
    for task in weights[1:]:
        names = {name: file for name, file in naming.names.items() if file in task}
        beyond = [name for name in names_in_file(task, None).names if name not in weights[0]]
        states.append(Renamed(task, names | {name: name for name in beyond}))
    return states


def graph_for(base: Model, example_inputs: Any = None) -> NeuralGraph:
    """The neural graph of a base.

    Raises:
        ValueError: it is a state dict, or a checkpoint without a configuration.
    """
    if isinstance(base, nn.Module):
        return NeuralGraph.from_model(base, example_inputs)
    if isinstance(base, Mapping):
        raise ValueError(
            "`graph` must be the model's NeuralGraph for this nowcaster and a state dict: a state dict does not say "
            "how its parameters are connected; or pass models instead"
        )
    return model_graph(None, Path(base).expanduser())


def _state(model: Model, known: nn.Module | None, graph: NeuralGraph | None) -> State:
    if isinstance(model, nn.Module):
        named = inner_module(model).named_parameters()
        return {canonical_name(name): p.detach() for name, p in named if p.is_floating_point()}
    if isinstance(model, Mapping):
        return _parameters(model, known)
    folder = Path(model).expanduser()
    weights = Weights.at(folder)
    return Renamed(weights, naming_of(weights, folder, known, graph).names)


def _parameters(state: Mapping[str, Tensor], known: nn.Module | None) -> State:
    odd: set[str] = set()
    if known is not None:
        odd = {*tied_names(known), *(canonical_name(name) for name, _ in known.named_buffers(remove_duplicate=False))}
    seen: set[tuple] = set()
    parameters = {}
    for key, tensor in state.items():
        name = canonical_name(key) if known is not None else key
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or name in odd:
            continue
        same = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if name.rpartition(".")[2] in STATISTICS or (tensor.numel() and same in seen):
            continue
        seen.add(same)
        parameters[name] = tensor.detach()
    return parameters
