"""What nowcasting will cost, said before it is spent."""

import json
import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_helpers import Line, Pull, Raising, RawLoop, mlp, same, tiny_gpt2
from transformers import GPT2Config
from typer.testing import CliRunner

from hf_nino import cli
from hf_nino.commands.estimate import as_json, as_table, estimate_model, without_weights
from hf_nino.nowcaster import LinearNowcaster, NiNoModel, NowcasterConfig, WNNModel
from hf_nino.training import History, announcement, make_store
from hf_nino.training import estimate as estimates
from hf_nino.training.estimate import Estimate, calibrate, extrapolate, matrix_rate, readable, step_seconds

GUESS = Estimate(
    parameters=1000,
    context=5,
    period=100,
    interval=20,
    history_device="cpu",
    history_dtype="float32",
    seconds_per_nowcast=3.0,
    seconds_per_snapshot=0.2,
    seconds_per_step=0.5,
    steps_are="as given",
)


class Clock:
    """Time that only passes when someone lets it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (estimates, announcement):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


class Costly(Line):
    """Takes ``fixed`` seconds and ``each`` for every parameter, by the clock."""

    def __init__(self, clock, fixed=0.0, each=0.0):
        self.clock, self.fixed, self.each = clock, fixed, each

    def nowcast(self, graph, states, horizon):
        self.clock.now += self.fixed + self.each * sum(tensor.numel() for tensor in states[0].values())
        return super().nowcast(graph, states, horizon)


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_extrapolation_is_exact_on_a_line():
    """Through two points of ``2 + 3 n``; with one point, or with noise that makes a larger size cheaper, the mean cost
    per parameter of the larger one carries on."""
    assert extrapolate((10, 40), (32.0, 122.0), 1000) == pytest.approx(3002.0)
    assert extrapolate((40, 40), (80.0, 80.0), 1000) == pytest.approx(2000.0)
    assert extrapolate((10, 40), (90.0, 80.0), 1000) == pytest.approx(2000.0)
    assert extrapolate((10, 40), (1.0, 80.0), 1) >= 0


def test_overhead_is_time_spent_over_time_trained():
    """One nowcast, five snapshots, and a copy of parameters and moments for a hundred steps: (3 + 5 * 0.2 + 3 * 0.2)
    / (100 * 0.5); what the nowcaster carries is copied as well, and nothing where no nowcast is taken back."""
    assert GUESS.overhead == pytest.approx(0.092)
    assert replace(GUESS, watched=False).overhead == pytest.approx(0.08)
    assert replace(GUESS, carried_bytes=2 * GUESS.snapshot_bytes).overhead == pytest.approx(0.1)
    # The first one also needs memory: for 5 snapshots, its prediction, parameters and moments.
    first = replace(GUESS, seconds_of_new_memory=0.1).seconds_of_the_first
    assert first == pytest.approx(3 + 5 * 0.2 + 3 * 0.2 + (5 + 1 + 3) * 0.1)
    assert step_seconds(1000, 50, 1e6) == pytest.approx(0.3)
    assert [readable(size) for size in (7, 1536, 3 * 2**30)] == ["7 B", "1.5 KiB", "3 GiB"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_a_full_history_takes(tmp_path, dtype):
    """Bytes in host memory, and bytes of the files on the disk without their headers."""
    store = make_store(tiny_gpt2())
    parameters = sum(tensor.numel() for tensor in store.live().values())
    found = Estimate(**(vars(GUESS) | {"parameters": parameters, "history_dtype": dtype}))
    histories = [History(5, dtype, place) for place in ("cpu", f"disk:{tmp_path}")]
    for history in histories:
        for step in range(5):
            history.append(store.live(), step)
    in_memory = sum(t.numel() * t.element_size() for state in histories[0].states() for t in state.values())
    headers = [int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in histories[1].files()]
    on_disk = sum(path.stat().st_size for path in histories[1].files()) - sum(headers)
    assert found.memory["cpu"] == {"host": in_memory} and found.memory["device"] == {"device": in_memory}
    assert found.memory["disk"] == {"disk": on_disk, "host": on_disk // 5}
    assert found.undo_bytes == 12 * found.parameters == found.to_dict()["undo_bytes"]


# -- calibration ----------------------------------------------------------------------------------------------------


def test_a_cost_that_is_linear_is_found_exactly(monkeypatch):
    """By a clock that only the nowcaster moves: fixed cost and cost per parameter are told apart, at any size."""
    clock = Clock(monkeypatch)
    calibration = calibrate(Costly(clock, fixed=0.01, each=1e-6), 10**9)
    for parameters in (10**6, 10**9):
        assert calibration.nowcast_seconds(parameters) == pytest.approx(0.01 + 1e-6 * parameters)
    assert calibration.snapshot_seconds(10**9) == 0


def test_a_cost_that_goes_with_shapes_is_found_by_the_work_that_the_nowcaster_says(monkeypatch):
    """One that takes as long as a matrix has elements times rows: exact for long matrices, where the number of
    parameters alone would say three times as much."""
    clock = Clock(monkeypatch)

    class Squaring(Costly):
        def work(self, shapes, device="cpu"):
            return sum(rows * rows * columns for rows, columns in shapes)

        def nowcast(self, graph, states, horizon):
            clock.now += 1e-9 * sum(len(tensor) * tensor.numel() for tensor in states[0].values())
            return Line.nowcast(self, graph, states, horizon)

    nowcaster, shapes = Squaring(clock), [(10, 1000)] * 7
    found = calibrate(nowcaster, 70_000)
    assert found.nowcast_seconds(nowcaster.work(shapes)) == pytest.approx(7e-4)
    plain = Costly(clock)
    assert plain.work(shapes) == 70_000
    monkeypatch.setattr(Squaring, "work", Costly.work)
    assert calibrate(nowcaster, 70_000).nowcast_seconds(70_000) > 2e-3


def test_no_trial_is_larger_than_the_model_or_than_it_must_be(monkeypatch):
    """A slow nowcaster is tried on one small matrix, a fast one on nothing larger than the model."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(estimates, "LARGEST", 2**18)
    assert calibrate(Costly(clock, fixed=9.0), 10**9).sizes == (estimates.SMALLEST, estimates.SMALLEST)
    assert calibrate(Costly(clock), 50_000).sizes == (2**14, 223**2)
    assert calibrate(Costly(clock), 10**9).sizes == (2**16, 2**18)
    assert calibrate(Costly(clock), 7).sizes == (4, 4)


