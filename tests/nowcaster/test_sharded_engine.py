"""Networks on shards: the rows of the nowcast of one process, for a share of its work, with sums over nodes alone."""

import math
import threading
from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES
from nowcaster_cases import GRAPHS, original_nowcaster, positions, random_nowcaster, trajectory
from ranks_cases import Meeting, Mute, divided, on_ranks, put_together, rows_of, taps_in_rows_graph, worst
from sample import sample_graph
from test_golden import Golden

from hf_nino.graph import NeuralGraph
from hf_nino.nowcaster import Engine, NiNoModel, NowcasterConfig, Rows, Shards, WNNModel, passes
from hf_nino.nowcaster.operations import operations
from hf_nino.nowcaster.portion import portion_of

TOLERANCE = 1e-5
DIVISIONS = [(1, None), (2, None), (3, 1), (5, 2)]
divisions = pytest.mark.parametrize(("size", "seed"), DIVISIONS)
MODELS = ("gpt2", "llama-grouped", "convolutional", "mixtral", "taps in rows", *GRAPHS)


def graph_of(name):
    if name in GRAPHS or name == "taps in rows":
        return (GRAPHS | {"taps in rows": taps_in_rows_graph})[name]()
    if name in ("gpt2", "mixtral"):
        return sample_graph("causal-lm", name)
    (architecture,) = (each for each in ARCHITECTURES if each.name == name)
    return NeuralGraph.from_model(architecture.model(), architecture.inputs)


@pytest.fixture(scope="module", params=MODELS)
def graph(request):
    return graph_of(request.param)


def ranges_of(graph, size, seed=None):
    return divided({name: graph.shapes[name] for name in graph.parameter_names}, size, seed)


def sharded(network, graph, states, horizon, ranges, size, meeting=None, **kwargs):
    """The nowcast put together from ranks, and each rank's part."""

    def work(shards):
        rows = [rows_of(ranges, shards.ranks.rank, state) for state in states]
        return network.nowcast(graph, rows, horizon, shards=shards, **kwargs)

    parts = on_ranks(ranges, size, work, meeting)
    return put_together(ranges, parts)


@divisions
def test_rows_of_ranks_are_rows_of_the_nowcast(graph, size, seed):
    """For every model, to 1e-5 of the largest step of each parameter, where rows are divided evenly or anyhow."""
    network, states = random_nowcaster(), trajectory(graph)
    ranges = ranges_of(graph, size, seed)
    ours = sharded(network, graph, states, 3, ranges, size)
    assert worst(ours, network.nowcast(graph, states, 3), states[-1]) < TOLERANCE


def test_a_trained_network():
    """The same with the original release's network."""
    graph, network = graph_of("gpt2"), original_nowcaster()
    states, ranges = trajectory(graph), ranges_of(graph, 3, 1)
    ours = sharded(network, graph, states, network.max_horizon, ranges, 3)
    assert worst(ours, network.nowcast(graph, states, network.max_horizon), states[-1]) < TOLERANCE


@pytest.mark.parametrize("layers", [2, 4])
def test_only_rounding_differs(layers):
    """In float64, with fewer layers or more, all that is left is the rounding of moments, which are float32."""
    graph, network = graph_of("gpt2"), random_nowcaster(num_layers=layers, activation="gelu").double()
    states = [{name: tensor.double() for name, tensor in state.items()} for state in trajectory(graph)]
    ranges = ranges_of(graph, 3, 1)
    assert worst(sharded(network, graph, states, 3, ranges, 3), network.nowcast(graph, states, 3), states[-1]) < 1e-7


@pytest.mark.parametrize("options", [{"engine": Engine(tile=200)}, {"pos": 0}, {"table": 200}], ids=str)
def test_options_of_a_nowcast_hold_on_ranks(options):
    """Small tiles, a given positional encoding, and networks with a table of token positions."""
    graph, table = graph_of("gpt2"), options.get("table")
    network = random_nowcaster(token_position_vocabulary=table)
    kwargs = {"engine": options["engine"]} if "engine" in options else {}
    if "pos" in options:
        kwargs["pos"] = positions(graph)
    states, ranges = trajectory(graph), ranges_of(graph, 3)
    ours = sharded(network, graph, states, 2, ranges, 3, **kwargs)
    assert worst(ours, network.nowcast(graph, states, 2, **kwargs), states[-1]) < TOLERANCE


