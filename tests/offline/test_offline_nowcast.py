"""hf-nino nowcast on the checkpoints of a Trainer: what it writes, and that training goes on from it."""

import json
import shutil

import pytest
import torch
from offline_helpers import arguments, expected, read, rows, tiny_gpt2, trainer
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel, TrainerCallback
from typer.testing import CliRunner

from hf_nino import (
    LinearNowcaster,
    MomentumNowcaster,
    NeuralGraph,
    NiNoModel,
    NiNoTrainer,
    NiNoTrainingArguments,
    NowcasterConfig,
    SpectralNowcaster,
    cli,
    load_nowcaster,
)
from hf_nino.offline import nowcast_checkpoints, predicting
from hf_nino.offline.output import whole_folder
from hf_nino.offline.parameters import tied_names
from hf_nino.training.guard import InvalidNowcast, judge, tame


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps with a checkpoint every 2."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder


def checkpoints(run, *steps):
    return [run / f"checkpoint-{step}" for step in steps]


def random_nino(**settings):
    torch.manual_seed(1)
    model = NiNoModel(NowcasterConfig(hidden_size=8, **settings)).eval()
    for parameter in model.edge_out.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Capture(TrainerCallback):
    """The parameters that training begins with."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step
        self.parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_training_goes_on_from_exactly_what_was_predicted(run, tmp_path):
    """The written checkpoint is complete: `resume_from_checkpoint` starts with the prediction, at the step of the last
    checkpoint, with its optimizer state."""
    found = nowcast_checkpoints(run, "linear", tmp_path / "out", horizon=3)
    history = [read(path) for path in checkpoints(run, 4, 6, 8, 10, 12)]
    prediction = expected(LinearNowcaster(), history, 3)
    assert found.steps == [4, 6, 8, 10, 12] and (found.horizon, found.horizon_steps) == (3, 6)
    capture = Capture()
    resumed = trainer(tmp_path / "resumed", max_steps=14, save_strategy="no")
    resumed.add_callback(capture)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out"))
    assert capture.step == 12 and resumed.state.global_step == 14
    assert all(torch.equal(tensor, capture.parameters[name]) for name, tensor in prediction.items())
    assert not torch.equal(prediction["transformer.wte.weight"], history[-1]["transformer.wte.weight"])
    steps = {float(state["step"]) for state in resumed.optimizer.state_dict()["state"].values()}
    assert steps == {14.0}, "the optimizer went on, it did not begin anew"


def test_every_other_file_is_the_last_checkpoints_byte_for_byte(run, tmp_path):
    """Nothing is unpickled or rewritten, and one JSON more says what was done."""
    (run / "checkpoint-12" / "notes").mkdir(exist_ok=True)
    (run / "checkpoint-12" / "notes" / "mine.txt").write_text("kept")
    nowcast_checkpoints(run, "linear", tmp_path / "out")
    names = {str(p.relative_to(run / "checkpoint-12")) for p in (run / "checkpoint-12").rglob("*") if p.is_file()}
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == names | {"nino_nowcast.json"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (run / "checkpoint-12" / name).read_bytes(), name
    said = json.loads((tmp_path / "out" / "nino_nowcast.json").read_text())
    assert said["checkpoints"] == [f"checkpoint-{step}" for step in (4, 6, 8, 10, 12)]
    assert (said["nowcaster"], said["interval"], said["unit"], said["horizon"]) == ("linear", 2, "steps", 4)
    assert "out" not in said and str(tmp_path) not in json.dumps(said)


def test_a_nowcaster_on_the_graph_says_what_it_says_in_memory(run, tmp_path):
    """The graph comes from config.json; predictions are those of ``nowcast`` on the model's own states."""
    nowcaster = random_nino()
    nowcast_checkpoints(run, nowcaster, tmp_path / "out", horizon=2)
    model = GPT2LMHeadModel.from_pretrained(run / "checkpoint-12")
    history = [read(path) for path in checkpoints(run, 4, 6, 8, 10, 12)]
    graph = NeuralGraph.from_model(model)
    found = nowcaster.nowcast(graph, history, 2)
    verdict = judge(history, found, 2)
    wanted = {**history[-1], **tame(history[-1], found, verdict)}
    written = read(tmp_path / "out")
    assert written.keys() == wanted.keys() and "lm_head.weight" not in written
    for name, tensor in wanted.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(written[name], history[-1][name]) for name in written), "it moved"


