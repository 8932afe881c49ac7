"""``merge_models``: models or state dicts in, one of the base's kind out."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import NeuralGraph
from ..graph.wrappers import canonical_name, inner_module
from ..nowcaster import Nowcaster, load_nowcaster
from .reading import Model, check_count, graph_for, states_of
from .recipe import MergeRecipe
from .states import merge_states


def merge_models(
    base: Model,
    fine_tuned: Sequence[Model],
    nowcaster: str | os.PathLike | Nowcaster | None = None,
    *,
    method: str = "nowcast",
    scale: float | None = None,
    horizons: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    rotate: bool | None = None,
    average_embeddings: bool = True,
    keep: Sequence[str] = (),
    graph: NeuralGraph | None = None,
    example_inputs: Any = None,
) -> nn.Module | dict[str, Tensor]:
    """One model out of several that were fine-tuned from the same base.

    After MetaMerge of the original release (https://bknyaz.github.io/blog/2026/meta-merge): a nowcaster takes base and
    task models for a trajectory, its nowcasts of horizons 1 to 5 are averaged, and so are token embeddings.  With
    published models it beat plain averaging in some cases and lost in others, so compare
    (:func:`hf_nino.merging.compare_merges`); ``method`` has the rivals.

    Args:
        base: the model that the others were fine-tuned from: a module, a state dict or a checkpoint's folder or file.
        fine_tuned: two or more of the same architecture, of the same kinds.
        nowcaster: a :class:`Nowcaster`, or what :func:`hf_nino.load_nowcaster` takes; for ``method="nowcast"``.
        method, scale, horizons, order, rotate, average_embeddings, keep: see
            :class:`~hf_nino.merging.MergeRecipe`.
        graph: the neural graph of the base, for nowcasters on the graph; made from a module, or from ``config.json``
            in a folder.
        example_inputs: for ``NeuralGraph.from_model``, if ``base`` is a module.

    Returns:
        A copy of ``base`` with other parameters, if it is a module; else a state dict.  Buffers, tensors of integers
        and what is kept are the base's; dtypes and devices too.  Models with batch normalization need new statistics.

    Raises:
        ValueError: fewer than two models, parameters that differ in name or shape, no graph where one is needed, or an
            argument out of range.
        InvalidNowcast: a merged number is not finite.
    """
    kept = keep if isinstance(keep, str) else tuple(keep)
    recipe = MergeRecipe(method, scale, _whole(horizons), _whole(order), rotate, average_embeddings, kept)
    tasks = check_count(fine_tuned)
    chosen = load_nowcaster(nowcaster) if nowcaster is not None and method == "nowcast" else None
    recipe = recipe.for_nowcaster(chosen, len(tasks))
    if chosen is None or not chosen.needs_graph:
        graph = None
    elif graph is None:
        graph = graph_for(base, example_inputs)
    start, *states = states_of([base, *tasks], graph)
    result = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in start.items()}

    def scratch() -> dict[str, Tensor]:
        return {name: torch.empty_like(tensor) for name, tensor in result.items()}

    merge_states(recipe, chosen, graph, start, states, result, scratch)
    return _like(base, result)


def _like(base: Model, state: dict[str, Tensor]) -> nn.Module | dict[str, Tensor]:
    """The merged state as what the base is."""
    if isinstance(base, nn.Module):
        merged = copy.deepcopy(inner_module(base))
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                if canonical_name(name) in state:
                    parameter.copy_(state[canonical_name(name)])
        return merged
    if not isinstance(base, Mapping):
        return state
    by_memory = {(base[name].data_ptr(), base[name].shape): tensor for name, tensor in state.items()}
    return {
        name: by_memory.get((tensor.data_ptr(), tensor.shape), tensor) if isinstance(tensor, Tensor) else tensor
        for name, tensor in base.items()
    }


def _whole(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
