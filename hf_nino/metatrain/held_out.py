"""How far nowcasts are off on trajectories that nothing was learned from, beside what costs nothing.

The measure is that of meta-training, the L1 distance of scaled moves (:mod:`hf_nino.metatrain.objective`), by horizon
and by type of edge.  The rivals:

``persistence``  the last state: nothing moves any more
``linear``       the mean move of the history goes on, k intervals times a factor.  The factor of each horizon is the
                 best of :data:`FACTORS` *on the very slices that are measured*, which is more than a user could know

Learning rates differ, and with them what there is to predict: errors are also told for the horizons over which the
mean learning rate is within 10% of the history's (``constant``), below (``falling``) and above (``rising``).

Shape letters: N slices, K horizons, T edge types, G factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import EdgeType
from ..nowcaster.modeling import NiNoModel, WNNModel
from .objective import as_edges, scaled_deltas, scaled_moves
from .sampling import Batch, Slice, read_batch
from .shapes import ModelShape, Shapes
from .split import task_of
from .trajectory import Trajectory

FACTORS = tuple(i / 10 for i in range(17))
"""Of the mean move; 1 goes on as before."""

METHODS = ("persistence", "linear", "linear_one_factor", "nowcaster")
METRICS = ("error", "relative")
"""``error``: mean absolute error of an element in scaled units, mean over slices.  ``relative``: the same over
persistence's of the same slice, median over slices; a mean would be that of the few slices in which hardly anything
moves."""

PHASES = {"constant": (0.9, 1.1), "falling": (-math.inf, 0.9), "rising": (1.1, math.inf)}
"""Mean learning rate over a horizon in units of that of the history: from, and to below."""

ALL = "ALL"
"""Beside the names of edge types: all of them."""

TOGETHER = 4
"""Slices that are computed at once."""

_TYPES = tuple(kind for kind in EdgeType if kind < EdgeType.RESIDUAL)


@dataclass(frozen=True, eq=False)
class SliceErrors:
    """Mean absolute errors of one slice, float64; 0 where there is no such horizon or type.

    Args:
        task: of the trajectory.
        mask: bool [K], horizons that there are.
        elements: [T], that count.
        persistence, nowcaster: [K, T].
        linear: [K, G, T].
        rate: [K], mean learning rate over each horizon in units of that of the history.
    """

    task: str
    mask: Tensor
    elements: Tensor
    persistence: Tensor
    nowcaster: Tensor
    linear: Tensor
    rate: Tensor


def evaluation_slices(trajectory: Trajectory, context: int, interval: int, count: int) -> list[Slice]:
    """At most ``count`` slices, evenly spread over a trajectory, with snapshots as near to ``interval`` steps apart as
    recorded ones allow; none where it is too short."""
    stride = max(1, round(interval / trajectory.interval))
    last = len(trajectory) - 1 - context * stride
    if last < 0:
        return []
    starts = dict.fromkeys(round(last * i / max(1, count - 1)) for i in range(count))
    return [Slice(start, stride) for start in starts]


@torch.no_grad()
def measure(
    network: NiNoModel | WNNModel,
    trajectories: Sequence[Trajectory],
    shapes: Shapes,
    interval: int,
    *,
    slices: int = 8,
    mask_rounding: bool = True,
    progress: Callable[[], Any] = lambda: None,
) -> list[SliceErrors]:
    """The errors of slices of trajectories.

    Args:
        interval: steps between the snapshots of a slice.
        slices: of each trajectory.
        mask_rounding: leave out parameters that only move by rounding.
        progress: is told of every trajectory that is done.
    """
    device, found = next(network.parameters()).device, []
    for trajectory in trajectories:
        shape = shapes.of(trajectory)
        chosen = evaluation_slices(trajectory, network.context, interval, slices)
        for first in range(0, len(chosen), TOGETHER):
            part = chosen[first : first + TOGETHER]
            batch = read_batch(trajectory, part, network.context, network.max_horizon).to(device)
            skip = shape.rounding if mask_rounding else frozenset()
            found += _errors(network, shape, batch, skip, task_of(trajectory))
        progress()
    return [one for one in found if one.mask.any() and one.elements.sum() > 0]


def _errors(
    network: NiNoModel | WNNModel, shape: ModelShape, batch: Batch, skip: frozenset[int], task: str
) -> list[SliceErrors]:
    """The errors of each slice of a batch."""
    size, horizons = batch.mask.shape
    double = {"dtype": torch.float64, "device": batch.mask.device}
    room = size, network.max_horizon, len(_TYPES)
    elements = torch.zeros(size, len(_TYPES), **double)
    persistence, nowcaster = torch.zeros(room, **double), torch.zeros(room, **double)
    linear = torch.zeros(*room[:2], len(FACTORS), len(_TYPES), **double)
    ahead = torch.arange(1, horizons + 1, device=batch.mask.device)
    for number, block, delta in scaled_deltas(network, shape, batch):
        if number in skip:
            continue
        kind, counted = _TYPES.index(block.edge_type), batch.moves[block.parameter].double()
        past = as_edges(block, batch.past[block.parameter])
        spread = batch.spread[block.parameter].view(-1, 1, 1, 1)
        line = ((past[..., -1] - past[..., 0]) / (past.shape[-1] - 1) / spread).unsqueeze(-1) * ahead
        move = scaled_moves(block, batch)

        def total(errors: Tensor, counted: Tensor = counted) -> Tensor:
            return counted[:, None] * errors.abs().sum((1, 2, 3), dtype=torch.float64)

        elements[:, kind] += counted * block.edges * block.shape[2]
        persistence[:, :horizons, kind] += total(move)
        nowcaster[:, :horizons, kind] += total(delta - move)
        for place, factor in enumerate(FACTORS):
            linear[:, :horizons, place, kind] += total(factor * line - move)
    mask = torch.zeros(room[:2], dtype=torch.bool)
    mask[:, :horizons] = batch.mask.cpu()
    counts = elements.clamp(min=1)[:, None]
    rate = torch.ones(room[:2], dtype=torch.float64)
    rate[:, :horizons] = (batch.conditions.ahead / batch.conditions.horizons).cpu()
    tables = persistence / counts, nowcaster / counts, linear / counts.unsqueeze(2)
    rows = zip(mask, elements.cpu(), *(table.cpu() for table in tables), rate, strict=True)
    return [SliceErrors(task, *row) for row in rows]


def summarise(errors: Sequence[SliceErrors]) -> dict[str, Any]:
    """What is written of the errors of some trajectories; plain values, ``None`` where nothing was measured.

    Slices count the same within their task, and all tasks the same.  For each of :data:`METRICS`: the best
    ``factors`` of ``linear``, by horizon and one for all; for :data:`ALL` edges and each type a list by horizon of
    each of :data:`METHODS`, and the ``mean`` of each over horizons.  ``phases`` has the same for all edges and each of
    :data:`PHASES`, with factors that are the best in this phase.  ``better_than_linear`` is the share of slices in
    which the nowcaster's error, over all horizons, is below that of ``linear``.
    """
    if not errors:
        return {"slices": 0, "tasks": {}}
    tasks = [one.task for one in errors]
    mask = torch.stack([one.mask for one in errors])
    elements = torch.stack([one.elements for one in errors])  # [N, T]
    every = {
        "persistence": torch.stack([one.persistence for one in errors]).unsqueeze(2),
        "nowcaster": torch.stack([one.nowcaster for one in errors]).unsqueeze(2),
        "linear": torch.stack([one.linear for one in errors]),
    }  # [N, K, 1 or G, T]
    share = (elements / elements.sum(1, keepdim=True))[:, None, None]
    kinds = {ALL: Errors({name: (values * share).sum(-1) for name, values in every.items()}, mask)}
    for place, kind in enumerate(_TYPES):
        present = elements[:, place] > 0
        if present.any():
            values = {name: values[..., place] for name, values in every.items()}
            kinds[kind.name] = Errors(values, mask & present[:, None])
    found: dict[str, Any] = {"slices": len(errors), "tasks": {name: tasks.count(name) for name in sorted(set(tasks))}}
    for metric in METRICS:
        relative = metric == "relative"
        table = {name: on_edges.relative() if relative else on_edges for name, on_edges in kinds.items()}
        best, one, factors = _best_factors(table[ALL], tasks, metric)
        found[metric] = factors | {
            name: _by_horizon(on_edges, tasks, metric, best, one) for name, on_edges in table.items()
        }
        if metric == "error":
            values = kinds[ALL].values
            lines = values["linear"].gather(2, best.view(1, -1, 1).expand(len(errors), -1, 1))
            gains = ((values["nowcaster"] - lines).squeeze(2) * mask).sum(1)
            found["better_than_linear"] = float((gains < 0).double().mean())
    found["phases"] = _by_phase(kinds[ALL], torch.stack([one.rate for one in errors]), tasks)
    return found


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors of all slices on some edges: ``values`` by method, [N, K, 1 or G], and where they are defined, [N, K]."""

    values: dict[str, Tensor]
    mask: Tensor

    def relative(self) -> Errors:
        """Over persistence's."""
        still = self.values["persistence"]
        values = {name: tensor / still.clamp(min=1e-30) for name, tensor in self.values.items()}
        return Errors(values, self.mask & (still.squeeze(2) > 0))