def test_shards_keep_their_layout_and_their_numbers(run, tmp_path):
    """The same nowcast from sharded checkpoints: same shards, same index, same prediction."""
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    for path in checkpoints(run, 4, 6, 8, 10, 12):
        model = GPT2LMHeadModel.from_pretrained(path)
        model.save_pretrained(sharded / path.name, max_shard_size="6KB")
        model.save_pretrained(single / path.name)
    nowcast_checkpoints(single, "linear", tmp_path / "a")
    found = nowcast_checkpoints(sharded, "linear", tmp_path / "b")
    assert found.steps == [4, 6, 8, 10, 12]
    last = sharded / "checkpoint-12"
    layout = {path.name for path in last.glob("model*")}
    assert len(layout) > 2 and {path.name for path in (tmp_path / "b").glob("model*")} == layout
    index = "model.safetensors.index.json"
    assert (tmp_path / "b" / index).read_bytes() == (last / index).read_bytes()
    one, several = read(tmp_path / "a"), read(tmp_path / "b")
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)


def test_the_history_of_a_nowcasting_run_is_left_behind(tmp_path):
    """It ends with other parameters; training resumes all the same, with one warning, and nowcasts again."""
    settings = {"nowcaster": "linear", "nowcast_period": 5, "nowcast_patience": 0, "lr_scheduler_type": "constant"}

    def make(folder, **more):
        args = arguments(folder, NiNoTrainingArguments, **settings, **more)
        return NiNoTrainer(model=tiny_gpt2(), args=args, train_dataset=rows())

    make(tmp_path / "run").train()
    assert (tmp_path / "run" / "checkpoint-12" / "nino_state.json").is_file()
    nowcast_checkpoints(tmp_path / "run", "linear", tmp_path / "out")
    assert not list((tmp_path / "out").glob("nino_[hs]*"))
    resumed = make(tmp_path / "resumed", max_steps=24, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out"))
    assert resumed.state.global_step == 24 and resumed.nowcasting.nowcasts == 1


def test_nowcasters_with_memory_see_the_checkpoints_as_a_run_that_went_on(run, tmp_path):
    """Each is shown what the optimizer did between checkpoints, as in training with ``observe_only``."""
    found = nowcast_checkpoints(run, "momentum:momentum=0.8", tmp_path / "out")
    assert len(found.checkpoints) == 5 and found.horizon == 1
    history = [read(path) for path in checkpoints(run, 4, 6, 8, 10, 12)]
    nowcaster = MomentumNowcaster(momentum=0.8)
    nowcaster.settle(history[0])
    for state in history[1:]:
        wanted = nowcaster.nowcast(None, [state])
        nowcaster.settle(state)
    written = read(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())
    two = nowcast_checkpoints(checkpoints(run, 10, 12), "momentum", tmp_path / "two")
    assert two.steps == [10, 12]
    with pytest.raises(ValueError, match="reads 2 checkpoints, got 1"):
        nowcast_checkpoints(checkpoints(run, 12), "momentum", tmp_path / "none")


@pytest.mark.parametrize("spec", ["linear", "momentum:momentum=0.8"])
def test_elementwise_nowcasters_may_see_pieces(run, tmp_path, spec, monkeypatch):
    """Pieces of 7 elements come out as whole tensors do, bit for bit, for one horizon and for the mean of two; a
    nowcaster that looks at whole tensors would not, and is shown them whole."""
    history = [read(path) for path in checkpoints(run, 4, 6, 8, 10, 12)]
    horizons = [1] if spec != "linear" else [1, 3]
    results = []
    for piece in (10**9, 7):
        monkeypatch.setattr(predicting, "PIECE", piece)
        results.append({name: torch.empty_like(tensor) for name, tensor in history[-1].items()})
        predicting.predict_into(load_nowcaster(spec), None, history, horizons, results[-1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in history[-1])
    assert load_nowcaster(spec).elementwise and not SpectralNowcaster.elementwise
    whole, pieces = ({name: torch.empty_like(t) for name, t in history[-1].items()} for _ in range(2))
    predicting.predict_into(SpectralNowcaster(), None, history, 1, whole)
    monkeypatch.setattr(SpectralNowcaster, "elementwise", True)
    predicting.predict_into(SpectralNowcaster(), None, history, 1, pieces)
    assert not all(torch.equal(whole[name], pieces[name]) for name in whole)


def poisoned(run, tmp_path, value):
    folder = tmp_path / "poisoned"
    shutil.copytree(run, folder)
    state = read(folder / "checkpoint-12")
    state["transformer.wte.weight"][0, 0] = value
    save_file(state, folder / "checkpoint-12" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nowcast_that_is_not_finite_is_refused_and_nothing_is_written(run, tmp_path, value):
    """As in training; from the shell it is exit code 1 and one line."""
    folder = poisoned(run, tmp_path, value)
    with pytest.raises(InvalidNowcast, match=r"transformer\.wte\.weight.*(not finite|overflows)"):
        nowcast_checkpoints(folder, "linear", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poisoned"]


def test_the_guard_shortens_what_goes_too_far(run, tmp_path):
    """A nowcast several times too long is written at the length that training would allow, and said."""
    found = nowcast_checkpoints(run, LinearNowcaster(factor=5), tmp_path / "out", horizon=1)
    history = [read(path) for path in checkpoints(run, 4, 6, 8, 10, 12)]
    assert found.shortened and "too long" in found.remarks[-1]
    wanted = expected(LinearNowcaster(factor=5), history, 1)
    written = read(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())
    plain = LinearNowcaster(factor=5).nowcast(None, history, 1)
    assert not all(torch.equal(written[name], plain[name]) for name in plain)


def test_an_interrupted_nowcast_leaves_nothing_under_the_final_name(run, tmp_path):
    """Neither a new folder, nor a change of the one that was to be replaced."""

    class Interrupted(LinearNowcaster):
        left = 3

        def nowcast(self, graph, states, horizon):
            Interrupted.left -= 1
            if not Interrupted.left:
                raise KeyboardInterrupt
            return super().nowcast(graph, states, horizon)

    with pytest.raises(KeyboardInterrupt):
        nowcast_checkpoints(run, Interrupted(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("before")
    Interrupted.left = 3
    with pytest.raises(KeyboardInterrupt):
        nowcast_checkpoints(run, Interrupted(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    nowcast_checkpoints(run, "linear", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / "config.json").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    """And the hidden one beside it is gone either way."""
    with whole_folder(tmp_path / "out", []) as draft:
        (draft / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(RuntimeError, match="halfway"), whole_folder(tmp_path / "out", [], overwrite=True) as draft:
        (draft / "b").write_text("2")
        raise RuntimeError("halfway")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_what_must_not_be_overwritten_is_not(run, tmp_path):
    """A folder that holds something needs --overwrite; the run itself and what is read are never replaced."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"`out` must be a new or empty folder.*--overwrite"):
        nowcast_checkpoints(run, "linear", tmp_path / "full")
    for out in (run, run / "checkpoint-12", run / "checkpoint-12" / "inside"):
        with pytest.raises(ValueError, match="`out` must be a folder of its own"):
            nowcast_checkpoints(run, "linear", out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        nowcast_checkpoints(run, "linear", tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    nowcast_checkpoints(run, "linear", tmp_path / "empty")


def test_a_nowcast_inside_its_run_is_not_taken_for_one_of_its_checkpoints(run, tmp_path):
    """So that the same command works twice."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    first = nowcast_checkpoints(folder, "linear", folder / "checkpoint-12-nowcast")
    again = nowcast_checkpoints(folder, "linear", folder / "another")
    assert first.checkpoints == again.checkpoints


def test_tied_names_are_those_of_a_model(run):
    """``lm_head.weight`` is another name of the embedding."""
    assert tied_names(tiny_gpt2()) == {"lm_head.weight": "transformer.wte.weight"}


def command(*options):
    return CliRunner().invoke(cli.app, ["nowcast", *map(str, options)], catch_exceptions=False)


def test_the_command_says_what_it_did_to_people_and_to_programs(run, tmp_path):
    """Steps, horizon and size of the step; the same numbers as JSON."""
    told = command(run, "--nowcaster", "linear", "--horizon", 2, "--out", tmp_path / "a").output
    assert "5 checkpoints, 2 steps apart" in told and "2 x 2 = 4 steps ahead of checkpoint-12" in told
    values = json.loads(command(run, "--horizon", 2, "--out", tmp_path / "b", "--json").output)
    assert (values["horizon_steps"], values["tensors"], values["parameters"]) == (4, 16, 3952)
    assert read(tmp_path / "a").keys() == read(tmp_path / "b").keys()


def test_the_command_fails_in_one_line(run, tmp_path, monkeypatch, capsys):
    """Exit code 1: for a refused nowcast, a bad horizon, a folder without checkpoints."""
    bad = poisoned(run, tmp_path, float("nan"))
    for options, message in (
        ([bad], "the nowcast is refused"),
        ([run, "--horizon", "99"], "`horizon` must be from 1 to 40"),
        ([tmp_path], "holds no checkpoints"),
        ([tmp_path / "nowhere"], "no run and no checkpoint at"),
    ):
        monkeypatch.setattr("sys.argv", ["hf-nino", "nowcast", *map(str, options), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 1 and message in said[-1] and said[-1].startswith("hf-nino: ")
        assert not (tmp_path / "out").exists()