def test_rows_come_back_in_their_own_dtype():
    """bfloat16 snapshots give bfloat16 rows, those of one process up to the last bit."""
    graph, network = graph_of("taps in rows"), random_nowcaster()
    states = [{name: tensor.bfloat16() for name, tensor in state.items()} for state in trajectory(graph)]
    ours = sharded(network, graph, states, 2, ranges_of(graph, 2), 2)
    expected = network.nowcast(graph, states, 2)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("forgotten", range(4))
def test_every_sum_matters(forgotten):
    """Negative control: ranks that keep the moments (sums 0 and 1) or the messages (2 and 3) for themselves foresee
    something else."""
    graph, network = graph_of("gpt2"), random_nowcaster()
    states, ranges, meeting = trajectory(graph), ranges_of(graph, 2), Meeting(2, frozenset({forgotten}))
    ours = sharded(network, graph, states, 3, ranges, 2, meeting)
    assert worst(ours, network.nowcast(graph, states, 3), states[-1]) > 1e-3
    assert len(meeting.sums) == 4


def test_nodes_are_the_same_on_all_ranks(monkeypatch):
    """What nodes have heard in a layer is the same on all ranks, bit for bit, and that of one process to 1e-5."""
    graph, network, heard = graph_of("llama-grouped"), random_nowcaster(), {}
    update = NiNoModel.update_nodes

    def watched(self, depth, x, mean):
        heard[threading.current_thread().name, depth] = mean.clone()
        return update(self, depth, x, mean)

    monkeypatch.setattr(NiNoModel, "update_nodes", watched)
    states, ranges = trajectory(graph), ranges_of(graph, 3, 1)
    sharded(network, graph, states, 3, ranges, 3)
    network.nowcast(graph, states, 3)
    for depth in range(2):
        first, *others = (heard[str(rank), depth] for rank in range(3))
        alone = heard[threading.current_thread().name, depth]
        assert all(torch.equal(first, other) for other in others)
        assert (first - alone).abs().max() <= TOLERANCE * alone.abs().max()


@pytest.mark.parametrize(("name", "size"), [("gpt2", 4), ("mixtral", 2), ("convolutional", 2)])
def test_work_is_divided(name, size, monkeypatch):
    """In each pass every edge is worked on by one rank, and with even ranges no rank has much more than its share.
    (Edges are counted where tiles are computed.)"""
    graph, network = graph_of(name), random_nowcaster()
    edges = Counter()

    def count(function):
        plain = getattr(passes, function)

        def counted(values, *args):
            tile = values.shape[2:4] if function == "sums_of_states" else values.shape[1:3]
            edges[function, threading.current_thread().name] += math.prod(tile)
            return plain(values, *args)

        monkeypatch.setattr(passes, function, counted)

    for function in ("sums_of_states", "sums_of_features", "decode"):
        count(function)
    sharded(network, graph, trajectory(graph), 3, ranges_of(graph, size), size)
    total = sum(block.edges for block in graph.trainable_blocks)
    for function in ("sums_of_states", "sums_of_features", "decode"):
        of_ranks = [edges[function, str(rank)] for rank in range(size)]
        assert sum(of_ranks) == total
        assert max(of_ranks) < 1.2 * total / size


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "taps in rows"])
def test_operations_of_ranks_are_those_of_the_nowcast(name):
    """Counted operations of edges add up to those of one process; nodes, which all ranks know, are counted by each."""
    graph, network, size = graph_of(name), random_nowcaster(), 3
    whole, ranges = operations(graph, network), ranges_of(graph, size, 1)
    parts = [operations(graph, network, portion_of(graph, Shards(ranges, Mute(rank, size)))) for rank in range(size)]
    assert sum(part.edges for part in parts) == whole.edges
    assert sum(part.activations for part in parts) == whole.activations
    assert whole.nodes < sum(part.nodes for part in parts) < size * whole.nodes


def test_what_is_not_finite_reaches_all_ranks():
    """One rank's NaN makes the nowcasts of all ranks what one process makes of it, and leaves nobody waiting."""
    graph, network = graph_of("mlp"), random_nowcaster()
    states, ranges = trajectory(graph), ranges_of(graph, 3)
    states[-1]["fc.1.bias"][-1] = float("nan")
    ours, expected = sharded(network, graph, states, 3, ranges, 3), network.nowcast(graph, states, 3)
    for name, tensor in expected.items():
        assert torch.equal(ours[name].isnan(), tensor.isnan())
    assert ours["fc.1.weight"].isnan().all() and ours["fc.0.weight"].isfinite().all()


