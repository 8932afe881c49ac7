"""The report of a graph: complete, folded, and as data."""

from __future__ import annotations

import json

import pytest
from handmade import Sketch, llama, mlp
from sketches import GRAPHS

from hf_nino.graph.summary import private_parameters, summary, text


@pytest.mark.parametrize("name", GRAPHS)
def test_the_summary_counts_everything_once(name):
    """Folded groups, folded symmetries, blocks by type and shares add up to the whole graph, and survive JSON."""
    graph = GRAPHS[name]()
    found = json.loads(json.dumps(summary(graph)))
    assert sum(group["count"] for group in found["groups"]) == len(graph.groups)
    assert sum(group["count"] * group["size"] for group in found["groups"]) == found["nodes"] == graph.num_nodes
    assert sum(symmetry["count"] for symmetry in found["symmetries"]) == len(graph.symmetries)
    assert sum(counts.get("blocks", 0) for counts in found["blocks"].values()) == len(graph.trainable_blocks)
    assert sum(counts.get("parameters", 0) for counts in found["blocks"].values()) == graph.num_parameters
    assert sum(found["shares"][name] for name in ("placed", "private", "unreached", "unmoved")) == pytest.approx(1)


def test_thirty_layers_take_no_more_lines_than_three():
    """The text is folded: groups, symmetries and notes."""
    few, many = (text(llama(layers=layers)).splitlines() for layers in (3, 30))
    assert len(many) == len(few) < 60
    assert all(len(line) <= 120 for line in many)
    assert "  model.layers.0 \u2026 29   \u00d7 30" in many


@pytest.mark.parametrize("name", GRAPHS)
def test_the_text_names_every_group_that_is_drawn(name):
    """With its size, and with the reason if it is pinned."""
    graph = GRAPHS[name]()
    lines = text(graph).splitlines()
    for group in summary(graph)["groups"]:
        if group["kind"] != "parameter":
            last = group["name"].split("[")[0].split(".")[-1]
            assert any(last in line or "heads" in line for line in lines)
    assert ("one for each token" in text(graph)) == any(group.pinned == "token" for group in graph.groups)
    assert f"{graph.num_parameters:,} parameters" in lines[0]


def test_private_parameters_are_named_with_the_reason():
    """Those of thirty layers on one line; a graph without any has no such section."""
    sketch = Sketch()
    for i in range(30):
        for side in ("in", "out"):
            sketch.group(f"layers.{i}.odd[private {side}]", 3, "private", "refuted by the permutation test")
        sketch.linear(f"layers.{i}.odd", (3, 3), f"layers.{i}.odd[private in]", f"layers.{i}.odd[private out]")
    graph = sketch.graph()
    assert private_parameters(graph) == {f"layers.{i}.odd": "refuted by the permutation test" for i in range(30)}
    assert "  30 \u00d7 layers.#.odd: refuted by the permutation test" in text(graph).splitlines()
    assert summary(graph)["shares"]["private"] == 1
    assert "Private" not in text(mlp()) and not private_parameters(mlp())
