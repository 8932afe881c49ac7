"""When nowcasts happen, what they write, and that a bad one leaves the run as it was."""

import logging

import pytest
import torch
from training_helpers import (
    MAX_STEPS,
    PERIOD,
    Huge,
    Line,
    NotANumber,
    Pull,
    Raising,
    RawLoop,
    Stay,
    mlp,
    parameters,
    same,
    tiny_gpt2,
)

from hf_nino.nowcaster.base import Nowcaster
from hf_nino.training import InvalidNowcast, Nowcasting
from hf_nino.training.period import resolve_schedule


@pytest.fixture(scope="module")
def plain():
    loop = RawLoop(wrap=False)
    loop.run(MAX_STEPS)
    return loop.states


def drift(model, amount=0.01):
    """Something that moves parameters as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * (1 + parameter.abs()))


def drive(nowcasting, model, steps):
    """The parameters before and after each call of ``step``."""
    seen = {}
    for _ in range(steps):
        drift(model)
        before = parameters(model)
        nowcasting.step()
        seen[nowcasting.step_count] = (before, parameters(model))
    return seen


def changed(seen):
    return [step for step, (before, after) in seen.items() if not same(before, after)]


def test_a_nowcast_writes_exactly_what_the_rule_predicts():
    """At a multiple of the period the parameters become, bit for bit, the rule's prediction from the states of that
    window; at every other step they are left alone."""
    model = mlp()
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2)
    seen = drive(nowcasting, model, 13)
    assert changed(seen) == [6, 12]
    for step in (6, 12):
        history = [seen[step - 4][1], seen[step - 2][1], seen[step][0]]
        assert same(seen[step][1], Line().nowcast(None, history, 2))
    assert [(event.step, event.horizon, event.horizon_steps) for event in nowcasting.events] == [(6, 2, 4), (12, 2, 4)]
    assert nowcasting.nowcasts == 2 and nowcasting.rejected == 0


def test_a_nowcast_changes_the_run_and_keeps_every_parameters_memory(plain):
    """Up to the first nowcast a run equals the plain one, from there on it does not; no parameter is ever replaced."""
    loop = RawLoop()
    addresses = [p.data_ptr() for p in loop.model.parameters()]
    loop.run(MAX_STEPS)
    assert all(same(loop.states[step], plain[step]) for step in range(1, PERIOD))
    assert not any(same(loop.states[step], plain[step]) for step in range(PERIOD, MAX_STEPS + 1))
    assert [p.data_ptr() for p in loop.model.parameters()] == addresses


def test_nowcasting_draws_no_random_numbers_of_the_run(plain):
    """A nowcaster that predicts no move, drawing random numbers, leaves a run with dropout equal to the plain one."""
    loop = RawLoop(Stay())
    loop.run(MAX_STEPS)
    assert all(same(loop.states[step], plain[step]) for step in plain)
    assert loop.optimizer.nowcasting.nowcasts == 2


@pytest.mark.parametrize(
    ("nowcaster", "reason"), [(NotANumber, "not finite"), (Huge, "more than"), (Raising, "OverflowError: out of luck")]
)
def test_a_bad_nowcast_is_skipped_and_training_goes_on_as_without_it(plain, nowcaster, reason, caplog):
    """NaN, absurd sizes and exceptions: the run equals the plain one at every step, and the reason is logged."""
    loop = RawLoop(nowcaster())
    loop.run(MAX_STEPS)
    assert all(same(loop.states[step], plain[step]) for step in plain)
    nowcasting = loop.optimizer.nowcasting
    assert (nowcasting.nowcasts, nowcasting.rejected) == (0, 2)
    assert all(not event.accepted and reason in event.reason for event in nowcasting.events)
    warnings = [record.message for record in caplog.records if "skipped" in record.message]
    assert all(reason in message for message in warnings)
    assert len(warnings) == (1 if nowcaster is Raising else 2), "the same exception is said once"


@pytest.mark.parametrize("nowcaster", [NotANumber, Raising])
def test_a_bad_nowcast_raises_when_asked_to(nowcaster):
    """With ``on_invalid="raise"`` the first bad nowcast ends the run with its step and reason."""
    loop = RawLoop(nowcaster(), on_invalid="raise")
    with pytest.raises(InvalidNowcast, match=f"nowcast at step {PERIOD}: "):
        loop.run(MAX_STEPS)


def test_frozen_and_unmoved_parameters_are_not_touched():
    """A frozen parameter, and one without gradient, keep their bits through nowcasts; the others do not."""

    class Everything(Line):
        def nowcast(self, graph, states, horizon):
            return {name: tensor + 1e-3 for name, tensor in states[-1].items()}

    model = mlp()
    model[0].weight.requires_grad_(False)
    resting = model[3].bias
    before = parameters(model)
    nowcasting = Nowcasting(Everything(), model, period=PERIOD, horizon=2)
    for step in range(1, PERIOD + 1):
        with torch.no_grad():
            model[0].bias.add_(0.01)
            model[3].weight.add_(0.01)
        if step == PERIOD:
            moved = parameters(model)
        nowcasting.step()
    after = parameters(model)
    assert nowcasting.nowcasts == 1
    assert torch.equal(after["0.weight"], before["0.weight"]) and torch.equal(resting, before["3.bias"])
    assert not torch.equal(after["0.bias"], moved["0.bias"])


def test_tied_parameters_stay_tied_and_are_written_once():
    """After nowcasts the output layer of GPT-2 still is its embedding, and holds the rule's prediction."""
    model = tiny_gpt2()
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2)
    seen = drive(nowcasting, model, PERIOD)
    assert model.lm_head.weight is model.transformer.wte.weight
    history = [seen[2][1], seen[4][1], seen[6][0]]
    expected = Line().nowcast(None, history, 2)["transformer.wte.weight"]
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_their_dtype_and_are_warned_about_once(dtype, caplog):
    """Snapshots of 16-bit parameters are float32, the prediction is rounded back, and one warning says so."""
    model = mlp(dtype=dtype)
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2)
    seen = drive(nowcasting, model, PERIOD)
    history = [{name: t.float() for name, t in state.items()} for state in (seen[2][1], seen[4][1], seen[6][0])]
    expected = {name: t.to(dtype) for name, t in Line().nowcast(None, history, 2).items()}
    assert same(seen[6][1], expected)
    assert sum("16 bits" in record.message for record in caplog.records) == 1


