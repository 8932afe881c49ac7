"""Rules for operators that look elements up, or put them at places: embeddings, indexing, writing in place."""

from __future__ import annotations

import torch

from . import contractions
from .experts import unite_rows
from .meetings import add_rows, forget, join, pointwise_parameter, promote, replace_ids
from .provenance import varying
from .registry import aligned, register, uniform
from .structure import EdgeType
from .trace import Call, Trace


@register("embedding")
def embedding(trace: Trace, call: Call) -> None:
    """A row of the table for each index: rows are pinned, columns are fresh neurons."""
    table, index = call.arguments["weight"], call.arguments["indices"]
    if (view := trace.view(table)) is None:
        forget(trace, call, f"{call.name} with a table that is no parameter")
        return
    if trace.is_input(index):
        edge_type, reason = EdgeType.TOKEN_EMBEDDING, "token"
    elif uniform(index):
        edge_type, reason = EdgeType.OTHER, "row of an embedding"
    else:
        edge_type, reason = EdgeType.POSITION_EMBEDDING, "position"
    ids = add_rows(trace, view, edge_type, reason)
    trace.set_ids(call.results[0], ids.expand(call.results[0].shape))


@register("index")
def index(trace: Trace, call: Call) -> None:
    """Indexing moves ids; indexing rows of a parameter (relative position tables) is an embedding."""
    table = call.tensors[0]
    if (view := trace.view(table)) is not None:
        indices = call.arguments["indices"]
        router = trace.record.last_router
        if len(indices) == 1 and view.shadow.dim() == 1 and router is not None and len(router) == len(view.shadow):
            # A number for each expert, looked up for those that were chosen.
            pointwise_parameter(trace, router, view, view.shadow.shape, multiplies=True)
            trace.set_ids(call.results[0], None)
        elif len(indices) == 1 and view.shadow.dim() == 2 and indices[0] is not None:
            ids = add_rows(trace, view, EdgeType.OTHER, "row of a table")
            trace.set_ids(call.results[0], ids.expand(call.results[0].shape))
        else:
            forget(trace, call, "a parameter is indexed in a way that has no rule")
    elif (ids := trace.full_ids(table)) is not None:
        indices = [None if x is None else x.cpu() for x in call.arguments["indices"]]
        trace.set_ids(call.results[0], torch.ops.aten.index.Tensor(ids.contiguous(), indices))
    elif trace.is_input(table):
        trace.mark_input(call.results[0])


@register("index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "scatter_reduce")
def gather_sums(trace: Trace, call: Call) -> None:
    """Rows added into rows (what experts say, back at their tokens): neurons meet as in a sum."""
    destination, result = call.tensors[0], call.results[0]
    source = next((call.arguments[name] for name in ("source", "src", "values") if name in call.arguments), None)
    if trace.view(source) is not None:
        promote(trace, source, EdgeType.OTHER)
    ids = [x for x in (trace.ids(destination), trace.ids(source)) if x is not None]
    if "index_put" in call.name and ids and ids[-1].dim() < result.dim():
        ids[-1] = aligned(ids[-1], result.dim())
    if trace.ids(source) is not None and ids[-1].dim() == result.dim():
        ids[-1] = unite_rows(trace, ids[-1], int(call.arguments.get("dim", 0)) % result.dim())
    if any(x.dim() != result.dim() or not contractions.fits(x, result) for x in ids):
        forget(trace, call, f"operator {call.name} along neurons")
        return
    joined = None if not ids else (ids[0] if len(ids) == 1 else join(trace, *ids)).expand(result.shape)
    if call.name.endswith("_") and joined is not None and destination._is_view():
        # An accumulator that is written through a view of it.
        trace.write(result, joined, through=True)
    else:
        trace.set_ids(result, joined)


@register("masked_scatter", "masked_scatter_")
def masked_scatter(trace: Trace, call: Call) -> None:
    """Rows put at places of a stream (image features among tokens): their channels are the stream's."""
    stream, source, (result, *_) = trace.ids(call.tensors[0]), trace.ids(call.arguments["source"]), call.results
    known = [ids for ids in (stream, source) if ids is not None]
    if any(varying(ids) != (ids.dim() - 1,) or ids.shape[-1] != result.shape[-1] for ids in known):
        forget(trace, call, f"operator {call.name} along neurons")
        return
    rows = [ids.flatten().view((1,) * (result.dim() - 1) + (-1,)) for ids in known]
    trace.set_ids(result, (join(trace, *rows) if len(rows) == 2 else rows[0]).expand(result.shape) if rows else None)


@register("view_as_complex")
def view_as_complex(trace: Trace, call: Call) -> None:
    """Two neurons become one number (rotary embeddings); they stay pinned and remember each other."""
    ids = trace.full_ids(call.tensors[0])
    if ids is not None:
        real, imaginary = ids.unbind(-1)
        trace.record.pin(ids, "rotated as complex numbers")
        trace.record.complex_pairs.append((real.flatten(), imaginary.flatten()))
        trace.set_ids(call.results[0], real)


@register("view_as_real")
def view_as_real(trace: Trace, call: Call) -> None:
    """The inverse of :func:`view_as_complex`."""
    real = trace.full_ids(call.tensors[0])
    if real is not None:
        imaginary = real
        for first, second in trace.record.complex_pairs:
            imaginary = replace_ids(imaginary, trace.record.find(first), trace.record.find(second))
        trace.set_ids(call.results[0], torch.stack([real, imaginary], dim=-1))


@register("gather", "take_along_dim")
def gather(trace: Trace, call: Call) -> None:
    """What is gathered along neurons belongs to none of them; unless neurons chose (a router), it tells them apart."""
    ids, (result, *_) = trace.ids(call.tensors[0]), call.results
    if ids is None:
        return
    if call.arguments.get("dim", 0) % result.dim() not in varying(ids):
        trace.set_ids(result, ids.expand(result.shape) if contractions.fits(ids, result) else None)
    elif not trace.is_opaque(call.arguments.get("index", call.arguments.get("indices"))):
        trace.record.pin(ids, "looked up by number (relative positions)")


@register("copy_")
def copy(trace: Trace, call: Call) -> None:
    """The destination takes over the source's neurons."""
    destination, source = call.tensors[:2]
    if trace.view(source) is not None:
        promote(trace, source, EdgeType.OTHER)
    ids = trace.ids(source)
    trace.write(destination, None if ids is None else aligned(ids, destination.dim()))
