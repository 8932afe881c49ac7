"""Merging states: {name: tensor} of a base and of models that were fine-tuned from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..graph import EdgeType, NeuralGraph
from ..nowcaster import Nowcaster
from ..nowcaster.edge_types import edge_types_of
from ..offline.predicting import State, mean, predict_into
from ..training.guard import InvalidNowcast
from .recipe import MergeRecipe


@torch.no_grad()
def merge_states(
    recipe: MergeRecipe,
    nowcaster: Nowcaster | None,
    graph: NeuralGraph | None,
    base: State,
    tasks: Sequence[State],
    results: State,
    scratch: Callable[[], State],
) -> None:
    """Write the merged state into ``results``, tensor by tensor.

    Parameters that the graph does not have (frozen ones) are averaged, and so are token embeddings, if the recipe says
    so.  Sums are float32, results of the dtype of ``results``; deterministic.

    Args:
        recipe: settled for this nowcaster (:meth:`MergeRecipe.for_nowcaster`).
        graph: for nowcasters that need one.
        base, tasks: only read.
        results: contiguous, with the base's values for what is kept.
        scratch: makes room for one prediction: like ``results``.

    Raises:
        ValueError: parameters that are not in all models, or differ in shape.
        InvalidNowcast: a merged number is not finite.
    """
    check_same(base, tasks, recipe)
    predictions: list[tuple[State, State]] = []
    seen: Collection[str] = ()
    if recipe.method == "nowcast":
        seen = set(base) if graph is None else set(graph.parameter_names)
        names = [name for name in base if name in seen] if graph is None else graph.parameter_names
        models = [base, *(_Standing(task, base, recipe) for task in tasks)]
        orders = recipe.orders(len(tasks))
        for order in orders:
            states = [_Some(models[number], names) for number in order]
            found = _Some(results if len(orders) == 1 else scratch(), names)
            predict_into(nowcaster, graph, states, recipe.horizons, found, from_first=True)
            predictions.append((states[-1], found))
    for name in base:
        if recipe.keeps(name):
            results[name].copy_(base[name])
            continue
        tensors = [task[name] for task in tasks]
        if recipe.method == "task-arithmetic":
            merged = add_tasks(base[name], tensors, recipe.factor)
        elif name in seen and not (recipe.average_embeddings and is_embedding(name, base[name], graph)):
            merged = mean([along(last[name], found[name], recipe.factor) for last, found in predictions])
        else:
            merged = mean(tensors)
        if not bool(torch.isfinite(merged).all()):
            raise InvalidNowcast(f"the merge is refused: {name!r} has values that are not finite")
        results[name].copy_(merged)


def add_tasks(base: Tensor, tasks: Sequence[Tensor], scale: float) -> Tensor:
    """``base + scale * sum of (task - base)``, in float32."""
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    return start + scale * sum(task.to(start) - start for task in tasks)


def along(last: Tensor, prediction: Tensor, scale: float) -> Tensor:
    """``last + scale * (prediction - last)``, in float32."""
    start = last.to(torch.promote_types(last.dtype, torch.float32))
    return start + scale * (prediction.to(start) - start)


def is_embedding(name: str, tensor: Tensor, graph: NeuralGraph | None) -> bool:
    """Whether a parameter is a table of token embeddings: by its edges in the graph, without one by its name."""
    if graph is None:
        few = (min(tensor.shape[0], 2), *tensor.shape[1:]) if tensor.ndim else ()
        return bool((edge_types_of(name, few) == EdgeType.TOKEN_EMBEDDING).all())
    kinds = [block.edge_type for block in graph.trainable_blocks if block.parameter == name]
    return bool(kinds) and all(kind == EdgeType.TOKEN_EMBEDDING for kind in kinds)


def check_same(base: State, tasks: Sequence[State], recipe: MergeRecipe) -> None:
    """Raise ``ValueError`` unless all models have the base's parameters, in its shapes; kept ones may differ."""
    advice = "leave them as they are in the base with `keep` (--keep PATTERN), or bring the models to one shape first"
    for number, task in enumerate(tasks, start=1):
        odd = sorted(name for name in task.keys() ^ base.keys() if not recipe.keeps(name))
        if odd:
            where = [f"{name!r} (only in {'the base' if name in base else f'model {number}'})" for name in odd[:5]]
            raise ValueError(
                f"the base and model {number} differ in {len(odd)} parameters: {', '.join(where)}; {advice}"
            )
        differ = [name for name in base if not recipe.keeps(name) and task[name].shape != base[name].shape]
        if differ:
            shapes = [f"{name!r} {tuple(base[name].shape)} and {tuple(task[name].shape)}" for name in differ[:5]]
            raise ValueError(
                f"the base and model {number} differ in the shapes of {len(differ)} parameters: {', '.join(shapes)}; "
                f"{advice}"
            )


class _Some(Mapping[str, Tensor]):
    """Some tensors of a state, still looked up one by one."""

    def __init__(self, state: State, names: Collection[str]) -> None:
        self.state, self.names = state, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Standing(_Some):
    """A task model in which the base stands in for what is kept: the nowcaster sees whole networks."""

    def __init__(self, task: State, base: State, recipe: MergeRecipe) -> None:
        super().__init__(task, base)
        self.base, self.recipe = base, recipe

    def __getitem__(self, name: str) -> Tensor:
        return (self.base if self.recipe.keeps(name) else self.state)[name]
