"""Pictures of a neural graph: how its neuron groups are wired, and the same as a matrix.

Groups are boxes from left to right in the order of the computation, edge blocks are arrows in the colour of their edge
type.  Biases and norm gains, which hang on one node each, are dots below the group that they act on.  Layers that
repeat are drawn once, in a frame that says how many there are.  Distances are in inches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from os import PathLike
from typing import TYPE_CHECKING

from .layout import Arrow, Layer, Layout, layout, short_name
from .structure import EdgeType, NeuralGraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TYPE_COLOURS = {
    EdgeType.LINEAR: "#4c72b0",
    EdgeType.OTHER: "#9a9a9a",
    EdgeType.CONVOLUTION: "#17a2b8",
    EdgeType.NORM: "#c79a1b",
    EdgeType.TOKEN_EMBEDDING: "#2e8b57",
    EdgeType.POSITION_EMBEDDING: "#8fbc3f",
    EdgeType.QUERY: "#d1495b",
    EdgeType.KEY: "#ee8a2b",
    EdgeType.VALUE: "#8e5ea2",
    EdgeType.RESIDUAL: "#222222",
    EdgeType.HEAD: "#e07bbf",
}
KIND_COLOURS = {"neuron": "#e6edf7", "input": "#ddf0e2", "row": "#ddf0e2", "head": "#fae3f3", "private": "#fbdcd8"}
KIND_WORDS = {"neuron": "neurons", "input": "inputs, rows", "row": "inputs, rows", "head": "heads"}
MEMBERS = {"neuron": "neuron", "input": "input", "row": "row", "head": "head", "private": "private neuron"}
DASHES = {EdgeType.RESIDUAL: (0, (4, 2)), EdgeType.HEAD: (0, (1, 1.5))}

COLUMN, ROW, BOX = 2.2, 1.1, 1.55
"""Distance of columns and of rows, and width of a box."""

Point = tuple[float, float]


def plot(graph: NeuralGraph, path: str | PathLike | None = None) -> Figure:
    """A picture of the groups and blocks, and the matrix of blocks beside it.

    Args:
        graph: the network; frozen blocks are not drawn, since they are no edges.
        path: where to save the figure, in the format of its suffix; not saved when None.

    Returns:
        A figure with two axes, "wiring" and "matrix", that is not registered with pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib: install it, or the `plot` extra of hf_nino") from error
    plan = layout(graph)
    columns = 1 + max((x for x, _ in plan.place.values()), default=0)
    rows = 1 + max((y for _, y in plan.place.values()), default=0)
    wide, high, legend = max(columns * COLUMN, 8.5), rows * ROW + 0.7, 1.1
    names = _names(graph, plan)
    cell = min(0.23, 9.0 / len(names))
    side, label = cell * len(names), 0.3 + 0.062 * max(map(len, names))
    height = max(high + legend, side + label + 0.4) + 0.6
    width = wide + 0.2 + label + max(side, 1.5) + 0.3
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(_title(graph), fontsize=12, y=1 - 0.25 / height)

    def add_axes(label: str, left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height), label=label)

    spare = height - 0.6 - high - legend
    draw_wiring(add_axes("wiring", 0.1, legend + spare / 2, wide, high), graph, plan, (wide, high), columns)
    spare = height - 0.6 - label - side - 0.4
    draw_matrix(add_axes("matrix", wide + 0.2 + label, 0.4 + spare / 2, side, side), plan, names, cell)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def draw_wiring(axes: Axes, graph: NeuralGraph, plan: Layout, extent: tuple[float, float], columns: int) -> None:
    """Groups as boxes, blocks and constant edges as arrows, layers as frames, with a legend below."""
    left = (extent[0] - columns * COLUMN) / 2
    centre: dict[int, Point] = {
        n: (left + (x + 0.5) * COLUMN, 0.6 + (y + 0.5) * ROW) for n, (x, y) in plan.place.items()
    }
    axes.set(xlim=(0, extent[0]), ylim=(0, extent[1]))
    axes.set_axis_off()
    for layer in plan.layers:
        _draw_frame(axes, layer, [centre[n] for n in layer.groups if n in centre])
    inside = {n: layer.name for layer in plan.layers for n in layer.groups}
    for number, (x, y) in centre.items():
        _draw_box(axes, graph, number, x, y, inside.get(number, ""))
    _draw_arrows(axes, graph, plan, centre)
    dots = defaultdict(list)
    for source, target, kind in plan.arrows:
        if source not in centre and target in centre:
            dots[target].append(kind)
    for number, kinds in dots.items():
        x, y = centre[number]
        below = y - _box_height(graph.groups[number].size) / 2 - 0.1
        for i, kind in enumerate(sorted(kinds)):
            at = x + (i - (len(kinds) - 1) / 2) * 0.14
            axes.plot(at, below, "o", color=TYPE_COLOURS[kind], markersize=6, zorder=4)
    _draw_legend(axes, graph, plan, centre)


