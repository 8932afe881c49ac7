"""NiNo as a Trainer: arguments, a mixin for any Trainer class, and the ready-made one."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..nowcaster.base import Nowcaster
from .callback import NiNoCallback
from .horizon import Horizon
from .nowcasting import ON_INVALID, Nowcasting
from .storage import as_dtype, check_place

NO_NOWCASTER = "none"


@dataclass
class NiNoArguments:
    """What can be said about nowcasts on a command line; a plain mixin for any subclass of ``TrainingArguments``.

    ::

        @dataclass
        class MyConfig(NiNoArguments, SFTConfig): ...

    Raises:
        ValueError: a field with an impossible value.
    """

    nowcaster: str = field(
        default="linear",
        metadata={"help": "Name of a bundled nowcaster, path, or repo id on the Hub; 'none' trains without nowcasts."},
    )
    nowcast_period: int | None = field(
        default=None, metadata={"help": "Optimizer steps between nowcasts. Default: the nowcaster's own."}
    )
    nowcast_interval: int | None = field(
        default=None, metadata={"help": "Optimizer steps between snapshots. Default: period // context."}
    )
    nowcast_horizon: str = field(
        default="lr-budget",
        metadata={
            "help": "How far to look ahead: 'lr-budget', 'paper' (decays with progress) or a number of intervals"
        },
    )
    nowcast_start_step: int = field(default=0, metadata={"help": "No snapshot up to this step."})
    nowcast_stop_step: int | None = field(default=None, metadata={"help": "No nowcast after this step."})
    nowcast_history_device: str = field(
        default="cpu",
        metadata={
            "help": "Where snapshots live: 'cpu', 'model' (with the parameters), 'disk:PATH' (a folder) or a device."
        },
    )
    nowcast_history_dtype: str = field(
        default="float32", metadata={"help": "Dtype of snapshots: 'float32', 'float64', 'bfloat16' or 'float16'."}
    )
    nowcast_on_invalid: str = field(
        default="skip", metadata={"help": "What to do with a nowcast that fails or is refused: 'skip' it or 'raise'."}
    )
    nowcast_measure_loss: bool = field(
        default=False,
        metadata={"help": "Measure the loss on a fixed evaluation batch before and after each nowcast, and log both."},
    )

    def __post_init__(self) -> None:
        Horizon(self.nowcast_horizon)
        check_place(self.nowcast_history_device)
        as_dtype(self.nowcast_history_dtype)
        if self.nowcast_on_invalid not in ON_INVALID:
            raise ValueError(f"`nowcast_on_invalid` must be one of {ON_INVALID}, got {self.nowcast_on_invalid!r}")
        for name in ("nowcast_period", "nowcast_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 step, got {value}")
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()


@dataclass
class NiNoTrainingArguments(NiNoArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with the fields of :class:`NiNoArguments`."""

    def __post_init__(self) -> None:
        super().__post_init__()


