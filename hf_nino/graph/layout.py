"""Where to draw the neuron groups of a neural graph: repeated layers folded, columns by depth, rows by stream.

Pure data, no drawing; :mod:`hf_nino.graph.plot` draws it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from .positional import components
from .structure import EdgeType, NeuralGraph, NeuronGroup

Arrow = tuple[int, int, EdgeType]
"""(source group, target group, edge type)."""

_NUMBER = re.compile(r"(?<![^.\s])\d+(?![^.\s\[])")


@dataclass(frozen=True)
class Layer:
    """One of several layers that are alike: the first of them, which stands for all.

    Args:
        name: what the names of its groups begin with, such as ``"transformer.h.0"``.
        groups: numbers of its groups, those of folded layers inside it left out.
        count: how many layers it stands for, itself included.
    """

    name: str
    groups: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Layout:
    """What to draw, and where.

    Args:
        shown: numbers of the groups that are drawn, in the graph's order; nodes of parameters that are frozen are not.
        layers: layers that stand for several.
        arrows: what joins shown groups, but for joints between one layer and the next that is alike.
        wiring: what joins shown groups and all that they stand for.
        place: column (0 is the input side) and row (0 is lowest) of every shown group with neurons; groups of kind
            ``"parameter"`` have no place of their own.
    """

    shown: tuple[int, ...]
    layers: tuple[Layer, ...]
    arrows: tuple[Arrow, ...]
    wiring: tuple[Arrow, ...]
    place: dict[int, tuple[int, int]]


def layout(graph: NeuralGraph) -> Layout:
    """Fold the layers that are alike and place what is left."""
    stands_for, layers = fold(graph.groups)
    joints = list(dict.fromkeys(_joints(graph)))
    wiring = tuple(dict.fromkeys((stands_for[a], stands_for[b], kind) for a, b, kind in joints))
    arrows = tuple(dict.fromkeys(_visible(graph, joints, stands_for, layers)))
    wired = {number for arrow in wiring for number in arrow[:2]}
    boxes = [n for n, group in enumerate(graph.groups) if stands_for[n] == n and group.kind != "parameter"]
    shown = tuple(sorted({*boxes, *wired}))
    return Layout(shown, layers, arrows, wiring, place(graph, boxes, arrows, layers))


def fold(groups: tuple[NeuronGroup, ...]) -> tuple[list[int], tuple[Layer, ...]]:
    """Let the first of several layers that are alike stand for all of them.

    A layer is what shares a name up to a number, ``"transformer.h.0"``; two are alike if the rest of their groups'
    names, sizes, kinds and pinning agree.  Two layers of two or more groups (biases and gains not counted) are folded,
    and five of a single group; outer layers first, then the layers inside them.

    Returns:
        For each group the number of the one that stands for it (itself, if it is drawn), and the folded layers.
    """
    stands_for = list(range(len(groups)))
    layers: list[Layer] = []
    depth = max((len(_NUMBER.findall(group.name)) for group in groups), default=0)
    for level in range(depth):
        stacks: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, group in enumerate(groups):
            found = list(_NUMBER.finditer(group.name))
            if stands_for[number] == number and level < len(found):
                stacks[group.name[: found[level].start()]][group.name[: found[level].end()]].append(number)
        for stack in stacks.values():
            alike: dict[tuple, list[str]] = defaultdict(list)
            for name, members in stack.items():
                alike[_signature(groups, name, members)].append(name)
            for names in alike.values():
                first = stack[names[0]]
                boxes = sum(groups[number].kind != "parameter" for number in first)
                if len(names) < (2 if boxes > 1 else 5):
                    continue
                layers.append(Layer(names[0], tuple(first), len(names)))
                for name in names[1:]:
                    for number, representative in zip(stack[name], first, strict=True):
                        stands_for[number] = representative
    for number, representative in enumerate(stands_for):
        stands_for[number] = stands_for[representative]
    layers = [Layer(la.name, tuple(n for n in la.groups if stands_for[n] == n), la.count) for la in layers]
    return stands_for, tuple(layer for layer in layers if layer.groups)


def short_name(group: NeuronGroup, layer: str = "") -> str:
    """A group's name without that of its layer, what its kind says, and what its parts repeat.

    ``"h.0.mlp.gate_proj + h.0.mlp.up_proj"`` in layer ``"h.0"`` becomes ``"mlp.gate_proj + up_proj"``.
    """
    name = group.name.replace(f"{layer}.", "") if layer else group.name
    first, *others = name.replace(f"[{group.kind}]", "").split(" + ")
    shared = first[: first.rfind(".") + 1]
    return " + ".join([first, *(other.removeprefix(shared) for other in others)])


def place(
    graph: NeuralGraph, boxes: list[int], arrows: Iterable[Arrow], layers: Iterable[Layer] = ()
) -> dict[int, tuple[int, int]]:
    """Column and row of every box.

    Columns are depths: the longest way from an input, key edges taken against their direction, and loops cut.  In the
    rows the groups of a residual stream stay on one line, everything else is stacked above the stream that it reads
    and writes; head nodes stand between their channels.
    """
    heads = {number for number in boxes if graph.groups[number].kind == "head"}
    bodies = [number for number in boxes if number not in heads]
    forward: dict[int, set[int]] = {number: set() for number in bodies}
    for source, target, kind in arrows:
        if source in forward and target in forward and source != target:
            # Scores are x Wq Wk' x': keys are computed from the stream.  What repeats a kv head comes after it.
            shrinks = kind == EdgeType.RESIDUAL and graph.groups[source].size > graph.groups[target].size
            start, end = (target, source) if kind == EdgeType.KEY or shrinks else (source, target)
            forward[start].add(end)
    column = _depths(forward)
    _move_islands(forward, column, layers)
    channels: dict[int, list[int]] = {head: [] for head in heads}
    for source, target, _ in arrows:
        if source in heads and target in column:
            channels[source].append(target)
        if target in heads and source in column:
            channels[target].append(source)
    line = _stream_lines(graph, bodies, arrows)
    streams = set(line)
    for number in bodies:
        if number not in streams:
            writes = [line[end] for end in forward[number] if end in streams]
            reads = [line[start] for start in streams if number in forward[start]]
            line[number] = max(writes or reads, default=0)  # cross-attention belongs to the decoder

    stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in bodies:
        stacks[line[number], column[number]].append(number)
    for head in sorted(heads):
        if not channels[head]:
            column[head], line[head] = 0, 0
            stacks[0, 0].append(head)
            continue
        last = max(channels[head], key=lambda number: column[number])
        column[head], line[head] = column[last], line[last]
        stack = stacks[line[head], column[head]]
        stack.insert(min(stack.index(number) for number in channels[head] if number in stack) + 1, head)

    result: dict[int, tuple[int, int]] = {}
    base = 0
    for current in sorted(set(line.values())):
        mine = [column[number] for number in streams if line[number] == current]
        top = base
        for (number_of_line, at), stack in stacks.items():
            if number_of_line != current:
                continue
            row = base
            stack.sort(key=lambda number: number not in streams)
            if mine and min(mine) < at < max(mine) and stack[0] not in streams:
                row += 1  # the stream passes below
            for number in stack:
                result[number] = (at, row)
                top, row = max(top, row), row + 1
        base = top + 1
    return result


def _joints(graph: NeuralGraph) -> Iterator[Arrow]:
    for part in (*graph.trainable_blocks, *graph.constants):
        yield part.source.group, part.target.group, part.edge_type


def _signature(groups: tuple[NeuronGroup, ...], name: str, members: list[int]) -> tuple:
    return tuple(
        (groups[n].name.replace(name, "#"), groups[n].size, groups[n].kind, groups[n].pinned is None) for n in members
    )


def _visible(
    graph: NeuralGraph, joints: list[Arrow], stands_for: list[int], layers: tuple[Layer, ...]
) -> Iterator[Arrow]:
    """Joints between shown groups; of those between two layers, only the ones that lead on to a later layer."""
    first_of = {number: layer for layer in layers for number in layer.groups}  # the innermost, since it comes last
    for a, b, kind in joints:
        source, target = stands_for[a], stands_for[b]
        same_layer = first_of.get(source) is not None and first_of.get(source) is first_of.get(target)
        if same_layer and (a, b) != (source, target) and _offset(graph, a, source) != _offset(graph, b, target):
            continue
        between = source in first_of and target in first_of and not same_layer
        if between and (a, b) != (source, target) and source > target:
            continue
        yield source, target, kind


def _offset(graph: NeuralGraph, number: int, representative: int) -> list[str]:
    """The numbers in a group's name that differ from those of the group that stands for it."""
    found = _NUMBER.findall(graph.groups[number].name)
    known = _NUMBER.findall(graph.groups[representative].name)
    return [mine for mine, other in zip(found, known, strict=True) if mine != other]


