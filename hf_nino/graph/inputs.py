"""Small example inputs for a forward pass, where the model says what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from .media import media, pixels, sound
from .media_by_type import BY_TYPE
from .trace import quiet_forward

logger = logging.get_logger(__name__)

SEQUENCE_LENGTH = 8
"""Long enough for positions to differ; no axis of a network depends on it."""

TOKENS_PER_EXPERT = 8
"""Tokens that an expert gets on average, so that a router reaches all of a few."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")

LONGEST = 32
"""Bound on what mixtures of experts ask for; experts beyond it follow the pattern of those that were reached."""


def split_inputs(
    model: nn.Module, example_inputs: Any, tokens_per_expert: int = TOKENS_PER_EXPERT
) -> tuple[tuple, dict[str, Any]]:
    """Example inputs as (positional arguments, keyword arguments); made up for transformers models when ``None``.

    Args:
        example_inputs: a dict (keywords), a tuple or list (arguments), or one argument.
        tokens_per_expert: how long sentences are made up for mixtures of experts; 1 is enough where a router's choices
            are spread (:func:`hf_nino.graph.experts.spread_choices`).

    Raises:
        ValueError: none were given and the model does not say what it takes.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if example_inputs is not None:
        return (example_inputs,), {}
    return (), _transformers_inputs(model, tokens_per_expert)


def _transformers_inputs(model: nn.Module, tokens_per_expert: int) -> dict[str, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    main = getattr(inner, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"`example_inputs` must be given for a {type(model).__name__}, which does not say what it takes: "
            "pass what one call of the model gets: a tensor, a tuple of arguments or a dict of keyword arguments"
        )
    takes = set(inspect.signature(inner.forward).parameters)
    device = next(inner.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    inputs: dict[str, Any] = {}
    if (main == "pixel_values" and main in takes) or (main == "inputs" and "Image" in type(inner).__name__):
        inputs[main] = pixels(config, inner)
        if "spatial_shapes" in takes:
            inputs |= _patches(getattr(config, "vision_config", config))
        if "input_ids" in takes:
            inputs["input_ids"] = _tokens(inner, config, main, tokens_per_expert)
    elif main in ("input_ids", "inputs"):
        inputs[main] = _tokens(inner, config, main, tokens_per_expert)
    elif main in ("input_features", "input_values"):
        inputs[main] = sound(config, inner, main)
    else:
        raise ValueError(
            f"`example_inputs` must be given for a {type(model).__name__}, whose main input is {main!r}: "
            "pass a dict of keyword arguments for one call of the model"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(inner, config, "decoder_input_ids", tokens_per_expert)
    if "lang_ids" in takes and hasattr(config, "languages"):
        # Each language has adapters of its own: one row of the batch for each.
        inputs = {name: x.expand(len(config.languages), -1) for name, x in inputs.items()}
        inputs["lang_ids"] = torch.arange(len(config.languages))
    if main == "input_ids" and "decoder_input_ids" not in takes and _attends_elsewhere(inner):
        width = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", 1)
        states = torch.randn(1, SEQUENCE_LENGTH, width, generator=_generator())
        ways = {"encoder_hidden_states": states, "encoder_outputs": (states,)}
        inputs |= next(({name: value} for name, value in ways.items() if name in takes), {})
    if "global_attention_mask" in takes:
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, 0] = 1
    if "entity_ids" in takes:
        # Two entities, which the first four tokens mention.
        inputs["entity_ids"] = torch.tensor([[1, 2]])
        inputs["entity_position_ids"] = torch.tensor([[[0, 1], [2, 3]]])
    if "bbox" in takes and getattr(config, "visual_embed", False):
        inputs["pixel_values"] = pixels(config, inner)
    if "bbox" in takes:
        inputs["bbox"] = _boxes(config, inputs["input_ids"].shape[1])
    # A cache would be one more output, which pins keys and values.
    inputs |= {"use_cache": False} if hasattr(config, "use_cache") else {}
    fuller = BY_TYPE.get(getattr(config, "model_type", None), media)(inner, config, inputs, takes)
    # A model may need still more than an image or a sound; it is then traced on text alone.
    complete = fuller if fuller.keys() == inputs.keys() or _runs(inner, fuller) else inputs
    return tree_map_only(Tensor, lambda x: x.to(device), complete)


def _runs(model: nn.Module, inputs: dict[str, Any]) -> bool:
    device = next(model.parameters()).device
    try:
        with quiet_forward(model):
            model(**tree_map_only(Tensor, lambda x: x.to(device), inputs))
    except Exception as error:
        logger.info(f"{type(model).__name__} is traced on text alone: {type(error).__name__}: {error}")
        return False
    return True


def _attends_elsewhere(model: nn.Module) -> bool:
    """Whether a decoder without its encoder has weights for what the encoder would say."""
    names = ("encoder_attn", "crossattention", "cross_attn")
    return any(name.rsplit(".", 1)[-1] in names for name, _ in model.named_modules())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _vocabulary(model: nn.Module, config: Any) -> int:
    """Number of tokens, or of characters where embeddings are hashed."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    found = getattr(embedding, "num_embeddings", None) or getattr(_text(config), "vocab_size", None)
    return found or 256


