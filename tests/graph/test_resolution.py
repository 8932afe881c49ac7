"""Graphs are as fine as the networks: no two neurons are taken for one, and a shared neuron has the right repeats.

Permutation tests cannot see neurons that were merged: exchanging the same channels in all heads at once keeps every
output, whether a graph has one neuron for them or one for each head.
"""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from architectures import ARCHITECTURES, TEXT
from sample import CLEAN, SAMPLE, each_type, sample_graph
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_nino.graph import EdgeBlock, EdgeType, NeuralGraph, Nodes, Symmetry
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.verify import PermutationTest

GATED = "the gate of a unit and what it lets through have the same sources and one target"
EXPLAINED = {
    ("mixtral", r"experts\.gate_up_proj", 1, 96): ({48}, GATED),
    ("qwen2_moe", r"experts\.gate_up_proj", 1, 48): ({24}, GATED),
    ("gpt_oss", r"experts\.gate_up_proj", 2, 96): ({48}, GATED),
    ("deepseek_v3", r"experts\.gate_up_proj", 1, 48): ({24}, GATED),
    ("jamba", r"experts\.gate_up_proj", 1, 96): ({48}, GATED),
    ("qwen3_next", r"experts\.gate_up_proj", 1, 48): ({24}, GATED),
    ("qwen3_next", "in_proj_qkvz", 0, 128): (
        {112},
        "16 queries and 16 keys of linear attention are the same channels",
    ),
    # As transformers up to 5.17 computes it, B and C of a state, 24 rows each, are the same channels too.
    ("mamba2", "in_proj", 0, 184): ({120, 96}, "64 channels and their gates are rows of one matrix"),
}
"""(type, parameter, axis, its length): how many different edges there are along it, and why they are fewer."""


def edges_of(graph: NeuralGraph, name: str) -> Tensor:
    """For each element of a parameter, a number of the edge and the tap that it is on, int64 of its shape."""
    shape = graph.shapes[name] or (1,)
    numbers = torch.full((math.prod(shape),), -1)
    for block in graph.trainable_blocks:
        if block.parameter == name:
            source, target = graph.node_index(block.source), graph.node_index(block.target)
            edge = source[:, None] * graph.num_nodes + target
            features = block.shape[2]
            numbers[block.elements()] = edge[:, :, None] * features + torch.arange(features)
    assert (numbers >= 0).all()
    return numbers.view(shape)


def fewest(numbers: Tensor, axis: int) -> int:
    """The smallest number of different values on a line along one axis."""
    ordered = numbers.movedim(axis, -1).sort(dim=-1).values
    return 1 + int((ordered.diff(dim=-1) != 0).sum(-1).min())


def merged_axes(graph: NeuralGraph) -> list[tuple[str, int, int, int]]:
    """(parameter, axis, different edges on some line along it, length) wherever these are fewer than the length."""
    found = []
    for name in graph.parameter_names:
        numbers = edges_of(graph, name)
        counts = [(name, axis, fewest(numbers, axis), size) for axis, size in enumerate(numbers.shape)]
        found += [entry for entry in counts if entry[2] != entry[3]]
    return found


@each_type
def test_an_axis_has_as_many_neurons_as_elements(kind, model_type) -> None:
    """Elements that differ in one index lie on different edges, or on different taps of one: nothing is merged.

    The axes where this does not hold are known, with their counts.
    """
    merged = merged_axes(sample_graph(kind, model_type))
    for (name, pattern, axis, length), (few, reason) in EXPLAINED.items():
        known = [entry for entry in merged if re.search(pattern, entry[0]) and entry[1::2] == (axis, length)]
        if name == model_type:
            assert known and all(entry[2] in few for entry in known), reason
            merged = [entry for entry in merged if entry not in known]
    assert not merged


@each_type
def test_neurons_of_one_parameter_alone_are_an_exception(kind, model_type) -> None:
    """No parameter of a type that is known to be right has private neurons, which would resolve everything."""
    private = [group.name for group in sample_graph(kind, model_type).groups if group.kind == "private"]
    assert not private or SAMPLE[kind, model_type] is not CLEAN


def merge_heads(graph: NeuralGraph, number: int, heads: int) -> NeuralGraph:
    """The graph of a careless trace: one neuron for the same channel of all heads."""
    width = graph.groups[number].size // heads
    blocks: list[EdgeBlock] = []
    for block in graph.blocks:
        side = next((s for s in ("source", "target") if getattr(block, s).group == number), None)
        if side is None:
            blocks.append(block)
            continue
        (stride,) = getattr(block, f"{side}_strides")
        for head in range(heads):
            changes = {side: Nodes.all(number, width), "offset": block.offset + head * width * stride}
            blocks.append(dataclasses.replace(block, **changes))
    start = graph.group_offsets[number]
    inside = range(start, start + graph.groups[number].size)
    kept = [s for s in graph.symmetries if not any(int(node) in inside for node in s.units.flatten())]
    channels = Symmetry("neurons of all heads", torch.arange(start, start + width).view(1, width, 1))
    return dataclasses.replace(graph, blocks=tuple(blocks), symmetries=(*kept, channels))


