"""All savings at a glance: every method, every protocol, a dot for every task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..plan import BASELINE
from ..summary import Summary
from ..verdicts import AIMS
from .style import DPI, PLAIN, Look, blank, looks, tidy, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"paper": "paper", "fixed": "fixed", "tuned": "tuned", "robust": "robust: loss recovered"}
SMALL = 8
LOWEST, HIGHEST = -0.5, 2.0
"""What is beyond is drawn at the edge."""


def draw_overview(summary: Summary, kind: str, path: Path) -> bool:
    """Write a PNG: a panel for every protocol, a row for every method; dots are tasks (medians over seeds, thin lines
    their range over seeds), the bar is the median task, the dashed line what a nowcaster on AdamW is meant to reach.

    Returns:
        Whether there was something to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    methods = [name for name in summary.methods if name != BASELINE and summary.find(method=name, kind=kind)]
    protocols = [p for p in summary.protocols if any(_spreads(summary, p, name, kind) for name in methods)]
    if not protocols:
        return False
    width = 2.6 + 2.15 * len(protocols)
    figure = blank(width, 1.5 + 0.3 * len(methods))
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    colours = looks(summary)
    for protocol, axes in zip(protocols, panels, strict=True):
        _panel(axes, summary, protocol, kind, methods, colours)
    panels[0].set_yticks(range(len(methods)), [summary.methods[name].title for name in methods], fontsize=9)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    aims = any(protocol in AIMS for protocol in protocols)
    text = (
        f"share of AdamW's steps saved, {kind} tasks; dot: a task (line: its seeds); bar: median task; "
        f"{'dashed: aim; ' if aims else ''}x: did not get there; triangle: beyond what is shown"
    )
    figure.supxlabel(wrapped(text, 0.9 * width, SMALL), fontsize=SMALL)
    figure.savefig(path, dpi=DPI)
    return True


def _panel(
    axes: Axes, summary: Summary, protocol: str, kind: str, methods: list[str], colours: Mapping[str, Look]
) -> None:
    axes.axvline(0, color=PLAIN, linewidth=1.0, zorder=1)
    if protocol in AIMS:
        axes.axvline(AIMS[protocol].least or 0.0, color=PLAIN, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    lowest, highest = -0.1, 0.3
    for row, name in enumerate(methods):
        colour = colours[name].colour
        spreads = _spreads(summary, protocol, name, kind)
        places = [
            row + 0.16 * (i - (len(spreads) - 1) / 2) / max(len(spreads) - 1, 1) * 2 for i in range(len(spreads))
        ]
        for place, spread in zip(places, spreads, strict=True):
            low, high = (min(max(value, LOWEST), HIGHEST) for value in (spread.low, spread.high))
            axes.plot([low, high], [place] * 2, color=colour, linewidth=0.8, alpha=0.6, zorder=2)
            lowest, highest = min(lowest, low), max(highest, high)
            _dot(axes, spread.median, place, colour)
        whole = summary.over_tasks(protocol, name, kind, _measure(protocol))
        if whole is not None and LOWEST <= whole.median <= HIGHEST:
            axes.plot([whole.median] * 2, [row - 0.36, row + 0.36], color=colour, linewidth=2.6, zorder=3)
    axes.set_xlim(lowest - 0.06, highest + 0.06)
    axes.set_title(TITLES[protocol], fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, position: f"{100 * value:.0f}%")
    axes.locator_params(axis="x", nbins=4)
    tidy(axes)
    axes.tick_params(axis="y", length=0)


def _dot(axes: Axes, value: float, row: float, colour: str) -> None:
    """A task; at the edge if it is out of sight."""
    if LOWEST <= value <= HIGHEST:
        axes.plot(value, row, marker="o", color=colour, markersize=3.6, markeredgecolor="white", mew=0.4, zorder=4)
        return
    marker = ("<" if value < 0 else ">") if math.isfinite(value) else "x"
    edge = {"transform": axes.get_yaxis_transform(), "clip_on": False, "zorder": 4}
    axes.plot(0.012 if value < 0 else 0.988, row, marker=marker, color=colour, markersize=4, **edge)


def _measure(protocol: str) -> str:
    return "recovered" if protocol == "robust" else "steps_saved"


def _spreads(summary: Summary, protocol: str, method: str, kind: str) -> list:
    found = (one.measures.get(_measure(protocol)) for one in summary.find(protocol, method, kind))
    return [spread for spread in found if spread is not None]
