"""Nowcasters that ship with the package: their recipe makes them again, and their cards say what their numbers say."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_nino.nowcaster.hub as hub
from hf_nino.bench.training.statistics import Spread
from hf_nino.bench.training.summary import Comparison, MethodInfo, Summary, TaskInfo
from hf_nino.cli import app
from hf_nino.metatrain import remake as remake_module
from hf_nino.metatrain.bundle import CARD, EVALUATION, bundle, card_text, restricted, write_card
from hf_nino.metatrain.remake import NOWCASTER, RECIPE, TRAJECTORIES, Making, making_of, remake_nowcaster
from hf_nino.nowcaster import load_nowcaster
from hf_nino.nowcaster.hub import bundled_nowcasters

CARDS = Path(__file__).parents[2] / "model_cards"
MAKING = Making(
    record={"tasks": ["conv-2-3"], "runs": 2, "steps": 24, "every": 2, "seed": 3},
    config={"hidden_size": 8, "num_layers": 2, "context": 3, "max_horizon": 4, "period": 12, "rate_input": True},
    settings={"steps": 4, "slices": 2, "interval_range": [2, 4], "held_out_share": 0.5},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A nowcaster made by its recipe."""
    out = tmp_path_factory.mktemp("made")
    remake_nowcaster(MAKING, out, jobs=1, device="cpu")
    return out


@pytest.fixture
def places(made, tmp_path, monkeypatch):
    """It is bundled as nino-test: folders of bundled nowcasters and of cards."""
    bundled, cards = tmp_path / "bundled", tmp_path / "cards"
    monkeypatch.setattr(hub, "BUNDLED", bundled)
    monkeypatch.setattr(remake_module, "BUNDLED", bundled)
    bundle(made / NOWCASTER, "nino-test", MAKING, record_hours=0.5, commit="abc", bundled=bundled)
    write_card("nino-test", benchmark(), cards, bundled)
    return bundled, cards


def benchmark(loss=3.25):
    methods = {
        "adamw": MethodInfo("AdamW", "adamw"),
        "spectral": MethodInfo("AdamW + spectral nowcasts", "spectral", "adamw"),
        "nino:nino-test": MethodInfo("AdamW + nowcasts of nino-test", "nino-test", "adamw"),
        "nino:other": MethodInfo("AdamW + nowcasts of other", "other", "adamw"),
    }
    found = [
        Comparison("fixed", task, method, {}, 1e-3, (0, 1, 2), (), measures(value))
        for task in ("a", "b")
        for method, value in zip(methods, (3.5, 3.0, loss, 3.4), strict=True)
        if task == "a" or not method.startswith("nino")
    ]
    return Summary({task: TaskInfo("language", 1000, 100) for task in "ab"}, methods, tuple(found))


def measures(loss):
    spreads = {"final_loss": loss, "steps_saved": 3.5 - loss, "steps_saved_for_good": 3.5 - loss}
    return {name: Spread.of([value] * 3) for name, value in spreads.items()}


def weights(folder):
    return load_nowcaster(folder).state_dict()


def touched(out):
    return (out / NOWCASTER / "model.safetensors").stat().st_mtime_ns, sorted((out / TRAJECTORIES).rglob("*"))


