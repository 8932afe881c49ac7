"""Linear maps, attention and convolutions: where fresh neurons come from.

A linear map's output is a fresh group; query and key share channels; each head has a node with constant edges to its
channels (arXiv 2409.04434, section 3 and appendix).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .experts import route
from .meetings import (
    add_use,
    axis_elements,
    distinct,
    forget,
    gains_of_weight,
    give_inputs,
    module_name,
    pointwise_parameter,
    promote,
    replace_ids,
)
from .provenance import NONE, Role, compact, is_function, unique_pairs, varying
from .structure import EdgeType
from .trace import Call, Trace
from .views import ParameterView

MAX_TAPS = 9
"""Kernel taps that are features of one edge (3 x 3); larger kernels make neurons of their taps (original release)."""


def contract(trace: Trace, call: Call, pointwise: Callable[[Trace, Call], None]) -> None:
    """Matrix products: parameter with activation, or activation with activation."""
    arguments, (result, *_) = call.arguments, call.results
    added = None
    if call.name in ("aten::addmm", "aten::baddbmm", "aten::addmv"):
        added = arguments["self"]
        left = arguments.get("mat1", arguments.get("batch1", arguments.get("mat")))
        right = arguments.get("mat2", arguments.get("batch2", arguments.get("vec")))
    elif call.name == "aten::linear":
        left, right, added = arguments["input"], arguments["weight"], arguments.get("bias")
    else:
        names = list(arguments)
        left, right = arguments[names[0]], arguments[names[1]]
    transposed = call.name == "aten::linear"
    if trace.view(left) is not None and trace.view(right) is not None:
        promote(trace, left, EdgeType.OTHER)
    if trace.view(right) is not None:
        view = trace.view(right)
        linear_map(trace, left, -1, view, *((-1, -2) if transposed else (-2, -1)), result, result.dim() - 1)
    elif trace.view(left) is not None:
        linear_map(
            trace, right, -2 if right.dim() > 1 else -1, trace.view(left), -1, -2, result, max(0, result.dim() - 2)
        )
    else:
        a, b = trace.ids(left), trace.ids(right)
        _activations(trace, a, b.transpose(-1, -2) if transposed and b is not None else b, result)
    if isinstance(added, Tensor) and (trace.ids(result) is not None or trace.view(added) is not None):
        partial = Call(torch.ops.aten.add.Tensor, {"self": result, "other": added}, result)
        pointwise(trace, partial)


def linear_map(
    trace: Trace,
    activation: Tensor,
    read_dim: int,
    view: ParameterView,
    in_dim: int,
    out_dim: int,
    result: Tensor,
    result_dim: int,
) -> None:
    """A parameter's matrix applied to an activation: edges from the neurons that it reads to fresh ones."""
    record, shadow = trace.record, view.shadow
    in_dim, out_dim = in_dim % shadow.dim(), out_dim % shadow.dim() if shadow.dim() > 1 else -1
    if batch := [dim for dim in view.elements_dims if dim not in (in_dim, out_dim)]:
        if batch == [0] and activation.dim() == result.dim() == shadow.dim() == 3:
            batch_of_maps(trace, activation, read_dim, view, in_dim, out_dim, result, result_dim)
            return
        record.notes.append(f"{view.parameter}: a batch of matrices in one product has no rule")
        if (ids := trace.ids(activation)) is not None:
            record.pin(ids, "read by a batch of matrices", lost=True)
        trace.set_ids(result, None)
        return
    read_dim %= activation.dim()
    ids = trace.ids(activation)
    elsewhere = ids is not None and any(dim != read_dim for dim in varying(ids))
    if elsewhere and read_dim not in varying(ids):
        # A map over positions: neurons stay where they are, positions are pinned.
        source = record.new_neurons(f"{module_name(view.parameter)}[in]", shadow.shape[in_dim], "row", "position")
        target = record.new_neurons(f"{module_name(view.parameter)}[out]", shadow.shape[out_dim], "row", "position")
        add_use(trace, view, EdgeType.LINEAR, source, view.dim_elements(in_dim), target, view.dim_elements(out_dim))
        small = ids.expand([s if d in varying(ids) else 1 for d, s in enumerate(activation.shape)])
        trace.set_ids(result, small.expand(result.shape) if small.dim() == result.dim() else None)
        return
    if elsewhere:
        record.pin(ids, "read along one of two axes of neurons", lost=True)
        ids = None
    source = give_inputs(trace, activation, read_dim) if ids is None else ids.expand(
        [s if d == read_dim else 1 for d, s in enumerate(activation.shape)]
    ).flatten()  # fmt: skip
    source = distinct(trace, source, f"{module_name(view.parameter)}[in]")
    outputs = view.dim_elements(out_dim) if out_dim >= 0 else torch.zeros(1, dtype=torch.int64)
    family = None if view.slice is None else view.parameter
    target = record.new_neurons(module_name(view.parameter), len(outputs), family=family, rank=view.slice or 0)
    target = add_use(trace, view, EdgeType.LINEAR, source, view.dim_elements(in_dim), target, outputs)
    gains_of_weight(trace, view, {in_dim: source, out_dim: target})
    route(trace, view, source, target)
    if out_dim >= 0:
        shape = [1] * result.dim()
        shape[result_dim] = len(outputs)
        trace.set_ids(result, target.view(shape).expand(result.shape))


