"""What becomes of proposed symmetries: accepted when the permutation test holds, else cut up, or made private."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from .structure import NeuralGraph, NeuronGroup, Nodes, Symmetry, contiguous_strides
from .verify import PermutationTest

TOLD_APART = "told apart by what uses them"
"""Why neurons are pinned that were proposed together, but of which each is used like no other."""


def verified(graph: NeuralGraph, test: PermutationTest) -> NeuralGraph:
    """The graph with refuted symmetries removed, and private neurons for groups whose single neurons were refuted.

    What is refuted as a whole may hold for neurons that the same edge blocks know (a gate and a value that one
    projection makes): such parts are tested before all is given up.
    """
    refuted = test.refuted()
    graph = dataclasses.replace(graph, report=(*graph.report, *test.remarks))
    if not test.conclusive:
        # Nothing is proven, and nothing disproven.
        return dataclasses.replace(graph, symmetries=())
    if not refuted:
        return graph
    private: set[int] = set()
    told_apart: set[int] = set()
    report = list(graph.report)
    kept = [symmetry for symmetry in graph.symmetries if symmetry not in refuted]
    for symmetry in refuted:
        cuts = (parts_by_use(graph, symmetry, apart) for apart in (False, True))
        parts = next((cut for cut in cuts if cut is not None and all(test.holds(part) for part in cut)), None)
        single = symmetry.name.startswith("neurons of")
        if parts or (parts is not None and single):
            kept += parts
            told_apart |= _groups_of(graph, symmetry)
        elif single:
            private |= _groups_of(graph, symmetry)
            report.append(f"refuted: {symmetry.name}; their parameters get private neurons")
        else:
            report.append(f"refuted: {symmetry.name}; they stay where they are")
    told_apart = told_apart.difference(*(_groups_of(graph, symmetry) for symmetry in kept))
    groups = [
        dataclasses.replace(group, pinned=group.pinned or TOLD_APART) if number in told_apart else group
        for number, group in enumerate(graph.groups)
    ]
    graph = dataclasses.replace(graph, groups=tuple(groups), symmetries=tuple(kept), report=tuple(report))
    return privatize(graph, private) if private else graph


def parts_by_use(graph: NeuralGraph, symmetry: Symmetry, apart: bool) -> list[Symmetry] | None:
    """A symmetry cut into those of its units that the same parameters know; ``None`` if it cannot be cut.

    Units that nothing else is used like are in no part.

    Args:
        apart: tell edges between the same groups apart as well, if they were recorded one by one.
    """
    generator = torch.Generator().manual_seed(0)
    numbers: dict[tuple, int] = {}
    known = torch.zeros(graph.num_nodes, dtype=torch.int64)
    for index, edges in enumerate((*graph.blocks, *graph.constants)):
        what = (getattr(edges, "parameter", None), edges.edge_type, edges.source.group, edges.target.group)
        for side, nodes in enumerate((edges.source, edges.target)):
            # The sum of random numbers tells sets of parameters apart.
            key = (*what, side, index if apart else None)
            if key not in numbers:
                numbers[key] = int(torch.randint(1, 2**62, (), generator=generator))
            known[graph.node_index(nodes)] += numbers[key]
    units = symmetry.units
    uses, use = torch.unique(known[units].flatten(0, 1), dim=0, return_inverse=True)
    parts = []
    for number in range(len(uses)):
        chosen = (use == number).view(units.shape[:2])
        counts = chosen.sum(1)
        for count in counts.unique().tolist():
            blocks = counts == count
            if count > 1:
                rows = units[blocks][chosen[blocks]].view(int(blocks.sum()), count, -1)
                parts.append(Symmetry(f"{symmetry.name}, part {len(parts) + 1}", rows))
    return parts if len(uses) > 1 else None


def _groups_of(graph: NeuralGraph, symmetry: Symmetry) -> set[int]:
    """The groups whose neurons a symmetry moves."""
    offsets = torch.tensor(graph.group_offsets)
    return set((torch.searchsorted(offsets, symmetry.units.unique(), right=True) - 1).tolist())


def privatize(graph: NeuralGraph, private: set[int]) -> NeuralGraph:
    """Take some groups apart: each block that touched them gets neurons of its own on that side."""
    groups = list(graph.groups)
    blocks = []
    for number, block in enumerate(graph.blocks):
        changes = {}
        for side in ("source", "target"):
            nodes: Nodes = getattr(block, side)
            if nodes.group in private:
                name = f"{block.parameter}[private {side} {number}]"
                groups.append(NeuronGroup(name, len(nodes), "private", "refuted by the permutation test"))
                changes[side] = Nodes(len(groups) - 1, nodes.sizes, contiguous_strides(nodes.sizes))
        blocks.append(dataclasses.replace(block, **changes))
    constants = [c for c in graph.constants if not {c.source.group, c.target.group} & private]
    symmetries = [symmetry for symmetry in graph.symmetries if not private & _groups_of(graph, symmetry)]
    return _without_empty_groups(graph, groups, blocks, constants, symmetries)


def _without_empty_groups(graph: NeuralGraph, groups, blocks, constants, symmetries) -> NeuralGraph:
    """Drop groups that nothing refers to and renumber."""
    sides = [side for edges in (*blocks, *constants) for side in (edges.source, edges.target)]
    used = sorted({side.group for side in sides})
    number = {old: new for new, old in enumerate(used)}
    sizes = [group.size for group in groups]
    old_offsets = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
    new_offsets = torch.tensor([0, *itertools.accumulate(sizes[old] for old in used)][:-1])

    def renumber(nodes: Nodes) -> Nodes:
        return dataclasses.replace(nodes, group=number[nodes.group])

    def move(symmetry: Symmetry) -> Symmetry:
        old = torch.searchsorted(old_offsets, symmetry.units, right=True) - 1
        new = torch.tensor([number.get(group, -1) for group in range(len(groups))])[old]
        return Symmetry(symmetry.name, symmetry.units - old_offsets[old] + new_offsets[new])

    return dataclasses.replace(
        graph,
        groups=tuple(groups[old] for old in used),
        blocks=tuple(dataclasses.replace(b, source=renumber(b.source), target=renumber(b.target)) for b in blocks),
        constants=tuple(
            dataclasses.replace(c, source=renumber(c.source), target=renumber(c.target)) for c in constants
        ),
        symmetries=tuple(move(symmetry) for symmetry in symmetries),
    )