def apart(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_the_recipe_makes_the_same_again(made, tmp_path):
    """Bit for bit from the same trajectories, of which none is recorded again; with trajectories of its own next to
    the same, since models are then trained one by one or together, whichever is faster; with another seed, others."""
    before, said = touched(made), []
    told = {"trajectories": made / TRAJECTORIES, "jobs": 1, "device": "cpu"}
    remake_nowcaster(MAKING, tmp_path / "again", **told, say=said.append)
    assert "2 are recorded already" in said[0] and touched(made) == before
    first = weights(made / NOWCASTER)
    assert apart(first, weights(tmp_path / "again" / NOWCASTER)) == 0
    remake_nowcaster(MAKING, tmp_path / "anew", jobs=1, device="cpu")
    other = Making(MAKING.record, MAKING.config, {**MAKING.settings, "seed": 1})
    remake_nowcaster(other, tmp_path / "other", **told)
    anew, others = (apart(first, weights(tmp_path / name / NOWCASTER)) for name in ("anew", "other"))
    assert anew < 0.02 < 0.1 < others


def test_a_bundled_nowcaster_is_the_one_that_was_made(made, places):
    """By its name; and its recipe comes with it."""
    assert bundled_nowcasters() == ["nino-test"]
    first, second = weights(made / NOWCASTER), weights("nino-test")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert making_of("nino-test") == MAKING
    with pytest.raises(ValueError, match=r"`name` must be one of the bundled nowcasters \['nino-test'\], got 'nino'"):
        making_of("nino")


@pytest.mark.parametrize("part", ["config", "settings"])
def test_a_recipe_that_is_not_its_own_is_refused(made, tmp_path, part):
    other = Making(**{**vars(MAKING), part: {**getattr(MAKING, part), "seed" if part == "settings" else "context": 4}})
    with pytest.raises(ValueError, match=f"`making` must say how .* `{part}"):
        bundle(made / NOWCASTER, "nino-test", other, record_hours=0.5, commit="abc", bundled=tmp_path)


def test_the_card_says_what_the_numbers_say(places):
    """How it was made, by which command, at which commit; its errors, its benchmark and that of its rivals, without
    other tasks and other nowcasters of its kind.  Other numbers give another card."""
    bundled, cards = places
    text = (cards / "nino-test" / CARD).read_text()
    assert text == card_text("nino-test", cards, bundled)
    for part in ("hf-nino remake nino-test", "`abc`", "`conv-2-3`", "4 steps", "0.50 h to record", "licence | MIT"):
        assert part in text, part
    for part in (
        "3.250 [3.250..3.250]",
        "spectral nowcasts | 50%",
        "nino-test | 25%",
        "further runs of the same tasks",
    ):
        assert part in text, part
    assert "of other" not in text and "| b |" not in text
    write_card("nino-test", benchmark(3.125), cards, bundled)
    assert "3.125 [3.125..3.125]" in (cards / "nino-test" / CARD).read_text()
    found = json.loads((cards / "nino-test" / EVALUATION).read_text())
    assert list(found["tasks"]) == ["a"] and "nino:other" not in found["methods"]
    write_card("nino-test", None, cards, bundled)
    assert "3.125 [3.125..3.125]" in (cards / "nino-test" / CARD).read_text()


def test_a_benchmark_without_it_is_refused():
    with pytest.raises(ValueError, match="`benchmark` must have runs of nino:none, got those of"):
        restricted(benchmark(), "nino:none")


def test_the_command_makes_it_again(places, made, tmp_path):
    """From the trajectories that are there, in its own folder by default; an unknown name is one line."""
    runner = CliRunner()
    call = ["remake", "nino-test", "--trajectories", str(made / TRAJECTORIES), "--device", "cpu", "--jobs", "1"]
    result = runner.invoke(app, [*call, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "recorded already" in result.output, result.output
    first, second = weights("nino-test"), weights(tmp_path / "out" / NOWCASTER)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(runner.invoke(app, ["remake", "nobody"]).exception, ValueError)


@pytest.mark.parametrize("name", bundled_nowcasters())
def test_bundled_ones_are_what_their_cards_say(name):
    """Small, loadable, with the sizes that their recipe gives them, and a card made of the numbers beside it."""
    folder = hub.BUNDLED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3 * 2**20
    nowcaster, making = load_nowcaster(name), making_of(name)
    assert all(nowcaster.config.to_dict()[key] == value for key, value in making.config.items())
    assert (folder / RECIPE).read_text() == making.to_json()
    assert (CARDS / name / CARD).read_text() == card_text(name, CARDS)


def test_every_bundled_nowcaster_has_a_card_and_every_card_a_nowcaster():
    assert sorted(path.parent.name for path in CARDS.glob(f"*/{CARD}")) == bundled_nowcasters()
