"""The neural graph of the model that is trained, also where no process holds all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..graph import NeuralGraph
from .rng import preserved_rng
from .stores import ParameterStore


def agreed_graph(store: ParameterStore, example_inputs: Any) -> tuple[NeuralGraph | None, str, Exception | None]:
    """The graph that all ranks find; or ``None``, why not, and the error if it was this rank's.

    Args:
        example_inputs: or a function without arguments that returns them.
    """
    graph, error = None, None
    try:
        with preserved_rng():
            inputs = example_inputs() if callable(example_inputs) else example_inputs
            graph = graph_of(store, inputs)
    except Exception as caught:
        error = caught
    failure = store.agree("" if error is None else f"{type(error).__name__}: {error}")
    if not failure and store.ranks is not None:
        known = repr((graph.groups, graph.blocks, graph.constants))
        failure = "" if store.ranks.alike(known) else "the ranks do not find the same one"
    return None if failure else graph, failure, error


def graph_of(store: ParameterStore, example_inputs: Any = None) -> NeuralGraph:
    """The graph of the model in ``store``; of a model without weights that is built like it, if it is sharded.

    Args:
        store: the same parameters on all ranks.
        example_inputs: see ``NeuralGraph.from_model``.

    Raises:
        ValueError: a sharded model that is no plain transformers model, or one that cannot be traced.
    """
    return NeuralGraph.from_model(store.model if store.whole else unsharded(store), example_inputs)


def unsharded(store: ParameterStore) -> nn.Module:
    """A transformers model on the meta device, with the parameters of the sharded one, and the same ones trainable.

    Raises:
        ValueError: the model has no configuration to build it from, or it would have other parameters.
    """
    model = store.model
    kind = next((base for base in type(model).__mro__ if "FSDP" not in base.__name__), nn.Module)
    if not issubclass(kind, PreTrainedModel):
        model = getattr(model, "module", model)  # FSDP1
        kind = type(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a sharded {kind.__name__} cannot be traced; pass `graph`, built by NeuralGraph.from_model before the "
            "model was sharded"
        )
    with torch.device("meta"):
        hollow = kind(model.config)
    shapes = {name: shape for name, shape, _ in store.signature()}
    for name, parameter in hollow.named_parameters():
        parameter.requires_grad_(name in shapes)
    found = {name: tuple(p.shape) for name, p in hollow.named_parameters() if p.requires_grad}
    if found != shapes:
        odd = sorted(dict(found.items() ^ shapes.items()))[:3]
        raise ValueError(
            f"a {kind.__name__} that is built from the configuration has other parameters than the sharded one "
            f"({odd}); pass `graph`, built by NeuralGraph.from_model before the model was sharded"
        )
    return hollow.train(model.training)
