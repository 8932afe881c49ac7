"""The callback nowcasts in any Trainer."""

import pytest
import torch
from training_helpers import (
    MAX_STEPS,
    PERIOD,
    Line,
    NotANumber,
    Raising,
    Record,
    Stay,
    arguments,
    callback_trainer,
    nowcasting,
    plain_trainer,
    recorded,
    same,
    tiny_gpt2,
    tokens,
)
from transformers import Trainer

from hf_nino.training import NiNoCallback


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    trainer = plain_trainer(tmp_path_factory.mktemp("plain"), [Record()])
    trainer.train()
    return recorded(trainer)


def test_a_plain_trainer_nowcasts_with_the_callback(plain, tmp_path):
    """Until the first nowcast the run equals the plain one; the state after it is the rule's prediction, exactly."""
    trainer = callback_trainer(tmp_path)
    trainer.train()
    states = recorded(trainer)
    assert all(same(states[step], plain[step]) for step in range(1, PERIOD))
    names = [name for name, _ in trainer.model.named_parameters()]
    history = [{name: plain[step][name] for name in names} for step in (2, 4, 6)]
    assert same(states[PERIOD], Line().nowcast(None, history, 2))
    assert not same(states[PERIOD], plain[PERIOD])
    assert [event.step for event in nowcasting(trainer).events] == [6, 12]


@pytest.mark.parametrize("nowcaster", [Stay, NotANumber, Raising])
def test_without_a_valid_move_the_run_is_the_plain_one(plain, tmp_path, nowcaster):
    """With dropout, a shuffled loader and a schedule: predicting no move, NaN, or raising changes no bit."""
    trainer = callback_trainer(tmp_path, nowcaster())
    trainer.train()
    assert all(same(state, plain[step]) for step, state in recorded(trainer).items())
    assert len(nowcasting(trainer).events) == 2


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    """With 3 micro-batches per step, nowcasts still fall on optimizer steps 6 and 12."""
    trainer = callback_trainer(tmp_path, gradient_accumulation_steps=3)
    trainer.train()
    assert [event.step for event in nowcasting(trainer).events] == [6, 12]


def test_the_budget_counts_the_steps_that_are_left_in_a_trainer(tmp_path):
    """The rate decays linearly from 16 to 0 over 16 steps.  At step 6 the rates 10, 9, .. 1 are left: 55, and an
    interval at the history's mean of 12 needs 24, which makes 2; one rate later it would be 1.  At step 12: none."""
    trainer = callback_trainer(tmp_path, options={"horizon": "lr-budget"}, lr_scheduler_type="linear")
    trainer.train()
    assert [event.horizon for event in nowcasting(trainer).events] == [2, 0]


def test_skipped_optimizer_steps_do_not_count(tmp_path):
    """Steps that a gradient scaler skipped are no steps: with two of them, nowcasts come two steps later."""
    trainer = callback_trainer(tmp_path)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, NiNoCallback))
    on_step_end = callback.on_step_end

    class Skipped:
        step_was_skipped = True

    def skip_two(args, state, control, optimizer=None, **kwargs):
        on_step_end(args, state, control, optimizer=Skipped() if state.global_step in (1, 2) else optimizer, **kwargs)

    callback.on_step_end = skip_two
    trainer.train()
    assert nowcasting(trainer).skipped_steps == 2
    assert [entry["step"] for entry in trainer.state.log_history if "nino_horizon" in entry] == [8, 14]


def test_events_are_in_the_log_history(tmp_path):
    """One entry per nowcast, with its step, horizon, norms, seconds and counters as numbers."""
    trainer = callback_trainer(tmp_path)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "nino_horizon" in entry]
    assert [entry["step"] for entry in entries] == [6, 12]
    assert [entry["nino_nowcasts"] for entry in entries] == [1, 2]
    for key in ("nino_step_norm", "nino_relative_step_norm", "nino_seconds", "nino_rejected", "nino_total_seconds"):
        assert all(isinstance(entry[key], int | float) for entry in entries), key


def test_a_nowcast_is_told_in_a_line_that_spares_the_progress_bar(tmp_path, monkeypatch):
    """With progress bars on, each nowcast is one line through tqdm; with them off nothing is written that way."""
    from hf_nino.training import callback

    lines = []

    class Bar:
        write = lines.append

    monkeypatch.setattr(callback, "tqdm", Bar)
    callback_trainer(tmp_path, disable_tqdm=True).train()
    assert lines == []
    callback_trainer(tmp_path, disable_tqdm=False).train()
    assert lines[0].startswith("NiNo: step 6: nowcast ") and "steps ahead" in lines[0]
    assert len(lines) == 3 and "2 nowcasts, 0 rejected" in lines[2]


def test_a_second_train_starts_anew(tmp_path):
    """``train()`` twice: the second run has a history and counters of its own."""
    trainer = callback_trainer(tmp_path)
    trainer.train()
    first = nowcasting(trainer)
    trainer.train()
    assert nowcasting(trainer) is not first
    assert nowcasting(trainer).nowcasts == 2 and nowcasting(trainer).step_count == MAX_STEPS


def test_two_callbacks_of_other_classes_and_state_do_not_get_in_each_others_way(tmp_path):
    """With ``restore_callback_states_from_checkpoint`` and a stateful callback, saving and resuming work, and the
    callback object stays the one that was given."""
    from transformers import EarlyStoppingCallback

    def make():
        callback = NiNoCallback(Line(), period=PERIOD, horizon=2)
        settings = {
            "save_strategy": "steps",
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "loss",
            "load_best_model_at_end": True,
            "restore_callback_states_from_checkpoint": True,
        }
        args = arguments(tmp_path, **settings)
        callbacks = [callback, EarlyStoppingCallback(50)]
        return Trainer(
            tiny_gpt2(), args, train_dataset=tokens(), eval_dataset=tokens(4), callbacks=callbacks
        ), callback

    make()[0].train()
    trainer, callback = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback in trainer.callback_handler.callbacks and callback.nowcasting.nowcasts == 2


def test_unknown_arguments_are_refused_at_once():
    """A misspelt option does not wait for training; those that the Trainer knows cannot be given."""
    for name in ("perod", "max_steps"):
        with pytest.raises(TypeError, match=f"no argument '{name}'"):
            NiNoCallback(Line(), **{name: 3})


def test_schedule_free_optimizers_are_refused_when_training_begins(tmp_path):
    """The Trainer's optimizer is looked at through accelerate's wrapper."""

    class Free(torch.optim.SGD):
        pass

    model = tiny_gpt2()
    optimizer = Free(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["train_mode"] = True
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=tokens(),
        optimizers=(optimizer, None),
        callbacks=[NiNoCallback(Line(), period=PERIOD)],
    )
    with pytest.raises(ValueError, match="schedule-free, got Free"):
        trainer.train()


def test_nothing_is_written_with_model_only_checkpoints(tmp_path):
    """``save_only_model`` checkpoints cannot be resumed from and hold no nowcasting state."""
    callback_trainer(tmp_path, save_strategy="steps", save_steps=8, save_only_model=True).train()
    assert not list(tmp_path.glob("checkpoint-*/nino_*"))
    callback_trainer(tmp_path / "other", save_strategy="steps", save_steps=8).train()
    assert len(list(tmp_path.glob("other/checkpoint-*/nino_*"))) == 4
