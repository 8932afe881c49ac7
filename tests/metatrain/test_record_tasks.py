"""``hf-nino record``: names that describe tasks, a folder of trajectories, and the dataset that it is."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard
from record_helpers import alike, recorded
from torch.utils.data import DataLoader

from hf_nino import NeuralGraph
from hf_nino.bench.training.tasks.language import LanguageTask
from hf_nino.commands.record import record
from hf_nino.metatrain import (
    Recipe,
    Trajectory,
    card,
    load_trajectories,
    open_trajectory,
    push_trajectories,
    record_tasks,
    windows,
    write_dataset,
)
from hf_nino.metatrain import record as record_module
from hf_nino.metatrain.dataset import FEATURES
from hf_nino.metatrain.rebuild import example_inputs
from hf_nino.metatrain.record import is_recorded, run_folder
from hf_nino.metatrain.stacked import StackedTraining
from hf_nino.metatrain.tasks import GROUPS, expand, recording_task
from hf_nino.metatrain.variation import draw_settings

CPU = torch.device("cpu")
TASKS = ("gpt2-1x16-h2-v320-kjv", "conv-4-6")
OPTIONS = {"runs": 3, "steps": 8, "jobs": 1, "device": "cpu", "recipe": Recipe(every=2, max_rows=50, moments=True)}


@pytest.fixture(scope="module")
def data():
    """Data of each kind of task, without files."""
    from hf_nino.bench.training.tasks.images import Images
    from hf_nino.bench.training.tasks.language import Blocks

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(320, (64, 64), generator=generator, dtype=torch.int16)
    images = torch.randint(256, (128, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(128) % 10
    return {"language": Blocks(blocks, blocks), "images": Images(images, labels, images, labels)}


@pytest.fixture
def without_files(monkeypatch, data):
    monkeypatch.setattr(record_module, "load", lambda task, cache: data[task.kind])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A folder that ``record_tasks`` has filled, its summary and what was said."""
    out, said = tmp_path_factory.mktemp("record") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "load", lambda task, cache: data[task.kind])
        summary = record_tasks(TASKS, out, say=said.append, **OPTIONS)
    return out, summary, said


# -- recording ------------------------------------------------------------------------------------------------------


def test_trajectories_are_those_of_the_stacked_training(finished, data):
    """Every state and moment of every run, bit for bit, at its step; rows of the embedding as named."""
    out, summary, _ = finished
    assert summary["recorded"] == 6 and summary["diverged"] == 0 and not summary["failures"]
    for name in TASKS:
        task = replace(recording_task(name), steps=8)
        for one in [draw_settings(task, index, 0) for index in range(3)]:
            trajectory = Trajectory(run_folder(one, out))
            assert trajectory.steps == [0, 2, 4, 6, 8] and trajectory.finished
            group = [draw_settings(task, i, 0) for i in range(3)]
            group = sorted((o for o in group if o.batch_size == one.batch_size), key=lambda o: (o.optimizer, o.index))
            training = StackedTraining(task, data[task.kind], group, CPU, summary["engines"][name])
            for i, step in enumerate(trajectory.steps):
                while training.step_count < step:
                    training.step()
                matches(training, group.index(one), trajectory, i)


def matches(training, row, trajectory, i):
    for kind, flat in {"parameter": training.flat, **training.moments}.items():
        if kind != "parameter" and kind not in trajectory.moments:
            continue
        kept = trajectory.states(i, i + 1, kind=kind)
        for name, whole in training.unflatten(flat[row]).items():
            expected = whole[trajectory.rows[name]] if name in trajectory.rows else whole
            assert torch.equal(kept[name][0], expected), (kind, name)


def test_each_run_says_how_it_was_trained(finished):
    """Settings, optimizer, learning rates and losses."""
    out, _, _ = finished
    for name in TASKS:
        one = draw_settings(replace(recording_task(name), steps=8), 1, 0)
        trajectory = Trajectory(run_folder(one, out))
        assert trajectory.description["settings"] == one.to_dict()
        assert trajectory.description["optimizer"]["groups"][0]["lr"] == one.learning_rate
        assert trajectory.learning_rates == [one.rate(max(step - 1, 0)) for step in trajectory.steps]
        sums = [sum(one.rate(i) for i in range(step)) for step in trajectory.steps]
        assert trajectory.learning_rate_sums == pytest.approx(sums)
        assert all(0 < loss < 20 for loss in trajectory.losses[1:])


