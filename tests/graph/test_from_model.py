"""Graphs of real models, from one traced forward pass."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, Perceptron
from sample import UNFOLLOWED, rolled
from torch import nn

from hf_nino.graph import NeuralGraph, Symmetry
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.trace import output_tensors, quiet_forward

each = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


@pytest.fixture(scope="module")
def graphs() -> dict[str, NeuralGraph]:
    return {a.name: NeuralGraph.from_model(a.model(), a.inputs) for a in ARCHITECTURES}


def outputs(model: nn.Module, architecture: Architecture) -> list[torch.Tensor]:
    arguments, keywords = split_inputs(model, architecture.inputs)
    arguments = tuple(x.double() if x.is_floating_point() else x for x in arguments)
    keywords = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in keywords.items()}
    with quiet_forward(model):
        return output_tensors(model(*arguments, **keywords))


def change(architecture: Architecture, graph: NeuralGraph, permutation: torch.Tensor) -> float:
    """Largest change of the model's outputs relative to the outputs, when its neurons are permuted."""
    model = architecture.model().double()
    before = outputs(model, architecture)
    model.load_state_dict(graph.permute(model.state_dict(), permutation=permutation))
    after = outputs(model, architecture)
    return max(((b - a).abs().max() / a.abs().max()).item() for a, b in zip(before, after, strict=True))


@each
def test_every_element_of_every_trainable_parameter_lies_on_exactly_one_edge(architecture, graphs) -> None:
    """Counted element by element, apart from the graph's own validation."""
    model, graph = architecture.model(), graphs[architecture.name]
    for name, parameter in model.named_parameters():
        count = torch.zeros(parameter.numel(), dtype=torch.int64)
        for block in graph.trainable_blocks:
            if block.parameter == name:
                count[block.elements().flatten()] += 1
        assert (count == 1).all(), name
    assert graph.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@each
def test_groups_are_as_fine_as_written_by_hand(architecture, graphs) -> None:
    """Names and sizes of all groups of more than one kind of neuron; biases and norm gains have one node each."""
    graph = graphs[architecture.name]
    found = [(g.name, g.size) for g in graph.groups if g.size > 1 or g.kind != "parameter"]
    found = [(name, size) for name, size in found if not (size == 1 and "[row]" in name)]
    assert len(found) == len(architecture.groups), found
    for (name, size), (expected, expected_size) in zip(found, architecture.groups, strict=True):
        assert name.startswith(expected), (name, expected)
        assert size == expected_size, name
    assert not any(group.kind == "private" for group in graph.groups)


@each
def test_symmetries_are_those_of_the_architecture(architecture, graphs) -> None:
    """Channels of the stream move at all depths, value channels within their head, heads as a whole, and so on."""
    found = [tuple(symmetry.units.shape) for symmetry in graphs[architecture.name].symmetries]
    assert sorted(found) == sorted(architecture.symmetries)
    assert not any("refuted" in line for line in graphs[architecture.name].report)


@each
def test_permuting_interchangeable_neurons_keeps_the_outputs(architecture, graphs) -> None:
    """To 1e-5 of the outputs, although most of the parameters move."""
    graph = graphs[architecture.name]
    generator = torch.Generator().manual_seed(3)
    assert change(architecture, graph, graph.permutation(generator)) < 1e-5
    state = architecture.model().state_dict()
    permuted = graph.permute(state, generator)
    moved = sum(int((permuted[name] != state[name]).sum()) for name in graph.parameter_names)
    assert moved > 0.6 * graph.num_parameters


@each
def test_permuting_pinned_neurons_changes_the_outputs(architecture, graphs) -> None:
    """For every pinned group of more than one neuron: inputs, tokens, positions, rotary channels, heads, outputs."""
    graph = graphs[architecture.name]
    tried = []
    for number, group in enumerate(graph.groups):
        if group.pinned is None or group.size == 1 or "token_type" in group.name:  # of those, one row is used
            continue
        if UNFOLLOWED.search(group.pinned):  # they may be interchangeable
            continue
        assert change(architecture, graph, rolled(graph, number)) > 1e-4, group
        tried.append(group.name)
    assert tried and set(architecture.pinned) <= set(tried)


