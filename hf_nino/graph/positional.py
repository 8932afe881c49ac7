r"""Laplacian positional encoding of a neural graph from a small quotient, whatever its width.

Take the simple graph under the neural graph: undirected, unweighted, no self loops, parallel edges once.  With
adjacency A and degrees d its symmetric-normalised Laplacian is

    L = I - D^(-1/2) A D^(-1/2),

and the encoding of node i is row i of its eigenvectors with the smallest eigenvalues, without the first (Dwivedi et
al., arXiv 2003.00982).  A partition of the nodes into cells is *equitable* if all nodes of cell a have the same number
of neighbours in cell b.  Then, with n_a nodes in cell a, degree d_a and e_ab ordered adjacent pairs between a and b,
every eigenvector u of the small matrix

    B_ab = delta_ab - e_ab / sqrt(n_a n_b d_a d_b)

gives the eigenvector of L with the value u_a / sqrt(n_a) on each node of cell a (arXiv 1702.00796).  All other
eigenvectors sum to zero on every cell.  The adjacency of a dense block sends those to zero, so their eigenvalues stay
near 1, and the small ones, which say where in the network a node is, all come from the quotient.  The neuron groups of
a Transformer are such cells: about 10 L of them for Llama with L layers, at any width.

Dense blocks are handled by counting, as pairs of node sets, and are never expanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .structure import NeuralGraph, Nodes

_cache: WeakKeyDictionary[NeuralGraph, dict[int, Tensor]] = WeakKeyDictionary()


def positional_encoding(graph: NeuralGraph, size: int = 8) -> Tensor:
    """Laplacian eigenvectors 1 .. ``size`` of the simple graph, constant on the cells of :func:`quotient`.

    They equal those of the whole Laplacian as far as its smallest eigenvalues belong to the quotient; eigenvectors
    that tell interchangeable neurons apart are left out.  (For 8 columns this concerns networks of up to three layers:
    a GPT-2 of two layers has 6 columns below the first such eigenvalue, a Llama of three layers 6, of four 8.)  Each
    connected component gets the encoding that it would have alone: its columns have norm 1, and those that its
    quotient has no eigenvector for are 0.

    Signs are fixed by the order of the nodes: in every column and component, the first cell (the one with the
    lowest-numbered node) whose entry is not zero is positive.  Repeated eigenvalues get the basis that
    :func:`canonical_basis` describes.  Both depend on cells alone, so the encoding is the same at n and at
    ``graph.permutation()[n]``.

    Args:
        graph: the network; the result is remembered as long as the graph lives.
        size: number of columns, at least 0.

    Returns:
        float32 [N, size], a new tensor at every call.

    Raises:
        ValueError: ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"`size` must be at least 0 columns, got {size}")
    known = _cache.setdefault(graph, {})
    if size not in known:
        known[size] = lift(quotient(graph), size)
    return known[size].clone()


@dataclass(frozen=True, eq=False)
class SimpleGraph:
    """The simple graph under a neural graph: complete joins between node sets, and single edges.

    Args:
        atom: int64 [N], the node set that each node belongs to; every block selects whole atoms.
        joins: int64 [2, M], pairs of atoms whose nodes are all adjacent; unique, in both directions.
        edges: int64 [2, X], all other adjacent nodes; unique, in both directions.
    """

    atom: Tensor
    joins: Tensor
    edges: Tensor


@dataclass(frozen=True, eq=False)
class Quotient:
    """An equitable partition of the simple graph and the weighted graph of its cells.

    Args:
        cell: int64 [N], numbered by their first node.
        component: int64 [N], the connected component of each node.
        sizes: float64 [C], nodes n_a of each cell.
        edges: float64 [C, C], ordered adjacent pairs e_ab.
    """

    cell: Tensor
    component: Tensor
    sizes: Tensor
    edges: Tensor

    def laplacian(self) -> Tensor:
        """``B_ab = delta_ab - e_ab / sqrt(n_a n_b d_a d_b)``, float64 [C, C]."""
        scale = self.edges.sum(dim=1).clamp(min=1).rsqrt()  # n_a d_a is the number of edge ends in cell a
        return torch.eye(len(scale), dtype=scale.dtype) - scale[:, None] * self.edges * scale[None, :]


