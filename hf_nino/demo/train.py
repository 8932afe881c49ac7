"""One run of the demo: train, measure, and carry on where an interrupted run left off."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from .. import NiNoTrainer, NiNoTrainingArguments
from .measures import Curve
from .settings import DemoSettings

RESULT = "run.json"
SECONDS = "train_seconds"
EVENT = "nowcast_event"


class Recorder(TrainerCallback):
    """Notes in the Trainer's log what the demo wants to know beyond it: training time, and every nowcast.

    The time is noted at each evaluation; nowcasts are included in it, evaluation is not.  The log is part of the
    Trainer's checkpoints: a resumed run counts on from the checkpoint it started from.
    """

    trainer: Trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.before = max((entry[SECONDS] for entry in state.log_history if SECONDS in entry), default=0.0)
        self.evaluating = 0.0
        self.events = 0
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        nowcasting = getattr(self.trainer, "nowcasting", None)
        for event in [] if nowcasting is None else nowcasting.events[self.events :]:
            self.events += 1
            state.log_history.append({"step": state.global_step, EVENT: asdict(event)})

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        self.evaluating += metrics["eval_runtime"]
        seconds = self.before + time.perf_counter() - self.started - self.evaluating
        state.log_history.append({"step": state.global_step, SECONDS: seconds})


def train(
    settings: DemoSettings,
    nowcasts: bool,
    tokenizer: PreTrainedTokenizerFast,
    training: Dataset,
    validation: Dataset,
    folder: Path,
) -> dict[str, Any]:
    """One run with or without nowcasts, or its result if it is finished already.

    The plain run is a plain ``transformers.Trainer``.  Checkpoints are written on the way and removed at the end, when
    ``folder`` holds the trained model and run.json.

    Returns:
        ``evaluations`` (list of ``step``, ``loss``, ``seconds``), ``train_losses`` (list of ``step``, ``loss``),
        ``events`` (list of the fields of :class:`~hf_nino.NowcastEvent`), ``train_seconds``, ``nowcast_seconds``.
    """
    if (folder / RESULT).exists():
        return json.loads((folder / RESULT).read_text("utf-8"))
    set_seed(settings.seed)
    model = settings.build_model()
    recorder = Recorder()
    common = {
        "model": model,
        "train_dataset": training,
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "data_collator": default_data_collator,
        "callbacks": [recorder],
    }
    arguments = training_arguments(settings, folder)
    if nowcasts:
        own = {"nowcaster": settings.nowcaster}
        if settings.period is not None:
            own["nowcast_period"] = settings.period
        trainer: Trainer = NiNoTrainer(args=NiNoTrainingArguments(**arguments, **own), **common)
    else:
        trainer = Trainer(args=TrainingArguments(**arguments), **common)
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    result = summarize(trainer.state.log_history)
    trainer.save_model(str(folder))
    temporary = folder / (RESULT + ".part")
    temporary.write_text(json.dumps(result, indent=1), "utf-8")
    temporary.rename(folder / RESULT)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


def training_arguments(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """What both runs share, as keyword arguments of ``TrainingArguments``."""
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "eval_strategy": "steps",
        "eval_steps": settings.evaluate_every,
        "eval_on_start": True,
        "logging_steps": settings.evaluate_every,
        "save_strategy": "steps",
        "save_steps": settings.evaluate_every * 5,
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to the end; ``None`` if there is none."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if complete else None


def summarize(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's result (see :func:`train`) from the Trainer's log."""
    seconds = {entry["step"]: entry[SECONDS] for entry in log_history if SECONDS in entry}
    evaluations = {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry}
    events = [entry[EVENT] for entry in log_history if EVENT in entry]
    return {
        "evaluations": [
            {"step": step, "loss": loss, "seconds": seconds[step]} for step, loss in sorted(evaluations.items())
        ],
        "train_losses": [{"step": entry["step"], "loss": entry["loss"]} for entry in log_history if "loss" in entry],
        "events": events,
        "train_seconds": max(seconds.values()),
        "nowcast_seconds": sum(event["seconds"] for event in events),
    }


def curve(result: dict[str, Any]) -> Curve:
    """A run's evaluation curve."""
    rows = result["evaluations"]
    return Curve(
        steps=tuple(row["step"] for row in rows),
        losses=tuple(row["loss"] for row in rows),
        seconds=tuple(row["seconds"] for row in rows),
    )
