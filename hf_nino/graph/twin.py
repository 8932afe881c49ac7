"""Proof for models that are too large to test: the same architecture, as deep and with as many heads, but narrow.

A large model is traced without its weights (:func:`hf_nino.graph.trace.trace` with ``hollow``), which costs next to
nothing at any size, but permutations can only be tested on weights.  A *twin* has the model's own configuration with
small widths: its groups and symmetries have the same names, and what holds for it holds for the model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .inputs import split_inputs
from .structure import NeuralGraph
from .verify import PermutationTest

HEAD_SIZE = 8
WIDTHS = {
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "vocab_size": 96,
    "n_positions": 64,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": HEAD_SIZE,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "image_size": 32,
    "patch_size": 8,
}
"""Names of widths in configurations of transformers, and what a twin has; never more than the model."""


def shrunk(config: Any) -> Any:
    """The configuration with small widths; depth, heads, experts and all switches as they are."""
    config = copy.deepcopy(config)
    for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]:
        if part is None:
            continue
        for name, small in WIDTHS.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(small, getattr(part, name)))
        heads = next(
            (getattr(part, n) for n in ("num_attention_heads", "n_head", "num_heads") if hasattr(part, n)), None
        )
        if isinstance(getattr(part, "head_dim", None), int) and "qk_rope_head_dim" not in vars(part):
            part.head_dim = HEAD_SIZE
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(getattr(part, name, None), int) and isinstance(heads, int):
                setattr(part, name, heads * HEAD_SIZE)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, getattr(part, name) % WIDTHS["vocab_size"])
            elif isinstance(getattr(part, name, None), Sequence):
                setattr(part, name, [token % WIDTHS["vocab_size"] for token in getattr(part, name)])
    return config


def verified_by_twin(model: nn.Module, graph: NeuralGraph) -> NeuralGraph:
    """The graph with the symmetries that hold for a narrow twin of the model, and a line in the report.

    Symmetries that the twin refutes or does not have are dropped, and so are all of them where there is no twin:
    nothing is called interchangeable without proof.
    """
    from .build import build_graph

    try:
        with torch.random.fork_rng(devices=[]):
            twin = type(model)(shrunk(model.config)).eval()
        proposed = build_graph(twin, verify=False)
        refuted = PermutationTest(twin, *split_inputs(twin, None), proposed).refuted()
    except Exception as error:
        line = f"nothing is verified: there is no narrow twin of this model ({type(error).__name__}: {error})"
        return dataclasses.replace(graph, symmetries=(), report=(*graph.report, line))
    holds = {symmetry.name for symmetry in proposed.symmetries} - {symmetry.name for symmetry in refuted}
    kept = tuple(symmetry for symmetry in graph.symmetries if symmetry.name in holds)
    lines = [f"verified on a narrow twin of the model: {len(kept)} of {len(graph.symmetries)} symmetries"]
    lines += [f"refuted: {symmetry.name}" for symmetry in refuted]
    return dataclasses.replace(graph, symmetries=kept, report=(*graph.report, *lines))
