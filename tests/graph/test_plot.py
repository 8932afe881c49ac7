"""Pictures: what is drawn, where, and that it can be read."""

from __future__ import annotations

import builtins
import itertools
import sys
from dataclasses import replace

import pytest
from handmade import Sketch, convnet, gpt2, llama, mlp
from matplotlib.patches import FancyArrowPatch

from hf_nino.graph import EdgeType, NeuralGraph, NeuronGroup
from hf_nino.graph.layout import fold, layout, short_name
from hf_nino.graph.plot import TYPE_COLOURS, plot

GRAPHS = {"mlp": mlp, "convnet": convnet, "gpt2": lambda: gpt2(layers=30), "llama": lambda: llama(layers=30)}


def names(graph: NeuralGraph, numbers) -> list[str]:
    return [graph.groups[number].name for number in numbers]


def places(graph: NeuralGraph) -> dict[str, tuple[int, int]]:
    return {graph.groups[number].name: place for number, place in layout(graph).place.items()}


def test_layers_that_are_alike_are_folded_into_the_first():
    """Thirty layers are drawn as one that stands for thirty, and everything outside of them stays."""
    graph = gpt2(layers=30)
    plan = layout(graph)
    assert [(layer.name, layer.count) for layer in plan.layers] == [("transformer.h.0", 30)]
    shown = names(graph, plan.shown)
    assert shown == [group.name for group in graph.groups if ".h." not in group.name or ".h.0." in group.name]
    assert len(plan.shown) < 25 < len(graph.groups)


def test_layers_that_differ_are_not_folded_together():
    """A layer of another width or with other groups stands for itself; alike ones fold around it."""
    sketch = Sketch()
    for i, width in enumerate((4, 4, 6, 4)):
        sketch.group(f"layers.{i}.a", width)
        sketch.group(f"layers.{i}.b", 3)
    stands_for, layers = fold(tuple(sketch.groups.values()))
    assert stands_for == [0, 1, 0, 1, 4, 5, 0, 1]
    assert [(layer.name, layer.groups, layer.count) for layer in layers] == [("layers.0", (0, 1), 3)]


def test_experts_fold_inside_of_folded_layers():
    """The outer number is folded first, the inner one in what is left; a few single groups are not folded."""
    sketch = Sketch()
    for i in range(3):
        sketch.group(f"layers.{i}.attention", 4)
        for e in range(6):
            sketch.group(f"layers.{i}.experts.{e}.units", 5)
    stands_for, layers = fold(tuple(sketch.groups.values()))
    assert set(stands_for) == {0, 1}
    assert [(layer.name, layer.groups, layer.count) for layer in layers] == [
        ("layers.0", (0, 1), 3),
        ("layers.0.experts.0", (1,), 6),
    ]
    assert fold(mlp().groups)[1] == ()


def test_names_are_short_but_tell():
    """A label leaves out the layer, which the frame names, the kind, which the colour tells, and repetitions."""
    group = NeuronGroup("h.0.mlp.gate_proj + h.0.mlp.up_proj", 4)
    assert short_name(group, "h.0") == "mlp.gate_proj + up_proj"
    assert short_name(group) == "h.0.mlp.gate_proj + up_proj"
    assert short_name(NeuronGroup("wte.weight[row]", 4, "row")) == "wte.weight"
    assert short_name(NeuronGroup("bias[parameter] (2)", 1, "parameter")) == "bias (2)"
    assert short_name(NeuronGroup("h.0.attn[heads]", 4, "head"), "h.0") == "attn[heads]"


def test_groups_that_name_their_layer_twice_fold_too():
    """``h.0.gate + h.0.up`` and ``h.1.gate + h.1.up`` are alike."""
    groups = [NeuronGroup(f"h.{i}.{name}", 4) for i in range(3) for name in (f"gate + h.{i}.up", "down")]
    stands_for, layers = fold(tuple(groups))
    assert stands_for == [0, 1] * 3
    assert [layer.count for layer in layers] == [3]


