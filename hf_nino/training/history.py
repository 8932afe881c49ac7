"""Snapshots: where they live, in which dtype, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .parameters import Signature


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``torch.float32`` from ``"float32"``.

    Raises:
        ValueError: no floating-point dtype of this name.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`history_dtype` must be a floating-point dtype, such as 'float32', got {dtype!r}")
    return found


class History:
    """The last ``context`` snapshots, oldest first.

    Args:
        context: snapshots it holds when full.
        dtype: dtype of the snapshots.  float32 keeps the small moves between two states of a bfloat16 model apart.
        device: ``"cpu"``, ``"model"`` (each snapshot where its parameter is) or any torch device.
    """

    def __init__(self, context: int, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> None:
        if context < 1:
            raise ValueError(f"`context` must be at least 1 snapshot, got {context}")
        self.context = context
        self.dtype = as_dtype(dtype)
        self.device = device
        self._states: list[dict[str, Tensor]] = []
        self._steps: list[int] = []

    def __len__(self) -> int:
        return len(self._states)

    @property
    def full(self) -> bool:
        return len(self) == self.context

    @property
    def steps(self) -> list[int]:
        """The optimizer steps after which the snapshots were taken."""
        return list(self._steps)

    def states(self) -> list[dict[str, Tensor]]:
        """The snapshots, oldest first: {name: tensor}."""
        return list(self._states)

    def append(self, snapshot: Mapping[str, Tensor], step: int) -> None:
        """Keep ``snapshot``, taken after optimizer step ``step``.

        Raises:
            ValueError: the history is full, or ``step`` is not later than the last one.
        """
        if self.full:
            raise ValueError(f"the history holds {self.context} snapshots and is full; clear it before appending")
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"`step` must be later than that of the last snapshot, {self._steps[-1]}, got {step}")
        self._states.append(dict(snapshot))
        self._steps.append(step)

    def clear(self) -> None:
        """Forget all snapshots."""
        self._states.clear()
        self._steps.clear()

    def to_safetensors(self) -> dict[str, Tensor]:
        """{``"{position}/{name}"``: tensor}, ready for ``safetensors.torch.save_file``."""
        return {f"{i}/{name}": tensor for i, state in enumerate(self._states) for name, tensor in state.items()}

    def load(
        self, tensors: Mapping[str, Tensor], steps: list[int], signature: Signature, like: Mapping[str, Tensor]
    ) -> None:
        """Restore what :meth:`to_safetensors` gave.

        Args:
            tensors: {``"{position}/{name}"``: tensor}.
            steps: step of each snapshot.
            signature: what the snapshots must fit: names and shapes.
            like: {name: tensor} whose devices are used with ``device="model"``.

        Raises:
            ValueError: too many snapshots, missing or unexpected names, another shape.  The history is empty then.
        """
        self.clear()
        if len(steps) > self.context:
            raise ValueError(f"a history holds at most {self.context} snapshots, found {len(steps)}")
        shapes = {name: shape for name, shape, _ in signature}
        expected = {f"{i}/{name}" for i in range(len(steps)) for name in shapes}
        if tensors.keys() != expected:
            odd = sorted(tensors.keys() ^ expected)
            raise ValueError(f"snapshots must hold exactly the trainable parameters; missing or unexpected: {odd[:3]}")
        states: list[dict[str, Tensor]] = []
        for i in range(len(steps)):
            state = {}
            for name, shape in shapes.items():
                tensor = tensors[f"{i}/{name}"]
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"snapshot {i} of {name!r} must have shape {shape}, found {tuple(tensor.shape)}")
                device = like[name].device if self.device == "model" else self.device
                state[name] = tensor.to(device=device, dtype=self.dtype)
            states.append(state)
        for state, step in zip(states, steps, strict=True):
            self.append(state, step)
