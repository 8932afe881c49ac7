"""Networks that are told the horizon and the learning rates: in both forms, on ranks, in files; and what rates are."""

import json

import pytest
import torch
from nowcaster_cases import (
    GRAPHS,
    attention_graph,
    blockwise_deltas,
    mlp_graph,
    positions,
    random_nowcaster,
    reference_deltas,
    scales_of,
    trajectory,
)
from ranks_cases import divided, on_ranks, put_together, rows_of, worst
from torch_geometric.data import Data

from hf_nino.nowcaster import NiNoModel, NowcasterConfig, Rates, WNNModel
from hf_nino.nowcaster.blockwise import blockwise_samples
from hf_nino.nowcaster.conditions import Conditions
from hf_nino.nowcaster.scaling import measure_scale

SWITCHES = {
    "horizon": {"horizon_input": True},
    "rates": {"rate_input": True},
    "both": {"horizon_input": True, "rate_input": True},
}
FALLING = Rates((1.0, 0.9, 0.6, 0.4, 0.2), 0.7)
RISING = Rates((0.1, 0.2, 0.3, 0.5, 0.8), 4.5)
switches = pytest.mark.parametrize("switch", SWITCHES)


def random_wnn(**config):
    values = {"nowcaster_type": "wnn", "hidden_size": 16, "max_horizon": 6, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WNNModel(NowcasterConfig(**values)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


MAKERS = {"nino": random_nowcaster, "wnn": random_wnn}
kinds = pytest.mark.parametrize("kind", MAKERS)


def rates_for(model, rates=FALLING):
    return rates if model.reads_rates else None


def told_deltas(model, graph, states, pos, conditions):
    """Scaled deltas of every block from the explicit graph, [J, I, F, K]."""

    def told(data, horizon):
        return model(data, conditions=conditions)

    return reference_deltas(told, graph, states, None, pos)


def largest(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


# -- both forms ------------------------------------------------------------------------------------------------------


@switches
@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_blocks_equal_the_explicit_graph(name, switch):
    """For one horizon with learning rates, and for all horizons; other rates, or another horizon, give others."""
    graph, model = GRAPHS[name](), random_nowcaster(**SWITCHES[switch])
    states, pos = trajectory(graph), positions(graph)
    conditions = model.conditions(3, rates_for(model))
    expected = [delta[..., 0] for delta in told_deltas(model, graph, states, pos, conditions)]
    ours = blockwise_deltas(model, graph, states, 3, pos, conditions=conditions)
    scale = max(1.0, *(float(delta.abs().max()) for delta in expected))
    assert largest(ours, expected) < 1e-5 * scale
    everything = blockwise_deltas(model, graph, states, None, pos)
    assert everything[0].shape[-1] == 6
    assert largest(everything, reference_deltas(model, graph, states, None, pos)) < 1e-5 * scale
    for horizon in (1, 6):
        alone = blockwise_deltas(model, graph, states, horizon, pos)
        assert largest(alone, [delta[..., horizon - 1] for delta in everything]) < 1e-5 * scale
    other = model.conditions(3, RISING) if model.reads_rates else model.conditions(5)
    assert largest(ours, blockwise_deltas(model, graph, states, 3, pos, conditions=other)) > 1e-3


@switches
@torch.no_grad()
def test_samples_are_told_different_things(switch):
    """Two histories with horizons and learning rates of their own, at once, are each what they are alone."""
    graph, model = attention_graph(), random_nowcaster(**SWITCHES[switch])
    pos, samples = positions(graph), [trajectory(graph, seed=seed) for seed in range(2)]
    told = [
        Conditions.of([1, 4], [Rates(FALLING.past, ahead) for ahead in (0.5, 1.5)]),
        Conditions.of([6, 2], [Rates(RISING.past, ahead) for ahead in (9.0, 2.5)]),
    ]
    both = Conditions(*(torch.cat([getattr(c, part) for c in told]) for part in ("horizons", "past", "ahead")))
    scales = [scales_of(graph, states) for states in samples]
    together = list(blockwise_samples(model, graph, samples, scales, None, pos, conditions=both))
    for i, (states, conditions) in enumerate(zip(samples, told, strict=True)):
        expected = told_deltas(model, graph, states, pos, conditions)
        assert largest([delta[i] for _, delta in together], expected) < 1e-5 * 10
    assert largest([d[0] for _, d in together], [d[1] for _, d in together]) > 1e-2


@switches
def test_gradients_equal_those_of_the_explicit_graph(switch):
    """Also of what hears of horizon and learning rates; every weight gets one."""
    graph, model = attention_graph(), random_nowcaster(**SWITCHES[switch])
    states, pos = trajectory(graph), positions(graph)
    told = [Rates(FALLING.past, ahead) for ahead in (0.5, 1.0, 1.2, 1.4, 2.0, 2.1)]
    conditions, gradients = Conditions.of([1, 2, 3, 4, 5, 6], told), []
    for deltas in (
        told_deltas(model, graph, states, pos, conditions),
        blockwise_deltas(model, graph, states, None, pos, conditions=conditions),
    ):
        model.zero_grad()
        sum(delta.square().mean() for delta in deltas).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert any(name.startswith("modulation") for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@kinds
@switches
@torch.no_grad()
def test_a_nowcast_is_the_scaled_last_state_plus_the_delta(kind, switch):
    graph, model = mlp_graph(), MAKERS[kind](**SWITCHES[switch])
    states, pos = trajectory(graph), positions(graph)
    options = {"pos": pos} if kind == "nino" else {}
    nowcast = model.nowcast(graph, states, 4, rates=rates_for(model), **options)
    conditions = model.conditions(4, rates_for(model))
    for block, delta in zip(graph.trainable_blocks, told_deltas(model, graph, states, pos, conditions), strict=True):
        scale = measure_scale([state[block.parameter] for state in states])
        expected = scale.undo(scale.apply(block.view(states[-1][block.parameter])) + delta[..., 0])
        torch.testing.assert_close(block.view(nowcast[block.parameter]), expected, rtol=1e-5, atol=1e-5)
        assert (expected - block.view(states[-1][block.parameter])).abs().max() > 1e-4


@kinds
@pytest.mark.parametrize("switch", ["rates", "both"])
def test_ranks_hear_the_same(kind, switch):
    """Rows of ranks are rows of the nowcast, which is another one without the rates."""
    graph, model = attention_graph(), MAKERS[kind](**SWITCHES[switch])
    states = trajectory(graph)
    ranges = divided({name: graph.shapes[name] for name in graph.parameter_names}, 2, None)

    def work(shards):
        rows = [rows_of(ranges, shards.ranks.rank, state) for state in states]
        return model.nowcast(graph, rows, 3, shards=shards, rates=FALLING)

    ours, expected = put_together(ranges, on_ranks(ranges, 2, work)), model.nowcast(graph, states, 3, rates=FALLING)
    assert worst(ours, expected, states[-1]) < 1e-5
    assert worst(model.nowcast(graph, states, 3), expected, states[-1]) > 1e-3


# -- what is told ----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("switch", ["rates", "both"])
def test_only_ratios_of_learning_rates_count(kind, switch):
    """Ten times all rates is the same; constant ones of any size are no rates; falling ones are something else."""
    graph, model = mlp_graph(), MAKERS[kind](**SWITCHES[switch])
    states = trajectory(graph)

    def nowcast(rates=None):
        return torch.cat([tensor.flatten() for tensor in model.nowcast(graph, states, 3, rates=rates).values()])

    tenfold = Rates(tuple(10 * rate for rate in FALLING.past), FALLING.ahead)
    torch.testing.assert_close(nowcast(tenfold), nowcast(FALLING), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nowcast(Rates((3e-4,) * 5, 3.0)), nowcast(), rtol=1e-5, atol=1e-6)
    for other in (FALLING, Rates((1.0,) * 5, 1.0), Rates(FALLING.past, 3.0)):
        assert (nowcast(other) - nowcast()).abs().max() > 1e-4


@kinds
def test_a_horizon_may_be_a_fraction_where_it_is_an_input(kind):
    """Between whole ones; the same call is refused by a nowcaster with an output row for each."""
    graph, model = mlp_graph(), MAKERS[kind](horizon_input=True)
    states = trajectory(graph)
    two, more, three = (model.nowcast(graph, states, horizon)["fc.0.weight"] for horizon in (2, 2.5, 3.0))
    assert (more - two).norm() < (three - two).norm() > 1e-4 and (more - three).norm() < (three - two).norm()
    for wrong in (0.5, 6.5, True):
        with pytest.raises(ValueError, match="`horizon` must be a number from 1 to 6"):
            model.nowcast(graph, states, wrong)
    with pytest.raises(ValueError, match="`horizon` must be a whole number from 1 to 6"):
        MAKERS[kind]().nowcast(graph, states, 2.5)


@kinds
def test_the_largest_factor_is_bounded(kind):
    """Features far outside of what was seen, and wild weights, do not lead out of the numbers."""
    model = MAKERS[kind](horizon_input=True, rate_input=True)
    with torch.no_grad():
        model.modulation.output.weight.mul_(1e6)
        model.modulation.output.bias.zero_()
        factor = model.modulation(model.conditions(6, Rates((0.0, 0.0, 0.0, 0.0, 1.0), 1e6)))[1]
    assert factor.isfinite().all() and factor.max() < 21 and factor.min() > 0.04


@kinds
def test_what_is_not_read_or_does_not_fit_is_refused(kind):
    graph = mlp_graph()
    states = trajectory(graph)
    assert not MAKERS[kind]().reads_rates and not MAKERS[kind](horizon_input=True).reads_rates
    with pytest.raises(ValueError, match="`rates` must be left out for a nowcaster that does not read them"):
        MAKERS[kind](horizon_input=True).nowcast(graph, states, 3, rates=FALLING)
    model = MAKERS[kind](rate_input=True)
    assert model.reads_rates and not model.any_horizon
    with pytest.raises(ValueError, match="`rates` must have 5 past learning rates, got 2"):
        model.nowcast(graph, states, 3, rates=Rates((1.0, 1.0), 3.0))
    with pytest.raises(ValueError, match="`rates` must be left out with all horizons"):
        model.conditions(None, FALLING)


def test_rates_from_the_ends_of_intervals():
    """A schedule that falls evenly: what is known at the snapshots alone gives the means that all steps give."""
    interval, snapshots = 10, [20, 30, 40, 50, 60]

    def rate(step):
        return 1.0 - step / 100

    sums = [sum(rate(t + 0.5) for t in range(end - interval, end)) for end in snapshots]
    future = sum(rate(t + 0.5) for t in range(60, 90))
    told = Rates.at_snapshots([rate(t) for t in snapshots], future, interval)
    assert told.past[1:] == pytest.approx([each / interval for each in sums[1:]])
    assert told.ahead == pytest.approx(future / (sum(sums[1:]) / 4)) and told.ahead < 3 * 0.5
    assert Rates.at_snapshots([2.0] * 5, 2.0 * 70, 10) == Rates((2.0,) * 5, 7.0)
    assert Rates.constant(5, 7) == Rates((1.0,) * 5, 7.0)


@pytest.mark.parametrize(
    ("past", "ahead", "message"),
    [
        ((1.0, -1.0), 1.0, "`past` of learning rates must be at least 0 and finite, got -1.0"),
        ((1.0, 1.0), float("nan"), "`ahead` of learning rates must be at least 0 and finite, got nan"),
        ((1.0,), 1.0, "`past` of learning rates must have one for every snapshot, got 1"),
        ((1.0, 0.0, 0.0), 1.0, "`past` of learning rates must be above 0 somewhere"),
    ],
)
def test_impossible_rates_are_refused(past, ahead, message):
    with pytest.raises(ValueError, match=message):
        Rates(past, ahead)


# -- configurations and files ----------------------------------------------------------------------------------------


def test_configurations_without_switches_are_as_they_were():
    """Version 1, and no key that a reader of version 1 would not know; switches make it version 2."""
    plain = NowcasterConfig().to_dict()
    assert plain["format_version"] == 1 and not {"horizon_input", "rate_input"} & plain.keys()
    assert NowcasterConfig.from_dict(plain) == NowcasterConfig(format_version=1)
    for values in SWITCHES.values():
        config = NowcasterConfig(**values)
        told = json.loads(json.dumps(config.to_dict()))
        assert told["format_version"] == 2 and {"horizon_input", "rate_input"} <= told.keys()
        assert NowcasterConfig.from_dict(told) == config != NowcasterConfig()
        with pytest.raises(ValueError, match="`format_version` of a nowcaster must be 2, got 1"):
            NowcasterConfig.from_dict(told | {"format_version": 1})
    for wrong in (1, "yes", None):
        with pytest.raises(ValueError, match="`rate_input` of a nowcaster must be true or false"):
            NowcasterConfig(rate_input=wrong)
    with pytest.raises(ValueError, match="`format_version` of a nowcaster must be 1, got None"):
        NowcasterConfig.from_dict(plain | {"format_version": None})


@kinds
@switches
def test_round_trip_through_files(kind, switch, tmp_path):
    """What was saved nowcasts the same, bit for bit."""
    model, graph = MAKERS[kind](**SWITCHES[switch]), mlp_graph()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.any_horizon == model.config.horizon_input
    states = trajectory(graph)
    first, second = (one.nowcast(graph, states, 3, rates=rates_for(model)) for one in (model, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", [NiNoModel, WNNModel])
def test_switches_add_to_a_network_and_change_nothing_else(kind):
    """The same seed gives the same initial weights; a horizon as an input needs one output row."""

    def weights(**values):
        torch.manual_seed(0)
        config = NowcasterConfig(nowcaster_type=kind.nowcaster_type, hidden_size=8, **values)
        return kind(config).state_dict()

    with torch.random.fork_rng():
        plain, told, one = weights(), weights(rate_input=True), weights(horizon_input=True)
    assert told.keys() - plain.keys() == {"rate_in.weight"} | {
        f"modulation.{name}.{part}" for name in ("input", "output") for part in ("weight", "bias")
    }
    assert all(torch.equal(tensor, told[name]) for name, tensor in plain.items())
    assert told["rate_in.weight"].abs().max() > 0 and told["modulation.output.weight"].abs().max() > 0
    assert plain["edge_out.bias"].numel() == 40 * one["edge_out.bias"].numel()


def test_the_explicit_wnn_takes_taps_apart():
    """[E, F] for one horizon and [E, F, K] for all, equal to one another."""
    model = random_wnn(horizon_input=True, rate_input=True)
    data = Data(edge_attr=torch.randn(7, 3 * 5), edge_type=torch.ones(7, dtype=torch.int64))
    with torch.no_grad():
        everything = model(data)
        assert everything.shape == (7, 3, 6)
        torch.testing.assert_close(everything[..., 3], model(data, 4), rtol=1e-5, atol=1e-6)