def test_the_matrix_knows_the_way_from_one_layer_to_the_next_but_the_arrows_do_not():
    """In the folded picture an arrow from the end of a layer to its own start would read as a loop."""
    graph = gpt2(layers=5)
    plan = layout(graph)
    number = {group.name: i for i, group in enumerate(graph.groups)}
    end, start = number["transformer.h.0.mlp.c_proj"], number["transformer.h.0.attn.query_key"]
    assert (end, start, EdgeType.QUERY) in plan.wiring
    assert (end, start, EdgeType.QUERY) not in plan.arrows
    assert (number["transformer.drop"], start, EdgeType.QUERY) in plan.arrows
    assert (number["transformer.ln_f.weight"], end, EdgeType.NORM) in plan.arrows


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_computation_goes_from_left_to_right_and_the_stream_stays_on_one_line(name):
    """Arrows lead to a later column, key edges to an earlier one, heads stay in theirs; streams share a row."""
    graph = GRAPHS[name]()
    plan = layout(graph)
    for source, target, kind in plan.arrows:
        if source not in plan.place:
            continue
        step = plan.place[target][0] - plan.place[source][0]
        assert (step == 0) if kind == EdgeType.HEAD else (step < 0) if kind == EdgeType.KEY else (step > 0)
    place = places(graph)
    stream = [
        place[group] for group in place if group.endswith(("drop", "embedding", "c_proj", "o_proj", "down_proj"))
    ]
    assert {row for _, row in stream} == {0}
    assert len(stream) == len(set(stream)) == 3
    assert all(row > 0 for group, (_, row) in place.items() if "query" in group or "mlp.c_fc" in group)


def test_two_streams_have_lines_of_their_own():
    """An encoder and a decoder with residual streams of their own are stacked, not mixed."""
    sketch = Sketch()
    for side in ("encoder", "decoder"):
        for part in ("in", "mlp", "out"):
            sketch.group(f"{side}.{part}", 4)
        sketch.linear(f"{side}.up", (4, 4), f"{side}.in", f"{side}.mlp")
        sketch.linear(f"{side}.down", (4, 4), f"{side}.mlp", f"{side}.out")
        sketch.matching(f"{side}.in", f"{side}.out")
    place = places(sketch.graph())
    assert place["encoder.in"][1] == place["encoder.out"][1] < place["encoder.mlp"][1]
    assert place["encoder.mlp"][1] < place["decoder.in"][1] == place["decoder.out"][1] < place["decoder.mlp"][1]


def test_a_stream_that_forks_gets_a_second_line():
    """An encoder and a decoder that share an embedding; what reads both belongs to the decoder."""
    sketch = Sketch()
    for group in ("shared", "encoder", "decoder", "cross"):
        sketch.group(group, 4)
    sketch.matching("shared", "encoder")
    sketch.matching("shared", "decoder")
    for source, target in (("shared", "encoder"), ("encoder", "cross"), ("cross", "decoder")):
        sketch.linear(f"{source}-{target}", (4, 4), source, target)
    place = places(sketch.graph())
    assert place["shared"][1] == place["encoder"][1] < place["decoder"][1] <= place["cross"][1]


def test_private_neurons_stand_in_their_layer():
    """Blocks that nothing joins to the rest begin in the column where the layer that they belong to begins."""
    sketch = Sketch()
    sketch.group("in", 3)
    for i in range(2):
        for name, kind in (("a", "neuron"), ("b", "neuron"), ("p", "private"), ("q", "private")):
            sketch.group(f"layers.{i}.{name}", 4, kind)
        sketch.linear(f"{i}.in", (4, 3 + i), ("in", "layers.0.b")[i], f"layers.{i}.a")
        sketch.linear(f"{i}.up", (4, 4), f"layers.{i}.a", f"layers.{i}.b")
        sketch.linear(f"{i}.private", (4, 4), f"layers.{i}.p", f"layers.{i}.q")
    place = places(sketch.graph())
    assert [place[name][0] for name in ("in", "layers.0.a", "layers.0.b")] == [0, 1, 2]
    assert [place[name][0] for name in ("layers.0.p", "layers.0.q")] == [1, 2]


def test_nodes_of_frozen_parameters_are_not_drawn():
    """A frozen bias is no edge, so its node would stand alone in the matrix."""
    full = mlp()
    frozen = replace(
        full, blocks=tuple(replace(block, trainable="bias" not in block.parameter) for block in full.blocks)
    )
    assert names(full, layout(full).shown) == [group.name for group in full.groups]
    assert names(frozen, layout(frozen).shown) == [f"layer {i}" for i in range(4)]


