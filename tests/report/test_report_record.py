"""What training writes down for the report, and that it does training no harm."""

import json
import math

import pytest
import torch
from report_helpers import PERIOD, model, train, trainer_folder

from hf_nino.report import RunRecord, page_of, read_run
from hf_nino.report.projection import project
from hf_nino.report.record import RECORD_NAME, read_record
from hf_nino.training.forecast import Comparison
from hf_nino.training.stores import PlainStore


def test_a_record_holds_states_nowcasts_and_the_end(tmp_path):
    """One line for the run, a snapshot every interval, one for each nowcast, and the totals."""
    nowcasting = train(model(), 45, RunRecord(tmp_path))
    lines = read_record(tmp_path / RECORD_NAME)
    assert lines[0]["record"] == "run" and lines[-1]["record"] == "end"
    assert [line["step"] for line in lines if line["record"] == "snapshot"] == list(range(0, 45, PERIOD // 5))
    nowcasts = [line for line in lines if line["record"] == "nowcast"]
    assert [line["step"] for line in nowcasts] == [event.step for event in nowcasting.events] == [10, 20, 30, 40]
    assert lines[0]["parameters"] == 4 * 8 + 8 + 8 + 1 and lines[0]["period"] == PERIOD
    assert lines[-1]["nowcasts"] == nowcasting.nowcasts
    assert all(line["elapsed"] >= 0 for line in lines)


def test_a_jump_in_the_record_is_as_long_as_the_nowcast(tmp_path):
    """The projections before and after a nowcast are about its step's norm apart, and those of no nowcast are not."""
    train(model(), 45, RunRecord(tmp_path))
    lines = read_record(tmp_path / RECORD_NAME)
    before = {line["step"]: torch.tensor(line["point"]) for line in lines if line["record"] == "snapshot"}
    ratios = [
        float((torch.tensor(line["point"]) - before[line["step"]]).norm()) / line["step_norm"]
        for line in lines
        if line["record"] == "nowcast"
    ]
    assert len(ratios) == 4 and all(0.5 < ratio < 1.6 for ratio in ratios)


def test_recording_changes_nothing(tmp_path):
    """Parameters and the random state are, bit for bit, those of a run without a record."""
    networks = [model(), model()]
    torch.manual_seed(1)
    train(networks[0], 30)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    train(networks[1], 30, RunRecord(tmp_path))
    assert torch.equal(drawn, torch.rand(1))
    assert all(map(torch.equal, networks[0].parameters(), networks[1].parameters()))


def test_a_resumed_run_drops_what_came_after_the_checkpoint(tmp_path):
    """The record goes on from the step of the checkpoint, and a new run begins a new one."""
    network = model()
    train(network, 30, RunRecord(tmp_path))
    train(network, 20, RunRecord(tmp_path), first=20)
    lines = read_record(tmp_path / RECORD_NAME)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 40
    assert [line["step"] for line in lines if line["record"] == "resume"] == [20]
    assert [line["step"] for line in lines if line["record"] == "nowcast"] == [10, 20, 30, 40]
    train(network, 5, RunRecord(tmp_path))
    assert not [line for line in read_record(tmp_path / RECORD_NAME) if line["record"] in ("resume", "nowcast")]


def test_a_judgement_becomes_the_gain_of_its_nowcast(tmp_path):
    """What training found at the end of a probation is what the page shows; another nowcast's judgement is not."""
    nowcasting = train(model(), 10)
    record = RunRecord(tmp_path / "run")
    record.begin(nowcasting)
    nowcasting.probation.opened = 10
    record.before(nowcasting)
    nowcasting.probation.opened, nowcasting.probation.judged = None, (10, Comparison(1.0, 1.25, 0.1))
    record.after(nowcasting, None)
    nowcasting.probation.opened = 20
    record.before(nowcasting)
    nowcasting.probation.opened = None
    record.after(nowcasting, None)
    judged = [line for line in read_record(record.path) if line["record"] == "judged"]
    assert [(line["nowcast"], line["observed"], line["expected"]) for line in judged] == [(10, 1.0, 1.25)]


def test_training_leaves_its_judgements_in_the_record(tmp_path):
    """Every nowcast whose probation was judged by losses has a line with what was found; the page shows them."""
    folder = trainer_folder(tmp_path / "run", [{"step": 120, "loss": 1.0}], 120)
    train(model(), 120, RunRecord(folder), patience=9)
    facts = read_run(folder)
    assert sum(nowcast.gain is not None and nowcast.gain.recorded for nowcast in facts.nowcasts) > 5


def test_the_reader_joins_record_and_log(tmp_path):
    """Nowcasts, memory, path and gains come from the record, losses from the Trainer's log."""
    folder = trainer_folder(tmp_path / "run", [{"step": 40, "loss": 1.0}], 40)
    train(model(), 40, RunRecord(folder), patience=50)
    with (folder / RECORD_NAME).open("a") as file:
        line = {"record": "judged", "nowcast": 20, "observed": 1.0, "expected": 1.5, "error": 0.1, "step": 40}
        file.write(json.dumps(line) + "\n")
        file.write(json.dumps({**line, "nowcast": 30, "observed": None}) + "\n")
    facts = read_run(folder)
    assert [nowcast.step for nowcast in facts.nowcasts] == [10, 20, 30, 40]
    assert facts.nowcasts[1].gain.excess == -0.5 and facts.nowcasts[1].gain.recorded
    assert facts.nowcasts[2].gain is None
    assert {memory.what: memory.size for memory in facts.memory}["5 snapshots"] == 5 * 4 * 49
    assert sum(place.arrived == "nowcast" for place in facts.path) == 4
    assert ("patience", "50") in facts.settings and facts.overhead > 0
    assert "Path of the parameters, left" not in page_of(facts)


def test_long_runs_keep_few_points(tmp_path):
    """At most some two thousand states of a run of known length; every nowcast is still in it."""
    train(model(), 60, RunRecord(tmp_path / "long"), max_steps=20_000)
    train(model(), 60, RunRecord(tmp_path / "short"), max_steps=400)
    counts = {}
    for name in ("long", "short"):
        lines = read_record(tmp_path / name / RECORD_NAME)
        counts[name] = sum("point" in line for line in lines)
        assert sum(line["record"] == "nowcast" for line in lines) == 6
    assert counts["long"] * 4 < counts["short"]


def test_a_torn_last_line_is_left_out_and_others_are_refused(tmp_path):
    """A killed process leaves half a line; half a line in the middle is no record, nor is another version."""
    train(model(), 12, RunRecord(tmp_path))
    path = tmp_path / RECORD_NAME
    whole = path.read_text()
    path.write_text(whole + '{"record": "now')
    assert len(read_record(path)) == len(whole.splitlines())
    path.write_text('{"record": "now\n' + whole)
    with pytest.raises(ValueError, match=r"line 1 of .* is malformed"):
        read_record(path)
    path.write_text(whole.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="has format_version 9, this version reads 1"):
        read_record(path)
    folder = trainer_folder(tmp_path / "run", [{"step": 1, "loss": 1.0}], 1)
    path.rename(folder / RECORD_NAME)
    assert "format_version 9" in page_of(read_run(folder))


def test_a_record_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    """A file where the folder should be: one warning, and the run goes on."""
    (tmp_path / "file").write_text("")
    nowcasting = train(model(), 25, RunRecord(tmp_path / "file" / "folder"))
    assert nowcasting.nowcasts == 2
    train(model(), 12, RunRecord(tmp_path / "quiet", writes=False))
    assert not (tmp_path / "quiet").exists()


def test_a_projection_keeps_distances():
    """Of 200 pairs of states, squared distances come out right on average, each to about a factor of two."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(200):
        state = {"a": torch.randn(37, 11, generator=generator), "b": torch.randn(5, generator=generator)}
        length = math.fsum(float(tensor.square().sum()) for tensor in state.values())
        ratios.append(math.fsum(x * x for x in project(state)) / length)
    assert abs(sum(ratios) / len(ratios) - 1) < 0.05
    assert all(0.4 < ratio < 2 for ratio in ratios)


def test_a_projection_is_linear_and_the_same_in_pieces(monkeypatch):
    """Twice the state is twice the projection; large tensors are taken in pieces; another name projects otherwise."""
    state = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    point = torch.tensor(project(state))
    assert torch.allclose(torch.tensor(project({"a": 2 * state["a"]})), 2 * point, rtol=1e-5)
    monkeypatch.setattr("hf_nino.report.projection._CHUNK", 128)
    assert torch.allclose(torch.tensor(project(state)), point, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.tensor(project({"b": state["a"]})), point, rtol=0.1)
    assert len(project({"a": state["a"].bfloat16()}, dimensions=7)) == 7


def test_training_and_its_record_read_the_parameters_once(tmp_path, monkeypatch):
    """Reading them costs some backends an exchange between ranks: the record uses what a snapshot or a nowcast has
    read, and reads on its own at the start alone, and at steps at which training does not (warm-up)."""
    reads = []
    live = PlainStore.live
    monkeypatch.setattr(PlainStore, "live", lambda store: reads.append(0) or live(store))
    monkeypatch.setattr(PlainStore, "device", torch.device("cpu"))
    counts = []
    for record in (None, RunRecord(tmp_path / "run"), RunRecord(tmp_path / "late")):
        reads.clear()
        train(model(), 30, record, **({"start_step": 10} if record and record.path.parent.name == "late" else {}))
        counts.append(len(reads))
    plain, recorded, late = counts
    assert plain == 15 and recorded == plain + 1
    assert late == 10 + 1 + 5
    lines = read_record(tmp_path / "run" / RECORD_NAME)
    assert len([line for line in lines if "point" in line]) == 1 + 15 + 3
