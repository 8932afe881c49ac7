"""What every nowcaster has in common: how many snapshots it reads, how often it likes to run, and what it carries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..graph import NeuralGraph


class Nowcaster(ABC):
    """Predicts a future state of a network's parameters from its last states.

    Attributes:
        context: snapshots that :meth:`nowcast` reads.
        period: optimizer steps between nowcasts that suit it, unless the user says otherwise; snapshots are
            ``period // context`` steps (one *interval*) apart.
        max_horizon: the largest horizon it knows, in intervals.
        needs_graph: whether :meth:`nowcast` reads the neural graph.
        reach: how far it really looks ahead at most, in intervals; a larger horizon is treated as this one.
    """

    context: int
    period: int
    max_horizon: int
    needs_graph: ClassVar[bool] = False

    @abstractmethod
    def nowcast(
        self, graph: NeuralGraph | None, states: Sequence[Mapping[str, Tensor]], horizon: int
    ) -> dict[str, Tensor]:
        """The state that is ``horizon`` intervals after the last of ``states``.

        Args:
            graph: the model's neural graph; ``None`` is enough for nowcasters with ``needs_graph = False``.
            states: ``context`` snapshots, oldest first, each {parameter name: tensor}.
            horizon: 1 .. ``max_horizon`` intervals.

        Returns:
            A new tensor for every name in the states, of the same shape, dtype and device as in the last state.

        Raises:
            ValueError: the wrong number of states, names or shapes that differ between states or from the graph, or a
                horizon out of range.
        """

    def settle(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (optional)
        """Told the state that the base optimizer carries on from: at the start of a run and after every nowcast.

        Nowcasters without memory ignore it.  The tensors are the model's own; copy what is kept.
        """

    @property
    def reach(self) -> int:
        return self.max_horizon

    @property
    def has_memory(self) -> bool:
        """Whether :meth:`settle` and :meth:`memory` do anything; callers may skip both when not."""
        return False

    def memory(self) -> dict[str, Tensor]:
        """What it carries from nowcast to nowcast, to be checkpointed: {name: tensor}."""
        return {}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:  # noqa: B027 (optional)
        """Restore what :meth:`memory` returned; an empty mapping forgets everything."""


def check_states(nowcaster: Nowcaster, states: Sequence[Mapping[str, Tensor]], horizon: int) -> None:
    """Raise the errors that :meth:`Nowcaster.nowcast` promises for bad ``states`` and ``horizon``."""
    kind = type(nowcaster).__name__
    if len(states) != nowcaster.context:
        raise ValueError(f"`states` must hold {nowcaster.context} snapshots for {kind}, got {len(states)}")
    if isinstance(horizon, bool) or int(horizon) != horizon or not 1 <= horizon <= nowcaster.max_horizon:
        raise ValueError(
            f"`horizon` must be a whole number from 1 to {nowcaster.max_horizon} for {kind}, got {horizon}"
        )
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
