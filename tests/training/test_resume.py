"""A run that is interrupted and resumed equals the uninterrupted one, bit for bit."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import (
    MAX_STEPS,
    PERIOD,
    Line,
    Pull,
    RawLoop,
    callback_trainer,
    nino_trainer,
    nowcasting,
    parameters,
    plain_trainer,
    recorded,
    same,
)

from hf_nino.training import NiNoTrainingArguments

# Snapshots after 2, 4, 6, 8, 10, 12; nowcasts after 6 and 12: before the first window, just after a snapshot, between
# two, just before, at and after a nowcast, inside the second window, at the last nowcast and after it.
STEPS = (1, 2, 3, 5, 6, 7, 8, 11, 12, 13)
NOWCASTERS = {
    "line": (Line, PERIOD),
    "linear": (lambda: "linear:context=3", PERIOD),
    "memory": (Pull, 4),
    "momentum": (lambda: "momentum", 4),
    "spectral": (lambda: "spectral", 4),
}
FILES = ("nino_history.safetensors", "nino_state.json")


def checkpoint(folder, step):
    return Path(folder) / f"checkpoint-{step}"


def warm_ups(caplog):
    return [record.message for record in caplog.records if "warms up" in record.message]


# -- Trainer --------------------------------------------------------------------------------------------------------


def whole_run(make, tmp_path_factory, **settings):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder, save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    return folder, recorded(trainer), trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run of NiNoTrainer with a checkpoint after every step."""
    return whole_run(nino_trainer, tmp_path_factory, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def called_back(tmp_path_factory):
    """The same with a plain Trainer and the callback."""
    return whole_run(callback_trainer, tmp_path_factory)


@pytest.mark.parametrize("step", STEPS)
def test_nino_trainer_resumes_exactly(trained, tmp_path, step):
    """NiNoTrainer, with dropout and gradient accumulation: every later state and every later nowcast is the same."""
    folder, states, whole = trained
    trainer = nino_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint(folder, step)))
    later = recorded(trainer)
    assert list(later) == list(range(step + 1, MAX_STEPS + 1))
    assert all(same(later[s], states[s]) for s in later)
    events = [(e.step, e.horizon, e.accepted, e.step_norm) for e in whole.nowcasting.events if e.step > step]
    assert [(e.step, e.horizon, e.accepted, e.step_norm) for e in trainer.nowcasting.events] == events
    assert trainer.nowcasting.nowcasts == whole.nowcasting.nowcasts == 2


@pytest.mark.parametrize("step", STEPS)
def test_the_callback_resumes_exactly(called_back, tmp_path, step):
    """A plain Trainer with the callback, told where it resumes from: every later state is the same."""
    folder, states, _ = called_back
    source = checkpoint(folder, step)
    trainer = callback_trainer(tmp_path, options={"resume_from": source})
    trainer.train(resume_from_checkpoint=str(source))
    assert all(same(state, states[s]) for s, state in recorded(trainer).items())


def test_the_callback_finds_the_checkpoint_in_the_output_folder(called_back, tmp_path, caplog):
    """Resuming the run of ``output_dir`` needs no further word."""
    folder, states, _ = called_back
    shutil.copytree(checkpoint(folder, 5), checkpoint(tmp_path, 5))
    trainer = callback_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert same(parameters(trainer.model), states[MAX_STEPS])
    assert not warm_ups(caplog)


def test_the_state_of_another_run_is_not_taken_over(called_back, tmp_path, caplog):
    """A checkpoint of the same step in ``output_dir``, but of another run, is recognised by its parameters."""
    folder, _, _ = called_back
    other = plain_trainer(tmp_path / "other", save_strategy="steps", save_steps=3, max_steps=3, learning_rate=3e-3)
    other.train()
    shutil.copytree(checkpoint(folder, 3), checkpoint(tmp_path / "out", 3))
    trainer = callback_trainer(tmp_path / "out")
    trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path / "other", 3)))
    assert len(warm_ups(caplog)) == 1 and "other values of the parameters" in warm_ups(caplog)[0]
    assert [event.step for event in nowcasting(trainer).events] == [12]


@pytest.mark.parametrize("make", [nino_trainer, callback_trainer])
def test_a_checkpoint_without_nowcasting_state_warms_up(tmp_path, caplog, make):
    """A plain Trainer's checkpoint, resumed with nowcasts: one warning, the broken window left out, saving works."""
    plain_trainer(tmp_path, save_strategy="steps", save_steps=5, max_steps=5).train()
    trainer = make(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 5)))
    assert len(warm_ups(caplog)) == 1
    assert [event.step for event in nowcasting(trainer).events] == [12]
    assert all((checkpoint(tmp_path, 15) / name).is_file() for name in FILES)


def test_without_the_files_a_resumed_run_is_another_one(trained, tmp_path):
    """The negative control: leave the nowcasting state out inside a window, and the states differ."""
    folder, states, _ = trained
    copy = checkpoint(tmp_path, 5)
    shutil.copytree(checkpoint(folder, 5), copy)
    for name in FILES:
        (copy / name).unlink()
    trainer = nino_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=str(copy))
    assert not same(recorded(trainer)[6], states[6])


