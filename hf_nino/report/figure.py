"""Draw charts as inline SVG, by hand: curves, marks, whiskers, bands, ticks.

Widths are in percent and heights in pixels, so a chart fills the room it has while text and marks keep their size.
Only curves are stretched, inside an SVG of their own whose strokes do not scale.  Colours come from CSS classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from .markup import Markup, element, join
from .numbers import short, ticks

# The drawing room of curves; only proportions matter.
_WIDTH = 1000.0
# More marks than this are drawn smaller.
DENSE = 40
_SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "diamond": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "down": "M-5 -4H5L0 5.5Z",
    "cross": "M-4 -4L4 4M-4 4L4 -4",
    "ring": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0Z",
    "square": "M-4.5 -4.5H4.5V4.5H-4.5Z",
}


@dataclass(frozen=True)
class Curve:
    """A line through points; ``style`` is a CSS class."""

    points: Sequence[tuple[float, float]]
    style: str
    label: str = ""


@dataclass(frozen=True)
class Mark:
    """A shape at a point, with a tooltip, and perhaps a whisker from ``low`` to ``high``."""

    x: float
    y: float
    shape: str
    style: str
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis."""

    start: float
    end: float
    style: str
    tip: str


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        name: unique on its page; for ids.
        title, description: for those who do not see it.
        x, y: (low, high) of the axes.
        x_label, y_label: what is on them, with units.
        curves, marks, bands: what is drawn, in this order from the top: marks, curves, bands.
        zero: whether to draw a line at y = 0.
        height: in pixels.
    """

    name: str
    title: str
    description: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    curves: tuple[Curve, ...] = ()
    marks: tuple[Mark, ...] = ()
    bands: tuple[Band, ...] = ()
    zero: bool = False
    height: int = 240
    legend: tuple[tuple[str, str, str], ...] = field(default=())


def draw(figure: Figure) -> Markup:
    """The chart with its axes and legend; a ``figure`` element of HTML."""
    height = figure.height

    def left(value: float) -> str:
        return f"{100 * _share(value, figure.x):.2f}%"

    def top(value: float) -> float:
        return round(height * (1 - _share(value, figure.y)), 1)

    parts = []
    for band in figure.bands:
        width = 100 * (_share(band.end, figure.x) - _share(band.start, figure.x))
        box = {"x": left(band.start), "y": 0, "width": f"{max(width, 0.1):.2f}%", "height": height}
        parts.append(element("rect", {**box, "class": band.style}, element("title", None, band.tip)))
    for tick in ticks(*figure.y):
        line = {"x1": "0%", "x2": "100%", "y1": top(tick), "y2": top(tick)}
        parts.append(element("line", {**line, "class": "zero" if figure.zero and tick == 0 else "grid"}))
        parts.append(element("text", {"x": -8, "y": top(tick) + 4, "class": "y"}, short(tick)))
    for tick in ticks(*figure.x):
        parts.append(
            element("line", {"x1": left(tick), "x2": left(tick), "y1": height, "y2": height + 4, "class": "axis"})
        )
        parts.append(element("text", {"x": left(tick), "y": height + 18, "class": "x"}, short(tick)))
    parts.append(element("line", {"x1": "0%", "x2": "100%", "y1": height, "y2": height, "class": "axis"}))
    parts.append(_curves(figure))
    parts += [_mark(mark, left(mark.x), figure, top) for mark in figure.marks]
    heading = (
        element("title", {"id": f"{figure.name}-title"}, figure.title),
        element("desc", {"id": f"{figure.name}-desc"}, figure.description),
    )
    labels = f"{figure.name}-title {figure.name}-desc"
    svg = element(
        "svg", {"class": "plot", "height": height, "role": "img", "aria-labelledby": labels}, *heading, *parts
    )
    return element(
        "figure",
        None,
        element("div", {"class": "axis-title"}, figure.y_label),
        svg,
        element("div", {"class": "axis-title below"}, figure.x_label),
        legend(figure.legend),
    )


def shape(name: str, style: str, tip: str | None, x: str, y: str | float) -> Markup:
    """A shape of fixed size at a place; ``x`` and ``y`` in percent or pixels."""
    title = [] if tip is None else [element("title", None, tip)]
    path = element("path", {"d": _SHAPES[name], "class": f"mark {style} {name}"})
    return element("svg", {"x": x, "y": y, "overflow": "visible"}, element("g", None, *title, path))


def legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """A list of (shape or ``"line"``, CSS class, words)."""
    if not entries:
        return Markup("")
    items = []
    for kind, style, words in entries:
        if kind == "line":
            key = element("line", {"x1": 0, "x2": 20, "y1": 6, "y2": 6, "class": f"curve {style}"})
        else:
            key = shape(kind, style, None, "10", 6)
        sign = element("svg", {"width": 20, "height": 12, "class": "key", "aria-hidden": "true"}, key)
        items.append(element("li", None, sign, words))
    return element("ul", {"class": "legend"}, *items)


def _curves(figure: Figure) -> Markup:
    lines = []
    for curve in figure.curves:
        at = (
            (round(_WIDTH * _share(x, figure.x), 1), round(figure.height * (1 - _share(y, figure.y)), 1))
            for x, y in curve.points
        )
        points = " ".join(f"{x:g},{y:g}" for x, y in at)
        lines.append(element("polyline", {"points": points, "class": f"curve {curve.style}"}))
    room = {"viewBox": f"0 0 {_WIDTH:g} {figure.height}", "preserveAspectRatio": "none"}
    return element("svg", {**room, "width": "100%", "height": figure.height, "class": "curves"}, *lines)


def _mark(mark: Mark, x: str, figure: Figure, top) -> Markup:
    low, high = figure.y
    parts = []
    if mark.low is not None and mark.high is not None:
        ends = [top(min(max(value, low), high)) for value in (mark.low, mark.high)]
        parts.append(
            element("line", {"x1": x, "x2": x, "y1": ends[0], "y2": ends[1], "class": f"whisker {mark.style}"})
        )
    style = f"{mark.style} dense" if len(figure.marks) > DENSE else mark.style
    parts.append(shape(mark.shape, style, mark.tip, x, top(min(max(mark.y, low), high))))
    return join(parts)


def _share(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return (value - low) / (high - low) if high > low else 0.5


def draw_path(
    name: str,
    title: str,
    description: str,
    stretches: Sequence[Curve],
    marks: Sequence[Mark],
    entries: Sequence[tuple[str, str, str]],
) -> Markup:
    """A picture in the plane, with the same scale in both directions and no axes.

    Args:
        stretches: lines; those of style ``jump ...`` are drawn above the others.
        marks: as in a :class:`Figure`.
        entries: of the legend.
    """
    xs, ys = zip(*itertools.chain.from_iterable(stretch.points for stretch in stretches), strict=True)
    box = _aspect((min(xs), max(xs)), (min(ys), max(ys)), 16 / 9)
    lines = []
    for stretch in stretches:
        at = ((1600 * _share(x, box[0]), 900 * (1 - _share(y, box[1]))) for x, y in stretch.points)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        lines.append(element("polyline", {"points": points, "class": f"curve {stretch.style}"}))
    signs = [
        shape(
            mark.shape,
            mark.style,
            mark.tip,
            f"{100 * _share(mark.x, box[0]):.2f}%",
            f"{100 - 100 * _share(mark.y, box[1]):.2f}%",
        )
        for mark in marks
    ]
    inside = element("svg", {"viewBox": "0 0 1600 900", "width": "100%", "height": "100%"}, *lines)
    svg = element(
        "svg",
        {"class": "space", "role": "img", "aria-labelledby": f"{name}-title {name}-desc"},
        element("title", {"id": f"{name}-title"}, title),
        element("desc", {"id": f"{name}-desc"}, description),
        inside,
        *signs,
    )
    return element("figure", None, svg, legend(entries))


def _aspect(
    x: tuple[float, float], y: tuple[float, float], ratio: float, room: float = 0.08
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Intervals around ``x`` and ``y``, with some room, whose lengths have that ratio."""
    width, height = (x[1] - x[0]) * (1 + 2 * room), (y[1] - y[0]) * (1 + 2 * room)
    width, height = max(width, height * ratio) or 1.0, max(height, width / ratio) or 1.0 / ratio
    middle = ((x[0] + x[1]) / 2, (y[0] + y[1]) / 2)
    return (middle[0] - width / 2, middle[0] + width / 2), (middle[1] - height / 2, middle[1] + height / 2)