def quotient(graph: NeuralGraph) -> Quotient:
    """The coarsest equitable partition that keeps neuron groups apart, except those that a symmetry exchanges."""
    simple = simple_graph(graph)
    cell = refine(simple, _initial_cells(graph))
    cells, atoms = int(cell.max()) + 1, int(simple.atom.max()) + 1
    ones = torch.ones(graph.num_nodes, dtype=torch.float64)
    count = ones.new_zeros(atoms * cells).index_add_(0, simple.atom * cells + cell, ones).view(atoms, cells)
    joined = torch.zeros_like(count).index_add_(0, simple.joins[0], count[simple.joins[1]])
    edges = count.T @ joined
    own = simple.joins[0][simple.joins[0] == simple.joins[1]]
    edges.diagonal().sub_(count[own].sum(dim=0))  # no node is its own neighbour
    pairs = cell[simple.edges[0]] * cells + cell[simple.edges[1]]
    edges.view(-1).index_add_(0, pairs, ones.new_ones(len(pairs)))
    return Quotient(cell, _node_components(simple), count.sum(dim=0), edges)


def lift(quotient: Quotient, size: int) -> Tensor:
    """Eigenvectors 1 .. ``size`` of each component: ``u_a / sqrt(n_a)`` on each node of cell a, float32 [N, size]."""
    laplacian = quotient.laplacian()
    table = laplacian.new_zeros(len(laplacian), size)
    parts = components(len(laplacian), quotient.edges.nonzero().T)
    for part in parts.unique():
        members = (parts == part).nonzero().flatten()
        vectors = smallest_eigenvectors(laplacian[members][:, members], size)
        table[members, : vectors.shape[1]] = vectors
    # Components of the graph that share their cells are copies of each other for all that B can tell: u fits each of
    # them, normalised over its own nodes.
    count = int(quotient.component.max()) + 1
    pieces = quotient.cell * count + quotient.component
    piece, inverse, nodes = pieces.unique(return_inverse=True, return_counts=True)
    return (table[piece // count] / nodes.sqrt()[:, None]).float()[inverse]


def smallest_eigenvectors(laplacian: Tensor, size: int) -> Tensor:
    """Eigenvectors 1 .. ``size`` of a connected graph's Laplacian in ascending order, float64 [C, min(size, C - 1)].

    The first, number 0, is left out.  Signs and bases are those of :func:`canonical_basis`.
    """
    values, vectors = torch.linalg.eigh(laplacian)
    starts = [i for i in range(1, len(values)) if i == 1 or values[i] - values[i - 1] > 1e-9]
    bounds = pairwise([*starts, len(values)])
    spaces = [canonical_basis(vectors[:, start:end]) for start, end in bounds if start <= size]
    return torch.cat([vectors[:, :0], *spaces], dim=1)[:, :size]


def canonical_basis(vectors: Tensor) -> Tensor:
    """The orthonormal basis of a space that is fixed by the order of its coordinates, float64 [C, m].

    The unit vectors e_0, e_1, ... are projected onto the space and orthonormalised in this order, skipping those whose
    projection adds nothing.  For m = 1 this is the vector whose first entry that is not zero is positive.

    Args:
        vectors: any orthonormal basis of the space, [C, m].
    """
    basis: list[Tensor] = []
    for coefficients in vectors:
        for known in basis:
            coefficients = coefficients - (coefficients @ known) * known
        norm = coefficients.norm()
        if norm > 1e-6:
            basis.append(coefficients / norm)
        if len(basis) == vectors.shape[1]:
            return vectors @ torch.stack(basis, dim=1)
    return vectors


def simple_graph(graph: NeuralGraph) -> SimpleGraph:
    """The undirected, unweighted graph under the trainable blocks and constant edges, without self loops.

    A pair of nodes that several blocks or constants join, in either direction, is one edge.
    """
    atom, joins = _atoms(graph), []
    count = int(atom.max()) + 1
    members: dict[Nodes, Tensor] = {}
    for block in graph.trainable_blocks:
        for side in (block.source, block.target):
            if side not in members:
                members[side] = atom[graph.node_index(side)].unique()
        source, target = members[block.source], members[block.target]
        joins.append((source[:, None] * count + target[None, :]).flatten())
        joins.append((target[:, None] * count + source[None, :]).flatten())
    joined = torch.cat([torch.empty(0, dtype=torch.int64), *joins]).unique()
    ends = [torch.stack([graph.node_index(c.source), graph.node_index(c.target)]) for c in graph.constants]
    edges = torch.cat([torch.empty(2, 0, dtype=torch.int64), *ends], dim=1)
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    covered = torch.isin(atom[edges[0]] * count + atom[edges[1]], joined) | (edges[0] == edges[1])
    edges = edges[:, ~covered]
    unique = (edges[0] * graph.num_nodes + edges[1]).unique()
    return SimpleGraph(
        atom,
        torch.stack([joined // count, joined % count]),
        torch.stack([unique // graph.num_nodes, unique % graph.num_nodes]),
    )


def refine(simple: SimpleGraph, cell: Tensor) -> Tensor:
    """The coarsest equitable partition that is at least as fine as ``cell``, int64 [N].

    One-dimensional Weisfeiler-Leman: nodes of a cell stay together while they have equally many neighbours in every
    cell.  The counts are compared through random 64-bit codes of the cells, summed over the neighbours (wrapping).
    """
    generator = torch.Generator().manual_seed(0)
    atoms = int(simple.atom.max()) + 1
    own = torch.zeros(atoms, dtype=torch.bool)
    own[simple.joins[0][simple.joins[0] == simple.joins[1]]] = True
    own = own[simple.atom]
    while True:
        count = int(cell.max()) + 1
        sent = _codes(count, generator)[cell]
        per_atom = sent.new_zeros(atoms).index_add_(0, simple.atom, sent)
        joined = torch.zeros_like(per_atom).index_add_(0, simple.joins[0], per_atom[simple.joins[1]])
        received = joined[simple.atom] - sent * own  # a node of an atom that is joined to itself is not its neighbour
        received.index_add_(0, simple.edges[0], sent[simple.edges[1]])
        cell = _numbered(received + _codes(count, generator)[cell])
        if int(cell.max()) + 1 == count:
            return cell


def components(count: int, edges: Tensor) -> Tensor:
    """The lowest node of the connected component of each of ``count`` nodes, given the edges [2, X]; int64 [count]."""
    label = torch.arange(count)
    while True:
        ends = label[edges]
        low, high = ends.amin(dim=0), ends.amax(dim=0)
        if torch.equal(low, high):
            return label
        label.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(label, label[label]):
            label = label[label]


def _initial_cells(graph: NeuralGraph) -> Tensor:
    """Neuron groups, united where a symmetry exchanges nodes of several groups (experts in modules of their own)."""
    bounds = torch.tensor(graph.group_offsets)
    pairs = [torch.empty(2, 0, dtype=torch.int64)]
    for symmetry in graph.symmetries:
        group = torch.searchsorted(bounds, symmetry.units, right=True) - 1
        first = group[:, :1].expand_as(group)
        pairs.append(torch.stack([first[first != group], group[first != group]]).unique(dim=1))
    united = components(len(graph.groups), torch.cat(pairs, dim=1))
    return _numbered(united.repeat_interleave(torch.tensor([group.size for group in graph.groups])))


def _atoms(graph: NeuralGraph) -> Tensor:
    """The coarsest partition, finer than groups, of which every trainable block's two sides are unions; int64 [N]."""
    generator = torch.Generator().manual_seed(0)
    code = _codes(len(graph.groups), generator)
    code = code.repeat_interleave(torch.tensor([group.size for group in graph.groups]))
    whole = {Nodes.all(number, group.size) for number, group in enumerate(graph.groups)}
    sides = {side for block in graph.trainable_blocks for side in (block.source, block.target)}
    for side in sorted(sides - whole, key=lambda side: (side.group, side.offset, side.sizes, side.strides)):
        code[graph.node_index(side).unique()] += _codes(1, generator)
    return _numbered(code)


def _node_components(simple: SimpleGraph) -> Tensor:
    """The connected component of every node, int64 [N], numbered from 0."""
    atoms, nodes = int(simple.atom.max()) + 1, len(simple.atom)
    joined = torch.zeros(atoms, dtype=torch.bool)
    joined[simple.joins[0]] = True
    place = torch.where(joined[simple.atom], simple.atom, torch.arange(nodes) + atoms)  # a joined atom is connected
    count = atoms + nodes
    pairs = (place[simple.edges[0]] * count + place[simple.edges[1]]).unique()
    pairs = torch.cat([simple.joins, torch.stack([pairs // count, pairs % count])], dim=1)
    return _numbered(components(count, pairs)[place])


def _codes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def _numbered(values: Tensor) -> Tensor:
    """Equal values as numbers 0, 1, ... in the order in which they first appear."""
    unique, inverse = values.unique(return_inverse=True)
    first = torch.full_like(unique, len(values)).scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")
    return first.argsort().argsort()[inverse]