class NiNoTrainerMixin:
    """Adds nowcasts to a ``Trainer`` class: ``class NiNoSFTTrainer(NiNoTrainerMixin, SFTTrainer): ...``.

    A :class:`~hf_nino.training.callback.NiNoCallback` does the work.  The mixin adds what a callback cannot do: the
    nowcasting state is written with the optimizer's, before a checkpoint is uploaded or rotated, and read when
    training resumes; the ``nino_*`` numbers of the last nowcast go into the next log, and so to ``log_history`` and
    every tracker of ``report_to``; and the loss around nowcasts can be measured.

    Args:
        *args, **kwargs: of the ``Trainer``; its ``args`` may be plain ``TrainingArguments``, then the defaults of
            :class:`NiNoArguments` hold.
        nowcaster: overrides ``args.nowcaster``: a :class:`~hf_nino.nowcaster.base.Nowcaster`, or the name, path or
            repo id of one.
    """

    def __init__(self, *args: Any, nowcaster: str | os.PathLike | Nowcaster | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        defaults = NiNoArguments()
        settings = {name: getattr(self.args, name, value) for name, value in vars(defaults).items()}
        nowcaster = settings["nowcaster"] if nowcaster is None else nowcaster
        self._nowcast_batch: Any = None
        self.nino_callback: NiNoCallback | None = None
        if isinstance(nowcaster, str) and nowcaster == NO_NOWCASTER:
            return
        measures = settings["nowcast_measure_loss"]
        if measures and self.eval_dataset is None:
            raise ValueError("`nowcast_measure_loss` needs an `eval_dataset` to take a batch from, got None")
        self.nino_callback = NiNoCallback(
            nowcaster,
            period=settings["nowcast_period"],
            interval=settings["nowcast_interval"],
            horizon=settings["nowcast_horizon"],
            start_step=settings["nowcast_start_step"],
            stop_step=settings["nowcast_stop_step"],
            history_device=settings["nowcast_history_device"],
            history_dtype=settings["nowcast_history_dtype"],
            on_invalid=settings["nowcast_on_invalid"],
            measure=self._nowcast_loss if measures else None,
            example_inputs=self._nowcast_inputs,
        )
        self.nino_callback.trainer_logs = self.nino_callback.trainer_saves = True
        # Right after the callback that only sets flags, before any that reads or saves parameters.
        self.callback_handler.callbacks.insert(1, self.nino_callback)

    @property
    def nowcasting(self) -> Nowcasting | None:
        """The :class:`Nowcasting` of the current or last ``train()``; ``None`` before, or without a nowcaster."""
        return None if self.nino_callback is None else self.nino_callback.nowcasting

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.nowcasting is not None and self.args.should_save:
            self.nowcasting.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.nino_callback is not None:
            self.nino_callback.resume_from = checkpoint

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log ``logs``, and with logs of training what the last nowcast has to say."""
        callback = self.nino_callback
        if callback is not None and callback.pending and not any(key.startswith(("eval_", "test_")) for key in logs):
            *earlier, last = callback.pending
            # Trackers get one set of numbers for a step; the history keeps all of them.
            self.state.log_history.extend({**scalars, "step": int(scalars["nino_step"])} for scalars in earlier)
            logs.update(last)
            callback.pending = []
        super().log(logs, *args, **kwargs)

    def _nowcast_inputs(self) -> Any:
        """One training example as a batch, for models that do not say what they take; ``None`` for others."""
        if hasattr(self.model, "main_input_name") or self.train_dataset is None:
            return None
        dataset = self.train_dataset
        example = dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return self._prepare_inputs(collate([example]))

    def _nowcast_loss(self) -> float:
        """The loss on the first evaluation batch; training flags and collected metrics stay as they are."""
        if self._nowcast_batch is None:
            dataset = self.eval_dataset
            if isinstance(dataset, dict):
                dataset = next(iter(dataset.values()))
            self._nowcast_batch = next(iter(self.get_eval_dataloader(dataset)))
        model: nn.Module = self.model_wrapped
        training = [module for module in model.modules() if module.training]
        metrics = copy.deepcopy(getattr(self, "_metrics", None))  # TRL collects there what compute_loss sees
        model.eval()
        try:
            loss, _, _ = self.prediction_step(model, dict(self._nowcast_batch), prediction_loss_only=True)
        finally:
            for module in training:
                module.training = True
            if metrics is not None:
                self._metrics = metrics
        if loss is None:
            raise ValueError("the model returns no loss on the evaluation batch; does it have labels?")
        loss = loss.mean().detach()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.args.world_size
        return float(loss)


class NiNoTrainer(NiNoTrainerMixin, Trainer):
    """A ``transformers.Trainer`` that nowcasts; see :class:`NiNoTrainerMixin`.

    ::

        args = NiNoTrainingArguments("out", nowcaster="linear", nowcast_period=100)
        trainer = NiNoTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
    """
