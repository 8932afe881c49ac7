"""NiNo as a Trainer: arguments, a mixin for any Trainer class, and the ready-made one."""

from __future__ import annotations

import copy
import itertools
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainingArguments

from ..defaults import NOWCASTER
from ..nowcaster.auto import resolve_nowcaster
from ..nowcaster.base import Nowcaster
from ..nowcaster.precision import check_precision
from .callback import NiNoCallback
from .card import update_card
from .horizon import Horizon
from .nowcasting import ON_INVALID, Nowcasting
from .overhead import check_overhead
from .storage import as_dtype, check_place

NO_NOWCASTER = "none"
# Training batches that are held on to, in models with batch normalization, to compute its statistics anew from.
RECENT = 8


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
        default=NOWCASTER,
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
            "help": (
                "How far to look ahead: 'lr-budget', 'paper' (decays with progress), 'adaptive' (follows what earlier "
                "nowcasts brought) or a number of intervals."
            )
        },
    )
    nowcast_start_step: int = field(default=0, metadata={"help": "No snapshot up to this step."})
    nowcast_stop_step: int | None = field(default=None, metadata={"help": "No nowcast after this step."})
    nowcast_stop_fraction: float | None = field(
        default=None, metadata={"help": "No nowcast after this share of the run, above 0 and at most 1."}
    )
    nowcast_patience: int | None = field(
        default=None,
        metadata={
            "help": (
                "Steps after which a nowcast is taken back if training is worse off than without it; 0: never. "
                "Default: a hundredth of the run, 30 to 200."
            )
        },
    )
    nowcast_max_failures: int = field(
        default=3, metadata={"help": "Nowcasts taken back in a row after which there are no more."}
    )
    nowcast_undo_device: str | None = field(
        default=None,
        metadata={
            "help": (
                "Where parameters and optimizer state are kept meanwhile: 'cpu', 'model', 'disk:PATH' or a device. "
                "Default: where snapshots live."
            )
        },
    )
    nowcast_probe_batches: int = field(
        default=0,
        metadata={"help": "Evaluation batches on which each nowcast is tried: put back at once if their loss is nan."},
    )
    nowcast_observe_only: bool = field(
        default=False, metadata={"help": "Predict and measure, but write nothing into the model."}
    )
    nowcast_max_overhead: float | None = field(
        default=0.01,
        metadata={
            "help": (
                "Share of training time that nowcasts may take in models of at least 10 million parameters: where "
                "they are dearer, they are fewer. A large number, such as 100: no limit."
            )
        },
    )
    nowcast_history_device: str = field(
        default="cpu",
        metadata={
            "help": "Where snapshots live: 'cpu', 'model' (with the parameters), 'disk:PATH' (a folder) or a device."
        },
    )
    nowcast_history_dtype: str = field(
        default="float32", metadata={"help": "Dtype of snapshots: 'float32', 'float64', 'bfloat16' or 'float16'."}
    )
    nowcast_precision: str | None = field(
        default=None,
        metadata={
            "help": "How a network nowcaster computes: 'float32' (its default, exact) or 'fast' (products of edges "
            "rounded)."
        },
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
        if self.nowcast_undo_device is not None:
            check_place(self.nowcast_undo_device)
        as_dtype(self.nowcast_history_dtype)
        check_overhead(self.nowcast_max_overhead, "nowcast_max_overhead")
        if self.nowcast_precision is not None:
            check_precision(self.nowcast_precision)
        if self.nowcast_on_invalid not in ON_INVALID:
            raise ValueError(f"`nowcast_on_invalid` must be one of {ON_INVALID}, got {self.nowcast_on_invalid!r}")
        for name in ("nowcast_period", "nowcast_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 step, got {value}")
        for name, least in (("nowcast_patience", 0), ("nowcast_max_failures", 1), ("nowcast_probe_batches", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        fraction = self.nowcast_stop_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"`nowcast_stop_fraction` must be above 0 and at most 1, got {fraction}")
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
    every tracker of ``report_to``; the loss of every step is seen, so that nowcasts are on probation; statistics of
    batch normalization are computed anew from the last training batches; and the loss around nowcasts can be measured.

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
        self._nowcast_batches: list[Any] = []
        self._collects_statistics: bool | None = None
        self._recent_inputs: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.nino_callback: NiNoCallback | None = None
        if isinstance(nowcaster, str) and nowcaster == NO_NOWCASTER:
            return
        probes = settings["nowcast_probe_batches"]
        measures = settings["nowcast_measure_loss"]
        self._nowcast_measured = max(probes, 1)
        if (measures or probes) and self.eval_dataset is None:
            which = "nowcast_measure_loss" if measures else "nowcast_probe_batches"
            raise ValueError(f"`{which}` needs an `eval_dataset` to take a batch from, got None")
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
            stop_fraction=settings["nowcast_stop_fraction"],
            patience=settings["nowcast_patience"],
            max_failures=settings["nowcast_max_failures"],
            undo_device=settings["nowcast_undo_device"],
            observe_only=settings["nowcast_observe_only"],
            max_overhead=settings["nowcast_max_overhead"],
            measure=self._nowcast_loss if measures or probes else None,
            statistics_batches=lambda: list(self._recent_inputs),
            example_inputs=self._nowcast_inputs,
        )
        resolve_nowcaster(self.nino_callback.nowcaster, settings["nowcast_precision"])
        self.nino_callback.trainer_logs = self.nino_callback.trainer_saves = True
        self.nino_callback.trainer_records = True
        # Right after the callback that only sets flags, before any that reads or saves parameters.
        self.callback_handler.callbacks.insert(1, self.nino_callback)

    @property
    def nowcasting(self) -> Nowcasting | None:
        """The :class:`Nowcasting` of the current or last ``train()``; ``None`` before, or without a nowcaster."""
        return None if self.nino_callback is None else self.nino_callback.nowcasting

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.nowcasting is not None:
            self.nowcasting.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.nino_callback is not None:
            self.nino_callback.resume_from = checkpoint

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step of the Trainer's; its loss is kept on the device for the nowcasts on probation."""
        batch = dict(inputs) if self.nowcasting is not None and self._has_statistics() else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.nowcasting is not None:
            self.nowcasting.record_loss(loss)
        if batch is not None:
            self._recent_inputs.append(self._prepare_inputs(batch))
        return loss

    def _has_statistics(self) -> bool:
        if self._collects_statistics is None:
            self._collects_statistics = any(isinstance(m, _BatchNorm) for m in self.model.modules())
        return self._collects_statistics

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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card that the Trainer writes, with a section about nowcasts, and without a base model that is none."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            update_card(Path(self.args.output_dir, "README.md"), self.nowcasting, self.state.log_history)

    def _nowcast_inputs(self) -> Any:
        """One training example as a batch, for models that do not say what they take; ``None`` for others."""
        if hasattr(self.model, "main_input_name") or self.train_dataset is None:
            return None
        dataset = self.train_dataset
        example = dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return self._prepare_inputs(collate([example]))

    def _nowcast_loss(self) -> float:
        """The loss on this rank's first evaluation batches; training flags and collected metrics stay as they are."""
        if not self._nowcast_batches:
            dataset = self.eval_dataset
            if isinstance(dataset, dict):
                dataset = next(iter(dataset.values()))
            batches = iter(self.get_eval_dataloader(dataset))
            self._nowcast_batches = list(itertools.islice(batches, self._nowcast_measured))
        model: nn.Module = self.model_wrapped
        training = [module for module in model.modules() if module.training]
        metrics = copy.deepcopy(getattr(self, "_metrics", None))  # TRL collects there what compute_loss sees
        model.eval()
        try:
            losses = [
                self.prediction_step(model, dict(batch), prediction_loss_only=True)[0]
                for batch in self._nowcast_batches
            ]
        finally:
            for module in training:
                module.training = True
            if metrics is not None:
                self._metrics = metrics
        if any(loss is None for loss in losses):
            raise ValueError("the model returns no loss on the evaluation batch; does it have labels?")
        return float(torch.stack([loss.mean().detach() for loss in losses]).mean())


class NiNoTrainer(NiNoTrainerMixin, Trainer):
    """A ``transformers.Trainer`` that nowcasts; see :class:`NiNoTrainerMixin`.

    ::

        args = NiNoTrainingArguments("out", nowcaster="linear", nowcast_period=100)
        trainer = NiNoTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
    """
