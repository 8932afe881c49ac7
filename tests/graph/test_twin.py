"""Tracing without weights, and proof by a narrow twin."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TEXT

from hf_nino.graph import NeuralGraph, build
from hf_nino.graph.build import Builder, aliases
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.trace import trace
from hf_nino.graph.twin import shrunk, verified_by_twin


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_a_trace_without_weights_gives_the_same_graph(architecture) -> None:
    """Groups, blocks, constants and symmetries are those of the trace with weights; and they are no empty lists."""
    model = architecture.model()
    inputs = split_inputs(model, architecture.inputs)
    names = {name for name, _ in model.named_parameters()}
    full, hollow = (Builder(trace(model, *inputs, hollow), names, aliases(model)).graph() for hollow in (False, True))
    assert hollow.groups == full.groups and len(full.groups) > 5
    assert hollow.blocks == full.blocks
    assert hollow.constants == full.constants
    assert [s.name for s in hollow.symmetries] == [s.name for s in full.symmetries]
    assert all(a.units.equal(b.units) for a, b in zip(hollow.symmetries, full.symmetries, strict=True))


def test_a_model_on_the_meta_device_has_the_graph_of_the_real_one() -> None:
    """Symmetries verified on a twin included; nothing is allocated for its weights."""
    config = transformers.LlamaConfig(**TEXT | {"hidden_size": 96, "intermediate_size": 200}, num_key_value_heads=2)
    with torch.device("meta"):
        absent = transformers.LlamaForCausalLM(config)
    graph = NeuralGraph.from_model(absent)
    real = NeuralGraph.from_model(transformers.LlamaForCausalLM(config))
    assert graph.groups == real.groups and graph.blocks == real.blocks and graph.constants == real.constants
    assert [s.name for s in graph.symmetries] == [s.name for s in real.symmetries]
    assert all(a.units.equal(b.units) for a, b in zip(graph.symmetries, real.symmetries, strict=True))
    assert any("verified on a narrow twin of the model: 9 of 9" in line for line in graph.report)
    assert all(parameter.is_meta for parameter in absent.parameters())


def test_large_models_are_traced_without_their_weights(monkeypatch) -> None:
    """Beyond the bound the same graph comes from the twin, and says so."""
    model = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    expected = NeuralGraph.from_model(model)
    monkeypatch.setattr(build, "LARGE", 10_000)
    graph = NeuralGraph.from_model(model)
    assert graph.groups == expected.groups and len(graph.symmetries) == len(expected.symmetries)
    assert any("narrow twin" in line for line in graph.report)
    assert not any("narrow twin" in line for line in expected.report)


def test_a_twin_refutes_what_is_wrong_and_drops_what_it_cannot_prove() -> None:
    """A symmetry that the twin does not have is dropped; without a configuration there is no twin and no symmetry."""
    model = next(a for a in ARCHITECTURES if a.name == "llama").model()
    graph = NeuralGraph.from_model(model)
    invented = dataclasses.replace(graph.symmetries[0], name="neurons of nothing")
    result = verified_by_twin(model, dataclasses.replace(graph, symmetries=(*graph.symmetries, invented)))
    assert [s.name for s in result.symmetries] == [s.name for s in graph.symmetries]

    own = next(a for a in ARCHITECTURES if a.name == "perceptron")
    result = verified_by_twin(own.model(), NeuralGraph.from_model(own.model(), own.inputs))
    assert result.symmetries == () and any("nothing is verified" in line for line in result.report)


def test_a_shrunk_configuration_keeps_depth_heads_and_switches() -> None:
    """Only widths change, and the original configuration stays as it is."""
    config = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    small = shrunk(config)
    kept = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "attention_bias", "tie_word_embeddings")
    assert all(getattr(small, name) == getattr(config, name) for name in kept)
    assert (small.hidden_size, small.head_dim, small.intermediate_size) == (256, 8, 48)
    assert config.hidden_size == 4096
