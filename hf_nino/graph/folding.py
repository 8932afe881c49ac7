"""Layers that repeat: which of them are alike, and what joins the few that are left when one stands for all.

A *layer* is what shares a name up to a number, ``"transformer.h.0"``; a *stack* is all that share the name before that
number.  Two layers are alike if their groups and their edges are: the same names, sizes, kinds and pinning, and the
same edge types between the same neurons.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .structure import ConstantEdges, EdgeBlock, EdgeType, NeuralGraph

_NUMBER = re.compile(r"(?<![^.\s])\d+(?![^.\s\[])")
PERIOD = 16
"""Longest pattern of alternating layers that is looked for."""


@dataclass(frozen=True)
class Layer:
    """Layers of one stack that are alike: the first of them, which stands for all.

    Args:
        names: of all of them, such as ``"transformer.h.0"``, in order.
        groups: numbers of the first one's groups, those that folding inside of it removed left out.
    """

    names: tuple[str, ...]
    groups: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def count(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Stack:
    """Numbered layers in which at least two are alike.

    Args:
        prefix: the name before the number, ``"transformer.h."``.
        layers: the kinds of layers, in the order in which they first occur.
        names: of all of its layers, in order.
        inner: whether it lies within a layer of another stack.
    """

    prefix: str
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    inner: bool

    @cached_property
    def kind_of(self) -> dict[str, int]:
        """Layer name -> which of ``layers`` it is like."""
        return {name: kind for kind, layer in enumerate(self.layers) for name in layer.names}

    def layer_name(self, name: str) -> str | None:
        """Which of its layers a group or parameter of this name belongs to."""
        if not name.startswith(self.prefix):
            return None
        digits = re.match(r"\d+", name[len(self.prefix) :])
        layer = self.prefix + digits.group() if digits else ""
        return layer if layer in self.kind_of else None

    def letter(self, layer: Layer) -> str:
        """The letter by which :meth:`pattern` calls a kind of layer; empty when there is one only."""
        number = self.layers.index(layer)
        return "" if len(self.layers) == 1 else chr(ord("A") + number) if number < 26 else f"A{number}"

    def pattern(self) -> str:
        """How the kinds follow each other: ``"A x 3, B x 58"`` or ``"(A B A B C B A B) x 4"``."""
        if len(self.layers) == 1:
            return f"\u00d7 {self.layers[0].count}"
        letters = [self.letter(self.layers[self.kind_of[name]]) for name in self.names]
        starts = [i for i in range(len(letters)) if i == 0 or letters[i] != letters[i - 1]]
        if len(starts) > 4:
            for period in range(2, min(PERIOD, len(letters) // 2) + 1):
                if all(a == b for a, b in zip(letters, letters[period:], strict=False)):
                    times, rest = divmod(len(letters), period)
                    left = f", {' '.join(letters[-rest:])}" if rest else ""
                    return f"({' '.join(letters[:period])}) \u00d7 {times}{left}"
        ends = [*starts[1:], len(letters)]
        return ", ".join(
            letters[a] + (f" \u00d7 {b - a}" if b - a > 1 else "") for a, b in zip(starts, ends, strict=True)
        )


@dataclass(frozen=True)
class Folding:
    """The groups that are drawn, and what they stand for.

    Args:
        stands_for: for each group the number of the one that stands for it (itself, if it is drawn).
        stacks: what was folded, outer stacks first.
    """

    stands_for: tuple[int, ...]
    stacks: tuple[Stack, ...]

    @cached_property
    def drawn(self) -> tuple[int, ...]:
        return tuple(n for n, representative in enumerate(self.stands_for) if n == representative)

    @cached_property
    def members(self) -> dict[int, tuple[int, ...]]:
        """Drawn group -> all groups that it stands for, itself first."""
        found: dict[int, list[int]] = defaultdict(list)
        for number, representative in enumerate(self.stands_for):
            found[representative].append(number)
        return {number: tuple(groups) for number, groups in found.items()}

    @cached_property
    def layer_of(self) -> dict[int, tuple[Stack, Layer]]:
        """Drawn group -> the layer of an outer stack that it belongs to."""
        return {n: (s, la) for s in self.stacks if not s.inner for la in s.layers for n in la.groups}

    @cached_property
    def copies(self) -> dict[int, int]:
        """Drawn group -> how many like it there are within its layer, if several."""
        found: dict[int, int] = defaultdict(lambda: 1)
        for stack in self.stacks:
            for layer in stack.layers if stack.inner else ():
                for number in layer.groups:
                    found[number] *= layer.count
        return {number: count for number, count in found.items() if count > 1}


@dataclass(frozen=True)
class Joint:
    """What joins two drawn groups: edges of one type.

    Args:
        source, target: as in the blocks.
        kind: their type.
        parameters: whose elements they are, in the layer that stands for others; none for constant edges.
        owner: name of the layer that the parameters belong to, if any.
    """

    source: int
    target: int
    kind: EdgeType
    parameters: tuple[str, ...] = ()
    owner: str = ""


def fold(graph: NeuralGraph) -> Folding:
    """Let the first of several layers that are alike stand for all of them.

    Two layers of two or more groups (nodes of biases and gains not counted) are folded, and five of a single group;
    outer stacks first, then the stacks inside the layers that are left.
    """
    groups = graph.groups
    stands_for = list(range(len(groups)))
    found: list[tuple[str, dict[str, list[int]], list[list[str]], bool]] = []
    inside: set[int] = set()
    edges_of = _edges_by_group(graph)
    for level in range(max((len(_NUMBER.findall(group.name)) for group in groups), default=0)):
        stacks: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, group in enumerate(groups):
            numerals = list(_NUMBER.finditer(group.name))
            if stands_for[number] == number and level < len(numerals):
                name = group.name[: numerals[level].end()]
                stacks[group.name[: numerals[level].start()]][name].append(number)
        folded: set[int] = set()
        for prefix, stack in stacks.items():
            stack = dict(sorted(stack.items(), key=lambda item: int(item[0][len(prefix) :])))
            alike: dict[tuple, list[str]] = defaultdict(list)
            for name, members in stack.items():
                alike[_signature(graph, edges_of, name, members)].append(name)
            kinds = []
            for names in alike.values():
                boxes = sum(groups[number].kind != "parameter" for number in stack[names[0]])
                enough = len(names) >= (2 if boxes > 1 else 5)
                kinds += [names] if enough else [[name] for name in names]
            if all(len(names) == 1 for names in kinds):
                continue
            kinds.sort(key=lambda names: list(stack).index(names[0]))
            found.append((prefix, stack, kinds, not inside.isdisjoint(next(iter(stack.values())))))
            folded |= {number for members in stack.values() for number in members}
            for first, *others in kinds:
                for name in others:
                    for number, representative in zip(stack[name], stack[first], strict=True):
                        stands_for[number] = representative
        inside |= folded
    for number, representative in enumerate(stands_for):
        stands_for[number] = stands_for[representative]
    result = []
    for prefix, stack, kinds, inner in found:
        layers = (Layer(tuple(n), tuple(g for g in stack[n[0]] if stands_for[g] == g)) for n in kinds)
        result.append(Stack(prefix, tuple(layer for layer in layers if layer.groups), tuple(stack), inner))
    return Folding(tuple(stands_for), tuple(result))


def joints(graph: NeuralGraph, folding: Folding) -> tuple[Joint, ...]:
    """What joins the drawn groups, each pair and type once.

    A layer that stands for others keeps what its own parameters lie on.  Where these lead to an earlier layer of its
    stack, they are drawn from the kind of layer that is drawn before it; what leaves the stack leaves the last kind.
    """
    place = _Places(graph, folding)
    parameters: dict[tuple[int, int, EdgeType], dict[str, None]] = defaultdict(dict)
    owners: dict[tuple[int, int, EdgeType], str] = {}
    for edges in (*graph.trainable_blocks, *graph.constants):
        owner = place.owner(edges)
        if not place.is_drawn(owner):
            continue
        key = (place.end(edges.source.group, owner), place.end(edges.target.group, owner), edges.edge_type)
        parameters[key] |= {edges.parameter: None} if isinstance(edges, EdgeBlock) else {}
        owners.setdefault(key, next((name for stack, name in owner if not stack.inner), ""))
    return tuple(Joint(*key, tuple(names), owners[key]) for key, names in parameters.items())


Owner = Sequence[tuple[Stack, str]]
"""The layers, of outer and inner stacks, that some edges belong to."""


class _Places:
    """Where the ends of edges are when layers are folded."""

    def __init__(self, graph: NeuralGraph, folding: Folding) -> None:
        self.graph, self.folding = graph, folding
        self.outer: dict[int, tuple[Stack, str]] = {}
        for stack in folding.stacks:
            if not stack.inner:
                for number, group in enumerate(graph.groups):
                    name = stack.layer_name(group.name)
                    if name is not None:
                        self.outer[number] = stack, name
        self.exits: dict[tuple[str, int], set[int]] = defaultdict(set)
        for edges in (*graph.trainable_blocks, *graph.constants):
            names = {name for _, name in self.owner(edges)}
            for number in (edges.source.group, edges.target.group):
                if number in self.outer and self.outer[number][1] not in names:
                    stack, name = self.outer[number]
                    self.exits[stack.prefix, stack.kind_of[name]].add(folding.stands_for[number])

    def owner(self, edges: EdgeBlock | ConstantEdges) -> Owner:
        """The layers that a parameter is named after, or that constant edges lead to."""
        target = self.graph.groups[edges.target.group].name
        name = edges.parameter if isinstance(edges, EdgeBlock) else target
        layers = ((stack, stack.layer_name(name)) for stack in self.folding.stacks)
        return [(stack, layer) for stack, layer in layers if layer is not None]

    def is_drawn(self, owner: Owner) -> bool:
        return all(stack.layers[stack.kind_of[name]].name == name for stack, name in owner)

    def end(self, number: int, owner: Owner) -> int:
        """The drawn group at which an edge of these layers ends that ends at ``number``."""
        drawn = self.folding.stands_for[number]
        if number not in self.outer:
            return drawn
        stack, name = self.outer[number]
        mine = next((other for its, other in owner if its is stack), None)
        before = len(stack.layers) - 1 if mine is None else stack.kind_of[mine] - 1
        if mine == name or before < 0 or stack.kind_of[name] == before:
            return drawn
        if drawn not in self.exits[stack.prefix, stack.kind_of[name]]:
            return drawn
        groups = self.graph.groups
        alike = [
            other
            for other in self.exits[stack.prefix, before]
            if (groups[other].size, groups[other].kind) == (groups[drawn].size, groups[drawn].kind)
        ]
        return alike[0] if len(alike) == 1 else drawn


Edges = EdgeBlock | ConstantEdges


def _edges_by_group(graph: NeuralGraph) -> list[list[Edges]]:
    found: list[list[Edges]] = [[] for _ in graph.groups]
    for edges in (*graph.blocks, *graph.constants):
        for number in {edges.source.group, edges.target.group}:
            found[number].append(edges)
    return found


def _signature(graph: NeuralGraph, edges_of: Sequence[Sequence[Edges]], name: str, members: Sequence[int]) -> tuple:
    """What a layer has in common with those that are like it."""
    itself = re.compile(re.escape(name) + r"(?!\d)")
    mine = set(members)

    def end(number: int) -> tuple:
        group = graph.groups[number]
        return (itself.sub("#", group.name) if number in mine else "", group.size, group.kind)

    edges: Iterable[Edges] = {id(e): e for number in members for e in edges_of[number]}.values()
    joined = []
    for e in edges:
        between = (int(e.edge_type), end(e.source.group), end(e.target.group), len(e.source), len(e.target))
        if isinstance(e, EdgeBlock):
            if itself.match(e.parameter):
                joined.append((itself.sub("#", e.parameter), *between, e.shape[2], e.trainable))
        elif e.target.group in mine:
            joined.append(("", *between, 1, True))
    groups = [graph.groups[n] for n in members]
    return (
        tuple((itself.sub("#", group.name), group.size, group.kind, group.pinned) for group in groups),
        tuple(sorted(joined)),
    )
