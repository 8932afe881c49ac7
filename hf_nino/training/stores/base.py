"""What every store of parameters has in common."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...nowcaster.shards import Shards
from ..ranks import ProcessGroupRanks

Signature = tuple[tuple[str, tuple[int, ...], str], ...]


class ParameterStore(ABC):
    """The trainable floating-point parameters of a model, by the names that they have in the bare model.

    Tied parameters appear once.  Parameters are looked up anew at every call, so a parameter that is frozen, thawed or
    exchanged during a run is seen (compare :meth:`signature`).  They are only ever written in place, never replaced:
    optimizers, DDP buckets, CUDA graphs and tied modules hold on to them.

    Where several ranks train (:meth:`shards` is not ``None``), each of them reads and writes its own rows of every
    parameter, and every method but :meth:`signature` and :attr:`device` is to be called on all ranks at once.

    Attributes:
        model: the bare model.
        ranks: the processes that train it; ``None`` if there is one.
        whole: whether this process holds all parameters whole.
    """

    model: nn.Module
    ranks: ProcessGroupRanks | None = None
    whole: bool = True

    @abstractmethod
    def signature(self) -> Signature:
        """(name, whole shape, dtype) of every parameter; it changes when some are frozen, thawed, added or resized."""

    @abstractmethod
    def live(self) -> dict[str, Tensor]:
        """{name: tensor}, outside autograd: this rank's rows, or the whole parameters if there is one rank.

        To be read only, and before the next step: views of the model's memory where that holds them, else copies.
        """

    @abstractmethod
    def write(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` (rows, as in :meth:`live`) into the parameters, in place, cast to their dtype and device.

        Afterwards all ranks that hold an element hold the same bits, and so do copies in other dtypes that a backend
        keeps (ZeRO).

        Raises:
            ValueError: a name that is no trainable parameter, or another shape than :meth:`live` has; nothing has been
                written then.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the first parameter is: what is computed beside training is computed there."""

    def shards(self) -> Shards | None:
        """Which rank has which rows; ``None`` if one process has them all."""
        return None

    def elements(self, own: bool = True) -> int:
        """Elements of this rank's rows; with ``own=False``, of all parameters."""
        shards = self.shards()
        if shards is None or not own:
            return sum(math.prod(shape) for _, shape, _ in self.signature())
        return sum(shards.local(name).numel for name in shards.ranges)

    def gather(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on all ranks, of a state that is divided as :meth:`live` is."""
        return dict(state)

    def snapshot(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A contiguous copy of :meth:`live` in ``dtype``; ``device="model"``: each tensor where its parameter is."""
        return {
            name: tensor.to(
                device=tensor.device if device == "model" else device,
                dtype=dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            for name, tensor in self.live().items()
        }

    def rows_of_state(self, parameter: Tensor, value: Tensor) -> Tensor:
        """What this rank has to keep of ``value``, which an optimizer keeps for ``parameter``; a view."""
        return value

    def write_states(self, states: Mapping[Any, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Copy ``{anything: (parameter, value, rows)}`` back, rows that :meth:`rows_of_state` gave into ``value``."""
        for _, value, rows in states.values():
            value.copy_(rows)

    # -- decisions --------------------------------------------------------------------------------------------------

    def together(self) -> AbstractContextManager[None]:
        """What fails inside on one rank is an error on all of them (:meth:`ProcessGroupRanks.together`)."""
        return nullcontext() if self.ranks is None else self.ranks.together()

    def agree(self, failure: str) -> str:
        """Why something cannot be done, on any rank; empty: it can, on all of them (:meth:`ProcessGroupRanks.agree`).

        Ranks must take the same decision, or their parameters drift apart and the next collective hangs.
        """
        return failure if self.ranks is None else self.ranks.agree(failure)

    def first(self, text: str) -> str:
        """What the first rank says."""
        return text if self.ranks is None else self.ranks.texts(text)[0]

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number if self.ranks is None else self.ranks.least([number])[0]

    def average(self, values: Tensor) -> list[float]:
        """``values`` on the host, averaged over the ranks."""
        if self.ranks is None:
            return values.tolist()
        values = values.clone()
        self.ranks.sum_([values])
        return (values / self.ranks.size).tolist()

    @torch.no_grad()
    def fingerprint(self) -> list[float]:
        """Sum and sum of magnitudes over all parameters (float64): tells one state of a model from another.

        The same for any number of ranks, but for rounding.
        """
        live = [tensor for tensor in self.live().values() if tensor.numel()]
        total = sum((tensor.sum(dtype=torch.float64).cpu() for tensor in live), _zero())
        size = sum((torch.linalg.vector_norm(t, 1, dtype=torch.float64).cpu() for t in live), _zero())
        found = torch.stack([total, size])
        if self.ranks is not None:
            self.ranks.sum_([found])
        return found.tolist()


def signature_hash(signature: Signature) -> str:
    """SHA-256 of a signature, for checkpoints; backends list parameters in different orders."""
    return hashlib.sha256(json.dumps(sorted(signature)).encode()).hexdigest()


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise the errors that :meth:`ParameterStore.write` promises."""
    for name, tensor in state.items():
        if name not in shapes:
            raise ValueError(f"`state` must hold trainable parameters of the model only, found {name!r}")
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(
                f"`state` must hold tensors of the parameters' shapes; {name!r} has {tuple(tensor.shape)} and the "
                f"parameter {tuple(shapes[name])}"
            )


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)
