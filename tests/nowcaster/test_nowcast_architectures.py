"""On the traced graphs of real architectures: blocks equal the explicit graph, and nowcasts respect the symmetries."""

import pytest
import torch
import transformers
from nowcaster_cases import blockwise_deltas, original_nowcaster, random_nowcaster, reference_deltas, trajectory

from hf_nino.graph import NeuralGraph
from hf_nino.nowcaster import LinearNowcaster


def gpt2():
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, **sizes))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes, **heads))


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=61, max_position_embeddings=16, **sizes))


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))


class ConvNet(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 5, 3), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5, 4),
        )  # fmt: skip


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.ReLU(), torch.nn.Linear(9, 8), torch.nn.Linear(8, 3))


ARCHITECTURES = {
    "gpt2": (gpt2, None),
    "llama": (llama, None),
    "bert": (bert, None),
    "vit": (vit, None),
    "conv": (ConvNet, torch.zeros(2, 3, 8, 8)),
    "mlp": (mlp, torch.zeros(2, 7)),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def graph(request):
    make, inputs = ARCHITECTURES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    return NeuralGraph.from_model(model, inputs)


@pytest.mark.parametrize("make", [original_nowcaster, random_nowcaster])
def test_blocks_equal_the_explicit_graph(graph, make):
    """The same scaled deltas to 1e-5, for trained and random weights and the graph's own positional encoding."""
    model, states, pos = make(), trajectory(graph), graph.positional_encoding(8)
    with torch.no_grad():
        ours = blockwise_deltas(model, graph, states, model.max_horizon, pos)
        expected = reference_deltas(model, graph, states, model.max_horizon, pos)
    for mine, other in zip(ours, expected, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("make", [original_nowcaster, random_nowcaster, LinearNowcaster])
def test_nowcasts_are_equivariant(graph, make):
    """Permuting interchangeable neurons of the history permutes the nowcast: both networks are foreseen alike."""
    nowcaster, states = make(), trajectory(graph)
    permutation = graph.permutation(torch.Generator().manual_seed(1))
    permuted = [graph.permute(state, permutation=permutation) for state in states]
    assert any(not torch.equal(permuted[-1][name], states[-1][name]) for name in states[-1])
    ours = nowcaster.nowcast(graph, permuted, 5)
    expected = graph.permute(nowcaster.nowcast(graph, states, 5), permutation=permutation)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)


def test_permutations_that_the_model_does_not_have_show(graph):
    """Negative control: permuting the elements of a parameter on their own is no symmetry, and the deltas tell."""
    nowcaster, states = random_nowcaster(), trajectory(graph)
    name = max(states[0], key=lambda n: states[0][n].numel())
    order = torch.randperm(states[0][name].numel(), generator=torch.Generator().manual_seed(0))

    def shuffle(state):
        return {**state, name: state[name].flatten()[order].view_as(state[name])}

    ours = nowcaster.nowcast(graph, [shuffle(state) for state in states], 5)[name]
    expected = shuffle(nowcaster.nowcast(graph, states, 5))[name]
    assert (ours - expected).abs().max() > 1e-3
