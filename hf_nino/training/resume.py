"""How the state of a run's nowcasting is saved and restored, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.utils import logging

from ..nowcaster.base import Nowcaster
from ..nowcaster.shards import Rows
from .checkpoint import UnreadableCheckpoint, parts_of, read_state, read_tensors, write_state, write_tensors
from .history import History
from .horizon import Trust
from .losses import LossMeter
from .outlook import Outlook
from .overhead import Overhead
from .probation import Probation
from .ranks import OneVoice
from .redivide import Redivision
from .stores import ParameterStore, Signature, signature_hash
from .undo import Undo

logger = OneVoice(logging.get_logger(__name__))

_DROPPED = "has been dropped"


class Resumable:
    """The part of :class:`~hf_nino.training.nowcasting.Nowcasting` that checkpoints are about."""

    nowcaster: Nowcaster
    spec: str
    store: ParameterStore
    history: History
    outlook: Outlook
    overhead: Overhead
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
    _settle: Callable[[], None]
    synchronize: Callable[[], None]

    def _forget(self) -> None:
        self.history.clear()
        self.outlook.clear()

    def state_dict(self) -> dict[str, Any]:
        """``{"state": what JSON can hold, "tensors": {name: tensor}}``; everything that an exact resume needs.

        Where several ranks train, to be called on all of them; tensors are this rank's.

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
            "nowcaster_source": self._source(),
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
            "overhead": self.overhead.state(),
            "signature": signature_hash(self.store.signature()),
            "fingerprint": self.store.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> bool:
        """Restore what :meth:`state_dict` gave, before the first step.

        Counters are always taken over.  The history (and the nowcaster's memory) only if they fit: the same trainable
        parameters, context, period, interval and nowcaster; else a warning says what differs and nowcasting warms up.
        Where several ranks train, to be called on all of them with what each of them gave, as many as then.

        Returns:
            Whether history and memory were taken over.
        """
        state, tensors = state_dict["state"], state_dict["tensors"]
        self._load_counters(state)
        differs = self._differs(state)
        if differs:
            self._drop(differs)
            return False
        return self._load_tensors(state, tensors)

    def _source(self) -> dict[str, Any] | None:
        """Where the nowcaster was loaded from, with the commit; ``None`` for rules and new ones."""
        source = getattr(self.nowcaster, "source", None)
        return None if source is None else source.to_dict()

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        saved, now = state.get("nowcaster_source"), self._source()
        if saved is not None and now is not None and saved["commit"] != now["commit"]:
            logger.warning(
                f"The run had nowcaster {saved['name']} of commit {saved['commit']} and goes on with that of commit "
                f"{now['commit']}; '{saved['name']}@{saved['commit']}' is the same as before."
            )
        self.step_count, self.skipped_steps = int(state["step"]), int(state["skipped_steps"])
        self.nowcasts, self.rejected = int(state["nowcasts"]), int(state["rejected"])
        self.seconds = float(state["seconds"])
        self.overhead.load(state.get("overhead", {}))
        self.outlook.warmup_end = state["warmup_end"]
        self.taken_back, self.stopped = int(state.get("taken_back", 0)), bool(state.get("stopped", False))
        self._loaded = {"fingerprint": None}

    def _differs(self, state: Mapping[str, Any]) -> str:
        """Why a state is not one of this run; empty: it may be."""
        mine = {
            "kind": type(self.nowcaster).__name__,
            "context": self.history.context,
            "period": self.period,
            "interval": self.interval,
            "signature": signature_hash(self._signature),
        }
        differs = {key: (state[key], value) for key, value in mine.items() if state[key] != value}
        if not differs:
            return ""
        key, (saved, now) = next(iter(differs.items()))
        key = "nowcaster" if key == "kind" else key
        what = "the trainable parameters differ" if key == "signature" else f"{key} was {saved!r} and is {now!r}"
        return f"does not fit this run: {what}"

    def _load_tensors(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        history = {name: tensor for name, tensor in tensors.items() if not name.startswith(("memory/", "undo/"))}
        memory = {name.removeprefix("memory/"): t for name, t in tensors.items() if name.startswith("memory/")}
        undo = {name.removeprefix("undo/"): t for name, t in tensors.items() if name.startswith("undo/")}
        live, failure = self.store.live(), ""
        here = tuple((name, tuple(live[name].shape), dtype) for name, _, dtype in self._signature)
        try:
            self.history.load(history, list(state["snapshot_steps"]), here, live)
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
            failure = f"cannot be restored ({type(error).__name__}: {error})"
        failure = self.store.agree(failure)
        if failure:
            self._drop(failure)
            return False
        self._loaded = {"fingerprint": state["fingerprint"]}
        return True

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``nino_history.safetensors`` and ``nino_state.json`` into ``directory``; on all ranks at once.

        Where several ranks train, each writes its rows, into files of its own, and the first one the JSON.

        Snapshots on the disk are linked (or copied) beside them.  If the disk failed them, a warning says so and the
        checkpoint holds everything else.

        Raises:
            OSError: the checkpoint could not be written, by any rank; on all ranks.
        """
        self.synchronize()
        ranks, shards = self.store.ranks, self.store.shards()
        part, parts = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        # What works on whole states carries the same on all ranks.
        spread = shards is None or part == 0 or self.nowcaster.works_on_shards
        state, tensors, files, failure = self._state(), self._memory() if spread else {}, [], ""
        try:
            tensors |= self._undo()
            files = self.history.files()
            if not files:
                tensors |= self.history.to_safetensors()
        except OSError as error:
            failure = f"{type(error).__name__}: {error}"
        failure = self.store.agree(failure)
        if failure:
            logger.warning(
                f"Snapshots could not be written to {self.history.device} ({failure}); the checkpoint is saved "
                "without them, and a run resumed from it warms up."
            )
            tensors, files = {name: t for name, t in tensors.items() if name.startswith("memory/")}, []
            state |= {"snapshot_steps": [], "learning_rates": []} | _without_undo(state)
        self._together(lambda: write_tensors(directory, state, tensors, files, part, parts))
        self._together(lambda: part or write_state(directory, state, parts, bool(files)))

    def _together(self, work: Callable[[], Any]) -> None:
        """Do it on all ranks, or raise on all of them."""
        error: OSError | None = None
        try:
            work()
        except OSError as caught:
            error = caught
        failure = self.store.agree("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None and self.store.ranks is None:
            raise error
        if failure:
            raise OSError(f"the nowcasting state could not be saved: {failure}") from error

    def load(self, directory: str | os.PathLike) -> bool:
        """Restore what :meth:`save` wrote; on all ranks at once.

        A checkpoint of another number of ranks, or of ranks that divided the parameters otherwise, is divided anew:
        each rank reads the rows that it needs.  A nowcast that was on probation then stays.

        Returns:
            Whether it was there and fits; if not, one warning says why, and nowcasting warms up: it waits for a whole
            new window of snapshots.
        """
        try:
            state = self._read_state(directory)
            self._load_counters(state)
            why = self._differs(state) or self._load_files(directory, state)
            if not why:
                return True
        except UnreadableCheckpoint as error:
            why = f"is missing: {error}"
        except (KeyError, TypeError, ValueError) as error:
            why = f"in {directory} is malformed ({type(error).__name__}: {error})"
        if why != _DROPPED:
            self._drop(why)
        return False

    def _read_state(self, directory: str | os.PathLike) -> dict[str, Any]:
        """The JSON, as the first rank reads it."""
        text, failure, ranks = "", "", self.store.ranks
        if ranks is None or ranks.rank == 0:
            try:
                text = json.dumps(read_state(directory))
            except UnreadableCheckpoint as error:
                failure = str(error)
        failure = self.store.agree(failure)
        if failure:
            raise UnreadableCheckpoint(failure)
        return json.loads(self.store.first(text))

    def _load_files(self, directory: str | os.PathLike, state: dict[str, Any]) -> str:
        """Take over what the files hold; or say why not, :data:`_DROPPED` if that has been said."""
        ranks, tensors, failure = self.store.ranks, {}, ""
        part, parts = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        shapes = {name: tensor.shape for name, tensor in self.store.live().items()}
        same = parts_of(state) == parts
        if same:
            try:
                tensors = read_tensors(directory, state, part)
                if part and self.nowcaster.has_memory and not self.nowcaster.works_on_shards:
                    others = read_tensors(directory, state, 0)
                    tensors |= {name: t for name, t in others.items() if name.startswith("memory/")}
            except UnreadableCheckpoint as error:
                failure = f"is missing: {error}"
            failure = self.store.agree(failure)
            if failure:
                return failure
            names = [name for name in tensors if not name.startswith(("memory/", "undo/"))]
            fits = all(tensors[name].shape == shapes.get(name.partition("/")[2], ()) for name in names)
            same = ranks is None or not self.store.agree("" if fits else "other rows")
        if not same:
            state |= _without_undo(state)
            tensors, failure = self._redivided(directory, state)
            if failure:
                return failure
        return "" if self._load_tensors(state, tensors) else _DROPPED

    def _redivided(self, directory: str | os.PathLike, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
        """This rank's rows of the history and of the nowcaster's memory; or why they cannot be read."""
        shards = self.store.shards()
        rows = {name: Rows(shape, 0, shape[0] if shape else 1) for name, shape, _ in self._signature}
        if shards is not None:
            rows = {name: shards.local(name) for name in rows}
        memory: dict[str, Tensor] = {}
        if self.nowcaster.has_memory and state["settled"]:
            self._settle()  # shows which parts of its memory it divides
            memory = self.nowcaster.memory()
        tensors, failure = {}, ""
        try:
            with Redivision(directory, state) as files:
                for key in files.keys():  # noqa: SIM118
                    kind, _, name = key.partition("/")
                    if kind not in ("memory", "undo"):
                        tensors[key] = files.rows(key, rows[name])
                for name, tensor in memory.items():
                    parameter = next((p for p in sorted(rows, key=len, reverse=True) if name.endswith(p)), None)
                    key = f"memory/{name}"
                    own = rows.get(parameter)
                    divided = own is not None and tuple(tensor.shape) == own.local_shape
                    divided = divided and self.nowcaster.works_on_shards and files.divided(key, own.shape)
                    tensors[key] = files.rows(key, own) if divided else files.first(key)
        except UnreadableCheckpoint as error:
            failure = f"is missing: {error}"
        except Exception as error:
            failure = f"cannot be divided anew ({type(error).__name__}: {error})"
        return tensors, self.store.agree(failure)

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
        self.overhead.forget()
        self.outlook.warmup_end = None
        self.step_count = self.step_count if global_step is None else global_step
        return False


def _without_undo(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state whose nowcast on probation can no longer be taken back."""
    if "probation" not in state:
        return {}
    return {"undo": {}, "probation": {**state["probation"], "opened": None}}
