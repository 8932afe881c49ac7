"""Runs of the benchmark: what a record holds, and that a benchmark goes on where it stopped.  Trains tiny models."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_nino.bench.training import loop, methods, runner
from hf_nino.bench.training.loop import train
from hf_nino.bench.training.plan import Matrix
from hf_nino.bench.training.runner import read, run_benchmark
from hf_nino.bench.training.spec import RunSpec
from hf_nino.bench.training.tasks.language import LanguageTask

CPU = torch.device("cpu")


def spec(method="adamw", **changes):
    values = {"task": "tiny", "schedule": "cosine", "learning_rate": 3e-3, "seed": 0, "steps": 20, "settings": {}}
    return RunSpec.of(method=method, **{**values, **changes})


def losses(record):
    return [evaluation["loss"] for evaluation in record["evaluations"]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def plain(cache):
    return train(spec(), cache, CPU)


def test_a_record_holds_the_whole_run(plain):
    """Evaluations begin at step 0 and end at the last step, times grow, and the loss of a run that learns falls."""
    steps = [evaluation["step"] for evaluation in plain["evaluations"]]
    assert steps[0] == 0 and steps[-1] == 20 and steps == sorted(steps)
    assert losses(plain)[-1] < losses(plain)[0] - 0.1
    seconds = [evaluation["seconds"] for evaluation in plain["evaluations"]]
    assert seconds[0] == 0 and seconds == sorted(seconds) and plain["train_seconds"] == seconds[-1] > 0
    assert not plain["diverged"] and plain["events"] == [] and plain["parameters"] > 1000
    assert json.loads(json.dumps(plain)) == plain


def test_runs_are_repeatable_and_differ_by_seed_only_where_they_should(cache, plain):
    """The same spec gives the same losses bit for bit; another seed gives others from the first evaluation on."""
    assert losses(train(spec(), cache, CPU)) == losses(plain)
    other = losses(train(spec(seed=1), cache, CPU))
    assert other[0] != losses(plain)[0]


def test_methods_start_from_the_same_model_and_see_the_same_data(cache, plain):
    """Before its first nowcast a method that nowcasts equals its base bit for bit; after it, it does not."""
    record = train(spec("linear", settings={"period": 10, "patience": 0}), cache, CPU)
    first = next(event["step"] for event in record["events"] if event["accepted"])
    before = [e["step"] for e in plain["evaluations"]].index(max(s for s in range(0, first, 3) if s < first))
    assert losses(record)[: before + 1] == losses(plain)[: before + 1]
    assert losses(record) != losses(plain)
    assert record["nowcast_seconds"] > 0


def test_evaluations_do_not_change_a_run(cache, plain, monkeypatch):
    """With a quarter of the evaluations, those that are left are the same bit for bit."""
    shortened = loop.shortened
    monkeypatch.setattr(loop, "shortened", lambda task, steps: replace(shortened(task, steps), evaluate_every=20))
    assert losses(train(spec(), cache, CPU)) == [losses(plain)[0], losses(plain)[-1]]


def test_a_run_that_diverges_ends_there_and_says_so(cache):
    """A learning rate beyond reason is recorded as diverged, with finite numbers only, and counts as worst of all."""
    record = train(spec(method="sgd", learning_rate=1e6), cache, CPU)
    assert record["diverged"] and record["evaluations"][-1]["step"] < 20
    assert all(math.isfinite(loss) for loss in losses(record))


@pytest.mark.parametrize(("schedule", "last"), [("constant", 8), ("cosine", 20)])
def test_a_run_ends_at_its_finish_line(cache, monkeypatch, schedule, last):
    """At the look that says so, with an evaluation, and only at a constant learning rate: a schedule is trained to its
    end.  Looks are ``look_every`` steps apart, and change nothing."""
    whole = train(spec(schedule=schedule), cache, CPU)
    shortened, looks = loop.shortened, []
    monkeypatch.setattr(loop, "shortened", lambda task, steps: replace(shortened(task, steps), look_every=4))

    def second(model):
        looks.append(model)
        return len(looks) > 1

    monkeypatch.setattr(LanguageTask, "finish_line", lambda self, data: second)
    found = train(spec(schedule=schedule), cache, CPU)
    assert found["evaluations"][-1]["step"] == last and not found["diverged"]
    assert len(looks) == (2 if schedule == "constant" else 0)
    same = {evaluation["step"]: evaluation["loss"] for evaluation in whole["evaluations"]}
    assert all(same.get(e["step"], e["loss"]) == e["loss"] for e in found["evaluations"])
    assert [e["step"] for e in found["evaluations"][:3]] == [e["step"] for e in whole["evaluations"][:3]]


MATRIX = Matrix(tasks=("tiny",), methods=("momentum",), protocols=("fixed",), seeds=(0, 1), steps=20)


def test_a_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A finished benchmark trains nothing when it is asked for again; one with a torn and a missing result makes those
    two only, and they come out as before."""
    plan = run_benchmark(MATRIX, tmp_path, jobs=1, device="cpu")
    files = {s: s.path(tmp_path) for s in plan.wanted}
    assert len(files) == 4 and all(path.exists() for path in files.values())
    choices = json.loads((tmp_path / "choices.json").read_text())
    assert choices["fixed"]["tiny"]["momentum"]["learning_rate"] == 1e-3
    before = {s: (path.stat().st_mtime_ns, read(s, tmp_path)) for s, path in files.items()}
    run_benchmark(MATRIX, tmp_path, jobs=1, device="cpu")
    assert {s: (path.stat().st_mtime_ns, read(s, tmp_path)) for s, path in files.items()} == before

    torn, gone = sorted(files, key=str)[:2]
    files[torn].write_text(files[torn].read_text()[:100])
    files[gone].unlink()
    run_benchmark(MATRIX, tmp_path, jobs=2, device="cpu")
    for s, path in files.items():
        assert (path.stat().st_mtime_ns == before[s][0]) == (s not in (torn, gone))
        assert read(s, tmp_path) == before[s][1]