def test_snapshots_may_be_kept_in_another_dtype():
    """With bfloat16 snapshots the prediction is made from rounded states."""
    model = mlp()
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2, history_dtype="bfloat16", history_device="model")
    seen = drive(nowcasting, model, PERIOD)
    history = [{name: t.bfloat16() for name, t in state.items()} for state in (seen[2][1], seen[4][1], seen[6][0])]
    assert same(seen[6][1], {name: t.float() for name, t in Line().nowcast(None, history, 2).items()})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start_step": 2}, [12, 18]),  # the first window lacks the snapshot after step 2
        ({"start_step": 1}, [6, 12, 18]),
        ({"stop_step": 12}, [6, 12]),
        ({"interval": 1}, [6, 12, 18]),
        ({"period": 7, "interval": 3}, [7, 14]),
    ],
)
def test_when_nowcasts_happen(options, expected):
    """At multiples of the period, from a whole window after ``start_step`` on, up to ``stop_step``."""
    model = mlp()
    nowcasting = Nowcasting(Line(), model, **({"period": PERIOD, "horizon": 2} | options))
    seen = drive(nowcasting, model, 20)
    assert changed(seen) == expected
    interval, first = nowcasting.interval, expected[0]
    history = [seen[first - 2 * interval][1], seen[first - interval][1], seen[first][0]]
    assert same(seen[first][1], Line().nowcast(None, history, 2)), "snapshots are one interval apart"


