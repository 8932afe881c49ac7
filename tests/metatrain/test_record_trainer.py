"""A callback of a Trainer records what a loop of one's own would; a resumed run goes on in the same folder."""

import json
import math

import pytest
import torch
from record_helpers import alike, holds, states_of
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_nino import NiNoCallback
from hf_nino.metatrain import Trajectory, TrajectoryRecorder, shards

STEPS = 12


class Keep(TrainerCallback):
    """The parameters after every step."""

    def __init__(self):
        self.states = {}
        self.rates = {}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates[state.global_step + 1] = optimizer.param_groups[0]["lr"]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = states_of(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = states_of(model)


class Stop(TrainerCallback):
    """Something that goes wrong after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def gpt2():
    set_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def data():
    rows = torch.randint(0, 32, (40, 8), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[:, 0] = -100  # never predicted; else the Trainer counts it when it averages the loss
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def trainer(folder, *callbacks, **settings):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(folder / "trainer"), **(defaults | settings))
    return Trainer(gpt2(), args, train_dataset=data(), callbacks=list(callbacks))


def train(folder, name="run", every=3, begin=None, others=(), moments=True, **settings):
    """A Trainer run that is recorded: what was kept of it, its log and the trajectory."""
    keep = Keep()
    run = trainer(folder, *others, TrajectoryRecorder(folder / name, every, moments=moments), keep, **settings)
    run.train(resume_from_checkpoint=begin)
    return keep, run.state.log_history, Trajectory(folder / name)


def test_a_callback_records_the_parameters_of_their_steps(tmp_path):
    """Bit for bit, with step 0; the learning rates are those with which steps were made, and the losses the means of
    what is logged."""
    kept, log, trajectory = train(tmp_path)
    assert trajectory.steps == [0, 3, 6, 9, 12] and trajectory.finished
    assert holds(trajectory, kept.states) and not holds(trajectory, kept.states, shift=1)
    logged = {entry["step"]: entry for entry in log if "loss" in entry}
    assert trajectory.learning_rates == [kept.rates[max(step, 1)] for step in trajectory.steps]
    sums = [sum(kept.rates[i + 1] for i in range(step)) for step in trajectory.steps]
    assert trajectory.learning_rate_sums == pytest.approx(sums)
    losses = [sum(logged[i]["loss"] for i in range(step - 2, step + 1)) / 3 for step in trajectory.steps[1:]]
    assert math.isnan(trajectory.losses[0]) and trajectory.losses[1:] == pytest.approx(losses)


def test_the_description_says_what_was_trained_and_how(tmp_path):
    _, _, trajectory = train(tmp_path, seed=7)
    about = json.loads((tmp_path / "run" / "trajectory.json").read_text("utf-8"))
    assert about["model"]["class"] == "GPT2LMHeadModel" and about["model"]["config"]["n_embd"] == 16
    assert about["optimizer"]["name"] == "AdamW" and about["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]
    names = [name for group in about["optimizer"]["groups"] for name in group["parameters"]]
    assert sorted(names) == sorted(trajectory.names)
    assert about["seed"] == 7 and about["max_steps"] == STEPS and about["software"]["torch"] == torch.__version__
    rebuilt = trajectory.build_model()
    assert {name: tuple(p.shape) for name, p in rebuilt.named_parameters()} == trajectory.shapes


@pytest.mark.parametrize("logging_steps", [2, 5, 100])
def test_losses_are_the_logged_means_that_cover_the_steps(tmp_path, logging_steps):
    """However rarely it is logged; of steps that no log covers nothing is known."""
    _, log, trajectory = train(tmp_path, logging_steps=logging_steps)
    value, last = {}, 0
    for entry in log:
        if "loss" in entry:
            value |= dict.fromkeys(range(last + 1, entry["step"] + 1), entry["loss"])
            last = entry["step"]
    for step, loss in zip(trajectory.steps[1:], trajectory.losses[1:], strict=True):
        known = [value[i] for i in range(step - 2, step + 1) if i in value]
        assert loss == pytest.approx(sum(known) / len(known)) if known else math.isnan(loss)


@pytest.mark.parametrize("at", [6, 8])
def test_a_resumed_run_records_what_an_uninterrupted_one_does(tmp_path, at):
    """From a checkpoint on a snapshot or between two; what the interrupted part recorded after it is dropped."""
    _, _, whole = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    with pytest.raises(InterruptedError):
        train(folder, others=[Stop(11)], save_strategy="steps", save_steps=at)
    before = Trajectory(folder / "run")
    assert before.steps == list(range(0, at + 1, 3)) and not before.finished
    _, _, again = train(folder, begin=str(folder / "trainer" / f"checkpoint-{at}"))
    assert alike(again, whole) and again.finished
    assert again.losses[1:] == pytest.approx(whole.losses[1:])


def test_snapshots_after_the_resumed_step_are_dropped(tmp_path):
    """A run of 12 steps goes on from its checkpoint of step 6 with another learning rate from there on: nothing of the
    first half of it is recorded twice, nor left over."""
    _, _, first = train(tmp_path, save_strategy="steps", save_steps=6)
    before = {name: tensor.clone() for name, tensor in first.states(0, 5).items()}
    kept, _, second = train(tmp_path, begin=str(tmp_path / "trainer" / "checkpoint-6"), max_steps=9)
    assert second.steps == [0, 3, 6, 9] and holds_since(second, kept.states, 6)
    assert all(torch.equal(tensor, before[name][:3]) for name, tensor in second.states(0, 3).items())
    assert any(not torch.equal(tensor[0], before[name][3]) for name, tensor in second.states(3, 4).items())


def holds_since(trajectory, states, step):
    return all(
        torch.equal(trajectory.states(i, i + 1)[name][0], states[at][name])
        for i, at in enumerate(trajectory.steps)
        if at > step
        for name in trajectory.names
    )


def test_a_second_training_needs_a_folder_of_its_own(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="must not hold a trajectory when a new run begins"):
        train(tmp_path)


def test_a_training_that_begins_again_replaces_what_it_began(tmp_path):
    """As when the Trainer retries with a smaller batch: the same recorder, the same train()."""
    keep = Keep()
    recorder = TrajectoryRecorder(tmp_path / "run", 3)
    with pytest.raises(InterruptedError):
        trainer(tmp_path, recorder, Stop(5)).train()
    trainer(tmp_path, recorder, keep).train()
    assert Trajectory(tmp_path / "run").steps == [0, 3, 6, 9, 12] and holds(Trajectory(tmp_path / "run"), keep.states)


def test_recording_does_not_change_training(tmp_path):
    keep = Keep()
    trainer(tmp_path, keep).train()
    kept, _, _ = train(tmp_path)
    assert all(torch.equal(state, keep.states[STEPS][name]) for name, state in kept.states[STEPS].items())


def test_a_nowcast_run_is_recorded_with_its_jumps(tmp_path):
    """Snapshots are what later callbacks see, nowcasts included."""
    nowcasts = NiNoCallback("linear:context=2", period=6, horizon=1)
    kept, _, trajectory = train(tmp_path, others=[nowcasts])
    assert nowcasts.nowcasting.nowcasts and holds(trajectory, kept.states)
    plain, _, _ = train(tmp_path, name="plain")
    assert not holds(trajectory, plain.states)


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    def write(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_snapshot", write)
    kept, _, trajectory = train(tmp_path, save_strategy="steps", save_steps=4)
    assert STEPS in kept.states and len(trajectory) == 0
    assert sum("No space left" in record.message for record in caplog.records) == 1
