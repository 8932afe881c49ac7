"""Laplacian positional encoding from the quotient graph, against eigenvectors of the whole Laplacian."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES
from handmade import Sketch, convnet, gpt2, llama, mlp, units
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.transforms import AddLaplacianEigenvectorPE
from torch_geometric.utils import get_laplacian, to_undirected

from hf_nino.graph import EdgeBlock, EdgeType, NeuralGraph, Symmetry, validation
from hf_nino.graph.positional import canonical_basis, positional_encoding, quotient, refine, simple_graph

GRAPHS = {
    "mlp": mlp,
    "deep mlp": lambda: mlp((4, 9, 5, 8, 6, 7, 3)),
    "convnet": convnet,
    "gpt2": gpt2,
    "deep gpt2": lambda: gpt2(layers=6, width=4),
    "llama": lambda: llama(layers=5),
    "llama without grouping": lambda: llama(layers=4, kv_heads=4),
}


def laplacian(graph: NeuralGraph) -> Tensor:
    """PyG's symmetric-normalised Laplacian of the explicit graph, edge by edge; float64 [N, N]."""
    edges = to_undirected(graph.to_pyg(pos=0).edge_index)
    index, values = get_laplacian(edges, normalization="sym", dtype=torch.float64, num_nodes=graph.num_nodes)
    return torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64).index_put_(tuple(index), values)