def test_nothing_happens_while_the_learning_rate_rises():
    """With 7 warm-up steps the first window that may count is that of step 18: the one before begins at step 8."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for warmup, expected in ((0, [6, 12, 18]), (7, [12, 18]), (9, [18])):
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, w=warmup: min(step / max(w, 1), 1.0) or 0.0
        )
        if warmup == 0:
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2, max_steps=24, lr_scheduler=scheduler)
        nowcasting.begin(0, optimizer)
        assert nowcasting.history.steps == []
        drive(nowcasting, model, 20)
        assert [event.step for event in nowcasting.events] == expected


def test_the_warm_up_of_another_run_is_forgotten_with_its_state(tmp_path):
    """State that does not fit the parameters is dropped whole; the run looks for the end of its own warm-up."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 15, 1.0))
    before = Nowcasting(Line(), model, period=PERIOD, max_steps=24, lr_scheduler=rising)
    before.begin(0, optimizer)
    assert before.outlook.warmup_end == 15
    before.save(tmp_path)

    for changed, expected in ((False, 15), (True, 0)):
        model = mlp()
        if changed:
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        nowcasting = Nowcasting(Line(), model, period=PERIOD, max_steps=24, lr_scheduler=constant)
        assert nowcasting.load(tmp_path)
        nowcasting.begin(0, optimizer)
        assert nowcasting.outlook.warmup_end == expected


def test_the_budget_shortens_the_horizon_at_the_end_of_a_run():
    """Without a scheduler, and 12 steps to go, 6 intervals of 2 steps are left: fewer than the nowcaster's most; at
    the end none, and the parameters stay."""

    class Far(Line):
        max_horizon = 10

    model = mlp()
    nowcasting = Nowcasting(Far(), model, period=PERIOD, max_steps=24)
    seen = drive(nowcasting, model, 24)
    assert [event.horizon for event in nowcasting.events] == [9, 6, 3, 0]
    assert changed(seen) == [6, 12, 18]
    assert "learning rate" in nowcasting.events[-1].reason


def test_the_budget_follows_the_scheduler():
    """Under a linear decay to 0 the horizons are smaller than under a constant rate."""

    class Far(Line):
        max_horizon = 10

    loop = RawLoop(Far(), steps=24, horizon="lr-budget")
    loop.run(24)
    constant = [9, 6, 3, 0]
    found = [event.horizon for event in loop.optimizer.nowcasting.events]
    assert found[-1] == 0 and all(a <= b for a, b in zip(found, constant, strict=True)) and found != constant


def test_a_change_of_the_trainable_parameters_drops_the_history(caplog):
    """Freezing a parameter within a window: no nowcast from mixed snapshots, one message; the next window counts."""
    model = mlp()
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2)
    drive(nowcasting, model, 3)
    model[0].weight.requires_grad_(False)
    seen = drive(nowcasting, model, 9)
    assert changed(seen) == [12]
    messages = [r.message for r in caplog.records if "trainable parameters changed" in r.message]
    assert len(messages) == 1 and "'0.weight'" in messages[0]


def test_a_nowcaster_with_memory_is_told_where_training_goes_on_from():
    """It is settled at the start and after each nowcast, and its predictions rest on that."""
    model = mlp()
    start = parameters(model)
    nowcasting = Nowcasting(Pull(), model, max_steps=16)
    nowcasting.begin()
    seen = drive(nowcasting, model, 12)
    anchor = start
    for step in (4, 8, 12):
        before, after = seen[step]
        assert same(after, {name: t + (t - anchor[name]) * 0.5 for name, t in before.items()})
        anchor = after


def test_a_nowcaster_with_memory_waits_for_a_whole_period_when_it_starts_late():
    """With ``start_step=5`` it is settled at step 8, and the first nowcast is that of step 12."""
    model = mlp()
    nowcasting = Nowcasting(Pull(), model, start_step=5)
    nowcasting.begin()
    seen = drive(nowcasting, model, 12)
    assert changed(seen) == [12]
    after = {name: t + (t - seen[8][1][name]) * 0.5 for name, t in seen[12][0].items()}
    assert same(seen[12][1], after)


