"""A tiny random model of every type in transformers, made offline, to prove graphs on.

A type's own default configuration is shrunk by the names of its attributes (:data:`SMALL`), keeping one layer of
every kind that it has.  What the rules cannot know stands in one table (:data:`EXCEPTIONS`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MAPPINGS: Mapping[str, str] = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
"""The automatic classes whose types are covered, and where transformers lists them."""

NUM_LABELS = 5

# Widths differ wherever a model allows it, so that no two axes can be taken for each other.
_BY_VALUE: Mapping[int, str] = {
    32: "hidden_size d_model n_embd dim embed_dim emb_dim hidden_dim projection_dim projection_size "
    "pooler_output_size pooler_hidden_size out_hidden_size output_dim encoder_hidden_size d_latents",
    48: "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner dff dim_ff",
    96: "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input",
    40: "max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len "
    "max_2d_position_embeddings",
    24: "embedding_size moe_intermediate_size expert_ffn_hidden_size",
    20: "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size kv_lora_rank",
    28: "q_lora_rank",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_self_attention_heads num_cross_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts qk_rope_head_dim rotary_dim patch_size sliding_window local_attention linear_num_value_heads "
    "linear_num_heads index_n_heads index_topk num_blocks_per_stage swa_num_attention_heads",
    8: "head_dim d_kv dim_head d_head qk_nope_head_dim linear_key_head_dim linear_head_dim index_head_dim "
    "mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim relative_attention_num_buckets swa_head_dim",
    6: "v_head_dim",
    12: "linear_value_head_dim mamba_d_state ssm_state_size state_size hidden_size_per_layer_input num_mel_bins",
    10: "time_step_rank mamba_dt_rank",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk moe_top_k "
    "num_experts_per_token decoder_sparse_step linear_num_key_heads swa_num_key_value_heads "
    "mamba_n_groups n_groups top_k_experts",
    1: "n_group topk_group num_expert_group first_k_dense_replace",
    16: "image_size num_position_embeddings",
}
SMALL: Mapping[str, int] = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
"""Value by attribute name."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth")
"""Names of the number of layers, which per-layer lists follow."""

