"""Facts of a run of ``transformers.Trainer``: its log, the nowcasting state of its checkpoint, and our record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.checkpoint import STATE_NAME
from .facts import Gain, Memory, Nowcast, Place, RunFacts, nowcasts_from_events
from .gains import with_gains
from .numbers import tidy
from .record import RECORD_NAME, read_record

STATE = "trainer_state.json"
_NO_RECORD = f"training left no {RECORD_NAME} in the run's folder"


def newest_state(folder: Path) -> Path | None:
    """The ``trainer_state.json`` of a folder or of its checkpoints that got farthest; ``None`` if there is none.

    Raises:
        ValueError: one is malformed.
    """
    found = [path for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")) if path.is_file()]
    return max(found, key=lambda path: _state(path)["global_step"], default=None)


def from_trainer(path: Path) -> RunFacts:
    """The facts in a ``trainer_state.json`` and in the files around it.

    Raises:
        ValueError: it is malformed.
        OSError: it cannot be read.
    """
    state = _state(path)
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    logs = [entry for entry in state["log_history"] if isinstance(entry, dict)]
    record, why = _record(folder)
    nowcasting = _nowcasting(path.parent, folder)
    steps, max_steps = state["global_step"], state.get("max_steps") or None
    settings = {**nowcasting, **next((line for line in record if line["record"] == "run"), {})}
    train_loss = tidy((entry["step"], entry["loss"]) for entry in logs if "loss" in entry)
    record = [line for line in record if line.get("step", 0) <= steps]
    nowcasts = _recorded(record) if record else nowcasts_from_events(_logged(logs))
    if not record and isinstance(settings.get("interval"), int):
        nowcasts = tuple(replace(n, horizon_steps=n.horizon * settings["interval"]) for n in nowcasts)
    absent = {name: why for name in ("memory", "space") if why}
    return RunFacts(
        title=folder.resolve().name,
        kind="a run of transformers.Trainer",
        settings=_settings(settings),
        steps=steps,
        max_steps=max_steps,
        train_loss=train_loss,
        eval_loss=tidy((entry["step"], entry["eval_loss"]) for entry in logs if "eval_loss" in entry),
        learning_rate=tidy((e["step"], e["learning_rate"]) for e in logs if "learning_rate" in e),
        nowcasts=with_gains(nowcasts, train_loss, max_steps, settings.get("patience")),
        memory=_memory(settings, record),
        path=_path(record),
        stopped=bool(nowcasting.get("stopped")) or any(line.get("stopped") for line in record),
        absent=absent,
        **_times(logs, record, nowcasting),
    )


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state["global_step"], int) and isinstance(state["log_history"], list):
            return state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is malformed ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path} is malformed (global_step or log_history is of the wrong type)")


def _record(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The record of a run, and why there is none."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return [], _NO_RECORD
    try:
        return read_record(path), ""
    except (OSError, ValueError) as error:
        return [], str(error)


def _nowcasting(*folders: Path) -> dict[str, Any]:
    """The nowcasting state of the checkpoint: that of the log if it has one, else the newest of the run."""
    for folder in folders:
        found = [path for path in (folder / STATE_NAME, *folder.glob(f"checkpoint-*/{STATE_NAME}")) if path.is_file()]
        states = []
        for path in found:
            try:
                states.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                continue
        states = [state for state in states if isinstance(state, dict) and isinstance(state.get("step"), int)]
        if states:
            return max(states, key=lambda state: state["step"])
    return {}


def _logged(logs: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Events from the ``nino_*`` entries of a log."""
    seen = set()
    for entry in logs:
        if "nino_step" not in entry or (key := (entry["nino_step"], entry.get("nino_taken_back_to"))) in seen:
            continue
        seen.add(key)
        yield {
            "step": entry["nino_step"],
            "horizon": entry.get("nino_horizon", 0),
            "seconds": entry.get("nino_seconds", 0.0),
            "accepted": entry.get("nino_accepted", 0),
            "relative_step_norm": entry.get("nino_relative_step_norm"),
            "loss_before": entry.get("nino_loss_before"),
            "loss_after": entry.get("nino_loss_after"),
            "taken_back_to": entry.get("nino_taken_back_to"),
        }


