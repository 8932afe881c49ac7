"""Whole parameters at one rank each, for what cannot be done row by row.

A *round* takes as many parameters as there are ranks and gives each rank one of them: rows travel there, the rank
works, and rows of the result travel back.  No rank ever holds more than one parameter in addition to its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .shards import Shards


def rounds(costs: Mapping[str, int], size: int) -> list[tuple[str, ...]]:
    """Parameters by the round that they take part in, the costliest first; the same on all ranks.

    Those of a round cost about the same, so that ranks do not wait for each other; number r of a round is rank r's.

    Args:
        costs: {parameter name: cost}.
        size: number of ranks.
    """
    order = sorted(costs, key=lambda name: (-costs[name], name))
    return [tuple(order[first : first + size]) for first in range(0, len(order), size)]


def to_owners(shards: Shards, names: Sequence[str], rows: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | None:
    """Bring the parameters of a round together; a collective operation.

    Args:
        names: a round.
        rows: this rank's rows of each, at least of those in the round; rank r's parameter comes together on the device
            of rank r's own rows.
        dtype: that they travel in.

    Returns:
        This rank's parameter, new; ``None`` if it has none in this round.
    """
    ranks, whole = shards.ranks, None
    nothing = _nothing(rows[names[0]], dtype)
    outgoing = [rows[name].detach().to(dtype).reshape(-1).contiguous() for name in names]
    incoming = [nothing] * ranks.size
    if ranks.rank < len(names):
        ranges = shards.ranges[names[ranks.rank]]
        whole = torch.empty(ranges[0].shape, dtype=dtype, device=rows[names[ranks.rank]].device)
        incoming = [each.of(whole).view(-1) for each in ranges]
    ranks.exchange([*outgoing, *[nothing] * (ranks.size - len(names))], incoming)
    return whole


def from_owners(
    shards: Shards, names: Sequence[str], whole: Tensor | None, rows: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Send rows of every owner's result back, the reverse of :func:`to_owners`.

    Args:
        whole: this rank's result, of the shape of its parameter, if it has one in this round.
        rows: as for :func:`to_owners`; only their shapes and devices matter.
        dtype: that rows travel and arrive in.

    Returns:
        This rank's rows of every parameter in the round, new.
    """
    ranks = shards.ranks
    nothing = _nothing(rows[names[0]], dtype)
    result = {name: torch.empty(rows[name].shape, dtype=dtype, device=rows[name].device) for name in names}
    outgoing = [nothing] * ranks.size
    if whole is not None:
        whole = whole.to(dtype).contiguous()
        outgoing = [each.of(whole).reshape(-1) for each in shards.ranges[names[ranks.rank]]]
    incoming = [result[name].view(-1) for name in names]
    ranks.exchange(outgoing, [*incoming, *[nothing] * (ranks.size - len(names))])
    return result


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=like.device)