def test_rotary_channels_cannot_move_even_together() -> None:
    """Query and key channels of a head that move jointly keep GPT-2's outputs but not Llama's."""
    for name, may_move in (("gpt2", True), ("llama", False)):
        architecture = next(a for a in ARCHITECTURES if a.name == name)
        graph = NeuralGraph.from_model(architecture.model())
        number = next(i for i, group in enumerate(graph.groups) if "[query+key]" in group.name)
        start = graph.group_offsets[number]
        permutation = torch.arange(graph.num_nodes)
        permutation[start : start + 8] = start + torch.arange(8).roll(1)
        assert (change(architecture, graph, permutation) < 1e-5) is may_move


def test_query_heads_cannot_leave_their_key_value_head(graphs) -> None:
    """Swapping two query heads that share a key/value head keeps the outputs, swapping others does not."""
    architecture = next(a for a in ARCHITECTURES if a.name == "llama-grouped")
    graph = graphs["llama-grouped"]
    heads = next(s for s in graph.symmetries if s.name.startswith("heads of"))
    for (first, second), same in ((((0, 0), (0, 1)), True), (((0, 0), (1, 0)), False)):
        swapped = Symmetry("swap", heads.units)
        permutation = torch.arange(graph.num_nodes)
        a, b = swapped.units[first], swapped.units[second]
        permutation[a], permutation[b] = b.clone(), a.clone()
        assert (change(architecture, graph, permutation) < 1e-5) is same


def test_gpt2_is_the_graph_of_the_paper(shared) -> None:
    """Same nodes and edges as the original release's graph, up to numbering, but for the key bias.

    The original hangs the key bias on the residual stream; here it acts on the keys.  The correspondence of nodes is
    derived from the parameter elements and must be one to one, and carry constant edges to constant edges.
    """
    import json

    from safetensors.torch import load_file

    golden = load_file(shared / "upstream" / "gpt2_tiny.safetensors")
    parameters = json.loads((shared / "upstream" / "gpt2_tiny.json").read_text())["parameters"]
    graph = NeuralGraph.from_model(next(a for a in ARCHITECTURES if a.name == "gpt2").model())
    assert [(name, list(graph.shapes[name])) for name in graph.parameter_names] == [tuple(p) for p in parameters]
    assert graph.num_nodes == golden["laplacian_pe"].shape[0]
    data = graph.to_pyg(pos=0)
    assert data.edge_type.bincount().equal(golden["edge_type"].long().bincount())

    starts, total = {}, 0
    for name, shape in parameters:
        starts[name], total = total, total + math.prod(shape)
    ours = torch.cat([block.elements().flatten() + starts[block.parameter] for block in graph.trainable_blocks])
    edges = torch.empty(total, dtype=torch.int64)
    edges[ours] = torch.arange(total)
    element = golden["edge_parameter"][:, 0].long()
    key_bias = torch.zeros(total, dtype=torch.bool)
    for name, _ in parameters:
        if name.endswith("c_attn.bias"):
            key_bias[starts[name] + 24 : starts[name] + 48] = True
    compared = (element >= 0) & ~key_bias[element.clamp_min(0)]
    mine = data.edge_index[:, edges[element[compared]]].flatten()
    theirs = golden["edge_index"][:, compared].long().flatten()
    pairs = torch.unique(torch.stack([theirs, mine]), dim=1)
    assert pairs[0].unique().numel() == pairs[1].unique().numel() == pairs.shape[1]
    node_of = torch.full((graph.num_nodes,), -1)
    node_of[pairs[0]] = pairs[1]
    constant = golden["edge_type"] == 10
    residual = node_of[golden["edge_index"][:, constant].long()]
    assert set(map(tuple, residual.T.tolist())) == set(map(tuple, data.edge_index[:, data.edge_type == 10].T.tolist()))
    head = golden["edge_index"][:, golden["edge_type"] == 11].long()
    channels = sorted(node_of[head[1]].tolist())
    assert channels == sorted(data.edge_index[1, data.edge_type == 11].tolist())


def test_tracing_leaves_the_model_and_the_random_state_alone() -> None:
    """Modes, attention implementation, parameters, buffers, gradients and random numbers are as they were."""
    model = next(a for a in ARCHITECTURES if a.name == "gpt2").model().train()
    model.transformer.h[0].eval()
    model.set_attn_implementation("sdpa")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    NeuralGraph.from_model(model)
    assert torch.rand(1).equal(expected)
    assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training
    assert model.config._attn_implementation == "sdpa"
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_weights_have_their_edges_once() -> None:
    """The tied output matrix is the embedding: no nodes of its own, an alias in the graph, both permuted alike."""
    model = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    graph = NeuralGraph.from_model(model)
    assert graph.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in graph.shapes
    permuted = graph.permute(model.state_dict(), torch.Generator().manual_seed(0))
    assert permuted["lm_head.weight"].equal(permuted["transformer.wte.weight"])
    assert not permuted["lm_head.weight"].equal(model.state_dict()["lm_head.weight"])


