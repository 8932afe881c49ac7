"""The wiring diagram of a neural graph: groups as boxes, parameters as wires, layers that repeat drawn once."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .folding import Joint
from .layout import Layout, forward, layout
from .routing import LABEL, PAD, TITLE, Box, Frame, Plan, Wire, route
from .structure import EdgeType, NeuralGraph
from .style import DASHES, KIND_COLOURS, KIND_WORDS, PINNED, TYPE_COLOURS, add_title, new_figure, text_width, title_of
from .words import (
    gain_words,
    kind_of,
    parameter_words,
    pin_words,
    root_of,
    short_name,
    size_words,
    type_words,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "name": (8.5, 0.15, {"weight": "bold"}),
    "size": (8.0, 0.145, {}),
    "pinned": (7.0, 0.125, {"style": "italic", "color": "#8a3b2a"}),
    "gain": (7.0, 0.13, {"color": "#333333"}),
}
"""Font size, height of a line and looks of each kind of line in a box."""

NARROWEST, DOT = 1.25, 0.12
"""Width of the narrowest box, and of the dots before the names of biases and gains."""

MOST_GAINS = 6
"""Names of biases and gains that a box lists."""

Gain = tuple[tuple[EdgeType, ...], str]
"""Biases and gains of one module: their types, and what the box says."""


def draw_diagram(graph: NeuralGraph, title: str = "") -> Figure:
    """A figure with one axes, "diagram"; frozen blocks are not drawn, since they are no edges."""
    plan, shown, gains = plan_diagram(graph)
    handles = _legend(graph, shown, plan)
    patterns = [f"{s.prefix.rstrip('.')}: {s.pattern()}" for s in shown.folding.stacks if len(s.layers) > 1]
    columns = max(1, min(4, int(plan.width / 2.2)))
    rows = -(-len(handles) // columns)
    lines = [title] * bool(title) + title_of(graph, plan.width, patterns)
    head, foot = 0.25 + 0.2 * len(lines), 0.25 + 0.19 * rows
    width = max([plan.width + PAD, 4.0, *(text_width(line, 10) * 1.2 + 0.4 for line in lines)])
    height = head + plan.height + foot
    figure = new_figure(width, height)
    add_title(figure, lines, bold=bool(title))
    axes = figure.add_axes((0, foot / height, 1, plan.height / height), label="diagram")
    spare = (width - plan.width) / 2
    axes.set(xlim=(-spare, width - spare), ylim=(plan.height, 0))
    axes.set_axis_off()
    for frame in plan.frames:
        _draw_frame(axes, frame)
    for wire in plan.wires:
        _draw_wire(axes, wire)
    for number, box in plan.boxes.items():
        _draw_box(axes, graph, number, box, gains[number])
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        borderpad=0.6,
        labelspacing=0.25,
    )
    return figure


def plan_diagram(graph: NeuralGraph) -> tuple[Plan, Layout, dict[int, list[Gain]]]:
    """Where everything goes, in inches; what is drawn; and the biases and gains of each box."""
    shown = layout(graph)
    gains = _gains(graph, shown)
    boxes = {number: _box(graph, shown, number, gains[number]) for number in shown.place}
    return route(graph, shown, boxes, text_width), shown, gains


def _gains(graph: NeuralGraph, plan: Layout) -> dict[int, list[Gain]]:
    """For each box the biases and gains that hang on it, and parameters of wires that have no room for a label."""
    mine: dict[int, list[Joint]] = defaultdict(list)
    for joint in sorted(plan.joints, key=lambda joint: joint.kind):
        for number, other in ((joint.source, joint.target), (joint.target, joint.source)):
            if number in plan.place and other not in plan.place:
                mine[number].append(joint)
    root = root_of(plan.folding.stacks)
    found: dict[int, list[Gain]] = defaultdict(list)
    for number, joints in mine.items():
        _, layer = plan.folding.layer_of.get(number, (None, None))
        for where in ("", "next: ", "last: "):
            here = [j for j in joints if where == _where(j.owner, layer.name if layer else "")]
            found[number] += [(kinds, where + words) for kinds, words in gain_words(here, root)]
    for joint in plan.joints:
        if joint.parameters and plan.place.get(joint.source, -1) == plan.place.get(joint.target):
            sign = "\u21bb" if joint.source == joint.target else "\u2190"
            found[forward(graph, joint)[1]].append(((joint.kind,), f"{sign} {parameter_words(joint, root=root)}"))
    return found


def _where(owner: str, layer: str) -> str:
    """Gains act on what they read: the next layer's on the end of this one, those after all layers on the last one."""
    return "" if owner == layer else "next: " if owner else "last: "


