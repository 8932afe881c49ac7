"""transformers' tensor-parallel plans as an independent oracle: a colwise/rowwise pair must share a neuron group."""

from __future__ import annotations

import re

import pytest

from hf_nino.graph import EdgeType, NeuralGraph
from hf_nino.graph.tiny import NOT_OFFLINE, model_types, tiny_model

DISAGREE = {"gemma3n_text": "the last layers read the values of an earlier layer, not those of their own `v_proj`"}
"""Where the plan pairs matrices that the model does not connect."""

SAMPLE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "olmo2", "starcoder2", "cohere", "glm", "smollm3"]


def plan_of(config) -> dict[str, str]:
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return {name: kind for name, kind in plan.items() if kind in ("colwise", "rowwise")}


def neurons(graph: NeuralGraph, parameter: str, axis: int) -> set[int]:
    """Groups along one axis of a [output, input] matrix: 0 are its outputs, 1 its inputs."""
    found = set()
    for block in graph.trainable_blocks:
        if block.parameter == parameter:
            outputs_are_sources = block.edge_type == EdgeType.KEY
            side = block.source if (axis == 0) is outputs_are_sources else block.target
            found.add(side.group)
    return found


def check(model_type: str) -> int:
    """The number of rowwise matrices whose inputs were compared with a colwise matrix's outputs."""
    model = tiny_model("AutoModelForCausalLM", model_type)
    graph = NeuralGraph.from_model(model)
    repeats = {(c.source.group, c.target.group) for c in graph.constants if c.edge_type == EdgeType.RESIDUAL}
    plan = plan_of(model.config)
    compared = 0
    for row, kind in plan.items():
        if kind != "rowwise":
            continue
        parent = row.rpartition(".")[0]
        columns = [name for name, other in plan.items() if other == "colwise" and name.rpartition(".")[0] == parent]
        pattern = re.compile(r"(.*\.)?" + re.escape(row).replace(r"\*", r"(\d+)") + r"\.weight")
        for name in graph.parameter_names:
            if not (match := pattern.fullmatch(name)) or not columns:
                continue
            inputs = neurons(graph, name, 1)
            outputs = set()
            for column in columns:
                for number in match.groups()[1:]:
                    column = column.replace("*", number, 1)
                outputs |= neurons(graph, f"{match.group(1) or ''}{column}.weight", 0)
            if not outputs:
                continue
            shared = inputs & outputs or {(o, i) for o in outputs for i in inputs} & repeats
            assert shared, f"{model_type}: the inputs of {name} are neurons of none of {columns}"
            compared += 1
    return compared


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_rowwise_matrix_reads_what_its_colwise_partners_make(model_type: str) -> None:
    """Attention outputs are value channels (or their repeats), and an MLP's inner neurons are one group."""
    assert check(model_type) >= 2


def test_the_oracle_would_notice() -> None:
    """Negative control: the inputs of one layer's output matrix are not the neurons of another layer's MLP."""
    model = tiny_model("AutoModelForCausalLM", "llama")
    graph = NeuralGraph.from_model(model)
    first = neurons(graph, "model.layers.0.mlp.down_proj.weight", 1)
    assert first == neurons(graph, "model.layers.0.mlp.up_proj.weight", 0)
    assert not first & neurons(graph, "model.layers.1.mlp.up_proj.weight", 0)
    assert not first & neurons(graph, "model.layers.0.self_attn.v_proj.weight", 0)


@pytest.mark.slow
def test_all_plans_agree() -> None:
    """Every causal language model with a plan; types without one, or without a pair, are not counted."""
    types = [t for t in model_types("AutoModelForCausalLM") if t not in NOT_OFFLINE and t not in DISAGREE]
    compared = {t: check(t) for t in types if plan_of(tiny_model("AutoModelForCausalLM", t).config)}
    assert sum(count > 0 for count in compared.values()) > 40


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DISAGREE)
def test_the_disagreements_are_still_there(model_type: str) -> None:
    """A reason that no longer holds fails here."""
    with pytest.raises(AssertionError, match="are neurons of none of"):
        check(model_type)