def draw_matrix(axes: Axes, plan: Layout, names: list[str], cell: float) -> None:
    """One row and one column per drawn group; a field has the colours of what leads from its row to its column."""
    from matplotlib.patches import Rectangle

    place = {number: i for i, number in enumerate(plan.shown)}
    kinds = defaultdict(list)
    for source, target, kind in plan.wiring:
        kinds[place[source], place[target]].append(kind)
    for (row, column), present in kinds.items():
        for i, kind in enumerate(sorted(present)):
            part = 1 / len(present)
            axes.add_patch(Rectangle((column + i * part, row), part, 1, color=TYPE_COLOURS[kind], linewidth=0))
    step = max(1, math.ceil(0.11 / cell))  # where fields are too small, every second, third, ... has its name
    at = [i + 0.5 for i in range(0, len(names), step)]
    size = max(6.5, min(8.0, cell * step * 72 * 0.6))
    axes.set(xlim=(0, len(names)), ylim=(len(names), 0), xticks=at, yticks=at)
    axes.set_xticklabels(names[::step], rotation=90, fontsize=size)
    axes.set_yticklabels(names[::step], fontsize=size)
    axes.tick_params(length=0, pad=2, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.hlines(range(len(names) + 1), 0, len(names), color="#e4e4e4", linewidth=0.5, zorder=0)
    axes.vlines(range(len(names) + 1), 0, len(names), color="#e4e4e4", linewidth=0.5, zorder=0)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
    axes.set_xlabel("row: from, column: to", fontsize=9)


def _names(graph: NeuralGraph, plan: Layout) -> list[str]:
    """Short names of the drawn groups; of a folded layer's name the last two parts are left, ``"h.0.mlp"``."""
    inside = {number: layer.name for layer in plan.layers for number in layer.groups}
    names = []
    for number in plan.shown:
        layer = inside.get(number, "")
        kept = [*layer.split(".")[-2:], ""] if layer else []
        names.append(_shorten(".".join(kept) + short_name(graph.groups[number], layer), 36))
    return names


def _title(graph: NeuralGraph) -> str:
    return (
        f"{graph.num_parameters:,} parameters, {graph.num_nodes:,} nodes in {len(graph.groups)} groups, "
        f"{len(graph.trainable_blocks)} blocks"
    )


def _box_height(size: int) -> float:
    """A little taller for larger groups: 0.5 for one neuron, 0.68 for a hundred thousand."""
    return 0.5 + 0.036 * min(math.log10(size), 5)


def _draw_box(axes: Axes, graph: NeuralGraph, number: int, x: float, y: float, layer: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    group = graph.groups[number]
    height = _box_height(group.size)
    corner = (x - BOX / 2, y - height / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=0.08"}
    fill = KIND_COLOURS[group.kind]
    hatch = {"hatch": "////", "edgecolor": "white"} if group.pinned else {}
    axes.add_patch(FancyBboxPatch(corner, BOX, height, facecolor=fill, linewidth=0, zorder=2, **hatch, **style))
    axes.add_patch(FancyBboxPatch(corner, BOX, height, facecolor="none", edgecolor="#555555", zorder=2.1, **style))
    text = f"{_wrap(short_name(group, layer))}\n{group.size:,} {MEMBERS[group.kind]}{'s' * (group.size > 1)}"
    axes.text(x, y, text, fontsize=8.5, ha="center", va="center", zorder=5, linespacing=1.1)


def _draw_frame(axes: Axes, layer: Layer, centres: list[Point]) -> None:
    from matplotlib.patches import FancyBboxPatch

    if not centres:
        return
    left, right = min(x for x, _ in centres) - BOX / 2 - 0.2, max(x for x, _ in centres) + BOX / 2 + 0.2
    bottom, top = min(y for _, y in centres) - 0.62, max(y for _, y in centres) + 0.62
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="#f7f7f5",
            edgecolor="#b5b5ae",
            zorder=0,
        )
    )
    axes.text(left + 0.12, top - 0.1, f"{layer.name}  \u00d7 {layer.count}", fontsize=10, weight="bold", va="top")


def _draw_arrows(axes: Axes, graph: NeuralGraph, plan: Layout, centre: dict[int, Point]) -> None:
    from matplotlib.patches import FancyArrowPatch

    arrows = [arrow for arrow in plan.arrows if arrow[0] in centre and arrow[1] in centre]
    half = {number: _box_height(graph.groups[number].size) / 2 for number in centre}
    ports = _ports(arrows, plan.place, centre, half)
    for i, (source, target, kind) in enumerate(arrows):
        start, end = ports[i, source], ports[i, target]
        if source == target:  # a recurrent block
            start, end, bend = (start[0] - 0.3, start[1]), (end[0] + 0.3, end[1]), -0.8
        else:
            bend = _bend(start, end, [(*centre[n], half[n]) for n in centre if n not in (source, target)])
        constant = kind in DASHES
        axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-" if kind == EdgeType.HEAD else "-|>",
                mutation_scale=9 if constant else 12,
                connectionstyle=f"arc3,rad={bend}",
                color=TYPE_COLOURS[kind],
                linewidth=1.1 if constant else 1.8,
                linestyle=DASHES.get(kind, "solid"),
                shrinkA=0,
                shrinkB=1,
                zorder=1 if constant else 1.5,
            )
        )


