"""Final loss against learning rate, with and without nowcasts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING

from ..plan import BASELINE, ROBUST_FACTOR
from ..results import Results, Run
from ..summary import Summary, public_names
from .style import DPI, FAINT, Group, Look, blank, looks, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sweep = Mapping[float, Mapping[int, Run]]

WIDTH, HEIGHT = 5.0, 3.5
ROOM = 1.7
"""Height of the picture, in what AdamW loses by a quarter of its best learning rate."""


def swept_tasks(results: Results, kind: str, methods: Sequence[str] = (BASELINE,)) -> list[str]:
    """Tasks of a kind on which AdamW and one of ``methods`` have whole runs at three learning rates or more."""
    return [
        task
        for task in results.tasks
        if results.kind(task) == kind
        and _swept(results, task, BASELINE)
        and any(_swept(results, task, method) for method in methods)
    ]


def _swept(results: Results, task: str, method: str) -> bool:
    sweep = results.sweep(task, method)
    return sum(any(not run.diverged for run in runs.values()) for runs in sweep.values()) >= 3


def draw_sweeps(results: Results, summary: Summary, group: Group, kind: str, path: Path) -> bool:
    """Write a PNG: a panel for every task of a kind, a line for every method of a group; dots are seeds.

    Returns:
        Whether there was something to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    own = {short: name for name, short in public_names(results.methods).items()}
    tasks = swept_tasks(results, kind, [own[name] for name in group.methods if name != BASELINE])
    if not tasks:
        return False
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = blank(WIDTH * columns + (0.8 if columns == 1 else 0), HEIGHT * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False)
    colours = looks(summary)
    drawn: set[str] = set()
    for task, axes in zip(tasks, panels.flat, strict=False):
        names = [name for name in group.methods if _swept(results, task, own[name])]
        drawn.update(names)
        _panel(axes, {name: results.sweep(task, own[name]) for name in names}, colours)
        axes.set_title(task, fontsize=10)
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("final evaluation loss", fontsize=9)
    for axes in panels.flat[max(len(tasks) - columns, 0) : len(tasks)]:
        axes.set_xlabel("peak learning rate, in AdamW's units", fontsize=9)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colours[name].colour, marker=colours[name].marker, label=summary.methods[name].title)
        for name in group.methods
        if name in drawn
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2 if columns > 1 else 1, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=DPI)
    return True


def _panel(axes: Axes, sweeps: Mapping[str, Sweep], colours: Mapping[str, Look]) -> None:
    """One task."""
    lines = {name: _line(sweep) for name, sweep in sweeps.items()}
    low, high = _limits(lines, sweeps)
    axes.set_xscale("log")
    axes.set_ylim(low - 0.06 * (high - low), high)
    plain = lines[BASELINE]
    best = min(plain, key=plain.__getitem__)
    for rate, text in ((best, "AdamW's best"), (best / ROBUST_FACTOR, f"1/{ROBUST_FACTOR} of it")):
        if min(plain) <= rate * 1.01:
            axes.axvline(rate, color=FAINT, linewidth=1.2, zorder=1)
            place = {"xy": (rate, 1), "xycoords": ("data", "axes fraction"), "xytext": (3, -2)}
            note = axes.annotate(text, **place, textcoords="offset points", va="top", fontsize=8, color="#7a7a7a")
            note.set_in_layout(False)
    for i, (name, line) in enumerate(lines.items()):
        look, order = colours[name], 3 if name == BASELINE else 4
        rates = [rate for rate in line if math.isfinite(line[rate])]
        style = {"color": look.colour, "zorder": order}
        axes.plot(rates, [line[rate] for rate in rates], marker=look.marker, markersize=5, linewidth=1.6, **style)
        dots = [(rate, run.final_loss) for rate, runs in sweeps[name].items() for run in runs.values()]
        dots = [(rate, loss) for rate, loss in dots if math.isfinite(loss) and loss != line[rate]]
        if dots:
            axes.plot(*zip(*dots, strict=True), marker=".", linestyle="none", markersize=4, alpha=0.5, **style)
        lost = [rate for rate in line if not math.isfinite(line[rate])]
        where = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "clip_on": False}
        if lost:
            axes.plot(
                lost, [1 - 0.035 * i] * len(lost), marker="x", markersize=6, markeredgewidth=1.5, **where, **style
            )
    _ticks(axes, sorted({rate for line in lines.values() for rate in line}))
    tidy(axes)


def _line(sweep: Sweep) -> dict[float, float]:
    """Learning rate -> final loss, infinite where it diverged: of the seed that has most learning rates, and of the
    median seed where that one is missing."""
    counts = Counter(seed for runs in sweep.values() for seed in runs)
    swept = max(counts, key=lambda seed: (counts[seed], -seed), default=None)
    return {
        rate: runs[swept].final_loss if swept in runs else median_high(run.final_loss for run in runs.values())
        for rate, runs in sweep.items()
    }


def _limits(lines: Mapping[str, Mapping[float, float]], sweeps: Mapping[str, Sweep]) -> tuple[float, float]:
    """From the lowest loss of all to some way above AdamW's at a quarter of its best learning rate: what is far above
    leaves the picture at the top."""
    plain = lines[BASELINE]
    best = min(plain, key=plain.__getitem__)
    low = min(run.final_loss for sweep in sweeps.values() for runs in sweep.values() for run in runs.values())
    smaller = [rate for rate in plain if rate < best and math.isfinite(plain[rate])]
    quarter = min(smaller, key=lambda rate: abs(math.log(rate * ROBUST_FACTOR / best)), default=best)
    high = low + ROOM * (plain[quarter] - low)
    bests = [min(line.values()) for line in lines.values() if line]
    high = max([high, *(loss for loss in bests if loss < low + 2 * (high - low))])
    return low, max(high, low + 0.01 * abs(low) + 1e-6)


def _ticks(axes: Axes, rates: Sequence[float]) -> None:
    """Learning rates that were run, so many that their numbers do not touch."""
    span = math.log2(rates[-1] / rates[0]) if len(rates) > 1 else 0
    shown: list[float] = []
    for rate in rates:
        if not shown or math.log2(rate / shown[-1]) > max(span / 8, 0.9):
            shown.append(rate)
    axes.set_xticks(shown, [f"{rate:.2g}" for rate in shown])
    axes.minorticks_off()
