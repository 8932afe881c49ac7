"""The fast path computes the same function as the reference, in bounded memory."""

import pytest
import torch
from nowcaster_cases import (
    GRAPHS,
    attention_graph,
    blockwise_deltas,
    mlp_graph,
    original_nowcaster,
    positions,
    random_nowcaster,
    reference_deltas,
    trajectory,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nino.nowcaster.modeling import token_rows

TOLERANCE = 1e-5
NOWCASTERS = {
    "original": original_nowcaster,
    "2 layers": lambda: random_nowcaster(num_layers=2),
    "3 layers": lambda: random_nowcaster(num_layers=3),
    "4 layers, gelu": lambda: random_nowcaster(num_layers=4, hidden_size=7, activation="gelu"),
    "context 3": lambda: random_nowcaster(context=3, positional_size=4, max_features=12),
}


def assert_close(ours, expected, tolerance=TOLERANCE):
    """Scaled deltas agree to `tolerance`, in units of the parameter's spread or, if larger, of the largest delta."""
    assert len(ours) == len(expected) > 0
    for mine, other in zip(ours, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_reference(name, nowcaster):
    """Blocks and the explicit graph give the same scaled deltas, for one horizon and for all."""
    graph, model = GRAPHS[name](), NOWCASTERS[nowcaster]()
    states, pos = trajectory(graph, model.context), positions(graph, model.config.positional_size)
    with torch.no_grad():
        for horizon in (1, model.max_horizon, None):
            expected = reference_deltas(model, graph, states, horizon, pos)
            assert_close(blockwise_deltas(model, graph, states, horizon, pos), expected)
        # Negative control: other states, other deltas.
        other = blockwise_deltas(model, graph, trajectory(graph, model.context, seed=1), None, pos)
        assert max(float((a - b).abs().max()) for a, b in zip(other, expected, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", GRAPHS)
def test_does_not_depend_on_the_tile(name):
    """Tiles of one edge, of a few that divide nothing, and of everything give the same deltas."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    with torch.no_grad():
        whole = blockwise_deltas(model, graph, states, 2, pos, tile=10**6)
        for tile in (1, 7, 50):
            assert_close(blockwise_deltas(model, graph, states, 2, pos, tile=tile), whole)


def test_token_positions():
    """A table of token positions changes the tokens' nodes in both forms alike."""
    graph, model = attention_graph(), random_nowcaster(token_position_vocabulary=20)
    states, pos, token = trajectory(graph), positions(graph), token_rows(graph, 20)
    with torch.no_grad():
        ours = blockwise_deltas(model, graph, states, 2, pos, token=token)
        assert_close(ours, reference_deltas(model, graph, states, 2, pos, token))
        without = blockwise_deltas(model, graph, states, 2, pos, token=torch.zeros_like(token))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, without, strict=True)) > 100 * TOLERANCE


def test_gradients_equal_the_reference():
    """Differentiable in the weights: gradients of both forms agree, and every weight gets one."""
    graph, model = attention_graph(), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    gradients = []
    for deltas in (reference_deltas, blockwise_deltas):
        model.zero_grad()
        sum(delta.square().mean() for delta in deltas(model, graph, states, None, pos)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # The network knows 9 taps and all edge types, this graph has one tap and some types.
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_memory_is_bounded_by_tile_nodes_and_parameter(num_layers):
    """No tensor is larger than a tile x H, the nodes x 2 H, or one parameter; the reference holds E x H."""
    graph, model = (
        attention_graph(tokens=400, heads=4, width=12),
        random_nowcaster(hidden_size=32, num_layers=num_layers),
    )
    states, pos, tile = trajectory(graph), positions(graph), 256
    hidden = model.config.hidden_size
    bound = max(
        tile * hidden,
        graph.num_nodes * 2 * hidden,
        max(state.numel() for state in states[0].values()),
        sum(weight.numel() for weight in model.parameters()),
    )
    assert bound < graph.num_edges * hidden / 10
    with torch.no_grad():
        with Largest() as largest:
            blockwise_deltas(model, graph, states, 3, pos, tile=tile)
        assert largest.numel <= bound
        with Largest() as largest:
            reference_deltas(model, graph, states, 3, pos)
        assert largest.numel >= graph.num_edges * hidden


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("form", [reference_deltas, blockwise_deltas])
def test_equivariant(name, form):
    """Permuting interchangeable neurons of the states permutes the deltas; permuting pinned neurons does not."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)

    def deltas_of(permutation):
        permuted = [graph.permute(state, permutation=permutation) for state in states]
        return as_state(graph, form(model, graph, permuted, 4, pos))

    still = deltas_of(torch.arange(graph.num_nodes))
    free = graph.permutation(torch.Generator().manual_seed(3))
    moved = graph.permute(still, permutation=free)
    assert any(not torch.equal(moved[name], still[name]) for name in still)
    assert difference(deltas_of(free), moved) < TOLERANCE

    pinned = torch.arange(graph.num_nodes)
    group = next(i for i, group in enumerate(graph.groups) if group.pinned)
    nodes = slice(graph.group_offsets[group], graph.group_offsets[group] + graph.groups[group].size)
    pinned[nodes] = pinned[nodes].flip(0)
    assert difference(deltas_of(pinned), graph.permute(still, permutation=pinned)) > 100 * TOLERANCE


def as_state(graph, deltas):
    state = {name: torch.zeros(graph.shapes[name]) for name in graph.parameter_names}
    with torch.no_grad():
        for block, delta in zip(graph.trainable_blocks, deltas, strict=True):
            block.write(state[block.parameter], delta)
    return state


def difference(ours, expected):
    return max(float((ours[name] - expected[name]).abs().max()) for name in expected)


def test_reads_snapshots_of_any_layout_and_dtype():
    """Transposed, float64 and bfloat16 snapshots give what their contiguous float32 copies give."""
    graph, model = mlp_graph(), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    rounded = [{name: tensor.bfloat16().float() for name, tensor in state.items()} for state in states]
    odd = [
        {name: t.bfloat16() if i % 2 else t.double().t().contiguous().t() for name, t in state.items()}
        for i, state in enumerate(rounded)
    ]
    with torch.no_grad():
        assert_close(blockwise_deltas(model, graph, odd, 2, pos), blockwise_deltas(model, graph, rounded, 2, pos))