def test_the_graph_is_built_at_the_start_and_failure_turns_nowcasting_off(monkeypatch, caplog):
    """A nowcaster that needs a graph gets the model's; if it cannot be built there is one message and no nowcast, or
    an error when asked for."""
    from hf_nino.graph import NeuralGraph

    class Graphic(Line):
        needs_graph = True
        seen = None

        def nowcast(self, graph, states, horizon):
            Graphic.seen = graph
            return super().nowcast(graph, states, horizon)

    model = mlp()
    monkeypatch.setattr(NeuralGraph, "from_model", classmethod(lambda cls, m, inputs=None, **_: ("graph", m, inputs)))
    nowcasting = Nowcasting(Graphic(), model, period=PERIOD, horizon=2, example_inputs="inputs")
    drive(nowcasting, model, PERIOD)
    assert Graphic.seen == ("graph", model, "inputs")

    def fail(cls, model, inputs=None, **_):
        raise ValueError("no such luck")

    monkeypatch.setattr(NeuralGraph, "from_model", classmethod(fail))
    nowcasting = Nowcasting(Graphic(), model, period=PERIOD, horizon=2)
    assert changed(drive(nowcasting, model, 13)) == []
    assert sum("no such luck" in record.message for record in caplog.records) == 1
    with pytest.raises(InvalidNowcast, match="no such luck"):
        Nowcasting(Graphic(), model, period=PERIOD, on_invalid="raise")


def test_measured_losses_are_those_before_and_after_writing():
    """``measure`` sees the parameters before and after each nowcast; failing, it only leaves the losses out."""
    model = mlp()
    nowcasting = Nowcasting(
        Line(), model, period=PERIOD, horizon=2, measure=lambda: float(model[0].weight.detach().double().sum())
    )
    seen = drive(nowcasting, model, PERIOD)
    event = nowcasting.events[0]
    before, after = (float(state["0.weight"].double().sum()) for state in seen[PERIOD])
    assert (event.loss_before, event.loss_after) == (before, after) and before != after
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2, measure=lambda: 1 / 0)
    drive(nowcasting, model, PERIOD)
    assert nowcasting.nowcasts == 1 and nowcasting.events[0].loss_before is None


class Slow(Line):
    context, period = 5, 1000


@pytest.mark.parametrize(
    ("period", "interval", "max_steps", "expected"),
    [
        (None, None, None, (1000, 200)),
        (None, None, 4000, (1000, 200)),
        (None, None, 3999, (995, 199)),
        (None, None, 100, (25, 5)),
        (None, None, 3, (5, 1)),
        (1000, None, 100, (1000, 200)),
        (13, None, None, (13, 2)),
        (13, 3, None, (13, 3)),
    ],
)
def test_the_period_is_the_nowcasters_unless_the_run_is_short(period, interval, max_steps, expected):
    """At least 4 nowcasts fit into a run of known length; a period that was asked for is kept."""
    assert resolve_schedule(Slow(), period, interval, max_steps) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 2}, "`period` must be at least the 3 snapshots"),
        ({"period": 6, "interval": 3}, r"`interval` must leave room .* \(1 to 2\), got 3"),
        ({"period": 6, "interval": 0}, "`interval` must leave room"),
        ({"on_invalid": "ignore"}, "`on_invalid` must be one of"),
        ({"horizon": "far"}, "`horizon` must be one of"),
        ({"horizon": "paper"}, "needs `max_steps`"),
        ({"start_step": -1}, "`start_step` must be"),
        ({"start_step": 9, "stop_step": 8}, "`stop_step` must not be before"),
        ({"history_dtype": "int8"}, "`history_dtype` must be"),
    ],
)
def test_bad_arguments_get_one_clear_error(options, message):
    """Each names the argument, the rule and what was found."""
    with pytest.raises(ValueError, match=message):
        Nowcasting(Line(), mlp(), **options)


@pytest.mark.parametrize("spec", ["linear", "momentum", "spectral"])
def test_nowcasters_are_known_by_name(spec, caplog):
    """The rules of the package, by name, nowcast in a raw loop, and the parameters stay finite."""
    caplog.set_level(logging.ERROR)
    loop = RawLoop(spec, period=5)
    loop.run(MAX_STEPS)
    nowcasting = loop.optimizer.nowcasting
    assert isinstance(nowcasting.nowcaster, Nowcaster) and nowcasting.spec == spec
    assert nowcasting.nowcasts >= 2 and nowcasting.rejected == 0
    assert all(torch.isfinite(tensor).all() for tensor in loop.states[MAX_STEPS].values())