def test_merged_channels_pass_the_permutation_test_but_not_this_one() -> None:
    """GPT-2 with one value neuron for all heads: each of its permutations keeps the outputs, yet it is too coarse."""
    architecture = next(a for a in ARCHITECTURES if a.name == "gpt2")
    model = architecture.model()
    graph = NeuralGraph.from_model(model)
    assert merged_axes(graph) == []
    number = next(i for i, group in enumerate(graph.groups) if group.name.endswith("[value]"))
    coarse = merge_heads(graph, number, 3)
    assert PermutationTest(model, *split_inputs(model, None), coarse).refuted() == []
    at = "transformer.h.0.attn"
    assert {entry[:2] for entry in merged_axes(coarse)} == {
        (f"{at}.c_attn.weight", 1),
        (f"{at}.c_attn.bias", 0),
        (f"{at}.c_proj.weight", 0),
    }


HEADS, WIDTH = 6, 4


def grouped_llama(kv_heads: int) -> LlamaForCausalLM:
    sizes = TEXT | {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=kv_heads)).eval()


def repeats(graph: NeuralGraph, few: str, many: str) -> list[list[int]]:
    """For each neuron of one group, the neurons of another that matchings join to it, in whatever direction."""
    numbers = {group.name.rpartition(".")[2]: number for number, group in enumerate(graph.groups)}
    joined: list[list[int]] = [[] for _ in range(graph.groups[numbers[few]].size)]
    for constant in graph.constants:
        sides = {constant.source.group: constant.source, constant.target.group: constant.target}
        if sides.keys() == {numbers[few], numbers[many]}:
            assert constant.edge_type == EdgeType.RESIDUAL
            ends = (sides[numbers[name]].index().tolist() for name in (few, many))
            for one, other in zip(*ends, strict=True):
                joined[one].append(other)
    return joined


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_a_key_value_neuron_is_repeated_in_each_head_that_reads_it(kv_heads) -> None:
    """Channel c of key/value head h is joined to channel c of its 6 / kv query heads, no more and no fewer.

    Every element of the key and value matrices is one edge all the same: repeats are neurons, not edges.
    """
    graph = NeuralGraph.from_model(grouped_llama(kv_heads))
    group = HEADS // kv_heads
    for few, many in (("k_proj[key]", "q_proj[query]"), ("v_proj[value]", "v_proj[repeated]")):
        joined = repeats(graph, few, many)
        assert len(joined) == kv_heads * WIDTH
        for neuron, targets in enumerate(joined):
            head, channel = divmod(neuron, WIDTH)
            assert sorted(targets) == [(head * group + i) * WIDTH + channel for i in range(group)]
    for name in ("k_proj", "v_proj"):
        blocks = [b for b in graph.trainable_blocks if b.parameter == f"model.layers.0.self_attn.{name}.weight"]
        assert sum(block.edges for block in blocks) == HEADS * WIDTH * kv_heads * WIDTH
    assert merged_axes(graph) == []


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_which_heads_may_change_places_follows_the_groups(kv_heads) -> None:
    """Query heads of one key/value head, key/value heads with all of theirs, value channels with their repeats."""
    graph = NeuralGraph.from_model(grouped_llama(kv_heads))
    group = HEADS // kv_heads
    found = sorted(tuple(s.units.shape) for s in graph.symmetries if s.units.shape[-1] > 3 or "v_proj" in s.name)
    query_head = 1 + 2 * WIDTH
    if kv_heads == HEADS:
        expected = [(1, HEADS, query_head), (HEADS, WIDTH, 1)]
    else:
        expected = [(kv_heads, group, query_head), (kv_heads, WIDTH, 1 + group)]
        if kv_heads > 1:
            expected.append((1, kv_heads, group * query_head + 2 * WIDTH))
    assert found == sorted(expected)


@pytest.mark.parametrize(("kv_heads", "wrong"), [(2, 3), (3, 2), (2, 1), (3, 1)])
def test_a_wrong_multiplicity_is_refuted(kv_heads, wrong) -> None:
    """The same heads in the groups of another number of key/value heads, or in one group, do not pass the test."""
    model = grouped_llama(kv_heads)
    graph = NeuralGraph.from_model(model)
    heads = next(s for s in graph.symmetries if s.name.startswith("heads of"))
    values = next(s for s in graph.symmetries if s.units.shape == (kv_heads, WIDTH, 1 + HEADS // kv_heads))
    regrouped = Symmetry(heads.name, heads.units.reshape(wrong, HEADS // wrong, -1))
    short = Symmetry(values.name, values.units[:, :, :-1])
    test = PermutationTest(model, *split_inputs(model, None), graph)
    assert test.holds(heads) and test.holds(values)
    assert not test.holds(regrouped)
    assert not test.holds(short), "a value channel that leaves one of its repeats behind"