def batch_of_maps(
    trace: Trace,
    activation: Tensor,
    read_dim: int,
    view: ParameterView,
    in_dim: int,
    out_dim: int,
    result: Tensor,
    result_dim: int,
) -> None:
    """One matrix for each index of the first dimension (experts, block-diagonal maps): each is a map of its own."""
    ids = trace.full_ids(activation)
    outputs = []
    for index in range(view.shadow.shape[0]):
        part, out = activation[index], torch.empty(result.shape[1:], device="meta")
        if ids is not None:
            trace.set_ids(part, ids[index])
        piece = view.at(index)
        linear_map(trace, part, read_dim, piece, in_dim - 1, out_dim - 1, out, result_dim - 1)
        found = trace.full_ids(out)
        if found is not None and ids is not None and not ids[0].equal(ids[-1]):
            trace.record.confined += [compact(ids[index]).flatten(), compact(found).flatten()]
        outputs.append(torch.full(out.shape, NONE) if found is None else found)
    trace.set_ids(result, torch.stack(outputs))


def _activations(trace: Trace, left: Tensor | None, right: Tensor | None, result: Tensor) -> None:
    """Activation times activation, given their compact ids: attention scores, attention outputs, gates."""
    record = trace.record
    known = [ids for ids in (left, right) if ids is not None]
    if any(ids.dim() != result.dim() or ids.dim() < 2 for ids in known):
        for ids in known:
            record.pin(ids, "product of activations of different rank", lost=True)
        known = []
    if not known:
        trace.set_ids(result, None)
        return
    read_left = left is not None and left.shape[-1] > 1
    read_right = right is not None and right.shape[-2] > 1
    if read_left and read_right:
        scores(trace, left, right, result)
        return
    if read_left or read_right:
        record.pin(left if read_left else right, "contracted with data", lost=True)
        if len(known) == 2:
            _confine(trace, *((right, left) if read_left else (left, right)))
        known = [ids for ids, read in ((left, read_left), (right, read_right)) if ids is not None and not read]
    if len(known) == 2:
        trace.set_ids(result, weighted_sum(trace, left, right, result))
    else:
        trace.set_ids(result, known[0].expand(result.shape) if known and fits(known[0], result) else None)


def _confine(trace: Trace, kept: Tensor, read: Tensor) -> None:
    """Neurons that meet different pinned ones in a batch of products (kernels for each head) stay among themselves."""
    batch = [dim for dim in range(kept.dim() - 2) if read.shape[dim] > 1]
    if not batch or any(kept.shape[dim] == 1 for dim in batch):
        return
    rows = kept.movedim(batch, list(range(len(batch)))).flatten(0, len(batch) - 1).flatten(1)
    trace.record.confined += [row[row >= 0].unique() for row in torch.unique(rows, dim=0)]


def fits(ids: Tensor, result: Tensor) -> bool:
    return all(size in (1, full) for size, full in zip(ids.shape, result.shape, strict=True))


