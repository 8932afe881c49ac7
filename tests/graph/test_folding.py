"""Layers that repeat are found from the graph, drawn once, and nothing is lost by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from handmade import Sketch, gpt2
from sketches import GRAPHS, dense_then_experts, hybrid

from hf_nino.graph import EdgeType, NeuralGraph
from hf_nino.graph.folding import Folding, fold, joints


def names(graph: NeuralGraph, numbers) -> list[str]:
    return [graph.groups[number].name for number in numbers]


def unfolded(graph: NeuralGraph, folding: Folding) -> list[str]:
    """The names of all groups, made from those that are drawn and the names of the layers."""
    found = names(graph, folding.drawn)
    for stack in reversed(folding.stacks):  # inner stacks first: outer ones repeat what they bring back
        for layer in stack.layers:
            mine = [name for name in found if stack.layer_name(name) == layer.name]
            found += [name.replace(layer.name, other) for name in mine for other in layer.names[1:]]
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_unfolding_gives_back_every_group(name):
    """Each group is drawn, or is the copy of a drawn one of its size and kind in a layer that is named."""
    graph = GRAPHS[name]()
    folding = fold(graph)
    assert sorted(n for members in folding.members.values() for n in members) == list(range(len(graph.groups)))
    for drawn, members in folding.members.items():
        assert {(graph.groups[n].size, graph.groups[n].kind) for n in members} == {
            (graph.groups[drawn].size, graph.groups[drawn].kind)
        }
    assert sorted(unfolded(graph, folding)) == sorted(group.name for group in graph.groups)


def test_thirty_layers_are_drawn_once():
    """And everything outside of them stays."""
    graph = gpt2(layers=30)
    folding = fold(graph)
    ((layer,),) = [stack.layers for stack in folding.stacks]
    assert (layer.name, layer.count) == ("transformer.h.0", 30)
    expected = [group.name for group in graph.groups if ".h." not in group.name or ".h.0." in group.name]
    assert names(graph, folding.drawn) == expected


def test_alternating_kinds_of_layers_are_drawn_once_each_and_their_pattern_is_told():
    """A hybrid of period 4: three layers without attention and one with it, four times over."""
    (stack,) = fold(hybrid(repeats=4)).stacks
    assert [layer.count for layer in stack.layers] == [12, 4]
    assert stack.pattern() == "(A A A B) \u00d7 4"
    assert fold(hybrid(repeats=1)).stacks[0].pattern() == "A \u00d7 3, B"


def test_first_layers_that_differ_are_a_kind_of_their_own():
    """Two dense layers, then five with experts; the experts of a layer are folded inside of it."""
    graph = dense_then_experts()
    outer, inner = fold(graph).stacks
    assert outer.pattern() == "A \u00d7 2, B \u00d7 5"
    assert [layer.name for layer in outer.layers] == ["layers.0", "layers.2"]
    assert (inner.inner, inner.layers[0].count) == (True, 6)
    number = next(n for n, group in enumerate(graph.groups) if group.name == "layers.2.experts.0.up")
    assert fold(graph).copies[number] == 6


def width_of_layer_2(graph: NeuralGraph) -> NeuralGraph:
    return replace(
        graph,
        groups=tuple(replace(g, pinned="token") if g.name == "layers.2.up" else g for g in graph.groups),
    )


def edge_type_of_layer_2(graph: NeuralGraph) -> NeuralGraph:
    return replace(
        graph,
        blocks=tuple(
            replace(b, edge_type=EdgeType.VALUE) if b.parameter == "layers.2.up.weight" else b for b in graph.blocks
        ),
    )


def residual_of_layer_2(graph: NeuralGraph) -> NeuralGraph:
    name = {n: group.name for n, group in enumerate(graph.groups)}
    return replace(graph, constants=tuple(c for c in graph.constants if name[c.target.group] != "layers.2.down"))


@pytest.mark.parametrize("change", [width_of_layer_2, edge_type_of_layer_2, residual_of_layer_2])
def test_a_layer_that_differs_in_its_groups_or_in_its_edges_is_not_folded_with_the_others(change):
    """The same names and sizes are not enough: pinning, edge types and constant edges must agree too."""
    plain = dense_layers(5)
    assert [layer.count for layer in fold(plain).stacks[0].layers] == [5]
    (stack,) = fold(change(plain)).stacks
    assert [layer.names for layer in stack.layers] == [
        ("layers.0", "layers.1", "layers.3", "layers.4"),
        ("layers.2",),
    ]
    assert stack.pattern() == "A \u00d7 2, B, A \u00d7 2"


def dense_layers(count: int) -> NeuralGraph:
    sketch = Sketch()
    stream = sketch.group("embedding", 4)
    for i in range(count):
        up, down = sketch.group(f"layers.{i}.up", 6), sketch.group(f"layers.{i}.down", 4)
        sketch.linear(f"layers.{i}.up.weight", (6, 4), stream, up)
        sketch.linear(f"layers.{i}.down.weight", (4, 6), up, down)
        sketch.matching(stream, down)
        stream = down
    return sketch.graph()


def test_kinds_of_layers_are_joined_in_the_order_in_which_they_are_drawn():
    """What leads to the first layer of a kind comes from the end of the kind before it, what leaves from the last."""
    graph = hybrid()
    end = {"a": "layers.0.out", "b": "layers.3.out"}
    found = {
        (names(graph, [j.source])[0], names(graph, [j.target])[0]) for j in joints(graph, fold(graph)) if j.parameters
    }
    assert ("embedding", "layers.0.state") in found
    assert (end["a"], "layers.3.value[value]") in found
    assert (end["b"], "head") in found
    assert (end["b"], "layers.0.state") not in found and (end["a"], "head") not in found


@pytest.mark.parametrize("name", GRAPHS)
def test_every_parameter_of_a_drawn_layer_is_on_a_joint(name):
    """And every parameter of the graph is like one that is."""
    graph = GRAPHS[name]()
    folding = fold(graph)
    drawn = {parameter for joint in joints(graph, folding) for parameter in joint.parameters}
    for block in graph.trainable_blocks:
        name = block.parameter
        for stack in folding.stacks:
            layer = stack.layer_name(name)
            if layer:
                name = name.replace(layer, stack.layers[stack.kind_of[layer]].name)
        assert name in drawn
