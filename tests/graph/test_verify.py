"""The permutation test finds wrong proposals, and the graph that remains is right."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from architectures import ARCHITECTURES

from hf_nino.graph import NeuralGraph, Symmetry
from hf_nino.graph.build import verified
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.verify import PermutationTest


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "convolutional"])
def test_a_wrong_symmetry_is_refuted_and_nothing_else(name: str) -> None:
    """Added to the right ones, a permutation of pinned neurons is the only one to fall."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = architecture.model()
    graph = NeuralGraph.from_model(model, architecture.inputs)
    number = next(i for i, g in enumerate(graph.groups) if g.kind in ("row", "input") and g.size > 1)
    start = graph.group_offsets[number]
    units = torch.arange(start, start + graph.groups[number].size).view(1, -1, 1)
    wrong = Symmetry(f"neurons of {graph.groups[number].name}", units)
    proposed = dataclasses.replace(graph, symmetries=(*graph.symmetries, wrong))
    test = PermutationTest(model, *split_inputs(model, architecture.inputs), proposed)
    assert test.refuted() == [wrong]

    result = verified(proposed, test)
    assert [s.name for s in result.symmetries] == [s.name for s in graph.symmetries]
    assert any(line.startswith(f"refuted: {wrong.name}") for line in result.report)
    private = [group for group in result.groups if group.kind == "private"]
    assert private and sum(group.size for group in private) == graph.groups[number].size
    again = PermutationTest(model, *split_inputs(model, architecture.inputs), result)
    assert again.refuted() == []


def test_a_refuted_head_symmetry_only_loses_that_symmetry() -> None:
    """Query heads of different key/value heads may not be exchanged, but no group has to be taken apart for it."""
    architecture = next(a for a in ARCHITECTURES if a.name == "llama-grouped")
    model = architecture.model()
    graph = NeuralGraph.from_model(model)
    heads = next(s for s in graph.symmetries if s.name.startswith("heads of"))
    wrong = Symmetry(heads.name, heads.units.reshape(1, -1, heads.units.shape[-1]))
    proposed = dataclasses.replace(graph, symmetries=tuple(wrong if s is heads else s for s in graph.symmetries))
    result = verified(proposed, PermutationTest(model, *split_inputs(model, None), proposed))
    assert len(result.symmetries) == len(graph.symmetries) - 1
    assert result.groups == graph.groups and result.blocks == graph.blocks


def test_a_graph_with_private_neurons_covers_every_parameter() -> None:
    """Taking groups apart keeps every element on one edge: construction validates it, and edges stay as many."""
    architecture = next(a for a in ARCHITECTURES if a.name == "perceptron")
    model = architecture.model()
    graph = NeuralGraph.from_model(model, architecture.inputs)
    wrong = Symmetry("neurons of input", torch.arange(7).view(1, 7, 1))
    proposed = dataclasses.replace(graph, symmetries=(*graph.symmetries, wrong))
    result = verified(proposed, PermutationTest(model, *split_inputs(model, architecture.inputs), proposed))
    assert result.num_parameters == graph.num_parameters
    assert sum(block.edges for block in result.blocks) == sum(block.edges for block in graph.blocks)