def test_no_parameter_travels():
    """Ranks share a few numbers of each parameter, and N x H for each layer; no rows, except of parameters of which
    rows cut edges: those travel once for each snapshot, and back."""
    graph, network, size = graph_of("gpt2"), random_nowcaster(), 3
    meeting, parameters = Meeting(size), len(graph.parameter_names)
    sharded(network, graph, trajectory(graph), 3, ranges_of(graph, size), size, meeting)
    nodes = graph.num_nodes * network.config.hidden_size
    assert meeting.sums == [2 * parameters, parameters, nodes, nodes] and meeting.sent == 0
    cut, meeting = graph_of("taps in rows"), Meeting(size)
    sharded(network, cut, trajectory(cut), 3, ranges_of(cut, size), size, meeting)
    assert meeting.sent == (network.context + 1) * sum(
        math.prod(cut.shapes[n]) for n in ("flat.weight", "other.weight")
    )


def test_a_ranks_portion_is_found_once():
    """Blocks of rows are made once for a graph and its shards, and again for other shards."""
    graph = graph_of("conv")
    shards, others = (Shards(ranges_of(graph, 2, seed), Mute(0, 2)) for seed in (None, 1))
    assert portion_of(graph, shards) is portion_of(graph, shards)
    assert portion_of(graph, shards).blocks != portion_of(graph, others).blocks


@pytest.mark.parametrize("with_graph", [True, False])
@divisions
def test_wnn_on_ranks(size, seed, with_graph):
    """Networks that see elements alone: edge types of the rows from the graph or from names (fused query, key and
    value cut anywhere), scales of all rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = WNNModel(NowcasterConfig(nowcaster_type="wnn", hidden_size=16, max_horizon=6))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    graph = graph_of("gpt2") if with_graph else None
    shapes = {"a.c_attn.weight": (4, 12), "b.qkv.weight": (12, 4), "wte.weight": (7, 3), "ln.weight": (5,)}
    states = trajectory(graph or _Shapes(shapes))
    ranges = divided({name: tensor.shape for name, tensor in states[0].items()}, size, seed)
    expected = network.nowcast(graph, states, 3)
    assert worst(sharded(network, graph, states, 3, ranges, size), expected, states[-1]) < TOLERANCE
    if size > 1:
        alone = sharded(network, graph, states, 3, ranges, size, Meeting(size, frozenset({0, 1})))
        assert worst(alone, expected, states[-1]) > 1e-3


class _Shapes:
    """What `trajectory` reads of a graph."""

    def __init__(self, shapes):
        self.shapes, self.parameter_names = shapes, tuple(shapes)


def test_wnn_on_ranks_equals_the_original_code():
    """Rows of three ranks, put together, are what the original release predicts, to 1e-5 of each spread."""
    golden, network = Golden("gpt2_tiny"), original_nowcaster("nino_mlp")
    ranges = divided(golden.shapes, 3, 1)
    ours = sharded(network, None, golden.states, 7, ranges, 3)
    assert golden.worst(ours, "nino_mlp", 7) < TOLERANCE


def test_shards_that_do_not_fit_are_refused():
    """Before anything is said to the other ranks: rows of another shape, or of parameters that the graph has not."""
    graph, network = graph_of("mlp"), random_nowcaster()
    ranges, states = ranges_of(graph, 2), trajectory(graph)
    shards = Shards(ranges, Mute(1, 2))
    with pytest.raises(ValueError, match=r"`states` must hold rows .* on rank 1"):
        network.nowcast(graph, states, 1, shards=shards)
    wide = ranges | {"fc.0.weight": tuple(Rows((7, 4), rows.start, rows.stop) for rows in ranges["fc.0.weight"])}
    rows = [rows_of(ranges, 1, state) for state in states]
    rows = [state | {"fc.0.weight": torch.zeros(wide["fc.0.weight"][1].local_shape)} for state in rows]
    with pytest.raises(ValueError, match=r"`shards` must hold 'fc.0.weight' .* \(7, 3\), got \(7, 4\)"):
        network.nowcast(graph, rows, 1, shards=Shards(wide, Mute(1, 2)))
    table = random_nowcaster(token_position_vocabulary=3)
    words = graph_of("attention")
    ranges = ranges_of(words, 2)
    rows = [rows_of(ranges, 0, state) for state in trajectory(words)]
    with pytest.raises(ValueError, match="table of token positions knows 3"):
        table.nowcast(words, rows, 1, shards=Shards(ranges, Mute(0, 2)))
