"""From a layout to lengths: how large the boxes are, where they stand, and the ways of the wires between them.

Wires leave a box on its right and enter it on its left; along the spine they run from its bottom to the next one's
top.  Between columns are *gutters*, in which they run up and down, and above each band is a *channel*, in which they
run to the sides; each wire has a track of its own in both.  A label stands above the last level stretch of its wire,
in a part of the gutter that no upright stretch uses, so that no two texts can meet.  Lengths are in inches, y grows
downwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .folding import Joint
from .layout import Layout, forward
from .structure import EdgeType, NeuralGraph
from .words import frame_words, parameter_words, root_of

Measure = Callable[[str, float], float]
"""(text, font size in points) -> its width."""

Point = tuple[float, float]

LABEL = 7.5
TITLE = 10.0
"""Font sizes of the labels of wires and of the titles of layers."""

TRACK, PORT, LEVEL = 0.11, 0.19, 0.2
"""Distance of upright tracks, of wires that enter a box, and of level tracks."""

ROOF = (-1, 0)
"""(lane, channel) of the channel above all lanes."""

ARROW, PAD = 0.13, 0.14
"""Length of an arrowhead, and what stays free around things."""


@dataclass(eq=False)
class Box:
    """A group: its centre x, its top, its size, and its text as (style, words) lines."""

    text: list[tuple[str, str]]
    width: float
    height: float
    x: float = 0.0
    top: float = 0.0

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(eq=False)
class Wire:
    """A joint on its way through tracks: ``("up", lane, gutter)`` and ``("level", lane, channel)`` take turns.

    ``start`` and ``end`` are in the order of the computation.  A wire without tracks is straight.
    """

    joint: Joint
    start: int
    end: int
    label: str = ""
    tracks: list[tuple[str, int, int]] = field(default_factory=list)
    enters: str = "left"
    points: list[Point] = field(default_factory=list)
    label_at: Point = (0.0, 0.0)


@dataclass(frozen=True)
class Frame:
    """The outline of a layer, and its title at (title_x, top)."""

    title: str
    left: float
    top: float
    right: float
    bottom: float
    title_x: float


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn of the wiring."""

    width: float
    height: float
    boxes: Mapping[int, Box]
    wires: tuple[Wire, ...]
    frames: tuple[Frame, ...]


def route(graph: NeuralGraph, layout: Layout, boxes: dict[int, Box], measure: Measure) -> Plan:
    """Place boxes of known width and height, and lay the wires between them."""
    return _Router(graph, layout, boxes, measure).plan()