def _box(graph: NeuralGraph, plan: Layout, number: int, gains: Sequence[Gain]) -> Box:
    group = graph.groups[number]
    _, layer = plan.folding.layer_of.get(number, (None, None))
    name = short_name(group, layer.name if layer else "", root_of(plan.folding.stacks))
    text = [("name", line) for line in wrapped(name, 2)]
    text.append(("size", size_words(graph, number)))
    if number in plan.folding.copies:
        text.append(("size", f"\u00d7 {plan.folding.copies[number]} alike"))
    if group.pinned:
        words = pin_words(group) if group.kind == "private" else f"pinned: {pin_words(group)}"
        text += [("pinned", line) for line in wrapped(words, 3, 34)]
    shown = [words for _, words in gains]
    if len(shown) > MOST_GAINS:
        shown = [*shown[: MOST_GAINS - 1], f"{len(shown) - MOST_GAINS + 1} more"]
    text += [("gain", _without_middle(words)) for words in shown]
    widths = [
        text_width(words, STYLES[style][0], bold=style == "name") + 4 * DOT * (style == "gain")
        for style, words in text
    ]
    margin = 0.34 if group.pinned else 0.2
    return Box(
        text, max([NARROWEST, *(width + margin for width in widths)]), 0.14 + sum(STYLES[s][1] for s, _ in text)
    )


def _without_middle(words: str, length: int = 36) -> str:
    """``"last: encoder.layers.final_norm.weight"`` becomes ``"last: …final_norm.weight"``."""
    where = next((known for known in ("next: ", "last: ") if words.startswith(known)), "")
    rest = words.removeprefix(where)
    excess = len(words) - length
    return words if excess <= 0 else f"{where}\u2026{rest[excess + 1 :]}"


def _draw_box(axes: Axes, graph: NeuralGraph, number: int, box: Box, gains: Sequence[Gain]) -> None:
    from matplotlib.patches import FancyBboxPatch

    group = graph.groups[number]
    shape = {"boxstyle": "round,pad=0,rounding_size=0.06"}
    corner = (box.left, box.top)
    axes.add_patch(
        FancyBboxPatch(
            corner, box.width, box.height, facecolor=KIND_COLOURS[kind_of(group)], linewidth=0, zorder=3, **shape
        )
    )
    if group.pinned:
        strip = FancyBboxPatch((box.left, box.top), 0.07, box.height, linewidth=0, zorder=3.1, **PINNED, **shape)
        axes.add_patch(strip)
    axes.add_patch(
        FancyBboxPatch(corner, box.width, box.height, facecolor="none", edgecolor="#555555", zorder=3.2, **shape)
    )
    y = box.top + (box.height - sum(STYLES[style][1] for style, _ in box.text)) / 2
    kinds_of = iter([kinds for kinds, _ in gains])
    for style, words in box.text:
        size, line, looks = STYLES[style]
        x = box.x + DOT / 2 * (style == "gain")
        axes.text(x, y + line / 2, words, fontsize=size, ha="center", va="center_baseline", zorder=5, **looks)
        if style == "gain":
            for i, kind in enumerate(next(kinds_of)):
                at = x - text_width(words, size) / 2 - (0.75 + 0.7 * i) * DOT
                axes.plot(at, y + line / 2, "o", color=TYPE_COLOURS[kind], markersize=4.5, zorder=5)
        y += line


