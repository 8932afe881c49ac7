"""Small example inputs for a forward pass, where the model says what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE_LENGTH = 8
"""Long enough for positions to differ; no axis of a network depends on it."""


def split_inputs(model: nn.Module, example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Example inputs as (positional arguments, keyword arguments); made up for transformers models when ``None``.

    Args:
        example_inputs: a dict (keywords), a tuple or list (arguments), or one argument.

    Raises:
        ValueError: none were given and the model does not say what it takes.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if example_inputs is not None:
        return (example_inputs,), {}
    return (), _transformers_inputs(model)


def _transformers_inputs(model: nn.Module) -> dict[str, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    main = getattr(inner, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"`example_inputs` must be given for a {type(model).__name__}, which does not say what it takes: "
            "pass what one call of the model gets: a tensor, a tuple of arguments or a dict of keyword arguments"
        )
    if main == "pixel_values":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        inputs: dict[str, Any] = {"pixel_values": _pixels(getattr(config, "vision_config", text), inner)}
    elif main == "input_ids":
        inputs = {"input_ids": _tokens(inner, config)}
    else:
        raise ValueError(
            f"`example_inputs` must be given for a {type(model).__name__}, whose main input is {main!r}: "
            "pass a dict of keyword arguments for one call of the model"
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(inner, config)
    # A cache would be one more output, which pins keys and values.
    return inputs | ({"use_cache": False} if hasattr(config, "use_cache") else {})


def _tokens(model: nn.Module, config: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None) or SEQUENCE_LENGTH
    length = max(1, min(SEQUENCE_LENGTH, limit))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
    padding = getattr(text, "pad_token_id", None)
    if padding is not None and vocabulary > 2:
        tokens[tokens == padding] = (padding + 1) % vocabulary
    return tokens.to(model.get_input_embeddings().weight.device)


def _pixels(config: Any, model: nn.Module) -> Tensor:
    size = getattr(config, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, height, width, generator=generator).to(parameter.device, parameter.dtype)
