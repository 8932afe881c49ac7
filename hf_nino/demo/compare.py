"""The demo from text to report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import __version__, load_nowcaster
from .data import blocks, tokenizer_for
from .measures import race
from .plot import plot_losses
from .report import write_report
from .settings import DemoSettings
from .text import king_james_bible, split
from .train import RESULT, curve, train

logger = logging.get_logger(__name__)


class DemoError(ValueError):
    """The demo cannot go on, for a reason that the message gives and the reader can mend."""


def run_demo(settings: DemoSettings, out: str | Path, say: Callable[[str], Any] = logger.info) -> dict[str, Any]:
    """Train with and without nowcasts, and leave metrics.json, loss_curve.png and report.md in ``out``.

    Called again with the same settings it uses the runs that are finished and resumes the one that is not.

    Args:
        out: folder for everything that the demo writes.
        say: is told, in a line or two at a time, what comes next and what came out.

    Returns:
        What metrics.json holds.

    Raises:
        DemoError: ``out`` holds a demo with other settings, or the nowcaster does not take those that it is given.
        MissingPackage: the text's package is not installed.
        FileNotFoundError, ValueError: no such nowcaster, or a malformed one.
    """
    out = Path(out)
    try:
        load_nowcaster(settings.nowcaster)  # now, and not when the plain run is over
    except TypeError as error:
        raise DemoError(str(error)) from error
    _claim(out, settings)
    text, held_back = split(king_james_bible())
    text = text[: int(len(text) * settings.text_share)]
    tokenizer = tokenizer_for(text, settings.vocabulary, out / "tokenizer")
    training = blocks(text, tokenizer, settings.block_length)
    validation = blocks(held_back, tokenizer, settings.block_length, settings.evaluation_blocks)
    model = settings.build_model()
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{settings.arch} with {parameters:,} parameters on the King James Bible: {len(training):,} blocks of "
        f"{settings.block_length} tokens to learn from, {len(validation):,} to measure by."
    )
    say(_cost(settings, model, out))
    runs = {}
    for name, nowcasts in (("plain", False), ("nowcast", True)):
        title = f"with nowcasts of {settings.nowcaster!r}" if nowcasts else "plain"
        state = " (finished already)" if (out / name / RESULT).exists() else ""
        say(f"Run {len(runs) + 1} of 2: {title}, {settings.steps:,} steps{state}")
        runs[name] = train(settings, nowcasts, tokenizer, training, validation, out / name)
    metrics = {
        "settings": {**settings.to_dict(), "evaluate_every": settings.evaluate_every},
        "parameters": parameters,
        "machine": machine(),
        "runs": runs,
    }
    _write(metrics, settings, out)
    return metrics


def machine() -> dict[str, Any]:
    """What the seconds depend on."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {"hf_nino": __version__} | {name: version(name) for name in packages},
    }


def _claim(out: Path, settings: DemoSettings) -> None:
    """Make ``out`` this demo's folder, or find that it is."""
    path = out / "settings.json"
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        mine = settings.to_dict()
        differing = [f"{key} = {found.get(key)!r}, not {mine[key]!r}" for key in mine if found.get(key) != mine[key]]
        if differing:
            raise DemoError(
                f"`out` = {out} holds a demo with other settings ({'; '.join(differing)}); name another folder with "
                "--out, or remove this one"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings.to_dict(), indent=1), "utf-8")


def _cost(settings: DemoSettings, model: PreTrainedModel, out: Path) -> str:
    """What the runs that are left will take, from the fastest of a few steps: the first ones are slow."""
    left = sum(not (out / name / RESULT).exists() for name in ("plain", "nowcast"))
    if not left:
        return "Both runs are finished; only the report is written again."
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(settings.vocabulary, (settings.batch_size, settings.block_length))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    evaluations = settings.evaluations * settings.evaluation_blocks / settings.batch_size / 3
    minutes = max(left * min(seconds) * (settings.steps + evaluations) / 60, 0.1)
    return (
        f"{left} run{'s' if left > 1 else ''} of {settings.steps:,} steps, about {minutes:.1f} minutes in all on this "
        f"machine, plus the nowcasts. Everything goes to {out}; the same command resumes an interrupted demo."
    )


def _write(metrics: dict[str, Any], settings: DemoSettings, out: Path) -> None:
    """metrics.json, loss_curve.png and report.md."""
    plain, nowcast = curve(metrics["runs"]["plain"]), curve(metrics["runs"]["nowcast"])
    result = race(plain, nowcast, plain.losses[-1])
    metrics["race"] = asdict(result)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1), "utf-8")
    accepted = [event["step"] for event in metrics["runs"]["nowcast"]["events"] if event["accepted"]]
    title = (
        f"{settings.arch}, {metrics['parameters'] / 1e6:.2f}M parameters, King James Bible; learning rate "
        f"{settings.learning_rate:g} ({settings.lr_scheduler}), nowcaster {Path(settings.nowcaster).name}"
    )
    plot_losses(plain, nowcast, accepted, result, title, out / "loss_curve.png")
    (out / "report.md").write_text(write_report(metrics, plain, nowcast), "utf-8")
