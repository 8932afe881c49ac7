"""The same network with its neurons in other places: parameters moved along with the nodes of their edges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .structure import EdgeBlock, NeuralGraph, Nodes


def permuted(graph: NeuralGraph, state_dict: Mapping[str, Tensor], permutation: Tensor) -> dict[str, Tensor]:
    """See :meth:`NeuralGraph.permute`; ``permutation`` is int64 [N]."""
    result = dict(state_dict)
    for block in graph.blocks:
        if block.parameter in state_dict:
            result[block.parameter] = torch.empty_like(
                state_dict[block.parameter], memory_format=torch.contiguous_format
            )
    copied = set()
    for block in graph.blocks:
        if block.parameter not in state_dict:
            continue
        new = result[block.parameter]
        if block.parameter not in copied:
            new.copy_(state_dict[block.parameter])
            copied.add(block.parameter)
        goal, source, target = _goal(graph, block, permutation)
        values = block.view(state_dict[block.parameter])
        moved = torch.empty_like(values)
        moved[source[:, None].to(values.device), target[None, :].to(values.device)] = values
        goal.write(new, moved)
    for alias, name in graph.aliases.items():
        if alias in result and name in result:
            result[alias] = result[name]
    return result


def _goal(graph: NeuralGraph, block: EdgeBlock, permutation: Tensor) -> tuple[EdgeBlock, Tensor, Tensor]:
    """Where a block's edges move to: a block of the same parameter, and places on its source and target side.

    Mostly it is the block itself; of a block-diagonal parameter, which has a block for each head, it is another.
    """
    ends = [permutation[graph.node_index(nodes)] for nodes in (block.source, block.target)]
    for candidate in _candidates(graph, block):
        places = [_places(graph, *pair) for pair in zip((candidate.source, candidate.target), ends, strict=True)]
        if places[0] is not None and places[1] is not None:
            return candidate, places[0], places[1]
    raise ValueError(
        f"`permutation` must keep the neurons of a block together, but it moves some of {block.parameter!r} "
        "out of the slice of the parameter that the block covers"
    )


def _candidates(graph: NeuralGraph, block: EdgeBlock) -> Iterator[EdgeBlock]:
    """The block, then others of its parameter; of several between the same neurons, the one of the same rank."""
    yield block
    ranks: dict[tuple[Nodes, Nodes], int] = {}
    ranked = []
    for other in graph.blocks:
        if other.parameter == block.parameter:
            ends = (other.source, other.target)
            ranks[ends] = ranks.get(ends, -1) + 1
            ranked.append((ranks[ends], other))
    own = next(rank for rank, other in ranked if other is block)
    yield from (other for rank, other in ranked if rank == own and other is not block and other.shape == block.shape)


def _places(graph: NeuralGraph, nodes: Nodes, moved: Tensor) -> Tensor | None:
    """The position of each moved node within a selection; ``None`` when some are not in it."""
    index = graph.node_index(nodes)
    order = index.argsort()
    place = torch.searchsorted(index[order], moved).clamp(max=len(index) - 1)
    return order[place] if bool((index[order][place] == moved).all()) else None
