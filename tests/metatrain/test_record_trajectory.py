"""What is recorded of a loop of one's own is what was there, and what is left after an accident can be read."""

import json
import math
import pickle
import shutil

import pytest
import torch
from record_helpers import Loop, alike, holds, recorded
from safetensors import safe_open
from torch import nn

from hf_nino.metatrain import Recipe, Recording, Trajectory, TrajectoryRecorder, find_trajectories, shards
from hf_nino.metatrain import trajectory as trajectory_module
from hf_nino.metatrain.shards import IntervalMeans
from hf_nino.training import NiNo
from hf_nino.training.snapshot_file import TornSnapshot

SMALL = {"shard_bytes": 1000}  # two snapshots of the tiny model


# -- what is recorded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, SMALL, {"shard_bytes": 1}], ids=["one shard", "shards of two", "of one"])
def test_recorded_states_are_the_parameters_of_their_steps(tmp_path, settings):
    """Bit for bit in float32, in whatever shards, and a comparison with the next step's states would notice."""
    loop, trajectory = recorded(tmp_path / "run", **settings)
    assert trajectory.steps == list(range(0, 21, 2)) and len(trajectory) == 11 and trajectory.finished
    assert trajectory.shapes == {name: tuple(state.shape) for name, state in loop.states[0].items()}
    assert holds(trajectory, loop.states)
    assert not holds(trajectory, loop.states, shift=1)
    trajectory.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_narrow_dtypes_round_once_and_nothing_else(tmp_path, dtype):
    loop, trajectory = recorded(tmp_path / "run", dtype=dtype)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert trajectory.dtype == kind
    assert holds(trajectory, {step: {n: t.to(kind) for n, t in state.items()} for step, state in loop.states.items()})
    assert not holds(trajectory, loop.states)


def test_learning_rates_are_those_of_the_steps_and_losses_the_means_between_snapshots(tmp_path):
    """The rate is that with which the last step was made, though the scheduler was stepped before the recording heard
    of it; the sum runs over all steps, not over snapshots."""
    loop, trajectory = recorded(tmp_path / "run", every=4)
    steps = trajectory.steps
    assert trajectory.learning_rates == [loop.rates[max(step, 1)] for step in steps]
    assert trajectory.learning_rate_sums == pytest.approx([sum(loop.rates[i + 1] for i in range(s)) for s in steps])
    assert math.isnan(trajectory.losses[0])
    means = [sum(loop.losses[i] for i in range(step - 3, step + 1)) / 4 for step in steps[1:]]
    assert trajectory.losses[1:] == pytest.approx(means)


def test_steps_that_a_gradient_scaler_skips_add_no_learning_rate(tmp_path):
    loop = Loop()
    with TrajectoryRecorder(tmp_path / "run", 2).recording(loop.model, loop.optimizer) as record:
        loop.run(2, record)
        record.step()
        record.step()
    first, second, third = Trajectory(tmp_path / "run").learning_rate_sums
    assert first == 0 and second == third == pytest.approx(loop.rates[1] + loop.rates[2])


