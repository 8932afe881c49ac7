"""Meta-training of nowcasters that are told horizon and learning rates: what they hear, learn, and leave behind."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from meta_helpers import SHAPES, config, lines, ramp, settings, training, waves, write_run
from safetensors.torch import load_file

from hf_nino.commands.meta_train import train_nowcaster
from hf_nino.metatrain import meta_train, meta_training
from hf_nino.metatrain.held_out import measure, summarise
from hf_nino.metatrain.meta_loop import MetaTraining
from hf_nino.metatrain.meta_report import evaluation_table
from hf_nino.metatrain.meta_settings import MetaSettings
from hf_nino.metatrain.meta_training import start_network
from hf_nino.metatrain.objective import Objective, scaled_deltas
from hf_nino.metatrain.sampling import Slice, draw_horizons, read_batch, recorded_rates
from hf_nino.nowcaster import Rates, load_nowcaster
from hf_nino.nowcaster.conditions import Conditions

CONTEXT = 3
BOTH = {"horizon_input": True, "rate_input": True}
SWITCHES = [{"horizon_input": True}, {"rate_input": True}, BOTH]
KINDS = ["nino", "wnn"]
STEPS = 60


def decay(t, snapshots=12):
    """Constant for the first half, then down to 0."""
    return 1.0 if t < snapshots / 2 else max(0.0, 2 - 2 * (t + 0.5) / snapshots)


def rate_sums(rate, snapshots=12):
    return [sum(rate(u) for u in range(t)) for t in range(snapshots)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("told") / "run", waves(), rate_sums=rate_sums(decay))


# -- what they are told ----------------------------------------------------------------------------------------------


def test_the_recorded_learning_rates_are_told(run):
    """Means over the steps of each interval, of those before, and of those to the horizon; measured in the history's
    mean.  At the beginning there is nothing before, behind the end nothing to come."""
    piece = Slice(4, 2)  # snapshots 4, 6 and 8
    told = recorded_rates(run, piece, CONTEXT, 1)
    expected = [(decay(t) + decay(t + 1)) / 2 for t in (2, 4, 6)]
    assert told.past == pytest.approx(expected)
    unit = (expected[1] + expected[2]) / 2
    assert told.ahead == pytest.approx((decay(8) + decay(9)) / 2 / unit) and told.ahead < 0.6
    assert recorded_rates(run, Slice(0, 1), CONTEXT, 2) == Rates((1.0, 1.0, 1.0), 2.0)
    assert recorded_rates(run, Slice(9, 1), CONTEXT, 4).ahead == 0.0


def test_a_batch_tells_each_slice_its_own(run):
    """Horizons and rates of each slice and target; a run with a constant learning rate tells of no rates, whatever
    they are, and neither does a history without any."""
    batch = read_batch(run, [Slice(0, 1), Slice(6, 1, only=(2, 5))], CONTEXT, horizons=3)
    assert batch.conditions.horizons.tolist() == [[1, 2, 3], [2, 1, 1]]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    told = recorded_rates(run, Slice(6, 1), CONTEXT, 2)
    assert batch.conditions.ahead[1, 0].item() == pytest.approx(told.ahead)
    assert batch.conditions.past[1].tolist() == pytest.approx([rate / told.unit for rate in told.past])
    assert batch.conditions.history()[0].abs().max() == 0 < batch.conditions.history()[1].abs().max()


def test_constant_learning_rates_are_no_learning_rates(tmp_path):
    for name, rate in (("constant", lambda t: 1e-3), ("none", lambda t: 0.0)):
        one = write_run(tmp_path / name, waves(), rate_sums=rate_sums(rate))
        conditions = read_batch(one, [Slice(2, 1)], CONTEXT, horizons=3).conditions
        assert conditions.history().abs().max() < 1e-5 and conditions.outlook().abs().max() < 1e-5


def test_horizons_are_drawn_without_favour(tmp_path):
    """Each slice gets as many as asked for, ascending, all equally likely; the states are those of these horizons."""
    source, counts = random.Random(0), Counter()
    for _ in range(400):
        piece = draw_horizons(source, Slice(0, 1), 8, 3)
        assert len(piece.only) == 3 and list(piece.only) == sorted(set(piece.only))
        counts.update(piece.only)
    assert counts.keys() == set(range(1, 9)) and max(counts.values()) - min(counts.values()) < 60
    assert draw_horizons(source, Slice(0, 1), 2, 3).only == (1, 2)
    run = write_run(tmp_path / "run", ramp(0))
    future = read_batch(run, [Slice(1, 1, only=(2, 4))], CONTEXT, horizons=4).future["head.weight"]
    assert future[0].flatten(1)[:, 0].tolist() == [1 + 2 + 2, 1 + 2 + 4]


@pytest.mark.parametrize("kind", KINDS)
def test_switches_do_not_change_which_slices_are_drawn(run, kind):
    """The same places and signs with and without; only those with a switch draw horizons."""
    drawn = []
    for values in ({}, BOTH):
        meta = training([run], config(nowcaster_type=kind, **values), settings(horizons=2))
        drawn.append([meta.example(step, 0) for step in range(4)])
    for (_, plain, signs), (_, told, same) in zip(*drawn, strict=True):
        assert all(torch.equal(plain.past[name], told.past[name]) for name in plain.past)
        assert (signs is None and same is None) or torch.equal(signs, same)
        assert told.mask.shape[1] <= 2
    assert max(plain.mask.shape[1] for _, plain, _ in drawn[0]) > 2


def test_targets_are_means_of_their_neighbourhood(tmp_path):
    """As many snapshots on both sides: none at the end of the run, and none from before the end of the past.  The
    past and targets on a line stay as they are."""
    shake = write_run(tmp_path / "shake", lambda name, shape, t: torch.full(shape, float(t % 3 == 0) + t))
    piece, value = Slice(0, 1), [float(t % 3 == 0) + t for t in range(12)]

    def told(neighbours, of=shake):
        batch = read_batch(of, [piece], CONTEXT, 9, neighbours)
        return batch.past["head.bias"][0, :, 0].tolist(), batch.future["head.bias"][0, :, 0].tolist()

    assert told(0) == (value[:3], value[3:])
    past, future = told(2)
    widths = [1, 2, 2, 2, 2, 2, 2, 1, 0]  # of the snapshots 3 to 11
    expected = [sum(value[t - w : t + w + 1]) / (2 * w + 1) for t, w in zip(range(3, 12), widths, strict=True)]
    assert past == value[:3] and future == pytest.approx(expected) and future != value[3:]
    straight = write_run(tmp_path / "lines", lines())
    assert told(2, straight)[1] == pytest.approx(told(0, straight)[1], abs=1e-5)


def test_a_neighbour_that_is_not_finite_spoils_the_target(tmp_path):
    def motion(name, shape, t):
        return torch.full(shape, math.nan if t == 6 and name == "head.bias" else float(t))

    run = write_run(tmp_path / "run", motion)
    assert read_batch(run, [Slice(0, 1)], CONTEXT, 9, 1).mask[0].tolist() == [True] * 2 + [False] * 3 + [True] * 4
    assert read_batch(run, [Slice(0, 1)], CONTEXT, 9, 0).mask[0].tolist() == [True] * 3 + [False] + [True] * 5


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", SWITCHES)
def test_predictions_of_a_batch_are_those_of_nowcasts(run, kind, values):
    """Each slice and horizon is predicted as ``nowcast`` predicts it with the recorded learning rates."""
    network = start_network(config(nowcaster_type=kind, **values), None, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    shape, slices = SHAPES.of(run), [Slice(0, 1), Slice(3, 2), Slice(7, 1, only=(2,))]
    batch = read_batch(run, slices, CONTEXT, 4)
    with torch.no_grad():
        deltas = [(block, delta) for _, block, delta in scaled_deltas(network, shape, batch)]
    pos = {"pos": shape.positions(4, torch.device("cpu"))} if kind == "nino" else {}
    for i, history in enumerate(batch.histories):
        for k in batch.mask[i].nonzero().flatten().tolist():
            horizon = int(batch.conditions.horizons[i, k])
            rates = recorded_rates(run, slices[i], CONTEXT, horizon) if network.reads_rates else None
            nowcast = network.nowcast(shape.graph, history, horizon, rates=rates, **pos)
            for block, delta in deltas:
                scale = batch.scales[i][block.parameter]
                ours = scale.undo(scale.apply(block.view(history[-1][block.parameter])) + delta[i, ..., k])
                torch.testing.assert_close(block.view(nowcast[block.parameter]), ours, rtol=1e-4, atol=1e-5)
    assert max(float((delta[0] - delta[1]).abs().max()) for _, delta in deltas) > 1e-3


def driven(rate, seed):
    """Every element moves along a line of its own, as fast as the learning rate is high."""
    sums = rate_sums(rate, 40)

    def motion(name, shape, t):
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * seed)
        return 0.3 * torch.randn(shape, generator=generator) + 0.1 * sums[t] * torch.randn(shape, generator=generator)

    return motion


def test_learning_rates_foretell_what_histories_do_not(tmp_path):
    """Two runs that are the same until the learning rate of one falls.  Not told of it, no nowcaster can come below
    half of what they differ by; one that is told comes to less than half of that, and stays above it if the rates it
    is told are those of constant schedules."""
    batches = []
    for name, low in (("stays", 1.0), ("falls", 0.1)):

        def rate(t, low=low):
            return 1.0 if t < 12 else low

        one = write_run(tmp_path / name, driven(rate, 0), 21, rate_sums=rate_sums(rate, 21))
        batches.append(read_batch(one, [Slice(9, 1)], CONTEXT, 8))
    shape = SHAPES.of(one)
    first, second = batches
    assert all(torch.equal(first.past[name], second.past[name]) for name in first.past)
    apart = Objective(start_network(config(nowcaster_type="wnn", max_horizon=8), None, 0))
    still = [apart(shape, batch).persistence.item() for batch in batches]
    bound = (still[0] - still[1]) / 2  # both go the same way

    def loss(objective):
        return sum(objective(shape, batch).loss for batch in batches) / 2

    found = {}
    for name, values in (("plain", {"horizon_input": True}), ("told", BOTH)):
        network = start_network(config(nowcaster_type="wnn", hidden_size=16, max_horizon=8, **values), None, 0)
        with torch.no_grad():  # begin with predictions of the size of what is to be predicted
            for weight in (network.edge_in.weight, *(layer.weight for layer in network.hidden)):
                weight.mul_(10)
        objective, optimizer = Objective(network), torch.optim.Adam(network.parameters(), lr=1e-2)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
            optimizer.zero_grad()
            loss(objective).backward()
            optimizer.step()
        found[name] = loss(objective).item()
    assert found["told"] < 0.5 * bound < bound <= found["plain"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conditions, "outlook", lambda self: torch.zeros_like(self.ahead).unsqueeze(-1))
        assert loss(objective) > bound


def test_every_part_learns(run):
    """Gradients reach what hears of horizon and rates, kept or computed again."""
    for kind in KINDS:
        network = start_network(config(nowcaster_type=kind, **BOTH), None, seed=0)
        batch = read_batch(run, [Slice(3, 1), Slice(6, 1, only=(1, 3))], CONTEXT, 4)
        Objective(network)(SHAPES.of(run), batch).loss.backward()
        names = [name for name, _ in network.named_parameters() if name.startswith(("modulation", "rate_in"))]
        assert len(names) == 5 and all(network.get_parameter(name).grad.abs().sum() > 0 for name in names)


# -- measuring -------------------------------------------------------------------------------------------------------


def test_errors_are_told_apart_by_learning_rate(run):
    """Horizons over which the rate stays, and those over which it falls: with their slices, and their own best lines.
    A run with a constant rate has one phase, and there the numbers are those of everything."""
    network = start_network(config(), None, 0)
    errors = measure(network, [run], SHAPES, 1)
    found = summarise(errors)
    assert found["phases"].keys() == {"constant", "falling"}
    for phase, inside in (("constant", lambda r: 0.9 <= r < 1.1), ("falling", lambda r: r < 0.9)):
        part, first = found["phases"][phase], []
        for one in errors:
            if one.mask[0] and inside(one.rate[0]):
                share = one.elements / one.elements.sum()
                first.append(float((one.persistence[0] * share).sum()))
        assert part["error"]["persistence"][0] == pytest.approx(sum(first) / len(first))
        assert 0 < part["slices"] <= found["slices"] and part["relative"]["persistence"][0] == 1.0
        assert part["error"]["mean"]["linear"] <= part["error"]["mean"]["persistence"]
    assert "| falling |" in evaluation_table({"interval": 1, "runs": found, "tasks": summarise([])})


def test_a_constant_rate_is_one_phase(tmp_path):
    found = summarise(measure(start_network(config(), None, 0), [write_run(tmp_path / "run", waves())], SHAPES, 1))
    assert found["phases"].keys() == {"constant"}
    assert found["phases"]["constant"]["error"]["linear"] == found["error"]["ALL"]["linear"]


# -- from beginning to end -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("trajectories")
    for seed in range(3):
        write_run(found / f"run-{seed}", waves(seed), interval=10, rate_sums=rate_sums(decay))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, kind):
    """With all switches on: killed a step after a checkpoint, weights and losses are the same in the end; another
    number of horizons is another run."""
    monkeypatch.setattr(meta_training, "Shapes", lambda: SHAPES)
    step_of = MetaTraining._step

    def run(out, killed=False, **recipe):
        def step(self, examples):
            if self.step_count == 4 and killed:
                raise KeyboardInterrupt
            step_of(self, examples)

        monkeypatch.setattr(MetaTraining, "_step", step)
        usual = {"interval_range": (10, 20), "horizons": 2, "target_neighbours": 1} | recipe
        every = {"save_every": 3, "evaluate_every": 6, "evaluation_slices": 2, "device": "cpu"}
        return meta_train(folder, out, config=config(nowcaster_type=kind, **BOTH), settings=settings(**usual), **every)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", killed=True)
    with pytest.raises(ValueError, match="made with another `horizons`"):
        run(tmp_path / "broken", horizons=3)
    resumed = run(tmp_path / "broken")
    assert resumed["losses"] == whole["losses"] and resumed["evaluation"] == whole["evaluation"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first) and "rate_in.weight" in first


def test_runs_begun_before_there_was_a_setting_go_on(folder, tmp_path, monkeypatch):
    """A checkpoint that does not know of `horizons` had its default."""
    monkeypatch.setattr(meta_training, "Shapes", lambda: SHAPES)
    options = {"config": config(), "device": "cpu", "evaluation_slices": 2, "save_every": 6, "evaluate_every": 6}
    recipe = settings(interval_range=(10, 20))
    meta_train(folder, tmp_path, settings=recipe, **options)
    state = tmp_path / "checkpoint-6" / "state.json"
    kept = json.loads(state.read_text())
    for name in ("horizons", "target_neighbours"):
        del kept["decides"]["settings"][name]
    state.write_text(json.dumps(kept))
    said = []
    meta_train(folder, tmp_path, settings=recipe, say=said.append, **options)
    assert "finished already" in said[-1]


def test_the_command_has_the_switches(folder, tmp_path, monkeypatch):
    """They end in the configuration and the recipe; with a nowcaster to begin with, its own are kept."""
    monkeypatch.setattr(meta_training, "Shapes", lambda: SHAPES)
    usual = {"steps": 2, "batch_size": 1, "slices": 2, "warmup_steps": 1, "intervals": "10-20", "device": "cpu"}
    sizes = {"kind": "wnn", "hidden_size": 8, "context": 3, "max_horizon": 4, "period": 60}
    told = {"horizon_input": True, "rate_input": True, "horizons": 3, "target_neighbours": 1}
    train_nowcaster(str(folder), tmp_path / "first", [].append, **usual, **sizes, **told)
    nowcaster = load_nowcaster(tmp_path / "first")
    assert nowcaster.reads_rates and nowcaster.any_horizon and nowcaster.config.format_version == 2
    summary = json.loads((tmp_path / "first" / "meta_training.json").read_text())
    assert summary["settings"]["horizons"] == 3 and summary["settings"]["target_neighbours"] == 1
    assert "falling" in (tmp_path / "first" / "evaluation.md").read_text()
    begun = {"initial": str(tmp_path / "first")}
    train_nowcaster(str(folder), tmp_path / "second", [].append, **usual, **begun)
    assert load_nowcaster(tmp_path / "second").reads_rates
    with pytest.raises(ValueError, match="`rate_input` must be left out with `initial`"):
        train_nowcaster(str(folder), tmp_path / "third", [].append, **usual, **begun, rate_input=True)


def test_settings_refuse_nonsense():
    assert MetaSettings.from_dict(MetaSettings(horizons=2, target_neighbours=3).to_dict()).target_neighbours == 3
    with pytest.raises(ValueError, match="`horizons` must be at least 1, got 0"):
        MetaSettings(horizons=0)
    with pytest.raises(ValueError, match="`target_neighbours` must be at least 0 and finite, got -1"):
        MetaSettings(target_neighbours=-1)