def scores(trace: Trace, query: Tensor, key: Tensor, result: Tensor) -> None:
    """``q k^T``: query and key channels are contracted, and every batch coordinate of neurons is a head.

    Args:
        query: compact ids of [..., positions, channels].
        key: compact ids of [..., channels, positions].
    """
    record = trace.record
    key = key.transpose(-1, -2)
    if query.shape[-2] > 1 and key.shape[-2] > 1:
        for ids in (query, key):
            record.pin(ids, "contracted along one of two axes of neurons", lost=True)
        trace.set_ids(result, None)
        return
    q, k = torch.broadcast_tensors(query, key)
    a, b = unique_pairs(q, k)
    if not len(a):
        return
    attention = any(size > 1 for size in result.shape[:-2]) or result.dim() > 2
    if attention:
        record.set_role(a, Role.QUERY)
        record.set_role(b, Role.KEY)
    if is_function(a):
        _, inverse, counts = torch.unique(b, return_inverse=True, return_counts=True)
        # Keys may be shared by heads in part (latent attention rotates one key for all).
        single = counts[inverse] == 1
        _meet_as_channels(trace, a[single], b[single])
        if not bool(single.all()):
            record.repeats.append((b[~single], a[~single]))
            record.connect(EdgeType.RESIDUAL, a[~single], b[~single])
    else:
        record.pin(a, "contracted with several neurons", lost=True)
        record.pin(b, "contracted with several neurons", lost=True)
    if not attention:
        trace.set_ids(result, None)
        return
    # Heads may also lie along the positions of one side (relative positions in a batch of their own).
    by_key = key.shape[-2] > 1
    side = record.find(compact(key if by_key else query))
    rows = side.expand([*result.shape[:-2], *side.shape[-2:]]).reshape(-1, side.shape[-1])
    heads, inverse = torch.unique(rows, dim=0, return_inverse=True)
    order = _first_occurrence(inverse, len(heads))
    name = record.allocation(int(rows[0].max())).name
    head_ids = record.new_neurons(f"{name}[heads]", len(heads), kind="head")
    head_of_row = head_ids[order[inverse]]
    head, channel = unique_pairs(head_of_row[:, None].expand_as(rows), rows)
    _star(trace, head, channel)
    shape = [*result.shape[:-2], 1, side.shape[-2]] if by_key else [*result.shape[:-2], side.shape[-2], 1]
    trace.set_ids(result, head_of_row.view(shape).expand(result.shape))


def _meet_as_channels(trace: Trace, query: Tensor, key: Tensor) -> None:
    """Query and key neurons that are contracted one to one are the same channels."""
    if not len(query):
        return
    if trace.record.is_read(query) or trace.record.is_read(key):
        trace.record.connect(EdgeType.RESIDUAL, query, key)
        trace.record.ties.append((query, key))
    else:
        trace.record.unite(query, key)


def _first_occurrence(inverse: Tensor, count: int) -> Tensor:
    """Rank of each distinct row by where it occurs first, so that head numbers follow the model's."""
    first = torch.full((count,), len(inverse)).scatter_reduce(0, inverse, torch.arange(len(inverse)), "amin")
    return first.argsort().argsort()


def _star(trace: Trace, heads: Tensor, channels: Tensor) -> None:
    trace.record.connect(EdgeType.HEAD, heads, channels)
    trace.record.stars.append((heads, channels))


def weighted_sum(trace: Trace, weights: Tensor, values: Tensor, result: Tensor) -> Tensor | None:
    """Attention weights times values: a head's output channels are its value channels, or copies of shared ones.

    Args:
        weights: compact ids of [..., positions, positions], the heads.
        values: compact ids of [..., positions, channels].
    """
    record = trace.record
    if weights.shape[-1] > 1 or weights.shape[-2] > 1:
        record.pin(weights, "product over two axes of neurons", lost=True)
        record.pin(values, "product over two axes of neurons", lost=True)
        return None
    heads, channels = torch.broadcast_tensors(weights, values)
    head, channel = unique_pairs(heads, channels)
    if not len(head):
        return values.expand(result.shape) if fits(values, result) else None
    record.set_role(channel, Role.VALUE)
    if is_function(channel):
        _star(trace, head, channel)
        return channels.expand(result.shape)
    copies = record.new_neurons(f"{record.allocation(int(channel[0])).name}[repeated]", len(head))
    record.repeat(channel, copies)
    _star(trace, head, copies)
    code = torch.where((heads < 0) | (channels < 0), NONE, heads * record.count + channels)
    return replace_ids(code, head * record.count + channel, copies).expand(result.shape)


