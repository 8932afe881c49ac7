"""Tracing without weights, and proof by a narrow twin."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TEXT
from sample import each_type, sample_graph, sample_model

from hf_nino.graph import NeuralGraph, Symmetry, build
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


@each_type
def test_a_twin_says_what_a_test_of_the_model_says(kind, model_type, monkeypatch) -> None:
    """Groups, blocks and verified symmetries of the sample are the same, whichever way they are found."""
    monkeypatch.setattr(build, "LARGE", 1)
    graph, expected = NeuralGraph.from_model(sample_model(kind, model_type)), sample_graph(kind, model_type)
    assert any(line.startswith("verified on a narrow twin") for line in graph.report)
    assert graph.groups == expected.groups and graph.blocks == expected.blocks
    assert [s.name for s in graph.symmetries] == [s.name for s in expected.symmetries]
    assert all(a.units.equal(b.units) for a, b in zip(graph.symmetries, expected.symmetries, strict=True))


def test_what_a_twin_refutes_gets_private_neurons_as_if_it_were_tested_itself(monkeypatch) -> None:
    """A symmetry of rotary channels, proposed for model and twin, falls for both; all others stay."""
    model = next(a for a in ARCHITECTURES if a.name == "llama-grouped").model()
    expected = NeuralGraph.from_model(model)
    propose = build.propose

    def and_a_wrong_one(group_of, names, *rest):
        number = next(i for i, name in enumerate(names) if name.endswith("q_proj[query]"))
        nodes = torch.from_numpy((group_of == number).nonzero()[0])
        return [*propose(group_of, names, *rest), Symmetry(f"neurons of {names[number]}", nodes.view(4, -1, 1))]

    monkeypatch.setattr(build, "propose", and_a_wrong_one)
    graphs = [NeuralGraph.from_model(model)]
    monkeypatch.setattr(build, "LARGE", 1)
    graphs.append(NeuralGraph.from_model(model))
    for graph in graphs:
        assert sum(line.startswith("refuted: ") for line in graph.report) == 1
        private = [group for group in graph.groups if group.kind == "private"]
        assert len(private) > 0 and all("q_proj" in group.name or "o_proj" in group.name for group in private)
    assert graphs[0].groups == graphs[1].groups != expected.groups
    assert [s.name for s in graphs[0].symmetries] == [s.name for s in graphs[1].symmetries]


MEASURE = """
import json, resource, sys
import torch, transformers
from transformers import AutoModelForCausalLM
from hf_nino.graph import NeuralGraph

config = getattr(transformers, sys.argv[1])(**json.loads(sys.argv[2]))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)

def peak():
    # ru_maxrss is in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

before = peak()
graph = NeuralGraph.from_model(model)
print(json.dumps({
    "beyond": peak() - before,
    "parameters": graph.num_parameters,
    "expected": sum(p.numel() for p in model.parameters()),
    "covered": sum(block.edges * block.shape[2] for block in graph.trainable_blocks),
    "private": sum(group.kind == "private" for group in graph.groups),
    "groups": len(graph.groups),
    "symmetries": [list(s.units.shape) for s in graph.symmetries],
    "report": graph.report,
}))
"""
"""Prints what building a graph takes, in KiB beyond the start, and what is in it."""

ATTENTION = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
SHAPES = {
    "Llama-3.2-1B": (
        "LlamaConfig",
        dict(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, vocab_size=128256,
            num_key_value_heads=8, tie_word_embeddings=True,
        ),
    ),
    "Llama-3-8B": ("LlamaConfig", ATTENTION | dict(num_hidden_layers=32, vocab_size=128256)),
    "Mixtral-8x7B": (
        "MixtralConfig",
        ATTENTION | dict(num_hidden_layers=32, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2),
    ),
}  # fmt: skip
PARAMETERS = {"Llama-3.2-1B": 1_235_814_400, "Llama-3-8B": 8_030_261_248, "Mixtral-8x7B": 46_702_792_704}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHAPES)
def test_the_graph_of_a_large_model_fits_beside_it(name) -> None:
    """On the meta device: all is covered, all symmetries are verified, within 2 GB beyond what the imports took."""
    pytest.importorskip("resource", reason="peak memory is measured with getrusage")
    config, sizes = SHAPES[name]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEASURE, config, json.dumps(sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == found["expected"] == found["covered"] == PARAMETERS[name]
    assert found["private"] == 0
    layers, symmetries = sizes["num_hidden_layers"], found["symmetries"]
    # The stream; per layer value channels, units, query heads of each key/value head, key/value heads; and experts.
    assert len(symmetries) == 1 + layers * (5 if "Mixtral" in name else 4)
    assert [1, sizes["hidden_size"], 1 + 2 * layers] in symmetries
    experts = sizes.get("num_local_experts", 1)
    assert symmetries.count([experts, sizes["intermediate_size"], 1]) == layers
    assert (
        f"verified on a narrow twin of the model: {len(symmetries)} of {len(symmetries)} symmetries" in found["report"]
    )
    assert not any("refuted" in line or "not shown" in line or "not verified" in line for line in found["report"])
    assert found["beyond"] < 2_000_000


def test_latent_attention_of_any_width_has_a_twin() -> None:
    """What DeepSeek's configurations call the size of a head is that of the rotated part, and shrinks with it."""
    config = transformers.DeepseekV3Config(
        num_hidden_layers=2, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=4, vocab_size=500,
        hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=4, first_k_dense_replace=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    graph = NeuralGraph.from_model(model)
    assert graph.symmetries and not any("no narrow twin" in line or "refuted" in line for line in graph.report)
    assert any(name.startswith("heads of") for name in (symmetry.name for symmetry in graph.symmetries))
