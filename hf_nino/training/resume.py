"""How the state of a run's nowcasting is saved and restored, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from transformers.utils import logging

from ..nowcaster.base import Nowcaster
from .checkpoint import UnreadableCheckpoint, read_checkpoint, write_checkpoint
from .history import History
from .horizon import Trust
from .losses import LossMeter
from .outlook import Outlook
from .parameters import ParameterStore, Signature, signature_hash
from .probation import Probation
from .undo import Undo

logger = logging.get_logger(__name__)


class Resumable:
    """The part of :class:`~hf_nino.training.nowcasting.Nowcasting` that checkpoints are about."""

    nowcaster: Nowcaster
    spec: str
    store: ParameterStore
    history: History
    outlook: Outlook
    losses: LossMeter
    probation: Probation
    trust: Trust
    undo: Undo
    period: int
    interval: int
    step_count: int
    skipped_steps: int
    nowcasts: int
    rejected: int
    taken_back: int
    stopped: bool
    seconds: float
    _settled: bool
    _signature: Signature
    _loaded: dict[str, list[float] | None] | None

    def _forget(self) -> None:
        self.history.clear()
        self.outlook.clear()

    def state_dict(self) -> dict[str, Any]:
        """``{"state": what JSON can hold, "tensors": {name: tensor}}``; everything that an exact resume needs.

        Raises:
            OSError: a snapshot is to be on the disk and is not.
        """
        return {"state": self._state(), "tensors": self.history.to_safetensors() | self._memory() | self._undo()}

    def _memory(self) -> dict[str, Tensor]:
        memory = self.nowcaster.memory() if self.nowcaster.has_memory else {}
        return {f"memory/{name}": tensor for name, tensor in memory.items()}

    def _undo(self) -> dict[str, Tensor]:
        return {f"undo/{name}": tensor for name, tensor in self.undo.tensors().items()}

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "skipped_steps": self.skipped_steps,
            "nowcasts": self.nowcasts,
            "rejected": self.rejected,
            "seconds": self.seconds,
            "nowcaster": self.spec,
            "kind": type(self.nowcaster).__name__,
            "context": self.history.context,
            "period": self.period,
            "interval": self.interval,
            "snapshot_steps": self.history.steps,
            **self.outlook.state(),
            "taken_back": self.taken_back,
            "stopped": self.stopped,
            "trust": self.trust.share,
            "probation": self.probation.state(),
            "losses": self.losses.state(),
            "undo": self.undo.numbers(),
            "settled": self._settled,
            "signature": signature_hash(self.store.signature()),
            "fingerprint": self.store.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> bool:
        """Restore what :meth:`state_dict` gave, before the first step.

        Counters are always taken over.  The history (and the nowcaster's memory) only if they fit: the same trainable
        parameters, context, period, interval and nowcaster; else a warning says what differs and nowcasting warms up.

        Returns:
            Whether history and memory were taken over.
        """
        state, tensors = state_dict["state"], state_dict["tensors"]
        self.step_count, self.skipped_steps = int(state["step"]), int(state["skipped_steps"])
        self.nowcasts, self.rejected = int(state["nowcasts"]), int(state["rejected"])
        self.seconds = float(state["seconds"])
        self.outlook.warmup_end = state["warmup_end"]
        self.taken_back, self.stopped = int(state.get("taken_back", 0)), bool(state.get("stopped", False))
        self._loaded = {"fingerprint": None}
        mine = {
            "kind": type(self.nowcaster).__name__,
            "context": self.history.context,
            "period": self.period,
            "interval": self.interval,
            "signature": signature_hash(self._signature),
        }
        differs = {key: (state[key], value) for key, value in mine.items() if state[key] != value}
        if differs:
            key, (saved, now) = next(iter(differs.items()))
            key = "nowcaster" if key == "kind" else key
            what = "the trainable parameters differ" if key == "signature" else f"{key} was {saved!r} and is {now!r}"
            self._drop(f"does not fit this run: {what}")
            return False
        history = {name: tensor for name, tensor in tensors.items() if not name.startswith(("memory/", "undo/"))}
        memory = {name.removeprefix("memory/"): t for name, t in tensors.items() if name.startswith("memory/")}
        undo = {name.removeprefix("undo/"): t for name, t in tensors.items() if name.startswith("undo/")}
        try:
            self.history.load(history, list(state["snapshot_steps"]), self._signature, self.store.live())
            self.outlook.load(state)
            if self.nowcaster.has_memory and state["settled"]:
                self.nowcaster.load_memory(memory)
                self._settled = True
            if "probation" in state:
                self.trust.share = float(state["trust"])
                self.losses.load(state["losses"])
                self.undo.load(undo, state["undo"], self.step_count)
                self.probation.load(state["probation"])
        except Exception as error:
            self._drop(f"cannot be restored ({type(error).__name__}: {error})")
            return False
        self._loaded = {"fingerprint": state["fingerprint"]}
        return True

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``nino_history.safetensors`` and ``nino_state.json`` into ``directory``.

        Under DDP on rank 0 only, after ``synchronize()`` on all ranks.

        Snapshots on the disk are linked (or copied) beside them.  If the disk failed them, a warning says so and the
        checkpoint holds everything else.
        """
        state, tensors, files = self._state(), self._memory(), []
        try:
            tensors |= self._undo()
            files = self.history.files()
            if not files:
                tensors |= self.history.to_safetensors()
        except OSError as error:
            logger.warning(
                f"Snapshots could not be written to {self.history.device} ({type(error).__name__}: {error}); the "
                "checkpoint is saved without them, and a run resumed from it warms up."
            )
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("undo/")}
            state |= {"snapshot_steps": [], "learning_rates": [], "undo": {}}
            state["probation"]["opened"] = None
        write_checkpoint(directory, state, tensors, files)

    def load(self, directory: str | os.PathLike) -> bool:
        """Restore what :meth:`save` wrote.

        Returns:
            Whether it was there and fits; if not, one warning says why, and nowcasting warms up: it waits for a whole
            new window of snapshots.
        """
        try:
            state, tensors = read_checkpoint(directory)
            return self.load_state_dict({"state": state, "tensors": tensors})
        except UnreadableCheckpoint as error:
            self._drop(f"is missing: {error}")
        except (KeyError, TypeError, ValueError) as error:
            self._drop(f"in {directory} is malformed ({type(error).__name__}: {error})")
        return False

    def _drop(self, why: str) -> None:
        logger.warning(f"The nowcasting state of the checkpoint {why}. Nowcasting warms up with a new history.")
        self._forget()
        self._settled = False
        self.probation.abandon()
        self.undo.release()
        self.losses.clear()
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory({})

    def _check_loaded(self, global_step: int | None) -> bool:
        """Compare what was loaded with the model and the caller's count; whether a step's work is still to be done."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self.step_count = self.step_count if global_step is None else global_step
            return False
        behind = 0 if global_step is None else global_step - self.skipped_steps - self.step_count
        saved, now = loaded["fingerprint"], self.store.fingerprint()
        # Relative to the sum of magnitudes: another device may sum in another order.
        if saved is not None and not all(abs(a - b) <= 1e-10 * now[1] for a, b in zip(saved, now, strict=True)):
            reason = "was saved with other values of the parameters than the model has now"
        elif behind not in (0, 1):
            reason = f"is of step {self.step_count + self.skipped_steps}, but the run is at step {global_step}"
        else:
            return behind == 1
        self._drop(reason)
        self.nowcasts = self.rejected = self.skipped_steps = self.taken_back = 0
        self.stopped = False
        self.seconds = 0.0
        self.outlook.warmup_end = None
        self.step_count = self.step_count if global_step is None else global_step
        return False
