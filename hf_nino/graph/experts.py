"""Mixtures of experts: parameters with one slice for each expert, and the router neurons that hold an expert together.

The neurons of an expert are (expert, unit).  The router's output neuron of an expert is its node: the router's row are
its edges, and constant edges lead from it to the expert's units, as from a head to its channels.  Traced experts run
one by one; afterwards :func:`merge_slices` puts their edges into one block for each parameter, and adds what experts
that no token was sent to would have had.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor

from .provenance import NONE, ParameterUse, Record
from .structure import EdgeType
from .trace import Call, Trace
from .views import ParameterView


def remember_router(trace: Trace, view: ParameterView) -> None:
    """Note that a slice of a parameter is used after a router has chosen among as many experts.

    A router may know more experts than there are weights for: those at its end pass tokens on as they are.
    """
    router = trace.record.last_router
    if view.slice is not None and router is not None and view.slices <= len(router) <= 2 * view.slices:
        trace.record.routers.setdefault(view.parameter, router[: view.slices])


def spread_choices(call: Call, dims: list[int]) -> None:
    """Change a router's choices, in place, so that they fall on all experts in turn.

    Where neurons come from does not depend on which expert a token goes to, but an expert that none goes to is not
    seen at all, and the routers of a model that was just made send all tokens to a few.
    """
    chosen = next((result for result in call.results if result.dtype == torch.int64), None)
    if chosen is None or chosen.is_meta or len(dims) != 1:
        return
    experts = call.tensors[0].shape[dims[0]]
    keeps = chosen.dim() == call.tensors[0].dim()
    rows = chosen.movedim(dims[0], -1) if keeps else chosen[..., None]
    turn = torch.arange(rows.numel()).view(rows.shape) % experts
    rows.copy_(turn)


def route(trace: Trace, view: ParameterView, source: Tensor, target: Tensor) -> None:
    """Join the fresh neurons of an expert to the router's neuron for it, if a router of that size has just chosen.

    What an expert's units say afterwards goes to neurons that all experts share, which belong to no expert.
    """
    record, router = trace.record, trace.record.routers.get(view.parameter)
    if view.slice is None:
        return
    if router is None:
        record.confined.append(target)
        return
    expert = router[view.slice : view.slice + 1]
    held = record.held.get(int(expert))
    if held is None or not torch.isin(record.find(source), record.find(held)).any():
        _hold(record, expert, target)


def _hold(record: Record, expert: Tensor, units: Tensor) -> None:
    experts = expert.expand(len(units))
    record.connect(EdgeType.HEAD, experts, units)
    record.stars.append((experts.clone(), units.clone()))
    record.held[int(expert)] = torch.cat([record.held.get(int(expert), units[:0]), units])


def unite_slices(trace: Trace, ids: Tensor, dims: list[int]) -> Tensor | None:
    """What remains when outputs of experts are summed over the experts: the same neurons for all of them.

    ``None`` when the reduced dimensions are not made by slices of one parameter.
    """
    record = trace.record
    if len(dims) != 1 or ids.shape[dims[0]] < 2 or bool((ids < 0).any()):
        return None
    parts = ids.unbind(dims[0])
    if record.allocation(int(parts[0].min())).family is None:
        return None
    made_by = [record.allocation(int(part.min())) for part in parts]
    if made_by[0].family is None or len({a.family for a in made_by}) != 1 or len({a.start for a in made_by}) == 1:
        return None
    for part in parts[1:]:
        record.unite(parts[0].flatten(), part.flatten())
    return record.find(parts[0]).unsqueeze(dims[0])


def are_slices(trace: Trace, parts: list[Tensor]) -> bool:
    """Whether neurons of several experts are concatenated, as rows for their tokens."""
    known = [part[part >= 0] for part in parts if bool((part >= 0).any())]
    made_by = [trace.record.allocation(int(part.min())) for part in known]
    families = {a.family for a in made_by}
    return len(families) == 1 and None not in families and len({a.start for a in made_by}) > 1


def unite_rows(trace: Trace, ids: Tensor, dim: int) -> Tensor:
    """Rows of several experts that go to the same places are the same neurons; returns one row, compact."""
    rows = ids.unbind(dim)
    if len(rows) == 1 or not are_slices(trace, list(rows)):
        return ids
    for row in torch.unique(ids, dim=dim).unbind(dim)[1:]:
        trace.record.unite(rows[0].flatten(), row.flatten())
    return trace.record.find(rows[0].unsqueeze(dim))


def pin_choosers(record: Record) -> None:
    """Routers whose choice is not an index into weights that we know (but a module's number, a table's row) stay."""
    known = torch.cat(
        [record.find(router) for router in record.routers.values()] or [torch.empty(0, dtype=torch.int64)]
    )
    for chooser in record.choosers:
        if not torch.isin(record.find(chooser), known).any():
            record.pin(chooser, "chosen by number (an expert that is a module of its own)")


def merge_slices(record: Record) -> None:
    """Replace the uses of each sliced parameter by one, over all experts, wherever they share a side."""
    sliced: dict[str, list[ParameterUse]] = defaultdict(list)
    for use in record.uses:
        if use.slice is not None:
            sliced[use.parameter].append(use)
    new_units: dict[tuple[int, int], dict[int, int]] = {}
    merged = {}
    for name, uses in sorted(sliced.items(), key=lambda item: not _same(record, item[1], "source")):
        uses.sort(key=lambda use: use.slice)
        if len({use.slice for use in uses}) != len(uses):
            continue
        uses += _missing(record, name, uses, len(record.routers.get(name, uses)), new_units)
        uses.sort(key=lambda use: use.slice)
        joined = _join(record, name, uses)
        if joined is not None:
            merged[name] = joined
    kept = []
    for use in record.uses:
        if use.parameter not in merged:
            kept.append(use)
        elif merged[use.parameter] is not None:
            kept.append(merged[use.parameter])
            merged[use.parameter] = None
    record.uses = kept


def _same(record: Record, uses: list[ParameterUse], side: str) -> bool:
    first = record.find(getattr(uses[0], side))
    return all(first.equal(record.find(getattr(use, side))) for use in uses[1:])


def _is_node(record: Record, ids: Tensor) -> bool:
    return len(ids) == 1 and record.allocation(int(ids[0])).kind == "parameter"


def _missing(
    record: Record, name: str, uses: list[ParameterUse], experts: int, new_units: dict[tuple[int, int], dict[int, int]]
) -> list[ParameterUse]:
    """The uses that experts without tokens would have had, after the pattern of the first one that had some."""
    router = record.routers.get(name)
    missing = sorted(set(range(experts)) - {use.slice for use in uses})
    if router is None or not missing:
        return []
    pattern = uses[0]
    key = int(router[0])
    held = record.held.get(int(router[pattern.slice]))
    own = set() if held is None else set(record.find(held).tolist())
    found = []
    for expert in missing:
        known = new_units.setdefault((key, expert), {})
        sides = {}
        for side in ("source", "target"):
            ids = record.find(getattr(pattern, side))
            mine = torch.tensor([n in own for n in ids.tolist()])
            if bool(mine.any()) and not set(ids[mine].tolist()) <= known.keys():
                # As many ids as the pattern's, united where those are: gate and up are one neuron made twice.
                units = record.new_neurons(
                    record.allocation(int(ids[mine][0])).name, int(mine.sum()), family=name, rank=expert
                )
                for old, new in zip(ids[mine].tolist(), units, strict=True):
                    record.unite(torch.tensor([known.setdefault(old, int(new))]), new[None])
                _hold(record, router[expert], units)
            sides[side] = torch.tensor([known.get(n, n) for n in ids.tolist()])
        offset = (expert - pattern.slice) * _slice_size(uses, pattern)
        found.append(
            dataclasses.replace(pattern, **sides, source_elements=pattern.source_elements + offset, slice=expert)
        )
    return found


def _slice_size(uses: list[ParameterUse], pattern: ParameterUse) -> int:
    """Elements between the slices of neighbouring experts."""
    parts = (pattern.source_elements, pattern.target_elements, pattern.feature_elements)
    return (
        len(parts[0]) * len(parts[1]) * len(parts[2])
        if len(uses) == 1
        else int((uses[1].source_elements[0] - uses[0].source_elements[0]) // (uses[1].slice - uses[0].slice))
    )


def _join(record: Record, name: str, uses: list[ParameterUse]) -> ParameterUse | None:
    first = uses[0]
    nodes = all(_is_node(record, use.source) for use in uses)
    if _same(record, uses, "target") and not _same(record, uses, "source"):
        router = record.routers.get(name)
        if nodes and router is not None:
            # A row of biases that an expert adds to what all share: it belongs to the expert's node.
            uses = [dataclasses.replace(use, source=router[use.slice : use.slice + 1]) for use in uses]
        if len(torch.cat([record.find(use.source) for use in uses]).unique()) != sum(len(u.source) for u in uses):
            return None
        return dataclasses.replace(
            first,
            source=torch.cat([use.source for use in uses]),
            source_elements=torch.cat([use.source_elements for use in uses]),
            slice=None,
        )
    if nodes or _same(record, uses, "source"):
        targets = torch.cat([use.target for use in uses])
        if bool((targets == NONE).any()):
            return None
        base = first.source_elements[0]
        moved = [use.target_elements + (use.source_elements[0] - base) for use in uses]
        return dataclasses.replace(first, target=targets, target_elements=torch.cat(moved), slice=None)
    return None
