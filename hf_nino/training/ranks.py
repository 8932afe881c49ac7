"""What the processes of a run say to each other: sums, rows, and votes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..nowcaster.shards import Ranks

# Tensors up to this size travel together.
BUCKET = 16 * 2**20


class FailedElsewhere(RuntimeError):
    """Another rank has failed, so that what all were doing together cannot be done; the message says which and why."""


class LostRanks(RuntimeError):
    """The other ranks do not answer; the message says for how long they were waited for.  Nothing more can be said."""


class ProcessGroupRanks(Ranks):
    """The default process group of ``torch.distributed``.

    Tensors may be on any device; where the backend cannot reach them there (NCCL: host memory), copies travel.

    A rank that fails between two collectives leaves the others waiting in the next one, until the backend's time-out
    ends the run.  Inside :meth:`together` that is an error on all of them at once.

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
        # Made now: there may be no memory left when a rank has to say so.
        self._ballot = torch.ones(1, dtype=torch.int64, device=self.device)
        self._votes = False

    @property
    def timeout(self) -> float:
        """Seconds after which the backend gives a collective up."""
        backend = dist.distributed_c10d._get_default_group()._get_backend(self.device)
        return backend.options._timeout.total_seconds()

    # -- failures ---------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank fails on all of them; entered and left by all ranks at once.

        Inside, every collective begins with a vote, an all-reduce of one number, in which each rank says that it has
        come that far; what has to be allocated for the collective has been by then.  A rank that fails on the way
        votes against instead, and leaves; the others leave with it, from whatever collective they were about to
        begin.  Whoever fails after the last collective says so in a vote at the end.  It may be nested; the outermost
        counts.

        Raises:
            FailedElsewhere: on the ranks that did not fail; the others raise their own errors.
            LostRanks: a rank has ended, or has not come within the time-out.
        """
        if self.size == 1 or self._votes:
            yield
            return
        self._votes = True
        try:
            yield
            self.meet()
        except (FailedElsewhere, LostRanks):
            raise
        except Exception as error:
            self._say_no(error)
            raise
        finally:
            self._votes = False

    def meet(self) -> None:
        """Inside :meth:`together`: wait until all ranks have come here; raise if one of them has failed."""
        if self._votes and not self._all_well(True):
            self._votes = False
            said = self.texts("")
            rank = next((rank for rank, text in enumerate(said) if text), None)
            raise FailedElsewhere(f"rank {rank} failed ({said[rank]})" if rank is not None else "another rank failed")

    def _say_no(self, error: Exception) -> None:
        clear_frames(error.__traceback__)  # gives back what it ran out of, if that was memory
        self._all_well(False)
        self._votes = False
        self.texts(f"{type(error).__name__}: {error}")

    def _all_well(self, here: bool) -> bool:
        self._ballot.fill_(int(here))
        self._call(dist.all_reduce, self._ballot, op=dist.ReduceOp.MIN)
        return bool(self._ballot.item())

    def _call(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Every collective is called here.

        Raises:
            LostRanks: a rank has ended, or has not come within the time-out (where the backend raises; NCCL's watchdog
                ends the process).
        """
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            raise LostRanks(
                f"the other ranks do not answer rank {dist.get_rank()}: one has ended, or was not here within the "
                f"process group's time-out of {self.timeout:g} s ({error})"
            ) from error

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
        self.meet()
        self._call(dist.all_reduce, flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest on any rank of each of these numbers."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
        self.meet()
        self._call(dist.all_reduce, found, op=dist.ReduceOp.MIN)
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
        self.meet()
        self._call(dist.all_gather, found, mine)
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
        out = self._reach(torch.cat([as_bytes(tensor) for tensor in sends]))
        found = torch.empty(sum(room), dtype=torch.uint8, device=out.device)
        self.meet()
        self._call(dist.all_to_all_single, found, out, room, sizes)
        for tensor, part in zip(receives, found.split(room), strict=True):
            as_bytes(tensor).copy_(part)

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


def lone_rank() -> str:
    """What is wrong where a launcher has started several processes and this one trains alone; empty: nothing.

    ``torchrun`` and ``accelerate launch`` set ``WORLD_SIZE``; whoever trains has to begin the process group.  The
    Trainer does not on a machine without a GPU, unless it is told ``use_cpu``.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if running() or not size.isdigit() or int(size) < 2:
        return ""
    return (
        f"{size} processes were started (WORLD_SIZE), but this one is in no process group: each of them trains a "
        "model of its own. Without a GPU, pass `use_cpu=True` to TrainingArguments (`--use_cpu`), or call "
        "torch.distributed.init_process_group"
    )


class OneVoice(logging.LoggerAdapter):
    """A logger that is silent on all ranks but the first: what is said once is said by one."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})

    def isEnabledFor(self, level: int) -> bool:
        return is_first_rank() and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return msg, kwargs


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, flat: a view."""
    return tensor.detach().view(-1).view(torch.uint8)