def _ports(
    arrows: list[Arrow], place: dict[int, tuple[int, int]], centre: dict[int, Point], half: dict[int, float]
) -> dict[tuple[int, int], Point]:
    """Where each arrow (by number) meets each of its boxes; arrows on one side are spread, the steepest outside."""
    sides = defaultdict(list)
    for i, (source, target, _) in enumerate(arrows):
        for box, other in ((source, target), (target, source)):
            (x0, y0), (x1, y1) = centre[box], centre[other]
            if place[box][0] == place[other][0]:
                sides[box, 0, 1 if y1 >= y0 else -1].append((0.0, i))
            else:
                sides[box, 1 if x1 > x0 else -1, 0].append(((y1 - y0) / abs(x1 - x0), i))
    ports = {}
    for (box, right, up), meeting in sides.items():
        x, y = centre[box]
        gap = min(0.16, 2 * (half[box] - 0.08) / max(len(meeting) - 1, 1))
        for rank, (_, i) in enumerate(sorted(meeting)):
            spread = (rank - (len(meeting) - 1) / 2) * gap * abs(right)
            ports[i, box] = (x + right * BOX / 2, y + up * half[box] + spread)
    for i, (source, target, _) in enumerate(arrows):
        if place[source][1] == place[target][1]:  # level arrows stay level
            low = min(ports[i, source][1], ports[i, target][1])
            ports[i, source], ports[i, target] = (ports[i, source][0], low), (ports[i, target][0], low)
    return ports


def _bend(start: Point, end: Point, boxes: list[tuple[float, float, float]]) -> float:
    """How far to bend an arrow so that it stays clear of the boxes (x, y, half height) on its straight way."""
    (x0, y0), (x1, y1) = start, end
    right = 1 if x1 >= x0 else -1
    for x, y, half in boxes:
        if x0 == x1:
            if abs(x - x0) < BOX / 2 and min(y0, y1) < y < max(y0, y1):
                return 0.5
        elif min(x0, x1) < x < max(x0, x1):
            at = [y0 + (y1 - y0) * (edge - x0) / (x1 - x0) for edge in (x - BOX / 2, x + BOX / 2)]
            if min(at) < y + half + 0.06 and max(at) > y - half - 0.06:
                below = sum(at) / 2 < y
                return (0.16 if below else -0.16) * right * (1.6 if y0 == y1 else 1.0)
    return 0.0


def _draw_legend(axes: Axes, graph: NeuralGraph, plan: Layout, centre: dict[int, Point]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=TYPE_COLOURS[kind], linestyle=DASHES.get(kind, "solid"), linewidth=2, label=_words(kind))
        for kind in sorted({kind for source, _, kind in plan.arrows if source in centre})
    ]
    handles += [
        Line2D(
            [], [], color=TYPE_COLOURS[kind], marker="o", linestyle="none", label=f"{_words(kind)}, from its own node"
        )
        for kind in sorted({kind for source, _, kind in plan.arrows if source not in centre})
    ]
    present = [graph.groups[number] for number in centre]
    fills = {KIND_COLOURS[group.kind]: KIND_WORDS.get(group.kind, group.kind) for group in present}
    handles += [Patch(facecolor=fill, edgecolor="#555555", label=words) for fill, words in fills.items()]
    if any(group.pinned for group in present):
        handles.append(
            Patch(facecolor="#cccccc", edgecolor="white", hatch="////", label="pinned: not interchangeable")
        )
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=9, frameon=False, borderpad=0
    )


def _words(kind: EdgeType) -> str:
    return "bias or other" if kind == EdgeType.OTHER else kind.name.lower().replace("_", " ")


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else "\u2026" + name[-length + 1 :]


def _wrap(name: str, length: int = 21) -> str:
    """One or two lines, broken at a dot, blank or bracket; what does not fit loses parts or its head."""
    while len(name) > length:
        breaks = [i for i in range(1, len(name)) if name[i - 1] in ". " or name[i] == "["]
        fitting = [i for i in breaks if max(i, len(name) - i) <= length]
        first, _, others = name.partition(" + ")
        tail = name.lstrip("\u2026").partition(".")[2]
        if fitting:
            middle = min(fitting, key=lambda i: abs(i - len(name) / 2))
            return f"{name[:middle].strip()}\n{name[middle:].strip()}"
        if others not in ("", "\u2026"):
            name = f"{first} + \u2026"
        elif tail:
            name = f"\u2026{tail}"
        else:
            return _shorten(name, length)
    return name