def test_a_checkpoint_with_nowcasting_state_resumes_without_nowcasts(trained, tmp_path):
    """Turning nowcasts off works in the middle of a run."""
    folder, _, _ = trained
    trainer = nino_trainer(tmp_path, "none", gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint(folder, 5)))
    assert trainer.nowcasting is None and trainer.state.global_step == MAX_STEPS
    assert isinstance(trainer.args, NiNoTrainingArguments)


def test_a_checkpoint_taken_before_the_step_was_done_resumes_exactly(trained, tmp_path):
    """A checkpoint on SIGTERM may be taken after the optimizer step and before the nowcast that was due: it is made up
    for when training resumes."""
    _, states, _ = trained
    interrupted = nino_trainer(tmp_path, gradient_accumulation_steps=2)
    callback = interrupted.nino_callback

    def save_first(args, state, control, **kwargs):
        if state.global_step == PERIOD:
            interrupted._save_checkpoint(interrupted.model, trial=None)
            control.should_training_stop = True
        else:
            type(callback).on_step_end(callback, args, state, control, **kwargs)
        return control

    callback.on_step_end = save_first
    interrupted.train()
    trainer = nino_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, PERIOD)))
    assert trainer.nowcasting.nowcasts == 2
    assert same(recorded(trainer)[MAX_STEPS], states[MAX_STEPS])


# -- raw loop -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """Uninterrupted raw loops with a checkpoint after every step, by nowcaster."""
    logging.disable(logging.WARNING)
    runs = {}
    for name, (make, period) in NOWCASTERS.items():
        folder = tmp_path_factory.mktemp(name)
        loop = RawLoop(make(), period=period)
        loop.run(MAX_STEPS, save=folder)
        assert loop.optimizer.nowcasting.nowcasts >= 2
        runs[name] = folder, loop
    logging.disable(logging.NOTSET)
    return runs


@pytest.mark.parametrize("name", NOWCASTERS)
def test_a_raw_loop_resumes_exactly_from_every_step(looped, name):
    """With and without memory, interrupted after each step: every later state is the same."""
    folder, whole = looped[name]
    make, period = NOWCASTERS[name]
    for step in range(1, MAX_STEPS):
        loop = RawLoop(make(), period=period)
        assert loop.load(folder / str(step))
        loop.run(MAX_STEPS)
        assert all(same(state, whole.states[s]) for s, state in loop.states.items()), f"resumed after step {step}"


@pytest.mark.parametrize("name", ["line", "memory"])
def test_snapshots_may_move_between_host_and_disk(looped, tmp_path, name):
    """Saved with snapshots on the disk and resumed with them in memory, or the other way round, or on the disk both
    times: every later state is the same."""
    folder, whole = looped[name]
    make, period = NOWCASTERS[name]
    disk = {"history_device": f"disk:{tmp_path / 'history'}"}
    saved = RawLoop(make(), period=period, **disk)
    saved.run(MAX_STEPS, save=tmp_path)
    for step in range(1, MAX_STEPS):
        for source, options in ((tmp_path, {}), (folder, disk), (tmp_path, disk)):
            loop = RawLoop(make(), period=period, **options)
            assert loop.load(source / str(step))
            loop.run(MAX_STEPS)
            assert all(same(state, whole.states[s]) for s, state in loop.states.items()), f"resumed after step {step}"


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_has_the_snapshot_files_themselves(tmp_path, monkeypatch, links):
    """Snapshots on the disk are second names of the same files, or copies where there are no links; each checkpoint
    stays whole when the run goes on, and an older one in the same folder leaves nothing behind."""
    if not links:
        monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    loop = RawLoop(Line(), history_device=f"disk:{tmp_path / 'history'}")
    loop.run(4, save=tmp_path)
    files = sorted(path.name for path in (tmp_path / "4").glob("nino_snapshot_*"))
    assert files == ["nino_snapshot_2.safetensors", "nino_snapshot_4.safetensors"]
    assert all((tmp_path / "4" / name).stat().st_nlink == (4 if "2" in name else 2) for name in files) is links
    saved = {name: (tmp_path / "4" / name).read_bytes() for name in files}
    loop.run(9)
    loop.save(tmp_path / "3")
    assert {name: (tmp_path / "4" / name).read_bytes() for name in files} == saved
    assert [path.name for path in (tmp_path / "3").glob("nino_snapshot_*")] == ["nino_snapshot_8.safetensors"]
    assert not list(tmp_path.glob("*/*.tmp"))
    assert RawLoop(Line()).load(tmp_path / "3") and RawLoop(Line()).load(tmp_path / "4")


