"""Merging on two tasks that are really trained: what must hold of the table, whoever wins."""

import json

import pytest
from merge_experiment import experiment


@pytest.mark.slow
def test_merging_two_texts(tmp_path):
    """Each task model is the best at its own text, their average is better than the base at both together, and
    so is the better of two scales of task arithmetic; the nowcasters' rows are there, finite, whatever they are."""
    rows = experiment(tmp_path, {"linear": "linear"}, seeds=(0,), base_steps=150, task_steps=100)
    by_name = {row["method"]: row for row in rows}
    base, average = by_name["base"], by_name["average"]
    for text in ("bible", "python"):
        tuned = by_name[f"fine-tuned on {text}"]
        assert tuned[text] < base[text] and tuned["mean"] > tuned[text]
    assert average["mean"] < base["mean"]
    assert min(row["mean"] for name, row in by_name.items() if "arithmetic" in name) < base["mean"]
    written = json.loads((tmp_path / "merging.json").read_text())
    assert written["rows"] == rows and all(row["mean"] < 20 for row in rows)
    assert (tmp_path / "merging.md").read_text().count("\n") == len(rows) + 2
