"""Parameters and activations meeting elementwise: the edges, places and shared neurons that this makes.

The conventions are those of the paper (arXiv 2409.04434, section 3 and appendix): adding a fresh output to a
stream that has been read makes a new place joined to the old one by a matching; norm gains and biases are edges from
a node of their own; one edge is one parameter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .experts import remember_router
from .provenance import ParameterUse, compact, is_function, unique_pairs, varying
from .structure import EdgeType
from .trace import Call, Trace
from .views import ParameterView


def forget(trace: Trace, call: Call, reason: str) -> None:
    """No rule applies: pin every neuron that goes in, and follow nothing that comes out."""
    for tensor in call.tensors:
        if (ids := trace.ids(tensor)) is not None:
            trace.record.pin(ids, reason, lost=True)
        elif (view := trace.view(tensor)) is not None:
            trace.record.notes.append(f"{view.parameter}: {reason}")
    for result in call.results:
        trace.set_ids(result, None)


def join(trace: Trace, first: Tensor, second: Tensor) -> Tensor:
    """Neurons that meet elementwise (sum, product, concatenation along positions); returns the result's compact ids.

    Fresh neurons on both sides are the same neurons.  A fresh side and one that has been read already: the fresh one
    is the stream's new place, joined to the old by a residual matching.  One side coarser than the other (a head's
    scalar meeting its channels): constant edges from the coarse to the fine.
    """
    record = trace.record
    first, second = torch.broadcast_tensors(first, second)
    a, b = unique_pairs(first, second)
    if not len(a):
        return compact(torch.maximum(first, second))
    if is_function(a) and is_function(b):
        different = a != b
        a, b = a[different], b[different]
        if not len(a):
            return compact(torch.maximum(first, second))
        if bool(torch.isin(a, b).any()) or (
            record.pinned(a).all() and record.pinned(b).all() and one_allocation(trace, a, b)
        ):
            record.pin(torch.cat([a, b]), "mixed with other neurons of its head (rotary embedding)")
            # Rotary embedding: channels of one head are mixed in pairs, each result belongs where its first term is.
            return compact(torch.where(first >= 0, first, second))
        read_a, read_b = record.is_read(a), record.is_read(b)
        if not read_a and not read_b:
            record.unite(a, b)
            return record.find(torch.where(first >= 0, first, second))
        if read_a and read_b:
            return meet_as_sum(trace, first, second)
        old, new = (a, b) if read_a else (b, a)
        record.connect(EdgeType.RESIDUAL, old, new)
        record.ties.append((old, new))
        stream, fresh = (first, second) if read_a else (second, first)
        return compact(torch.where(fresh >= 0, fresh, stream))
    if is_function(a) or is_function(b):
        fine, coarse, fine_ids, other = (a, b, first, second) if is_function(a) else (b, a, second, first)
        if record.is_lost(coarse):
            record.pin(fine, "meets activations that could not be followed", lost=True)
        record.connect(EdgeType.OTHER, coarse, fine)
        record.coarse.append((coarse, fine))
        return compact(torch.where(fine_ids >= 0, fine_ids, other))
    record.pin(first, "meets other neurons in no one-to-one way", lost=True)
    record.pin(second, "meets other neurons in no one-to-one way", lost=True)
    return compact(torch.where(first >= 0, first, second))


def meet_as_sum(trace: Trace, *parts: Tensor) -> Tensor:
    """Neurons that meet one to one and stay apart: fresh ones that all lead to, and that all move with."""
    record = trace.record
    first, *others = torch.broadcast_tensors(*parts)
    at = first[first >= 0]
    olds = [at, *(other[first >= 0] for other in others)]
    distinct = torch.unique(torch.stack(olds), dim=1)
    fresh = record.new_neurons("sum", distinct.shape[1])
    for old in distinct:
        record.connect(EdgeType.RESIDUAL, old, fresh)
        record.ties.append((old.clone(), fresh))
    return replace_ids(first, distinct[0], fresh)


def one_allocation(trace: Trace, first: Tensor, second: Tensor) -> bool:
    """Whether one parameter made all of these neurons."""
    low, high = int(min(first.min(), second.min())), int(max(first.max(), second.max()))
    return trace.record.allocation(low) is trace.record.allocation(high)


def replace_ids(ids: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """ids with every ``old[i]`` replaced by ``new[i]``."""
    order = old.argsort()
    place = torch.searchsorted(old[order], ids.contiguous()).clamp(max=len(old) - 1)
    return torch.where(old[order][place] == ids, new[order][place], ids)


def pointwise_parameter(trace: Trace, ids: Tensor, view: ParameterView, shape: torch.Size, multiplies: bool) -> None:
    """A gain, bias or table of positions acting elementwise on neurons, which stay the same neurons.

    One node for the parameter, or one for each row where it also varies along other dimensions (positions), has an
    edge to each neuron.  A parameter shared by several neurons (a norm over each head's channels) gets neurons of its
    own, from which constant edges lead to those that share it: one edge is one parameter.
    """
    record = trace.record
    view = view.with_shadow(view.shadow.reshape((1,) * (len(shape) - view.shadow.dim()) + tuple(view.shadow.shape)))
    along = varying(ids)
    rows = [dim for dim in view.elements_dims if dim not in along]
    columns = [dim for dim in view.elements_dims if dim in along]
    row_elements = axis_elements(view, rows)
    column_elements = axis_elements(view, columns)
    size = [shape[dim] if dim in along else 1 for dim in range(len(shape))]
    full = ids.expand(size)
    shared = [dim for dim in along if dim not in columns]
    moved = full.permute(columns + shared + [d for d in range(len(shape)) if d not in along])
    grid = moved.reshape(max(1, math.prod(shape[d] for d in columns)), -1)
    edge_type = (
        EdgeType.NORM if multiplies else EdgeType.OTHER if len(row_elements) == 1 else EdgeType.POSITION_EMBEDDING
    )
    if grid.shape[1] == 1 and bool((grid >= 0).all()) and grid.unique().numel() == grid.numel():
        target = grid[:, 0]
    else:
        target = record.new_neurons(view.parameter, grid.shape[0], kind="parameter")
        valid = grid >= 0
        children = grid[valid]
        parents = target[:, None].expand_as(grid)[valid]
        record.connect(EdgeType.OTHER, parents, children)
        if grid.shape[0] > 1:
            record.shared.append((parents.clone(), children.clone()))
    source = _parameter_nodes(trace, view, len(row_elements), edge_type)
    first = add_use(trace, view, edge_type, source, row_elements, target, column_elements)
    if first is not target:
        record.ties.append((target, first))


def gains_of_weight(trace: Trace, view: ParameterView, neurons: dict[int, Tensor]) -> None:
    """Parameters that a weight was multiplied with (weight normalisation): gains of the neurons on one of its sides.

    Args:
        neurons: the neurons along each dimension of the view that has some.  Gains along another dimension (the taps
            of a kernel) have pinned nodes of their own.
    """
    for gain in view.gains:
        dims = gain.elements_dims
        elements = axis_elements(gain, list(dims))
        if len(dims) == 1 and dims[0] in neurons and len(neurons[dims[0]]) == len(elements):
            target = neurons[dims[0]]
        else:
            target = trace.record.new_neurons(f"{gain.parameter}[row]", len(elements), "row", "row of a parameter")
        node = _parameter_nodes(trace, gain, 1, EdgeType.NORM)
        add_use(trace, gain, EdgeType.NORM, node, torch.zeros(1, dtype=torch.int64), target, elements)


def _parameter_nodes(trace: Trace, view: ParameterView, count: int, edge_type: EdgeType) -> Tensor:
    pinned = (
        "position" if edge_type == EdgeType.POSITION_EMBEDDING else "row of a parameter" if count > 1 else "parameter"
    )
    kind = "row" if count > 1 else "parameter"
    return trace.record.new_neurons(f"{view.parameter}[{kind}]", count, kind=kind, pinned=pinned)


def axis_elements(view: ParameterView, dims: list[int]) -> Tensor:
    """Element offsets over the given dimensions, row-major, int64 [prod]."""
    total = torch.zeros((1,), dtype=torch.int64)
    for dim in dims:
        total = (total[:, None] + view.dim_elements(dim)).flatten()
    return total


def promote(trace: Trace, tensor: Tensor, edge_type: EdgeType, neurons: int | None = None) -> None:
    """A parameter used as an activation (class token, learned query): one axis becomes fresh neurons.

    Args:
        neurons: which dimension; the last one unless given.
    """
    view = trace.view(tensor)
    dims = view.elements_dims
    if neurons in dims:
        dims = (*(dim for dim in dims if dim != neurons), neurons)
    if not dims:
        trace.record.notes.append(f"{view.parameter}: a single number used as an activation")
        trace.set_ids(tensor, None)
        return
    rows = axis_elements(view, list(dims[:-1]))
    columns = view.dim_elements(dims[-1])
    source = trace.record.new_neurons(f"{view.parameter}[row]", len(rows), kind="row", pinned="row of a parameter")
    target = trace.record.new_neurons(view.parameter, len(columns))
    target = add_use(trace, view, edge_type, source, rows, target, columns)
    shape = [1] * tensor.dim()
    shape[dims[-1]] = len(columns)
    trace.set_ids(tensor, target.view(shape).expand(tensor.shape))


def add_rows(trace: Trace, view: ParameterView, edge_type: EdgeType, reason: str) -> Tensor:
    """An embedding table [rows, columns]: pinned row nodes, fresh column neurons, whose ids are returned."""
    rows, columns = view.dim_elements(0), view.dim_elements(1)
    source = trace.record.new_neurons(f"{view.parameter}[row]", len(rows), kind="row", pinned=reason)
    target = trace.record.new_neurons(module_name(view.parameter), len(columns))
    return add_use(trace, view, edge_type, source, rows, target, columns)


def add_use(
    trace: Trace,
    view: ParameterView,
    edge_type: EdgeType,
    source: Tensor,
    source_elements: Tensor,
    target: Tensor,
    target_elements: Tensor,
    feature_elements: Tensor | None = None,
) -> Tensor:
    """Record edges, unless the same elements made edges before; returns the ids that the target really has.

    A parameter used twice (tied embeddings, layers that share weights) has its edges where it was used first.  The
    neurons of the second use are tied to those of the first, side by side or crosswise.
    """
    record = trace.record
    offset = view.start
    features = torch.zeros(1, dtype=torch.int64) if feature_elements is None else feature_elements
    use = ParameterUse(
        view.parameter, edge_type, source, target, source_elements + offset, target_elements, features, view.slice
    )
    record.mark_read(source)
    remember_router(trace, view)
    for number, earlier in enumerate(record.uses):
        if earlier.parameter != view.parameter or _of_other_slices(earlier, use):
            continue
        match = _same_elements(earlier, use)
        if match is None:
            continue
        if match == "overlap":
            record.notes.append(f"{view.parameter}: used again in a way that fits no earlier use")
            record.pin(
                torch.cat([earlier.source, earlier.target, source, target]), "parameter shared in no regular way"
            )
            return target
        first_source, first_target = (
            (earlier.source, earlier.target) if match == "same" else (earlier.target, earlier.source)
        )
        if match == "same" and _is_data(trace, first_source) and not _is_data(trace, source):
            # Applied to data first (an identity matrix, to see the product of two matrices): neurons say more.
            record.uses[number] = replace(earlier, source=source)
            return first_target
        record.ties.append((source, first_source))
        record.notes.append(f"{view.parameter}: used more than once; its edges are those of the first use")
        return first_target
    record.uses.append(use)
    return target


def _of_other_slices(first: ParameterUse, second: ParameterUse) -> bool:
    return first.slice is not None and second.slice is not None and first.slice != second.slice


def _is_data(trace: Trace, ids: Tensor) -> bool:
    return trace.record.allocation(int(ids[0])).kind == "input"


def _same_elements(first: ParameterUse, second: ParameterUse) -> str | None:
    """How two uses of one parameter relate: "same", "transposed", "overlap", or ``None`` when they are disjoint."""
    if first.feature_elements.equal(second.feature_elements):
        a, b = (first.source_elements, first.target_elements), (second.source_elements, second.target_elements)
        if a[0].equal(b[0]) and a[1].equal(b[1]):
            return "same"
        base = second.source_elements[0]
        if a[1].equal(second.source_elements - base) and a[0].equal(second.target_elements + base):
            return "transposed"
    low, high = max(first.range()[0], second.range()[0]), min(first.range()[1], second.range()[1])
    if low > high:
        return None
    seen = torch.zeros(high - low + 1, dtype=torch.bool)
    inside = first.elements().flatten()
    seen[inside[(inside >= low) & (inside <= high)] - low] = True
    inside = second.elements().flatten()
    return "overlap" if bool(seen[inside[(inside >= low) & (inside <= high)] - low].any()) else None


def input_neurons(trace: Trace, tensor: Tensor, view: ParameterView) -> None:
    """Data met elementwise by a parameter: pinned input neurons along the parameter's last axis."""
    dims = view.elements_dims
    if not dims:
        return
    dim = tensor.dim() - (view.shadow.dim() - dims[-1])
    if dim >= 0 and tensor.shape[dim] == view.shadow.shape[dims[-1]]:
        give_inputs(trace, tensor, dim)


def give_inputs(trace: Trace, tensor: Tensor, dim: int) -> Tensor:
    """Pinned neurons for data along one dimension; the tensor keeps them for its next reader."""
    size = tensor.shape[dim]
    number = sum(a.kind == "input" for a in trace.record.allocations)
    reason = "activations that could not be followed" if trace.is_opaque(tensor) else "input of the model"
    ids = trace.record.new_neurons(f"input{number or ''}", size, kind="input")
    trace.record.pin(ids, reason, lost=trace.is_opaque(tensor))
    shape = [1] * tensor.dim()
    shape[dim] = size
    trace.set_ids(tensor, ids.view(shape).expand(tensor.shape))
    return ids


def module_name(parameter: str) -> str:
    """The module that a parameter belongs to, which names the neurons that it makes."""
    return parameter.rpartition(".")[0] or parameter


def distinct(trace: Trace, ids: Tensor, name: str) -> Tensor:
    """Ids in which none occurs twice: repeated neurons (a channel at several pixels) get copies of their own.

    Entries that belong to no neuron become pinned inputs.
    """
    record = trace.record
    missing = ids < 0
    if bool(missing.any()):
        ids = ids.clone()
        ids[missing] = record.new_neurons(f"{name}[data]", int(missing.sum()), kind="input", pinned="data")
    if ids.unique().numel() == ids.numel():
        return ids
    copies = record.new_neurons(name, ids.numel())
    record.repeat(ids, copies)
    return copies
