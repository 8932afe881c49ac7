"""On the traced graphs of real architectures: blocks equal the explicit graph, and nowcasts respect the symmetries."""

import pytest
import torch
from architectures import ARCHITECTURES
from nowcaster_cases import blockwise_deltas, original_nowcaster, random_nowcaster, reference_deltas, trajectory

from hf_nino.graph import NeuralGraph
from hf_nino.nowcaster import LinearNowcaster


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def graph(request):
    return NeuralGraph.from_model(request.param.model(), request.param.inputs)


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
