"""Rules that carry provenance through ATen operators; see :mod:`hf_nino.graph.trace`.

A rule takes the :class:`~hf_nino.graph.trace.Trace` and a :class:`~hf_nino.graph.trace.Call` and sets the provenance
of the call's results.  Contractions, which is where most edges come from, are in :mod:`hf_nino.graph.contractions`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from . import contractions, placements  # noqa: F401 (placements registers rules)
from .experts import are_slices, spread_choices, unite_slices
from .meetings import distinct, forget, input_neurons, join, meet_as_sum, one_allocation, pointwise_parameter, promote
from .provenance import NONE, compact, varying
from .registry import RULES, aligned, register, uniform
from .structure import EdgeType
from .trace import Call, Trace, on_cpu
from .views import ParameterView

KEEP = ("alias", "clone", "contiguous", "detach", "_to_copy", "lift_fresh", "view_as", "to")
"""Operators whose result has the same elements in the same places."""

MOVES = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "slice", "select",
    "split", "split_with_sizes", "unsafe_split", "unbind", "chunk", "squeeze", "unsqueeze", "flip", "roll", "repeat",
    "repeat_interleave", "narrow", "unfold", "diagonal", "movedim", "flatten", "unflatten", "tile", "index_select",
    "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes",
)  # fmt: skip
"""Operators that only move elements: they run on the ids themselves."""

COPIES = ("aten::repeat", "aten::tile")
"""Movement operators that make several of what they get."""

REDUCTIONS = (
    "sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "argmax", "argmin",
    "max", "min", "norm", "linalg_vector_norm", "logsumexp", "topk", "median", "count_nonzero",
)  # fmt: skip

POOLING = (
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool1d",
    "max_pool1d", "avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_nearest1d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "reflection_pad1d", "reflection_pad2d",
    "replication_pad2d",
)  # fmt: skip

MULTIPLIES = ("mul", "mul_", "div", "div_", "addcmul", "multiply")


def apply_rule(trace: Trace, call: Call) -> None:
    """Find and run the rule of one call."""
    name = call.name.removeprefix("aten::")
    rule = RULES.get(name)
    if rule is None and torch.Tag.pointwise in call.function.tags:
        rule = pointwise
    try:
        (rule or opaque)(trace, call)
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError) as error:
        # A trace never fails where the model runs: what a rule did not foresee is pinned and forgotten.
        forget(trace, call, f"the rule of {call.name} failed ({type(error).__name__})")


@register(*KEEP)
def keep(trace: Trace, call: Call) -> None:
    """Same elements, same places; a cast or copy of a parameter is still that parameter."""
    first, (result, *_) = call.tensors[0], call.results
    if (view := trace.view(first)) is not None:
        trace.set_view(result, view)
    elif (ids := trace.ids(first)) is not None:
        trace.set_ids(result, ids)
    elif (lowest := trace.summary(first)) is not None and lowest.dim() == result.dim():
        trace.set_summary(result, lowest)
    if trace.is_input(first):
        trace.mark_input(result)


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


@register("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardtanh", "hardtanh_", "log_sigmoid_forward")
@register("masked_fill", "masked_fill_", "where", "type_as", "clamp_", "clamp_min_", "addcmul_", "lerp", "nan_to_num_")
def pointwise(trace: Trace, call: Call) -> None:
    """Elementwise operators: neurons that meet become one, parameters become edges, varying constants pin."""
    tensors = [tensor for tensor in call.tensors if tensor.numel()]
    (result, *others) = call.results
    views = [tensor for tensor in tensors if trace.view(tensor) is not None]
    active = [tensor for tensor in tensors if trace.ids(tensor) is not None]
    if views and not active:
        plain = [t for t in tensors if trace.view(t) is None]
        if (derived := _derived(trace, call, views, plain)) is not None:
            trace.set_view(result, derived)
            return
        # A parameter meets data or another parameter: one of them has to be the activation.
        if plain:
            input_neurons(trace, plain[0], trace.view(views[0]))
            active = [plain[0]] if trace.ids(plain[0]) is not None else []
        if not active:
            promote(trace, views[0], EdgeType.OTHER)
            active, views = [views[0]], views[1:]
    if not active:
        names = {trace.statistic(t) for t in tensors if not uniform(t) or trace.statistic(t) is not None}
        if len(names) == 1 and (name := names.pop()) is not None:
            trace.set_statistic(result, name)
        summaries = [t for t in tensors if trace.summary(t) is not None]
        if len(summaries) == 1 and all(t is summaries[0] or uniform(t) for t in tensors):
            trace.set_summary(result, trace.summary(summaries[0]))
        return
    dims = result.dim()
    ids = aligned(trace.ids(active[0]), dims)
    for other in active[1:]:
        ids = join(trace, ids, aligned(trace.ids(other), dims))
    for constant in tensors:
        if trace.view(constant) is not None or trace.ids(constant) is not None:
            continue
        if trace.saved_vector(constant) is not None and constant.shape[0] == ids.shape[-1]:
            views.append(constant)
        else:
            _pin_by_constant(trace, ids, constant, result.shape)
    multiplies = call.name.removeprefix("aten::") in MULTIPLIES
    for view in views:
        pointwise_parameter(trace, ids, trace.view(view), result.shape, multiplies)
    for out in (result, *others):
        trace.set_ids(out, ids.expand(out.shape))


def _derived(trace: Trace, call: Call, views: list[Tensor], plain: list[Tensor]) -> ParameterView | None:
    """A parameter that was scaled, centred or normalised by itself, or multiplied with a smaller one: still itself."""
    first, *others = sorted((trace.view(tensor) for tensor in views), key=lambda view: -len(view.elements_dims))
    (result, *_) = call.results
    if any(trace.statistic(t) != first.parameter and not uniform(t) for t in plain):
        return None
    if first.shadow.shape != result.shape or (others and not first.elements_dims[1:]):
        return None
    if not others:
        return first
    smaller = all(set(other.elements_dims) < set(first.elements_dims) for other in others)
    if len(others) > 1 or not smaller or call.name.removeprefix("aten::") not in MULTIPLIES:
        return None
    gain = others[0].with_shadow(others[0].shadow.expand(result.shape))
    return replace(first, gains=(*first.gains, gain))


def _pin_by_constant(trace: Trace, ids: Tensor, constant: Tensor, shape: torch.Size) -> None:
    """Neurons that are multiplied by (or added to) different numbers are told apart by them."""
    if constant.dim() == 0:
        return
    full = constant.reshape((1,) * (len(shape) - constant.dim()) + tuple(constant.shape))
    for dim in varying(ids):
        if full.shape[dim] == 1:
            continue
        if trace.is_opaque(constant):
            if constant.dtype == torch.bool and _is_same_along(full, dim):
                continue
            if not _is_of_same_head(trace.summary(constant), ids, dim):
                trace.record.pin(ids, "meets activations that could not be followed", lost=True)
            continue
        if not _is_same_along(full, dim):
            trace.record.pin(ids, "meets a constant that differs between neurons (rotary or sinusoidal table, mask)")


def _is_same_along(values: Tensor, dim: int) -> bool:
    """Whether values do not change along a dimension."""
    if values.is_meta:
        return False
    first = values.narrow(dim, 0, 1)
    return bool(((values == first) | ((values != values) & (first != first))).all())


def _is_of_same_head(lowest: Tensor | None, ids: Tensor, dim: int) -> bool:
    """Whether one number for each head meets the channels of that head, along the dimension of heads."""
    if lowest is None or lowest.dim() != ids.dim() or lowest.shape[dim] != ids.shape[dim] or varying(lowest) != (dim,):
        return False
    others = [other for other in varying(ids) if other != dim]
    return compact(ids.amin(dim=others, keepdim=True)).equal(lowest) if others else ids.equal(lowest)


@register(*REDUCTIONS)
def reduce(trace: Trace, call: Call) -> None:
    """Neurons along reduced dimensions are summed away; the others stay."""
    ids = trace.full_ids(call.tensors[0])
    if ids is None:
        if (view := trace.view(call.tensors[0])) is not None:
            for result in call.results:
                trace.set_statistic(result, view.parameter)
        return
    dims = call.arguments.get("dim")
    every = range(ids.dim())
    dims = list(every) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % max(1, ids.dim()) for dim in dims]
    keepdim = bool(call.arguments.get("keepdim", False)) or call.name == "aten::topk"
    small = compact(ids)
    gone = sorted(set(dims) & set(varying(small)))
    if call.name in ("aten::topk", "aten::max", "aten::argmax") and gone == list(varying(small)):
        trace.record.last_router = small.flatten()
        trace.record.choosers.append(small.flatten())
        spread_choices(call, gone)
    summed = None
    if call.name in ("aten::sum", "aten::mean") and len(gone) == 1:
        summed = unite_slices(trace, small, gone)
        summed = _sum_of_streams(trace, small, gone[0], keepdim) if summed is None else summed
    if summed is not None:
        small = summed
    for result in call.results:
        if gone and summed is None:
            trace.set_ids(result, None)
            lowest = small.amin(dim=gone, keepdim=True)
            if varying(lowest) and keepdim:
                trace.set_summary(result, lowest)
            continue
        left = small if keepdim else small.squeeze(tuple(dims))
        trace.set_ids(result, left.expand(result.shape) if left.dim() == result.dim() else None)


def _sum_of_streams(trace: Trace, ids: Tensor, dim: int, keepdim: bool) -> Tensor | None:
    """A sum over streams that were stacked is as many additions; ``None`` when they do not pair up.

    Sums that keep the dimension are statistics of a norm, unless the streams have origins of their own.
    """
    first, *others = torch.unique(ids, dim=dim).split(1, dim)
    if not varying(first) or bool((ids < 0).any()) or any(bool(torch.isin(first, other).any()) for other in others):
        return None
    if any(one_allocation(trace, first, other) for other in others):
        return None if keepdim else meet_as_sum(trace, first, *others)
    for other in others:
        first = join(trace, first, other)
    return first


@register(
    "_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax", "cumsum", "tril", "triu", "glu", "sort"
)
def same_shape(trace: Trace, call: Call) -> None:
    """Operators that mix elements along one dimension; along neurons they are only symmetric for softmax."""
    ids = trace.ids(call.tensors[0])
    result = call.results[0]
    if ids is None:
        return
    if "softmax" not in call.name and varying(ids):
        trace.record.pin(ids, f"{call.name} depends on the order of neurons", lost=True)
    trace.set_ids(result, ids.expand(result.shape) if result.shape == call.tensors[0].shape else None)


@register(*POOLING)
def pool(trace: Trace, call: Call) -> None:
    """Spatial operators keep the channels, which are the ids of dimension 1."""
    if trace.view(call.tensors[0]) is not None:
        # A table of positions, interpolated.
        promote(trace, call.tensors[0], EdgeType.POSITION_EMBEDDING, neurons=1)
    ids = trace.ids(call.tensors[0])
    if ids is None:
        return
    if any(dim != 1 for dim in varying(ids)):
        trace.record.pin(ids, f"{call.name} mixes neurons", lost=True)
        return
    for result in call.results:
        trace.set_ids(result, ids.expand(result.shape))


@register("im2col")
def patches(trace: Trace, call: Call) -> None:
    """Windows as rows: each channel once for every tap."""
    ids, (result,) = trace.ids(call.tensors[0]), call.results
    if ids is None:
        return
    if any(dim != 1 for dim in varying(ids)):
        trace.record.pin(ids, f"{call.name} mixes neurons", lost=True)
        return
    taps = math.prod(call.arguments["kernel_size"])
    channels = ids.expand(1, call.tensors[0].shape[1], 1, 1).flatten()
    trace.set_ids(result, channels.repeat_interleave(taps)[None, :, None].expand(result.shape))


@register("constant_pad_nd", "pad")
def pad(trace: Trace, call: Call) -> None:
    """Padding along positions keeps the ids; along neurons the new places belong to none."""
    ids = trace.full_ids(call.tensors[0])
    if ids is None:
        return
    (result,) = call.results
    small = compact(ids)
    padded = {result.dim() - 1 - place // 2 for place, amount in enumerate(call.arguments["pad"]) if amount}
    if padded & set(varying(small)):
        padding = torch.nn.functional.pad(ids.contiguous(), list(call.arguments["pad"]), value=NONE)
        trace.set_ids(result, padding)
    else:
        trace.set_ids(result, small.expand(result.shape))


@register("native_layer_norm", "_fused_rms_norm", "rms_norm", "native_batch_norm",
          "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm", "native_group_norm",
          "_native_batch_norm_legit", "_batch_norm_no_update")  # fmt: skip
def normalisation(trace: Trace, call: Call) -> None:
    """Neurons pass; gain and bias are edges from a node of their own, running statistics move along."""
    source, result = call.arguments["input"], call.results[0]
    name = call.name.removeprefix("aten::")
    if (view := trace.view(source)) is not None:
        if call.arguments.get("weight") is None and call.arguments.get("bias") is None:
            # A kernel is standardised before it is used.
            trace.set_view(result, view)
            return
        promote(trace, source, EdgeType.OTHER)
    channels_first = "batch" in name or "group" in name
    gain, bias = call.arguments.get("weight"), call.arguments.get("bias")
    dim = 1 if channels_first else None
    parameters = [(gain, True), (bias, False)]
    if channels_first:
        parameters += [(call.arguments.get("running_mean"), False), (call.arguments.get("running_var"), True)]
    views = []
    for tensor, multiplies in parameters:
        view = trace.view(tensor) or (trace.buffer_view(tensor) if trace.ids(source) is not None else None)
        if view is not None:
            views.append((_trailing(view, result.dim(), dim), multiplies))
    if trace.ids(source) is None and views:
        input_neurons(trace, source, views[0][0])
    ids = trace.ids(source)
    if ids is None:
        return
    if name == "native_group_norm" and call.arguments["group"] != 1:
        trace.record.pin(ids, "normalised in groups of channels")
    for view, multiplies in views:
        pointwise_parameter(trace, ids, view, result.shape, multiplies)
    trace.set_ids(result, ids.expand(result.shape))


@register("_weight_norm_interface")
def weight_norm(trace: Trace, call: Call) -> None:
    """``g v / |v|`` is the parameter v, with g as a gain of the neurons that it makes."""
    direction, gain = (trace.view(call.arguments[name]) for name in ("v", "g"))
    result, *norms = call.results
    if direction is None or gain is None:
        forget(trace, call, "weight normalisation of what is no parameter")
        return
    gain = gain.with_shadow(gain.shadow.expand(result.shape))
    trace.set_view(result, replace(direction, gains=(*direction.gains, gain)))
    for norm in norms:
        trace.set_statistic(norm, direction.parameter)


def _trailing(view: ParameterView, dims: int, dim: int | None) -> ParameterView:
    """A gain's shadow aligned with the normalised tensor: trailing dimensions, or the channel dimension."""
    shape = [1] * dims
    if dim is None:
        shape[dims - view.shadow.dim() :] = view.shadow.shape
    else:
        shape[dim] = view.shadow.shape[0]
    return view.with_shadow(view.shadow.view(shape))


@register("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "addmv", "mv", "dot")
def contraction(trace: Trace, call: Call) -> None:
    """Matrix products; the added operand of ``addmm`` is a pointwise one."""
    contractions.contract(trace, call, pointwise)


@register("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution")
def convolution(trace: Trace, call: Call) -> None:
    """Convolutions; see :func:`hf_nino.graph.contractions.convolve`."""
    contractions.convolve(trace, call)


@register("sym_size", "size", "numel", "_local_scalar_dense", "item", "is_same_size", "equal", "empty_like",
          "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "rand_like",
          "randn_like", "fill_", "zero_", "normal_", "uniform_", "_assert_async")  # fmt: skip
def unrelated(trace: Trace, call: Call) -> None:
    """Operators whose result has nothing to do with their operands' values, or is no tensor."""
    for result in call.results:
        trace.set_ids(result, None)


def opaque(trace: Trace, call: Call) -> None:
    """No rule: pass ids on where shapes agree, pin them otherwise."""
    if any(trace.ids(t) is not None or trace.view(t) is not None for t in call.tensors):
        forget(trace, call, f"operator {call.name} has no rule")
