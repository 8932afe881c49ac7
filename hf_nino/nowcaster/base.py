"""What every nowcaster has in common: how many snapshots it reads, how often it likes to run, and what it carries."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import NeuralGraph
from .rates import Rates
from .shards import Shards


class Nowcaster(ABC):
    """Predicts a future state of a network's parameters from its last states.

    Attributes:
        context: snapshots that :meth:`nowcast` reads.
        period: optimizer steps between nowcasts that suit it, unless the user says otherwise; snapshots are
            ``period // context`` steps (one *interval*) apart.
        max_horizon: the largest horizon it knows, in intervals.
        needs_graph: whether :meth:`nowcast` reads the neural graph.
        works_on_shards: whether :meth:`nowcast` and :meth:`settle` take ``shards``.  Whoever drives a nowcaster that
            does not gathers whole states for it on every rank, calls it without, and keeps the rank's own rows.
        elementwise: whether every element is predicted from its own past alone, so that a parameter may be given in
            pieces.
        reach: how far it really looks ahead at most, in intervals; a larger horizon is treated as this one.
        reads_rates: whether :meth:`nowcast` takes ``rates``.  Whoever drives one that does not calls it without.
        any_horizon: whether a horizon may be a fraction.
    """

    context: int
    period: int
    max_horizon: int
    needs_graph: ClassVar[bool] = False
    works_on_shards: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def nowcast(
        self,
        graph: NeuralGraph | None,
        states: Sequence[Mapping[str, Tensor]],
        horizon: float,
        *,
        shards: Shards | None = None,
        rates: Rates | None = None,
    ) -> dict[str, Tensor]:
        """The state that is ``horizon`` intervals after the last of ``states``.

        With ``shards`` it is a collective operation, in which all ranks must take part with the same names, graph and
        horizon.  Together the results are the nowcast of one process: rounding apart, because sums over ranks are
        taken in another order.  Nowcasters with ``works_on_shards = False`` need not have this argument.

        Args:
            graph: the model's neural graph; ``None`` is enough for nowcasters with ``needs_graph = False``.
            states: ``context`` snapshots, oldest first, each {parameter name: tensor}.
            horizon: 1 .. ``max_horizon`` intervals, whole unless ``any_horizon``.
            rates: the learning rates of history and horizon; ``None``: they are constant.  Nowcasters with
                ``reads_rates = False`` need not have this argument.
            shards: the rows of every rank.  ``states`` then hold this rank's rows, of every parameter (tensors without
                elements where it has none), the result and the memory too; the graph is that of the whole model.

        Returns:
            A new tensor for every name in the states, of the same shape, dtype and device as in the last state.

        Raises:
            ValueError: the wrong number of states, names or shapes that differ between states, from the graph or from
                the shards, or a horizon out of range; before anything is said to other ranks.
        """

    def settle(self, state: Mapping[str, Tensor], *, shards: Shards | None = None) -> None:  # noqa: B027 (optional)
        """Told the state that the base optimizer carries on from: at the start of a run and after every nowcast.

        Nowcasters without memory ignore it.  The tensors are the model's own; copy what is kept.  Collective with
        ``shards``, see :meth:`nowcast`.
        """

    def work(self, shapes: Iterable[tuple[int, ...]], device: torch.device | str = "cpu") -> float:
        """What a nowcast of parameters of these shapes costs on a device, in any unit, for estimates of its seconds:
        how many elements they have, for whoever does the same with each."""
        return float(sum(math.prod(shape) for shape in shapes))

    @property
    def reach(self) -> int:
        return self.max_horizon

    @property
    def reads_rates(self) -> bool:
        return False

    @property
    def any_horizon(self) -> bool:
        return False

    @property
    def has_memory(self) -> bool:
        """Whether :meth:`settle` and :meth:`memory` do anything; callers may skip both when not."""
        return False

    def memory(self) -> dict[str, Tensor]:
        """What it carries from nowcast to nowcast, to be checkpointed: {name: tensor}."""
        return {}

    def live_memory(self) -> dict[str, Tensor]:
        """The same for whoever copies it at once: the tensors may be those that the next nowcast changes."""
        return self.memory()

    def memory_rows(self, key: str) -> str | None:
        """The parameter whose rows a tensor of :meth:`memory` consists of, row by row; ``None`` if it has no rows.

        Where memory is about the rows of a rank, only tensors with rows differ between ranks; they can be put together
        and cut again for other ranks.
        """
        return None

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:  # noqa: B027 (optional)
        """Restore what :meth:`memory` returned; an empty mapping forgets everything."""


def check_states(
    nowcaster: Nowcaster, states: Sequence[Mapping[str, Tensor]], horizon: float, shards: Shards | None = None
) -> None:
    """Raise the errors that :meth:`Nowcaster.nowcast` promises for bad ``states``, ``horizon`` and ``shards``."""
    kind = type(nowcaster).__name__
    if len(states) != nowcaster.context:
        raise ValueError(f"`states` must hold {nowcaster.context} snapshots for {kind}, got {len(states)}")
    inside = not isinstance(horizon, bool) and 1 <= horizon <= nowcaster.max_horizon
    if not inside or (int(horizon) != horizon and not nowcaster.any_horizon):
        number = "number" if nowcaster.any_horizon else "whole number"
        raise ValueError(f"`horizon` must be a {number} from 1 to {nowcaster.max_horizon} for {kind}, got {horizon}")
    first = states[0]
    for position, state in enumerate(states[1:], start=1):
        if state.keys() != first.keys():
            names = sorted(state.keys() ^ first.keys())[:3]
            raise ValueError(
                f"`states` must hold the same names; snapshot {position} differs from the first in {names}"
            )
        for name, tensor in state.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"`states` must hold tensors of the same shape; {name!r} has {tuple(tensor.shape)} in snapshot "
                    f"{position} and {tuple(first[name].shape)} in the first"
                )
    if shards is not None:
        check_rows(shards, first)


def check_rows(shards: Shards, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless the state holds this rank's rows."""
    for name, tensor in state.items():
        if name not in shards.ranges:
            raise ValueError(f"`shards` must have the ranges of every parameter in `states`, but has none of {name!r}")
        rows = shards.local(name)
        if tuple(tensor.shape) != rows.local_shape:
            raise ValueError(
                f"`states` must hold rows {rows.start} to {rows.stop} of {name!r} on rank {shards.ranks.rank}, "
                f"of shape {rows.local_shape}, got {tuple(tensor.shape)}"
            )
