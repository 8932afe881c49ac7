"""What nowcasters that watch their own jumps have in common: anchors, buffers, and how these are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import NeuralGraph
from .base import Nowcaster, check_rows, check_states
from .shards import Shards


class DisplacementNowcaster(Nowcaster):
    """Jumps by what it makes of the displacements between its nowcasts, tensor by tensor.

    The *anchor* is the state that training carried on from after the last nowcast; the *displacement* is what the base
    optimizer added since then.  The result of a nowcast is the next anchor, unless :meth:`settle` says otherwise.  A
    nowcast without an anchor makes the state the anchor and returns it unchanged.

    Subclasses say in :attr:`parts` which tensors they keep beside the anchor, for each parameter, in :meth:`begin` how
    they begin and in :meth:`move` what is to be done.  Those that may set ``works_on_shards`` are those whose
    :meth:`move` is element by element, and those with :meth:`moves` of their own.
    """

    context = 1
    max_horizon = 1
    parts: ClassVar[tuple[str, ...]]
    parts_without_rows: ClassVar[tuple[str, ...]] = ()
    """Those that are about a parameter as a whole: the same on every rank."""

    def __init__(self) -> None:
        self._anchor: dict[str, Tensor] = {}
        self._kept: dict[str, dict[str, Tensor]] = {part: {} for part in self.parts}

    @abstractmethod
    def begin(self, anchor: Tensor) -> dict[str, Tensor]:
        """The first value of every part, for a parameter with this float32 anchor."""

    @abstractmethod
    def shape(self, part: str, anchor: Tensor) -> torch.Size:
        """The shape that a part must have."""

    @abstractmethod
    def move(self, displacement: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """From the anchor to the nowcast.

        Args:
            displacement: of one parameter, float32; may be overwritten.
            kept: its parts, updated in place.
        """

    @torch.no_grad()
    def nowcast(
        self,
        graph: NeuralGraph | None,
        states: Sequence[Mapping[str, Tensor]],
        horizon: int = 1,
        *,
        shards: Shards | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`; ``graph`` is not read.  Changes the memory."""
        check_states(self, states, horizon, shards)
        state = states[0]
        if not self._all_remember(state, shards):
            self._settle(state, afresh=True)
            return {name: tensor.detach().clone() for name, tensor in state.items()}

        def displacement(name: str) -> Tensor:
            return state[name].detach().to(self._anchor[name]) - self._anchor[name]

        result = {}
        for name, move in self.moves(state, displacement, shards):
            self._anchor[name].add_(move)
            result[name] = self._anchor[name].to(state[name].device, state[name].dtype, copy=True)
        return {name: result[name] for name in state}

    def moves(
        self, names: Iterable[str], displacement: Callable[[str], Tensor], shards: Shards | None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, move) of every parameter, in any order; here :meth:`move`, one after another.

        Args:
            displacement: computes that of a parameter, float32 and new every time.
            shards: the rows of every rank, where displacements and all that is kept are rows.
        """
        for name in names:
            yield name, self.move(displacement(name), self.kept(name))

    def kept(self, name: str) -> dict[str, Tensor]:
        """The parts that are kept of a parameter; what they hold may be changed in place."""
        return {part: kept[name] for part, kept in self._kept.items()}

    @torch.no_grad()
    def settle(self, state: Mapping[str, Tensor], *, shards: Shards | None = None) -> None:
        """Make the state the anchor; all else stays, unless the parameters are others than before (on any rank)."""
        if shards is not None:
            check_rows(shards, state)
        self._settle(state, afresh=not self._all_remember(state, shards))

    def _settle(self, state: Mapping[str, Tensor], afresh: bool) -> None:
        if afresh:
            self._anchor, self._kept = {}, {part: {} for part in self.parts}
            for name, tensor in state.items():
                for part, first in self.begin(tensor.detach().to(torch.float32)).items():
                    self._kept[part][name] = first
        for name, tensor in state.items():
            if name in self._anchor:
                self._anchor[name].copy_(tensor)
            else:
                self._anchor[name] = tensor.detach().to(torch.float32, copy=True)

    @property
    def has_memory(self) -> bool:
        return True

    def memory(self) -> dict[str, Tensor]:
        """``PART.NAME`` for every part, the anchor included, and every parameter: copies."""
        return {name: tensor.clone() for name, tensor in self.live_memory().items()}

    def live_memory(self) -> dict[str, Tensor]:
        everything = {"anchor": self._anchor, **self._kept}
        return {f"{part}.{name}": tensor for part, kept in everything.items() for name, tensor in kept.items()}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Restore :meth:`memory`; an empty mapping forgets everything.

        Raises:
            ValueError: a name that is not ``PART.NAME`` with a known part, or parts that do not match.
        """
        kind = type(self).__name__
        found: dict[str, dict[str, Tensor]] = {part: {} for part in ("anchor", *self.parts)}
        for key, tensor in memory.items():
            part, _, name = key.partition(".")
            if part not in found or not name:
                known = ", ".join(f"'{part}.NAME'" for part in found)
                raise ValueError(f"`memory` of a {kind} must have keys {known}, got {key!r}")
            found[part][name] = tensor.detach()
        anchors = found.pop("anchor")
        for name in anchors.keys() | {name for kept in found.values() for name in kept}:
            for part, kept in found.items():
                expected = self.shape(part, anchors[name]) if name in anchors else None
                shape = kept[name].shape if name in kept else None
                if shape is None or shape != expected:
                    raise ValueError(
                        f"`memory` of a {kind} must have an anchor and a {part} that fits it for {name!r}, got shapes "
                        f"{_shape(anchors.get(name))} and {_shape(kept.get(name))}"
                    )
        self._anchor = {name: tensor.to(torch.float32, copy=True) for name, tensor in anchors.items()}
        first = {name: self.begin(anchor) for name, anchor in self._anchor.items()}
        self._kept = {
            part: {name: tensor.to(first[name][part].dtype, copy=True) for name, tensor in kept.items()}
            for part, kept in found.items()
        }

    def memory_rows(self, key: str) -> str | None:
        part, _, name = key.partition(".")
        return None if part in self.parts_without_rows else name

    def _all_remember(self, state: Mapping[str, Tensor], shards: Shards | None) -> bool:
        """Whether the memory is about exactly these parameters, on all ranks: what they do next, they do together."""
        remembers = self._remembers(state)
        if shards is None:
            return remembers
        device = next((tensor.device for tensor in state.values()), None)
        forgetful = torch.tensor(float(not remembers), device=device)
        shards.ranks.sum_([forgetful])
        return not bool(forgetful)

    def _remembers(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the memory is about exactly these parameters."""
        return self._anchor.keys() == state.keys() and all(
            self._anchor[name].shape == tensor.shape for name, tensor in state.items()
        )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