_LOCAL_AND_GLOBAL = ("sliding_attention", "full_attention")
_STAGES = dict(hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1], embedding_size=12, image_size=32)
_PYRAMID = _STAGES | dict(hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4], mlp_ratios=[3, 3, 2, 2])
_SWIN = dict(embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, image_size=32)
_ROPE = dict(rope_type="default", rope_theta=1e4)
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "axk2": dict(gated_norm_rank=10),
    "bamba": dict(mamba_chunk_size=4, attn_layer_indices=[1]),
    "big_bird": dict(block_size=4, num_random_blocks=1),
    "bigbird_pegasus": dict(block_size=4, num_random_blocks=1),
    "bit": _STAGES | dict(num_groups=2),
    "blt": dict(encoder_hash_byte_group_size=[3, 4], encoder_hash_byte_group_vocab=50, local_attention_window_len=8),
    "blt_local_decoder": dict(hidden_size_global=32),
    "blt_local_encoder": dict(hidden_size_global=32),
    "canine": dict(num_hash_buckets=60, local_transformer_stride=8),
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "cohere_compass_text": dict(rope_parameters={"full_attention": dict(_ROPE, mrope_section=[2, 1, 1])}),
    "cpmant": dict(position_bias_num_buckets=12, position_bias_max_distance=16, prompt_length=3, segment_types=3),
    "cvt": dict(embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0)),
    "deepseek_v4": dict(
        o_groups=2,
        o_lora_rank=12,
        num_key_value_heads=1,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    "dinat": dict(embed_dim=16, depths=[1, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1], [1, 2]]),
    "donut-swin": _SWIN,
    "dots1": dict(n_shared_experts=1, num_key_value_heads=2),
    "dots3_note_audio_encoder": dict(adapter_input_size=32, adapter_out_dim=32),
    "dots3_note_text": dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=28, swa_kv_lora_rank=20,
        swa_head_dim=12, swa_qk_nope_head_dim=8, swa_v_head_dim=6,
    ),
    "dots3_note_vision_encoder": dict(embed_dim=32, adapter_in_dim=32, adapter_out_dim=32),
    "efficientnet": dict(
        image_size=32, width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=4, hidden_dim=1280,
        in_channels=[32, 12, 16], out_channels=[12, 16, 24], kernel_sizes=[3, 5, 3], strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1], expand_ratios=[1, 4, 6],
    ),
    "esm": dict(pad_token_id=1, mask_token_id=95),
    "esmc": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_d_ssm=64),
    "encoder-decoder": dict(decoder=dict(is_decoder=True, add_cross_attention=True)),
    "flint": dict(mlp_only_layers=[0]),
    "focalnet": dict(embed_dim=16, depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3], image_size=32),
    "gemma3": dict(mm_tokens_per_image=4),
    "gemma3n_text": dict(
        num_hidden_layers=4, num_kv_shared_layers=2, laurel_rank=10,
        layer_types=[*_LOCAL_AND_GLOBAL] * 2,
    ),
    "gemma4_text": dict(enable_moe_block=True, global_head_dim=12, num_global_key_value_heads=1),
    "gemma4_unified_assistant": dict(
        backbone_hidden_size=24,
        text_config=dict(
            num_hidden_layers=4, num_kv_shared_layers=2, layer_types=[*_LOCAL_AND_GLOBAL] * 2
        ),
    ),
    "gemma4_unified_text": dict(global_head_dim=12),
    "got_ocr2_vision": dict(output_channels=12, mlp_dim=48, global_attn_indexes=[1], window_size=2),
    "glmasr_encoder": dict(intermediate_size=128),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4),
    "granitemoehybrid": dict(mamba_chunk_size=4, layer_types=["linear_attention", "full_attention"]),
    "hgnet_v2": dict(
        depths=[1, 2], hidden_sizes=[16, 24], embedding_size=12, stem_channels=[3, 8, 12], image_size=32,
        stage_in_channels=[12, 16], stage_mid_channels=[8, 10], stage_out_channels=[16, 24], stage_num_blocks=[1, 2],
        stage_downsample=[False, True], stage_downsample_strides=[2, 2], stage_light_block=[False, True],
        stage_kernel_size=[3, 5], stage_numb_of_layers=[2, 3],
    ),
    "hiera": dict(
        embed_dim=16, image_size=[32, 32], depths=[1, 1, 2], num_heads=[1, 2, 4], num_query_pool=2,
        masked_unit_size=[4, 4], patch_size=[7, 7], masked_unit_attention=[True, True, False],
    ),
    "jamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4),
    "layoutlmv3": dict(coordinate_size=6, shape_size=4, input_size=16),
    "levit": dict(
        hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[2, 1, 2], key_dim=[8, 8, 8], image_size=64,
        patch_size=16,
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3, num_dense_layers=1),
    "lilt": dict(hidden_size=48),
    "llama4_text": dict(
        num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], moe_layers=[1, 3], attention_chunk_size=4,
        intermediate_size_mlp=40,
    ),
    "longcat_flash": dict(zero_expert_num=2),
    "luke": dict(entity_vocab_size=12, entity_emb_size=20),
    "mamba2": dict(num_heads=8, head_dim=8, chunk_size=4),
    "markuplm": dict(
        max_depth=4, max_xpath_tag_unit_embeddings=12, max_xpath_subs_unit_embeddings=12, xpath_unit_hidden_size=6,
        tag_pad_id=11, subs_pad_id=11,
    ),
    "mllama_text_model": dict(cross_attention_layers=[1]),
    "mobilebert": dict(embedding_size=20, intra_bottleneck_size=24),
    "mobilenet_v1": dict(image_size=32, depth_multiplier=0.25),
    "mobilenet_v2": dict(image_size=32, depth_multiplier=0.25),
    "mobilevit": dict(
        hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 40], image_size=64, patch_size=2
    ),
    "mobilevitv2": dict(
        width_multiplier=0.25, base_attn_unit_dims=[32, 64, 96], n_attn_blocks=[1, 2, 1], image_size=64,
        patch_size=2,
    ),
    "mpnet": dict(relative_attention_num_buckets=32),
    "nemo_speechlm": dict(audio_config=dict(diarization_config=dict(head_config=dict(audio_hidden_size=32)))),
    "nemotron_h": dict(chunk_size=4),
    "nemotron3_5_transcribe_asr_audio": dict(num_key_value_heads=4),
    "nemotron3_diarization_audio": dict(num_key_value_heads=4),
    "neomme": dict(rope_parameters={k: dict(_ROPE, partial_rotary_factor=0.5) for k in _LOCAL_AND_GLOBAL}),
    "perceiver": dict(num_latents=12, num_self_attends_per_block=2, image_size=8),
    "phi4_multimodal": dict(
        vision_config=dict(image_token_id=90, crop_size=16), audio_config=dict(audio_token_id=91, input_size=80)
    ),
    "phi4_multimodal_audio": dict(
        num_blocks=2, nemo_conv_channels=12, ext_pw_out_channel=32, depthwise_separable_out_channel=32
    ),
    "poolformer": _STAGES,
    "pp_lcnet": dict(
        stem_channels=8, class_expand=40, image_size=32,
        block_configs=[
            [[3, 8, 12, 1, False]], [[3, 12, 16, 2, False], [3, 16, 16, 1, False]], [[5, 16, 20, 2, False]],
            [[3, 20, 24, 2, False]], [[5, 24, 28, 2, True]],
        ],
    ),
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID | dict(image_size=[64, 64]),
    "qwen3_asr_encoder": dict(downsample_hidden_size=12),
    "qwen4_exp_text": dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2,
        hc_lowrank=20, output_gate_type="sigmoid",
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        axial_pos_embds_dim=[12, 20], axial_pos_shape=[4, 10], local_attn_chunk_length=4, lsh_attn_chunk_length=4,
        feed_forward_size=48, attention_head_size=8, hash_seed=0,
    ),
    "regnet": _STAGES | dict(groups_width=8),
    "resnet": _STAGES,
    "roc_bert": dict(
        shape_vocab_size=50, pronunciation_vocab_size=60, shape_embed_dim=20, pronunciation_embed_dim=28
    ),
    "segformer": _PYRAMID | dict(image_size=64),
    "shieldgemma2": dict(mm_tokens_per_image=4, yes_token_index=10, no_token_index=11),
    "siglip2_vision_model": dict(num_patches=16),
    "squeezebert": dict(embedding_size=32),
    "swiftformer": dict(embed_dims=[16, 24, 32, 40], depths=[1, 2, 1, 1], image_size=64),
    "switch_transformers": dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "swin": _SWIN,
    "swinv2": _SWIN | dict(pretrained_window_sizes=[0, 0]),
    "t5gemma2_encoder": dict(mm_tokens_per_image=4),
    "textnet": dict(
        stem_out_channels=8, hidden_sizes=[8, 12, 16, 24, 32], image_size=[32, 32],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 1]], [[3, 3], [3, 1]]],
        conv_layer_strides=[[1], [2, 1], [2], [2, 1]],
    ),
    "vibevoice_acoustic_tokenizer_encoder": dict(
        num_filters=8, downsampling_ratios=[2, 2], depths=[1, 2, 1], hidden_size=16
    ),
    "voxtral": dict(audio_token_id=95),
    "voxtral_encoder": dict(intermediate_size=128),
    "xmod": dict(languages=["en_XX", "de_DE"]),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip
