"""The snapshots before a nowcast: in which order, and how they are saved.  Where they live is :mod:`storage`'s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .storage import WITH_MODEL, LostSnapshot, Snapshot, as_dtype, make_place
from .stores import Signature


class History:
    """The last ``context`` snapshots, oldest first.

    Args:
        context: snapshots it holds when full.
        dtype: dtype of the snapshots: float32 (or float64) keeps the small moves between two states of a bfloat16
            model apart; bfloat16 and float16 take half the memory and round each state, to about 3 and 4 digits.
        device: where they live: ``"cpu"``, ``"model"`` or ``"device"`` (each snapshot where its parameter is),
            ``"disk:PATH"`` (a folder, see :class:`hf_nino.training.disk.DiskPlace`) or any torch device.

    Raises:
        ValueError: a bad argument, or a folder in which nothing can be written.
    """

    def __init__(
        self, context: int, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        if context < 1:
            raise ValueError(f"`context` must be at least 1 snapshot, got {context}")
        self.context = context
        self.dtype = as_dtype(dtype)
        self.device = str(device)
        self._place = make_place(device, self.dtype)
        self._snapshots: list[Snapshot] = []
        self._steps: list[int] = []

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def full(self) -> bool:
        return len(self) == self.context

    @property
    def steps(self) -> list[int]:
        """The optimizer steps after which the snapshots were taken."""
        return list(self._steps)

    def states(self) -> list[dict[str, Tensor]]:
        """The snapshots, oldest first: {name: tensor}; to be read only, before the next :meth:`append`.

        Raises:
            OSError: a snapshot could not be written to the disk, or is gone from it.
        """
        return [snapshot.tensors() for snapshot in self._snapshots]

    def append(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take a snapshot of ``state``, as it is now, after optimizer step ``step``.

        Returns before the copy has arrived where that is possible.  Memory or a disk that fails is only noticed by
        :meth:`states` and :meth:`files`, which other ranks call at the same time.

        Raises:
            ValueError: the history is full, or ``step`` is not later than the last one.
        """
        if self.full:
            raise ValueError(f"the history holds {self.context} snapshots and is full; clear it before appending")
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"`step` must be later than that of the last snapshot, {self._steps[-1]}, got {step}")
        try:
            snapshot = self._place.keep(state, step)
        except Exception as error:
            snapshot = LostSnapshot(f"the snapshot of step {step} could not be kept ({type(error).__name__}: {error})")
        self._snapshots.append(snapshot)
        self._steps.append(step)

    def clear(self) -> None:
        """Forget all snapshots."""
        for snapshot in self._snapshots:
            snapshot.release()
        self._snapshots.clear()
        self._steps.clear()

    def close(self) -> None:
        """Forget all snapshots and give back what they took, files included; it may be used again."""
        self.clear()
        self._place.close()

    def files(self) -> list[Path]:
        """The files of the snapshots, oldest first, each whole; empty unless they live on the disk.

        Raises:
            OSError: a snapshot could not be written.
        """
        files = (snapshot.file() for snapshot in self._snapshots)
        return [file for file in files if file is not None]

    def to_safetensors(self) -> dict[str, Tensor]:
        """{``"{position}/{name}"``: tensor}, ready for ``safetensors.torch.save_file``."""
        return {f"{i}/{name}": tensor for i, state in enumerate(self.states()) for name, tensor in state.items()}

    def load(
        self, tensors: Mapping[str, Tensor], steps: list[int], signature: Signature, like: Mapping[str, Tensor]
    ) -> None:
        """Restore what :meth:`to_safetensors` gave, wherever that history lived.

        Args:
            tensors: {``"{position}/{name}"``: tensor}.
            steps: step of each snapshot.
            signature: what the snapshots must fit: names and shapes (of this rank's rows, if they are divided).
            like: {name: tensor} whose devices are used where snapshots live with their parameters.

        Raises:
            ValueError: too many snapshots, missing or unexpected names, another shape.  The history is empty then.
            OSError: a snapshot could not be written to the disk.
        """
        self.clear()
        if len(steps) > self.context:
            raise ValueError(f"a history holds at most {self.context} snapshots, found {len(steps)}")
        shapes = {name: shape for name, shape, _ in signature}
        expected = {f"{i}/{name}" for i in range(len(steps)) for name in shapes}
        if tensors.keys() != expected:
            odd = sorted(tensors.keys() ^ expected)
            raise ValueError(f"snapshots must hold exactly the trainable parameters; missing or unexpected: {odd[:3]}")
        for i in range(len(steps)):
            for name, shape in shapes.items():
                found = tuple(tensors[f"{i}/{name}"].shape)
                if found != shape:
                    raise ValueError(f"snapshot {i} of {name!r} must have shape {shape}, found {found}")
        with_model = self.device in WITH_MODEL
        for i, step in enumerate(steps):
            state = {name: tensors[f"{i}/{name}"] for name in shapes}
            if with_model:
                state = {name: tensor.to(like[name].device) for name, tensor in state.items()}
            self.append(state, step)
            self.files()  # waits for the disk, which is no news here
