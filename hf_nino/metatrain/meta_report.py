"""What an evaluation on held-out trajectories says: a small table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..bench.training.tables import markdown_table
from ..graph import EdgeType
from ..graph.style import TYPE_COLOURS, new_figure
from .held_out import ALL
from .shards import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.get_logger(__name__)

TABLE, PICTURE = "evaluation.md", "evaluation.png"
HORIZONS = (1, 2, 5, 10, 20, 40)
"""Columns of the table, as far as there are any."""

HIGHEST = 1.6
"""Of the axes of the picture; errors beyond it leave the picture at the top."""

PARTS = {"runs": "further runs of the same tasks", "tasks": "other tasks"}
WORDS = {
    "persistence": "last state",
    "linear": "linear, best factor of each horizon",
    "linear_one_factor": "linear, one best factor",
    "nowcaster": "nowcaster",
}
_COLOURS = {"persistence": "#4d4d4d", "linear": "#d55e00", "linear_one_factor": "#e69f00", "nowcaster": "#0072b2"}


def write_evaluation(found: Mapping[str, Any], out: Path) -> str:
    """Write table and picture; where they are, and the gist in a sentence.  Without matplotlib, no picture.

    Args:
        found: the evaluation in ``meta_training.json``.
    """
    write_text(out / TABLE, evaluation_table(found))
    try:
        draw_evaluation(found, out / PICTURE)
    except ImportError:
        logger.warning("The picture of the evaluation needs matplotlib; run `pip install hf_nino[plot]`.")
    sentences = []
    for name, part in _measured(found).items():
        mean = part["error"][ALL]["mean"]
        sentences.append(
            f"{PARTS[name]}: {mean['nowcaster']:.4f}, last state {mean['persistence']:.4f}, linear "
            f"{mean['linear']:.4f}"
        )
    return f"Held-out errors, mean over horizons; {'; '.join(sentences)}. See {out / TABLE}"


def evaluation_table(found: Mapping[str, Any]) -> str:
    """Markdown: errors by horizon, then by type of edge."""
    lines = [
        "# Nowcasts on held-out trajectories\n",
        f"Snapshots {found['interval']} optimizer steps apart; a horizon is so many of these. Mean absolute error in "
        "scaled units (every parameter divided by the standard deviation of its elements), and below it the same in "
        "percent of what standing still costs, the median over slices. `linear` continues the mean move; its factors "
        "are the best on these very slices. Parameters that only move by rounding are left out if they were in "
        "meta-training.",
    ]
    for name, part in _measured(found).items():
        tasks = ", ".join(f"{task} ({count})" for task, count in part["tasks"].items())
        lines.append(f"\n## {PARTS[name].capitalize()}\n\n{part['slices']} slices: {tasks}.\n")
        for metric, scale, digits in (("error", 1, 4), ("relative", 100, 1)):
            table = part[metric]
            every = table[ALL]
            shown = [k for k in HORIZONS if k <= len(every["nowcaster"]) and every["nowcaster"][k - 1] is not None]
            head = ["error" if metric == "error" else "% of last state", *(f"horizon {k}" for k in shown), "mean"]
            rows = [
                [
                    words,
                    *(_cell(every[m][k - 1], scale, digits) for k in shown),
                    _cell(every["mean"][m], scale, digits),
                ]
                for m, words in WORDS.items()
            ]
            lines.append(markdown_table(head, rows))
        lines.append(
            "By the learning rate over the horizon, against that of the history (within 10%: constant), mean over "
            "horizons, in percent of the last state's error; `linear` with the factors that are best there:\n"
        )
        phases = [
            [
                phase,
                str(each["slices"]),
                *(_cell(each["relative"]["mean"][m], 100, 1) for m in ("linear", "nowcaster")),
            ]
            for phase, each in part["phases"].items()
        ]
        lines.append(markdown_table(["learning rate", "slices", "linear", "nowcaster"], phases))
        lines.append(
            f"The nowcaster is nearer than `linear` in {100 * part['better_than_linear']:.0f}% of the slices. By type "
            "of edge, mean over horizons, in percent of the last state's error:\n"
        )
        kinds = [kind for kind in part["relative"] if kind in EdgeType.__members__]
        methods = ("linear", "nowcaster")
        rows = [
            [_words(kind), *(_cell(part["relative"][kind]["mean"][method], 100, 1) for method in methods)]
            for kind in kinds
        ]
        lines.append(markdown_table(["edges", *methods], rows))
    return "\n".join(lines)


def draw_evaluation(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: error over that of the last state, by horizon and by type of edge.

    Raises:
        ImportError: matplotlib is missing.
    """
    parts = _measured(found)
    figure = new_figure(10, 3.6 * len(parts))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(parts), 2, squeeze=False)
    for (name, part), (left, right) in zip(parts.items(), panels, strict=True):
        relative = part["relative"]
        for method, words in WORDS.items():
            values = [value for value in relative[ALL][method] if value is not None]
            ahead = [k for k, value in enumerate(relative[ALL][method], 1) if value is not None]
            style = "--" if method == "persistence" else "-"
            left.plot(ahead, values, style, color=_COLOURS[method], linewidth=1.6, label=words)
        left.set_xlabel(f"horizon, in intervals of {found['interval']} steps")
        left.set_ylabel("error / last state's")
        left.set_title(f"{PARTS[name]}, {part['slices']} slices", fontsize=10)
        left.legend(frameon=False, fontsize=8)
        left.set_ylim(0, HIGHEST)
        kinds = [kind for kind in relative if kind in EdgeType.__members__]
        for i, method in enumerate(("linear", "nowcaster")):
            heights = [relative[kind]["mean"][method] for kind in kinds]
            colours = "#bdbdbd" if method == "linear" else [TYPE_COLOURS[EdgeType[kind]] for kind in kinds]
            places = [place + 0.4 * i for place in range(len(kinds))]
            right.bar(places, heights, width=0.38, color=colours, label=f"{method} (grey)" if i == 0 else None)
        right.axhline(1, color=_COLOURS["persistence"], linestyle="--", linewidth=1)
        right.set_xticks([place + 0.2 for place in range(len(kinds))], [_words(kind) for kind in kinds])
        right.tick_params(axis="x", rotation=30)
        right.set_ylim(0, HIGHEST)
        right.set_title("by type of edge: linear (grey), nowcaster", fontsize=10)
        for axes in (left, right):
            _tidy(axes)
    figure.savefig(path, dpi=110)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if label.get_rotation() else "center")


def _measured(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in PARTS if found.get(name, {}).get("slices")}


def _words(kind: str) -> str:
    return kind.lower().replace("_", " ")


def _cell(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"
