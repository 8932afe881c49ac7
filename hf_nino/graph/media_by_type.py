"""What some types of models take beside or instead of tokens, where :mod:`hf_nino.graph.media` cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

GRID = 4
"""Patches along each side of an image that is cut into patches beforehand."""


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _with_placeholders(inputs: dict[str, Any], token: int, count: int) -> Tensor:
    """The tokens, followed by ``count`` times the one that stands for an image or a sound."""
    return torch.cat([inputs["input_ids"], torch.full((1, count), token)], dim=1)


def _codebooks(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """One row of tokens for each codebook of one sample."""
    return inputs | {"input_ids": inputs["input_ids"].repeat(config.num_codebooks, 1)}


def _image_states(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """States of an image encoder that is not part of the model."""
    return inputs | {"cross_attention_states": _random(1, inputs["input_ids"].shape[1], config.hidden_size)}


def _streamed_speech(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """Sound as long as the text: its encoder halves the frames, and its projector joins ``downsample_factor``."""
    frames = 2 * config.downsample_factor * inputs["input_ids"].shape[1]
    return inputs | {"input_features": _random(1, config.audio_config.num_mel_bins, frames)}


def _shared_keys(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """What an assistant gets from the model that it assists: its states, and keys and values by kind of layer."""
    text, length = config.get_text_config(), inputs["input_ids"].shape[1]
    shared = {}
    for number, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[number]
        pair = _random(2, 1, layer.num_key_value_heads, length, layer.head_dim)
        shared[kind] = (pair[0], pair[1])
    return {"inputs_embeds": _random(1, length, 2 * config.backbone_hidden_size), "shared_kv_states": shared}


def _patches_on_grid(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """One image as flattened patches of two frames, and its grid (frames, rows, columns)."""
    if getattr(config, "vision_config", None) is None:
        return inputs
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = _with_placeholders(inputs, config.image_token_id, (GRID // vision.spatial_merge_size) ** 2)
    return inputs | {
        "input_ids": tokens,
        "mm_token_type_ids": (tokens == config.image_token_id).long(),
        "pixel_values": _random(GRID**2, width),
        "image_grid_thw": torch.tensor([[1, GRID, GRID]]),
    }


def _flat_patches(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """Patches of three channels in one list, and a placeholder for each."""
    return inputs | {
        "input_ids": _with_placeholders(inputs, config.image_token_id, GRID),
        "pixel_values": _random(GRID, 3 * config.patch_size**2),
    }


def _sound_wave(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """A sound wave without the noise that training adds, as long as gives one placeholder for each token."""
    hop = config.acoustic_tokenizer_encoder_config.hop_length
    count = inputs["input_ids"].shape[1]
    return inputs | {
        "input_ids": _with_placeholders(inputs, config.audio_token_id, count),
        "input_values": _random(1, 1, hop * count),
        "sample": False,
    }


def _image_and_sound(model: nn.Module, config: Any, inputs: dict[str, Any], takes: set[str]) -> dict[str, Any]:
    """One image as a whole and as one crop, and a sound."""
    vision, audio = config.vision_config, config.audio_config
    side = vision.image_size // vision.patch_size
    base = (side + 1) // 2
    frames = 8 * audio.time_reduction
    tokens = _with_placeholders(inputs, vision.image_token_id, 2 * base * (base + 1) + 1)
    return inputs | {
        "input_ids": _with_placeholders({"input_ids": tokens}, audio.audio_token_id, 8),
        "image_pixel_values": _random(1, 2, vision.num_channels, vision.image_size, vision.image_size),
        "image_sizes": torch.tensor([[vision.crop_size, vision.crop_size]]),
        "image_attention_mask": torch.ones(1, 2, side, side, dtype=torch.int64),
        "audio_input_features": _random(1, frames, audio.input_size),
        "audio_embed_sizes": torch.tensor([8]),
        "audio_attention_mask": torch.ones(1, frames, dtype=torch.bool),
    }


BY_TYPE: Mapping[str, Callable[[nn.Module, Any, dict[str, Any], set[str]], dict[str, Any]]] = {
    "fuyu": _flat_patches,
    "gemma4_assistant": _shared_keys,
    "gemma4_unified_assistant": _shared_keys,
    "mllama_text_model": _image_states,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "neomme": _flat_patches,
    "phi4_multimodal": _image_and_sound,
    "qwen3_5": _patches_on_grid,
    "vibevoice_asr": _sound_wave,
    "voxtral_realtime": _streamed_speech,
}
"""Functions of the model, its configuration, inputs so far and names of arguments."""
