"""Pictures: what is drawn, where, and that it can be read."""

from __future__ import annotations

import builtins
import itertools
import sys
from dataclasses import replace

import pytest
from handmade import Sketch, convnet, gpt2, llama, mlp
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from sketches import GRAPHS, encoder_decoder, hybrid, three_towers

from hf_nino.graph import EdgeType, NeuralGraph, NeuronGroup
from hf_nino.graph.diagram import plan_diagram
from hf_nino.graph.layout import layout
from hf_nino.graph.matrix import draw_matrix
from hf_nino.graph.plot import plot
from hf_nino.graph.style import TYPE_COLOURS, text_width
from hf_nino.graph.tiny import tiny_model
from hf_nino.graph.words import parameter_words, short_name, wrapped

HANDMADE = {**GRAPHS, "three towers": three_towers}
TRACED = {
    "t5": "AutoModelForSeq2SeqLM",
    "jamba": "AutoModelForCausalLM",
    "deepseek_v3": "AutoModelForCausalLM",
    "resnet": "AutoModelForImageClassification",
}


@pytest.fixture(scope="module", params=[*HANDMADE, *TRACED])
def graph(request) -> NeuralGraph:
    if request.param in HANDMADE:
        return HANDMADE[request.param]()
    return NeuralGraph.from_model(tiny_model(TRACED[request.param], request.param), verify=False)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts in a picture that share more than a pixel each way, as drawn."""
    renderer = figure.canvas.get_renderer()
    extents = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    return [
        (first, second)
        for (first, a), (second, b) in itertools.combinations(extents, 2)
        if min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)) > 1
    ]


def texts(figure: Figure) -> list[Text]:
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("kind", ["diagram", "matrix"])
def test_texts_do_not_overlap_and_stay_on_the_page(graph, kind):
    """All of them: names, labels, ticks, titles and legends, and none is smaller than 7 points."""
    figure = plot(graph, kind=kind, title="a model")
    assert not overlaps(figure)
    renderer, page = figure.canvas.get_renderer(), figure.bbox
    for text in texts(figure):
        extent = text.get_window_extent(renderer)
        assert page.x0 <= extent.x0 and extent.x1 <= page.x1 and page.y0 <= extent.y0 and extent.y1 <= page.y1
        assert text.get_fontsize() >= 7


def test_texts_that_overlap_are_found():
    """Negative control: a label that is moved onto another one."""
    figure = plot(llama(layers=3))
    first, second, *_ = [text for text in figure.axes[0].texts if text.get_text().endswith("_proj")]
    second.set_position(first.get_position())
    assert (first.get_text(), second.get_text()) in overlaps(figure)


def crossings(plan) -> list[str]:
    """Boxes that overlap, wires that run through a box, and labels that a wire or a box runs through."""
    found = []
    boxes = [(box.left, box.top, box.right, box.bottom) for box in plan.boxes.values()]
    wires = [
        (min(a, c), min(b, d), max(a, c), max(b, d))
        for wire in plan.wires
        for (a, b), (c, d) in itertools.pairwise(wire.points)
    ]
    labels = []
    for wire in plan.wires:
        if wire.label:
            right, below = wire.label_at
            below += 0.05 * (wire.enters == "spine")
            labels.append((right - text_width(wire.label, 7.5), below - 0.1, right, below))

    def meet(a, b):
        return min(a[2], b[2]) - max(a[0], b[0]) > -1e-6 and min(a[3], b[3]) - max(a[1], b[1]) > -1e-6

    def inner(a):
        return a[0] + 0.01, a[1] + 0.01, a[2] - 0.01, a[3] - 0.01

    found += ["boxes" for a, b in itertools.combinations(boxes, 2) if meet(inner(a), inner(b))]
    found += ["wire through box" for box in boxes for wire in wires if meet(inner(box), wire)]
    found += ["label on wire or box" for label in labels for other in [*wires, *boxes] if meet(inner(label), other)]
    return found


def test_wires_run_neither_through_boxes_nor_through_labels(graph):
    """Each wire has tracks of its own between the boxes, and labels a place that no wire passes."""
    assert not crossings(plan_diagram(graph)[0])


def test_wires_that_run_through_boxes_are_found():
    """Negative control: a box that is made so large that it covers its neighbours, their wires and their labels."""
    graph = llama(layers=3)
    plan, *_ = plan_diagram(graph)
    box = plan.boxes[next(n for n in plan.boxes if graph.groups[n].name.endswith("k_proj"))]
    box.width, box.height = 3 * box.width, 4 * box.height
    assert {"boxes", "wire through box", "label on wire or box"} <= set(crossings(plan))


def test_every_group_and_joint_is_drawn_and_explained(graph):
    """Each box says its size, each wire has the colour of its type, and the legend has each type."""
    plan = layout(graph)
    figure = plot(graph)
    words = [text.get_text() for text in figure.axes[0].texts]
    for number in plan.place:
        size = graph.groups[number].size
        assert any(str(size) in word or "\u00d7" in word for word in words)
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    wired = [joint for joint in plan.joints if {joint.source, joint.target} <= plan.place.keys()]
    assert sorted(to_hex(arrow.get_edgecolor()) for arrow in arrows) == sorted(TYPE_COLOURS[j.kind] for j in wired)
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    for kind in {joint.kind for joint in plan.joints} - {EdgeType.OTHER}:
        assert kind.name.lower().replace("_", " ") in legend
    constant = [arrow for arrow in arrows if arrow.get_linestyle() != "solid" and arrow.get_linestyle() != "-"]
    assert len(constant) == sum(joint.kind in (EdgeType.RESIDUAL, EdgeType.HEAD) for joint in wired)


def test_folded_layers_say_how_many_they_are():
    """The number of thirty layers, the letters and the pattern of a hybrid."""
    words = [text.get_text() for text in plot(llama(layers=30)).axes[0].texts]
    assert "model.layers.0 … 29   \u00d7 30" in words
    figure = plot(hybrid())
    titles = [text.get_text() for text in figure.axes[0].texts]
    assert "A   layers.0, 1, 2, …   \u00d7 12" in titles and "B   layers.3, 7, 11, …   \u00d7 4" in titles
    assert "layers: (A A A B) \u00d7 4" in [text.get_text() for text in figure.texts]


def test_a_picture_of_thirty_layers_is_as_large_as_one_of_three():
    """Depth does not make a diagram larger."""
    few, many = (plot(llama(layers=layers)).get_size_inches().tolist() for layers in (3, 30))
    assert many == pytest.approx(few, abs=0.3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_residual_stream_is_the_spine(name):
    """Its places are in column 0 from top to bottom, everything that it reads from and writes to is beside it."""
    graph = HANDMADE[name]()
    place = {graph.groups[number].name: at for number, at in layout(graph).place.items()}
    stream = [group for group in place if group.endswith(("drop", "embedding", "c_proj", "o_proj", "down_proj"))]
    assert [place[group][2] for group in stream] == [0, 0, 0]
    assert [place[group][1] for group in stream] == sorted({place[group][1] for group in stream})
    assert all(column > 0 for group, (_, _, column) in place.items() if "query" in group or "mlp.c_fc" in group)


def test_an_encoder_and_a_decoder_stand_side_by_side():
    """Cross-attention belongs to the decoder, though its keys and values are read from the encoder."""
    graph = encoder_decoder()
    lanes = {graph.groups[number].name: lane for number, (lane, _, _) in layout(graph).place.items()}
    assert {lane for name, lane in lanes.items() if name.startswith(("encoder", "shared"))} == {0}
    assert {lane for name, lane in lanes.items() if name.startswith("decoder")} == {1}


def test_wires_between_distant_lanes_pass_above_all_of_them():
    """A wire from the first of three lanes to the last runs higher than any box."""
    graph = three_towers()
    plan, shown, _ = plan_diagram(graph)
    assert len(shown.lanes) == 3
    top = min(box.top for box in plan.boxes.values())
    for wire in plan.wires:
        distance = abs(shown.place[wire.start][0] - shown.place[wire.end][0])
        assert (min(y for _, y in wire.points) < top) == (distance == 2)


def test_streams_that_follow_each_other_share_a_spine():
    """The stages of a convolutional network, each with a stream of its own width."""
    sketch = Sketch()
    before = sketch.group("in", 3)
    for stage, width in enumerate((4, 6)):
        for name, size in (("down", width), ("inner", 9), ("out", width)):
            sketch.group(f"{stage}.{name}", size)
        sketch.linear(f"{stage}.d", (width, sketch.groups[before].size), before, f"{stage}.down")
        sketch.linear(f"{stage}.i", (9, width), f"{stage}.down", f"{stage}.inner")
        sketch.linear(f"{stage}.o", (width, 9), f"{stage}.inner", f"{stage}.out")
        sketch.matching(f"{stage}.down", f"{stage}.out")
        before = f"{stage}.out"
    graph = sketch.graph()
    place = {graph.groups[number].name: (lane, column) for number, (lane, _, column) in layout(graph).place.items()}
    assert {name for name, at in place.items() if at == (0, 0)} == {"in", "0.down", "0.out", "1.down", "1.out"}
    assert place["0.inner"] == place["1.inner"] == (0, 1)


def test_loops_private_neurons_and_groups_without_joints_have_a_place():
    """Recurrent and mutual connections, private groups and bare heads neither hang nor share a place."""
    sketch = Sketch()
    for name in ("a", "b", "c", "p", "q"):
        sketch.group(name, 3, "private" if name in "pq" else "neuron")
    sketch.group("heads", 2, "head")
    for source, target in (("a", "b"), ("b", "c"), ("c", "a"), ("b", "b"), ("p", "q")):
        sketch.linear(f"{source}-{target}", (3, 3), source, target)
    graph = sketch.graph()
    assert len(layout(graph).place) == 6
    assert not crossings(plan_diagram(graph)[0])
    assert "\u21bb b-b" in [text.get_text() for text in plot(graph).axes[0].texts]


def test_frozen_parameters_are_not_drawn():
    """They are no edges: neither a wire nor a word of them."""
    full = mlp()
    frozen = replace(full, blocks=tuple(replace(b, trainable="bias" not in b.parameter) for b in full.blocks))
    words = [" ".join(text.get_text() for text in texts(plot(graph))) for graph in (full, frozen)]
    assert ["bias" in found for found in words] == [True, False]


def test_the_matrix_has_a_field_for_every_pair_of_groups_that_a_block_joins():
    """In the row of the source and the column of the target; biases on the diagonal of what they act on."""
    graph = convnet()
    figure = draw_matrix(graph)
    (axes,) = figure.axes  # nothing repeats, so there is one panel only
    boxes = [n for n, group in enumerate(graph.groups) if group.kind != "parameter"]
    expected = set()
    for edges in (*graph.trainable_blocks, *graph.constants):
        at = [boxes.index(side.group) for side in (edges.source, edges.target) if side.group in boxes]
        expected.add((at[0], at[-1]))
    found = set()
    for collection in axes.collections:
        for path in collection.get_paths() if isinstance(collection, PatchCollection) else ():
            (x0, y0), (x1, y1) = path.get_extents().min, path.get_extents().max
            found.add((int((y0 + y1) / 2), int((x0 + x1) / 2)))
    assert found == expected


def test_the_matrix_of_thirty_layers_is_a_chain_and_names_the_layers():
    """Nothing but the embedding is far from the diagonal, and there is a tick for each layer."""
    graph = llama(layers=30)
    layers, groups = draw_matrix(graph).axes
    assert [axes.get_label() for axes in (layers, groups)] == ["layers", "groups"]
    ticks = [label.get_text() for label in layers.get_yticklabels()]
    assert {f"layers.{i}" for i in range(30)} <= set(ticks)
    assert len(groups.get_yticklabels()) == len(layout(graph).place)


def test_names_are_short_but_tell():
    """A label leaves out the layer, which the frame names, the kind, which the colour tells, and repetitions."""
    group = NeuronGroup("h.0.mlp.gate_proj + h.0.mlp.up_proj", 4)
    assert short_name(group, "h.0") == "mlp.gate_proj + up_proj"
    assert short_name(group) == "h.0.mlp.gate_proj + up_proj"
    assert short_name(NeuronGroup("model.wte.weight[row]", 4, "row"), root="model.") == "wte"
    assert short_name(NeuronGroup("h.0.attn.c_attn[query+key]", 4), "h.0") == "attn.c_attn query, key"
    assert short_name(NeuronGroup("h.0.attn.c_attn[heads]", 4, "head"), "h.0") == "attn heads"


def test_long_names_are_broken_and_cut():
    """Broken after dots and underscores, with an ellipsis where something is missing."""
    assert wrapped("embeddings.patch_embeddings.projection", 2, 26) == ["embeddings.patch_", "embeddings.projection"]
    (line,) = wrapped("a" * 40, 1, 26)
    assert len(line) == 26 and line.endswith("…")


def test_wires_are_labelled_with_their_parameters():
    """Without the layer and the module, which the boxes name."""
    plan = layout(llama(layers=3))
    assert {"q_proj", "k_proj", "gate_proj, up_proj", "down_proj", "lm_head"} <= {
        parameter_words(joint, root="model.") for joint in plan.joints
    }


@pytest.mark.parametrize("kind", ["diagram", "matrix"])
def test_the_picture_is_saved_in_the_format_of_its_suffix(tmp_path, kind):
    """``path`` is written; without it nothing is."""
    graph = gpt2(layers=2)
    plot(graph, tmp_path / "a.svg", kind)
    plot(graph, tmp_path / "a.png", kind)
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    graph.plot()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_wrong_kind_or_suffix_is_refused(tmp_path):
    """One error that says what is allowed."""
    with pytest.raises(ValueError, match=r"`kind` must be one of \('diagram', 'matrix'\), got 'circle'"):
        plot(mlp(), kind="circle")
    with pytest.raises(ValueError, match=r"`path` must end in a format that matplotlib can write .* got .*a.doc"):
        plot(mlp(), tmp_path / "a.doc")
    assert not list(tmp_path.iterdir())


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