def spectrum(full: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Laplacian on cell-constant vectors, and on vectors that sum to zero on every cell."""
    lifted = torch.nn.functional.one_hot(cell).double()
    lifted /= lifted.norm(dim=0)
    zero_sum = torch.linalg.eigvalsh(full + 10 * lifted @ lifted.T)
    return torch.linalg.eigvalsh(lifted.T @ full @ lifted), zero_sum[zero_sum < 5]


def gap_size(graph: NeuralGraph) -> int:
    """Columns up to which the smallest eigenvalues all belong to the quotient."""
    inside, outside = spectrum(laplacian(graph), quotient(graph).cell)
    return int((inside < outside.min() - 1e-6).sum()) - 1


def spread(graph: NeuralGraph, cell: Tensor) -> float:
    """Largest difference between the numbers of neighbours, in any cell, of two nodes of one cell; 0 if equitable."""
    adjacency = (laplacian(graph) != 0).double().fill_diagonal_(0)
    neighbours = adjacency @ torch.nn.functional.one_hot(cell).double()
    return max(float((neighbours[cell == c] - neighbours[cell == c][0]).abs().max()) for c in cell.unique())


def assert_same_columns(actual: Tensor, expected: Tensor, values: Tensor, tolerance: float) -> None:
    """Equal up to sign, column by column; values are their simple eigenvalues."""
    assert (values.diff() > 1e-6).all()
    assert_close = torch.testing.assert_close
    signs = (actual * expected).sum(dim=0).sign()
    assert_close(actual * signs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", GRAPHS)
def test_columns_are_the_eigenvectors_of_the_whole_laplacian(name):
    """Up to sign, of PyG's Laplacian, wherever its smallest eigenvalues belong to the quotient and are simple."""
    graph = GRAPHS[name]()
    size = min(8, gap_size(graph))
    assert size >= (8 if "gpt2" in name or "llama" in name else 2)
    values, vectors = torch.linalg.eigh(laplacian(graph))
    assert_same_columns(
        positional_encoding(graph, size), vectors[:, 1 : size + 1].float(), values[1 : size + 2], tolerance=1e-6
    )


@pytest.mark.parametrize("name", ["gpt2", "deep gpt2", "llama"])
def test_the_span_is_that_of_pyg(name):
    """PyG's AddLaplacianEigenvectorPE (ARPACK, random signs) spans the same space."""
    pytest.importorskip("scipy", reason="AddLaplacianEigenvectorPE needs scipy")
    graph = GRAPHS[name]()
    data = graph.to_pyg(pos=0)
    data.edge_index = to_undirected(data.edge_index)
    theirs = AddLaplacianEigenvectorPE(k=8, attr_name="theirs", is_undirected=True)(data).theirs
    ours = positional_encoding(graph, 8)
    assert (ours - theirs @ (theirs.T @ ours)).abs().max() < 1e-4
    torch.testing.assert_close(ours.T @ ours, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_all_eigenvectors_of_the_quotient_are_eigenvectors_of_the_graph(name):
    """With as many columns as cells, all are orthonormal and the Laplacian maps each to a multiple of itself."""
    graph = GRAPHS[name]()
    cells = len(quotient(graph).sizes)
    ours = positional_encoding(graph, cells + 2).double()
    mapped = laplacian(graph) @ ours[:, : cells - 1]
    values = (mapped * ours[:, : cells - 1]).sum(dim=0)
    torch.testing.assert_close(mapped, ours[:, : cells - 1] * values, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        ours.T @ ours, torch.diag((torch.arange(cells + 2) < cells - 1).double()), atol=1e-6, rtol=0
    )
    assert (values.diff() > -1e-6).all()
    assert (ours[:, cells - 1 :] == 0).all()


def test_cells_are_the_neuron_groups_of_a_transformer():
    """So there are few of them, and their number does not depend on the width."""
    for graph in (gpt2(), gpt2(width=16, heads=4), llama(), llama(layers=5, units_per_layer=30)):
        data = graph.to_pyg(pos=0)
        assert torch.equal(quotient(graph).cell, data.group)
    assert len(quotient(llama(layers=7)).sizes) == 10 * 7 + 4


@pytest.mark.parametrize("name", GRAPHS)
def test_symmetries_of_the_network_do_not_change_the_encoding(name):
    """A neuron and the one that takes its place have the same row."""
    graph = GRAPHS[name]()
    permutation = graph.permutation(torch.Generator().manual_seed(0))
    encoding = positional_encoding(graph)
    assert (permutation != torch.arange(graph.num_nodes)).any()
    assert torch.equal(encoding[permutation], encoding)
    assert not torch.equal(encoding.roll(1, 0), encoding)


def experts(count: int = 3) -> NeuralGraph:
    """Experts as modules of their own: a symmetry exchanges whole groups."""
    sketch = Sketch()
    sketch.group("in", 4, "input", "input")
    sketch.group("router", count)
    for e in range(count):
        sketch.group(f"expert {e}", 5)
    sketch.group("out", 3, pinned="output")
    sketch.linear("router", (count, 4), "in", "router")
    for e in range(count):
        sketch.linear(f"{e}.in", (5, 4), "in", f"expert {e}")
        sketch.linear(f"{e}.out", (3, 5), f"expert {e}", "out")
        router = sketch.nodes("router", (5,), (0,), e)
        sketch.matching(router, f"expert {e}", EdgeType.HEAD)
    sketch.symmetry("experts", ("router", units(count)))
    graph = sketch.graph()
    nodes = torch.stack(
        [torch.tensor([4 + e, *range(4 + count + 5 * e, 4 + count + 5 * e + 5)]) for e in range(count)]
    )
    return replace(graph, symmetries=(Symmetry("experts", nodes[None]),))


def test_groups_that_a_symmetry_exchanges_share_a_cell():
    """Otherwise the encoding would tell interchangeable experts apart, as it does when the symmetry is not known."""
    graph = experts()
    permutation = torch.arange(graph.num_nodes)
    permutation[graph.symmetries[0].units[0]] = graph.symmetries[0].units[0].roll(1, 0)
    encoding = positional_encoding(graph)
    assert torch.equal(encoding[permutation], encoding)
    assert len(quotient(graph).sizes) == 4
    unknown = replace(graph, symmetries=())
    encoding = positional_encoding(unknown)
    assert not torch.allclose(encoding[permutation], encoding, atol=1e-3)


def sliced() -> NeuralGraph:
    """Two blocks on different, overlapping slices of a group, one of them also joined by a matching."""
    sketch = Sketch()
    sketch.group("a", 4)
    sketch.group("b", 6)
    sketch.group("c", 6)
    sketch.group("d", 3)
    sketch.linear("a-b", (6, 4), "a", "b")
    sketch.matching("b", "c")
    sketch.linear("c-d", (3, 6), "c", "d")
    sketch.group("e", 2)
    part = sketch.nodes("c", (2,), (1,), 1)
    sketch.shapes["e-c"] = (2, 2)
    sketch.blocks.append(EdgeBlock("e-c", EdgeType.LINEAR, sketch.nodes("e"), part, (1,), (2,)))
    return sketch.graph()


def test_groups_that_are_not_equitable_are_split():
    """A block on a slice of a group splits it, and whatever a matching ties to it; the result is still exact."""
    graph = sliced()
    assert quotient(graph).cell.tolist() == [0] * 4 + [1, 2, 2, 1, 1, 1] + [3, 4, 4, 3, 3, 3] + [5] * 3 + [6] * 2
    size = min(8, gap_size(graph))
    assert size >= 2
    values, vectors = torch.linalg.eigh(laplacian(graph))
    assert_same_columns(
        positional_encoding(graph, size), vectors[:, 1 : size + 1].float(), values[1 : size + 2], tolerance=1e-6
    )


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen3", "bert", "convolutional", "resnet", "convnext"])
def test_traced_models_are_encoded_by_the_whole_laplacian(name):
    """Mixtures of experts, convolutions and all: on every connected part, its eigenvectors, and its smallest ones.

    Columns have norm 1 on every part that has enough cells, the Laplacian maps each to a multiple of itself, and up to
    the first eigenvector that tells the neurons of a cell apart these are the smallest of all multiples.
    """
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    graph = NeuralGraph.from_model(architecture.model(), architecture.inputs)
    partition, full, encoding = quotient(graph), laplacian(graph), positional_encoding(graph).double()
    assert spread(graph, partition.cell) == 0
    compared = 0
    for part in partition.component.unique():
        nodes = partition.component == part
        cell = partition.cell[nodes].unique(return_inverse=True)[1]
        ours, here = encoding[nodes], full[nodes][:, nodes]
        known = min(8, int(cell.max()))
        values = (ours * (here @ ours)).sum(dim=0)[:known]
        torch.testing.assert_close(here @ ours[:, :known], ours[:, :known] * values, rtol=0, atol=1e-6)
        expected = torch.diag((torch.arange(8) < known).double())
        torch.testing.assert_close(ours.T @ ours, expected, rtol=0, atol=1e-6)
        inside, outside = spectrum(here, cell)
        below = int((inside < outside.min() - 1e-6).sum()) - 1 if len(outside) else known
        size = min(known, below)
        torch.testing.assert_close(values[:size], torch.linalg.eigvalsh(here)[1 : size + 1], rtol=0, atol=1e-6)
        compared = max(compared, size)
    assert compared >= (2 if name == "convolutional" else 4)


class Shuffled(nn.Module):
    """A stream of which some channels come back two layers later: several of them repeated, others not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((5, 8), (8, 9), (9, 8), (8, 7), (7, 3)))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, last = self.layers
        h = torch.tanh(first(x))
        y = third(torch.tanh(second(h))) + h[:, [3, 0, 0, 5, 1, 3, 3, 6]]
        return last(torch.tanh(fourth(torch.tanh(y))))


class Padded(Shuffled):
    """A shortcut from few channels to the first of many."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, last = self.layers
        h = torch.tanh(first(x))
        y = third(torch.tanh(second(h))) + nn.functional.pad(h[:, :5], (0, 3))
        return last(torch.tanh(fourth(torch.tanh(y))))


@pytest.mark.parametrize("module", [Shuffled, Padded], ids=lambda module: module.__name__)
def test_an_irregular_matching_of_a_users_module_is_encoded_as_pyg_does(module):
    """Its groups are not equitable, their refinement is; the span is PyG's as far as eigenvalues are the smallest."""
    pytest.importorskip("scipy", reason="AddLaplacianEigenvectorPE needs scipy")
    graph = NeuralGraph.from_model(module(), torch.linspace(-1, 1, 15).view(3, 5))
    data = graph.to_pyg(pos=0)
    assert spread(graph, data.group) > 0 and spread(graph, quotient(graph).cell) == 0
    assert len(graph.groups) < len(quotient(graph).sizes) < graph.num_nodes
    size = min(8, gap_size(graph))
    values, vectors = torch.linalg.eigh(laplacian(graph))
    assert size >= 3 and values[size + 1] - values[size] > 1e-6
    ours = positional_encoding(graph, size)
    assert_same_columns(ours, vectors[:, 1 : size + 1].float(), values[1 : size + 2], tolerance=1e-6)
    data.edge_index = to_undirected(data.edge_index)
    theirs = AddLaplacianEigenvectorPE(k=size, attr_name="theirs", is_undirected=True)(data).theirs
    assert (ours - theirs @ (theirs.T @ ours)).abs().max() < 1e-4
    # As if the groups were equitable: the same number on all neurons of a group is no eigenvector.
    same = (data.group[:, None] == data.group).float()
    assert (ours - same @ ours / same.sum(dim=1, keepdim=True)).abs().max() > 1e-3
    permutation = graph.permutation(torch.Generator().manual_seed(0))
    assert (permutation != torch.arange(graph.num_nodes)).any()
    torch.testing.assert_close(positional_encoding(graph, 8)[permutation], positional_encoding(graph, 8))


def test_an_equitable_partition_is_what_it_claims():
    """Every node of a cell has the same number of neighbours in every cell; groups alone do not have this property."""
    graph = sliced()
    adjacency = (laplacian(graph) != 0).double().fill_diagonal_(0)
    q = quotient(graph)
    assert spread(graph, q.cell) == 0
    assert spread(graph, graph.to_pyg(pos=0).group) > 0
    lifted = torch.nn.functional.one_hot(q.cell).double()
    assert torch.equal(q.edges, lifted.T @ adjacency @ lifted)


def test_parallel_edges_opposite_edges_and_self_loops_are_one_edge_or_none():
    """Query and key edges, a matching on top of a block, a recurrent block with its diagonal: a simple graph."""
    sketch = Sketch()
    sketch.group("x", 3)
    sketch.group("h", 4)
    sketch.group("y", 4)
    sketch.linear("in", (4, 3), "x", "h")
    sketch.linear("in again", (4, 3), "x", "h")
    sketch.linear("back", (3, 4), "h", "x")
    sketch.linear("recurrent", (4, 4), "h", "h")
    sketch.linear("out", (4, 4), "h", "y")
    sketch.matching("h", "y")
    sketch.matching("y", "y")
    graph = sketch.graph()
    assert simple_graph(graph).edges.numel() == 0
    assert quotient(graph).edges.tolist() == [[0, 12, 0], [12, 12, 16], [0, 16, 0]]
    full = laplacian(graph)
    encoding = positional_encoding(graph, 2).double()
    mapped = full @ encoding
    torch.testing.assert_close(mapped, encoding * (mapped * encoding).sum(dim=0), rtol=0, atol=1e-6)


def test_a_node_is_not_its_own_neighbour():
    """Two nodes in a recurrent block have one neighbour each, three in a ring of matchings two: not the same cell."""
    sketch = Sketch()
    sketch.group("h", 5)
    pair = sketch.nodes("h", (2,), (1,))
    sketch.shapes["recurrent"] = (2, 2)
    sketch.blocks.append(EdgeBlock("recurrent", EdgeType.LINEAR, pair, pair, (1,), (2,)))
    sketch.matching(sketch.nodes("h", (2,), (1,), 2), sketch.nodes("h", (2,), (1,), 3))
    sketch.matching(sketch.nodes("h", (1,), (1,), 4), sketch.nodes("h", (1,), (1,), 2))
    found = quotient(sketch.graph())
    assert found.cell.tolist() == [0, 0, 1, 1, 1]
    assert found.component.tolist() == [0, 0, 1, 1, 1]
    assert found.edges.tolist() == [[2, 0], [0, 6]]


def test_each_component_is_encoded_as_if_it_were_alone():
    """Private neurons that nothing joins to the rest, and heads that lost all but their star, change no other row."""
    alone = mlp()
    sketch = Sketch()
    for i, size in enumerate((5, 7, 6, 3)):
        sketch.group(f"layer {i}", size)
    sketch.group("p.0", 2, "private")
    sketch.group("p.1", 3, "private")
    sketch.group("heads", 4, "head")
    sketch.group("channels", 8)
    for i, sizes in enumerate(((5, 7), (7, 6), (6, 3))):
        sketch.linear(f"{2 * i}.weight", sizes[::-1], f"layer {i}", f"layer {i + 1}")
        sketch.vector(f"{2 * i}.bias", f"layer {i + 1}")
    sketch.linear("p", (3, 2), "p.0", "p.1")
    sketch.star("heads", "channels")
    graph = sketch.graph()
    encoding, data = positional_encoding(graph), graph.to_pyg(pos=0)

    def rows(prefix):
        return torch.tensor([graph.groups[g].name.startswith(prefix) for g in data.group.tolist()])

    layers = positional_encoding(alone)[
        torch.tensor([alone.groups[g].kind != "parameter" for g in alone.to_pyg().group])
    ]
    torch.testing.assert_close(encoding[rows("layer")], layers)
    # Complete bipartite 2 x 3: the quotient has one vector besides the first, with eigenvalue 2.
    p = encoding[rows("p.")]
    torch.testing.assert_close(p[:, 0], torch.tensor([0.5] * 2 + [-(6**-0.5)] * 3))
    assert (p[:, 1:] == 0).all()
    # Four stars with two channels each: each is a component, so each has norm 1 by itself.
    torch.testing.assert_close(encoding[rows("heads"), 0], torch.full((4,), 0.5**0.5))
    torch.testing.assert_close(encoding[rows("channels"), 0], torch.full((8,), -0.5))


def test_the_first_cell_decides_the_sign():
    """In every column the first cell that is not zero is positive: the same network always gets the same encoding."""
    for graph in (gpt2(), llama(), mlp()):
        encoding = positional_encoding(graph)
        first = [column[column.abs() > 1e-6][0] for column in encoding.T if column.any()]
        assert len(first) >= 6
        assert all(value > 0 for value in first)
        assert torch.equal(positional_encoding(replace(graph)), encoding)


def test_a_repeated_eigenvalue_gets_a_basis_that_depends_on_its_space_alone():
    """``canonical_basis`` returns the same for every basis of a space, spans it, and has an echelon form."""
    generator = torch.Generator().manual_seed(0)
    space = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64, generator=generator)).Q
    space = torch.cat([torch.zeros(2, 3, dtype=torch.float64), space])
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator)).Q
    basis = canonical_basis(space)
    torch.testing.assert_close(canonical_basis(space @ rotation), basis)
    assert not torch.allclose(space @ rotation, space)
    torch.testing.assert_close(basis @ basis.T, space @ space.T)
    assert (basis[2:5].diagonal() > 0).all()
    assert basis[2:5].triu(1).abs().max() < 1e-12