def _length(config: Any, tokens_per_expert: int) -> int:
    """Tokens of a sequence: more where experts are to be reached or attention is sparse by blocks."""
    text = _text(config)
    length = SEQUENCE_LENGTH
    experts, chosen = (_first_int(text, names) for names in (EXPERTS, EXPERTS_PER_TOKEN))
    length = max(length, min(LONGEST, tokens_per_expert * experts // max(1, chosen)))
    if getattr(text, "attention_type", None) == "block_sparse":
        # Shorter sequences switch to full attention for good.
        length = (6 + 2 * text.num_random_blocks) * text.block_size
    limit = getattr(text, "max_position_embeddings", None)
    return min(length, limit) if isinstance(limit, int) and limit > 0 else length


def _first_int(config: Any, names: tuple[str, ...]) -> int:
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)


def _special_tokens(config: Any) -> Iterator[int]:
    """Tokens with a meaning (padding, image, audio), which would call for more inputs."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    for part in {id(c): c for c in (config, _text(config), *parts) if c is not None}.values():
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                yield from value if isinstance(value, (list, tuple)) else [value]


def _tokens(model: nn.Module, config: Any, name: str, tokens_per_expert: int) -> Tensor:
    vocabulary = _vocabulary(model, config)
    special = {token for token in _special_tokens(config) if isinstance(token, int)}
    plain = torch.tensor([token for token in range(vocabulary) if token not in special] or range(vocabulary))
    tokens = plain[torch.randint(0, len(plain), (1, _length(config, tokens_per_expert)), generator=_generator())]
    end = getattr(config, "eos_token_id", None)
    if name == "input_ids" and getattr(config, "is_encoder_decoder", False) and isinstance(end, int):
        # Classifiers of this family read the state of the last token that ends a sentence.
        tokens[:, -1] = end
    return tokens


def _patches(vision: Any) -> dict[str, Tensor]:
    """Images as flattened patches, each image with a shape of its own."""
    side = max(2, int(vision.num_patches**0.5))
    values = torch.randn(1, side * side, vision.num_channels * vision.patch_size**2, generator=_generator())
    return {
        "pixel_values": values,
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[side, side]]),
    }


def _boxes(config: Any, length: int) -> Tensor:
    """One box (x0, y0, x1, y1) for each token, corners in order."""
    limit = min(1000, getattr(config, "max_2d_position_embeddings", 1000) - 1)
    corners = torch.randint(0, limit, (1, length, 2, 2), generator=_generator()).sort(dim=2).values
    return corners.flatten(2)