def test_what_it_will_cost_is_said_before(finished):
    _, _, said = finished
    assert "6 runs of 2 tasks; 0 are recorded already" in said[0]
    assert "6 runs are left, 48 steps in all: about" in said[1] and "iB in" in said[1]


def test_finished_runs_are_skipped_and_others_begun_anew(finished, without_files, tmp_path):
    """The same command trains nothing again; a run that was interrupted is recorded as it would have been; more runs
    leave the first ones as they are."""
    out, _, _ = finished
    mine = tmp_path / "out"
    shutil.copytree(out, mine)
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("shard-*")}
    torn = mine / TASKS[0] / "run-0001"
    for shard in torn.glob("shard-*"):
        shard.unlink()
    about = json.loads((torn / "trajectory.json").read_text("utf-8"))
    (torn / "trajectory.json").write_text(json.dumps(about | {"finished": False}), "utf-8")
    summary = record_tasks(TASKS, mine, say=lambda text: None, **OPTIONS | {"runs": 4})
    assert summary["recorded"] == 8
    unchanged = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(unchanged) == len(before) - len(list(torn.glob("shard-*")))
    again, there = Trajectory(torn), Trajectory(out / TASKS[0] / "run-0001")
    assert again.finished and again.steps == there.steps
    for name, states in there.states(0, 5).items():
        torch.testing.assert_close(again.states(0, 5)[name], states)  # stacked with others, or with none


def test_a_folder_of_other_settings_is_refused(finished, without_files):
    out, _, _ = finished
    for change, what in (({"steps": 9}, "`steps`"), ({"seed": 1}, "`optimizer`|`learning_rate`")):
        with pytest.raises(ValueError, match=f"was recorded with another ({what})"):
            record_tasks(TASKS, out, **OPTIONS | change)
    with pytest.raises(ValueError, match="was recorded with another `every`"):
        record_tasks(TASKS, out, **OPTIONS | {"recipe": Recipe(every=4, max_rows=50, moments=True)})


def test_runs_that_diverge_are_recorded_until_then(without_files, tmp_path, monkeypatch):
    """Only finite states, and the summary says so; the others go on."""
    drawn = record_module.draw_settings

    def wild(task, index, seed):
        one = replace(drawn(task, index, seed), optimizer="sgd", batch_size=4, max_grad_norm=None, warmup_steps=0)
        return replace(one, learning_rate=1e30 if index == 0 else 1e-3)

    monkeypatch.setattr(record_module, "draw_settings", wild)
    summary = record_tasks(["conv-4-6"], tmp_path / "out", **OPTIONS | {"runs": 2})
    assert [run["diverged"] for run in summary["runs"]] == [True, False]
    first, second = (Trajectory(tmp_path / "out" / "conv-4-6" / f"run-000{i}") for i in range(2))
    assert len(first) < len(second) == 5 and first.finished
    assert all(states.isfinite().all() for states in first.states(0, len(first)).values())


def test_a_stack_that_fails_does_not_stop_the_others(without_files, tmp_path, monkeypatch):
    """What there is is there, the error is told at the end, and the same command tries again."""
    loss = LanguageTask.loss
    monkeypatch.setattr(
        record_module, "plan_cost", lambda *_: (dict.fromkeys(TASKS, "loop"), record_module.Cost(6, 48, 0, 0))
    )
    monkeypatch.setattr(LanguageTask, "loss", lambda *_: 1 / 0)
    with pytest.raises(ChildProcessError, match="stacks of runs failed, the first with: ZeroDivisionError"):
        record_tasks(TASKS, tmp_path / "out", **OPTIONS)
    assert len(load_trajectories(tmp_path / "out")) >= 3
    one = draw_settings(replace(recording_task("conv-4-6"), steps=8), 0, 0)
    assert is_recorded(one, OPTIONS["recipe"], tmp_path / "out")
    monkeypatch.setattr(LanguageTask, "loss", loss)
    assert record_tasks(TASKS, tmp_path / "out", **OPTIONS)["recorded"] == 6


