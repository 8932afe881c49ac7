"""A nowcast of states that are read when they are needed, into tensors that may be files."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..graph import NeuralGraph
from ..nowcaster import LinearNowcaster, NiNoModel, Nowcaster, WNNModel
from ..nowcaster.base import check_states
from ..nowcaster.blockwise import predict
from ..nowcaster.displacements import DisplacementNowcaster
from ..nowcaster.modeling import check_graph, token_rows
from ..nowcaster.scaling import measure_scales
from ..training.guard import PIECE, InvalidNowcast, Verdict, judge, tame

State = Mapping[str, Tensor]

TENSOR_BY_TENSOR = (LinearNowcaster, WNNModel, DisplacementNowcaster)
"""Nowcasters that look at one parameter at a time, or at a piece of it if they are elementwise; :class:`NiNoModel`
streams by itself, all others get everything."""


@torch.no_grad()
def predict_into(
    nowcaster: Nowcaster,
    graph: NeuralGraph | None,
    states: Sequence[State],
    horizon: int | Sequence[int],
    results: State,
    *,
    from_first: bool = False,
) -> None:
    """``nowcaster.nowcast(graph, states, horizon)``, written into ``results``, with as little memory as it allows.

    Args:
        states: as many as the nowcaster reads, oldest first; see :func:`replay` for those that carry a memory.
        horizon: or several: the mean of their nowcasts.
        results: contiguous, {name: tensor}; looked up when they are written to.
        from_first: see :func:`replay`.

    Raises:
        ValueError: as for :meth:`Nowcaster.nowcast`.
    """
    horizons = [horizon] if isinstance(horizon, int) else list(horizon)
    if isinstance(nowcaster, (NiNoModel, WNNModel)) and nowcaster.modulation is not None and len(horizons) > 1:
        # What hears of the horizon has no rows of its own for each of them: a nowcast for each, and their mean.
        found = [nowcaster.nowcast(graph, states, each) for each in horizons]
        for name in found[0]:
            results[name].copy_(mean([state[name] for state in found]))
        return
    if isinstance(nowcaster, (NiNoModel, WNNModel)) and len(horizons) > 1:
        for each in horizons:
            check_states(nowcaster, states, each)
        nowcaster, horizons = mean_of_horizons(nowcaster, horizons), [1]
    if isinstance(nowcaster, NiNoModel):
        check_states(nowcaster, states, horizons[0])
        if graph is None:
            raise ValueError("`graph` must be the model's NeuralGraph for NiNoModel, got None")
        check_graph(graph, states[-1])
        pos = graph.positional_encoding(nowcaster.config.positional_size)
        vocabulary = nowcaster.config.token_position_vocabulary
        token = None if nowcaster.token_position is None else token_rows(graph, vocabulary)
        predict(nowcaster, graph, states, measure_scales(states), horizons[0], pos, results, token=token)
        return
    whole = graph if nowcaster.needs_graph else None
    for some, into in _parts(nowcaster, states, results):
        found = [
            replay(nowcaster, whole, some, each, from_first=from_first)
            if carries(nowcaster)
            else nowcaster.nowcast(whole, some, each)
            for each in horizons
        ]
        for name in into:
            into[name].copy_(found[0][name] if len(found) == 1 else mean([state[name] for state in found]))


def _parts(nowcaster: Nowcaster, states: Sequence[State], results: State) -> Iterator[tuple[list[State], State]]:
    """(states, results) of what the nowcaster is to see at once, one after the other."""
    if not isinstance(nowcaster, TENSOR_BY_TENSOR):
        yield [dict(state) for state in states], results
        return
    for name in states[-1]:
        tensors, result = [state[name] for state in states], results[name]
        if not nowcaster.elementwise:
            yield [{name: tensor} for tensor in tensors], {name: result}
            continue
        flat, target = [tensor.reshape(-1) for tensor in tensors], result.view(-1)
        for start in range(0, len(target), PIECE):
            part = slice(start, start + PIECE)
            yield [{name: tensor[part]} for tensor in flat], {name: target[part]}


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, in float32 (float64 if they are)."""
    total = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32), copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(total.device)
    return total / len(tensors)


def mean_of_horizons(network: NiNoModel | WNNModel, horizons: Sequence[int]) -> NiNoModel | WNNModel:
    """A network whose nowcast at horizon 1 is the mean of this one's at ``horizons``.

    The last map is linear and has rows of its own for each horizon, so that the mean of them is exact.
    """
    network = copy.deepcopy(network)
    chosen = [horizon - 1 for horizon in horizons]
    for parameter in network.edge_out.parameters():
        rows = parameter.data.unflatten(0, (-1, network.max_horizon))
        rows[:, 0] = rows[:, chosen].mean(1)
    return network


def label(spec: str | os.PathLike | Nowcaster, nowcaster: Nowcaster) -> str:
    """What to call a nowcaster: where it is from, with its commit on the Hub if it has one, or its class."""
    if isinstance(spec, Nowcaster):
        return type(spec).__name__
    return str(getattr(nowcaster, "source", None) or spec)


def carries(nowcaster: Nowcaster) -> bool:
    """Whether it reads one state at a time and carries the others."""
    return nowcaster.has_memory and nowcaster.context == 1


def replay(
    nowcaster: Nowcaster,
    graph: NeuralGraph | None,
    states: Sequence[State],
    horizon: int,
    *,
    from_first: bool = False,
) -> State:
    """The last nowcast of one that carries a memory, had it seen these states of a run that it did not change.

    Args:
        states: two or more; each after the first is nowcast from, and then training is taken to go on from it.
        from_first: training is taken to go on from the first state each time instead: the others all started there.
    """
    nowcaster.load_memory({})
    nowcaster.settle(states[0])
    found: State = {}
    for state in states[1:]:
        found = nowcaster.nowcast(graph, [state], horizon)
        nowcaster.settle(states[0] if from_first else state)
    nowcaster.load_memory({})
    return found


@torch.no_grad()
def apply_guard(states: Sequence[State], results: State, horizon: int, read: int) -> Verdict:
    """Judge a nowcast as training does, and change it as training would: see :mod:`hf_nino.training.guard`.

    Args:
        states: oldest first.
        results: the nowcast; what is to be left alone gets the last state back, too long steps are shortened.
        read: snapshots that the nowcaster is given in training.

    Raises:
        InvalidNowcast: it is refused; the message says why.
    """
    verdict = judge(states[-read:], results, horizon)
    if not verdict.accepted:
        raise InvalidNowcast(f"the nowcast is refused: {verdict.reason}")
    for name in results:
        last, result = states[-1][name], results[name]
        tamed = tame({name: last}, {name: result}, verdict).get(name, last)
        if tamed is not result:
            result.copy_(tamed)
    return verdict