def _draw_frame(axes: Axes, frame: Frame) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (frame.left, frame.top),
            frame.right - frame.left,
            frame.bottom - frame.top,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="#f6f6f3",
            edgecolor="#b5b5ae",
            zorder=0,
        )
    )
    axes.text(
        frame.title_x,
        frame.top + 0.17,
        frame.title,
        fontsize=TITLE,
        weight="bold",
        va="center",
        zorder=5,
        bbox=_behind(),
    )


def _draw_wire(axes: Axes, wire: Wire) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    kind = wire.joint.kind
    constant = kind in DASHES
    points = _rounded(wire.points if wire.joint.source == wire.start else wire.points[::-1])
    path = Path([point for _, point in points], [code for code, _ in points])
    axes.add_patch(
        FancyArrowPatch(
            path=path,
            arrowstyle="-" if kind == EdgeType.HEAD else "-|>",
            mutation_scale=8 if constant else 9,
            color=TYPE_COLOURS[kind],
            linewidth=1.1 if constant else 1.5,
            linestyle=DASHES.get(kind, "solid"),
            capstyle="butt",
            zorder=1 if constant else 1.5,
        )
    )
    if wire.label:
        straight = wire.enters == "spine"
        axes.text(
            *wire.label_at,
            wire.label,
            fontsize=LABEL,
            color=TYPE_COLOURS[kind],
            ha="right",
            va="center" if straight else "bottom",
            zorder=4,
        )


def _rounded(points: Sequence[tuple[float, float]], radius: float = 0.06) -> list[tuple[int, tuple[float, float]]]:
    """(path code, vertex) of a way with round corners."""
    from matplotlib.path import Path

    way = [points[0], *(b for a, b in itertools.pairwise(points) if a != b)]
    result = [(int(Path.MOVETO), way[0])]
    for before, corner, after in zip(way, way[1:], way[2:], strict=False):
        near = [_towards(corner, other, radius) for other in (before, after)]
        result += [(int(Path.LINETO), near[0]), (int(Path.CURVE3), corner), (int(Path.CURVE3), near[1])]
    return [*result, (int(Path.LINETO), way[-1])]


def _towards(start: tuple[float, float], end: tuple[float, float], distance: float) -> tuple[float, float]:
    """The point that is some way from start to end, half of it at most."""
    (x0, y0), (x1, y1) = start, end
    share = min(0.5, distance / max(abs(x1 - x0) + abs(y1 - y0), 1e-9))
    return x0 + share * (x1 - x0), y0 + share * (y1 - y0)


def _behind() -> dict:
    return {"facecolor": "#f6f6f3", "edgecolor": "none", "pad": 1.0}


def _legend(graph: NeuralGraph, plan: Layout, routed: Plan) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    wired = sorted({wire.joint.kind for wire in routed.wires})
    dots = sorted({j.kind for j in plan.joints if (j.source in plan.place) != (j.target in plan.place)})
    handles = [
        Line2D([], [], color=TYPE_COLOURS[k], linestyle=DASHES.get(k, "solid"), linewidth=2, label=_legend_words(k))
        for k in wired
    ]
    handles += [
        Line2D(
            [], [], color=TYPE_COLOURS[k], marker="o", linestyle="none", label=f"{type_words(k)}, from its own node"
        )
        for k in dots
    ]
    present = [graph.groups[number] for number in plan.place]
    fills = {KIND_COLOURS[kind_of(group)]: KIND_WORDS[kind_of(group)] for group in present}
    handles += [Patch(facecolor=fill, edgecolor="#555555", label=words) for fill, words in fills.items()]
    if any(group.pinned for group in present):
        handles.append(Patch(**PINNED, label="pinned: not interchangeable"))
    return handles


def _legend_words(kind: EdgeType) -> str:
    """Constant edges say so; arrows of keys go against the computation."""
    if kind in DASHES:
        return f"{type_words(kind)} (constant)"
    return "key (scores are x Wq Wk\u2032 x\u2032)" if kind == EdgeType.KEY else type_words(kind)