@pytest.mark.parametrize(
    "make",
    [
        LinearNowcaster,
        lambda: NiNoModel(NowcasterConfig(hidden_size=4, context=3, max_features=1)),
        lambda: WNNModel(NowcasterConfig(nowcaster_type="wnn", hidden_size=4)),
        Pull,
    ],
    ids=["linear", "nino", "wnn", "memory"],
)
@pytest.mark.parametrize("place", ["cpu", "model", "disk:unused"])
def test_calibration_leaves_nothing_behind(make, place, tmp_path, monkeypatch):
    """Every kind of nowcaster can be timed; random streams and the disk stay as they were, a memory is empty."""
    monkeypatch.chdir(tmp_path)
    nowcaster = make()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    calibration = calibrate(nowcaster, 400, history_device=place, history_dtype=torch.bfloat16)
    assert calibration.sizes == (400, 400) and min(calibration.nowcast) > 0 and calibration.snapshot > 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not nowcaster.memory() and not list(tmp_path.iterdir())
    assert calibration.memory == (4.0 if isinstance(nowcaster, Pull) else 0.0)


def test_the_rate_of_matrix_products_is_positive():
    """And finite, whatever the machine."""
    assert 0 < matrix_rate() < float("inf")


# -- during a run ---------------------------------------------------------------------------------------------------


def announced(caplog):
    return [record for record in caplog.records if "of training time" in record.message]


def run_for(clock, seconds_per_step, nowcaster, steps=30):
    """A run whose steps take ``seconds_per_step`` by the clock."""
    loop = RawLoop(nowcaster, period=20, steps=steps)
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        loop.run(step)
    return loop


@pytest.mark.parametrize(("each", "level"), [(1e-6, logging.INFO), (1e-2, logging.WARNING)])
def test_a_run_says_once_what_nowcasts_cost(monkeypatch, caplog, each, level):
    """Once the first steps have been timed; as a warning above 5% of training time, otherwise for those who listen."""
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    nowcaster = Costly(clock, each=each)
    loop = run_for(clock, 0.125, nowcaster)
    (record,) = announced(caplog)
    found = loop.optimizer.nowcasting.announcement.estimate
    parameters = sum(p.numel() for p in mlp().parameters())
    assert found.parameters == parameters and (found.period, found.interval) == (20, 6)
    assert found.seconds_per_step == pytest.approx(0.125)
    assert found.overhead == pytest.approx(each * parameters / (20 * 0.125))
    assert record.levelno == level and (found.overhead > 0.05) is (level == logging.WARNING)