def test_loops_and_groups_without_arrows_have_a_place():
    """Recurrent and mutual connections, private groups and bare heads neither hang nor share a place."""
    sketch = Sketch()
    for group in ("a", "b", "c", "alone"):
        sketch.group(group, 3, "private" if group == "alone" else "neuron")
    sketch.group("heads", 2, "head")
    for source, target in (("a", "b"), ("b", "c"), ("c", "a"), ("b", "b")):
        sketch.linear(f"{source}-{target}", (3, 3), source, target)
    graph = sketch.graph()
    place = places(graph)
    assert len(set(place.values())) == len(place) == 5
    assert [place[group][0] for group in "abc"] == [0, 1, 2]
    plot(graph)


@pytest.mark.parametrize("name", GRAPHS)
def test_no_two_boxes_share_a_place(name):
    """Every drawn group of neurons has a column and row of its own; groups of one bias have none."""
    graph = GRAPHS[name]()
    plan = layout(graph)
    assert len(set(plan.place.values())) == len(plan.place)
    assert {number for number in plan.shown if graph.groups[number].kind != "parameter"} == set(plan.place)


@pytest.mark.parametrize("name", GRAPHS)
def test_labels_do_not_overlap_and_stay_on_the_page(name):
    """All texts are apart from each other, inside the figure, and no smaller than 6.5 points."""
    figure = plot(GRAPHS[name]())
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    wiring, matrix = figure.axes
    texts = [*wiring.texts, *wiring.get_legend().get_texts(), *matrix.get_xticklabels(), *matrix.get_yticklabels()]
    extents = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(extents) > 10
    for a, b in itertools.combinations(extents, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) < 1.0
    page = figure.bbox
    assert all(page.x0 <= e.x0 and e.x1 <= page.x1 and page.y0 <= e.y0 and e.y1 <= page.y1 for e in extents)
    assert min(text.get_fontsize() for text in texts) >= 6.5


@pytest.mark.parametrize("name", GRAPHS)
def test_every_box_and_arrow_of_the_layout_is_drawn_and_explained(name):
    """Each group's label and size is there, each arrow is in the colour of its type, the legend has each type."""
    graph = GRAPHS[name]()
    plan = layout(graph)
    wiring = plot(graph).axes[0]
    labels = [text.get_text().replace("\n", "") for text in wiring.texts]
    for number in plan.place:
        group = graph.groups[number]
        assert any(f"{group.size:,} " in label and group.name.split(".")[-1] in label for label in labels)
    arrows = [patch for patch in wiring.patches if isinstance(patch, FancyArrowPatch)]
    expected = [TYPE_COLOURS[kind] for source, _, kind in plan.arrows if source in plan.place]
    drawn = ["#" + "".join(f"{round(255 * c):02x}" for c in patch.get_edgecolor()[:3]) for patch in arrows]
    assert sorted(drawn) == sorted(expected)
    legend = " ".join(text.get_text() for text in wiring.get_legend().get_texts())
    for kind in {kind for _, _, kind in plan.arrows} - {EdgeType.OTHER}:
        assert kind.name.lower().replace("_", " ") in legend
    assert all(f"\u00d7 {layer.count}" in " ".join(labels) for layer in plan.layers)


def test_the_matrix_has_a_field_for_every_pair_of_groups_that_a_block_joins():
    """One coloured field per edge type and pair, in the row of the source and the column of the target."""
    graph = convnet()
    matrix = plot(graph).axes[1]
    fields = {(int(patch.get_y()), int(patch.get_x())) for patch in matrix.patches}
    assert fields == {(block.source.group, block.target.group) for block in graph.trainable_blocks}
    assert [label.get_text() for label in matrix.get_yticklabels()] == [group.name for group in graph.groups]


def test_the_picture_is_saved_in_the_format_of_its_suffix(tmp_path):
    """``path`` is written; without it nothing is."""
    figure = mlp().plot(tmp_path / "mlp.svg")
    assert (tmp_path / "mlp.svg").read_text().lstrip().startswith("<?xml")
    assert [axes.get_label() for axes in figure.axes] == ["wiring", "matrix"]
    mlp().plot()
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    """The package works without matplotlib; only ``plot`` asks for it."""
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for module in [module for module in sys.modules if module.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"`plot` needs matplotlib: install it, or the `plot` extra of hf_nino"):
        plot(mlp())
