"""The neural graph as frozen data: groups of neurons, blocks of edges, constant edges, symmetries.

Nothing here knows ``torch.nn``.  Everything else (PyG data, positional encoding, pictures, permutations, the
streaming engine) is derived from a :class:`NeuralGraph`.

Shape letters: N nodes, E edges, J source nodes and I target nodes of a block, F features per edge (kernel taps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor


class EdgeType(IntEnum):
    """Edge types with the numbers of the original release, which its checkpoints' type embeddings are indexed by."""

    LINEAR = 1
    OTHER = 2
    CONVOLUTION = 3
    NORM = 4
    TOKEN_EMBEDDING = 5
    POSITION_EMBEDDING = 6
    QUERY = 7
    KEY = 8
    VALUE = 9
    RESIDUAL = 10
    HEAD = 11
    SELF_LOOP = 13


SELF_LOOP_VALUE = 2.0
"""Constant value of every self loop; residual and head edges carry 1 (original release)."""


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one axis at one place of the network.

    Args:
        name: unique and readable, such as ``"transformer.h.0.mlp.c_fc"``.
        size: number of neurons.
        kind: ``"neuron"``, ``"input"``, ``"row"`` (tokens, positions), ``"head"``, ``"parameter"`` (the one node that
            a bias or a norm gain hangs on) or ``"private"`` (belongs to one axis of one parameter, because no rule
            could place it or the permutation test refuted it).
        pinned: why some or all of its neurons have an identity of their own; ``None`` when all are interchangeable.
    """

    name: str
    size: int
    kind: str = "neuron"
    pinned: str | None = None


@dataclass(frozen=True)
class Nodes:
    """An ordered selection of neurons of one group: ``offset + sum_f index_f * strides[f]``, row-major over ``sizes``.

    A stride of 0 repeats neurons, which is how one head node meets all of its channels.
    """

    group: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def all(cls, group: int, size: int) -> Nodes:
        return cls(group, (size,), (1,))

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def index(self) -> Tensor:
        """Positions within the group, int64 of shape [len(self)]."""
        return strided_index(self.sizes, self.strides, self.offset).flatten()

    def last(self) -> int:
        """The largest position within the group that is selected."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True) if s > 0)

    def is_contiguous(self) -> bool:
        """Whether the selection is a plain slice of the group."""
        return contiguous_strides(self.sizes) == self.strides


@dataclass(frozen=True)
class EdgeBlock:
    """All edges of one parameter, or of one slice of it: every source neuron to every target neuron.

    The parameter, flattened in row-major order, is seen as ``[J, I, F]``; the element of source j, target i and
    feature f is ``offset + source_strides . j + target_strides . i + feature_strides . f`` with j, i and f as
    multi-indices over ``source.sizes``, ``target.sizes`` and ``feature_sizes``.

    Args:
        parameter: name in ``model.named_parameters()`` (or a buffer's name when ``trainable`` is false).
        edge_type: see :class:`EdgeType`.
        source, target: the neurons of both sides.
        source_strides, target_strides, feature_strides: element strides of each factor.
        feature_sizes: kernel taps; empty for one feature per edge.
        offset: flat index of the first element.
        trainable: frozen blocks are part of the function, and so of every permutation, but are no edges of the graph.
    """

    parameter: str
    edge_type: EdgeType
    source: Nodes
    target: Nodes
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    feature_sizes: tuple[int, ...] = ()
    feature_strides: tuple[int, ...] = ()
    offset: int = 0
    trainable: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """(J, I, F)."""
        return len(self.source), len(self.target), math.prod(self.feature_sizes)

    @property
    def edges(self) -> int:
        return len(self.source) * len(self.target)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.source.sizes + self.target.sizes + self.feature_sizes

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.source_strides + self.target_strides + self.feature_strides

    def view(self, parameter: Tensor) -> Tensor:
        """The block's elements as [J, I, F]; a view of the (contiguous) parameter wherever strides allow it."""
        flat = parameter.contiguous().view(-1)
        block = flat.as_strided(self._sizes, self._strides, flat.storage_offset() + self.offset)
        return block.reshape(self.shape)

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy values of shape [J, I, F] into the block's elements of a contiguous parameter, in place."""
        if not parameter.is_contiguous():
            raise ValueError(
                f"`parameter` must be contiguous to be written in place, got strides {parameter.stride()}"
            )
        flat = parameter.view(-1)
        block = flat.as_strided(self._sizes, self._strides, flat.storage_offset() + self.offset)
        block.copy_(values.reshape(self._sizes))

    def elements(self) -> Tensor:
        """Flat indices into the parameter, int64 of shape [J, I, F]."""
        return strided_index(self._sizes, self._strides, self.offset).reshape(self.shape)