def test_a_gap_in_the_callers_count_breaks_the_window():
    """Counted by the caller, with steps 5 to 11 missing: snapshots after 2, 4 and 12 are not one interval apart, so
    there is no nowcast at 12; at 18 there is."""
    model = mlp()
    nowcasting = Nowcasting(Line(), model, period=PERIOD, horizon=2)
    for step in (*range(1, 5), *range(12, 19)):
        drift(model)
        nowcasting.step(step)
    assert [event.step for event in nowcasting.events] == [18]


class Elsewhere(Line, torch.nn.Module):
    """A network whose weights are on another device than the model; it only notes where it is sent."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.empty(3, device="meta"))
        self.sent: list[torch.device] = []

    def to(self, device):
        self.sent.append(device)
        return self


def test_a_network_computes_where_the_model_is():
    """Before each nowcast it is moved to the parameters' device, wherever it was loaded."""
    model = mlp()
    nowcasting = Nowcasting(Elsewhere(), model, period=3, interval=1, horizon=1, max_steps=100)
    for _ in range(7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3
        nowcasting.step()
    assert nowcasting.nowcasts >= 1 and set(nowcasting.nowcaster.sent) == {torch.device("cpu")}
    assert len(nowcasting.nowcaster.sent) == nowcasting.nowcasts


@pytest.mark.parametrize(("size", "said"), [("2", 1), ("1", 0), ("", 0), ("many", 0)])
def test_processes_that_train_apart_are_told_so_once(size, said, monkeypatch, caplog):
    """torchrun started two of them and nobody began a process group: one warning says what to do; not where one
    process was started."""
    monkeypatch.setenv("WORLD_SIZE", size)
    RawLoop(Line()).run(MAX_STEPS)
    assert sum("each of them trains a model of its own" in record.message for record in caplog.records) == said


NO_MEMORY = torch.OutOfMemoryError("no memory. Tried 2 GiB")


def half_written(write):
    """``write``, but the first time it does half of it and fails."""
    calls = []

    def failing(state):
        calls.append(1)
        if len(calls) > 1:
            return write(state)
        write({name: state[name] for name in sorted(state)[: len(state) // 2]})
        raise NO_MEMORY

    return failing


def unreadable(nowcasting, step):
    """The parameters cannot be read at that step."""
    live = nowcasting.store.live

    def failing():
        if nowcasting.step_count == step:
            raise NO_MEMORY
        return live()

    nowcasting.store.live = failing


@pytest.mark.parametrize("patience", [0, 2])
def test_a_nowcast_that_is_half_written_is_put_back(patience, monkeypatch, caplog):
    """There is no memory left after half of the parameters: they are what they were, whether or not the state before
    was kept for probation, and training goes on as if this nowcast had not been."""
    broken = RawLoop(Line(), patience=patience)
    broken.run(PERIOD - 1)
    store = broken.optimizer.nowcasting.store
    monkeypatch.setattr(store, "write", half_written(store.write))
    final = broken.run(MAX_STEPS)
    events = broken.optimizer.nowcasting.events
    assert events[0].reason == "it could not be written: Line ran out of memory (OutOfMemoryError: no memory)"
    assert [event.accepted for event in events] == [False, True]
    assert sum("could not be written" in record.message for record in caplog.records) == 1
    later = RawLoop(Line(), patience=patience, start_step=PERIOD)
    assert same(final, later.run(MAX_STEPS))
    assert not same(final, RawLoop(Line(), patience=patience).run(MAX_STEPS))


def test_a_snapshot_that_cannot_be_taken_costs_one_nowcast(caplog):
    """Reading the parameters fails once: that nowcast is left out, one line says why, and training goes on;
    with `on_invalid="raise"` it is an error."""
    broken, strict = RawLoop(Line()), RawLoop(Line(), on_invalid="raise")
    for loop in (broken, strict):
        unreadable(loop.optimizer.nowcasting, PERIOD - 2)
    final = broken.run(MAX_STEPS)
    assert [event.step for event in broken.optimizer.nowcasting.events] == [2 * PERIOD]
    assert sum("A snapshot cannot be taken" in record.message for record in caplog.records) == 1
    assert same(final, RawLoop(Line(), start_step=PERIOD).run(MAX_STEPS))
    with pytest.raises(InvalidNowcast, match=r"snapshot at step .* ran out of memory"):
        strict.run(MAX_STEPS)
