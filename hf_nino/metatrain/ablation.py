"""What each part of a recipe is worth: the same meta-training without it, measured on the same held-out runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from transformers.utils import logging

from ..bench.training.tables import markdown_table
from ..nowcaster.configuration import NowcasterConfig
from .held_out import ALL
from .meta_report import PARTS
from .meta_settings import MetaSettings
from .meta_training import SUMMARY, meta_train
from .remake import Making
from .shards import write_text

logger = logging.get_logger(__name__)

TABLE, NUMBERS = "ablation.md", "ablation.json"
WHOLE = "whole"
"""Name of the recipe without any change."""


@dataclass(frozen=True)
class Ablation:
    """One part of a recipe, taken out.

    Args:
        name: of its folder.
        words: what is then different, for a table.
        config, settings: what changes in :class:`~hf_nino.nowcaster.NowcasterConfig` and :class:`MetaSettings`.
    """

    name: str
    words: str
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, making: Making) -> Making:
        """The recipe without this part."""
        return Making(making.record, {**making.config, **self.config}, {**making.settings, **self.settings})


def ablations(making: Making) -> list[Ablation]:
    """The whole recipe, then all that can be taken out of it: switches that are on, and steps beyond the paper's."""
    config = NowcasterConfig(**making.config)
    settings = MetaSettings.from_dict(making.settings)
    interval = max(1, config.period // config.context)
    known = [
        Ablation("no-rates", "is not told learning rates", {"rate_input": False}),
        Ablation("no-horizon", "has an output for every horizon, is not told one", {"horizon_input": False}),
        Ablation("one-interval", f"one interval, of {interval} steps", {}, {"interval_range": [interval, interval]}),
        Ablation("no-averages", "targets are single snapshots", {}, {"target_neighbours": 0}),
        Ablation("rounding", "learns from parameters that only move by rounding, too", {}, {"mask_rounding": False}),
        Ablation("no-flips", "positional encodings keep their signs", {}, {"sign_flips": False}),
        Ablation("no-graph", "no graph: every parameter alone (WNN)", {"nowcaster_type": "wnn"}),
    ]
    graph_only = {"no-flips", "no-graph"}
    found = [Ablation(WHOLE, "the recipe")]
    for one in known:
        without = one.of(making)
        same = NowcasterConfig(**without.config) == config and MetaSettings.from_dict(without.settings) == settings
        if not same and not (config.nowcaster_type == "wnn" and one.name in graph_only):
            found.append(one)
    return found


def ablate(
    making: Making,
    trajectories: Path,
    out: Path,
    *,
    steps: int | None = None,
    seeds: Sequence[int] = (0,),
    only: Iterable[str] | None = None,
    device: str | None = None,
    say: Callable[[str], Any] = logger.info,
) -> dict[str, Any]:
    """Meta-train with and without each part of a recipe, and write what the held-out runs say of it.

    Goes on where it was interrupted.  Several calls may fill one folder at once, with seeds of their own; the table is
    made of whatever is finished.

    Args:
        making: the recipe.
        trajectories: folder of recorded runs.
        out: gets a nowcaster's folder for every ablation and seed, ``ablation.md`` and ``ablation.json``.
        steps: of each meta-training; default: the recipe's.
        seeds: of weights, samples and what is held out; the same for all.
        only: names of :func:`ablations`; default: all.
        say: is told what is done, and what it will cost.

    Returns:
        What is in ``ablation.json``: :func:`compare`.

    Raises:
        ValueError: an unknown name, no seed, or what :func:`meta_train` refuses.
        OSError, FloatingPointError: see :func:`meta_train`.
    """
    found = {one.name: one for one in ablations(making)}
    chosen = list(found) if only is None else list(only)
    unknown = [name for name in chosen if name not in found]
    if unknown or not chosen:
        raise ValueError(f"`only` must be some of {', '.join(found)}, got {', '.join(unknown) or 'none'}")
    if not seeds:
        raise ValueError("`seeds` must be at least one, got none")
    for number, (seed, name) in enumerate([(seed, name) for seed in seeds for name in chosen], 1):
        changed = found[name].of(making)
        settings = {**changed.settings, "seed": seed} | ({} if steps is None else {"steps": steps})
        say(f"{number} of {len(seeds) * len(chosen)}: {found[name].words}, seed {seed}.")
        meta_train(
            trajectories,
            out / name / f"seed-{seed}",
            config=NowcasterConfig(**changed.config),
            settings=MetaSettings.from_dict(settings),
            device=device,
            say=say,
        )
    results = compare(out, found.values())
    write_text(out / NUMBERS, json.dumps(results, indent=1) + "\n")
    write_text(out / TABLE, ablation_table(results))
    say(f"The comparison is in {out / TABLE}.")
    return results


def compare(out: Path, known: Iterable[Ablation]) -> dict[str, Any]:
    """Of every ablation that is finished, by name: ``words``, ``steps``, ``seeds`` and for each seed the error over
    the last state's (median over slices, mean over horizons) of ``nowcaster`` and ``linear``, on ``runs`` and
    ``tasks``; plain values."""
    results: dict[str, Any] = {}
    for one in known:
        summaries = sorted((out / one.name).glob(f"seed-*/{SUMMARY}"), key=lambda path: int(path.parent.name[5:]))
        for path in summaries:
            told = json.loads(path.read_text(encoding="utf-8"))
            row = results.setdefault(one.name, {"words": one.words, "steps": told["steps"], "seeds": []})
            errors = {
                part: {method: told["evaluation"][part]["relative"][ALL]["mean"][method] for method in _METHODS}
                for part in PARTS
                if told["evaluation"].get(part, {}).get("slices")
            }
            row["seeds"].append({"seed": told["settings"]["seed"], **errors})
    return results


_METHODS = ("nowcaster", "linear")


def ablation_table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each ablation, its errors, and how much they are above those of the whole recipe.

    Args:
        results: of :func:`compare`.
    """
    parts = [part for part in PARTS if any(part in each for row in results.values() for each in row["seeds"])]
    head = ["without", "seeds", *(f"{PARTS[part]}{words}" for part in parts for words in ("", ": worse by"))]
    rows = []
    for name, row in results.items():
        cells = [row["words"], str(len(row["seeds"]))]
        for part in parts:
            errors = _by_seed(row, part)
            cells.append(_spread([100 * error for error in errors.values()], ""))
            whole = _by_seed(results.get(WHOLE, {"seeds": []}), part)
            above = [100 * (error - whole[seed]) for seed, error in errors.items() if seed in whole]
            cells.append("" if name == WHOLE else _spread(above, "+"))
        rows.append(cells)
    lines = [
        "# What each part of the recipe is worth\n",
        "Mean absolute error of predicted parameters on held-out runs, in percent of what standing still costs "
        "(median over slices, mean over horizons), and how many points more that is than with the whole recipe: "
        "median over seeds, with their range. Each row is a meta-training of its own, of "
        f"{', '.join(sorted({str(row['steps']) for row in results.values()}))} steps.\n",
        markdown_table(head, rows),
    ]
    if WHOLE in results:
        lines_of = {
            PARTS[part]: [100 * error for error in _by_seed(results[WHOLE], part, "linear").values()] for part in parts
        }
        words = ", ".join(f"{part} {_spread(errors, '')}" for part, errors in lines_of.items())
        lines.append(f"A straight line, with the factor that is best for each horizon: {words}.\n")
    return "\n".join(lines)


def _by_seed(row: Mapping[str, Any], part: str, method: str = "nowcaster") -> dict[int, float]:
    return {each["seed"]: each[part][method] for each in row["seeds"] if part in each}


def _spread(values: Sequence[float], sign: str) -> str:
    if not values:
        return ""
    middle = f"{median(values):{sign}.1f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):{sign}.1f}..{max(values):{sign}.1f}]"
