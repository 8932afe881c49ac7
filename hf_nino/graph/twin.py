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

from .acceptance import parts_by_use, verified
from .inputs import split_inputs
from .structure import NeuralGraph, Symmetry
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
        if part is not None:
            _shrink(part)
    return config


def _shrink(part: Any) -> None:
    # What a configuration stores; others of its attributes are computed from these.
    stored = dict(vars(part))
    widths = {name for name, value in stored.items() if isinstance(value, int)}
    for name in widths & WIDTHS.keys():
        setattr(part, name, min(WIDTHS[name], stored[name]))
    heads = next((stored[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in stored), None)
    if "head_dim" in widths and "qk_rope_head_dim" not in stored:
        # Mamba 2 is wider inside than its stream.
        part.head_dim = HEAD_SIZE * (stored["expand"] if "expand" in widths else 1)
    if stored.get("head_dim") == stored.get("qk_rope_head_dim") is not None:
        # Latent attention rotates channels of their own, which is what its configuration calls the size of a head.
        part.head_dim = part.qk_rope_head_dim
    if "qk_head_dim" in stored:
        part.qk_head_dim = part.qk_nope_head_dim + part.qk_rope_head_dim
    for name in widths & {"hidden_size", "n_embd", "d_model"}:
        if isinstance(heads, int):
            setattr(part, name, heads * HEAD_SIZE)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(part, name, None)
        if isinstance(token, int):
            setattr(part, name, token % WIDTHS["vocab_size"])
        elif isinstance(token, Sequence):
            setattr(part, name, [each % WIDTHS["vocab_size"] for each in token])


class TwinTest:
    """A permutation test of a twin, asked about a large model's symmetries, which have the same names.

    Args:
        graph: of the large model.
        twin: the twin's graph, with all of its proposed symmetries.
        test: of the twin.
    """

    def __init__(self, graph: NeuralGraph, twin: NeuralGraph, test: PermutationTest) -> None:
        self.twin, self.test = twin, test
        failed = {symmetry.name for symmetry in test.refuted()}
        self._refuted = [symmetry for symmetry in graph.symmetries if symmetry.name in failed]
        self.remarks, self.conclusive = test.remarks, test.conclusive

    def refuted(self) -> list[Symmetry]:
        """The large model's symmetries whose namesakes do not hold."""
        return self._refuted

    def holds(self, part: Symmetry) -> bool:
        """Whether the same part of a refuted symmetry holds for the twin."""
        cuts = (parts_by_use(self.twin, whole, apart) for apart in (False, True) for whole in self.twin.symmetries)
        found = next((own for cut in cuts for own in cut or () if own.name == part.name), None)
        return found is not None and self.test.holds(found)


def verified_by_twin(model: nn.Module, graph: NeuralGraph) -> NeuralGraph:
    """The graph with what holds for a narrow twin of the model, as if it had been tested itself, and a line about it.

    Symmetries that the twin does not have are dropped, and so are all of them where there is no twin: nothing is
    called interchangeable without proof.
    """
    from .build import build_graph

    try:
        with torch.random.fork_rng(devices=[]):
            twin = type(model)(shrunk(model.config)).eval()
        proposed = build_graph(twin, verify=False)
        test = TwinTest(graph, proposed, PermutationTest(twin, *split_inputs(twin, None), proposed))
    except Exception as error:
        line = f"nothing is verified: there is no narrow twin of this model ({type(error).__name__}: {error})"
        return dataclasses.replace(graph, symmetries=(), report=(*graph.report, line))
    names = {symmetry.name for symmetry in proposed.symmetries}
    missing = [symmetry.name for symmetry in graph.symmetries if symmetry.name not in names]
    known = tuple(symmetry for symmetry in graph.symmetries if symmetry.name in names)
    result = verified(dataclasses.replace(graph, symmetries=known), test)
    lines = [f"verified on a narrow twin of the model: {len(result.symmetries)} of {len(graph.symmetries)} symmetries"]
    lines += [f"not verified, since the twin has no such symmetry: {name}" for name in missing]
    return dataclasses.replace(result, report=(*result.report, *lines))