@dataclass(frozen=True)
class ConstantEdges:
    """Edges without a parameter, pairing ``source`` and ``target`` element by element.

    A *matching* pairs two groups of the same size (residual connections, repeats of a kv head); a *star* joins each
    head node to its channels.
    """

    edge_type: EdgeType
    source: Nodes
    target: Nodes
    value: float = 1.0

    @property
    def edges(self) -> int:
        return len(self.source)


@dataclass(frozen=True, eq=False)
class Symmetry:
    """Neurons that may change places without changing the network's function.

    ``units`` is an int64 tensor of shape [blocks, units, nodes]: within each block the units may be permuted freely,
    and a unit moves with all of its nodes.  For a residual stream a unit is one channel at all depths; for heads a
    unit is a head with all of its channels.
    """

    name: str
    units: Tensor

    def permutation(self, num_nodes: int, generator: torch.Generator | None = None, move_all: bool = False) -> Tensor:
        """A random member: int64 [N], node n takes the place of node ``permutation[n]``.

        With ``move_all`` it is a random cycle through all units of each block, so that none stays where it is.
        """
        blocks, units, _ = self.units.shape
        order = torch.rand(blocks, units, generator=generator).argsort(dim=1)
        if move_all:
            order = torch.empty_like(order).scatter_(1, order, order.roll(1, dims=1))
        moved = self.units.gather(1, order[:, :, None].expand_as(self.units))
        permutation = torch.arange(num_nodes)
        permutation[self.units.flatten()] = moved.flatten()
        return permutation


