"""Two graphs of one model: which of our neurons is which of another graph's, and where edges hang elsewhere there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...graph import EdgeBlock, NeuralGraph, Nodes


class Wiring:
    """The other graph in terms of ours.

    Every element of a parameter is an edge of both graphs, so the ends of edges say which neurons are the same.  Large
    blocks speak first; a block that then disagrees at one end hangs elsewhere.

    Args:
        graph: ours.
        names: parameters in the order in which ``ends`` numbers their elements.
        ends: int64 [2, P], source and target of every element in the other graph.
        constants: int64 [3, C], source, target and type of the other's edges without a parameter, self loops left out.

    Attributes:
        theirs: int64 [N], the other graph's number of each of our nodes.
        rewired_edges: parameters whose edges hang elsewhere in the other graph.

    Raises:
        ValueError: the graphs differ in more than the ends of whole blocks.
    """

    def __init__(self, graph: NeuralGraph, names: Sequence[str], ends: Tensor, constants: Tensor) -> None:
        self._graph = graph
        starts, first = {}, 0
        for name in names:
            starts[name] = first
            first += torch.Size(graph.shapes[name]).numel()
        self.theirs = torch.full((graph.num_nodes,), -1)
        self._moved: dict[int, dict[str, Tensor]] = {}
        numbers = range(len(graph.blocks))
        for number in sorted(numbers, key=lambda n: (-graph.blocks[n].edges, n)):
            block = graph.blocks[number]
            self._compare(number, block, ends[:, starts[block.parameter] + block.elements()[..., 0]])
        self._compare_constants(constants)
        if bool((self.theirs < 0).any()) or len(self.theirs.unique()) < len(self.theirs):
            raise ValueError("the graphs have different neurons")
        self.rewired_edges = sum(graph.blocks[number].edges for number in self._moved)

    def graph(self) -> NeuralGraph:
        """Our graph, wired like the other."""
        blocks = list(self._graph.blocks)
        for number, sides in self._moved.items():
            blocks[number] = replace(blocks[number], **{side: self._nodes(to) for side, to in sides.items()})
        return replace(self._graph, blocks=tuple(blocks), symmetries=())

    def _compare(self, number: int, block: EdgeBlock, ends: Tensor) -> None:
        """``ends``: int64 [2, J, I]."""
        sources, targets = ends[0, :, 0], ends[1, 0]
        if not (torch.equal(ends[0], sources[:, None].expand_as(ends[0])) and (ends[1] == targets).all()):
            raise ValueError(f"the graphs differ in the edges of {block.parameter!r}")
        for side, found in (("source", sources), ("target", targets)):
            index = self._graph.node_index(getattr(block, side))
            known = self.theirs[index]
            if bool((known < 0).all()):
                self.theirs[index] = found
            elif not torch.equal(known, found):
                self._moved.setdefault(number, {})[side] = found

    def _compare_constants(self, constants: Tensor) -> None:
        source, target, kind = constants
        for edge in self._graph.constants:
            ours = [self._graph.node_index(nodes) for nodes in (edge.source, edge.target)]
            same = kind == int(edge.edge_type)
            by_target = torch.full((int(target.max()) + 1,), -1)
            by_target[target[same]] = source[same]
            found = by_target[self.theirs[ours[1]]]
            unknown = self.theirs[ours[0]] < 0
            self.theirs[ours[0][unknown]] = found[unknown]
            if not torch.equal(self.theirs[ours[0]], found):
                raise ValueError(f"the graphs differ in their {edge.edge_type.name.lower()} edges")
        if sum(edge.edges for edge in self._graph.constants) != constants.shape[1]:
            raise ValueError("the graphs have different numbers of edges without a parameter")

    def _nodes(self, theirs: Tensor) -> Nodes:
        """Our selection of neurons that have these numbers in the other graph."""
        ours = torch.empty(int(self.theirs.max()) + 1, dtype=torch.int64)
        ours[self.theirs] = torch.arange(len(self.theirs))
        index = ours[theirs]
        for group, (first, neurons) in enumerate(zip(self._graph.group_offsets, self._graph.groups, strict=True)):
            if first <= int(index[0]) < first + neurons.size:
                nodes = Nodes(group, (len(index),), (1,), int(index[0]) - first)
                if torch.equal(self._graph.node_index(nodes), index):
                    return nodes
        raise ValueError("the graphs differ in edges that hang on neurons of several groups")
