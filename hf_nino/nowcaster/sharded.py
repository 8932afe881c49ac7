"""A nowcast of the graph network in which every rank has some rows of every parameter, and no rank all of them.

Each rank runs the passes of :mod:`hf_nino.nowcaster.passes` over the edges of its rows.  Per layer, ranks add up what
the nodes have heard, N x H numbers; apart from that only the moments of the parameters are shared.  The nodes are the
same on all ranks, and every edge is predicted by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..graph.structure import NeuralGraph
from .blockwise import predict
from .conditions import Conditions
from .engine import Engine
from .owners import from_owners, to_owners
from .portion import portion_of
from .scaling import measure_scales
from .shards import Shards
from .streaming import History

if TYPE_CHECKING:
    from .modeling import NiNoModel


@torch.no_grad()
def predict_rows(
    network: NiNoModel,
    graph: NeuralGraph,
    states: History,
    horizon: float,
    pos: Tensor,
    result: Mapping[str, Tensor],
    shards: Shards,
    *,
    token: Tensor | None = None,
    engine: Engine | None = None,
    conditions: Conditions | None = None,
) -> None:
    """Write the predicted rows of this rank into the contiguous tensors of ``result``; a collective operation.

    Its collectives: two sums of moments, one sum of node messages for every layer, and, for parameters that need an
    owner, C + 1 exchanges a round.

    Args:
        graph, pos, token: of the whole model, as for :func:`hf_nino.nowcaster.blockwise.predict`.
        conditions: the same on every rank.
        states: C snapshots of this rank's rows, oldest first.
        result: for every parameter, this rank's rows.
    """
    portion, dtype = portion_of(graph, shards), network.edge_in.weight.dtype
    scales = measure_scales(states, shards.ranks)
    seen = [_brought_together(state, portion.moved, shards, dtype) for state in states]
    owned = {names[shards.ranks.rank] for names in portion.moved if shards.ranks.rank < len(names)}
    written = {**result, **{name: torch.empty_like(seen[-1][name]) for name in owned}}
    told = {"token": token, "engine": engine, "conditions": conditions}
    predict(network, graph, seen, scales, horizon, pos, written, portion=portion, **told)
    for names in portion.moved:
        mine = next((written[name] for name in names if name in owned), None)
        for name, rows in from_owners(shards, names, mine, result, dtype).items():
            result[name].copy_(rows)


def _brought_together(
    state: Mapping[str, Tensor], moved: Sequence[Sequence[str]], shards: Shards, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A state with the parameters that this rank owns whole, and without those that others own."""
    away = {name for names in moved for name in names}
    here = {name: rows for name, rows in state.items() if name not in away}
    for names in moved:
        whole = to_owners(shards, names, state, dtype)
        if whole is not None:
            here[names[shards.ranks.rank]] = whole
    return here