"""What the rules do not get right, by ``model_type`` of a configuration or of a part of one."""

NOT_OFFLINE: Mapping[str, str] = {
    "dinat": "needs natten, whose neighbourhood attention has no substitute in torch",
    "gemma4_assistant": "must share the keys of all its layers, which its kv_sharing_modes refuses",
    "gemma3n": "needs timm for its vision tower; its language model, gemma3n_text, is covered",
    "layoutlmv2": "needs detectron2 for its visual backbone",
    "timm_wrapper": "needs timm, which all of its models come from",
}
"""Types that need more than transformers and torch to be instantiated, with the reason."""


def model_types(auto_class_name: str) -> list[str]:
    """The model types behind an automatic class, in the order in which transformers lists them.

    Raises:
        ValueError: the class is not one of :data:`MAPPINGS`.
    """
    if auto_class_name not in MAPPINGS:
        raise ValueError(f"`auto_class_name` must be one of {', '.join(MAPPINGS)}, got {auto_class_name!r}")
    return list(getattr(modeling_auto, MAPPINGS[auto_class_name]))


def tiny_model(auto_class_name: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of a type with less than three million random parameters, in evaluation mode.

    Args:
        auto_class_name: such as ``"AutoModelForCausalLM"``.
        model_type: one of :func:`model_types`, such as ``"llama"``.
        seed: of the random weights; the global random state is left alone.

    Raises:
        ValueError: the class or the type is unknown, or the type is in :data:`NOT_OFFLINE`.
    """
    if model_type not in model_types(auto_class_name):
        raise ValueError(f"`model_type` must be a type behind {auto_class_name}, got {model_type!r}")
    if model_type in NOT_OFFLINE:
        raise ValueError(f"`model_type` must be one that can be made offline: {model_type} {NOT_OFFLINE[model_type]}")
    names = getattr(modeling_auto, MAPPINGS[auto_class_name])[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config_class = CONFIG_MAPPING[model_type]
    overrides = {"num_labels": NUM_LABELS} if "Classification" in auto_class_name else {}
    if auto_class_name == "AutoModelForCausalLM" and "is_decoder" in _names(config_class):
        overrides["is_decoder"] = True
    config = _config_of(model_class, tiny_config(config_class, overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            _scatter(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith(".tid2eid"):
                # Which experts a token goes to, by its number; a checkpoint brings it.
                buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) % config.num_local_experts)
        return model


def tiny_config(config_class: type[PretrainedConfig], overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A small configuration of a class: the names of :data:`SMALL`, one layer of each kind, small parts.

    Args:
        overrides: arguments of the class that take precedence over everything else; a mapping for a part.
    """
    names = _names(config_class)
    given = {**EXCEPTIONS.get(config_class.model_type, {}), **(overrides or {})}
    default = _default(config_class, given)
    values = {name: value for name, value in SMALL.items() if name in names}
    values |= _latent_attention(values)
    values |= _layers(default, names, given)
    values |= given | _parts(config_class, default, given)
    values |= _token_ids(default, names, values)
    return config_class(**values)


def _names(config_class: type[PretrainedConfig]) -> set[str]:
    """Arguments of a configuration class, old style or dataclass."""
    return {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", {})}


@torch.no_grad()
def _scatter(parameter: torch.Tensor) -> None:
    """Random values in place: vectors around their initial ones, matrices so that activations stay of order one.

    Freshly made models are too regular: a router that is almost zero sends all tokens to the same experts.
    """
    if not parameter.is_floating_point():
        return
    if parameter.dim() < 2:
        parameter.add_(torch.randn_like(parameter), alpha=0.25)
    else:
        fan_in = parameter[0].numel() if parameter.dim() != 3 else max(parameter.shape[1:])
        parameter.normal_(std=fan_in**-0.5)


def _config_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a composite configuration that a model class takes, if it does not take the whole."""
    expected = model_class.config_class
    if isinstance(config, expected):
        return config
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return next((part for part in parts if isinstance(part, expected)), config)


def _default(config_class: type[PretrainedConfig], given: Mapping[str, Any]) -> PretrainedConfig:
    """The class's own configuration; a few exist only with some values given."""
    try:
        return config_class()
    except Exception:
        return config_class(**given)


def _latent_attention(values: Mapping[str, Any]) -> dict[str, int]:
    """Latent attention has as many keys as queries, and rotates channels of their own."""
    if "qk_rope_head_dim" not in values:
        return {}
    found = {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": SMALL["num_attention_heads"]}
    return {name: value for name, value in found.items() if name in values}


def _layers(default: PretrainedConfig, names: set[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The depth and the per-layer lists: the first layer of every kind, and at least two (or as many as given) layers.

    The kind of a layer is what all of the lists say about it.
    """
    depth_name = next((name for name in DEPTHS if name in names), None)
    depth = vars(default).get(depth_name)
    if not isinstance(depth, int) or depth < 2:
        return {}
    lists = {
        name: list(value)
        for name in sorted(names)
        if isinstance(value := vars(default).get(name), (list, tuple)) and len(value) == depth
    }
    # A list of indices or of many values does not tell kinds of layers apart.
    telling = [list(map(str, values)) for values in lists.values() if len(set(map(str, values))) <= 4]
    kinds = list(zip(*telling, strict=True)) or [()] * depth
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    number = given.get(depth_name, max(2, len(kept)))
    kept = sorted([*kept, *(index for index in range(depth) if index not in kept)][:number])
    found: dict[str, Any] = {depth_name: number}
    for name, values in lists.items():
        found[name] = [SMALL[name]] * number if name in SMALL else [values[index] for index in kept]
    return found


def _parts(
    config_class: type[PretrainedConfig], default: PretrainedConfig, given: Mapping[str, Any]
) -> dict[str, PretrainedConfig]:
    parts = {name: vars(default).get(name) for name in getattr(config_class, "sub_configs", {})}
    return {
        name: tiny_config(type(part), given.get(name))
        for name, part in parts.items()
        if isinstance(part, PretrainedConfig)
    }


def _token_ids(default: PretrainedConfig, names: set[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens within the vocabulary, each with an id of its own, taken from its end."""
    part = next((values[name] for name in ("text_config", "decoder") if name in values), None)
    vocabulary = values.get("vocab_size") or getattr(part, "vocab_size", None) or SMALL["vocab_size"]
    free = itertools.count(vocabulary - 1, -1)
    found: dict[str, Any] = {}
    for name in sorted(names - set(values)):
        old = vars(default).get(name)
        if not name.endswith(("_token_id", "_token_index", "_index")) or isinstance(old, bool):
            continue
        if isinstance(old, (list, tuple)) and old and max(old) >= vocabulary:
            found[name] = [next(free) for _ in old]
        elif isinstance(old, int) and old >= vocabulary:
            found[name] = next(free)
    return found
