"""The readable reference computes the equations it states."""

import pytest
import torch
from nowcaster_cases import GRAPHS, attention_graph, conv_graph, positions, random_nowcaster, scales_of, trajectory
from torch_geometric.data import Data

from hf_nino.nowcaster.message_passing import EdgeUpdate, ModulatedConvolution
from hf_nino.nowcaster.modeling import token_rows


def small_graph():
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.tensor([[0, 1, 2, 3, 0, 3, 0, 1, 2, 3], [1, 2, 1, 1, 2, 0, 0, 1, 2, 3]])
    return torch.randn(4, 6, generator=generator), edge_index, torch.randn(10, 6, generator=generator)


def test_convolution_is_the_mean_of_modulated_messages():
    """x_i' = output(combine([x_i; mean_j scale(e_ij) * pair([x_i; x_j]) + shift(e_ij)])), edge by edge."""
    torch.manual_seed(0)
    layer = ModulatedConvolution(6)
    x, edge_index, e = small_graph()
    expected = []
    for node in range(4):
        messages = []
        for (source, target), attr in zip(edge_index.T.tolist(), e, strict=True):
            if target == node:
                scale, shift = layer.modulation(attr)[:6], layer.modulation(attr)[6:]
                messages.append(scale * layer.pair(torch.cat([x[node], x[source]])) + shift)
        expected.append(layer.output(layer.combine(torch.cat([x[node], torch.stack(messages).mean(0)]))))
    torch.testing.assert_close(layer(x, edge_index, e), torch.stack(expected), rtol=1e-5, atol=1e-6)
    reversed_edges = layer(x, edge_index.flip(0), e)
    assert (reversed_edges - torch.stack(expected)).abs().max() > 1e-2


def test_edge_update_reads_the_right_ends():
    """e' = output(act(edge(e) + source(x_j) + target(x_i))) for an edge j -> i."""
    torch.manual_seed(0)
    layer = EdgeUpdate(6, torch.tanh)
    x, edge_index, e = small_graph()
    for (j, i), attr, updated in zip(edge_index.T.tolist(), e, layer(x, edge_index, e), strict=True):
        expected = layer.output(torch.tanh(layer.edge(attr) + layer.source(x[j]) + layer.target(x[i])))
        torch.testing.assert_close(updated, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GRAPHS)
def test_missing_taps_are_taps_of_zero(name):
    """Data with fewer taps than the nowcaster knows gives the same deltas as data padded with zeros."""
    graph = GRAPHS[name]()
    model, states = random_nowcaster(), trajectory(graph)
    narrow, wide = (graph.to_pyg(states, features=features, pos=0) for features in (None, 9))
    narrow.pos = wide.pos = positions(graph)
    with torch.no_grad():
        few, all_taps = model(narrow, 3), model(wide, 3)
    assert few.shape == (graph.num_edges, graph.max_features) and all_taps.shape == (graph.num_edges, 9)
    torch.testing.assert_close(few, all_taps[:, : graph.max_features])


def test_no_horizon_means_all_horizons():
    """model(data) is [E, F, K], and its column k - 1 is model(data, k)."""
    graph = conv_graph()
    model, states = random_nowcaster(), trajectory(graph)
    scales = scales_of(graph, states)
    data = graph.to_pyg([{n: scales[n].apply(s[n]) for n in s} for s in states], pos=0)
    data.pos = positions(graph)
    with torch.no_grad():
        everything = model(data)
        assert everything.shape == (graph.num_edges, 9, model.max_horizon)
        for horizon in range(1, model.max_horizon + 1):
            torch.testing.assert_close(everything[..., horizon - 1], model(data, horizon))


@pytest.mark.parametrize("horizon", [0, 7, -1, True, 2.0])
def test_a_horizon_out_of_range_is_refused(horizon):
    """The error names the range."""
    data = Data(edge_index=torch.zeros(2, 1, dtype=torch.int64), edge_type=torch.ones(1, dtype=torch.int64))
    data.edge_attr, data.pos = torch.zeros(1, 5), torch.zeros(1, 8)
    with pytest.raises(ValueError, match="`horizon` must be a whole number from 1 to 6"):
        random_nowcaster()(data, horizon)


@pytest.mark.parametrize(("width", "message"), [(7, r"\[edges, taps \* 5 snapshots\]"), (50, "10 kernel taps")])
def test_edge_attr_of_the_wrong_width_is_refused(width, message):
    """Columns must be whole taps of `context` snapshots, and no more taps than the nowcaster knows."""
    data = Data(edge_index=torch.zeros(2, 1, dtype=torch.int64), edge_type=torch.ones(1, dtype=torch.int64))
    data.edge_attr, data.pos = torch.zeros(1, width), torch.zeros(1, 8)
    with pytest.raises(ValueError, match=message):
        random_nowcaster()(data, 1)


def test_token_rows_number_tokens_only():
    """Row 1 + token for the neurons of token embeddings, row 0 for all others; a larger vocabulary than the table's is
    refused, and so is data without them."""
    graph = attention_graph(tokens=9)
    rows = token_rows(graph, 12)
    assert rows[:9].tolist() == list(range(1, 10)) and not rows[9:].any()
    with pytest.raises(ValueError, match=r"'tokens' has 9 tokens.* knows 8"):
        token_rows(graph, 8)
    data = graph.to_pyg(trajectory(graph), pos=0)
    data.pos = positions(graph)
    with pytest.raises(ValueError, match=r"needs `data\.token`"):
        random_nowcaster(token_position_vocabulary=12)(data, 1)