def _recorded(record: Sequence[Mapping[str, Any]]) -> tuple[Nowcast, ...]:
    """Nowcasts of a record, with the judgements that training passed on them."""
    judged = {line["nowcast"]: line for line in record if line["record"] == "judged"}
    nowcasts = nowcasts_from_events(line for line in record if line["record"] == "nowcast")
    return tuple(
        replace(nowcast, gain=_gain(judged[nowcast.step])) if nowcast.step in judged else nowcast
        for nowcast in nowcasts
    )


def _gain(line: Mapping[str, Any]) -> Gain | None:
    numbers = [line.get(name) for name in ("observed", "expected", "error")]
    return None if any(number is None for number in numbers) else Gain(*map(float, numbers), recorded=True)


def _path(record: Iterable[Mapping[str, Any]]) -> tuple[Place, ...]:
    places = []
    for line in record:
        if isinstance(line.get("point"), list):
            how = "training"
            if line["record"] == "nowcast":
                how = "nowcast" if line.get("taken_back_to") is None else "taken back"
            places.append(Place(line["step"], tuple(map(float, line["point"])), how))
    return tuple(place for place in places if len(place.point) == len(places[0].point))


def _memory(settings: Mapping[str, Any], record: Sequence[Mapping[str, Any]]) -> tuple[Memory, ...]:
    if "history_bytes" not in settings:
        return ()
    estimate = next((line for line in reversed(record) if line["record"] == "estimate"), {})
    end = next((line for line in reversed(record) if line["record"] == "end"), {})
    context = settings.get("context", 1)
    where = str(settings.get("history_device", ""))
    found = [Memory("trainable parameters", "with the model", settings.get("parameter_bytes", 0))]
    snapshots = f"{context} snapshots" if context > 1 else "1 snapshot"
    found.append(Memory(snapshots, where, settings["history_bytes"]))
    if settings.get("patience"):
        undo = 3 * 4 * settings.get("parameters", 0)
        found.append(Memory("state kept during a probation (Adam)", str(settings.get("undo_device", where)), undo))
    if estimate.get("carried_bytes"):
        found.append(Memory("carried by the nowcaster", "with the model", estimate["carried_bytes"]))
    if end.get("peak_device_bytes"):
        found.append(Memory("peak of the whole run", "device", end["peak_device_bytes"]))
    return tuple(found)


def _settings(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    names = ("model", "parameters", "nowcaster", "period", "interval", "horizon", "patience", "history_device")
    shown = [(name.replace("_", " "), settings[name]) for name in names if settings.get(name) is not None]
    return tuple((name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in shown)


def _times(
    logs: Sequence[Mapping[str, Any]], record: Sequence[Mapping[str, Any]], nowcasting: Mapping[str, Any]
) -> dict[str, Any]:
    """Seconds of nowcasting and of the run."""
    spent = [entry["nino_total_seconds"] for entry in logs if "nino_total_seconds" in entry]
    spent += [line["seconds"] for line in record if line["record"] == "end"]
    spent += [nowcasting["seconds"]] if "seconds" in nowcasting else []
    found: dict[str, Any] = {"nowcast_seconds": max(spent, default=None)}
    if record:
        return found | {
            "train_seconds": max(line.get("elapsed", 0.0) for line in record),
            "timed": "snapshots counted; wall time, evaluations and checkpoints included",
        }
    runtime = [entry["train_runtime"] for entry in logs if "train_runtime" in entry]
    if runtime:
        timed = "snapshots counted; the Trainer's own clock, since it was last started"
        found |= {"train_seconds": runtime[-1], "timed": timed}
    return found
