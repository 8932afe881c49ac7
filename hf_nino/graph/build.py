"""From a trace to a :class:`~hf_nino.graph.structure.NeuralGraph`: groups, blocks, constants, verified symmetries."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from .acceptance import verified
from .experts import merge_slices, pin_choosers
from .inputs import TOKENS_PER_EXPERT, split_inputs
from .provenance import ParameterUse, Record, Role
from .selections import Segment, segments
from .structure import (
    ConstantEdges,
    EdgeBlock,
    EdgeType,
    NeuralGraph,
    NeuronGroup,
    Nodes,
    contiguous_strides,
)
from .symmetry import propose
from .trace import Trace, trace
from .twin import verified_by_twin
from .verify import PermutationTest

logger = logging.get_logger(__name__)

LARGE = 300_000_000
"""Parameters beyond which a model is traced without its weights."""

ROLE_TYPES = {Role.QUERY: EdgeType.QUERY, Role.KEY: EdgeType.KEY, Role.VALUE: EdgeType.VALUE}


def build_graph(model: nn.Module, example_inputs: Any = None, *, verify: bool = True) -> NeuralGraph:
    """The neural graph of a model, from one traced forward pass.

    Args:
        model: any module; its mode, attention implementation and random state are left as they were.
        example_inputs: what one call gets: a dict of keyword arguments, a tuple of arguments, or one argument.  Made
            up when ``None`` for transformers models that take ``input_ids`` or ``pixel_values``.
        verify: test every proposed permutation on random weights (needs three more copies of the parameters, for the
            time of the test) and give private neurons to what fails.  Without it, nothing is proven.  Models on the
            meta device or with more than 300 million parameters are traced without their weights, and what holds for
            a narrow twin of them (:mod:`hf_nino.graph.twin`) counts as verified.

    Returns:
        The graph; ``graph.report`` says what is private, refuted or shared.

    Raises:
        ValueError: no example inputs, no trainable parameters, or the forward pass fails.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not trainable:
        raise ValueError(
            f"`model` must have a trainable floating-point parameter, but {type(model).__name__} has none"
        )
    sizes = [parameter.numel() for parameter in model.parameters()]
    hollow = sum(sizes) > LARGE or any(parameter.is_meta for parameter in model.parameters())
    arguments, keywords = split_inputs(model, example_inputs, 1 if hollow else TOKENS_PER_EXPERT)
    try:
        traced = trace(model, arguments, keywords, hollow)
    except Exception as error:
        raise ValueError(
            f"`model` must run on `example_inputs`, but one forward pass of {type(model).__name__} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    graph = Builder(traced, trainable, aliases(model)).graph()
    if verify and hollow:
        graph = verified_by_twin(model, graph)
    elif verify:
        graph = verified(graph, PermutationTest(model, arguments, keywords, graph))
    for line in graph.report:
        logger.info(line)
    return graph


def aliases(model: nn.Module) -> dict[str, str]:
    """Other names of tied parameters: {alias: the name that ``named_parameters()`` gives}."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            found[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return found


class Builder:
    """Turns the record of a trace into frozen data."""

    def __init__(self, traced: Trace, trainable: set[str], tied: dict[str, str]) -> None:
        self.record, self.shapes, self.trainable, self.aliases = traced.record, traced.shapes, trainable, tied
        record = self.record
        pin_choosers(record)
        merge_slices(record)
        _pin_shared(record)
        root = record.find(torch.arange(record.count)).numpy()
        used = np.zeros(record.count, dtype=bool)
        for use in record.uses:
            used[root[use.source.numpy()]] = used[root[use.target.numpy()]] = True
        self.constants = self._distinct_constants(root)
        for _, source, target in self.constants:
            used[source] = used[target] = True
        self.root = root
        self.members = np.flatnonzero(used[root])
        self.nodes = np.flatnonzero(used & (root == np.arange(record.count)))
        self._make_groups()

    def _distinct_constants(self, root: np.ndarray) -> list[tuple[EdgeType, np.ndarray, np.ndarray]]:
        seen, found = set(), []
        for edge_type, source, target in self.record.constants:
            # Neurons that were united later may pair up twice.
            pairs = np.stack([root[source.numpy()], root[target.numpy()]])
            pair = pairs[:, np.sort(np.unique(pairs, axis=1, return_index=True)[1])]
            key = (edge_type, pair[0].tobytes(), pair[1].tobytes())
            if key not in seen:
                seen.add(key)
                found.append((edge_type, *pair))
        return found

    def _make_groups(self) -> None:
        """Neurons of one origin and one use form a group: made and read by the same axes of the same parameters."""
        record = self.record
        starts = np.array([allocation.start for allocation in record.allocations], dtype=np.int64)
        families: dict[str, int] = {}
        first = [families.setdefault(a.family, i) if a.family else i for i, a in enumerate(record.allocations)]
        allocation = np.searchsorted(starts, np.arange(record.count), side="right") - 1
        rank_of = np.array([a.rank for a in record.allocations], dtype=np.int64)[allocation]
        origin = np.array(first, dtype=np.int64)[allocation] * len(Role) + record.roles(torch.arange(record.count))
        # Number the groups by their first neuron, which is the order of the forward pass.
        _, first_node, group = np.unique(self._sets(origin)[self.nodes], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first_node))
        group = rank[group]
        members = self.members[np.argsort(self.root[self.members], kind="stable")]
        begins, ends = (
            np.searchsorted(self.root[members], self.nodes[np.sort(first_node)], side=side)
            for side in ("left", "right")
        )
        signatures = [sorted(origin[members[a:b]].tolist()) for a, b in zip(begins, ends, strict=True)]
        self.group_sizes = np.bincount(group, minlength=len(signatures))
        self.group_of = np.full(record.count, -1)
        self.group_of[self.nodes] = group
        self.position = np.full(record.count, -1)
        by_group = np.lexsort((np.arange(len(group)), rank_of[self.nodes], group))
        starts_of = np.cumsum(self.group_sizes) - self.group_sizes
        self.position[self.nodes[by_group]] = np.arange(len(group)) - np.repeat(starts_of, self.group_sizes)
        self.offsets = starts_of
        self.groups = self._describe(signatures, by_group)

    def _sets(self, origin: np.ndarray) -> np.ndarray:
        """One number for what made each neuron and what parameters use it, int64 [ids]: a sum of random numbers."""
        generator = np.random.default_rng(0)
        numbers: dict[tuple, int] = {}
        total = np.zeros(self.record.count, dtype=np.int64)
        kinds, kind = np.unique(origin[self.members], return_inverse=True)
        of_kind = generator.integers(1, 2**62, len(kinds))
        np.add.at(total, self.root[self.members], of_kind[kind])
        for use in self.record.uses:
            for side in ("source", "target"):
                what = (use.parameter, use.edge_type, side)
                number = numbers.setdefault(what, int(generator.integers(1, 2**62)))
                total[np.unique(self.root[getattr(use, side).numpy()])] += number
        return total

    def _describe(self, signatures: list[list[int]], by_group: np.ndarray) -> list[NeuronGroup]:
        record = self.record
        described = []
        names: dict[str, int] = defaultdict(int)
        for number, signature in enumerate(signatures):
            made_by = [record.allocations[code // len(Role)] for code in signature]
            roles = [Role(code % len(Role)).name.lower() for code in signature if code % len(Role) != Role.PLAIN]
            name = " + ".join(dict.fromkeys(allocation.name for allocation in made_by))
            if roles:
                name += f"[{'+'.join(dict.fromkeys(roles))}]"
            names[name] += 1
            if names[name] > 1:
                name += f" ({names[name]})"
            start = self.offsets[number]
            nodes = self.nodes[by_group[start : start + self.group_sizes[number]]]
            pinned = "; ".join(record.pin_reasons_of(nodes)) or None
            described.append(NeuronGroup(name, int(self.group_sizes[number]), made_by[0].kind, pinned))
        return described

    def _places(self, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
        nodes = self.root[ids.numpy()]
        return self.group_of[nodes], self.position[nodes]

    def _node(self, ids: np.ndarray) -> np.ndarray:
        nodes = self.root[ids]
        return self.offsets[self.group_of[nodes]] + self.position[nodes]

    def _segments(self, ids: Tensor, elements: Tensor, label: np.ndarray) -> list[Segment]:
        group, position = self._places(ids)
        return segments(group, position, elements.numpy(), label)

    def _blocks_of(self, use: ParameterUse) -> list[EdgeBlock]:
        linear = use.edge_type == EdgeType.LINEAR
        no_label = np.zeros(len(use.source), dtype=np.int64)
        label = self.record.roles(use.target)
        features = use.feature_elements.numpy()
        feature_sizes, feature_strides = (), ()
        if len(features) > 1:
            step = int(features[1] - features[0])
            feature_sizes, feature_strides = (len(features),), (step,)
        blocks = []
        for number, target in enumerate(self._segments(use.target, use.target_elements, label)):
            edge_type = ROLE_TYPES.get(Role(int(label[target.start])), use.edge_type) if linear else use.edge_type
            for source in self._segments(use.source, use.source_elements, no_label):
                source = self._own_parameter_node(source, number)
                first, second = (target, source) if edge_type == EdgeType.KEY else (source, target)
                blocks.append(
                    EdgeBlock(
                        use.parameter,
                        edge_type,
                        first.nodes,
                        second.nodes,
                        first.strides,
                        second.strides,
                        feature_sizes,
                        feature_strides,
                        source.offset + target.offset,
                        use.parameter in self.trainable,
                    )
                )
        return blocks

    def _own_parameter_node(self, source: Segment, number: int) -> Segment:
        """A fused bias has one node for queries, one for keys, one for values, as three separate biases would have."""
        group = self.groups[source.nodes.group]
        if group.kind != "parameter" or number == 0:
            return source
        self.groups.append(dataclasses.replace(group, name=f"{group.name} ({number + 1})"))
        return dataclasses.replace(source, nodes=dataclasses.replace(source.nodes, group=len(self.groups) - 1))

    def _constant_edges(self) -> list[ConstantEdges]:
        found = []
        for edge_type, source, target in self.constants:
            source_group, source_position = self.group_of[source], self.position[source]
            pieces = segments(
                self.group_of[target], self.position[target], source_position, source_group, distinct=False
            )
            for piece in pieces:
                group = int(source_group[piece.start])
                found.append(
                    ConstantEdges(edge_type, Nodes(group, piece.nodes.sizes, piece.strides, piece.offset), piece.nodes)
                )
        return found

    def graph(self) -> NeuralGraph:
        """Groups, blocks, constants and proposed symmetries, with private neurons for what the trace never placed."""
        blocks = [block for use in self.record.uses for block in self._blocks_of(use)]
        report = list(dict.fromkeys(self.record.notes))
        blocks += self._private_blocks(blocks, report)
        node = self._node
        record = self.record
        together, stars = self._node_pairs(record.ties + record.repeats), self._node_pairs(record.stars)
        shared, coarse = self._node_pairs(record.shared), self._node_pairs(record.coarse)
        confined = [nodes for nodes, _ in self._node_pairs([(ids, ids) for ids in record.confined])]
        pinned = np.zeros(sum(group.size for group in self.groups), dtype=bool)
        pinned[node(self.nodes)] = record.pinned_flags(self.nodes)
        lost = np.zeros_like(pinned)
        lost[node(self.nodes)] = record.lost_flags(self.nodes)
        group_of = np.repeat(np.arange(len(self.groups)), [group.size for group in self.groups])
        pinned |= np.array([group.kind == "private" for group in self.groups])[group_of]
        names = [group.name for group in self.groups]
        on_blocks = {block.parameter for block in blocks}
        return NeuralGraph(
            groups=tuple(self.groups),
            blocks=tuple(blocks),
            constants=tuple(self._constant_edges()),
            symmetries=tuple(propose(group_of, names, pinned, together, stars, shared, coarse, confined, lost)),
            shapes={name: shape for name, shape in self.shapes.items() if name in on_blocks},
            report=tuple(report),
            aliases=self.aliases,
        )

    def _node_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of ids as nodes, without those that are not in the graph."""
        found = []
        for first, second in pairs:
            a, b = first.numpy(), second.numpy()
            known = (self.group_of[self.root[a]] >= 0) & (self.group_of[self.root[b]] >= 0)
            found.append((self._node(a[known]), self._node(b[known])))
        return found

    def _private_blocks(self, blocks: list[EdgeBlock], report: list[str]) -> list[EdgeBlock]:
        """Blocks with neurons of their own for every element of a trainable parameter that lies on no edge."""
        by_name: dict[str, list[EdgeBlock]] = defaultdict(list)
        for block in blocks:
            by_name[block.parameter].append(block)
        private = []
        for name, shape in self.shapes.items():
            if name not in self.trainable and name not in by_name:
                continue
            covered = sum(math.prod(block.shape) for block in by_name[name])
            if covered == math.prod(shape):
                continue
            free = torch.ones(math.prod(shape), dtype=torch.bool)
            for block in by_name[name]:
                free[block.elements().flatten()] = False
            boxes = rectangles(free.view(shape or (1,)))
            report.append(
                f"{name}: {int(free.sum())} of {free.numel()} elements were not reached and get private neurons"
            )
            private += [self._private_block(name, shape or (1,), box, number) for number, box in enumerate(boxes)]
        return private

    def _private_block(self, name: str, shape: tuple[int, ...], box: list[slice], number: int) -> EdgeBlock:
        """The last axis are targets, all others sources."""
        strides = contiguous_strides(shape)
        sizes = tuple(part.stop - part.start for part in box)
        sides = []
        for side, side_sizes in (("source", sizes[:-1] or (1,)), ("target", sizes[-1:])):
            reason = "not reached by the traced forward pass"
            group_name = f"{name}[private {side} {number}]"
            self.groups.append(NeuronGroup(group_name, math.prod(side_sizes), "private", reason))
            sides.append(Nodes(len(self.groups) - 1, side_sizes, contiguous_strides(side_sizes)))
        edge_type = EdgeType.LINEAR if len(shape) > 1 else EdgeType.OTHER
        return EdgeBlock(
            name, edge_type, sides[0], sides[1], strides[:-1] or (0,), strides[-1:],
            offset=sum(part.start * stride for part, stride in zip(box, strides, strict=True)),
            trainable=name in self.trainable,
        )  # fmt: skip


def _pin_shared(record: Record) -> None:
    """Elements of a parameter that only pinned neurons use (a norm before a rotary embedding) are pinned by them."""
    for element, neuron in record.shared:
        pinned = record.pinned_flags(record.find(neuron).numpy())
        elements = record.find(element)
        free = elements[torch.from_numpy(~pinned)]
        still = elements[~torch.isin(elements, free)]
        if len(still):
            record.pin(still, "of a parameter that pinned neurons share")


def rectangles(free: Tensor) -> list[list[slice]]:
    """Cut a boolean tensor's true elements into disjoint boxes."""
    free = free.clone()
    boxes = []
    while bool(free.any()):
        corner = [int(index) for index in free.nonzero()[0]]
        box = [slice(index, index + 1) for index in corner]
        for dim in reversed(range(free.dim())):
            while box[dim].stop < free.shape[dim]:
                longer = [*box]
                longer[dim] = slice(box[dim].start, box[dim].stop + 1)
                edge = [*longer]
                edge[dim] = slice(box[dim].stop, box[dim].stop + 1)
                if not bool(free[tuple(edge)].all()):
                    break
                box = longer
        free[tuple(box)] = False
        boxes.append(box)
    return boxes
