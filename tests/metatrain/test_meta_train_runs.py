"""Meta-training from beginning to end: steps that are skipped, interruptions, what it leaves, what it refuses."""

import json
import math
import os
import shutil
import socket
from itertools import pairwise

import pytest
import torch
from meta_helpers import SHAPES, config, settings, training, waves, write_run
from safetensors.torch import load_file

from hf_nino.commands.meta_train import train_nowcaster
from hf_nino.metatrain import meta_loop, meta_train, meta_training
from hf_nino.metatrain.meta_checkpoint import last_checkpoint, load_checkpoint
from hf_nino.metatrain.meta_loop import MetaTraining, read_ahead
from hf_nino.metatrain.objective import Losses, Objective
from hf_nino.metatrain.split import split_trajectories
from hf_nino.nowcaster import NiNoModel, WNNModel, load_nowcaster

KINDS = ["nino", "wnn"]
TASKS = ("conv-2-3", "conv-02-3", "conv-2-03")  # one shape, three names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks with three runs each, and one that diverged."""
    found = tmp_path_factory.mktemp("trajectories")
    for number, task in enumerate(TASKS):
        for run in range(3):
            write_run(found / task / f"run-{run}", waves(10 * number + run, 6 + run), interval=10, named=task)
    write_run(found / TASKS[0] / "run-3", waves(), interval=10, named=TASKS[0], diverged=True)
    return found


@pytest.fixture(autouse=True)
def known_shapes(monkeypatch):
    """Graphs are built once for all tests."""
    monkeypatch.setattr(meta_training, "Shapes", lambda: SHAPES)


def train(folder, out, **options):
    recipe = {"interval_range": (10, 20)} | options.pop("recipe", {})
    usual = {"settings": settings(**recipe), "save_every": 3, "evaluate_every": 3, "evaluation_slices": 2}
    usual |= {"config": config()} if "initial" not in options else {}
    return meta_train(folder, out, device="cpu", **(usual | options))


# -- steps -----------------------------------------------------------------------------------------------------------


def spoil(monkeypatch, at, spoilt):
    """Make the losses of the calls whose numbers are in ``at`` what ``spoilt`` makes of them."""
    forward, calls = Objective.forward, []

    def other(self, *arguments):
        calls.append(len(calls))
        losses = forward(self, *arguments)
        return spoilt(losses) if calls[-1] in at else losses

    monkeypatch.setattr(Objective, "forward", other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch, value):
    """One of its two losses is NaN or infinite: weights and moments stay as they are, a warning says so, and training
    goes on.  The steps before and after are not skipped."""
    said = []
    monkeypatch.setattr(meta_loop.logger, "warning", said.append)
    spoil(monkeypatch, {3}, lambda losses: Losses(losses.loss * value, losses.persistence))
    meta = training([write_run(tmp_path / "run", waves())])
    states = []
    for _ in meta.run(4):
        moments = [tensor for state in meta.optimizer.state.values() for tensor in state.values()]
        states.append([tensor.clone() for tensor in (*meta.network.parameters(), *moments)])
    same = [all(map(torch.equal, before, after)) for before, after in pairwise(states)]
    assert same == [True, False, False] and meta.skipped == [1] and meta.step_count == 4
    assert all(tensor.isfinite().all() for tensor in states[-1])
    assert math.isfinite(meta.log()["loss"]) and len(said) == 1 and "Step 1 of meta-training was skipped" in said[0]


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path, monkeypatch):
    """A finite loss does not make up for it."""

    def infinite_gradient(losses):
        return Losses(losses.loss + (losses.loss - losses.loss.detach()).abs().sqrt(), losses.persistence)

    spoil(monkeypatch, {0}, infinite_gradient)
    meta = training([write_run(tmp_path / "run", waves())])
    assert list(meta.run(2)) == [1, 2] and meta.skipped == [0]