@dataclass(frozen=True, eq=False)
class NeuralGraph:
    """A network as a graph: neurons are nodes, parameters are edges (Knyazev et al., ICLR 2025, section 3).

    Invariants, checked at construction: every element of every trainable parameter lies on exactly one edge; node
    selections stay within their groups; sizes agree; names are unique; symmetries name existing nodes.  Every node has
    one self loop, which is not listed.

    Args:
        groups: node n of group g is node ``group_offsets[g] + n`` of the graph.
        blocks: edges that are parameters (and, not trainable, parameters and buffers that only take part in
            permutations).
        constants: edges without a parameter.
        symmetries: verified permutations.
        shapes: shape of every parameter that a block refers to.
        report: one line per thing a person should know (refuted proposals, unplaced parameters, tied weights).

    Raises:
        ValueError: an invariant does not hold; the message names the parameter or group.
    """

    groups: tuple[NeuronGroup, ...]
    blocks: tuple[EdgeBlock, ...]
    constants: tuple[ConstantEdges, ...]
    symmetries: tuple[Symmetry, ...]
    shapes: Mapping[str, tuple[int, ...]]
    report: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names under which a state dict holds the same tensor (tied weights): alias -> parameter."""

    def __post_init__(self) -> None:
        from .validation import validate

        validate(self)

    @classmethod
    def from_model(cls, model, example_inputs=None, *, verify: bool = True) -> NeuralGraph:
        """The neural graph of a module, from one traced forward pass; see :func:`hf_nino.graph.build.build_graph`.

        ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` are looked through: parameters have the
        names that they have in the model inside.
        """
        from .build import build_graph
        from .wrappers import traceable

        return build_graph(traceable(model), example_inputs, verify=verify)._with_canonical_names()

    @cached_property
    def group_offsets(self) -> tuple[int, ...]:
        offsets, total = [], 0
        for group in self.groups:
            offsets.append(total)
            total += group.size
        return tuple(offsets)

    @cached_property
    def num_nodes(self) -> int:
        return sum(group.size for group in self.groups)

    @cached_property
    def trainable_blocks(self) -> tuple[EdgeBlock, ...]:
        """The blocks that are edges of the graph, in the order of edges."""
        return tuple(block for block in self.blocks if block.trainable)

    @cached_property
    def num_edges(self) -> int:
        """Parameter edges, constant edges and self loops, in this order."""
        return sum(b.edges for b in self.trainable_blocks) + sum(c.edges for c in self.constants) + self.num_nodes

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(self.shapes[name]) for name in self.parameter_names)

    @cached_property
    def max_features(self) -> int:
        """The largest number of kernel taps on one edge."""
        return max((block.shape[2] for block in self.trainable_blocks), default=1)

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Trainable parameters, in the order of ``shapes``."""
        on_edges = {block.parameter for block in self.trainable_blocks}
        return tuple(name for name in self.shapes if name in on_edges)

    def node_index(self, nodes: Nodes) -> Tensor:
        """Global node numbers of a selection, int64 [len(nodes)]."""
        return nodes.index() + self.group_offsets[nodes.group]

    def group(self, name: str) -> NeuronGroup:
        """The group of that name.

        Raises:
            KeyError: there is none; the message lists close names.
        """
        for group in self.groups:
            if group.name == name:
                return group
        import difflib

        close = difflib.get_close_matches(name, [g.name for g in self.groups], n=3)
        raise KeyError(f"the graph has no neuron group {name!r}; close names: {close}")

    @cached_property
    def in_degree(self) -> Tensor:
        """Incoming edges of every node, self loop included, int64 [N]."""
        degree = torch.ones(self.num_nodes, dtype=torch.int64)
        for block in self.trainable_blocks:
            degree.index_add_(0, self.node_index(block.target), torch.full((len(block.target),), len(block.source)))
        for constant in self.constants:
            degree.index_add_(0, self.node_index(constant.target), torch.ones(constant.edges, dtype=torch.int64))
        return degree

    def permutation(self, generator: torch.Generator | None = None) -> Tensor:
        """A random product of members of all symmetries, int64 [N]; node n goes where ``permutation[n]`` was."""
        permutation = torch.arange(self.num_nodes)
        for symmetry in self.symmetries:
            permutation = symmetry.permutation(self.num_nodes, generator)[permutation]
        return permutation

    def permute(
        self,
        state_dict: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        permutation: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The same function with its interchangeable neurons in other places.

        Args:
            state_dict: tensors by name; names that no block refers to are passed on unchanged, aliases of tied weights
                follow their parameter.
            generator: source of randomness for :meth:`permutation`.
            permutation: int64 [N], instead of a random one.

        Returns:
            A new dict with new tensors for everything that a block refers to.
        """
        from .permute import permuted

        return permuted(self, state_dict, self.permutation(generator) if permutation is None else permutation)

    def _with_canonical_names(self) -> NeuralGraph:
        """The graph by the names that parameters have in the model without compiled submodules."""
        from .wrappers import canonical_name

        if all(canonical_name(name) == name for name in (*self.shapes, *self.aliases)):
            return self
        return replace(
            self,
            blocks=tuple(replace(b, parameter=canonical_name(b.parameter)) for b in self.blocks),
            shapes={canonical_name(name): shape for name, shape in self.shapes.items()},
            aliases={canonical_name(alias): canonical_name(name) for alias, name in self.aliases.items()},
        )

    def positional_encoding(self, size: int = 8) -> Tensor:
        """Laplacian eigenvectors, float32 [N, size]; see :mod:`hf_nino.graph.positional`."""
        from .positional import positional_encoding

        return positional_encoding(self, size)

    def to_pyg(
        self, states: Sequence[Mapping[str, Tensor]] | None = None, *, features: int | None = None, pos: int = 8
    ):
        """The explicit graph; see :func:`hf_nino.graph.pyg.to_pyg`."""
        from .pyg import to_pyg

        return to_pyg(self, states, features=features, pos=pos)

    def plot(self, path=None, kind: str = "diagram", *, title: str = ""):
        """A picture, ``"diagram"`` or ``"matrix"``; see :func:`hf_nino.graph.plot.plot`."""
        from .plot import plot

        return plot(self, path, kind, title=title)

    def __iter__(self) -> Iterator[EdgeBlock]:
        return iter(self.trainable_blocks)

    def __repr__(self) -> str:
        return (
            f"NeuralGraph({self.num_parameters:,} parameters, {self.num_nodes:,} nodes in {len(self.groups)} groups, "
            f"{len(self.trainable_blocks)} blocks, {len(self.symmetries)} symmetries)"
        )


def strided_index(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """``offset + sum_f index_f * strides[f]``, int64 of shape ``sizes``."""
    index = torch.full(tuple(sizes), offset, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        shape = [1] * len(sizes)
        shape[dim] = size
        index += (torch.arange(size) * stride).view(shape)
    return index


def contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous row-major array of these sizes."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
