"""The graph network over edge blocks: the same function as :mod:`message_passing`, without anything of size E x H.

Notation (design: "The nowcaster, exactly and fast"): s are the scaled states of an edge j -> i (all taps and
snapshots), x^l the nodes before layer l, and ``u^l`` the inside of edge update l, before its output map::

    e^0 = Win s + type          e^l = L1 u^(l-1) + b1
    u^l = act(Le e^l + Ls x_j^(l+1) + Lt x_i^(l+1) + b)
    m^l = (A e^l + a) * (P_t x_i^l + P_s x_j^l + p) + (C e^l + c)

Every linear map that reads e^l is folded with the one that made it (:mod:`hf_nino.nowcaster.folding`), so that each
tile works on z^0 = s and z^l = u^(l-1). The mean of messages needs only two sums over the sources of a target,

    S_i = sum_j z_ij                B_i = sum_j (A z_ij) * (P_s x_j)

and for layer 0, where z has few components, ``B_i = sum_c A[:, c] * (sum_j z_ijc P_s x_j)``: matrix products over
nodes instead of anything per edge and hidden unit.  u^l is never stored, it is computed again, tile by tile,
wherever it is read. The last message-passing layer changes nothing and does not exist.

Shape letters: S samples of one graph, N nodes, E edges, J sources and I targets of a block, F taps, C snapshots,
D = F * C, H hidden, K horizons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..graph.structure import EdgeBlock, NeuralGraph
from .conditions import Conditions
from .engine import Engine
from .folding import Folded
from .passes import Passes
from .portion import Portion
from .scaling import Scale
from .streaming import History, Results

if TYPE_CHECKING:
    from .modeling import NiNoModel


def blockwise(
    network: NiNoModel,
    graph: NeuralGraph,
    states: History,
    scales: Mapping[str, Scale],
    horizon: float | None,
    pos: Tensor,
    *,
    token: Tensor | None = None,
    engine: Engine | None = None,
    folded: Folded | None = None,
    conditions: Conditions | None = None,
) -> Iterator[tuple[EdgeBlock, Tensor]]:
    """Scaled deltas of every trainable block, in the order of ``graph.trainable_blocks``.

    Differentiable in the weights of ``network``, in bounded memory too (see :class:`Engine`).

    Args:
        network: weights; everything is computed on its device and in its dtype.
        states: C snapshots, oldest first, unscaled; on any device, of any floating dtype.
        scales: of every parameter in ``graph.parameter_names``.
        horizon: 1 .. ``network.max_horizon``, or ``None`` for all of them.
        pos: positional encoding [N, positional_size].
        token: int64 [N], row of the token position table for every node; only for networks that have one.
        engine: precision, memory and threads; ``None`` for ``network.engine``.
        folded: ``fold(network, horizon)``, to share it between graphs.
        conditions: what networks that are told anything are told, instead of ``horizon``; ``None``: a constant
            learning rate.

    Yields:
        (block, delta) with delta [J, I, F], or [J, I, F, K] for all horizons.  To be added to the scaled last state.
    """
    told = {"token": token, "engine": engine, "folded": folded, "conditions": conditions}
    for block, delta in blockwise_samples(network, graph, [states], [scales], horizon, pos, **told):
        yield block, delta[0]


def blockwise_samples(
    network: NiNoModel,
    graph: NeuralGraph,
    samples: Sequence[History],
    scales: Sequence[Mapping[str, Scale]],
    horizon: float | None,
    pos: Tensor,
    *,
    token: Tensor | None = None,
    engine: Engine | None = None,
    folded: Folded | None = None,
    conditions: Conditions | None = None,
) -> Iterator[tuple[EdgeBlock, Tensor]]:
    """:func:`blockwise` for S samples of one graph at once, which saves the work that blocks cost by their number.

    Args:
        samples: S histories of C snapshots each.
        scales: the scales of each.
        pos: [N, positional_size] for all, or [S, N, positional_size].
        conditions: of S samples, or of one for all of them; ``horizon`` is ``None`` for several horizons.

    Yields:
        (block, delta) with delta [S, J, I, F], or [S, J, I, F, K] for all horizons.
    """
    passes = Passes(network, graph, samples, scales, horizon, engine, folded, conditions=conditions)
    passes.messages(pos, token)
    for block, strips in passes.blocks():
        delta = passes.deltas(block, strips)
        yield block, delta if horizon is None else delta[..., 0]


@torch.no_grad()
def predict(
    network: NiNoModel,
    graph: NeuralGraph,
    states: History,
    scales: Mapping[str, Scale],
    horizon: float,
    pos: Tensor,
    result: Mapping[str, Tensor],
    *,
    token: Tensor | None = None,
    engine: Engine | None = None,
    portion: Portion | None = None,
    conditions: Conditions | None = None,
) -> None:
    """Write the predicted state into the contiguous tensors of ``result``; other arguments as for :func:`blockwise`.

    The scaled last state plus the delta, scaled back.  Nothing of the size of a parameter is held beside the result.

    Args:
        portion: what this rank has of the graph, where ranks share the work: of all else, ``states`` and ``result``
            hold what its blocks read and write.
    """
    passes = Passes(network, graph, [states], [scales], horizon, engine, portion=portion, conditions=conditions)
    passes.messages(pos, token)
    results = Results(result, passes.device, passes.states.lane)
    for block, strips in passes.blocks():
        passes.write(block, strips, results)
    results.close()