def test_frozen_parameters_move_but_have_no_edges() -> None:
    """With an adapter on frozen weights, only the adapter's edges are in the graph; its rank axis is a group."""

    class Adapted(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)
            self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 12, bias=False)

        def forward(self, x):
            hidden = torch.relu(self.first(x))
            return self.last(torch.tanh(self.second(hidden) + self.up(self.down(hidden))))

    torch.manual_seed(0)
    model, inputs = Adapted(), torch.randn(2, 7)
    graph = NeuralGraph.from_model(model, inputs)
    assert graph.parameter_names == ("down.weight", "up.weight")
    assert graph.group("down").size == 4
    assert (1, 4, 1) in [tuple(symmetry.units.shape) for symmetry in graph.symmetries]
    state = model.state_dict()
    permuted = graph.permute(state, torch.Generator().manual_seed(0))
    assert not permuted["first.weight"].equal(state["first.weight"])
    before = model(inputs)
    model.load_state_dict(permuted)
    torch.testing.assert_close(model(inputs), before, rtol=1e-5, atol=1e-6)
    up = next(block for block in graph.trainable_blocks if block.parameter == "up.weight")
    assert graph.groups[up.target.group].size == 12 and graph.groups[up.source.group].name == "down"


def test_running_statistics_move_with_their_channels(graphs) -> None:
    """Buffers of batch norm are permuted, other buffers are passed on, and neither has edges."""
    architecture = next(a for a in ARCHITECTURES if a.name == "convolutional")
    graph = graphs["convolutional"]
    state = architecture.model().state_dict()
    permuted = graph.permute(state, torch.Generator().manual_seed(0))
    assert not permuted["norm.running_mean"].equal(state["norm.running_mean"])
    assert sorted(permuted["norm.running_mean"].tolist()) == sorted(state["norm.running_mean"].tolist())
    assert permuted["norm.num_batches_tracked"] is state["norm.num_batches_tracked"]
    assert not {"norm.running_mean", "norm.running_var"} & set(graph.parameter_names)


def test_what_the_forward_pass_does_not_reach_gets_private_neurons() -> None:
    """Unused parameters, and the unused rows of a table of positions, are in the graph and in the report."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.used, self.unused = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x + self.position[2:5])

    graph = NeuralGraph.from_model(Partly(), torch.randn(3, 6))
    private = [group for group in graph.groups if group.kind == "private"]
    assert {group.name.split("[")[0] for group in private} == {"position", "unused.weight", "unused.bias"}
    assert any(line.startswith("position: 36 of 54 elements") for line in graph.report)
    assert graph.num_parameters == 54 + 14 + 21


def test_an_operator_without_a_rule_pins_and_never_fails() -> None:
    """Sorting features depends on their order: neither side may be permuted, and the rest of the graph stands."""

    class Sorted(Perceptron):
        def forward(self, x):
            return self.last(self.second(torch.relu(self.first(x))).sort(dim=-1).values.cumsum(-1))

    torch.manual_seed(0)
    model, inputs = Sorted(), torch.randn(2, 7)
    graph = NeuralGraph.from_model(model, inputs)
    assert [tuple(symmetry.units.shape) for symmetry in graph.symmetries] == [(1, 16, 1)]
    before = model(inputs)
    model.load_state_dict(graph.permute(model.state_dict(), torch.Generator().manual_seed(0)))
    torch.testing.assert_close(model(inputs), before, rtol=1e-5, atol=1e-6)


def test_errors_say_what_to_do() -> None:
    """No inputs, inputs that do not fit, nothing to train: one ValueError each, naming the argument."""
    with pytest.raises(ValueError, match="`example_inputs` must be given for a Perceptron"):
        NeuralGraph.from_model(Perceptron())
    with pytest.raises(ValueError, match=r"`model` must run on `example_inputs`.*Perceptron failed with RuntimeError"):
        NeuralGraph.from_model(Perceptron(), torch.randn(2, 5))
    with pytest.raises(ValueError, match="must have a trainable floating-point parameter"):
        NeuralGraph.from_model(Perceptron().requires_grad_(False), torch.randn(2, 7))
