"""Thirty diverse types of transformers, for tests that hold whatever a model is made of.

Models are tiny, random and made offline (:mod:`hf_nino.graph.tiny`); their graphs are traced once in a test run.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

from hf_nino.graph import EdgeType, NeuralGraph
from hf_nino.graph.sweep import KINDS
from hf_nino.graph.tiny import tiny_model

CLEAN = "every proposal holds, and (almost) all elements are placed; most of them move"
"""What ``is_clean`` of ``test_sweep.py`` tests."""

SAMPLE = {
    ("causal-lm", "gpt2"): CLEAN,  # fused qkv, learned positions, tied embeddings
    ("causal-lm", "llama"): CLEAN,  # rotary, grouped queries
    ("causal-lm", "gpt_bigcode"): CLEAN,  # one key/value head
    ("causal-lm", "phi"): CLEAN,  # partial rotary, parallel blocks
    ("causal-lm", "gpt_neox"): CLEAN,  # interleaved fused qkv
    ("causal-lm", "qwen3"): CLEAN,  # norms of queries and keys
    ("causal-lm", "gemma3_text"): CLEAN,  # sliding windows, four norms a layer
    ("causal-lm", "bloom"): CLEAN,  # ALiBi
    ("causal-lm", "mpt"): CLEAN,  # ALiBi, clamped fused qkv
    ("causal-lm", "mixtral"): CLEAN,  # experts
    ("causal-lm", "qwen2_moe"): CLEAN,  # shared experts
    ("causal-lm", "gpt_oss"): CLEAN,  # attention sinks, biased experts
    ("causal-lm", "deepseek_v3"): CLEAN,  # latent attention, a shared expert
    ("causal-lm", "mamba"): CLEAN,  # state space, depthwise convolution
    ("causal-lm", "mamba2"): CLEAN,  # state space with heads
    ("causal-lm", "jamba"): CLEAN,  # state space, attention and experts in turn
    ("causal-lm", "qwen3_next"): CLEAN,  # linear attention, gated attention, experts
    ("causal-lm", "recurrent_gemma"): CLEAN,  # recurrence with block-diagonal gates, one key/value head
    ("masked-lm", "bert"): CLEAN,  # encoder, post-norm
    ("masked-lm", "deberta-v2"): CLEAN,  # relative positions with projections of their own
    ("masked-lm", "albert"): CLEAN,  # all layers share their parameters
    ("seq2seq-lm", "t5"): CLEAN,  # encoder and decoder, relative position bias
    ("seq2seq-lm", "bart"): CLEAN,  # encoder and decoder, learned positions
    ("image-classification", "vit"): CLEAN,  # patches, class token
    ("image-classification", "swin"): CLEAN,  # windows, patch merging
    ("image-classification", "convnext"): CLEAN,  # depthwise convolution, layer scale
    ("image-classification", "resnet"): CLEAN,  # batch norm, shortcuts
    ("image-classification", "mobilenet_v2"): CLEAN,  # inverted residuals
    ("sequence-classification", "llama"): CLEAN,  # an output of few neurons
    ("sequence-classification", "xlnet"): "two-stream attention uses its output matrix transposed",
}
"""Type by type, what is known to be right, or why it is not; a reason that no longer holds fails the test."""

UNFOLLOWED = re.compile(
    "no rule|rule of .* failed|could not be followed|not reached by|refuted by|in no one-to-one way|several neurons"
    "|contracted with data|order of neurons|mixes neurons|along neurons|two axes of neurons|different rank"
    "|read by a batch|convolved in groups|copied out of order|was reduced|that is no parameter"
)
"""Reasons that pin neurons because the trace lost sight of them: they may be interchangeable all the same."""

each_type = pytest.mark.parametrize(("kind", "model_type"), SAMPLE, ids=lambda value: value)
"""Runs a test for every type of the sample."""


def sample_model(kind: str, model_type: str) -> nn.Module:
    """The tiny model of a type, with random weights."""
    return tiny_model(KINDS[kind], model_type)


@functools.cache
def sample_graph(kind: str, model_type: str) -> NeuralGraph:
    """Its verified graph."""
    return NeuralGraph.from_model(sample_model(kind, model_type))


def rolled(graph: NeuralGraph, number: int) -> torch.Tensor:
    """The permutation that puts each neuron of a group in the place of its neighbour, int64 [N].

    A head moves with its channels, as far as they are its alone.
    """
    group, start = graph.groups[number], graph.group_offsets[number]
    order = torch.arange(group.size).roll(1)
    permutation = torch.arange(graph.num_nodes)
    permutation[start : start + group.size] = start + order
    stars = [c for c in graph.constants if c.edge_type == EdgeType.HEAD and c.source.group == number]
    if stars:
        head = torch.cat([star.source.index() for star in stars])
        channel = torch.cat([graph.node_index(star.target) for star in stars])
        channels = torch.stack([channel[head == index] for index in range(group.size)])
        permutation[channels] = channels[order]
    return permutation
