"""NiNo as a callback, for any Trainer."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..defaults import NOWCASTER
from ..nowcaster.auto import resolve_nowcaster
from ..nowcaster.base import Nowcaster
from ..report import RunRecord
from .event import NowcastEvent
from .nowcasting import Nowcasting
from .ranks import OneVoice

logger = OneVoice(logging.get_logger(__name__))

# What the Trainer knows and the callback passes on.
_FROM_TRAINER = {"nowcaster", "model", "max_steps", "lr_scheduler"}
_OPTIONS = {name for name in inspect.signature(Nowcasting).parameters if name not in _FROM_TRAINER}


class NiNoCallback(TrainerCallback):
    """Nowcasts at the end of optimizer steps of a ``transformers.Trainer`` (or SFTTrainer, or any other).

    ::

        Trainer(..., callbacks=[NiNoCallback("linear", period=100)])

    Each event is appended to ``state.log_history`` (``nino_*``) and told in a line.  A callback cannot reach the
    trackers of ``report_to``; :class:`~hf_nino.training.trainer.NiNoTrainer` does.

    The nowcasting state is written into every checkpoint, after the Trainer has written and, if so told, uploaded it.
    When training resumes it is looked for in ``resume_from``, in ``args.resume_from_checkpoint`` and in
    ``args.output_dir``; a checkpoint without it, or one of another run, resumes with a warm-up and a warning.

    A callback is not shown the loss of every step, only the means that the Trainer logs.  Nowcasts are on probation if
    these are frequent (``logging_steps`` of at most a twelfth of ``patience``); else they are not watched, which is
    said once.  NiNoTrainer sees every loss.

    Put it before callbacks that average parameters (EMA), so that they see what it wrote.

    Args:
        nowcaster: a :class:`~hf_nino.nowcaster.base.Nowcaster`, or the name, path or repo id of one.
        resume_from: the checkpoint folder that the next ``train()`` resumes from, if it lies elsewhere.
        **nowcasting: keyword arguments of :class:`~hf_nino.training.nowcasting.Nowcasting` (``period``, ``horizon``,
            ``start_step``, ...) but those that the Trainer knows: ``max_steps`` and ``lr_scheduler``.

    Attributes:
        nowcasting: the :class:`Nowcasting` of the current or last run; ``None`` before the first.

    Raises:
        TypeError: an unknown keyword argument.
    """

    def __init__(
        self,
        nowcaster: str | os.PathLike | Nowcaster = NOWCASTER,
        *,
        resume_from: str | os.PathLike | None = None,
        **nowcasting: Any,
    ) -> None:
        unknown = sorted(nowcasting.keys() - _OPTIONS)
        if unknown:
            raise TypeError(f"NiNoCallback has no argument {unknown[0]!r}; it takes {', '.join(sorted(_OPTIONS))}")
        self.nowcaster = resolve_nowcaster(nowcaster)
        self.spec = type(nowcaster).__name__ if isinstance(nowcaster, Nowcaster) else str(nowcaster)
        self.resume_from = resume_from
        self.options = nowcasting
        self.nowcasting: Nowcasting | None = None
        self.record: RunRecord | None = None
        # A Trainer of ours logs and writes checkpoints itself: it can do so at the right moment.
        self.trainer_logs = False
        self.trainer_saves = False
        # And it sees the loss of each step; a callback sees the means that are logged.
        self.trainer_records = False
        self._logged = 0
        self.pending: list[dict[str, float]] = []

    # -- events -----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        # Anew at every call: `train()` may be called again, and batch-size retries may come with a new model.
        self.pending.clear()
        if self.nowcasting is not None:
            self.nowcasting.close()
        self.nowcasting = Nowcasting(
            self.nowcaster, model, max_steps=state.max_steps, lr_scheduler=lr_scheduler, **self.options
        )
        self.nowcasting.spec = self.spec
        if state.global_step > 0:
            self.nowcasting.load(self._checkpoint(args, state))
        self._logged = self.nowcasting.step_count
        source = getattr(self.nowcaster, "source", None)
        if source is not None:
            self._write(args, state, f"NiNo: nowcaster {source}.")
        self._tell(args, state, self.nowcasting.begin(state.global_step, optimizer))
        self.record = RunRecord(args.output_dir, writes=state.is_world_process_zero)
        self.record.begin(self.nowcasting)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            self.nowcasting.skip()
            return
        self.record.before(self.nowcasting)
        event = self.nowcasting.step(optimizer=optimizer, scheduler_stepped=True)
        self.record.after(self.nowcasting, event)
        self._tell(args, state, event)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.trainer_records or self.nowcasting is None or not logs or "loss" not in logs:
            return
        first, self._logged = self._logged + 1, self.nowcasting.step_count
        self.nowcasting.record_mean_loss(float(logs["loss"]), first, self._logged)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer_saves or args.save_only_model:
            return
        folder = self.nowcasting.store.first(str(self._folder(args, state) or ""))
        if not folder:
            logger.warning(
                f"No folder {PREFIX_CHECKPOINT_DIR}-{state.global_step} in {args.output_dir}: the nowcasting state is "
                "not saved, and a run resumed from this checkpoint warms up."
            )
        else:
            self.nowcasting.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.resume_from = None
        self.record.end(self.nowcasting)
        self.nowcasting.close()
        counts = f"{self.nowcasting.nowcasts} nowcasts, {self.nowcasting.rejected} rejected"
        if self.nowcasting.taken_back:
            counts += f", {self.nowcasting.taken_back} taken back"
        self._write(args, state, f"NiNo: {counts}, {self.nowcasting.seconds:.1f} s spent on them.")

    # -- telling ----------------------------------------------------------------------------------------------------

    def _tell(self, args: TrainingArguments, state: TrainerState, event: NowcastEvent | None) -> None:
        if event is None:
            return
        scalars = event.scalars() | self.nowcasting.scalars()
        if self.trainer_logs:
            self.pending.append(scalars)
        else:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**scalars, **epoch, "step": state.global_step})
        self._write(args, state, f"NiNo: {event}")

    @staticmethod
    def _write(args: TrainingArguments, state: TrainerState, line: str) -> None:
        if not state.is_local_process_zero:
            return
        if args.disable_tqdm:
            logger.info(line)
        else:
            tqdm.write(line)  # a plain line would cut through the progress bar

    # -- finding checkpoints ----------------------------------------------------------------------------------------

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Where the nowcasting state of the checkpoint being resumed should be."""
        if self.resume_from is not None:
            return Path(self.resume_from)
        asked = args.resume_from_checkpoint
        if isinstance(asked, str) and os.path.isdir(asked):
            return Path(asked)
        return self._folder(args, state) or Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path | None:
        """The folder of the checkpoint of this step: in the output folder, or in a trial's folder inside it."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder = Path(args.output_dir, name)
        if folder.is_dir():
            return folder
        trials = [path for path in Path(args.output_dir).glob(f"run-*/{name}") if path.is_dir()]
        return max(trials, key=lambda path: path.stat().st_mtime, default=None)