@pytest.mark.parametrize(
    ("optimizer", "settings", "kinds"),
    [
        (torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq")),
        (torch.optim.SGD, {"momentum": 0.9}, ("momentum_buffer",)),
        (torch.optim.SGD, {}, ()),
    ],
)
def test_moments_are_those_of_the_optimizer(tmp_path, optimizer, settings, kinds):
    """Bit for bit; before the first step they are 0, and other kinds are refused."""
    loop, trajectory = recorded(tmp_path / "run", loop=Loop(optimizer, **settings), moments=True, **SMALL)
    assert trajectory.moments == kinds
    for kind in kinds:
        moments = trajectory.states(0, len(trajectory), kind=kind)
        for name, parameter in loop.model.named_parameters():
            assert torch.equal(moments[name][-1], loop.optimizer.state[parameter][kind])
            assert moments[name].shape == (11, *parameter.shape) and not moments[name][0].any()
    with pytest.raises(ValueError, match="`kind` must be one of parameter"):
        trajectory.states(0, 1, kind="exp_inf")


def test_moments_beside_float16_states_are_bfloat16(tmp_path):
    """Squared gradients are below what float16 can hold, and would be 0."""
    small = torch.tensor(1e-12)
    loop = Loop().run(1)
    for state in loop.optimizer.state.values():
        state["exp_avg_sq"].fill_(small)
    _, trajectory = recorded(tmp_path / "run", until=1, loop=loop, dtype="float16", moments=True)
    kept = trajectory.states(0, 1, kind="exp_avg_sq")
    assert all(torch.equal(moment, torch.full_like(moment, small.bfloat16())) for moment in kept.values())
    assert small.half() == 0


@pytest.mark.parametrize("max_rows", [5, 11])
def test_of_large_embeddings_the_same_rows_are_kept_at_every_step(tmp_path, max_rows):
    """The rows that the reader names, of the embedding and of its moments; other matrices are kept whole."""
    loop, trajectory = recorded(tmp_path / "run", max_rows=max_rows, moments=True)
    assert list(trajectory.rows) == ["embedding.weight"]
    rows = trajectory.rows["embedding.weight"]
    assert len(rows.unique()) == max_rows and torch.equal(rows, rows.sort().values)
    for i, step in enumerate(trajectory.steps):
        assert torch.equal(
            trajectory.states(i, i + 1)["embedding.weight"][0], loop.states[step]["embedding.weight"][rows]
        )
    assert trajectory.shapes["layer.weight"] == (12, 4)
    moments = loop.optimizer.state[loop.model.embedding.weight]["exp_avg"]
    assert torch.equal(trajectory.states(10, 11, kind="exp_avg")["embedding.weight"][0], moments[rows])
    assert not torch.equal(rows, torch.arange(max_rows))  # the first rows would pass an index that is ignored


def test_embeddings_of_no_more_than_max_rows_are_whole(tmp_path):
    _, trajectory = recorded(tmp_path / "run", until=2, max_rows=12)
    assert not trajectory.rows


def test_both_ends_of_a_transformers_model_keep_the_same_tokens(tmp_path):
    """Input and output embeddings with equally many rows keep the same ones, and a model of the recorded shapes can be
    built again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=39
    )
    model = LlamaForCausalLM(config)
    with TrajectoryRecorder(tmp_path / "run", max_rows=16).recording(model, torch.optim.AdamW(model.parameters())):
        pass
    trajectory = Trajectory(tmp_path / "run")
    first, last = trajectory.rows["model.embed_tokens.weight"], trajectory.rows["lm_head.weight"]
    assert torch.equal(first, last) and len(first) == 16
    rebuilt = trajectory.build_model()
    assert isinstance(rebuilt, LlamaForCausalLM)
    assert {name: tuple(p.shape) for name, p in rebuilt.named_parameters()} == trajectory.shapes


def test_a_model_that_nothing_describes_is_not_guessed_at(tmp_path):
    _, trajectory = recorded(tmp_path / "run", until=2)
    with pytest.raises(ValueError, match="it was a Words: build it yourself"):
        trajectory.build_model()


def test_the_optimizer_inside_nino_is_recorded(tmp_path):
    """Nowcasts or not: learning rates and moments are those of the base optimizer."""
    loop = Loop()
    base, loop.optimizer = loop.optimizer, NiNo(loop.optimizer, loop.model, "linear", period=100)
    _, trajectory = recorded(tmp_path / "run", loop=loop, moments=True)
    assert trajectory.description["optimizer"]["name"] == "AdamW" and holds(trajectory, loop.states)
    assert trajectory.learning_rate_sums[-1] == pytest.approx(sum(loop.rates.values()))
    assert not base._optimizer_step_pre_hooks  # the recording has let go of it


def test_recording_does_not_change_training(tmp_path):
    plain = Loop().run(20)
    loop, _ = recorded(tmp_path / "run", moments=True, max_rows=5)
    assert all(torch.equal(plain.states[20][name], state) for name, state in loop.states[20].items())


# -- reading --------------------------------------------------------------------------------------------------------


class Counting:
    """``safe_open``, and what was read through it: {key: bytes}."""

    def __init__(self):
        self.read = {}

    def __call__(self, path, **settings):
        return CountingFile(safe_open(path, **settings), self.read)


class CountingFile:
    def __init__(self, file, read):
        self.file, self.read = file, read

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, key):
        return CountingSlice(self.file.get_slice(key), key, self.read)


class CountingSlice:
    def __init__(self, part, key, read):
        self.part, self.key, self.read = part, key, read

    def get_shape(self):
        return self.part.get_shape()

    def __getitem__(self, where):
        found = self.part[where]
        self.read[self.key] = self.read.get(self.key, 0) + found.numel() * found.element_size()
        return found


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    """Two snapshots of one tensor cost the bytes of two snapshots of one tensor, and opening costs none; asking for
    everything costs everything."""
    counting = Counting()
    recorded(tmp_path / "run", moments=True, **SMALL)
    monkeypatch.setattr(trajectory_module, "safe_open", counting)
    trajectory = Trajectory(tmp_path / "run")
    assert not counting.read
    trajectory.states(3, 5, names=["layer.weight"])
    assert counting.read == {"parameter/layer.weight": 2 * 48 * 4}
    counting.read.clear()
    trajectory.window(0, 3, stride=4, names=["scale"])
    assert counting.read == {"parameter/scale": 3 * 4}
    counting.read.clear()
    trajectory.states(0, 11)
    assert sum(counting.read.values()) == 11 * trajectory.num_parameters * 4


@pytest.mark.parametrize(("start", "context", "stride"), [(0, 5, 1), (2, 3, 4), (10, 1, 1), (1, 10, 1), (0, 6, 2)])
def test_a_window_is_every_stride_th_snapshot(tmp_path, start, context, stride):
    _, trajectory = recorded(tmp_path / "run", **SMALL)
    everything = trajectory.states(0, len(trajectory))
    window = trajectory.window(start, context, stride)
    chosen = [start + i * stride for i in range(context)]
    assert all(torch.equal(window[name], everything[name][chosen]) for name in everything)
    assert window["scale"].shape == (context,)


def test_reading_beyond_the_end_or_what_is_not_there_is_refused(tmp_path):
    _, trajectory = recorded(tmp_path / "run")
    for ask in (
        lambda: trajectory.states(5, 12),
        lambda: trajectory.states(-1, 2),
        lambda: trajectory.window(3, 3, 4),
    ):
        with pytest.raises(IndexError, match="has snapshots 0 to 10; asked for"):
            ask()
    with pytest.raises(IndexError, match="none at all"):
        trajectory.states(3, 3)
    with pytest.raises(ValueError, match="`stride` must be at least 1"):
        trajectory.window(0, 2, 0)
    with pytest.raises(ValueError, match=r"`names` must be recorded parameters.*'lm_head'"):
        trajectory.states(0, 1, names=["lm_head"])


def test_a_trajectory_travels_to_other_processes(tmp_path):
    _, trajectory = recorded(tmp_path / "run", **SMALL)
    trajectory.states(0, 11)
    assert alike(pickle.loads(pickle.dumps(trajectory)), trajectory)


def test_trajectories_are_found_at_any_depth(tmp_path):
    for name in ("b/run", "a"):
        recorded(tmp_path / name, until=2)
    assert find_trajectories(tmp_path) == [tmp_path / "a", tmp_path / "b" / "run"]
    with pytest.raises(FileNotFoundError, match=r"holds no trajectory: trajectory\.json is absent"):
        Trajectory(tmp_path)


# -- accidents ------------------------------------------------------------------------------------------------------


def killed_while_writing(folder, monkeypatch):
    """A run of 20 steps whose process is killed in the middle of its third shard: no code of ours runs after that."""
    loop = Loop()
    record = Recording(folder, Recipe(2), loop.model, loop.optimizer, **SMALL)
    whole, count = shards.write_snapshot, iter(range(3))

    def write(path, tensors, step):
        if next(count) < 2:
            return whole(path, tensors, step)
        whole(path, tensors, step)
        half = path.read_bytes()[: path.stat().st_size // 2]
        path.unlink()
        path.with_name(path.name + ".tmp").write_bytes(half)
        raise SystemExit

    monkeypatch.setattr(shards, "write_snapshot", write)
    with pytest.raises(SystemExit):
        loop.run(20, record)
    monkeypatch.setattr(shards, "write_snapshot", whole)
    return loop


def test_a_run_that_is_killed_in_mid_shard_leaves_the_shards_before_it(tmp_path, monkeypatch, caplog):
    loop = killed_while_writing(tmp_path / "run", monkeypatch)
    trajectory = Trajectory(tmp_path / "run")
    assert trajectory.steps == [0, 2, 4, 6] and not trajectory.finished
    assert holds(trajectory, loop.states)
    assert "while a shard was being written" in caplog.text


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), 8),
        (lambda file: file.write_bytes(file.read_bytes()[:40]), 8),
        (lambda file: file.write_bytes(b""), 8),
        (lambda file: file.unlink(), 8),
    ],
    ids=["a byte short", "cut in the header", "empty", "absent"],
)
def test_a_torn_shard_ends_the_trajectory_with_a_warning(tmp_path, caplog, damage, left):
    loop, whole = recorded(tmp_path / "run", **SMALL)
    assert not caplog.records and len(whole) == 11
    damage(tmp_path / "run" / "shard-00004.safetensors")
    trajectory = Trajectory(tmp_path / "run")
    assert len(trajectory) == left and holds(trajectory, loop.states)
    (warning,) = caplog.records
    assert "ends before step 16, and its last 3 snapshots are lost" in warning.message


def test_a_bit_that_has_rotted_is_found_by_verify(tmp_path):
    recorded(tmp_path / "run", **SMALL)
    file = tmp_path / "run" / "shard-00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(TornSnapshot, match="shard-00001"):
        Trajectory(tmp_path / "run").verify()


@pytest.mark.parametrize("stops_at", [0, 2, 4])
def test_a_full_disk_ends_the_recording_and_not_the_training(tmp_path, monkeypatch, caplog, stops_at):
    """One warning, the training goes on as without, and what was written before can be read."""
    loop, plain, whole, count = Loop(), Loop().run(20), shards.write_snapshot, iter(range(100))

    def write(path, tensors, step):
        if next(count) >= stops_at:
            raise OSError(28, "No space left on device")
        return whole(path, tensors, step)

    monkeypatch.setattr(shards, "write_snapshot", write)
    with TrajectoryRecorder(tmp_path / "run", 2, **SMALL).recording(loop.model, loop.optimizer) as record:
        loop.run(20, record)
    (warning,) = caplog.records
    assert "No space left on device" in warning.message and "training goes on" in warning.message
    assert all(torch.equal(plain.states[20][name], state) for name, state in loop.states[20].items())
    trajectory = Trajectory(tmp_path / "run")
    assert trajectory.steps == list(range(0, 4 * stops_at, 2)) and holds(trajectory, loop.states)
    assert not trajectory.finished


def test_a_change_of_the_trainable_parameters_ends_the_recording(tmp_path, caplog):
    loop = Loop()
    with TrajectoryRecorder(tmp_path / "run", 2).recording(loop.model, loop.optimizer) as record:
        loop.run(4, record)
        loop.model.scale.requires_grad_(False)
        loop.run(8, record)
    assert sum("trainable parameters have changed" in entry.message for entry in caplog.records) == 1


def test_an_error_in_the_loop_leaves_what_there_was(tmp_path):
    loop = Loop()
    recorder = TrajectoryRecorder(tmp_path / "run", 2)
    with pytest.raises(ZeroDivisionError), recorder.recording(loop.model, loop.optimizer) as record:
        loop.run(7, record)
        raise ZeroDivisionError
    trajectory = Trajectory(tmp_path / "run")
    assert trajectory.steps == [0, 2, 4, 6] and not trajectory.finished and holds(trajectory, loop.states)


# -- resuming -------------------------------------------------------------------------------------------------------


def resumed(folder, at, **settings):
    """A run that was interrupted after step 15 and goes on from its checkpoint of step ``at``."""
    loop = Loop()
    record = Recording(folder, Recipe(4, moments=True), loop.model, loop.optimizer, **settings)
    loop.run(at, record)
    record.checkpoint()
    saved = {
        name: part.state_dict() for name, part in (("m", loop.model), ("o", loop.optimizer), ("s", loop.scheduler))
    }
    saved = pickle.loads(pickle.dumps(saved))
    loop.run(15, record)
    record.writer.flush()
    again = Loop()
    for name, part in (("m", again.model), ("o", again.optimizer), ("s", again.scheduler)):
        part.load_state_dict(saved[name])
    again.done = at
    recorder = TrajectoryRecorder(folder, 4, moments=True, **settings)
    with recorder.recording(again.model, again.optimizer, step=at) as record:
        again.run(20, record)
    return Trajectory(folder)


@pytest.mark.parametrize("at", [3, 4, 7, 9, 12, 15])
@pytest.mark.parametrize("settings", [{}, SMALL], ids=["one shard", "several"])
def test_a_resumed_loop_records_what_an_uninterrupted_one_does(tmp_path, at, settings):
    """States, moments, learning rates, their sums and losses; on a snapshot and between two."""
    _, whole = recorded(tmp_path / "whole", every=4, moments=True, **settings)
    again = resumed(tmp_path / "again", at, **settings)
    assert alike(again, whole) and again.finished
    assert again.losses[1:] == pytest.approx(whole.losses[1:], rel=1e-6)


def test_a_trajectory_of_another_run_would_be_noticed(tmp_path):
    """The negative control of the comparison above."""
    _, whole = recorded(tmp_path / "whole", every=4, moments=True)
    _, other = recorded(tmp_path / "other", every=4, moments=True, loop=Loop(lr=1.001e-2))
    assert not alike(whole, other)


def test_snapshots_that_were_lost_in_a_crash_are_not_papered_over(tmp_path, monkeypatch):
    """A run cannot go on from step 16 if its trajectory ends at step 6; from step 7 it can, and what the crash left of
    a shard is gone."""
    loop = killed_while_writing(tmp_path / "run", monkeypatch)
    recorder = TrajectoryRecorder(tmp_path / "run", 2, **SMALL)
    with pytest.raises(ValueError, match=r"the trajectory up to step 16, .* ends at step 6"):
        recorder.recording(loop.model, loop.optimizer, step=16).__enter__()
    with recorder.recording(loop.model, loop.optimizer, step=7):
        pass
    assert Trajectory(tmp_path / "run").steps == [0, 2, 4, 6]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_new_run_does_not_touch_a_trajectory_that_is_there(tmp_path):
    loop, before = recorded(tmp_path / "run")
    recorder = TrajectoryRecorder(tmp_path / "run", 2)
    with pytest.raises(ValueError, match="must not hold a trajectory when a new run begins"):
        recorder.recording(loop.model, loop.optimizer).__enter__()
    assert alike(Trajectory(tmp_path / "run"), before)
    _, after = recorded(tmp_path / "run", until=4, overwrite=True, **SMALL)
    assert after.steps == [0, 2, 4] and len(list((tmp_path / "run").glob("shard-*"))) == 2


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"every": 4}, "interval"),
        ({"dtype": "float16"}, "dtype"),
        ({"max_rows": 4}, "parameters"),
        ({"moments": True}, "with_moments"),
    ],
)
def test_a_run_resumes_with_the_settings_that_it_was_begun_with(tmp_path, settings, what):
    loop, _ = recorded(tmp_path / "run")
    recorder = TrajectoryRecorder(tmp_path / "run", **({"every": 2} | settings))
    with pytest.raises(ValueError, match=f"'{what}' is another"):
        recorder.recording(loop.model, loop.optimizer, step=20).__enter__()


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "`every` must be at least 1 step, got 0"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": torch.float64}, "got 'float64'"),
        ({"max_rows": 0}, "`max_rows` must be at least 1, or None to keep all, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryRecorder(tmp_path, **settings)


def test_models_that_cannot_be_recorded_are_refused(tmp_path):
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"cannot be recorded.*is everything frozen\?"):
        TrajectoryRecorder(tmp_path / "run").recording(frozen, optimizer).__enter__()
    assert not (tmp_path / "run").exists()


def edited(text, **changes):
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("trajectory.json", lambda text: text[:50], "trajectory.json is malformed"),
        ("trajectory.json", lambda text: edited(text, format="zip"), "its format is 'zip'"),
        ("trajectory.json", lambda text: edited(text, format_version=2), "has format_version 2; this version"),
        ("trajectory.json", lambda text: edited(text, parameters=3), "trajectory.json is malformed"),
        ("trajectory.json", lambda text: edited(text, dtype="float3"), "trajectory.json is malformed"),
        ("index.jsonl", lambda text: text[:-20], "index.jsonl, line 11, is malformed"),
        ("index.jsonl", lambda text: text.replace("shard-00000", "../shard-00000", 1), "line 1, is malformed"),
        (
            "index.jsonl",
            lambda text: text.split("\n", 1)[0] + "\n" + text.split("\n", 3)[3],
            "every 2 steps, but has not",
        ),
    ],
)
def test_malformed_files_are_named(tmp_path, name, change, message):
    recorded(tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_text(change(file.read_text("utf-8")), "utf-8")
    with pytest.raises(ValueError, match=message):
        Trajectory(tmp_path / "run")


def test_a_folder_can_be_moved(tmp_path):
    loop, _ = recorded(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert holds(Trajectory(tmp_path / "elsewhere"), loop.states)


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        [(float(i), i, i) for i in range(1, 13)],
        [(1.5, 1, 2), (4.0, 3, 5), (9.0, 6, 12)],
        [(6.5, 1, 12)],
    ],
    ids=["single steps", "pieces", "one mean"],
)
@pytest.mark.parametrize("late", [False, True])
def test_means_weigh_every_step_alike(pieces, late):
    """Told before the snapshots or after, in any pieces; each step counts once, with the mean of its piece."""
    means = IntervalMeans()
    if not late:
        for piece in pieces:
            means.add(*piece)
    for step in (0, 4, 8, 12):
        means.close_interval(step)
    if late:
        for piece in pieces:
            means.add(*piece)
    value = {step: loss for loss, first, last in pieces for step in range(first, last + 1)}
    assert means.means == {end: sum(value[i] for i in range(end - 3, end + 1)) / 4 for end in (4, 8, 12)}
    assert means.open == []


def test_losses_that_are_not_finite_are_unknown():
    means = IntervalMeans()
    means.add(1.0, 1, 2)
    means.add(math.nan, 3, 3)
    means.close_interval(2)
    means.close_interval(4)
    assert means.means == {2: 1.0}