def test_time_spent_on_nowcasts_is_not_taken_for_training(monkeypatch):
    """Nowcasts that fall into the timed steps do not make the steps look longer."""
    clock = Clock(monkeypatch)
    loop = RawLoop(Costly(clock, fixed=5.0), period=3, steps=20)
    for step in range(1, 21):
        clock.now += 0.25
        loop.run(step)
    assert loop.optimizer.nowcasting.nowcasts == 6
    assert loop.optimizer.nowcasting.announcement.estimate.seconds_per_step == pytest.approx(0.25)


def test_only_the_first_rank_speaks(monkeypatch, caplog):
    """Another rank neither measures nor logs."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "1")
    clock = Clock(monkeypatch)
    assert run_for(clock, 0.1, Costly(clock)).optimizer.nowcasting.announcement.estimate is None
    assert not announced(caplog)


@pytest.mark.parametrize("make", [Raising, Pull])
def test_the_announcement_does_not_touch_the_run(make):
    """A nowcaster that fails in the calibration, and one with a memory: the run is the same as without."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RANK", "1")
        silent = RawLoop(make(), period=4, steps=30)
        final = silent.run(30)
    loop = RawLoop(make(), period=4, steps=30)
    assert same(loop.run(30), final)
    assert (loop.optimizer.nowcasting.announcement.estimate is None) is (make is Raising)
    assert loop.optimizer.nowcasting.nowcasts == silent.optimizer.nowcasting.nowcasts


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A configuration without weights."""
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, **ids)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_model_is_estimated_from_its_configuration(folder):
    """No weights are made; parameters that are tied count once; the guess of a step is 6 operations per parameter and
    token, or what the user says."""
    assert all(parameter.is_meta for parameter in without_weights(folder).parameters())
    name, found = estimate_model(folder, "linear", period=1000, history_dtype="bfloat16", batch_tokens=2**20)
    expected = 32 * 16 + 16 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
    assert (name, found.parameters) == ("GPT2LMHeadModel", expected)
    assert (found.period, found.interval, found.snapshot_bytes) == (1000, 200, 2 * expected)
    assert found.steps_are.startswith("at least, for 1,048,576 tokens") and found.seconds_per_step > 0
    _, given = estimate_model(folder, "linear", period=1000, seconds_per_step=0.25)
    assert given.seconds_per_step == 0.25 and given.steps_are == "as given"
    assert sum(p.numel() for p in without_weights("gpt2").parameters()) == 124_439_808, "a model type will do"


def test_both_forms_say_the_same(folder):
    """JSON has every number; the table has each place, and a warning above 5%."""
    _, found = estimate_model(folder, "momentum", period=10, seconds_per_step=1e-9)
    values = json.loads(as_json("GPT2LMHeadModel", found))
    assert values["overhead"] == found.overhead and values["too_much"] is True
    assert values["memory"] == found.memory and values["carried_bytes"] == 8 * found.parameters
    table = as_table("GPT2LMHeadModel", "momentum", found)
    assert all(f"\n{row} " in table for row in ("device", "cpu", "disk", "nowcaster", "nowcast", "overhead"))
    assert "More than 5%" in table
    assert "More than 5%" not in as_table(
        "GPT2LMHeadModel", "linear", estimate_model(folder, "linear", seconds_per_step=60)[1]
    )


def test_the_command_prints_either(folder, monkeypatch, capsys):
    """``hf-nino estimate`` passes its options on, and a model that does not exist ends in one line."""
    options = ["estimate", folder, "--period", "500", "--step-seconds", "2", "--history-dtype", "float16", "--json"]
    result = CliRunner().invoke(cli.app, options, catch_exceptions=False)
    values = json.loads(result.output)
    assert (values["period"], values["seconds_per_step"], values["history_dtype"]) == (500, 2.0, "float16")
    assert "placement" in CliRunner().invoke(cli.app, ["estimate", folder], catch_exceptions=False).output
    monkeypatch.setattr("sys.argv", ["hf-nino", "estimate", "no-such-model"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "no-such-model" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "`batch_tokens` must be at least 1"),
        ({"seconds_per_step": 0.0}, "`step_seconds` must be above 0"),
        ({"seconds_per_step": float("nan")}, "`step_seconds` must be above 0"),
        ({"period": 3}, "`period` must be at least the 5 snapshots"),
        ({"history_device": "attic"}, "`history_device` must be"),
        ({"history_dtype": "int8"}, "`history_dtype` must be"),
    ],
)
def test_bad_options_are_named(folder, options, message):
    """Before anything is measured."""
    with pytest.raises(ValueError, match=message):
        estimate_model(folder, "linear", **options)