@pytest.mark.parametrize("name", NOWCASTERS)
def test_all_state_survives_a_round_trip(looped, name):
    """What was loaded would be saved again as it was: every number, and every tensor bit for bit."""
    folder, _ = looped[name]
    make, period = NOWCASTERS[name]
    loop = RawLoop(make(), period=period)
    loop.load(folder / "11")
    restored = loop.optimizer.nowcasting.state_dict()
    saved = json.loads((folder / "11" / FILES[1]).read_text())
    assert {"format_version": 1, **restored["state"]} == saved
    assert saved["nowcasts"] >= 1 and len(saved["learning_rates"]) == len(saved["snapshot_steps"])
    assert same(restored["tensors"], load_file(folder / "11" / FILES[0]))


def test_the_files_hold_no_pickle_and_what_they_say(looped):
    """Snapshots are ``position/name``, memory is ``memory/name``; the state is JSON with a format version."""
    folder, _ = looped["line"]
    state = json.loads((folder / "4" / FILES[1]).read_text())
    assert (state["format_version"], state["step"], state["snapshot_steps"]) == (1, 4, [2, 4])
    tensors = load_file(folder / "4" / FILES[0])
    assert (
        {name.split("/")[0] for name in tensors} == {str(i) for i in range(len(state["snapshot_steps"]))} == {"0", "1"}
    )
    memory = load_file(looped["memory"][0] / "5" / FILES[0])
    assert {name.split("/")[0] for name in memory} == {"memory"}
    assert not list((folder / "4").glob("*.tmp"))


def _other_period(folder):
    return RawLoop(Line(), period=8)


def _frozen(folder):
    loop = RawLoop(Line())
    model = loop.model
    model[0].weight.requires_grad_(False)
    return RawLoop(Line(), model=model)


def _other_nowcaster(folder):
    class Lines(Line):
        pass

    return RawLoop(Lines())


def _without_state(folder):
    (folder / FILES[1]).unlink()
    return RawLoop(Line())


def _torn(folder):
    (folder / FILES[0]).write_bytes((folder / FILES[0]).read_bytes()[:100])
    return RawLoop(Line())


def _not_json(folder):
    (folder / FILES[1]).write_text("{")
    return RawLoop(Line())


def _future_format(folder):
    state = json.loads((folder / FILES[1]).read_text())
    (folder / FILES[1]).write_text(json.dumps(state | {"format_version": 99}))
    return RawLoop(Line())


def _half_state(folder):
    state = json.loads((folder / FILES[1]).read_text())
    del state["learning_rates"]
    (folder / FILES[1]).write_text(json.dumps(state))
    return RawLoop(Line())


def _other_step(folder):
    state = json.loads((folder / FILES[1]).read_text())
    (folder / FILES[1]).write_text(json.dumps(state | {"step": 4}))
    return RawLoop(Line())


def _on_disk(spoil):
    """A checkpoint of a run with snapshots on the disk, whose second snapshot file is spoilt."""

    def change(folder):
        loop = RawLoop(Line(), history_device=f"disk:{folder.parent / 'history'}")
        loop.run(5, save=folder.parent)
        spoil(folder / "nino_snapshot_4.safetensors")
        return RawLoop(Line())

    return change


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)


def _earlier(path):
    shutil.copyfile(path.with_name("nino_snapshot_2.safetensors"), path)


def _elsewhere(folder):
    loop = _on_disk(lambda path: None)(folder)
    state = json.loads((folder / FILES[1]).read_text())
    names = [f"../5/{name}" for name in state["snapshot_files"]]
    (folder / FILES[1]).write_text(json.dumps(state | {"snapshot_files": names}))
    return loop


def _other_tensors(folder):
    tensors = load_file(folder / FILES[0])
    tensors["0/0.weight"] = torch.zeros(1)
    save_file(tensors, folder / FILES[0], metadata={"step": "5"})
    return RawLoop(Line())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_period, "period was 6 and is 8"),
        (_frozen, "the trainable parameters differ"),
        (_other_nowcaster, "nowcaster was 'Line' and is 'Lines'"),
        (_without_state, "nino_state.json is not in"),
        (_torn, "is malformed"),
        (_not_json, "is malformed"),
        (_future_format, "format_version 99"),
        (_half_state, "learning_rates"),
        (_other_step, "not saved together"),
        (_other_tensors, "must have shape"),
        (_on_disk(_cut), "nino_snapshot_4.safetensors is torn"),
        (_on_disk(_flip), "nino_snapshot_4.safetensors is torn"),
        (_on_disk(Path.unlink), "nino_snapshot_4.safetensors is torn"),
        (_on_disk(_earlier), "nino_snapshot_4.safetensors is of step 2, not 4"),
        (_elsewhere, "snapshot_files"),
    ],
)
def test_a_state_that_does_not_fit_is_dropped_with_one_warning(tmp_path, caplog, change, reason):
    """What does not fit, or cannot be read, is never half used: one warning with the reason, then a new window."""
    first = RawLoop(Line())
    first.run(5, save=tmp_path)
    folder = tmp_path / "5"
    loop = change(folder)
    assert loop.optimizer.load(folder) is False
    assert len(warm_ups(caplog)) == 1 and reason in warm_ups(caplog)[0]
    assert len(loop.optimizer.nowcasting.history) == 0
    loop.run(13)
    assert len(warm_ups(caplog)) == 1
