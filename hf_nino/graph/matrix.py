"""The block adjacency matrix of a neural graph: rows are where edges come from, columns where they lead.

Two panels: all groups, with a tick for each layer, in which a chain of layers is a chain of squares along the
diagonal; and the groups of one layer of each kind by name.  Where nothing repeats there is the second panel only.
Biases and gains, which come from one node of their own each, are on the diagonal, at the group that they act on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .folding import Folding, fold
from .structure import EdgeType, NeuralGraph
from .style import TYPE_COLOURS, add_title, new_figure, text_width, title_of
from .words import frame_words, root_of, short_name, type_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 8.0
"""Inches of the panel with all groups."""

CELL, SMALL = 0.165, 5.0
NAMES = 7.5
"""Inches of a field in the panel with names, at least; of the panel, if there are few; and the names' font size."""

Fields = dict[tuple[int, int], set[EdgeType]]


def draw_matrix(graph: NeuralGraph, title: str = "") -> Figure:
    """A figure with the axes "layers" (absent where nothing repeats) and "groups"; frozen blocks are no edges."""
    folding = fold(graph)
    boxes = [number for number, group in enumerate(graph.groups) if group.kind != "parameter"]
    drawn = [number for number in boxes if folding.stands_for[number] == number]
    names = _names(graph, folding, drawn)
    whole = len(drawn) < len(boxes)
    brackets = _brackets(folding, drawn)
    label = 0.15 + max(text_width(name, NAMES) for name in names)
    side = len(drawn) * min(2 * CELL, max(CELL, SMALL / len(drawn)))
    segments = _segments(graph, folding, boxes)
    margin = 0.2 + max([text_width(name, NAMES) for _, _, name in segments], default=0.0) if whole else 0.0
    left_panel = margin + SIDE + 0.5 if whole else 0.2
    right = 0.5 + max([text_width(words, NAMES, bold=True) for _, _, words in brackets], default=0.0)
    width = left_panel + label + side + right
    body = max(label + side, margin + SIDE if whole else 0.0) + 0.3
    kinds = sorted({block.edge_type for block in graph.trainable_blocks} | {c.edge_type for c in graph.constants})
    columns = max(1, min(len(kinds), int(width / 1.7)))
    foot = 0.65 + 0.2 * -(-len(kinds) // columns)
    lines = [title] * bool(title) + title_of(graph, width)
    head = 0.3 + 0.2 * len(lines)
    width = max([width, 4.0, *(text_width(line, 10) * 1.2 + 0.4 for line in lines)])
    height = head + body + foot
    figure = new_figure(width, height)
    add_title(figure, lines, bold=bool(title))

    def add(name: str, left: float, top: float, size: float) -> Axes:
        return figure.add_axes(
            (left / width, 1 - (head + top + size) / height, size / width, size / height), label=name
        )

    if whole:
        axes = add("layers", margin, margin + 0.3, SIDE)
        _draw_fields(axes, _fields(graph, boxes, lambda number: number), len(boxes), SIDE)
        _draw_segments(axes, segments, len(boxes))
        _caption(axes, f"all {len(boxes)} groups of neurons, by layer")
    axes = add("groups", left_panel + label, label + 0.3, side)
    _draw_fields(axes, _fields(graph, drawn, lambda number: folding.stands_for[number]), len(drawn), side)
    _draw_names(axes, names)
    _draw_brackets(axes, brackets, len(drawn), side / len(drawn))
    _caption(axes, "one layer of each kind" if whole else f"all {len(boxes)} groups of neurons")
    _draw_legend(figure, kinds, columns)
    return figure


def _fields(graph: NeuralGraph, shown: Sequence[int], stands_for: Callable[[int], int]) -> Fields:
    """(row, column) -> edge types; what one node of its own leads to is on the diagonal."""
    place = {number: i for i, number in enumerate(shown)}
    fields: Fields = defaultdict(set)
    for edges in (*graph.trainable_blocks, *graph.constants):
        ends = [place.get(stands_for(side.group)) for side in (edges.source, edges.target)]
        known = [end for end in ends if end is not None]
        if known:
            fields[known[0], known[-1]].add(edges.edge_type)
    return fields


def _segments(graph: NeuralGraph, folding: Folding, boxes: Sequence[int]) -> list[tuple[int, int, str]]:
    """(first place, last place + 1, name) of every layer, and of each run of groups outside of layers."""
    root = root_of(folding.stacks)
    outer = [stack for stack in folding.stacks if not stack.inner]
    found: list[tuple[int, int, str, bool]] = []
    for i, number in enumerate(boxes):
        name = graph.groups[number].name
        layer = next((la for stack in outer if (la := stack.layer_name(name))), "")
        words = layer.removeprefix(root) if layer else short_name(graph.groups[number], "", root)
        if found and found[-1][3] == bool(layer) and (not layer or found[-1][2] == words):
            first, _, before, _ = found[-1]
            found[-1] = (first, i + 1, before if layer else before.removesuffix(", …") + ", …", bool(layer))
        else:
            found.append((i, i + 1, words, bool(layer)))
    return [(first, end, words) for first, end, words, _ in found]


def _names(graph: NeuralGraph, folding: Folding, drawn: Sequence[int]) -> list[str]:
    root = root_of(folding.stacks)
    layers = {number: layer.name for number, (_, layer) in folding.layer_of.items()}
    names = [short_name(graph.groups[number], layers.get(number, ""), root) for number in drawn]
    return [name if len(name) <= 38 else "…" + name[-37:] for name in names]


def _brackets(folding: Folding, drawn: Sequence[int]) -> list[tuple[int, int, str]]:
    """(first place, last place + 1, words) of every layer that is drawn."""
    place = {number: i for i, number in enumerate(drawn)}
    found = []
    for stack in folding.stacks:
        for layer in () if stack.inner else stack.layers:
            at = sorted(place[number] for number in layer.groups if number in place)
            if at:
                found.append((at[0], at[-1] + 1, frame_words(stack, layer)))
    return sorted(found)


def _draw_fields(axes: Axes, fields: Fields, count: int, side: float) -> None:
    """Coloured squares, in stripes where there are several types; never smaller than the eye can see."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    size = max(1.0, 0.025 * count / side)
    stripes = defaultdict(list)
    for (row, column), kinds in fields.items():
        x, y = column + (1 - size) / 2, row + (1 - size) / 2
        for i, kind in enumerate(sorted(kinds)):
            stripes[kind].append(Rectangle((x + i * size / len(kinds), y), size / len(kinds), size))
    for kind, patches in sorted(stripes.items()):
        axes.add_collection(PatchCollection(patches, facecolor=TYPE_COLOURS[kind], linewidth=0, zorder=2))
    axes.set(xlim=(0, count), ylim=(count, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def _draw_segments(axes: Axes, segments: Sequence[tuple[int, int, str]], count: int) -> None:
    """A square on the diagonal for each segment, and names for as many as there is room for."""
    from matplotlib.patches import Rectangle

    for i, (first, end, _) in enumerate(segments):
        fill = "#ebebe6" if i % 2 else "#f4f4f0"
        axes.add_patch(Rectangle((first, first), end - first, end - first, color=fill, linewidth=0, zorder=0))
    line = 0.135 * count / SIDE
    ticks: list[tuple[float, str]] = []
    for first, end, name in segments:
        middle = (first + end) / 2
        if not ticks or middle - ticks[-1][0] >= line:
            ticks.append((middle, name))
    _set_ticks(axes, [at for at, _ in ticks], [name for _, name in ticks])
    edges = [first for first, _, _ in segments[1:]]
    if len(segments) * 0.06 < SIDE:
        axes.hlines(edges, 0, count, color="#dddddd", linewidth=0.4, zorder=1)
        axes.vlines(edges, 0, count, color="#dddddd", linewidth=0.4, zorder=1)


def _draw_names(axes: Axes, names: Sequence[str]) -> None:
    count = len(names)
    _set_ticks(axes, [i + 0.5 for i in range(count)], names)
    axes.hlines(range(1, count), 0, count, color="#e4e4e4", linewidth=0.4, zorder=1)
    axes.vlines(range(1, count), 0, count, color="#e4e4e4", linewidth=0.4, zorder=1)


def _set_ticks(axes: Axes, at: Sequence[float], names: Sequence[str]) -> None:
    axes.set(xticks=at, yticks=at)
    axes.set_xticklabels(names, rotation=90, fontsize=NAMES)
    axes.set_yticklabels(names, fontsize=NAMES)
    axes.tick_params(length=0, pad=3, top=True, labeltop=True, bottom=False, labelbottom=False)


def _draw_brackets(axes: Axes, brackets: Sequence[tuple[int, int, str]], count: int, cell: float) -> None:
    from matplotlib.patches import Rectangle

    for first, end, words in brackets:
        size = end - first
        axes.add_patch(Rectangle((first, first), size, size, color="#f1f1ec", linewidth=0, zorder=0))
        axes.add_patch(Rectangle((first, first), size, size, fill=False, edgecolor="#8c8c84", linewidth=1, zorder=3))
        axes.plot([count + 0.1 / cell] * 2, [first + 0.1, end - 0.1], color="#8c8c84", linewidth=1.2, clip_on=False)
        axes.text(count + 0.2 / cell, (first + end) / 2, words, fontsize=NAMES, va="center", weight="bold")


def _caption(axes: Axes, words: str) -> None:
    axes.set_xlabel(f"{words}\nrow: from, column: to", fontsize=9, labelpad=6)


def _draw_legend(figure: Figure, kinds: Sequence[EdgeType], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=TYPE_COLOURS[kind], label=type_words(kind)) for kind in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=8.5, frameon=False, borderpad=0.6)
