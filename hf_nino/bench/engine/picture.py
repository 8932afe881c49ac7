"""The picture of the engine benchmark: time and memory against parameters, with what no nowcast can beat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import Row, against, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"float32": "#1971c2", "fast": "#d9480f"}
ORIGINAL, FLOOR = "black", "#6b7280"
DASHES = {"host": "-", "device": "--"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the benchmark's picture needs matplotlib; run `pip install hf_nino[plot]`") from error

    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    table, pairs = rows(results), against(results)
    places = list(dict.fromkeys(row.place for row in table))
    for place in places:
        for mode, colour in COLOURS.items():
            line = [row for row in table if (row.place, row.mode) == (place, mode)]
            name = (
                mode if len(places) == 1 else f"{mode}, states {'in host memory' if place == 'host' else 'on device'}"
            )
            style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": DASHES[place], "label": name}
            _line(time, line, [row.busy for row in line], **style)
            _line(memory, line, [row.extra_bytes for row in line], **style)
    for mode, colour in COLOURS.items():
        line = [row for row in table if (row.place, row.mode) == (places[0], mode)]
        style = {"color": colour, "linewidth": 1, "linestyle": ":", "label": f"floor: matrix products of {mode}"}
        _line(time, line, [row.matrix_floor for row in line], **style)
    line = [row for row in table if (row.place, row.mode) == (places[0], "float32")]
    style = {"color": FLOOR, "linewidth": 1, "linestyle": ":"}
    _line(time, line, [row.bandwidth_floor for row in line], label="floor: memory bandwidth", **style)
    _line(memory, line, [4 * row.parameters for row in line], label="floor: the prediction, in float32", **style)
    if pairs:
        size = {row.model: row.parameters for row in table}
        style = {"color": ORIGINAL, "marker": "s", "markersize": 4, "label": "original release"}
        x = [size[pair.model] for pair in pairs]
        time.plot(x, [pair.busy for pair in pairs], **style)
        memory.plot(x, [pair.extra_bytes for pair in pairs], **style)
    identity = results["identity"]
    threads = "1 thread" if identity["threads"] == 1 else f"{identity['threads']} threads"
    for axes, label in ((time, "seconds of a nowcast"), (memory, "extra memory (bytes)")):
        axes.set(xscale="log", yscale="log", xlabel="parameters of the model", ylabel=label)
        axes.grid(True, which="major", color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))
    figure.suptitle(
        f"What a nowcast costs ({identity['machine'] if identity['device'] == 'cuda' else threads})", fontsize=10
    )
    figure.savefig(path)


def _line(axes: Axes, line: list[Row], values: list[float], **style: Any) -> None:
    axes.plot([row.parameters for row in line], values, **style)