@pytest.mark.slow
def test_processes_record_what_one_would(tmp_path):
    """Two processes, through the command, on real text; then nothing is left to do."""
    options = {"runs": 2, "steps": 6, "every": 2, "dtype": "float32", "max_rows": 0, "moments": False}
    said = []
    record("smoke", tmp_path / "two", said.append, jobs=2, device="cpu", **options)
    record("smoke", tmp_path / "one", said.append, jobs=1, device="cpu", cache=tmp_path / "two-data", **options)
    for row in load_trajectories(tmp_path / "two"):
        other = Trajectory(tmp_path / "one" / row["folder"])
        assert row["finished"] and other.steps == open_trajectory(row).steps
        for name, states in other.states(0, 4).items():
            torch.testing.assert_close(open_trajectory(row).states(0, 4)[name], states, rtol=1e-3, atol=1e-5)
    record("smoke", tmp_path / "two", said.append, jobs=2, device="cpu", **options)
    assert "4 are recorded already" in said[-2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "`runs` must be at least 1, got 0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"stack": -1}, "`stack` must be at least 1, got -1"),
        ({"jobs": -2}, "`jobs` must be at least 1, got -2"),
        ({"device": "tpu"}, "`device` must be 'cpu', or 'cuda' where PyTorch finds a GPU, got 'tpu'"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        record_tasks(TASKS, tmp_path / "out", **OPTIONS | change)


# -- names ----------------------------------------------------------------------------------------------------------


def test_a_name_says_all_of_a_task():
    llama = recording_task("llama-3x48-h4k2-v512-sotu")
    shape = {
        "arch": "llama",
        "layers": 3,
        "width": 48,
        "heads": 4,
        "key_value_heads": 2,
        "vocabulary": 512,
        "text": "sotu",
    }
    assert {name: getattr(llama, name) for name in shape} == shape and llama.name == "llama-3x48-h4k2-v512-sotu"
    assert recording_task("conv-8-16-16").channels == (8, 16, 16)
    vit = recording_task("vit-2x32-h4-p7")
    assert (vit.layers, vit.width, vit.heads, vit.patch) == (2, 32, 4, 7)


def test_groups_name_tasks_of_many_shapes():
    """Each task of a group exists, and the language tasks are of several widths, depths, heads, grouped heads and
    vocabularies, on all four texts."""
    language = [recording_task(name) for name in GROUPS["language"]]
    assert {task.text for task in language} == {"kjv", "pystdlib", "sotu", "wordnet"}
    for setting in ("arch", "layers", "width", "heads", "vocabulary"):
        assert len({getattr(task, setting) for task in language}) >= 2
    assert {task.heads // task.key_value_heads for task in language if task.arch == "llama"} >= {1, 2, 4}
    assert len(expand(["all"])) == len(set(GROUPS["all"])) == 55
    assert expand(["smoke", "smoke"]) == list(GROUPS["smoke"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert-2x32", "`tasks` must be names such as"),
        ("gpt2-2x32-h4-v512-moby", "the text of 'gpt2-2x32-h4-v512-moby' must be one of kjv"),
        ("gpt2-2x32-h5-v512-kjv", "`width` must be a multiple of `heads`"),
        ("llama-2x32-h4k3-v512-kjv", "`heads` must be a multiple of `key_value_heads`"),
        ("vit-2x32-h4-p5", "must divide 28 pixels"),
        ("conv-0-4", "`channels` must be one positive number a convolution"),
    ],
)
def test_names_of_nothing_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        expand([name])


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="`tasks` must name at least one task"):
        expand([])


# -- the dataset ----------------------------------------------------------------------------------------------------


def test_a_recorded_folder_is_a_dataset(finished):
    """Rows that `datasets` can filter and split, with what was trained; each leads to its trajectory."""
    out, _, _ = finished
    rows = load_trajectories(out)
    assert len(rows) == 6 and set(rows.column_names) == {*FEATURES, "path"}
    images = rows.filter(lambda row: row["task"].startswith("conv"))
    assert len(images) == 3 and set(images["model"]) == {"ConvNet"}
    for row in rows:
        trajectory = open_trajectory(row)
        assert alike(trajectory, Trajectory(out / row["folder"]))
        assert row["learning_rate"] == trajectory.description["settings"]["learning_rate"]
        assert (row["snapshots"], row["last_step"], row["finished"]) == (5, 8, True)
    assert sum(map(len, rows.train_test_split(0.5, seed=0).values())) == 6


def test_the_rows_survive_the_round_trip_through_the_hubs_layout(finished, tmp_path):
    """What ``datasets.load_dataset`` makes of the folder, by the card's own YAML, is what we read from it."""
    out, _, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    there = load_dataset(str(copy), split="train", cache_dir=str(tmp_path / "cache"))
    ours = load_trajectories(copy)
    assert sorted(there["folder"]) == sorted(ours["folder"])
    assert {row["folder"]: row["seed"] for row in there} == {row["folder"]: row["seed"] for row in ours}
    data = DatasetCard.load(copy / "README.md").data
    assert data.configs[0]["data_files"] == "trajectories.jsonl" and "nino" in data.tags


def test_windows_stream_states_without_reading_the_rest(finished, monkeypatch):
    """Every window of every trajectory once, in workers too; only the named parameters are read; a seed changes the
    order and nothing else."""
    out, _, _ = finished
    rows = load_trajectories(out).filter(lambda row: row["task"].startswith("conv"))
    found = list(windows(rows, 3, names=["head.bias", "elsewhere"]))
    assert len(found) == 9 and all(list(window["states"]) == ["head.bias"] for window in found)
    for window in found:
        trajectory = Trajectory(window["path"])
        start = trajectory.steps.index(window["steps"][0])
        assert window["learning_rates"] == trajectory.learning_rates[start : start + 3]
        expected = trajectory.window(start, 3)["head.bias"]
        assert torch.equal(window["states"]["head.bias"], expected) and expected.shape == (3, 10)
    keys = [(window["path"], window["steps"][0]) for window in found]
    shuffled = [(w["path"], w["steps"][0]) for w in windows(rows, 3, seed=1)]
    assert shuffled != keys and sorted(shuffled) == sorted(keys)
    loaded = DataLoader(windows(rows, 3, names=["head.bias"]), batch_size=None)
    assert [(w["path"], w["steps"][0]) for w in loaded] == keys
    assert len(list(windows(rows, 2, stride=2, every=2))) == 3 * 2


def test_windows_out_of_range_are_refused(finished):
    with pytest.raises(ValueError, match="`stride` must be at least 1 snapshot, got 0"):
        windows(load_trajectories(finished[0]), 3, stride=0)


def test_trajectories_of_any_recorder_make_a_dataset(tmp_path):
    """What a trajectory does not say is null."""
    recorded(tmp_path / "a")
    recorded(tmp_path / "b" / "c", dtype="float16")
    text = write_dataset(tmp_path).read_text("utf-8")
    assert "2 training runs, 22 snapshots" in text
    rows = load_trajectories(tmp_path)
    assert rows["folder"][:] == ["a", "b/c"] and rows["batch_size"][:] == [None, None]
    assert rows["dtype"][:] == ["float32", "float16"] and rows["learning_rate"][0] == pytest.approx(1e-2)


def test_a_push_uploads_the_folder_with_a_new_card(tmp_path, monkeypatch):
    """Without what only a resumed run needs."""
    recorded(tmp_path / "run")
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options["repo_type"], options["private"]))
            return f"somewhere/{repo_id}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(card, "HfApi", Api)
    assert push_trajectories(tmp_path, "me/runs", private=True) == "somewhere/me/runs"
    assert calls[0] == ("me/runs", "dataset", True)
    assert calls[1]["folder_path"] == str(tmp_path) and "**/checkpoints.json" in calls[1]["ignore_patterns"]
    assert (tmp_path / "README.md").is_file() and (tmp_path / "trajectories.jsonl").is_file()


def test_a_folder_without_trajectories_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found none in"):
        load_trajectories(tmp_path)


# -- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_graph_of_a_recorded_model_fits_its_states(finished, name):
    """Built from the trajectory alone, subsampled rows included: one edge for each recorded number."""
    out, _, _ = finished
    trajectory = Trajectory(out / name / "run-0000")
    graph = NeuralGraph.from_model(trajectory.build_model(), example_inputs(trajectory))
    assert {name: tuple(graph.shapes[name]) for name in graph.parameter_names} == trajectory.shapes
    assert graph.num_parameters == trajectory.num_parameters


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [("/no/such/folder", ValueError, "no name of a repository"), ("runs/none", OSError, "")],
)
def test_a_folder_that_does_not_exist_is_said_to_be_none(path, kind, message):
    """Whether or not its name could be that of a repository; and the folder is named."""
    with pytest.raises(kind, match=rf"{path}' .there is no such folder.*{message}"):
        load_trajectories(path)
