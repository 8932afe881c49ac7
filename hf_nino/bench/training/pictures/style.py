"""What the pictures share: colours that the colour-blind can tell apart, who goes with whom, labels at lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....graph.style import new_figure, text_width
from ..plan import BASELINE
from ..summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
PLAIN = "#4d4d4d"
FAINT = "#d9d9d9"
# Okabe and Ito's, without yellow, which is too pale for a line on white.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c6d31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LEADER = {"shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
NOWCAST_GROUP = "adamw"
OTHER_GROUP = "others"


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in all pictures."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Group:
    """Methods that share a panel, AdamW in each.

    Args:
        name: for file names.
        title: for panels.
        methods: AdamW first, if it was run.
    """

    name: str
    title: str
    methods: tuple[str, ...]


def groups(summary: Summary) -> list[Group]:
    """Nowcasts on AdamW; other optimizers and averages; for every other base, it and the nowcasts on it."""
    methods = summary.methods
    plain = (BASELINE,) if BASELINE in methods else ()
    bases = list(dict.fromkeys(info.base for info in methods.values() if info.base not in (None, BASELINE)))
    others = [name for name, info in methods.items() if info.base is None and name not in (BASELINE, *bases)]
    found = [Group(NOWCAST_GROUP, "nowcasts on AdamW", (*plain, *summary.nowcasters))]
    found += [Group(OTHER_GROUP, "other ways to train", (*plain, *others))] if others else []
    for base in bases:
        on_it = [name for name, info in methods.items() if info.base == base]
        title = methods[base].title if base in methods else str(base)
        own = (base,) if base in methods else ()
        found.append(Group(str(base), f"nowcasts on {title}", (*plain, *own, *on_it)))
    return [group for group in found if group.methods != plain] or [Group(NOWCAST_GROUP, "", plain)]


def looks(summary: Summary) -> Mapping[str, Look]:
    """Of every method: grey for AdamW, else by its place in its group."""
    found = {BASELINE: Look(PLAIN, "o")}
    for group in groups(summary):
        members = [name for name in group.methods if name != BASELINE]
        for i, name in enumerate(members):
            found[name] = Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    return found


def blank(width: float, height: float) -> Figure:
    """An empty figure of that many inches that arranges its parts itself.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        figure = new_figure(width, height)
    except ImportError as error:
        raise ImportError("the benchmark's pictures need matplotlib; run `pip install hf_nino[plot]`") from error
    figure.set_layout_engine("constrained")
    return figure


def tidy(axes: Axes) -> None:
    """No box, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def wrapped(text: str, width: float, size: float) -> str:
    """Lines of words that are at most so many inches wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def spread_out(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions moved as little as keeps them ``gap`` apart and, where there is room, between ``low`` and ``high``; in
    the order given, and never past each other."""
    if not positions:
        return []
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # Clusters of labels that touch: [sum of where its first would like to be, how many]; neighbours merge.
    clusters: list[list[float]] = []
    for rank, i in enumerate(order):
        clusters.append([positions[i] - gap * rank, 1])
        while len(clusters) > 1 and clusters[-2][0] / clusters[-2][1] > clusters[-1][0] / clusters[-1][1]:
            total, count = clusters.pop()
            clusters[-1][0] += total
            clusters[-1][1] += count
    starts = [total / count for total, count in clusters for _ in range(int(count))]
    limits = low, high - gap * (len(positions) - 1)
    moved = [0.0] * len(positions)
    for rank, i in enumerate(order):
        moved[i] = min(max(starts[rank], limits[0]), limits[1]) + gap * rank
    return moved


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], height: float, size: float = 9) -> None:
    """Names right of the axes, at the height where lines end, apart from each other.

    Args:
        ends: (y in data units, text, colour); a y beyond the axes is labelled at their edge.
        height: of the axes in inches, about.
    """
    low, high = axes.get_ylim()
    heights = [min(max((y - low) / (high - low), 0.0), 1.0) for y, _, _ in ends]
    for at, place, (_, text, colour) in zip(
        heights, spread_out(heights, 1.25 * size / 72 / height), ends, strict=True
    ):
        axes.annotate(
            text,
            (1.0, at),
            xytext=(1.035, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7} | LEADER,
        )
