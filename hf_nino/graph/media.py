"""An image or a sound beside the text, for models that read both."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .trace import quiet_forward

FRAMES = 80
"""Length of a sound whose model does not say how long it must be; a multiple of what encoders join."""

SAMPLES = 4000
"""Length of a sound wave: a quarter of a second at 16 kHz, which leaves a few frames."""


def pixels(config: Any, model: nn.Module) -> Tensor:
    """A random image [1, channels, height, width] of the size that the configuration names."""
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", getattr(config, "input_size", 32))
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return _random(model, 1, getattr(config, "num_channels", 3), height, width)


def sound(config: Any, model: nn.Module, name: str) -> Tensor:
    """A random sound: a wave [1, samples], or features [1, bins, frames] as long as the model's positions ask for."""
    if name == "input_values":
        return _random(model, 1, SAMPLES)
    frames = 2 * (getattr(config, "max_source_positions", None) or FRAMES // 2)
    return _random(model, 1, getattr(config, "num_mel_bins", 80), frames)


def media(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """The inputs with an image and a sound, where the model takes them, and as many placeholders as it asks for.

    Unchanged where a model needs more than that (grids, crops, several encoders).

    Args:
        inputs: ``input_ids`` are int64 [1, length], without placeholders.
        takes: names of the arguments of a call.
    """
    config = getattr(config, "encoder", config)
    for one in (_image, _sound):
        if isinstance(inputs.get("input_ids"), Tensor):
            inputs = inputs | one(model, config, inputs["input_ids"], takes)
    return inputs


def _image(model: nn.Module, config: Any, tokens: Tensor, takes: set[str]) -> dict[str, Tensor]:
    if "pixel_values" not in takes or not hasattr(getattr(config, "vision_config", None), "image_size"):
        return {}
    image = pixels(config, model)
    # Some take several images for each sample, in a dimension of their own.
    for values in (image, image[None]):
        count = _features(model, "get_image_features", {"pixel_values": values})
        if count:
            return {"pixel_values": values} | _placeholders(config, "image", tokens, count)
    return {} if _encoders(model, "get_image_features") else {"pixel_values": image}


def _sound(model: nn.Module, config: Any, tokens: Tensor, takes: set[str]) -> dict[str, Tensor]:
    encoder = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None)
    if "input_features" not in takes or encoder is None or getattr(config, "audio_token_id", None) is None:
        return {}
    encoder = getattr(encoder, "asr_config", None) or encoder
    frames = 2 * (getattr(encoder, "max_source_positions", None) or getattr(encoder, "n_window", None) or FRAMES // 2)
    bins = getattr(encoder, "num_mel_bins", 1)
    mask = torch.ones(1, frames, dtype=torch.int64)
    # Two halvings are the rule; what needs the placeholders to encode the sound cannot be asked for their number.
    count = frames // 4
    given = {
        "input_features_mask": mask,
        "feature_attention_mask": mask,
        "padding_mask": torch.ones(1, getattr(config, "audio_chunk_size", frames), dtype=torch.int64),
        **_placeholders(config, "audio", tokens, count),
    }
    encoders = _encoders(model, "get_audio_features")
    own = takes & (set(inspect.signature(encoders[-1].get_audio_features).parameters) if encoders else takes)
    extra = {name: value for name, value in given.items() if name in own and name != "input_ids"}
    for shape in ((1, bins, frames), (1, frames, bins), (1, frames, getattr(encoder, "input_dim", bins))):
        features = _random(model, *shape)
        if encoders:
            count = _features(model, "get_audio_features", {"input_features": features} | given)
        if count:
            return {"input_features": features} | extra | _placeholders(config, "audio", tokens, count)
    return {}


def _random(model: nn.Module, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).dtype)


def _placeholders(config: Any, kind: str, tokens: Tensor, count: int) -> dict[str, Tensor]:
    """The tokens, followed by ``count`` times the one that stands for an image or a sound."""
    token = getattr(config, f"{kind}_token_id", None)
    if token is None:
        return {}
    return {"input_ids": torch.cat([tokens, torch.full((1, count), token)], dim=1)}


def _features(model: nn.Module, method: str, given: dict[str, Tensor]) -> int:
    """How many vectors the encoder makes of its input; 0 when it does not take it."""
    encoders = _encoders(model, method)
    if not encoders:
        return 0
    # The innermost one says what it takes; those around it pass on what they get.
    encode = getattr(encoders[-1], method)
    device = next(model.parameters()).device
    names = inspect.signature(encode).parameters
    try:
        with quiet_forward(model):
            output = encode(**{name: value.to(device) for name, value in given.items() if name in names})
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return 0
    output = getattr(output, "pooler_output", output)
    return sum(part.numel() // part.shape[-1] for part in tree_leaves(output) if isinstance(part, Tensor))


def _encoders(model: nn.Module, method: str) -> list[nn.Module]:
    """The modules, outermost first, that encode an image or a sound by a method of this name."""
    return [module for module in model.modules() if hasattr(module, method)]
