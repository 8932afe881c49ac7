"""Where to draw the neuron groups of a neural graph: lanes, bands and columns.

Pure data, no drawing; :mod:`hf_nino.graph.routing` turns it into lengths and :mod:`hf_nino.graph.diagram` draws it.

Computation runs down a *spine*: the groups that all of it passes through, such as the places of a residual stream.
What lies between two of them is to the right of the spine, in columns from left to right.  Networks that run side by
side, such as an encoder and a decoder, have a *lane* each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .folding import Folding, Joint, fold, joints
from .positional import components
from .structure import EdgeType, NeuralGraph


@dataclass(frozen=True)
class Band:
    """Groups at one height of one lane, all inside or all outside of one layer.

    Args:
        columns: from left to right, the groups of each from top to bottom; column 0 has the spine.
        frame: name of the layer, ``""`` outside of layers.
    """

    columns: tuple[tuple[int, ...], ...]
    frame: str = ""


@dataclass(frozen=True)
class Layout:
    """What to draw, and where.

    Args:
        folding: which group stands for which.
        joints: what joins the drawn groups.
        lanes: from left to right, the bands of each from top to bottom.
    """

    folding: Folding
    joints: tuple[Joint, ...]
    lanes: tuple[tuple[Band, ...], ...]

    @cached_property
    def place(self) -> dict[int, tuple[int, int, int]]:
        """Lane, band and column of every drawn group, but for the nodes of biases and gains."""
        return {
            number: (lane, band, column)
            for lane, bands in enumerate(self.lanes)
            for band, content in enumerate(bands)
            for column, stack in enumerate(content.columns)
            for number in stack
        }


def layout(graph: NeuralGraph) -> Layout:
    """Fold the layers that are alike and place what is left."""
    folding = fold(graph)
    found = joints(graph, folding)
    edges = (*graph.trainable_blocks, *graph.constants)
    # What only leads to layers that are not drawn, such as an input for each layer, is not drawn either.
    hidden = {side.group for e in edges for side in (e.source, e.target)} - {
        n for j in found for n in (j.source, j.target)
    }
    boxes = [n for n in folding.drawn if graph.groups[n].kind != "parameter" and n not in hidden]
    frames = {number: layer.name for number, (_, layer) in folding.layer_of.items()}
    return Layout(folding, found, _lanes(graph, boxes, found, frames | _guests(graph, boxes, found, frames)))


def _guests(
    graph: NeuralGraph, boxes: Sequence[int], found: Iterable[Joint], frames: Mapping[int, str]
) -> dict[int, str]:
    """Inputs that are read within one layer only, and the layer."""
    readers: dict[int, set[str]] = defaultdict(set)
    for joint in found:
        start, end = forward(graph, joint)
        readers[start].add(frames.get(end, ""))
        readers[end] |= {""} if start in boxes else set()
    return {
        n: next(iter(readers[n])) for n in boxes if n not in frames and len(readers[n]) == 1 and "" not in readers[n]
    }


def forward(graph: NeuralGraph, joint: Joint) -> tuple[int, int]:
    """The ends of a joint in the order of the computation.

    Scores are x Wq Wk' x', so keys are computed from the stream; and what repeats a key/value head comes after it.
    """
    shrinks = joint.kind == EdgeType.RESIDUAL and graph.groups[joint.source].size > graph.groups[joint.target].size
    turned = joint.kind == EdgeType.KEY or shrinks
    return (joint.target, joint.source) if turned else (joint.source, joint.target)


def _lanes(
    graph: NeuralGraph, boxes: Sequence[int], found: Iterable[Joint], frames: Mapping[int, str]
) -> tuple[tuple[Band, ...], ...]:
    heads = _heads(graph, boxes, found)
    bodies = [number for number in boxes if number not in heads]
    after: dict[int, set[int]] = {number: set() for number in bodies}
    for joint in found:
        start, end = forward(graph, joint)
        if start in after and end in after and start != end:
            after[start].add(end)
    depth = _depths(after)
    _move_islands(after, depth, frames)
    members = _members_of_heads(heads, found, depth)
    feeds = {j.source: j.target for j in found if j.target in heads and j.source in after and not after[j.source]}
    for source, head in feeds.items():  # a table of one value for each head
        depth[source] = min((depth[number] for number in members[head]), default=1) - 1
    lane_of = _lane_numbers(graph, bodies, after, depth, members, found)
    for number in sorted(bodies, key=lambda n: -depth[n]):
        ends = [depth[end] for end in after[number] if lane_of[end] == lane_of[number]]
        starts = [start for start in bodies if number in after[start] and lane_of[start] == lane_of[number]]
        if ends and not starts:  # what reads another lane only
            depth[number] = min(ends) - 1
    for source, head in feeds.items():
        lane_of[source] = max((lane_of[number] for number in members[head]), default=lane_of[source])
    for head in heads:
        near = [n for n in members[head] if frames.get(n) == frames.get(head)] or members[head]
        last = max(near, key=lambda n: (depth[n], lane_of[n]), default=None)
        depth[head], lane_of[head] = (depth[last], lane_of[last]) if last is not None else (0, 0)
    forks = {
        (j.source, j.target) for j in found if j.kind == EdgeType.RESIDUAL and {j.source, j.target} <= set(bodies)
    }
    result = []
    for lane in sorted(set(lane_of.values())):
        mine = [number for number in bodies if lane_of[number] == lane]
        own_heads = {head: members[head] for head in sorted(heads) if lane_of[head] == lane}
        aside = {n for n in mine if n in feeds or graph.groups[n].kind == "private"}
        spine = _spine(mine, aside, after, depth, forks)
        result.append(tuple(_bands(mine, spine, own_heads, after, depth, frames)))
    return tuple(result)


def _heads(graph: NeuralGraph, boxes: Sequence[int], found: Iterable[Joint]) -> set[int]:
    """Groups that only hold channels together: heads, but not the experts, whose router reads the stream."""
    reads: dict[int, set[int]] = defaultdict(set)
    stars: set[int] = set()
    for joint in found:
        if joint.kind == EdgeType.HEAD:
            stars.add(joint.source)
        else:
            start, end = forward(graph, joint)
            reads[end].add(start)
    boxes_read = {number: reads[number] & set(boxes) - {number} for number in boxes}
    tables = {number for number, found in boxes_read.items() if not found}
    return {n for n in boxes if graph.groups[n].kind == "head" or (n in stars and boxes_read[n] <= tables)}


def _members_of_heads(heads: set[int], found: Iterable[Joint], depth: Mapping[int, int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {head: [] for head in heads}
    for joint in found:
        for head, other in ((joint.source, joint.target), (joint.target, joint.source)):
            if head in heads and other in depth and joint.kind == EdgeType.HEAD:
                members[head].append(other)
    return members


def _bands(
    mine: Sequence[int],
    spine: Sequence[int],
    heads: Mapping[int, list[int]],
    after: Mapping[int, set[int]],
    depth: Mapping[int, int],
    frames: Mapping[int, str],
) -> Iterable[Band]:
    """Cut a lane at its spine; each piece is a band, two where a layer begins or ends in between."""
    reach = _reach(mine, after, depth)
    beside: dict[int, list[int]] = {number: [] for number in (-1, *spine)}
    for number in mine:
        if number not in spine:
            above = [s for s in spine if number in reach[s]] or [s for s in spine if depth[s] <= depth[number]]
            beside[above[-1] if above else -1].append(number)
    for head, channels in heads.items():
        home = next((s for s, others in beside.items() if set(channels) & set(others)), spine[-1] if spine else -1)
        beside[home].append(head)
    for start, others in beside.items():
        pieces: dict[str, list[int]] = defaultdict(list)
        if start >= 0:
            pieces[frames.get(start, "")] = []
        for number in sorted(others, key=lambda n: (depth[n], n)):
            pieces[frames.get(number, "")].append(number)
        first = depth[start] if start >= 0 else min((depth[n] for n in others), default=0) - 1
        for frame, numbers in pieces.items():
            columns: dict[int, list[int]] = defaultdict(list)
            if start >= 0 and frame == frames.get(start, ""):
                columns[0] = [start]
            for number in numbers:
                if number not in heads:
                    columns[max(1, depth[number] - first)].append(number)
            for head in (number for number in numbers if number in heads):
                _insert_head(columns, head, heads[head], max(1, depth[head] - first))
            if columns:
                used = sorted({0, *columns})
                yield Band(tuple(tuple(columns[column]) for column in used), frame)


def _insert_head(columns: dict[int, list[int]], head: int, channels: Sequence[int], column: int) -> None:
    """Between its channels, where they are in one column."""
    stack = columns[column]
    places = [stack.index(channel) for channel in channels if channel in stack]
    stack.insert(min(places) + 1 if places else len(stack), head)


def _reach(mine: Sequence[int], after: Mapping[int, set[int]], depth: Mapping[int, int]) -> dict[int, set[int]]:
    """What comes after each group, on any way within the lane that leads to ever greater depth."""
    reach: dict[int, set[int]] = {number: set() for number in mine}
    for number in sorted(mine, key=lambda n: -depth[n]):
        for end in after[number]:
            if end in reach and depth[end] > depth[number]:
                reach[number] |= {end} | reach[end]
    return reach


def _spine(
    mine: Sequence[int],
    aside: set[int],
    after: Mapping[int, set[int]],
    depth: Mapping[int, int],
    forks: set[tuple[int, int]],
) -> list[int]:
    """Groups of one lane that no edge passes by, nor a stream from another lane: one for each depth, in order."""
    reach = _reach(mine, after, depth)
    edges = [(start, end) for start in mine for end in after[start] & reach.keys()]
    edges += [(start, end) for start, end in forks if end in reach]
    passed = {at for start, end in edges for at in range(depth[start] + 1, depth[end])}
    before: dict[int, int] = dict.fromkeys(mine, 0)
    for number in mine:
        for end in reach[number]:
            before[end] += 1
    found: dict[int, int] = {}
    for number in mine:
        at = depth[number]
        if at in passed or number in aside:
            continue
        if at not in found or before[number] + len(reach[number]) > before[found[at]] + len(reach[found[at]]):
            found[at] = number
    return [found[at] for at in sorted(found)]


def _lane_numbers(
    graph: NeuralGraph,
    bodies: Sequence[int],
    after: Mapping[int, set[int]],
    depth: Mapping[int, int],
    members: Mapping[int, list[int]],
    found: Iterable[Joint],
) -> dict[int, int]:
    """The lane of every group: residual streams that overlap in depth are apart, those that follow each other not."""
    streams = _stream_lines(graph, bodies, found)
    reach = _reach(bodies, after, depth)
    leads = {(streams[a], streams[b]) for a in streams for b in reach[a] & streams.keys()}
    # What leaves a stream and comes back to it is no stream of its own.
    home: dict[int, int] = {}
    for current in sorted(set(streams.values())):
        home[current] = min((home[a] for a in home if {(a, current), (current, a)} <= leads), default=current)
    line = {number: home[current] for number, current in streams.items()}
    for number in sorted(bodies, key=lambda n: -depth[n]):
        writes = [line[end] for end in after[number] if end in line]
        if number not in line and writes:
            line[number] = max(writes)  # cross-attention belongs to the decoder
    for channels in members.values():  # queries and keys are read by nothing; values are
        known = [line[number] for number in channels if number in line]
        line |= {number: max(known) for number in channels if number not in line and known}
    for number in sorted(bodies, key=lambda n: depth[n]):
        reads = [line[start] for start in bodies if number in after[start] and start in line]
        above = max((n for n in line if depth[n] < depth[number]), key=lambda n: depth[n], default=None)
        line.setdefault(number, max(reads, default=0 if above is None else line[above]))
    spans: dict[int, tuple[int, int]] = {}
    for number in bodies:
        low, high = spans.get(line[number], (depth[number], depth[number]))
        spans[line[number]] = min(low, depth[number]), max(high, depth[number])
    lanes: list[int] = []  # the last depth that each lane has so far
    lane_of_line = {}
    for current in sorted(spans):
        low, high = spans[current]
        lane = max((lane for lane, end in enumerate(lanes) if end < low), default=len(lanes))
        lanes[lane : lane + 1] = [high]
        lane_of_line[current] = lane
    return {number: lane_of_line[line[number]] for number in bodies}


def _depths(after: Mapping[int, set[int]]) -> dict[int, int]:
    """Longest way from a source to each node, loops cut; sources and what reads only them come as late as can be."""
    order: list[int] = []
    state: dict[int, int] = {}  # 1 open, 2 done
    kept: dict[int, list[int]] = {number: [] for number in after}
    for root in after:
        stack = [(root, iter(sorted(after[root])))] if root not in state else []
        while stack:
            number, rest = stack[-1]
            state[number] = 1
            for end in rest:
                if state.get(end) != 1:
                    kept[number].append(end)
                if end not in state:
                    stack.append((end, iter(sorted(after[end]))))
                    break
            else:
                state[number] = 2
                order.append(number)
                stack.pop()
    depth = dict.fromkeys(after, 0)
    for number in reversed(order):
        for end in kept[number]:
            depth[end] = max(depth[end], depth[number] + 1)
    before: dict[int, list[int]] = {number: [] for number in after}
    for number, ends in kept.items():
        for end in ends:
            before[end].append(number)
    late = [number for number in after if before[number] and not any(before[start] for start in before[number])]
    sources = [number for number in after if not before[number]]
    for number in [*sorted(late, key=lambda n: -depth[n]), *sources]:
        if kept[number]:
            depth[number] = min(depth[end] for end in kept[number]) - 1
    return depth


def _move_islands(after: Mapping[int, set[int]], depth: dict[int, int], frames: Mapping[int, str]) -> None:
    """Begin what no joint ties to the rest of its layer, such as private neurons, where the layer begins.

    Outside of layers, what is not joined to what comes before it begins where that ends.
    """
    numbers = sorted(after)
    position = {number: i for i, number in enumerate(numbers)}
    pairs = [(position[start], position[end]) for start in numbers for end in after[start]]
    label = components(len(numbers), torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T).tolist()
    parts: dict[int, list[int]] = defaultdict(list)
    for number, part in zip(numbers, label, strict=True):
        parts[part].append(number)
    for part in parts.values():
        frame = frames.get(part[0], "")
        if frame and all(frames.get(number) == frame for number in part):
            before = [
                n
                for n in numbers
                if frames.get(n) == frame and n not in part and len(parts[label[position[n]]]) > len(part)
            ]
            shift = min((depth[n] for n in before), default=0)
        else:
            shift = max((depth[n] + 1 for other in parts.values() if other[-1] < part[0] for n in other), default=0)
        shift -= min(depth[number] for number in part)
        for number in part:
            depth[number] += max(shift, 0)


def _stream_lines(graph: NeuralGraph, bodies: Sequence[int], found: Iterable[Joint]) -> dict[int, int]:
    """The residual stream that each group belongs to, numbered from 0; groups outside of streams are left out.

    Where a stream forks, as between an encoder and a decoder that share an embedding, the second branch is a new one.
    Matchings that repeat neurons (those of a kv head) are no streams.
    """
    lines: dict[int, int] = {}
    continued: set[int] = set()
    count = 0
    for joint in found:
        source, target = joint.source, joint.target
        same = graph.groups[source].size == graph.groups[target].size
        if joint.kind != EdgeType.RESIDUAL or not same or not {source, target} <= set(bodies):
            continue
        if source not in lines:
            lines[source] = lines.get(target, count)
            count = max(count, lines[source] + 1)
        if target not in lines:
            lines[target] = count if source in continued else lines[source]
            count = max(count, lines[target] + 1)
        continued.add(source)
    return lines