def averaged(values: Tensor, mask: Tensor, tasks: Sequence[str], metric: str) -> Tensor:
    """[N, K, G] -> [K, G]: mean or median over the slices of each task, then mean over tasks; NaN where none is."""
    values = values.where(mask.unsqueeze(2), torch.nan)
    of_tasks = [values[[i for i, task in enumerate(tasks) if task == name]] for name in sorted(set(tasks))]
    if metric == "relative":
        return torch.stack([some.nanquantile(0.5, dim=0) for some in of_tasks]).nanmean(0)
    return torch.stack([some.nanmean(0) for some in of_tasks]).nanmean(0)


def _best_factors(errors: Errors, tasks: Sequence[str], metric: str) -> tuple[Tensor, int, dict[str, Any]]:
    """Of ``linear``: which is best at each horizon [K] and which over all of them, and the same as plain values."""
    lines = averaged(errors.values["linear"], errors.mask, tasks, metric)  # [K, G]
    best, one = lines.nan_to_num(nan=math.inf).argmin(1), int(lines.nanmean(0).argmin())
    known = lines.isfinite().any(1).tolist()
    by_horizon = [FACTORS[i] if there else None for i, there in zip(best.tolist(), known, strict=True)]
    return best, one, {"factors": by_horizon, "one_factor": FACTORS[one]}


