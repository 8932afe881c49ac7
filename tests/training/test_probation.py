"""After a nowcast the run is watched; what makes it worse is taken back, bit for bit, and in the end it is enough."""

import copy
import json
import logging

import pytest
import torch
from torch import nn
from training_helpers import Line, NotANumber, Pull, RawLoop, mlp, nino_trainer, parameters, recorded, same, tokens

from hf_nino.nowcaster.base import Nowcaster
from hf_nino.training import InvalidNowcast, NiNo, NiNoCallback, Nowcasting
from hf_nino.training.compatibility import check_optimizer
from hf_nino.training.probation import default_patience

PERIOD, PATIENCE, STEPS = 12, 8, 40
WATCHED = {"period": PERIOD, "patience": PATIENCE, "horizon": 2}


class Spoil(Nowcaster):
    """Multiplies every parameter by -8: training is set back by far, and by half of that as well."""

    context, period, max_horizon = 1, PERIOD, 1

    def nowcast(self, graph, states, horizon):
        return {name: -8 * tensor for name, tensor in states[0].items()}


class SpoilAndRemember(Pull, Spoil):
    """The same, with a memory that its own prediction changes."""

    period = PERIOD

    def nowcast(self, graph, states, horizon):
        self.anchor = {name: tensor + 1 for name, tensor in self.anchor.items()}
        return Spoil.nowcast(self, graph, states, horizon)


def spoilt(nowcaster=None, steps=STEPS, **options):
    return RawLoop(nowcaster or Spoil(), steps=steps, **(WATCHED | {"max_steps": None} | options))


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict()["state"])


def same_state(first, second):
    return first.keys() == second.keys() and all(same(first[i], second[i]) for i in first)


class Reference(RawLoop):
    """The plain run, set back by hand: at the end of step ``at`` it is what it was after step ``to``."""

    def __init__(self, at, to):
        super().__init__(wrap=False, steps=STEPS)
        self.at, self.to = at, to

    def run(self, until):
        for _ in range(until):
            if self.step == self.at:
                self.model.load_state_dict(self.kept["model"])
                rates = [group["lr"] for group in self.optimizer.param_groups]
                self.optimizer.load_state_dict(copy.deepcopy(self.kept["optimizer"]))
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                self.states[self.at] = parameters(self.model)
            super().run(self.step + 1)
            if self.step == self.to:
                self.kept = {
                    "model": copy.deepcopy(self.model.state_dict()),
                    "optimizer": copy.deepcopy(self.optimizer.state_dict()),
                }


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_what_is_taken_back_has_never_been(tmp_path, place, caplog):
    """After the probation, parameters and moments are those before the nowcast; from there on the run, with dropout
    and a schedule that goes on, equals a plain one that was set back by hand, at every step."""
    device = f"disk:{tmp_path}" if place == "disk" else "cpu"
    loop = spoilt(max_failures=1, undo_device=device)
    loop.run(STEPS)
    reference = Reference(at=PERIOD + PATIENCE, to=PERIOD)
    reference.run(STEPS)
    assert same(loop.states[PERIOD + PATIENCE], reference.states[PERIOD])
    assert all(same(loop.states[s], reference.states[s]) for s in range(PERIOD + PATIENCE, STEPS + 1))
    assert same_state(state_of(loop.optimizer.base_optimizer), state_of(reference.optimizer))
    nowcasting = loop.optimizer.nowcasting
    assert (nowcasting.nowcasts, nowcasting.taken_back, nowcasting.stopped) == (1, 1, True)
    event = nowcasting.events[-1]
    assert (event.step, event.taken_back_to) == (PERIOD + PATIENCE, PERIOD)
    messages = [record.message for record in caplog.records]
    assert sum("taken back: 8 steps later the loss is" in message for message in messages) == 1
    assert sum("No more nowcasts in this run" in message for message in messages) == 1


def test_a_nowcast_that_does_no_harm_stays():
    """The negative control: predicting the state itself passes, nothing is taken back, and the kept state is given
    back when the probation is over."""

    class Stay(Spoil):
        def nowcast(self, graph, states, horizon):
            return {name: tensor.clone() for name, tensor in states[0].items()}

    loop = spoilt(Stay())
    loop.run(PERIOD + PATIENCE - 1)
    nowcasting = loop.optimizer.nowcasting
    assert nowcasting.probation.opened == PERIOD and nowcasting.undo.tensors()
    loop.run(3 * PERIOD - 1)
    assert (nowcasting.nowcasts, nowcasting.taken_back, nowcasting.probation.opened) == (2, 0, None)
    assert not nowcasting.undo.tensors()


