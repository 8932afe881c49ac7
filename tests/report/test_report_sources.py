"""Reading runs: of a Trainer, of the benchmark, of the demo; and refusing what is none."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from report_helpers import charts, parse, trainer_folder, words
from torch import nn
from typer.testing import CliRunner

from hf_nino import NiNoTrainer, NiNoTrainingArguments, cli
from hf_nino.report import page_of, read_run
from hf_nino.report.facts import count_fates, nowcasts_from_events

RUNS = Path(__file__).parents[2] / "docs" / "benchmark" / "runs" / "gpt2-64-kjv"
SPECTRAL = RUNS / "spectral,cosine,lr=0.001,steps=2000,seed=0.json"
ONE_OF_EACH = {path.name.split(",")[0]: path for path in sorted(RUNS.glob("*.json"))}
EVENT = {"horizon": 4, "seconds": 0.1, "accepted": True, "taken_back_to": None}


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.line(x) - labels).square().mean()}


def test_a_run_of_our_trainer_is_read(tmp_path):
    """Steps, losses, learning rate, and each nowcast with what became of it, from the newest checkpoint."""
    x = torch.randn(64, 2)
    data = Dataset.from_dict({"x": x.tolist(), "labels": x.sum(1, keepdim=True).tolist()}).with_format("torch")
    args = NiNoTrainingArguments(
        tmp_path / "out",
        max_steps=40,
        nowcast_period=10,
        logging_steps=2,
        save_steps=20,
        eval_strategy="steps",
        eval_steps=10,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = NiNoTrainer(model=Regression(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    facts = read_run(tmp_path / "out")
    assert (facts.title, facts.steps, facts.max_steps) == ("out", 40, 40)
    assert len(facts.train_loss) == 20 and len(facts.eval_loss) == 4 and len(facts.learning_rate) == 20
    events = trainer.nowcasting.events
    assert [(n.step, n.accepted, n.horizon_steps) for n in facts.nowcasts] == [
        (e.step, e.accepted, e.horizon_steps) for e in events
    ]
    assert facts.nowcast_seconds == pytest.approx(trainer.nowcasting.seconds, rel=0.5)
    assert facts.path and facts.memory  # the callback has left a record
    half = read_run(tmp_path / "out" / "checkpoint-20")
    assert half.steps == 20 and [nowcast.step for nowcast in half.nowcasts] == [10, 20]


def test_a_plain_trainers_run_is_read(tmp_path):
    """A run that knows nothing of nowcasts has curves and no nowcasts; losses that are not finite are left out."""
    logs = [{"step": step, "loss": 2 / step, "learning_rate": 1e-3} for step in range(1, 9)]
    logs.append({"step": 9, "loss": float("nan")})
    facts = read_run(trainer_folder(tmp_path / "run", logs, 9))
    assert len(facts.train_loss) == 8 and not facts.nowcasts
    tree = parse(page_of(facts))
    assert len(charts(tree)) == 2
    assert words(tree).count("training left no nino_events.jsonl in the run's folder") == 2


def test_a_logged_run_tells_what_was_taken_back(tmp_path):
    """From the numbers in a log alone: accepted, taken back, not tried, and the seconds spent."""
    common = {"nino_seconds": 0.1, "nino_horizon": 4}
    logs = [
        {"step": 10, "loss": 2.0, "nino_step": 10, "nino_accepted": 1, **common},
        {"step": 20, "loss": 1.9, "nino_step": 20, "nino_accepted": 1, **common},
        {"step": 25, "nino_step": 25, "nino_accepted": 0, "nino_taken_back_to": 20, **common},
        {"step": 30, "loss": 1.8, "nino_step": 30, "nino_accepted": 0, **common},
        {"step": 40, "loss": 1.8, "nino_step": 40, "nino_accepted": 0, "nino_horizon": 0, "nino_seconds": 0.0},
        {"step": 40, "train_runtime": 8.0, "nino_total_seconds": 0.4},
    ]
    facts = read_run(trainer_folder(tmp_path / "run", logs, 40))
    assert [nowcast.fate for nowcast in facts.nowcasts] == ["accepted", "taken back", "refused", "not tried"]
    assert facts.overhead == pytest.approx(0.05)


def test_nowcasts_of_one_probation_share_its_fate():
    """Taking back the nowcast of step 20 takes those after it along; the one before, and one after, stay."""
    steps = [{**EVENT, "step": step} for step in (10, 20, 30)]
    back = {**EVENT, "step": 35, "accepted": False, "taken_back_to": 20, "reason": "worse"}
    nowcasts = nowcasts_from_events([*steps, back, {**EVENT, "step": 40}])
    assert [(n.step, n.taken_back_at) for n in nowcasts] == [(10, None), (20, 35), (30, 35), (40, None)]
    assert nowcasts[1].reason == "worse"


@pytest.mark.parametrize("path", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_runs_of_every_method_of_the_benchmark_have_a_page(path):
    """A record of each method in docs/benchmark makes a page with a loss chart."""
    tree = parse(page_of(read_run(path)))
    assert any(chart.find("title").text.startswith("Loss") for chart in charts(tree))


def test_a_benchmark_run_is_set_against_the_plain_one():
    """Same learning rate, same seed; and the schedule that was followed is drawn, not guessed."""
    facts, plain = read_run(SPECTRAL), read_run(RUNS / "adamw,cosine,lr=0.001,steps=2000,seed=0.json")
    assert facts.plain_loss == plain.eval_loss and not plain.plain_loss
    assert facts.eval_loss[-1][1] < facts.plain_loss[-1][1]
    assert max(rate for _, rate in facts.learning_rate) == pytest.approx(1e-3)
    assert facts.learning_rate[-1][1] < 1e-5
    record = json.loads(SPECTRAL.read_text())
    assert count_fates(facts.nowcasts)["accepted"] == sum(event["accepted"] for event in record["events"])


def test_a_demo_is_set_against_its_plain_run(tmp_path):
    """The folder of a demo, or of its run with nowcasts, gives the same facts; the plain run has no nowcasts."""
    evaluations = [{"step": step, "loss": 3 - step / 100, "seconds": step} for step in (0, 50, 100)]
    run = {"evaluations": evaluations, "train_losses": [], "events": [{**EVENT, "step": 50}]}
    run |= {"train_seconds": 100.0, "nowcast_seconds": 0.1}
    for name, events in (("plain", []), ("nowcast", run["events"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(run | {"events": events}))
    (tmp_path / "settings.json").write_text(json.dumps({"arch": "gpt2", "steps": 100}))
    facts = read_run(tmp_path)
    assert facts == read_run(tmp_path / "nowcast") and facts == read_run(tmp_path / "settings.json")
    assert len(facts.plain_loss) == 3 and len(facts.nowcasts) == 1
    assert not read_run(tmp_path / "plain").nowcasts
    assert "the demo does not keep it" in words(parse(page_of(facts)))


def test_what_is_no_run_is_refused(tmp_path):
    """One sentence that says what a run is, and what was found instead."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be a Trainer's folder"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="it looks like a benchmark: name one of its runs"):
        read_run(RUNS)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a Trainer's folder"):
        read_run(tmp_path / "list.json")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(ValueError, match=r"trainer_state\.json is malformed"):
        read_run(tmp_path)
    (tmp_path / "bench.json").write_text('{"spec": {"task": "x"}}')
    with pytest.raises(ValueError, match="no whole record of a run"):
        read_run(tmp_path / "bench.json")


def test_the_command_writes_a_page_and_prints_json(tmp_path):
    """The page lies where it is asked for, beside a file, or in the run's folder."""
    done = CliRunner().invoke(cli.app, ["report", str(SPECTRAL), "--out", str(tmp_path / "a.html"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["page"] == str(tmp_path / "a.html")
    parse((tmp_path / "a.html").read_text())
    folder = trainer_folder(tmp_path / "run", [{"step": 1, "loss": 1.0}], 1)
    done = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert done.output.strip() == f"Report: {folder / 'nino_report.html'}"
    beside = tmp_path / "copy.json"
    beside.write_text(SPECTRAL.read_text())
    assert CliRunner().invoke(cli.app, ["report", str(beside)]).exit_code == 0
    assert (tmp_path / "copy.html").is_file()
    refused = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(tmp_path)])
    assert isinstance(refused.exception, ValueError) and "`out` must be a file" in str(refused.exception)