def convolve(trace: Trace, call: Call) -> None:
    """Convolutions: taps are features of an edge while they fit, else each tap of each channel is an input neuron.

    Depthwise kernels act on each channel alone, like a gain with several features.
    """
    arguments, (result, *_) = call.arguments, call.results
    source, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    view, record = trace.view(weight), trace.record
    if view is None:
        forget(trace, call, "convolution with a kernel that is no parameter")
        return
    transposed, groups = bool(arguments.get("transposed", False)), int(arguments.get("groups", 1))
    ids = trace.ids(source)
    if ids is not None and any(dim != 1 for dim in varying(ids)):
        record.pin(ids, "convolved along neurons", lost=True)
        ids = None
    channels = source.shape[1]
    taps = axis_elements(view, list(range(2, view.shadow.dim())))
    in_elements, out_elements = (0, 1) if transposed else (1, 0)
    if ids is not None and ids.numel() == 1 and channels > 1:
        ids = None
    name = module_name(view.parameter)
    if groups == channels and view.shadow.shape[1] == 1 and view.shadow.shape[0] == channels:
        if ids is None:
            give_inputs(trace, source, 1)
            ids = trace.ids(source)
        node = record.new_neurons(
            f"{view.parameter}[parameter]", 1 if len(taps) <= MAX_TAPS else len(taps), "parameter", "tap"
        )
        features, rows = (taps, torch.zeros(1, dtype=torch.int64)) if len(taps) <= MAX_TAPS else (None, taps)
        add_use(trace, view, EdgeType.CONVOLUTION, node, rows, ids.flatten(), view.dim_elements(0), features)
        gains_of_weight(trace, view, {0: ids.flatten()})
        trace.set_ids(result, ids.expand(result.shape))
    else:
        sources = _convolution_sources(trace, source, ids, len(taps), name)
        total = view.shadow.shape[1] * groups if transposed else view.shadow.shape[0]
        target = record.new_neurons(name, total)
        per_in, per_out = channels // groups, total // groups
        small = len(taps) <= MAX_TAPS
        per_source = per_in if small else per_in * len(taps)
        for group in range(groups):
            part_in, part_out = view.dim_elements(in_elements), view.dim_elements(out_elements)
            if transposed:
                part_in = part_in[group * per_in : (group + 1) * per_in]
            else:
                part_out = part_out[group * per_out : (group + 1) * per_out]
            if not small:
                part_in = (part_in[:, None] + taps).flatten()
            add_use(
                trace, view, EdgeType.CONVOLUTION, sources[group * per_source : (group + 1) * per_source], part_in,
                target[group * per_out : (group + 1) * per_out], part_out, taps if small else None,
            )  # fmt: skip
        gains_of_weight(trace, view, {out_elements: target})
        if groups > 1:
            record.confined += [*sources.split(per_source), *target.split(per_out)]
            # Groups are no heads: each reads channels of its own.
            record.lose(target)
        shape = [1] * result.dim()
        shape[1] = total
        trace.set_ids(result, target.view(shape).expand(result.shape))
    if (bias_view := trace.view(bias)) is not None:
        shape = [1] * result.dim()
        shape[1] = bias_view.shadow.shape[0]
        bias_view = bias_view.with_shadow(bias_view.shadow.view(shape))
        pointwise_parameter(trace, trace.ids(result), bias_view, result.shape, multiplies=False)


def _convolution_sources(trace: Trace, source: Tensor, ids: Tensor | None, taps: int, name: str) -> Tensor:
    """The neurons that a kernel reads: channels, or taps of channels where there are too many for one edge."""
    record, channels = trace.record, source.shape[1]
    if ids is None:
        if taps > MAX_TAPS:
            return record.new_neurons(f"{name}[in]", channels * taps, kind="input", pinned="input of the model")
        return give_inputs(trace, source, 1)
    flat = distinct(
        trace, ids.expand([s if d == 1 else 1 for d, s in enumerate(source.shape)]).flatten(), f"{name}[in]"
    )
    if taps <= MAX_TAPS:
        return flat
    copies = record.new_neurons(f"{name}[taps]", channels * taps)
    record.repeat(flat.repeat_interleave(taps), copies)
    record.mark_read(flat)
    return copies
