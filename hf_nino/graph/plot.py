"""Pictures of a neural graph: its wiring as a diagram, and the same as a matrix of blocks."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from .structure import NeuralGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("diagram", "matrix")
DPI = 120


def plot(graph: NeuralGraph, path: str | PathLike | None = None, kind: str = "diagram", *, title: str = "") -> Figure:
    """A picture of the groups and blocks.

    Args:
        graph: the network; frozen blocks are not drawn, since they are no edges.
        path: where to save the picture, in the format of its suffix (``.png``, ``.svg``, ``.pdf``); not saved when
            ``None``.
        kind: ``"diagram"``, groups as boxes and blocks as wires, with layers that repeat drawn once; or ``"matrix"``,
            groups as rows and columns and blocks as coloured fields.
        title: a line above the picture, such as the name of the model.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: another ``kind``, or a suffix of ``path`` that matplotlib cannot write.
        ImportError: matplotlib is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib: install it, or the `plot` extra of hf_nino") from error
    from .diagram import draw_diagram
    from .matrix import draw_matrix
    from .style import FONT

    with matplotlib.rc_context({"font.family": FONT}):
        figure = draw_diagram(graph, title) if kind == "diagram" else draw_matrix(graph, title)
        if path is not None:
            formats = figure.canvas.get_supported_filetypes()
            if Path(path).suffix[1:].lower() not in formats:
                raise ValueError(
                    f"`path` must end in a format that matplotlib can write ({', '.join(sorted(formats))}), got {path}"
                )
            figure.savefig(path, dpi=DPI)
    return figure
