"""What nowcasters that watch their own jumps have in common: anchors, buffers, and how these are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import NeuralGraph
from .base import Nowcaster, check_states


class DisplacementNowcaster(Nowcaster):
    """Jumps by what it makes of the displacements between its nowcasts, tensor by tensor.

    The *anchor* is the state that training carried on from after the last nowcast; the *displacement* is what the base
    optimizer added since then.  The result of a nowcast is the next anchor, unless :meth:`settle` says otherwise.  A
    nowcast without an anchor makes the state the anchor and returns it unchanged.

    Subclasses say in :attr:`parts` which tensors they keep beside the anchor, for each parameter, in :meth:`begin` how
    they begin and in :meth:`move` what is to be done.
    """

    context = 1
    max_horizon = 1
    parts: ClassVar[tuple[str, ...]]

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
        self, graph: NeuralGraph | None, states: Sequence[Mapping[str, Tensor]], horizon: int = 1
    ) -> dict[str, Tensor]:
        """See :meth:`Nowcaster.nowcast`; ``graph`` is not read.  Changes the memory."""
        check_states(self, states, horizon)
        state = states[0]
        if not self._remembers(state):
            self.settle(state)
            return {name: tensor.detach().clone() for name, tensor in state.items()}
        result = {}
        for name, tensor in state.items():
            anchor = self._anchor[name]
            displacement = tensor.detach().to(anchor) - anchor
            anchor.add_(self.move(displacement, {part: kept[name] for part, kept in self._kept.items()}))
            result[name] = anchor.to(tensor.device, tensor.dtype, copy=True)
        return result

    @torch.no_grad()
    def settle(self, state: Mapping[str, Tensor]) -> None:
        """Make the state the anchor; all else stays, unless the parameters are others than before."""
        if not self._remembers(state):
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
        everything = {"anchor": self._anchor, **self._kept}
        return {f"{part}.{name}": tensor.clone() for part, kept in everything.items() for name, tensor in kept.items()}

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

    def _remembers(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the memory is about exactly these parameters."""
        return self._anchor.keys() == state.keys() and all(
            self._anchor[name].shape == tensor.shape for name, tensor in state.items()
        )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
