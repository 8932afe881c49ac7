"""Facts of one run of ``hf-nino bench``, beside the plain optimizer's where that was run too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bench.training.methods.base import Conditions
from ..bench.training.methods.optimizers import make_scheduler
from ..bench.training.plan import BASELINE
from ..bench.training.spec import RunSpec
from .facts import RunFacts, Series, nowcasts_from_events
from .gains import with_gains
from .numbers import tidy

_NOT_KEPT = "records of the benchmark do not keep it"


def from_benchmark(path: Path, record: Mapping[str, Any]) -> RunFacts:
    """The facts in a run's JSON.

    Raises:
        ValueError: it is malformed, or the run ended with an error.
    """
    try:
        spec = RunSpec.from_dict(record["spec"])
        if "error" in record:
            raise ValueError(f"{path} holds no numbers: the run ended with an error")
        train_loss = tidy((entry["step"], entry["loss"]) for entry in record["train_losses"])
        nowcasts = nowcasts_from_events(record["events"])
        ended = max((entry["step"] for entry in record["evaluations"]), default=0)
        settings = (
            ("task", spec.task),
            ("method", spec.method),
            *((key, str(value)) for key, value in spec.settings),
            ("schedule", spec.schedule),
            ("learning rate", f"{spec.learning_rate:g}"),
            ("seed", str(spec.seed)),
            ("parameters", f"{record['parameters']:,}"),
            ("device", str(record["machine"]["device"])),
        )
        return RunFacts(
            title=f"{spec.method} on {spec.task}",
            kind="a run of hf-nino bench" + (", which diverged" if record["diverged"] else ""),
            settings=settings,
            steps=ended,
            max_steps=spec.steps,
            train_loss=train_loss,
            eval_loss=_evaluations(record),
            plain_loss=_plain(path, spec),
            learning_rate=_learning_rates(spec, record["task"]),
            nowcasts=with_gains(nowcasts, train_loss, spec.steps),
            nowcast_seconds=record["nowcast_seconds"],
            train_seconds=record["train_seconds"],
            timed="snapshots counted; wall time of training, evaluations left out",
            absent={"memory": _NOT_KEPT, "space": _NOT_KEPT},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole record of a run ({type(error).__name__}: {error})") from error


def _evaluations(record: Mapping[str, Any]) -> Series:
    return tidy((entry["step"], entry["loss"]) for entry in record["evaluations"])


def _plain(path: Path, spec: RunSpec) -> Series:
    """The plain optimizer's curve at the same settings, which lies in the same folder; empty if it does not."""
    if spec.method == BASELINE:
        return ()
    plain = path.parent / replace(spec, method=BASELINE, settings=()).path(Path()).name
    try:
        return _evaluations(json.loads(plain.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _learning_rates(spec: RunSpec, task: Mapping[str, Any]) -> Series:
    """What the schedule made of the peak learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=spec.learning_rate)
    conditions = Conditions(spec.steps, spec.learning_rate, spec.schedule, task["warmup_steps"], task["weight_decay"])
    scheduler = make_scheduler(optimizer, conditions)
    rates = []
    for step in range(1, spec.steps + 1):
        rates.append((step, optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return tidy(rates)
