"""Rules for operators that move elements, and put tensors side by side: they run on ids and shadows as they are."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .experts import are_slices
from .meetings import distinct, forget, join, meet_as_sum, one_allocation, promote
from .provenance import NONE, compact, varying
from .registry import register
from .structure import EdgeType
from .trace import Call, Trace, on_cpu
from .views import ParameterView

MOVES = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "slice", "select",
    "split", "split_with_sizes", "unsafe_split", "unbind", "chunk", "squeeze", "unsqueeze", "flip", "roll", "repeat",
    "repeat_interleave", "narrow", "unfold", "diagonal", "movedim", "flatten", "unflatten", "tile", "index_select",
    "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes",
)  # fmt: skip
"""Operators that only move elements: they run on the ids themselves."""

COPIES = ("aten::repeat", "aten::tile")
"""Movement operators that make several of what they get."""


@register(*MOVES)
def move(trace: Trace, call: Call) -> None:
    """Run the operator on ids or shadow."""
    first = call.tensors[0]
    arguments = dict(call.arguments)
    key = next(name for name, value in arguments.items() if value is first)
    view = trace.view(first)
    moved = None if view is None else _move_view(call, arguments, key, view)
    if view is not None and moved is None:
        if len(view.elements_dims) > 1 and call.name not in COPIES:
            forget(trace, call, "elements of a parameter were copied out of order")
            return
        # Several copies of a learned vector: a row of an activation.
        promote(trace, first, EdgeType.OTHER)
        view = None
    if view is not None:
        indices = _first_axis_slices(trace, call, view, len(moved))
        gains = [_move_view(call, arguments, key, gain) or [] for gain in view.gains]
        for number, (result, part, index) in enumerate(zip(call.results, moved, indices, strict=True)):
            slices = view.slices if index == view.slice else view.shadow.shape[0]
            own = tuple(parts[number] for parts in gains if parts)
            trace.set_view(result, replace(part, slice=index, slices=slices, gains=own))
    elif (ids := trace.full_ids(first)) is not None:
        try:
            # As they are, expanded over positions; most movements keep that.
            moved = call.function(**on_cpu(arguments | {key: ids}))
        except RuntimeError:
            moved = call.function(**on_cpu(arguments | {key: ids.contiguous()}))
        moved = [moved] if isinstance(moved, Tensor) else list(moved)
        for result, new in zip(call.results, moved, strict=True):
            trace.set_ids(result, new)
    elif (lowest := trace.summary(first)) is not None and len(call.results) == 1:
        moved = call.function(**on_cpu(arguments | {key: lowest.expand(first.shape).contiguous()}))
        trace.set_summary(call.results[0], compact(moved))
    if trace.is_input(first):
        for result in call.results:
            trace.mark_input(result)


def _first_axis_slices(trace: Trace, call: Call, view: ParameterView, count: int) -> list[int | None]:
    """The expert that each result belongs to, when a whole parameter is taken apart along its first axis."""
    shape = tuple(view.shadow.shape)
    split = len(shape) > 2 and view.shadow.numel() == math.prod(trace.shapes[view.parameter])
    whole = (shape == trace.shapes[view.parameter] and len(shape) > 1) or split
    if whole and view.slice is None and call.arguments.get("dim", 0) == 0:
        if call.name == "aten::select":
            return [int(call.arguments["index"]) % view.shadow.shape[0]]
        if call.name == "aten::unbind":
            return list(range(count))
    return [view.slice] * count


def _move_view(call: Call, arguments: dict, key: str, view: ParameterView) -> list[ParameterView] | None:
    """The views that a movement operator makes of one: by strides, or element by element where they do not suffice."""
    if view.lists is None:
        on_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
        try:
            moved = call.function(**on_meta | {key: view.shadow})
        except RuntimeError:
            moved = []
        moved = [moved] if isinstance(moved, Tensor) else list(moved)
        storage = view.shadow.untyped_storage()._cdata
        if moved and all(part.untyped_storage()._cdata == storage for part in moved):
            return [view.with_shadow(part) for part in moved]
    if call.name in COPIES or not view.is_small:
        return None
    try:
        moved = call.function(**on_cpu(arguments | {key: view.elements()}))
    except RuntimeError:
        return None
    found = [view.reordered(part) for part in ([moved] if isinstance(moved, Tensor) else moved)]
    return None if any(part is None for part in found) else found


@register("cat", "concat", "concatenate", "stack")
def concatenate(trace: Trace, call: Call) -> None:
    """Ids are concatenated; along a dimension without ids (positions), the operands' neurons become the same ones."""
    parts = list(call.arguments["tensors"])
    (result,) = call.results
    if all(trace.view(part) is None and trace.ids(part) is None for part in parts):
        if any(trace.is_input(part) for part in parts):
            trace.mark_input(result)
        return
    for part in parts:
        if trace.view(part) is not None:
            promote(trace, part, EdgeType.TOKEN_EMBEDDING)
    dim = call.arguments.get("dim", 0) % result.dim()
    parts = [part for part in parts if part.numel()]
    ids = [trace.full_ids(part) for part in parts]
    ids = [torch.full(part.shape, NONE) if x is None else x for part, x in zip(parts, ids, strict=True)]
    if call.name == "aten::stack":
        ids = [x.unsqueeze(dim) for x in ids]
    moving = [compact(x) for x in ids]
    if call.name != "aten::stack" and not any(dim in varying(x) for x in moving) and not are_slices(trace, moving):
        merged = moving[0]
        for other in moving[1:]:
            merged = _along_positions(trace, merged, other, all(part.shape[dim] > 1 for part in parts))
            if merged is None:
                break
        if merged is not None:
            trace.set_ids(result, merged.expand(result.shape))
            return
    joined = torch.cat([x.contiguous() for x in ids], dim=dim)
    if varying(compact(joined)) == (dim,) and bool((joined >= 0).all()):
        joined = _side_by_side(trace, compact(joined)).expand(result.shape)
    trace.set_ids(result, joined)


def _side_by_side(trace: Trace, ids: Tensor) -> Tensor:
    """Rows of one table that was looked up several times get neurons of their own for each place."""
    if trace.record.is_read(ids) or ids.unique().numel() == ids.numel():
        return ids
    name = trace.record.allocation(int(ids.min())).name
    return distinct(trace, ids.flatten(), name).view(ids.shape)


def _along_positions(trace: Trace, first: Tensor, second: Tensor, several: bool) -> Tensor | None:
    """Neurons of a concatenation along positions, from then on treated alike; ``None`` where they do not pair up.

    Args:
        several: whether each operand has several positions; single ones may be neurons side by side.
    """
    if first.shape != second.shape or not varying(first) or not bool(((first >= 0) == (second >= 0)).all()):
        return None
    if first.equal(second):
        return first
    known = first[first >= 0], second[second >= 0]
    if not one_allocation(trace, *known):
        return join(trace, first, second)
    return meet_as_sum(trace, first, second) if several and not bool(torch.isin(*known).any()) else None
