"""Colours, fonts and words that the pictures of a neural graph share.  Needs matplotlib when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from .structure import EdgeType, NeuralGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TYPE_COLOURS = {
    EdgeType.LINEAR: "#4c72b0",
    EdgeType.OTHER: "#8c8c8c",
    EdgeType.CONVOLUTION: "#138496",
    EdgeType.NORM: "#b8860b",
    EdgeType.TOKEN_EMBEDDING: "#2e8b57",
    EdgeType.POSITION_EMBEDDING: "#6f9a1f",
    EdgeType.QUERY: "#d1495b",
    EdgeType.KEY: "#d9741a",
    EdgeType.VALUE: "#8e5ea2",
    EdgeType.RESIDUAL: "#222222",
    EdgeType.HEAD: "#d45fae",
}
KIND_COLOURS = {
    "neuron": "#e6edf7",
    "input": "#ddf0e2",
    "row": "#ddf0e2",
    "head": "#fae3f3",
    "private": "#fbdcd8",
    "parameter": "#eeeeee",
}
KIND_WORDS = {
    "neuron": "neurons",
    "input": "inputs, rows of tables",
    "row": "inputs, rows of tables",
    "head": "heads",
    "private": "private: without neighbours",
    "parameter": "nodes of parameters",
}
DASHES = {EdgeType.RESIDUAL: (0, (4, 2)), EdgeType.HEAD: (0, (1, 1.5))}
PINNED = {"facecolor": "#a5523e", "edgecolor": "#a5523e"}
FONT = "DejaVu Sans"
"""The font that matplotlib brings along, so that widths are the same everywhere."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, not registered with pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Inches that a text takes at a font size in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=FONT, size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def title_of(graph: NeuralGraph, width: float, more: Sequence[str] = ()) -> list[str]:
    """Lines above a picture: what the graph has, and ``more``."""
    parts = [
        f"{graph.num_parameters:,} parameters, {graph.num_nodes:,} nodes in {len(graph.groups)} groups,",
        f"{len(graph.trainable_blocks)} blocks",
    ]
    joined = " ".join(parts)
    return [*([joined] if text_width(joined, 10) < width else parts), *more]


def add_title(figure: Figure, lines: Sequence[str], bold: bool) -> None:
    """Lines at the top of a figure, the first one bold if asked for."""
    height = figure.get_figheight()
    for i, line in enumerate(lines):
        weight = "bold" if bold and i == 0 else "normal"
        y = 1 - (0.22 + 0.2 * i) / height
        figure.text(0.5, y, line, fontsize=10, ha="center", va="center", weight=weight)
