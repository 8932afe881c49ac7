"""Rules for operators that sum over dimensions, normalise along them, or work on windows of positions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .experts import spread_choices, unite_slices
from .meetings import forget, input_neurons, join, meet_as_sum, one_allocation, pointwise_parameter, promote
from .provenance import NONE, compact, varying
from .registry import register
from .structure import EdgeType
from .trace import Call, Trace
from .views import ParameterView

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
