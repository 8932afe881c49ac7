"""NiNoModel and WNNModel as nowcasters: states in, a future state out."""

import copy

import pytest
import torch
from nowcaster_cases import (
    GRAPHS,
    attention_graph,
    mlp_graph,
    positions,
    random_nowcaster,
    reference_deltas,
    trajectory,
)

from hf_nino.nowcaster import NiNoModel, Nowcaster, NowcasterConfig, WNNModel
from hf_nino.nowcaster.edge_types import edge_types_of
from hf_nino.nowcaster.scaling import measure_scale


def random_wnn(**config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = {"nowcaster_type": "wnn", "hidden_size": 16, "max_horizon": 6, **config}
        model = WNNModel(NowcasterConfig(**values)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("name", GRAPHS)
def test_nowcast_is_the_scaled_last_state_plus_the_delta(name):
    """Scale by mean and unbiased deviation over all elements and snapshots, add the reference's delta, scale back."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    nowcast = model.nowcast(graph, states, 4, pos=pos)
    with torch.no_grad():
        deltas = reference_deltas(model, graph, states, 4, pos)
    expected = {}
    for block, delta in zip(graph.trainable_blocks, deltas, strict=True):
        stacked = torch.stack([state[block.parameter] for state in states])
        mean, std = stacked.mean(), stacked.std()
        last = (block.view(states[-1][block.parameter]) - mean) / (std + 1e-6)
        expected.setdefault(block.parameter, torch.zeros(graph.shapes[block.parameter]))
        block.write(expected[block.parameter], (last + delta) * std + mean)
    assert nowcast.keys() == expected.keys()
    for parameter, tensor in expected.items():
        torch.testing.assert_close(nowcast[parameter], tensor, rtol=1e-5, atol=1e-5)
    assert max(float((nowcast[name] - states[-1][name]).abs().max()) for name in expected) > 1e-2


def test_scale_is_mean_and_unbiased_deviation():
    """The streamed moments are those of all elements and snapshots together."""
    snapshots = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) * 0.1 + i for i in range(5)]
    scale, stacked = measure_scale(snapshots), torch.stack(snapshots).double()
    assert scale.mean == pytest.approx(float(stacked.mean()), rel=1e-6)
    assert scale.std == pytest.approx(float(stacked.std()), rel=1e-6)
    assert scale.std != pytest.approx(float(stacked.std(correction=0)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [random_nowcaster, random_wnn])
def test_result_is_new_and_like_the_last_state(make, dtype):
    """Same names, shapes and dtype; the states are left alone; no gradient history."""
    graph, model = mlp_graph(), make()
    states = [{name: t.to(dtype).requires_grad_() for name, t in state.items()} for state in trajectory(graph)]
    before = copy.deepcopy(states)
    nowcast = model.nowcast(graph, states, 3)
    for name, tensor in states[-1].items():
        assert nowcast[name].shape == tensor.shape and nowcast[name].dtype == dtype
        assert not nowcast[name].requires_grad and nowcast[name].data_ptr() != tensor.data_ptr()
    for state, copied in zip(states, before, strict=True):
        assert all(torch.equal(state[name], copied[name]) for name in state)


@pytest.mark.parametrize("make", [random_nowcaster, random_wnn])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_constant_parameters_stay_finite_and_close(make, value):
    """A parameter whose elements are all equal in all snapshots (deviation 0) comes out finite, and as it was."""
    graph, model = mlp_graph(), make()
    states = trajectory(graph)
    for state in states:
        state["fc.0.bias"] = torch.full_like(state["fc.0.bias"], value)
    nowcast = model.nowcast(graph, states, 6)
    assert all(tensor.isfinite().all() for tensor in nowcast.values())
    torch.testing.assert_close(nowcast["fc.0.bias"], states[-1]["fc.0.bias"], rtol=1e-5, atol=1e-5)


def test_the_graph_supplies_the_positional_encoding_once(monkeypatch):
    """Without `pos`, the graph's own encoding is used; it is computed once per graph, not once per nowcast."""
    graph, model, calls = mlp_graph(), random_nowcaster(), []
    pos, states = positions(graph), trajectory(graph)
    monkeypatch.setattr(type(graph), "positional_encoding", lambda self, size=8: calls.append(size) or pos)
    for _ in range(2):
        nowcast = model.nowcast(graph, states, 1)
    assert calls == [8]
    expected = model.nowcast(graph, states, 1, pos=pos)
    assert all(torch.equal(nowcast[name], expected[name]) for name in expected)


def test_nowcast_without_a_graph_is_refused():
    """NiNoModel says that it needs the graph; WNNModel does not."""
    states = trajectory(mlp_graph())
    assert NiNoModel.needs_graph and not WNNModel.needs_graph
    with pytest.raises(ValueError, match="`graph` must be the model's NeuralGraph"):
        random_nowcaster().nowcast(None, states, 1)
    assert random_wnn().nowcast(None, states, 1).keys() == states[-1].keys()


@pytest.mark.parametrize("make", [random_nowcaster, random_wnn])
def test_states_that_do_not_match_the_graph_are_refused(make):
    """A missing name, a name too many, another shape, too few snapshots and a horizon out of range: one error each."""
    graph, model = mlp_graph(), make()
    states = trajectory(graph)
    missing = [{name: t for name, t in state.items() if name != "fc.1.bias"} for state in states]
    with pytest.raises(ValueError, match=r"missing \['fc.1.bias'\]"):
        model.nowcast(graph, missing, 1)
    with pytest.raises(ValueError, match=r"not in the graph \['extra'\]"):
        model.nowcast(graph, [{**state, "extra": torch.zeros(2)} for state in states], 1)
    with pytest.raises(ValueError, match=r"'fc.0.weight' in the graph's shape \(7, 3\), got \(3, 7\)"):
        model.nowcast(graph, [{**state, "fc.0.weight": state["fc.0.weight"].T} for state in states], 1)
    with pytest.raises(ValueError, match="5 snapshots"):
        model.nowcast(graph, states[1:], 1)
    with pytest.raises(ValueError, match="from 1 to 6"):
        model.nowcast(graph, states, 7)


def test_more_taps_than_the_nowcaster_knows_are_refused():
    """The error says how many the graph has and how many are known."""
    graph = GRAPHS["conv"]()
    with pytest.raises(ValueError, match="9 kernel taps on an edge, this nowcaster knows 4"):
        random_nowcaster(max_features=4).nowcast(graph, trajectory(graph), 1, pos=positions(graph))


def test_wnn_reads_edge_types_from_the_graph():
    """With a graph, its edge types count; without, names and shapes do: they differ for a graph that differs."""
    graph, model = attention_graph(), random_wnn()
    states = trajectory(graph)
    with_graph, without = model.nowcast(graph, states, 2), model.nowcast(None, states, 2)
    for name in ("wte.weight", "c_attn.weight", "c_attn.bias", "ln.weight", "c_proj.weight"):
        torch.testing.assert_close(with_graph[name], without[name])
    strided = GRAPHS["strided"]()
    states = trajectory(strided)
    odd = model.nowcast(strided, states, 2)["interleaved"], model.nowcast(None, states, 2)["interleaved"]
    torch.testing.assert_close(odd[0][:, ::2], odd[1][:, ::2])  # LINEAR in both
    assert (odd[0][:, 1::2] - odd[1][:, 1::2]).abs().min() > 1e-5  # OTHER in the graph only


def test_wnn_is_elementwise(monkeypatch):
    """An element's nowcast depends on its own states and its parameter's scale, not on its place or its tile."""
    model, states = random_wnn(), [{"w": t["fc.0.weight"]} for t in trajectory(mlp_graph())]
    nowcast = model.nowcast(None, states, 2)["w"]
    flipped = model.nowcast(None, [{"w": state["w"].flip(0)} for state in states], 2)["w"]
    torch.testing.assert_close(flipped.flip(0), nowcast)
    monkeypatch.setattr("hf_nino.nowcaster.modeling.WNN_TILE", 4)
    torch.testing.assert_close(model.nowcast(None, states, 2)["w"], nowcast)


@pytest.mark.parametrize(
    ("name", "shape", "kinds"),
    [
        ("h.0.ln_1.weight", (4,), [4]),
        ("h.0.ln_1.bias", (4,), [2]),
        ("conv1.weight", (4, 3, 3, 3), [3]),
        ("lm_head.weight", (9, 4), [1]),
        ("embed_tokens.weight", (9, 4), [5]),
        ("wpe.weight", (9, 4), [6]),
        ("token_type_embeddings.weight", (2, 4), [2]),
        ("self_attn.q_proj.weight", (4, 4), [7]),
        ("self_attn.k_proj.weight", (2, 4), [8]),
        ("attention.self.value.weight", (4, 4), [9]),
        ("attn.c_attn.weight", (4, 12), [7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9] * 4),
        ("attn.qkv.weight", (12, 4), [7] * 16 + [8] * 16 + [9] * 16),
        ("attn.qkv_proj.weight", (8, 4), [1]),
        ("attn.c_attn.bias", (12,), [2]),
        ("scale", (), [2]),
    ],
)
def test_edge_types_of_names(name, shape, kinds):
    """The release's rule, with the names of more architectures."""
    types = edge_types_of(name, shape).flatten().tolist()
    assert types == kinds * (len(types) // len(kinds))


def test_models_are_nowcasters_with_the_configuration_s_settings():
    """context, period and max_horizon come from the configuration; a configuration of the other type is refused."""
    model = random_nowcaster(context=3, period=250, max_horizon=7)
    assert isinstance(model, Nowcaster) and (model.context, model.period, model.max_horizon) == (3, 250, 7)
    assert not model.has_memory and model.memory() == {}
    with pytest.raises(ValueError, match="must be 'wnn' for WNNModel, got 'nino'"):
        WNNModel(NowcasterConfig())


def test_models_can_be_copied():
    """A deep copy nowcasts the same."""
    graph, model = mlp_graph(), random_nowcaster()
    states = trajectory(graph)
    first, second = model.nowcast(graph, states, 2), copy.deepcopy(model).nowcast(graph, states, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
