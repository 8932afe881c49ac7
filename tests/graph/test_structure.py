"""The data of a neural graph: what it refuses, how blocks view parameters, what permutations keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from handmade import convnet, convnet_module, gpt2, llama, mlp, mlp_module, random_state
from torch import Tensor, nn
from torch.func import functional_call

from hf_nino.graph import ConstantEdges, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Nodes, Symmetry


def parts(**changes) -> dict:
    """The parts of a valid graph, a linear map from 2 to 3 neurons, with some of them replaced."""
    block = EdgeBlock("weight", EdgeType.LINEAR, Nodes.all(0, 2), Nodes.all(1, 3), (1,), (2,))
    valid = {
        "groups": (NeuronGroup("in", 2), NeuronGroup("out", 3)),
        "blocks": (block,),
        "constants": (),
        "symmetries": (),
        "shapes": {"weight": (3, 2)},
    }
    return valid | changes


BLOCK = parts()["blocks"][0]

INVALID = {
    "empty group": (
        {"groups": (NeuronGroup("in", 2), NeuronGroup("out", 3), NeuronGroup("none", 0))},
        "neuron group 'none' must have at least one neuron, got 0",
    ),
    "two groups of one name": (
        {"groups": (NeuronGroup("in", 2), NeuronGroup("in", 3))},
        "unique names, 'in' occurs twice",
    ),
    "a block of an unknown parameter": (
        {"blocks": (BLOCK, replace(BLOCK, parameter="bias"))},
        "block refers to parameter 'bias', which has no entry in `shapes`",
    ),
    "a group that does not exist": (
        {"blocks": (replace(BLOCK, target=Nodes.all(2, 3)),)},
        "a block of parameter 'weight': group 2 is selected, but there are 2 groups",
    ),
    "a neuron outside its group": (
        {"blocks": (replace(BLOCK, target=Nodes(1, (3,), (1,), offset=1)),)},
        "a block of parameter 'weight': neuron 3 of group 'out' is selected, but the group has 3",
    ),
    "strides for other factors": (
        {"blocks": (replace(BLOCK, source_strides=(1, 1)),)},
        "a block of parameter 'weight' has 2 strides for side.sizes=",
    ),
    "a neuron twice on one side": (
        {"blocks": (replace(BLOCK, source=Nodes(0, (2,), (0,))),)},
        "a block of parameter 'weight' must name each neuron once per side",
    ),
    "constants that do not pair up": (
        {"constants": (ConstantEdges(EdgeType.RESIDUAL, Nodes.all(0, 2), Nodes.all(1, 3)),)},
        "as many sources as targets, got 2 and 3",
    ),
    "constants outside their group": (
        {"constants": (ConstantEdges(EdgeType.RESIDUAL, Nodes.all(0, 3), Nodes.all(1, 3)),)},
        "constant edges: neuron 2 of group 'in' is selected, but the group has 2",
    ),
    "elements beyond the parameter": (
        {"blocks": (replace(BLOCK, offset=1),)},
        "a block of parameter 'weight' reaches beyond the parameter's 6 elements",
    ),
    "a parameter on no edge": (
        {"shapes": {"weight": (3, 2), "bias": (3,)}},
        r"parameter 'bias' of shape \(3,\) lies on no edge",
    ),
    "elements on no edge": (
        {"shapes": {"weight": (4, 2)}},
        "every element of parameter 'weight' must lie on exactly one edge, but 2 lie on none and 0 on several",
    ),
    "elements on two edges": (
        {"blocks": (BLOCK, replace(BLOCK, target=Nodes.all(1, 1)))},
        "every element of parameter 'weight' must lie on exactly one edge, but 0 lie on none and 2 on several",
    ),
    "a symmetry without blocks": (
        {"symmetries": (Symmetry("swap", torch.tensor([[2, 3]])),)},
        r"symmetry 'swap' must have units \[blocks, units, nodes\]",
    ),
    "a symmetry of nodes that do not exist": (
        {"symmetries": (Symmetry("swap", torch.tensor([[[4], [5]]])),)},
        "symmetry 'swap' must name each existing node at most once",
    ),
    "a symmetry that names a node twice": (
        {"symmetries": (Symmetry("swap", torch.tensor([[[2], [2]]])),)},
        "symmetry 'swap' must name each existing node at most once",
    ),
}


def test_the_valid_parts_are_accepted():
    """Every case of INVALID is one change away from a graph that is accepted."""
    graph = NeuralGraph(**parts())
    assert (graph.num_nodes, graph.num_edges, graph.num_parameters) == (5, 6 + 5, 6)


@pytest.mark.parametrize("changes, message", INVALID.values(), ids=INVALID)
def test_an_invalid_graph_is_refused_with_a_message_that_names_the_culprit(changes, message):
    """Each invariant is checked at construction, with an error of its own."""
    with pytest.raises(ValueError, match=message):
        NeuralGraph(**parts(**changes))


def test_an_unknown_group_is_answered_with_close_names():
    """``group`` finds by name, and otherwise suggests."""
    graph = gpt2(layers=1)
    assert graph.group("transformer.h.0.mlp.c_fc").size == 32
    with pytest.raises(KeyError, match=r"no neuron group 'transformer.h.0.mlp.fc'.*transformer.h.0.mlp.c_fc"):
        graph.group("transformer.h.0.mlp.fc")


def test_nodes_follow_their_strides():
    """A selection is row-major over its sizes, a stride of 0 repeats neurons, ``last`` is the largest position."""
    nodes = Nodes(0, (2, 3, 2), (4, 0, 1), offset=1)
    assert nodes.index().tolist() == [1, 2, 1, 2, 1, 2, 5, 6, 5, 6, 5, 6]
    assert (len(nodes), nodes.last(), nodes.is_contiguous()) == (12, 6, False)
    assert Nodes(0, (2, 3), (3, 1)).is_contiguous()


# A parameter [heads 2, taps 2, inputs 3, channels 4]: sources are inputs, targets (heads, channels), features taps.
FACTORED = EdgeBlock(
    "weight", EdgeType.OTHER, Nodes.all(0, 3), Nodes(1, (2, 4), (4, 1)), (4,), (24, 1), (2,), (12,), offset=0
)


def test_a_block_with_several_factors_views_the_parameter_as_sources_targets_features():
    """``view`` is the permute and reshape that its strides describe, and ``elements`` are the flat positions of it."""
    parameter = torch.randn(2, 2, 3, 4)
    expected = parameter.permute(2, 0, 3, 1).reshape(3, 8, 2)
    assert torch.equal(FACTORED.view(parameter), expected)
    assert torch.equal(parameter.flatten()[FACTORED.elements()], expected)
    assert FACTORED.shape == (3, 8, 2)
    assert FACTORED.edges == 24


def test_writing_a_view_back_restores_the_parameter():
    """``write`` undoes ``view``, and touches no element of other blocks."""
    parameter = torch.randn(2, 2, 3, 4)
    copy = torch.full_like(parameter, torch.nan)
    FACTORED.write(copy, FACTORED.view(parameter))
    assert torch.equal(copy, parameter)
    first_head = replace(FACTORED, target=Nodes(1, (1, 4), (4, 1)))
    first_head.write(copy, torch.zeros(3, 4, 2))
    assert (copy[0] == 0).all()
    assert torch.equal(copy[1], parameter[1])


def test_a_parameter_that_is_not_contiguous_can_be_viewed_but_not_written():
    """Writing through a copy would be lost in silence, so it is refused."""
    parameter = torch.randn(4, 3, 2, 2).permute(3, 2, 1, 0)
    assert torch.equal(FACTORED.view(parameter), FACTORED.view(parameter.contiguous()))
    with pytest.raises(ValueError, match=r"`parameter` must be contiguous .* got strides"):
        FACTORED.write(parameter, torch.zeros(3, 8, 2))


def test_blocks_of_a_parameter_inside_a_larger_storage():
    """Views and writes start at the parameter's own first element."""
    storage = torch.arange(100.0)
    parameter = storage[10:58].view(2, 2, 3, 4)
    assert torch.equal(FACTORED.view(parameter), FACTORED.view(parameter.clone()))
    FACTORED.write(parameter, torch.zeros(3, 8, 2))
    assert storage.nonzero().flatten().tolist() == [*range(1, 10), *range(58, 100)]