def test_refinement_keeps_a_partition_that_is_equitable_and_splits_one_that_is_not():
    """The groups of an MLP are equitable; all nodes in one cell split into them, but for twins.

    The node of the first bias has the neighbours of an input, so nothing but the groups tells them apart.
    """
    graph = mlp()
    simple = simple_graph(graph)
    assert torch.equal(refine(simple, graph.to_pyg(pos=0).group), graph.to_pyg(pos=0).group)
    coarsest = refine(simple, torch.zeros(graph.num_nodes, dtype=torch.int64))
    twins = graph.to_pyg(pos=0).group
    twins[twins == graph.groups.index(graph.group("0.bias"))] = 0
    assert torch.equal(coarsest, twins.unique(return_inverse=True)[1])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_size_of_an_8b_llama_needs_no_dense_block(monkeypatch):
    """32 layers, width 4096, 8e9 parameters: no tensor is larger than a few numbers per node."""
    monkeypatch.setattr(validation, "_validate_coverage", lambda graph: None)  # 8e9 counters; checked at small sizes
    graph = llama(layers=32, width=4096, heads=32, kv_heads=8, units_per_layer=14336, vocab=128256)
    assert graph.num_parameters > 8e9
    with LargestTensor() as largest:
        encoding = positional_encoding(graph, 8)
    assert encoding.shape == (graph.num_nodes, 8)
    assert largest.elements <= 8 * graph.num_nodes
    assert len(quotient(graph).sizes) == 324
    # The first column says how deep a node is.
    streams = [i for i, g in enumerate(graph.groups) if g.name.endswith("down_proj")]
    depth = encoding[[graph.group_offsets[i] for i in streams], 0]
    assert (depth.diff() < 0).all()


def test_the_result_is_remembered_but_cannot_be_spoilt():
    """A second call does not compute again, writing into a result changes no other, and the graph can be freed."""
    graph = mlp()
    first = graph.positional_encoding(4)
    expected = first.clone()
    first.zero_()
    with LargestTensor() as largest:
        assert torch.equal(graph.positional_encoding(4), expected)
    assert largest.elements == first.numel()
    watch = weakref.ref(graph)
    del graph
    gc.collect()
    assert watch() is None


def test_bad_sizes_are_refused_and_no_columns_are_possible():
    """``size`` counts columns."""
    assert positional_encoding(mlp(), 0).shape == (24, 0)
    with pytest.raises(ValueError, match="`size` must be at least 0 columns, got -1"):
        positional_encoding(mlp(), -1)