def _by_phase(errors: Errors, rate: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
    """Errors in each of the :data:`PHASES` that there are; ``rate`` [N, K] says in which a horizon is."""
    found: dict[str, Any] = {}
    for phase, (low, high) in PHASES.items():
        there = errors.mask & (rate >= low) & (rate < high)
        if not there.any():
            continue
        found[phase] = {"slices": int(there.any(1).sum())}
        for metric in METRICS:
            part = Errors(errors.values, there)
            part = part.relative() if metric == "relative" else part
            best, one, factors = _best_factors(part, tasks, metric)
            found[phase][metric] = factors | _by_horizon(part, tasks, metric, best, one)
    return found


def _by_horizon(errors: Errors, tasks: Sequence[str], metric: str, best: Tensor, one: int) -> dict[str, Any]:
    """A list by horizon of each method, and their means."""
    mean = {name: averaged(values, errors.mask, tasks, metric) for name, values in errors.values.items()}
    rows = {
        "persistence": mean["persistence"][:, 0],
        "linear": mean["linear"].gather(1, best[:, None])[:, 0],
        "linear_one_factor": mean["linear"][:, one],
        "nowcaster": mean["nowcaster"][:, 0],
    }
    lists: dict[str, Any] = {name: [_number(value) for value in rows[name].tolist()] for name in METHODS}
    return lists | {"mean": {name: _number(rows[name].nanmean().item()) for name in METHODS}}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