def test_a_run_that_fails_is_a_result(tmp_path, monkeypatch):
    """The matrix goes on without it; what is written and said names the error."""
    monkeypatch.setattr(runner, "train", lambda *arguments: (_ for _ in ()).throw(RuntimeError("no such luck")))
    runner._run(spec(), tmp_path, "cpu")
    outcome = read(spec(), tmp_path)
    assert outcome.loss == math.inf and "no such luck" in outcome.error


def test_a_method_that_cannot_be_used_is_refused_before_anything_runs(tmp_path):
    """The error names the method and what is missing, and no run was made."""
    with pytest.raises(ImportError, match=r"`methods`.*nino:\./nowhere\.pt"):
        run_benchmark(replace(MATRIX, methods=("nino:./nowhere.pt",)), tmp_path, jobs=1, device="cpu")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"tasks": ("chess",)}, {}, "chess"),
        ({"methods": ("prayer",)}, {}, "prayer"),
        ({}, {"jobs": 0}, "`jobs`"),
    ],
)
def test_unknown_names_are_refused(tmp_path, changes, arguments, words):
    """One error that names what is wrong."""
    with pytest.raises(ValueError, match=words):
        run_benchmark(replace(MATRIX, **changes), tmp_path, device="cpu", **{"jobs": 1, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    """Instead of a traceback from a worker."""
    with pytest.raises(ValueError, match="`device`"):
        run_benchmark(MATRIX, tmp_path, device="cuda")


@pytest.mark.slow
def test_an_interrupted_benchmark_leaves_whole_results_and_no_processes(tmp_path):
    """Killed by Ctrl-C in mid-run, it leaves only results that can be read, and the same command finishes them."""
    command = [sys.executable, "-W", "ignore", "-m", "hf_nino.cli", "bench", "--out", str(tmp_path), "--tasks", "tiny"]
    command += ["--methods", "momentum", "--protocols", "fixed", "--seeds", "0,1", "--jobs", "1"]
    # Where the tests run in the background of a script, Ctrl-C is ignored, and so it would be by what they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)
    for _ in range(1200):
        if list(tmp_path.glob("runs/tiny/*.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode != 0
    whole = [json.loads(path.read_text()) for path in tmp_path.glob("runs/tiny/*.json")]
    assert 1 <= len(whole) < 4
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=280)
    assert len(list(tmp_path.glob("runs/tiny/*.json"))) == 4
    assert Path(tmp_path / "report.md").exists()


def test_every_method_of_the_registry_runs(cache):
    """A few steps of each, from the shortest name to the longest; the loss stays finite."""
    for name in methods.METHODS:
        if methods.method(name).missing() is None:
            record = train(spec(name, steps=4, learning_rate=1e-4), cache, CPU)
            assert not record["diverged"], name
