"""Evaluation loss against steps, with and without nowcasts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ....graph.style import text_width
from ..plan import BASELINE
from ..results import Results, Run
from ..statistics import middle_run
from ..summary import Summary, public_names
from .style import DPI, Group, Look, blank, groups, label_ends, looks, tidy, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.3, 3.0
LEFT, RIGHT, ABOVE, BELOW = 0.45, 0.3, 0.35, 0.4
TOP = 0.35
"""Inches: of a panel's axes, around them, and above all panels."""

LABEL, SMALL = 9, 8
"""Sizes of letters, in points."""

LEGEND = (
    "over optimizer steps; thin: each seed; bold: median seed, its nowcasts below (x: taken back); "
    "circles: first evaluations after nowcasts"
)
ROW = 0.035
"""Height of a row of ticks for nowcasts, as a share of the axes."""

SPARSE = 25
"""Up to so many nowcasts, the evaluation after each of them is marked on the curve."""

SKIPPED = 0.12
"""The first share of AdamW's run may leave the picture at the top."""


def draw_curves(results: Results, summary: Summary, protocol: str, task: str, path: Path) -> None:
    """Write a PNG: a panel for every group of methods; thin lines are seeds, the bold one is the median seed, with its
    nowcasts as ticks below.

    Raises:
        ImportError: matplotlib is missing.
    """
    public = {short: name for name, short in public_names(results.methods).items()}
    cells = {short: results.cell(protocol, task, name) for short, name in public.items()}
    drawn = [group for group in groups(summary) if any(cells[name] for name in group.methods if name != BASELINE)]
    drawn = drawn or groups(summary)[:1]
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    longest = max(text_width(_label(summary, name, "diverged"), LABEL) for group in drawn for name in group.methods)
    width, height = LEFT + WIDTH + RIGHT + longest, ABOVE + HEIGHT + BELOW
    legend = wrapped(LEGEND, 0.95 * width * columns, SMALL)
    below = 0.15 + 0.15 * len(legend.splitlines())
    size = width * columns, TOP + height * rows + below
    figure = blank(*size)
    figure.set_layout_engine("none")  # the layout engines of matplotlib do not know labels at lines
    colours = looks(summary)
    for i, group in enumerate(drawn):
        row, column = divmod(i, columns)
        left, bottom = column * width + LEFT, below + (rows - 1 - row) * height + BELOW
        axes = figure.add_axes((left / size[0], bottom / size[1], WIDTH / size[0], HEIGHT / size[1]))
        _panel(axes, group, {name: list(cells[name].values()) for name in group.methods}, summary, colours)
    figure.text(0.5, 1 - 0.6 * TOP / size[1], f"{task}, {protocol}: evaluation loss", ha="center", fontsize=11)
    figure.text(0.5, 0.08 / size[1], legend, ha="center", va="bottom", fontsize=SMALL)
    figure.savefig(path, dpi=DPI)


def _label(summary: Summary, name: str, loss: str) -> str:
    return f"{summary.methods[name].label} {loss}"


def _panel(
    axes: Axes, group: Group, cells: Mapping[str, list[Run]], summary: Summary, colours: Mapping[str, Look]
) -> None:
    """One group of methods."""
    runs = [run for found in cells.values() for run in found if run.curve is not None]
    middles = {name: middle_run(found) for name, found in cells.items()}
    ticked = [name for name, run in middles.items() if run is not None and run.written]
    steps = max((run.curve.steps[-1] for run in runs if run.curve is not None), default=1)
    low, high = _limits(runs, middles.get(BASELINE))
    axes.set_xlim(0, steps)
    axes.set_ylim(low - (high - low) * (0.03 + ROW * len(ticked)) / (1 - ROW * len(ticked)), high)
    ends = []
    for name, found in cells.items():
        colour, middle = colours[name].colour, middles[name]
        order = 3 if name == BASELINE else 4
        for run in found:
            if run.curve is not None and run is not middle:
                axes.plot(run.curve.steps, run.curve.losses, color=colour, linewidth=0.7, alpha=0.35, zorder=2)
        if middle is not None and middle.curve is not None:
            axes.plot(middle.curve.steps, middle.curve.losses, color=colour, linewidth=1.8, zorder=order)
            above = middle.final_loss > high
            loss = f"{middle.final_loss:.2f}" + (" ↑" if above else "")
            ends.append((middle.final_loss, _label(summary, name, loss), colour))
            _nowcasts(axes, middle, ticked.index(name) if name in ticked else 0, colour)
        elif found:
            ends.append((high, _label(summary, name, "diverged"), colour))
    axes.set_title(group.title if len(ends) > 1 else "", fontsize=10)
    tidy(axes)
    label_ends(axes, ends, HEIGHT, LABEL)


def _nowcasts(axes: Axes, run: Run, row: int, colour: str) -> None:
    """Ticks for the nowcasts of a run, crosses for those that were taken back, circles after sparse ones."""
    if run.curve is None or not run.written:
        return
    where = {"transform": axes.get_xaxis_transform(), "color": colour, "linestyle": "none", "zorder": 5}
    height = ROW * (row + 0.5)
    kept = [step for step in run.written if step not in run.taken_back]
    size = 4.5 if len(kept) <= 60 else 3
    axes.plot(kept, [height] * len(kept), marker="|", markersize=size, markeredgewidth=1.0, **where)
    back = run.taken_back
    axes.plot(back, [height] * len(back), marker="x", markersize=4, markeredgewidth=1.3, clip_on=False, **where)
    if len(run.written) <= SPARSE:
        after = {next((i for i, s in enumerate(run.curve.steps) if s >= step), None) for step in run.written}
        points = [(run.curve.steps[i], run.curve.losses[i]) for i in sorted(after - {None})]
        style = {"marker": "o", "markersize": 3.5, "markerfacecolor": "white", "markeredgecolor": colour, "zorder": 6}
        axes.plot(*zip(*points, strict=True), linestyle="none", markeredgewidth=1.0, **style)


def _limits(runs: list[Run], plain: Run | None) -> tuple[float, float]:
    """From the lowest loss to what AdamW (or else the best run) had after its first steps."""
    whole = [run for run in runs if not run.diverged]
    curves = [run.curve for run in (whole or runs) if run.curve is not None]
    if not curves:
        return 0.0, 1.0
    low = min(loss for curve in curves for loss in curve.losses)
    shown = plain.curve if plain is not None and plain.curve is not None else min(curves, key=lambda c: c.losses[-1])
    begin = SKIPPED * shown.steps[-1]
    high = max(loss for step, loss in zip(shown.steps, shown.losses, strict=True) if step >= begin)
    return low, max(high, low + 0.01 * abs(low) + 1e-6)