def test_in_degree_counts_the_edges_of_the_explicit_graph():
    """``in_degree`` is the number of edges of ``to_pyg`` that end in a node, self loop included."""
    for graph in (mlp(), convnet(), gpt2(), llama()):
        edges = graph.to_pyg(pos=0).edge_index
        assert torch.equal(graph.in_degree, torch.bincount(edges[1], minlength=graph.num_nodes))
        assert edges.shape[1] == graph.num_edges


def models() -> dict:
    """Architectures with their hand-made graph, the module it describes, and an input."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokens = torch.tensor([[1, 4, 2, 9, 0, 3]])
    return {
        "mlp": lambda: (mlp(), mlp_module(), torch.randn(4, 5)),
        "convnet": lambda: (convnet(), convnet_module(), torch.randn(2, 3, 9, 9)),
        "gpt2": lambda: (
            gpt2(),
            GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=3, n_head=2)),
            tokens,
        ),
        "llama": lambda: (
            llama(),
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=13,
                    hidden_size=16,
                    intermediate_size=10,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                )
            ),
            tokens,
        ),
    }


def randomised(name: str) -> tuple[NeuralGraph, nn.Module, Tensor]:
    """In float64, with random biases and gains, so that nothing is symmetric by its initial value."""
    torch.manual_seed(0)
    graph, module, inputs = models()[name]()
    module = module.double().eval()
    for parameter in module.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return graph, module, inputs.double() if inputs.is_floating_point() else inputs


def outputs(module: nn.Module, state: dict[str, Tensor], inputs: Tensor) -> Tensor:
    result = functional_call(module, state, (inputs,), tie_weights=False)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt2", "llama"])
def test_permuting_interchangeable_neurons_keeps_the_function(name):
    """The real model computes the same with a permuted state, most of whose elements have moved."""
    graph, module, inputs = randomised(name)
    state = module.state_dict()
    permuted = graph.permute(state, torch.Generator().manual_seed(1))
    before, after = outputs(module, state, inputs), outputs(module, permuted, inputs)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    moved = sum(int((permuted[n] != state[n]).sum()) for n in graph.parameter_names)
    assert moved > 0.5 * graph.num_parameters
    assert set(graph.shapes) == {n for n, _ in module.named_parameters()}


@pytest.mark.parametrize(
    "name, group",
    [
        ("mlp", "layer 0"),
        ("mlp", "layer 3"),
        ("convnet", "classes"),
        ("gpt2", "transformer.wte"),
        ("gpt2", "transformer.wpe"),
        ("llama", "model.layers.1.self_attn.q_proj"),
        ("llama", "model.layers.1.self_attn.k_proj"),
        ("llama", "lm_head"),
    ],
)
def test_permuting_pinned_neurons_changes_the_function(name, group):
    """Neurons with an identity of their own are not interchangeable: the negative control of the test above."""
    graph, module, inputs = randomised(name)
    assert graph.group(group).pinned
    start = graph.group_offsets[graph.groups.index(graph.group(group))]
    permutation = torch.arange(graph.num_nodes)
    end = start + graph.group(group).size
    permutation[start:end] = permutation[start:end].roll(1)
    state = module.state_dict()
    before = outputs(module, state, inputs)
    after = outputs(module, graph.permute(state, permutation=permutation), inputs)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


def test_an_alias_follows_the_parameter_that_it_is_tied_to():
    """A tied output embedding is permuted with the token embedding, not a second time and not left behind."""
    graph = gpt2()
    state = random_state(graph)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    permuted = graph.permute(state, torch.Generator().manual_seed(1))
    assert permuted["lm_head.weight"] is permuted["transformer.wte.weight"]
    assert not torch.equal(permuted["lm_head.weight"], state["lm_head.weight"])


def test_permuting_leaves_the_given_state_alone_and_passes_other_tensors_on():
    """``permute`` returns new tensors for parameters and the same ones for names that no block refers to."""
    graph = mlp()
    state = random_state(graph) | {"steps": torch.tensor(3)}
    before = {name: tensor.clone() for name, tensor in state.items()}
    permuted = graph.permute(state, torch.Generator().manual_seed(1))
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert permuted["steps"] is state["steps"]
    assert all(permuted[name] is not state[name] for name in graph.parameter_names)


def test_permuting_back_restores_the_state():
    """A permutation and its inverse cancel."""
    graph = llama()
    state = random_state(graph)
    permutation = graph.permutation(torch.Generator().manual_seed(3))
    there = graph.permute(state, permutation=permutation)
    back = graph.permute(there, permutation=permutation.argsort())
    assert any(not torch.equal(there[name], state[name]) for name in state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_permutation_that_leaves_a_slice_is_refused():
    """Neurons of a slice that a block covers cannot move to places that the block does not cover."""
    blocks = tuple(
        EdgeBlock(name, EdgeType.LINEAR, Nodes.all(0, 2), Nodes(1, (2,), (1,), offset), (1,), (2,))
        for name, offset in (("a", 0), ("b", 2))
    )
    groups = (NeuronGroup("in", 2), NeuronGroup("out", 4))
    graph = NeuralGraph(groups, blocks, (), (), {"a": (2, 2), "b": (2, 2)})
    with pytest.raises(ValueError, match="out of the slice"):
        graph.permute(random_state(graph), permutation=torch.tensor([0, 1, 4, 3, 2, 5]))


def test_frozen_blocks_are_permuted_but_are_no_edges():
    """A frozen layer is part of the function, so its state moves too, but it has no edge in the graph."""
    full = mlp()
    blocks = tuple(replace(block, trainable=not block.parameter.startswith("2.")) for block in full.blocks)
    graph = replace(full, blocks=blocks)
    assert graph.num_edges == full.num_edges - 6 * 7 - 6
    assert graph.parameter_names == ("0.weight", "0.bias", "4.weight", "4.bias")
    state, generator = random_state(full), torch.Generator().manual_seed(1)
    assert not torch.equal(graph.permute(state, generator)["2.weight"], state["2.weight"])


def test_a_symmetry_moves_whole_units_within_their_block():
    """Units change places only within a block of the symmetry, with all of their nodes, and other nodes stay."""
    units = torch.tensor([[[0, 5], [1, 6], [2, 7]], [[10, 13], [11, 14], [12, 15]]])
    seen = set()
    for seed in range(20):
        permutation = Symmetry("s", units).permutation(20, torch.Generator().manual_seed(seed))
        assert permutation.sort().values.tolist() == list(range(20))
        assert permutation[[3, 4, 8, 9, 16, 17, 18, 19]].tolist() == [3, 4, 8, 9, 16, 17, 18, 19]
        assert torch.equal(permutation[5:8], permutation[0:3] + 5)
        assert torch.equal(permutation[13:16], permutation[10:13] + 3)
        seen.add(tuple(permutation.tolist()))
    assert len(seen) > 5