def test_nothing_is_skipped_without_reason_and_too_much_is_an_error(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", waves())
    meta = training([run], recipe=settings(steps=100))
    list(meta.run(5))
    assert meta.skipped == []
    monkeypatch.setattr(meta_loop, "HOPELESS", 3)
    spoil(monkeypatch, set(range(100)), lambda losses: Losses(losses.loss * math.nan, losses.persistence))
    with pytest.raises(FloatingPointError, match="3 steps of meta-training in a row"):
        list(meta.run(100))


def test_a_step_is_adamw_on_the_mean_loss_with_a_clipped_gradient(tmp_path):
    """Two steps, against the plain loop with torch's AdamW, the mean over trajectories, and clipping."""
    run, recipe = write_run(tmp_path / "run", waves()), settings(max_grad_norm=0.01, learning_rate=0.02)
    meta, plain = training([run], recipe=recipe), training([run], recipe=recipe)
    optimizer = torch.optim.AdamW(plain.network.parameters(), lr=1.0, weight_decay=1e-2)
    for step in range(2):
        losses = [plain.objective(*example).loss for example in plain.examples(step)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(plain.network.parameters(), 0.01) > 0.01
        optimizer.param_groups[0]["lr"] = 0.02 * (step / 2)  # warm-up
        optimizer.step()
    before = {name: tensor.clone() for name, tensor in meta.network.state_dict().items()}
    list(meta.run(2))
    for name, tensor in meta.network.state_dict().items():
        torch.testing.assert_close(tensor, plain.network.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, before[name])


def test_what_is_read_ahead_is_the_same_in_the_same_order():
    """And an error of the reader reaches the reader of it."""

    def make(step):
        yield from (step, 10 * step) if step < 3 else [1 / 0]

    read = read_ahead(make, range(5))
    assert [next(read) for _ in range(3)] == [[0, 0], [1, 10], [2, 20]]
    with pytest.raises(ZeroDivisionError):
        next(read)


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, kind):
    """Killed in step 5, two steps after a checkpoint, and with a skipped step before it: weights, optimizer, losses
    and evaluations are the same afterwards, bit for bit."""
    monkeypatch.setattr(meta_training, "LOG_EVERY", 2)
    step_of = MetaTraining._step

    def run(out, kill):
        def step(self, examples):
            if self.step_count == 1:
                examples = [(shape, spoilt(batch), signs) for shape, batch, signs in examples]
            if self.step_count == 4 and kill:
                raise KeyboardInterrupt
            step_of(self, examples)

        monkeypatch.setattr(MetaTraining, "_step", step)
        return train(folder, out, config=config(nowcaster_type=kind))

    def spoilt(batch):
        batch.spread["head.bias"].fill_(math.nan)
        return batch

    whole = run(tmp_path / "whole", False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", True)
    assert last_checkpoint(tmp_path / "broken").name == "checkpoint-3"
    resumed = run(tmp_path / "broken", False)
    assert resumed["skipped_steps"] == whole["skipped_steps"] == [1]
    for key in ("losses", "evaluations", "evaluation", "steps", "data", "settings"):
        assert resumed[key] == whole[key], key
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/optimizer.safetensors"):
        first, second = (load_file(tmp_path / part / name) for part in ("whole", "broken"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_a_run_that_forgot_its_moments_would_be_noticed(folder, tmp_path, monkeypatch):
    """The negative control: with the optimizer's state lost on the way, the weights are others."""
    train(folder, tmp_path / "whole")
    train(folder, tmp_path / "other")

    def forgetful(checkpoint, network, optimizer):
        load_checkpoint(checkpoint, network, optimizer)
        optimizer.state.clear()

    shutil.rmtree(tmp_path / "other" / "checkpoint-6")
    monkeypatch.setattr(meta_loop, "load_checkpoint", forgetful)
    train(folder, tmp_path / "other")
    first, second = (load_file(tmp_path / part / "model.safetensors") for part in ("whole", "other"))
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoints_are_whole_and_few(folder, tmp_path):
    """Of four, the last two are left; one that was not finished is none."""
    train(folder, tmp_path, recipe={"steps": 4}, save_every=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    os.replace(tmp_path / "checkpoint-4", tmp_path / "checkpoint-5.tmp")
    assert last_checkpoint(tmp_path).name == "checkpoint-3"


# -- the command -----------------------------------------------------------------------------------------------------


def command(folder, out, said, **options):
    usual = {"steps": 4, "batch_size": 2, "slices": 2, "warmup_steps": 1, "intervals": "10-20", "device": "cpu"}
    sizes = {"hidden_size": 8, "num_layers": 2, "context": 3, "max_horizon": 4, "period": 60}
    sizes = {} if "initial" in options else sizes
    train_nowcaster(str(folder), out, said.append, **(usual | sizes | options))


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_leaves_a_nowcaster_and_what_there_is_to_know_of_it(folder, tmp_path, kind):
    """A folder that loads as a nowcaster and nowcasts; JSON with recipe, data, software, hours and evaluation; a table
    and a picture; what it costs was told before.  The same again does nothing, another recipe is refused."""
    said = []
    command(folder, tmp_path, said, kind=kind, held_out_tasks="conv-02-*")
    assert "steps of 2 x 2 slices are left: about" in said[0] and "4 trajectories" in said[0]
    assert "held out: 2 runs of the same tasks and 3 of other tasks" in said[0] and "Held-out errors" in said[1]
    nowcaster = load_nowcaster(tmp_path)
    assert type(nowcaster) is (NiNoModel if kind == "nino" else WNNModel)
    assert (nowcaster.context, nowcaster.period, nowcaster.max_horizon) == (3, 60, 4)
    assert nowcaster.config.meta_trained_on == "4 recorded runs of 2 tasks, 48 snapshots"
    run = write_run(tmp_path / "one", waves(), snapshots=4)
    states = [{name: tensor[0] for name, tensor in run.states(t, t + 1).items()} for t in range(3)]
    nowcast = nowcaster.nowcast(SHAPES.of(run).graph, states, 4)
    assert all(nowcast[name].isfinite().all() for name in run.names)

    summary = json.loads((tmp_path / "meta_training.json").read_text())
    assert summary["nowcaster"] == nowcaster.config.to_dict() and summary["skipped_steps"] == []
    assert summary["settings"]["steps"] == summary["steps"] == 4 and summary["hours"] > 0
    assert summary["data"]["diverged_left_out"] == 1 and summary["data"]["snapshots"] == 4 * 12
    assert summary["data"]["tasks"] == {
        "conv-2-03": {"train": 2, "held_out_runs": 1, "held_out_tasks": 0},
        "conv-2-3": {"train": 2, "held_out_runs": 1, "held_out_tasks": 0},
        "conv-02-3": {"train": 0, "held_out_runs": 0, "held_out_tasks": 3},
    }
    assert {"hf_nino", "torch", "transformers", "accelerate", "python"} <= summary["software"].keys()
    assert summary["evaluation"]["tasks"]["tasks"] == {"conv-02-3": 3 * 6}
    assert str(tmp_path) not in json.dumps(summary) and str(folder) not in json.dumps(summary)
    assert "## Other tasks" in (tmp_path / "evaluation.md").read_text()
    assert (tmp_path / "evaluation.png").stat().st_size > 5000
    weights = (tmp_path / "model.safetensors").read_bytes()

    command(folder, tmp_path, said, kind=kind, held_out_tasks="conv-02-*")
    assert "finished already" in said[-1] and (tmp_path / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="made with another `learning_rate`"):
        command(folder, tmp_path, said, kind=kind, held_out_tasks="conv-02-*", learning_rate=1e-4)
    fewer = tmp_path / "fewer"
    shutil.copytree(folder, fewer, ignore=shutil.ignore_patterns("run-2"))
    with pytest.raises(ValueError, match="made with another `trajectories`"):
        command(fewer, tmp_path, said, kind=kind, held_out_tasks="conv-02-*")


def test_a_nowcaster_can_be_the_beginning_of_another(folder, tmp_path):
    """Weights and sizes are taken over, and change with the first steps that have a learning rate; sizes cannot be
    chosen again."""
    train(folder, tmp_path / "first")
    begun = train(folder, tmp_path / "second", initial=tmp_path / "first", recipe={"steps": 1, "warmup_steps": 1})
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first) and begun["initial"] == "first"
    train(folder, tmp_path / "third", initial=tmp_path / "first", recipe={"steps": 1, "warmup_steps": 0})
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert not all(torch.equal(first[name], third[name]) for name in first)
    with pytest.raises(ValueError, match="`config` must be left out with `initial`"):
        train(folder, tmp_path / "x", initial=tmp_path / "first", config=config())
    with pytest.raises(ValueError, match="`hidden_size` must be left out with `initial`"):
        command(folder, tmp_path / "x", [], initial=str(tmp_path / "first"), hidden_size=8)
    with pytest.raises(ValueError, match="`initial` must name a nowcaster with weights, got 'linear'"):
        train(folder, tmp_path / "x", initial="linear")


def test_trackers_get_losses_and_evaluations(folder, tmp_path):
    """Through accelerate, under names with slashes; settings too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(folder, tmp_path, report_to=["tensorboard"])
    events = next((tmp_path / "hf_nino").rglob("events.*")).parent
    logged = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"loss", "persistence", "gradient_norm", "learning_rate", "skipped_steps"} <= set(logged)
    assert {"runs/error_nowcaster", "tasks/relative_linear"} <= set(logged)


def test_nothing_held_out_is_allowed(folder, tmp_path):
    """Then nothing is measured, and there is no table."""
    summary = train(folder, tmp_path, recipe={"held_out_share": 0.0})
    assert summary["evaluation"] == {} and not (tmp_path / "evaluation.md").exists()
    assert summary["data"]["trajectories"] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 0}, "`save_every` must be at least 1 step, got 0"),
        ({"evaluation_slices": 0}, "`evaluation_slices` must be at least 1, got 0"),
        ({"device": "tpu"}, "`device` must be 'cpu', or 'cuda' where PyTorch finds a GPU, got 'tpu'"),
        ({"intervals": "often"}, "`intervals` must be a number of steps, or two like 25-100, got 'often'"),
        ({"intervals": "500"}, "`trajectories` must hold runs with 4 snapshots that are 500 to 500 steps apart"),
        ({"kind": "lstm"}, "`nowcaster_type` of a nowcaster must be one of"),
    ],
)
def test_bad_arguments_get_one_clear_error(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        command(folder, tmp_path, [], **options)


def test_a_folder_without_trajectories_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has none"):
        command(tmp_path, tmp_path / "out", [])


# -- several processes -----------------------------------------------------------------------------------------------


def _process(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    summary = train(f"{folder}/trajectories", f"{folder}/out", recipe={"steps": 3})
    torch.save({"summary": json.dumps(summary), "rank": rank}, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)  # two processes that wait for each other take long on a machine with other things to do
def test_processes_average_the_gradients_of_trajectories_of_their_own(tmp_path):
    """Two processes with two trajectories each become what one process becomes that learns from the same four."""
    runs = [write_run(tmp_path / "trajectories" / f"run-{i}", waves(i), interval=10) for i in range(4)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (str(tmp_path), port), nprocs=2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    summaries = [json.loads(torch.load(tmp_path / f"{rank}.pt")["summary"]) for rank in range(2)]
    assert summaries[0]["losses"] == summaries[1]["losses"] and summaries[0]["hardware"]["processes"] == 2
    recipe = settings(steps=3, interval_range=(10, 20))
    meta = training(split_trajectories(runs, share=0.1).train, recipe=recipe)
    optimizer = torch.optim.AdamW(meta.network.parameters(), weight_decay=1e-2)
    for step in range(3):
        losses = []
        for process in range(2):
            meta.accelerator = type("", (), {"process_index": process, "device": torch.device("cpu")})()
            losses += [meta.objective(*example).loss for example in meta.examples(step)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(meta.network.parameters(), recipe.max_grad_norm)
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        optimizer.step()
    for name, tensor in meta.network.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
