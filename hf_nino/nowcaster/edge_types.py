"""The edge type of every element of a parameter, for nowcasters that work without a neural graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..graph import EdgeBlock, EdgeType

# Endings of module names, by what the module does; the names in use among the models of transformers.
_QUERY = ("q_proj", "query", "q_lin", "to_q")
_KEY = ("k_proj", "key", "k_lin", "to_k")
_VALUE = ("v_proj", "value", "v_lin", "to_v")
_FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv")
_TOKENS = ("wte", "embed_tokens", "word_embeddings", "tok_embeddings", "embed_in", "tokens_embed")
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "position_embedding")


def edge_types_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """Edge type of every element, from a parameter's name and shape: int8, of that shape; not to be written to.

    The rule of the original release, with the names of more architectures: weights of one dimension are norms, of four
    dimensions convolutions, of two dimensions linear unless the name says token or position embedding, query, key or
    value; everything else is :attr:`EdgeType.OTHER`.  Fused query, key and value weights are split in three along
    their longer axis when it is three times the shorter one.
    """
    module, _, leaf = name.rpartition(".")
    module = module.rpartition(".")[2]
    kinds = torch.tensor(_edge_type(module, leaf, len(shape)), dtype=torch.int8)
    if leaf == "weight" and module in _FUSED and len(shape) == 2 and max(shape) == 3 * min(shape):
        kinds = torch.tensor([EdgeType.QUERY, EdgeType.KEY, EdgeType.VALUE], dtype=torch.int8)
        kinds = kinds.repeat_interleave(min(shape))
        kinds = kinds if shape[1] > shape[0] else kinds[:, None]
    return kinds.expand(shape)


def edge_types_of_blocks(blocks: Iterable[EdgeBlock], shape: tuple[int, ...]) -> Tensor:
    """Edge type of every element of a parameter, or of rows of it, from the blocks of these: int8, of that shape."""
    types = torch.zeros(shape, dtype=torch.int8)
    for block in blocks:
        block.write(types, torch.full(block.shape, int(block.edge_type), dtype=torch.int8))
    return types


def _edge_type(module: str, leaf: str, dimensions: int) -> EdgeType:
    if leaf == "weight" and dimensions == 1:
        return EdgeType.NORM
    if dimensions == 4:
        return EdgeType.CONVOLUTION
    if dimensions != 2:
        return EdgeType.OTHER
    by_name = (
        (_TOKENS, EdgeType.TOKEN_EMBEDDING),
        (_POSITIONS, EdgeType.POSITION_EMBEDDING),
        (_QUERY, EdgeType.QUERY),
        (_KEY, EdgeType.KEY),
        (_VALUE, EdgeType.VALUE),
    )
    for endings, kind in by_name:
        if module in endings:
            return kind
    return EdgeType.OTHER if "embed" in module else EdgeType.LINEAR