def test_after_some_failures_there_are_no_more_nowcasts_and_no_memory_is_held(caplog):
    """The second time in a row is the last: said once, and histories, losses and kept states are gone."""
    loop = spoilt(max_failures=2, steps=100)
    loop.run(100)
    nowcasting = loop.optimizer.nowcasting
    assert (nowcasting.nowcasts, nowcasting.taken_back, nowcasting.stopped) == (2, 2, True)
    assert len(nowcasting.history) == len(nowcasting.losses) == 0 and not nowcasting.undo.tensors()
    assert sum("No more nowcasts" in record.message for record in caplog.records) == 1


def test_refused_nowcasts_are_failures_too(caplog):
    """A nowcaster that returns nan three times in a row is not asked again; without probations it is."""
    for patience, stopped in ((PATIENCE, True), (0, False)):
        loop = RawLoop(NotANumber(), steps=60, period=PERIOD, patience=patience)
        loop.run(60)
        assert loop.optimizer.nowcasting.stopped is stopped
        assert loop.optimizer.nowcasting.rejected == (3 if stopped else 5)


def test_what_they_may_cost_together_is_bounded():
    """In a run of 600 steps 3% are 18: after two probations of 8 steps a third would be too much."""
    loop = spoilt(max_failures=9, steps=600, max_steps=600)
    loop.run(100)
    assert loop.optimizer.nowcasting.taken_back == 2 and loop.optimizer.nowcasting.stopped


def test_the_next_nowcast_goes_half_as_far():
    """Taken back once, a nowcaster with a single interval takes half of its step; passing restores the whole."""
    loop = spoilt(max_failures=9, steps=100)
    loop.run(PERIOD + PATIENCE)
    before = loop.optimizer.nowcasting
    assert before.trust.share == 0.5
    loop.run(2 * PERIOD - 1)
    loop.run(2 * PERIOD)
    event = before.events[-1]
    assert event.accepted and event.step == 2 * PERIOD
    norm = float(torch.cat([tensor.flatten() for tensor in loop.states[2 * PERIOD].values()]).norm())
    assert norm == pytest.approx(event.step_norm * 3.5 / 4.5, rel=1e-4), "half of the way from x to -8 x is -3.5 x"


