"""Facts of ``hf-nino demo``: the run with nowcasts, against the plain one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..demo.train import RESULT
from .facts import RunFacts, nowcasts_from_events
from .gains import with_gains
from .numbers import tidy

RUN, SETTINGS, METRICS = RESULT, "settings.json", "metrics.json"
_NOT_KEPT = "the demo does not keep it"
_SHOWN = ("arch", "nowcaster", "period", "learning_rate", "lr_scheduler", "seed", "layers", "width")


def from_demo(folder: Path) -> RunFacts:
    """The facts of a demo.

    Args:
        folder: of the demo, or of one of its two runs.

    Raises:
        ValueError: it is malformed, or its run with nowcasts is not finished.
    """
    run = folder if (folder / RUN).is_file() else folder / "nowcast"
    plain = run.parent / "plain" / RUN
    try:
        result = _json(run / RUN)
        settings = _json(run.parent / SETTINGS) if (run.parent / SETTINGS).is_file() else {}
        beside = _json(plain) if plain.is_file() and run.name != "plain" else {"evaluations": []}
        steps = max(entry["step"] for entry in result["evaluations"])
        train_loss = tidy((entry["step"], entry["loss"]) for entry in result["train_losses"])
        nowcasts = nowcasts_from_events(result["events"])
        return RunFacts(
            title=f"{run.parent.resolve().name}, {run.name}",
            kind="a run of hf-nino demo",
            settings=tuple((key.replace("_", " "), str(settings[key])) for key in _SHOWN if settings.get(key)),
            steps=steps,
            max_steps=settings.get("steps", steps),
            train_loss=train_loss,
            eval_loss=_evaluations(result),
            plain_loss=_evaluations(beside),
            nowcasts=with_gains(nowcasts, train_loss, settings.get("steps", steps)),
            nowcast_seconds=result["nowcast_seconds"],
            train_seconds=result["train_seconds"],
            timed="snapshots not counted; wall time of training, evaluations left out",
            absent=dict.fromkeys(("learning rate", "memory", "space"), _NOT_KEPT),
        )
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no finished run of a demo: {error.filename} is missing") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{run / RUN} is no result of a demo ({type(error).__name__}: {error})") from error


def _evaluations(result: Mapping[str, Any]):
    return tidy((entry["step"], entry["loss"]) for entry in result["evaluations"])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
