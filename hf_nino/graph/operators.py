"""Rules that carry provenance through ATen operators; see :mod:`hf_nino.graph.trace`.

A rule takes the :class:`~hf_nino.graph.trace.Trace` and a :class:`~hf_nino.graph.trace.Call` and sets the provenance
of the call's results.  Contractions, which is where most edges come from, are in :mod:`hf_nino.graph.contractions`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import contractions, movements, placements, reductions  # noqa: F401 (they register rules)
from .meetings import forget, input_neurons, join, pointwise_parameter, promote
from .provenance import compact, varying
from .registry import RULES, aligned, register, uniform
from .structure import EdgeType
from .trace import Call, Trace
from .views import ParameterView

KEEP = ("alias", "clone", "contiguous", "detach", "_to_copy", "lift_fresh", "view_as", "to")
"""Operators whose result has the same elements in the same places."""

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