def test_the_memory_of_a_nowcaster_goes_back_as_well():
    """Its memory after the take-back is the one before the nowcast, settled on the state that was put back."""
    loop = spoilt(SpoilAndRemember(), max_failures=9)
    loop.run(PERIOD + PATIENCE)
    anchor = loop.optimizer.nowcasting.nowcaster.memory()
    assert same(anchor, loop.states[PERIOD + PATIENCE])


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Uninterrupted runs whose first nowcast is taken back, with a checkpoint after every step."""
    logging.disable(logging.WARNING)
    runs = {}
    for name, make in (("plain", Spoil), ("memory", SpoilAndRemember), ("line", Line)):
        folder = tmp_path_factory.mktemp(name)
        loop = spoilt(make(), max_failures=2)
        loop.run(STEPS, save=folder)
        runs[name] = make, folder, loop
    logging.disable(logging.NOTSET)
    return runs


@pytest.mark.parametrize("name", ["plain", "memory", "line"])
def test_a_run_resumes_exactly_in_the_middle_of_a_probation(watched, name):
    """From every step on, before, during and after a probation: each later state is the same, and so are the counters
    and what would be saved."""
    make, folder, whole = watched[name]
    assert whole.optimizer.nowcasting.taken_back == (0 if name == "line" else 2)
    for step in range(1, STEPS):
        loop = spoilt(make(), max_failures=2)
        assert loop.load(folder / str(step))
        loop.run(STEPS)
        assert all(same(state, whole.states[s]) for s, state in loop.states.items()), f"resumed after step {step}"
        found, expected = (x.optimizer.nowcasting.state_dict()["state"] for x in (loop, whole))
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_without_the_kept_state_a_resumed_run_cannot_go_back(watched, tmp_path):
    """The negative control: drop the probation from the checkpoint, and the nowcast stays."""
    make, folder, whole = watched["plain"]
    loop = spoilt(make(), max_failures=2)
    loop.load(folder / str(PERIOD + 3))
    loop.optimizer.nowcasting.probation.abandon()
    loop.run(PERIOD + PATIENCE)
    assert not same(loop.states[PERIOD + PATIENCE], whole.states[PERIOD + PATIENCE])


def test_checkpoints_from_before_there_were_probations_still_load(watched, tmp_path):
    """A state without the new entries resumes its history."""
    _, folder, _ = watched["line"]
    target = tmp_path / "old"
    target.mkdir()
    for path in (folder / "9").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = json.loads((target / "nino_state.json").read_text())
    for key in ("taken_back", "stopped", "trust", "probation", "losses", "undo"):
        del state[key]
    (target / "nino_state.json").write_text(json.dumps(state))
    loop = spoilt(Line(), max_failures=2)
    assert loop.load(target) and len(loop.optimizer.nowcasting.history) > 0


# -- where losses come from -----------------------------------------------------------------------------------------


def test_without_losses_nothing_is_watched_and_that_is_said_once(caplog):
    """No loss told: the nowcasts stay, and one warning says what to do."""
    model = mlp()
    optimizer = NiNo(torch.optim.SGD(model.parameters(), lr=0.01), model, Spoil(), **WATCHED)
    for _ in range(3 * PERIOD):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert optimizer.nowcasting.nowcasts == 3 and optimizer.nowcasting.taken_back == 0
    messages = [record.message for record in caplog.records if "are not watched" in record.message]
    assert len(messages) == 1 and "record_loss(loss)" in messages[0]


def test_a_closures_loss_is_observed():
    """``step(closure)`` tells the loss by itself."""
    model = mlp(dropout=0.0)
    optimizer = NiNo(torch.optim.AdamW(model.parameters(), lr=0.01), model, Spoil(), max_failures=1, **WATCHED)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.ones(8, 4)), torch.ones(8, 2))
        loss.backward()
        return loss

    for _ in range(PERIOD + PATIENCE):
        optimizer.step(closure)
    assert optimizer.nowcasting.taken_back == 1


def test_micro_batches_are_summed_and_skipped_steps_forgotten():
    """The loss of a step is the sum of what was recorded for it; a step that a scaler skipped leaves nothing."""
    nowcasting = Nowcasting(Spoil(), mlp(), **WATCHED)
    for losses in ((1.0, 2.0), (torch.tensor(4.0), torch.tensor([5.0])), ()):
        for loss in losses:
            nowcasting.record_loss(loss)
        nowcasting.step()
    nowcasting.record_loss(float("inf"))
    nowcasting.skip()
    nowcasting.record_loss(7.0)
    nowcasting.step()
    assert nowcasting.losses.read() == [(1, 1, 3.0), (2, 2, 9.0), (4, 4, 7.0)]


def test_recorded_losses_are_copies():
    """The caller may go on to change the tensor, as the Trainer does with its running sum."""
    nowcasting, loss = Nowcasting(Spoil(), mlp(), **WATCHED), torch.tensor(1.0, requires_grad=True)
    nowcasting.record_loss(loss)
    nowcasting.step()
    with torch.no_grad():
        loss.add_(1)
    assert nowcasting.losses.read() == [(1, 1, 1.0)]


def trained(make, tmp_path, **settings):
    watched = {"nowcast_period": PERIOD, "nowcast_patience": PATIENCE, "nowcast_max_failures": 1}
    trainer = make(tmp_path, Spoil(), **({"max_steps": 24, "learning_rate": 1e-3} | watched | settings))
    trainer.train()
    return trainer


def test_nino_trainer_takes_back_by_the_losses_of_single_steps(tmp_path):
    """With no log at all, and gradient accumulation: parameters after the probation are those before the nowcast, the
    number of nowcasts taken back is logged, and the event is in the history."""
    trainer = trained(nino_trainer, tmp_path, gradient_accumulation_steps=2)
    states = recorded(trainer)
    plain = nino_trainer(tmp_path, "none", max_steps=24, learning_rate=1e-3, gradient_accumulation_steps=2)
    plain.train()
    assert trainer.nowcasting.taken_back == 1
    assert same(states[PERIOD + PATIENCE], recorded(plain)[PERIOD])
    entries = [entry for entry in trainer.state.log_history if "nino_taken_back_to" in entry]
    assert [entry["nino_taken_back_to"] for entry in entries] == [PERIOD]


def test_nino_trainer_resumes_exactly_in_the_middle_of_a_probation(tmp_path):
    """A checkpoint between nowcast and verdict: the resumed run goes back to the same bits."""
    whole = trained(nino_trainer, tmp_path / "whole", save_strategy="steps", save_steps=PERIOD + 3)
    resumed = nino_trainer(
        tmp_path / "resumed",
        Spoil(),
        max_steps=24,
        learning_rate=1e-3,
        nowcast_period=PERIOD,
        nowcast_patience=PATIENCE,
        nowcast_max_failures=1,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{PERIOD + 3}"))
    assert resumed.nowcasting.taken_back == 1
    assert all(same(state, recorded(whole)[step]) for step, state in recorded(resumed).items())


@pytest.mark.parametrize(("every", "taken_back"), [(1, 1), (5, 0)])
def test_a_plain_callback_watches_by_what_is_logged(tmp_path, caplog, every, taken_back):
    """With every loss logged a nowcast is taken back; with too few logs it is not watched, and that is said."""
    from training_helpers import plain_trainer

    callback = NiNoCallback(Spoil(), max_failures=1, **(WATCHED | {"patience": 10}))
    settings = {"max_steps": 24, "learning_rate": 1e-3, "logging_strategy": "steps", "logging_steps": every}
    plain_trainer(tmp_path, [callback], **settings).train()
    assert callback.nowcasting.taken_back == taken_back
    assert any("at least every 1 steps" in record.message for record in caplog.records) == (not taken_back)


# -- options --------------------------------------------------------------------------------------------------------


def test_patience_by_default_is_a_hundredth_of_the_run():
    """Within 30 and 200 steps; 100 for an unknown length; none in runs too short to learn anything from it."""
    found = [default_patience(steps) for steps in (None, 100, 299, 300, 4000, 100_000)]
    assert found == [100, 0, 0, 30, 40, 200]


def test_no_nowcast_that_the_run_would_be_too_short_to_take_back():
    """With 8 steps of patience, step 36 of 40 is too late, and the reason says so."""
    loop = spoilt(Line(), max_steps=STEPS)
    loop.run(STEPS)
    events = loop.optimizer.nowcasting.events
    assert [(event.step, event.accepted) for event in events] == [(12, True), (24, True), (36, False)]
    assert "the run ends before" in events[-1].reason


def test_observing_writes_nothing(caplog):
    """The run equals the plain one at every step; predictions and the loss they would have had are in the events."""
    plain = RawLoop(wrap=False)
    plain.run(16)
    loop = RawLoop(Line(), observe_only=True, measure=lambda: float(loop.model[0].weight.detach().sum()))
    loop.run(16)
    assert all(same(loop.states[s], plain.states[s]) for s in plain.states)
    events = loop.optimizer.nowcasting.events
    assert [event.step for event in events] == [6, 12] and not any(event.accepted for event in events)
    assert all(event.loss_before != event.loss_after and event.reason == "only observed" for event in events)
    assert loop.optimizer.nowcasting.nowcasts == loop.optimizer.nowcasting.rejected == 0


def test_observing_a_nowcaster_with_memory_follows_the_run():
    """Its anchor is the state that training really goes on from."""
    loop = RawLoop(Pull(), observe_only=True, period=4)
    loop.run(4)
    assert same(loop.optimizer.nowcasting.nowcaster.memory(), loop.states[4])


def test_a_probe_that_turns_nan_puts_everything_back_at_once():
    """The loss on the fixed batches is nan right after the nowcast: the run goes on as if nothing had been."""
    plain = RawLoop(wrap=False)
    plain.run(16)
    loop = RawLoop(Line(), patience=100, max_steps=None, probe_batches=lambda: values.pop(0))
    values = [1.0, float("nan"), 1.0, float("nan")]
    loop.run(16)
    assert all(same(loop.states[s], plain.states[s]) for s in plain.states)
    assert loop.optimizer.nowcasting.rejected == 2
    with pytest.raises(InvalidNowcast, match="fixed batches is nan"):
        values = [1.0, float("nan")]
        options = {"patience": 100, "max_steps": None, "on_invalid": "raise"}
        loop = RawLoop(Line(), probe_batches=lambda: values.pop(0), **options)
        loop.run(16)


def test_a_probe_stands_in_where_no_losses_are_told():
    """Without training losses, a nowcast after which the fixed batches got worse by more than 2% is taken back."""
    for rise, taken_back in ((1.01, 0), (1.03, 1)):
        model, values = mlp(), [1.0, 5.0, rise]
        nowcasting = Nowcasting(Spoil(), model, max_failures=1, probe_batches=lambda v=values: v.pop(0), **WATCHED)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(PERIOD + PATIENCE):
            nowcasting.step(optimizer=optimizer)
        assert nowcasting.taken_back == taken_back


def test_batches_are_probed_without_a_trace():
    """Dropout is off, modes and random numbers stay, and the mean of the model's losses is what is measured."""
    from training_helpers import tiny_gpt2

    model = tiny_gpt2(dropout=0.5)
    batches = [
        {k: torch.stack([row[k] for row in tokens(4, seed)]) for k in ("input_ids", "labels")} for seed in (0, 1)
    ]
    nowcasting = Nowcasting(Line(), model, period=6, probe_batches=batches)
    model.transformer.eval()
    model.train()
    model.transformer.drop.eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    found = [nowcasting.measure() for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state()) and modes == [module.training for module in model.modules()]
    model.eval()
    expected = sum(float(model(**batch).loss.detach()) for batch in batches) / 2
    assert found == [pytest.approx(expected, rel=1e-6)] * 2
    with pytest.raises(ValueError, match="`probe_batches` must be"):
        Nowcasting(Line(), model, probe_batches=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": -1}, "`patience` must be"),
        ({"max_failures": 0}, "`max_failures` must be"),
        ({"stop_fraction": 0.5}, "`stop_fraction` needs `max_steps`"),
        ({"stop_fraction": 1.5, "max_steps": 10}, "`stop_fraction` must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    """Each names itself and its rule."""
    with pytest.raises(ValueError, match=message):
        Nowcasting(Line(), mlp(), **options)


def test_nowcasts_can_end_with_a_share_of_the_run():
    """``stop_fraction=0.5`` of 24 steps: the last nowcast is that of step 12; an earlier ``stop_step`` wins."""
    for stop_step, expected in ((None, [6, 12]), (7, [6])):
        loop = RawLoop(Line(), steps=24, stop_fraction=0.5, stop_step=stop_step)
        loop.run(24)
        assert [event.step for event in loop.optimizer.nowcasting.events] == expected


# -- what is no parameter, and other optimizers ---------------------------------------------------------------------


class Normed(nn.Module):
    """With batch normalization; takes keyword arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


def test_statistics_of_batch_normalization_are_computed_anew():
    """After a nowcast they are the mean over the given batches under the new parameters; nothing else is touched."""
    from training_helpers import Line

    batches = [{"x": torch.randn(16, 4, generator=torch.Generator().manual_seed(s))} for s in range(3)]
    model = Normed()
    nowcasting = Nowcasting(Line(), model, period=6, horizon=2, statistics_batches=batches)
    before = torch.get_rng_state()
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        nowcasting.step()
    assert nowcasting.nowcasts == 1 and torch.equal(before, torch.get_rng_state()) and model.drop.training
    hidden = [model.first(batch["x"]) for batch in batches]
    expected = torch.stack([h.mean(0) for h in hidden]).mean(0)
    assert torch.allclose(model.norm.running_mean, expected, atol=1e-6)
    assert model.norm.momentum == 0.1 and model.norm.num_batches_tracked == 0


def test_without_batches_stale_statistics_are_said_once(caplog):
    """They stay as they were, with one warning for the run."""
    model = Normed()
    nowcasting = Nowcasting(Line(), model, period=6, horizon=2)
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 + 0.01 * step)
        nowcasting.step()
    assert nowcasting.nowcasts == 2 and torch.equal(model.norm.running_mean, torch.zeros(8))
    assert sum("batch normalization" in record.message for record in caplog.records) == 1


def test_optimizers_that_nowcasts_would_corrupt_are_refused():
    """Averages of the parameters, and updates in the backward pass, are named; others pass."""
    parameter = nn.Parameter(torch.zeros(2))

    class Lomo(torch.optim.SGD):
        pass

    class WithEma(torch.optim.SGD):
        pass

    ema = WithEma([parameter], lr=0.1)
    ema.state[parameter] = {"ema": torch.zeros(2)}
    for optimizer, message in (
        (Lomo([parameter], lr=0.1), "during the backward pass"),
        (ema, "keeps an average of them"),
        (torch.optim.ASGD([parameter]), "ASGD, which keeps an average"),
    ):
        with pytest.raises(ValueError, match=message):
            check_optimizer(optimizer)
    for optimizer in (torch.optim.AdamW([parameter]), torch.optim.RMSprop([parameter], centered=True)):
        parameter.grad = torch.ones(2)
        optimizer.step()
        check_optimizer(optimizer)
