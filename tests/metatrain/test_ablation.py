"""A recipe taken apart: what can be taken out, that nothing else changes, and what the table says."""

import json

import pytest
from typer.testing import CliRunner

from hf_nino.cli import app
from hf_nino.commands import remake as commands
from hf_nino.metatrain import Making, ablate, record_tasks
from hf_nino.metatrain.ablation import NUMBERS, TABLE, WHOLE, ablation_table, ablations
from hf_nino.metatrain.recipe import Recipe
from hf_nino.metatrain.remake import making_of

MAKING = Making(
    record={"tasks": ["conv-2-3"], "runs": 4, "steps": 24, "every": 2, "seed": 3},
    config={"hidden_size": 8, "num_layers": 2, "context": 3, "max_horizon": 4, "period": 12, "rate_input": True},
    settings={"steps": 3, "slices": 2, "interval_range": [2, 4], "held_out_share": 0.5},
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded")
    record_tasks(["conv-2-3"], out, runs=4, steps=24, recipe=Recipe(every=2), seed=3, jobs=1, device="cpu")
    return out


def test_only_what_is_there_can_be_taken_out():
    """Of a recipe without a horizon as input and without averaged targets, not these; of one without a graph, nothing
    about graphs; and every change changes one thing."""
    names = [one.name for one in ablations(MAKING)]
    assert names == [WHOLE, "no-rates", "one-interval", "rounding", "no-flips", "no-graph"]
    alone = Making({}, {**MAKING.config, "nowcaster_type": "wnn"}, MAKING.settings)
    assert [one.name for one in ablations(alone)] == names[:-2]
    everything = {one.name for one in ablations(making_of("nino-base"))}
    assert everything == {*names, "no-horizon", "no-averages"}
    for one in ablations(MAKING)[1:]:
        without = one.of(MAKING)
        changed = [key for key in without.config if without.config[key] != MAKING.config.get(key)]
        changed += [key for key in without.settings if without.settings[key] != MAKING.settings.get(key)]
        assert len(changed) == 1 and without.record == MAKING.record


def test_a_recipe_is_taken_apart_and_goes_on_where_it_stopped(recorded, tmp_path, monkeypatch):
    """Each part and seed has a nowcaster of its own with that part changed; a second call trains nothing; calls with
    other seeds fill the same table."""
    said = []
    ablate(MAKING, recorded, tmp_path, only=[WHOLE, "no-rates"], device="cpu", say=said.append)
    configs = {
        name: json.loads((tmp_path / name / "seed-0" / "config.json").read_text()) for name in (WHOLE, "no-rates")
    }
    assert configs[WHOLE]["rate_input"] and not configs["no-rates"].get("rate_input", False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-*/model.safetensors")}
    assert len(before) == 2 and said[0] == "1 of 2: the recipe, seed 0."
    ablate(MAKING, recorded, tmp_path, only=["no-rates"], device="cpu")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-*/model.safetensors")} == before
    monkeypatch.setattr(commands, "making_of", lambda name: MAKING)
    call = ["ablate", "mine", "--trajectories", str(recorded), "--out", str(tmp_path), "--seeds", "1", "--only", WHOLE]
    assert CliRunner().invoke(app, [*call, "--device", "cpu"], catch_exceptions=False).exit_code == 0
    found = json.loads((tmp_path / NUMBERS).read_text())
    assert [each["seed"] for each in found[WHOLE]["seeds"]] == [0, 1] and found["no-rates"]["steps"] == 3
    errors = [each["runs"]["nowcaster"] for row in found.values() for each in row["seeds"]]
    assert all(0 < error < 10 for error in errors) and len(set(errors)) == 3
    assert (tmp_path / TABLE).read_text() == ablation_table(found)


def test_the_table_says_how_much_worse_it_is_without():
    """Seeds are compared with the whole recipe's same seed: a part that is worth 2 points on each is, however much
    seeds differ; of a seed that the whole lacks nothing is said."""

    def row(words, errors, first=0):
        seeds = [{"seed": seed, "runs": {"nowcaster": e, "linear": 0.9}} for seed, e in enumerate(errors, first)]
        return {"words": words, "steps": 3, "seeds": seeds}

    results = {WHOLE: row("all", [0.5, 0.7]), "a": row("b", [0.52, 0.72]), "c": row("d", [0.4], first=2)}
    text = ablation_table(results)
    assert "| all | 2 | 60.0 [50.0..70.0] |  |" in text
    assert "| b | 2 | 62.0 [52.0..72.0] | +2.0 [+2.0..+2.0] |" in text
    assert "| d | 1 | 40.0 |  |" in text
    assert "further runs of the same tasks 90.0 [90.0..90.0]." in text and "other tasks" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"only": ["nothing"]}, "`only` must be some of whole, no-rates, .* got nothing"),
        ({"only": []}, "`only` must be some of .* got none"),
        ({"seeds": ()}, "`seeds` must be at least one, got none"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ablate(MAKING, tmp_path, tmp_path, **arguments)
    with pytest.raises(ValueError, match="`seeds` must be whole numbers with commas between, got 'x'"):
        commands.ablate_bundled("nino-base", tmp_path, None, print, seeds="x")
