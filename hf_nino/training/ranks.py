"""What the processes of a run say to each other: sums, rows, and votes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..nowcaster.shards import Ranks

# Tensors up to this size travel together.
BUCKET = 16 * 2**20


class ProcessGroupRanks(Ranks):
    """The default process group of ``torch.distributed``.

    Tensors may be on any device; where the backend cannot reach them there (NCCL: host memory), copies travel.

    Args:
        order: global ranks in the order of their rows; default: as they are.

    Attributes:
        device: where what has no place of its own (votes) is put for the backend.
    """

    def __init__(self, order: Sequence[int] | None = None) -> None:
        self.order = tuple(range(dist.get_world_size()) if order is None else order)
        self.size = len(self.order)
        self.rank = self.order.index(dist.get_rank())
        # "cpu:gloo,cuda:nccl"
        self._reachable = {part.partition(":")[0] for part in dist.get_backend_config().split(",")}
        on_host = "cpu" in self._reachable or not torch.cuda.is_available()
        self.device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

    @property
    def timeout(self) -> float:
        """Seconds after which the backend gives a collective up."""
        backend = dist.distributed_c10d._get_default_group()._get_backend(self.device)
        return backend.options._timeout.total_seconds()

    # -- numbers ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Ranks.sum_`.  Rings and trees sum each number in one place: every rank gets the same bits."""
        if self.size == 1:
            return
        buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() * tensor.element_size() > BUCKET:
                self._sum_up([tensor])
                continue
            bucket = buckets.setdefault((tensor.dtype, tensor.device), [])
            bucket.append(tensor)
            if sum(each.numel() * each.element_size() for each in bucket) > BUCKET:
                self._sum_up(bucket)
                bucket.clear()
        for bucket in buckets.values():
            self._sum_up(bucket)

    def _sum_up(self, tensors: Sequence[Tensor]) -> None:
        if not sum(tensor.numel() for tensor in tensors):
            return
        flat = self._reach(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest on any rank of each of these numbers."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return found.tolist()

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """The int64 tensors of all ranks, of one shape, in the order of ranks; on the host."""
        if self.size == 1:
            return [numbers]
        every = self._every(numbers.to(torch.int64))
        return [every[rank] for rank in self.order]

    def _every(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape, by global rank; on the host."""
        mine = mine.to(self.device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return list(torch.stack(found).cpu())

    # -- rows -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """See :meth:`Ranks.exchange`."""
        if self.size == 1:
            incoming[0].copy_(outgoing[0])
            return
        # By global rank, as bytes: not every backend exchanges every dtype.
        places = sorted(range(self.size), key=self.order.__getitem__)
        sends, receives = [outgoing[place] for place in places], [incoming[place] for place in places]
        sizes = [tensor.numel() * tensor.element_size() for tensor in sends]
        room = [tensor.numel() * tensor.element_size() for tensor in receives]
        out = self._reach(torch.cat([_bytes(tensor) for tensor in sends]))
        found = torch.empty(sum(room), dtype=torch.uint8, device=out.device)
        dist.all_to_all_single(found, out, room, sizes)
        for tensor, part in zip(receives, found.split(room), strict=True):
            _bytes(tensor).copy_(part)

    def _reach(self, tensor: Tensor) -> Tensor:
        """The tensor, where the backend can reach it."""
        return tensor if tensor.device.type in self._reachable else tensor.to(self.device)

    # -- words ------------------------------------------------------------------------------------------------------

    def texts(self, text: str) -> list[str]:
        """What every rank says, by global rank; cheap if none says anything."""
        if self.size == 1:
            return [text]
        data = text.encode()
        lengths = [int(length) for length in self.gather(torch.tensor([len(data)]))]
        if not any(lengths):
            return [""] * self.size
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        sizes = dict(zip(self.order, lengths, strict=True))
        return [bytes(row[: sizes[rank]].tolist()).decode() for rank, row in enumerate(self._every(mine))]

    def agree(self, failure: str) -> str:
        """The first failure that any rank has, on all ranks; empty if none has one.

        Whatever may go wrong on one rank alone ends in this, before the next collective: the others would wait in it
        for a rank that never comes.
        """
        said = self.texts(failure)
        rank = next((rank for rank, text in enumerate(said) if text), None)
        if rank is None:
            return ""
        return said[rank] if len(set(said)) == 1 else f"rank {rank}: {said[rank]}"

    def alike(self, text: str) -> bool:
        """Whether all ranks say the same."""
        return len(set(self.texts(text))) == 1


def running() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return dist.get_rank() == 0 if running() else int(os.environ.get("RANK", "0")) == 0


class OneVoice(logging.LoggerAdapter):
    """A logger that is silent on all ranks but the first: what is said once is said by one."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})

    def isEnabledFor(self, level: int) -> bool:
        return is_first_rank() and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return msg, kwargs


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