def _depths(forward: dict[int, set[int]]) -> dict[int, int]:
    """Longest way from a source to each node, loops cut; sources stand next to their first target."""
    order: list[int] = []
    state: dict[int, int] = {}  # 1 open, 2 done
    kept: dict[int, list[int]] = {number: [] for number in forward}
    for root in forward:
        stack = [(root, iter(sorted(forward[root])))] if root not in state else []
        while stack:
            number, rest = stack[-1]
            state[number] = 1
            for end in rest:
                if state.get(end) != 1:
                    kept[number].append(end)
                if end not in state:
                    stack.append((end, iter(sorted(forward[end]))))
                    break
            else:
                state[number] = 2
                order.append(number)
                stack.pop()
    depth = dict.fromkeys(forward, 0)
    for number in reversed(order):
        for end in kept[number]:
            depth[end] = max(depth[end], depth[number] + 1)
    reached = {end for ends in kept.values() for end in ends}
    for number, ends in kept.items():
        if number not in reached and ends:
            depth[number] = min(depth[end] for end in ends) - 1
    return depth


def _move_islands(forward: dict[int, set[int]], column: dict[int, int], layers: Iterable[Layer]) -> None:
    """Begin what no arrow joins to the rest of its layer, such as private neurons, where the layer begins."""
    numbers = list(forward)
    position = {number: i for i, number in enumerate(numbers)}
    pairs = [(position[start], position[end]) for start in numbers for end in forward[start]]
    label = components(len(numbers), torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T).tolist()
    for layer in layers:
        parts: dict[int, list[int]] = defaultdict(list)
        for number in set(layer.groups) & set(numbers):
            parts[label[position[number]]].append(number)
        islands = [part for root, part in parts.items() if len(part) == label.count(root)]
        joined = [column[n] for part in parts.values() if part not in islands for n in part]
        for island in islands:
            for number in island:
                column[number] += min(joined, default=0)


def _stream_lines(graph: NeuralGraph, bodies: list[int], arrows: Iterable[Arrow]) -> dict[int, int]:
    """The residual stream that each group belongs to, numbered from 0; groups outside of streams are left out.

    Where a stream forks, as between an encoder and a decoder that share an embedding, the second branch is a new one.
    Matchings that repeat neurons (those of a kv head) or cover a part of a group are no streams.
    """
    whole = {
        (constant.source.group, constant.target.group)
        for constant in graph.constants
        if constant.edge_type == EdgeType.RESIDUAL
        and all(
            side.is_contiguous() and len(side) == graph.groups[side.group].size
            for side in (constant.source, constant.target)
        )
    }
    lines: dict[int, int] = {}
    continued: set[int] = set()
    count = 0
    for source, target, kind in arrows:
        if kind != EdgeType.RESIDUAL or (source, target) not in whole or not {source, target} <= set(bodies):
            continue
        if source not in lines:
            lines[source] = lines.get(target, count)
            count = max(count, lines[source] + 1)
        if target not in lines:
            lines[target] = count if source in continued else lines[source]
            count = max(count, lines[target] + 1)
        continued.add(source)
    return lines