class _Router:
    def __init__(self, graph: NeuralGraph, layout: Layout, boxes: dict[int, Box], measure: Measure) -> None:
        self.layout, self.boxes, self.measure = layout, boxes, measure
        self.place, self.lanes = layout.place, layout.lanes
        root = root_of(layout.folding.stacks)
        self.wires = []
        for joint in layout.joints:
            if joint.source in self.place and joint.target in self.place:
                self.wires.append(self._wire(joint, *forward(graph, joint), parameter_words(joint, root=root)))
        self.wires.sort(key=lambda wire: (wire.joint.kind != EdgeType.RESIDUAL, wire.joint.kind))
        self.straight = [w for w in self.wires if not w.tracks]
        self.left = self._ports("left")
        self.top = self._ports("top")
        self.right: dict[int, list[Wire]] = defaultdict(list)
        for wire in self.wires:
            if wire.tracks:
                self.right[wire.start].append(wire)
            if wire.enters == "right":
                self.right[wire.end].append(wire)
        for number, wires in self.right.items():
            wires.sort(key=lambda w: (w.tracks[1:] != [], self._rank(w.end if w.start == number else w.start)))

    def _wire(self, joint: Joint, start: int, end: int, label: str) -> Wire:
        (lane_a, band_a, column_a), (lane_b, band_b, column_b) = self.place[start], self.place[end]
        wire = Wire(joint, start, end, label, enters="left" if column_b else "top")
        tracks = [("up", lane_a, column_a)]
        if lane_a == lane_b:
            if column_a == column_b == 0 and band_a < band_b:
                spine = (band.columns[0] for band in self.lanes[lane_a][band_a + 1 : band_b])
                if not any(spine):
                    wire.enters = "spine"
                    return wire
            if (band_a, column_a) == (band_b, column_b):
                stack = self.lanes[lane_a][band_a].columns[column_a]
                if joint.kind == EdgeType.HEAD and abs(stack.index(start) - stack.index(end)) == 1:
                    wire.enters = "side"
                    return wire
                wire.enters, wire.label = "right", ""  # there is no room; the box says it
            elif wire.enters == "top":
                tracks += [("level", lane_a, band_b)]
            elif column_a != column_b - 1:
                tracks += [("level", lane_a, band_b), ("up", lane_b, column_b - 1)]
        else:
            near = [("level", lane_a, band_a + 1), ("up", max(lane_a, lane_b), -1)]
            far = [("level", *ROOF), ("up", lane_b, -1)]  # lanes in between have no way through
            tracks += [*(near if abs(lane_a - lane_b) == 1 else far), ("level", lane_b, band_b)]
            if wire.enters == "left":
                tracks += [("up", lane_b, column_b - 1)]
        wire.tracks = tracks
        return wire

    def _rank(self, number: int) -> tuple[int, int, int, int]:
        lane, band, column = self.place[number]
        return lane, band, self.lanes[lane][band].columns[column].index(number), column

    def _ports(self, side: str) -> dict[int, list[Wire]]:
        found: dict[int, list[Wire]] = defaultdict(list)
        for wire in self.wires:
            if wire.enters == side:
                found[wire.end].append(wire)
        for wires in found.values():
            wires.sort(key=lambda w: self._rank(w.start))
        return found

    def plan(self) -> Plan:
        for number, box in self.boxes.items():
            ports = PORT * (len(self.left[number]) + 1), 0.12 * (len(self.right[number]) + 1)
            box.height = max(box.height, *ports)
            box.width = max(box.width, 0.36 * (len(self.top[number]) + 1))
        height = self._set_heights()
        frames, width = self._set_widths()
        for wire in self.wires:
            self._draw(wire)
        return Plan(width, height, self.boxes, tuple(self.wires), tuple(frames))

    # Heights

    def _set_heights(self) -> float:
        levels: dict[tuple[int, int], list[Wire]] = defaultdict(list)
        for wire in self.wires:
            for kind, lane, channel in wire.tracks:
                if kind == "level":
                    levels[lane, channel].append(wire)
        self.level: dict[tuple[int, int, int], float] = {}  # (wire, lane, channel) -> y
        self.outlines: list[tuple[int, str, float, float]] = []
        roof = lowest = LEVEL * len(levels[ROOF])
        for i, wire in enumerate(levels[ROOF]):
            self.level[(id(wire), *ROOF)] = LEVEL * (i + 0.5)
        for lane, bands in enumerate(self.lanes):
            y, before, outline = roof, "", 0.0
            for channel, band in enumerate([*bands, None]):
                frame = band.frame if band else ""
                if frame != before:
                    if before:
                        self.outlines.append((lane, before, outline, y + PAD))
                        y += PAD + 0.1
                    if frame:
                        y, outline = y + 0.36, y + 0.06
                y = self._set_levels(y, lane, channel, levels[lane, channel])
                before = frame
                if band is None:
                    break
                bottom = y
                for stack in band.columns:
                    top = y
                    for number in stack:
                        self.boxes[number].top = top
                        top += self.boxes[number].height + 0.24
                    bottom = max(bottom, top - 0.24)
                y = bottom
            lowest = max(lowest, y)
        return lowest

    def _set_levels(self, y: float, lane: int, channel: int, wires: list[Wire]) -> float:
        """Tracks of a channel that begins at y; returns where it ends."""
        bands = self.lanes[lane]
        spine = bands[channel].columns[0] if channel < len(bands) else ()
        entering = [w for number in spine for w in self.top[number]]
        passing = [w for w in wires if w not in entering or w.tracks[-1] != ("level", lane, channel)]
        entering = [w for w in entering if w not in passing]
        straight = sum(w.end in spine and bool(w.label) for w in self.straight)
        below = 0.15 * straight if any(abs(self.place[w.start][0] - lane) for w in passing + entering) else 0.0
        least = 0.28 if 0 < channel < len(bands) else 0.06
        levels = 0.2 + LEVEL * len(wires) if wires else 0.0
        room = max(levels + below, 0.18 + 0.15 * straight if straight else 0.0, least)
        at = y + room - ARROW - 0.05 - below  # what comes from another lane passes above the labels of straight wires
        for wire in reversed(passing + entering):
            self.level[id(wire), lane, channel] = at
            at -= LEVEL
        return y + room

    # Widths

    def _set_widths(self) -> tuple[list[Frame], float]:
        uprights: dict[tuple[int, int], list[tuple[float, float, Wire, int]]] = defaultdict(list)
        for wire in self.wires:
            ys = self._heights(wire)
            for i, (kind, lane, gutter) in enumerate(wire.tracks):
                if kind == "up":
                    uprights[lane, gutter].append((ys[i], ys[i + 1], wire, i))
        self.track: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}
        count: dict[tuple[int, int], int] = defaultdict(int)
        for gutter, pieces in uprights.items():
            taken: list[list[tuple[float, float]]] = []
            for begin, end, wire, i in sorted(pieces, key=lambda piece: (-piece[1], piece[0])):
                low, high = min(begin, end) - 0.04, max(begin, end) + 0.04
                free = (t for t, ends in enumerate(taken) if all(high < a or b < low for a, b in ends))
                number = next(free, len(taken))
                taken[number : number + 1] = [[*(taken[number] if number < len(taken) else []), (low, high)]]
                self.track[id(wire), i] = gutter, number
            count[gutter] = len(taken)
        labels: dict[tuple[int, int], float] = defaultdict(float)
        for wire in self.wires:
            if wire.enters in ("left", "top"):
                lane, _, column = self.place[wire.end]
                gutter = lane, max(column - 1, 0)
                labels[gutter] = max(labels[gutter], self.measure(wire.label, LABEL))
        self.gutter: dict[tuple[int, int], float] = {}
        self.label_end: dict[tuple[int, int], float] = {}
        frames: list[Frame] = []
        titles = {la.name: frame_words(s, la) for s, la in self.layout.folding.layer_of.values()}
        x = PAD
        for lane, bands in enumerate(self.lanes):
            if lane or count[lane, -1]:
                self.gutter[lane, -1] = x + 0.2
                x += 0.4 + TRACK * count[lane, -1]
            left = x
            title_x = 0.0
            for column in range(max(len(band.columns) for band in bands)):
                members = [n for band in bands for stack in band.columns[column : column + 1] for n in stack]
                half = max((self.boxes[n].width for n in members), default=0.0) / 2
                x += max(half, self._room_left_of(members) if column == 0 else 0.0) + (PAD if column == 0 else 0)
                title_x = (x + 0.12, x - half)[column == 1] if column < 2 else title_x
                for number in members:
                    self.boxes[number].x = x
                x += half
                self.gutter[lane, column] = x + 0.1
                x += 0.1 + TRACK * count[lane, column] + 0.06
                if labels[lane, column]:
                    x += labels[lane, column] + 0.05
                self.label_end[lane, column] = x
                x += ARROW + 0.05 if labels[lane, column] or column + 1 < len(bands[0].columns) else 0.05
            mine = [outline for outline in self.outlines if outline[0] == lane]
            ends = [title_x + self.measure(titles[name], TITLE) * 1.1 + PAD for _, name, _, _ in mine]
            x = max([x, *ends])
            frames += [Frame(titles[name], left, top, x, bottom, title_x) for _, name, top, bottom in mine]
            x += PAD
        return frames, x

    def _room_left_of(self, spine: list[int]) -> float:
        """What the labels of straight wires need left of the spine."""
        room = 0.0
        for number in spine:
            wires = [wire for wire in self.straight if wire.end == number and wire.enters == "spine"]
            widest = max((self.measure(wire.label, LABEL) for wire in wires), default=0.0)
            room = max(room, widest + 0.14 * len(wires))
        return room

    # Points

    def _heights(self, wire: Wire) -> list[float]:
        """The y at which each track begins, and that of the end; level tracks lie at theirs."""
        if not wire.tracks:
            return []
        ys = [self._port(self.right, wire.start, wire)]
        for i, (kind, lane, channel) in enumerate(wire.tracks):
            if kind == "level":
                ys[i:] = [self.level[id(wire), lane, channel]] * 2
            else:
                ys.append(ys[-1])
        if wire.enters == "left":
            ys[-1] = self._port(self.left, wire.end, wire)
        elif wire.enters == "right":
            ys[-1] = self._port(self.right, wire.end, wire, last=True)
        return ys

    def _port(self, side: Mapping[int, list[Wire]], number: int, wire: Wire, last: bool = False) -> float:
        box, wires = self.boxes[number], side[number]
        start, end = self.boxes[wire.start], self.boxes[wire.end]
        alone = (
            wire.enters == "left" and len(wire.tracks) == len(self.left[wire.end]) == len(self.right[wire.start]) == 1
        )
        if alone and start.top == end.top:  # a level wire is nicer than one with a kink
            return box.top + min(start.height, end.height) / 2
        places = [i for i, other in enumerate(wires) if other is wire]
        return box.top + box.height * ((places[-1] if last else places[0]) + 1) / (len(wires) + 1)

    def _draw(self, wire: Wire) -> None:
        start, end = self.boxes[wire.start], self.boxes[wire.end]
        if wire.enters == "side":
            upper, lower = sorted((start, end), key=lambda box: box.top)
            wire.points = [(upper.x, upper.bottom), (lower.x, lower.top)]
            return
        if wire.enters == "spine":
            beside = [w for w in self.straight if w.enters == "spine" and w.end == wire.end]
            number = next(i for i, other in enumerate(beside) if other is wire)
            x = end.x - 0.14 * number
            wire.points = [(x, start.bottom), (x, end.top)]
            labelled = [w for w in beside if w.label]
            if wire.label:
                row = next(i for i, other in enumerate(labelled) if other is wire)
                wire.label_at = (end.x - 0.14 * (len(beside) - 1) - 0.06, end.top - ARROW - 0.15 * row)
            return
        ys = self._heights(wire)
        points = [(start.right, ys[0])]
        for i, (kind, *_) in enumerate(wire.tracks):
            if kind == "up":
                gutter, number = self.track[id(wire), i]
                x = self.gutter[gutter] + TRACK * number
                points += [(x, ys[i]), (x, ys[i + 1])]
        lane, _, column = self.place[wire.end]
        if wire.enters == "top":
            entering = self.top[wire.end]
            place = next(i for i, other in enumerate(entering) if other is wire)
            x = end.x + 0.18 * (place + 1)
            points += [(x, ys[-1]), (x, end.top)]
            wire.label_at = (self.label_end[lane, 0], ys[-1] - 0.03)
        elif wire.enters == "left":
            points.append((end.left, ys[-1]))
            wire.label_at = (self.label_end[lane, column - 1], ys[-1] - 0.03)
        else:
            points.append((end.right, ys[-1]))
        wire.points = points
