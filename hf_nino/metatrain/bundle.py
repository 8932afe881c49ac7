"""A nowcaster becomes one of those that ship with the package: weights, recipe, evaluation and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bench.training.plan import BASELINE
from ..bench.training.summary import Summary
from ..nowcaster.configuration import NowcasterConfig
from ..nowcaster.hub import BUNDLED, CONFIG_NAME, WEIGHTS_NAME
from .bundled_card import bundled_card
from .meta_training import SUMMARY
from .remake import RECIPE, Making
from .shards import write_text

EVALUATION, CARD = "evaluation.json", "README.md"
METHOD = "nino:"
"""Before the name of a nowcaster with weights, in benchmarks."""


def bundle(
    nowcaster: Path, name: str, making: Making, *, record_hours: float, commit: str, bundled: Path = BUNDLED
) -> None:
    """Copy a meta-trained nowcaster into the package, and write down how it was made.

    Args:
        nowcaster: the folder that meta-training left.
        making: what it was made with.
        record_hours: that recording its trajectories took.
        commit: of hf_nino, which made it.

    Raises:
        ValueError: it was made with other settings or sizes than ``making`` says.
    """
    summary = json.loads((nowcaster / SUMMARY).read_text(encoding="utf-8"))
    for part, ours, theirs in (
        ("config", making.config, summary["nowcaster"]),
        ("settings", making.settings, summary["settings"]),
    ):
        for key, value in ours.items():
            if theirs[key] != value:
                raise ValueError(
                    f"`making` must say how {nowcaster} was made: `{part}.{key}` is {value}, but {theirs[key]} there"
                )
    folder = bundled / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / file).write_bytes((nowcaster / file).read_bytes())
    write_text(folder / RECIPE, making.to_json())
    kept = ("parameters", "data", "software", "hardware", "steps", "skipped_steps")
    found = {key: summary[key] for key in kept}
    found |= {"commit": commit, "hours": {"record": record_hours, "meta_train": summary["hours"]}}
    found["held_out"] = {part: summary["evaluations"][-1].get(part) for part in ("runs", "tasks")}
    write_text(folder / EVALUATION, json.dumps(found, indent=1) + "\n")


def write_card(name: str, benchmark: Summary | None, cards: Path, bundled: Path = BUNDLED) -> Path:
    """Write the card of a bundled nowcaster with the numbers of a benchmark, and these numbers beside it.

    Args:
        benchmark: with runs of ``nino:NAME``; ``None``: the card keeps the numbers that are beside it.
        cards: folder with a folder for every bundled nowcaster.

    Raises:
        ValueError: the benchmark has no such runs.
    """
    folder = cards / name
    folder.mkdir(parents=True, exist_ok=True)
    if benchmark is not None:
        part = restricted(benchmark, METHOD + name)
        write_text(folder / EVALUATION, json.dumps(part.to_json()) + "\n")
    write_text(folder / CARD, card_text(name, cards, bundled))
    return folder / CARD


def card_text(name: str, cards: Path, bundled: Path = BUNDLED) -> str:
    """The card that :func:`write_card` wrote, made anew from the numbers in the package and beside it."""
    benchmark = Summary.from_json(_read(cards / name / EVALUATION))
    config = NowcasterConfig.from_dict(_read(bundled / name / CONFIG_NAME))
    making = Making.read(bundled / name / RECIPE)
    return bundled_card(name, config, making, _read(bundled / name / EVALUATION), benchmark)


def restricted(benchmark: Summary, method: str) -> Summary:
    """What a benchmark says of one method on AdamW, and of its rivals in the same protocols and on the same tasks.

    Raises:
        ValueError: it says nothing of the method.
    """
    mine = {(one.protocol, one.task) for one in benchmark.find(method=method)}
    if not mine:
        raise ValueError(f"`benchmark` must have runs of {method}, got those of {sorted(benchmark.methods)}")
    others = [info for info in benchmark.methods if info.startswith(METHOD) and info != method]
    comparisons = tuple(
        one for one in benchmark.comparisons if (one.protocol, one.task) in mine and one.method not in others
    )
    shown = {one.method for one in comparisons} | {BASELINE}
    return replace(
        benchmark,
        tasks={name: info for name, info in benchmark.tasks.items() if name in {task for _, task in mine}},
        methods={name: info for name, info in benchmark.methods.items() if name in shown},
        comparisons=comparisons,
        missing=(),
        failed=(),
    )


def _read(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
