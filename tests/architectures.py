"""One list of small models, with the neuron groups that each must have, for all tests of graphs and nowcasters.

The groups are written by hand from the architecture: name a group by one of the modules that make its neurons and
give its size.  This is the resolution test: a trace that merges channels of a head, or heads, still keeps every
output under permutations, but its groups are too small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs, the sizes of its neuron groups (single nodes of biases and norms left out), its symmetries.

    ``groups`` lists (beginning of the name, size) in the order of the forward pass, and ``symmetries`` the shapes
    [blocks, units, nodes] of the permutations that must have been found and verified.
    """

    name: str
    build: Callable[[], nn.Module]
    groups: list[tuple[str, int]]
    symmetries: list[tuple[int, int, int]]
    inputs: Any = None
    pinned: list[str] = field(default_factory=list)

    def model(self) -> nn.Module:
        """The model with random weights of a size at which every part of it matters."""
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.add_(torch.rand(buffer.shape, generator=generator))
        return model


class Perceptron(nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))))


class ConvolutionalNet(nn.Module):
    """Convolutions with batch norm, a residual connection, a depthwise convolution, and a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 6, 5, padding=2, bias=False)
        self.classifier = nn.Linear(6 * 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = x + self.depthwise(torch.relu(self.inner(x)))
        x = nn.functional.max_pool2d(torch.relu(self.wide(x)), 4)
        return self.classifier(x.flatten(1))


class FusedAttention(nn.Module):
    """A user's own block: fused projection, `scaled_dot_product_attention`, gate and value in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(30, 16), nn.Parameter(torch.zeros(1, 8, 16))
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.gate_up, self.down = nn.Linear(16, 40), nn.Linear(20, 16)
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.head(x + self.down(torch.sigmoid(gate) * up))


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_embd=24, n_head=3, vocab_size=61, n_positions=16, bos_token_id=1, eos_token_id=2
        )
    )


def _llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TEXT | changes)))


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**(TEXT | {"pad_token_id": 0})))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=24, intermediate_size=40, num_attention_heads=3, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def _gpt2_layer(layer: int) -> list[tuple[str, int]]:
    at = f"transformer.h.{layer}"
    return [
        (f"{at}.attn.c_attn[query+key]", 24),
        (f"{at}.attn.c_attn[value]", 24),
        (f"{at}.attn.c_attn[heads]", 3),
        (f"{at}.attn.c_proj", 24),
        (f"{at}.mlp.c_fc", 96),
        (f"{at}.mlp.c_proj", 24),
    ]


def _grouped_llama_layer(layer: int) -> list[tuple[str, int]]:
    at = f"model.layers.{layer}"
    return [
        (f"{at}.self_attn.q_proj[query]", 32),
        (f"{at}.self_attn.k_proj[key]", 16),
        (f"{at}.self_attn.v_proj[value]", 16),
        (f"{at}.self_attn.q_proj[heads]", 4),
        (f"{at}.self_attn.v_proj[repeated]", 32),
        (f"{at}.self_attn.o_proj", 32),
        (f"{at}.mlp.gate_proj + {at}.mlp.up_proj", 48),
        (f"{at}.mlp.down_proj", 32),
    ]


def _llama_layer(layer: int) -> list[tuple[str, int]]:
    at = f"model.layers.{layer}"
    return [
        (f"{at}.self_attn.q_proj + {at}.self_attn.k_proj[query+key]", 32),
        (f"{at}.self_attn.v_proj[value]", 32),
        (f"{at}.self_attn.q_proj[heads]", 4),
        (f"{at}.self_attn.o_proj", 32),
        (f"{at}.mlp.gate_proj + {at}.mlp.up_proj", 48),
        (f"{at}.mlp.down_proj", 32),
    ]


def _mixtral() -> nn.Module:
    sizes = TEXT | {"intermediate_size": 12, "num_key_value_heads": 2}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    )


def _mixtral_layer(layer: int) -> list[tuple[str, int]]:
    at = f"model.layers.{layer}.mlp"
    return [*_grouped_llama_layer(layer)[:-2], (f"{at}.gate", 4), (f"{at}.experts", 48), (f"{at}.experts (2)", 32)]


def _qwen3_layer(layer: int) -> list[tuple[str, int]]:
    at = f"model.layers.{layer}.self_attn"
    query, key, *rest = _grouped_llama_layer(layer)
    return [query, (f"{at}.q_norm.weight", 8), key, (f"{at}.k_norm.weight", 8), *rest]


def _encoder_layer(names: tuple[str, str, str, str, str, str], width: int, heads: int, inner: int) -> list:
    query, key, value, output, up, down = names
    return [
        (f"{query} + {key}[query+key]", width),
        (f"{value}[value]", width),
        (f"{query}[heads]", heads),
        (output, width),
        (up, inner),
        (down, width),
    ]


def _bert_layer(layer: int) -> list[tuple[str, int]]:
    at = f"bert.encoder.layer.{layer}"
    inside = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    names = tuple(f"{at}.{name}" for name in (*inside, "intermediate.dense", "output.dense"))
    return _encoder_layer(names, 32, 4, 48)


def _vit_layer(layer: int) -> list[tuple[str, int]]:
    at = f"vit.layers.{layer}"
    inside = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    return _encoder_layer(tuple(f"{at}.{name}" for name in inside), 24, 3, 40)


def _gpt_neox_layer(layer: int) -> list[tuple[str, int]]:
    at = f"gpt_neox.layers.{layer}"
    return [
        (f"{at}.attention.query_key_value[query+key]", 32),
        (f"{at}.attention.query_key_value[value]", 32),
        (f"{at}.attention.query_key_value[heads]", 4),
        (f"{at}.attention.dense + {at}.mlp.dense_4h_to_h", 32),
        (f"{at}.mlp.dense_h_to_4h", 48),
    ]


def _bloom_layer(layer: int) -> list[tuple[str, int]]:
    at = f"transformer.h.{layer}"
    return [
        (f"{at}.self_attention.query_key_value[query+key]", 32),
        (f"{at}.self_attention.query_key_value[value]", 32),
        (f"{at}.self_attention.query_key_value[heads]", 4),
        (f"{at}.self_attention.dense", 32),
        (f"{at}.mlp.dense_h_to_4h", 128),
        (f"{at}.mlp.dense_4h_to_h", 32),
    ]


def _falcon_layer(layer: int) -> list[tuple[str, int]]:
    at = f"transformer.h.{layer}"
    return [
        (f"{at}.self_attention.query_key_value[query]", 32),
        (f"{at}.self_attention.query_key_value[key]", 8),
        (f"{at}.self_attention.query_key_value[value]", 8),
        (f"{at}.self_attention.query_key_value[heads]", 4),
        (f"{at}.self_attention.query_key_value[repeated]", 32),
        (f"{at}.self_attention.dense + {at}.mlp.dense_4h_to_h", 32),
        (f"{at}.mlp.dense_h_to_4h", 128),
    ]


def _t5_attention(at: str, *heads: tuple[str, int]) -> list[tuple[str, int]]:
    return [(f"{at}.q + {at}.k[query+key]", 24), (f"{at}.v[value]", 24), *heads, (f"{at}.o", 32)]


def _t5_bias(at: str) -> list[tuple[str, int]]:
    bias = f"{at}.SelfAttention.relative_attention_bias"
    return [(f"{bias}.weight[row]", 8), (f"{bias} + {at}.SelfAttention.q[heads]", 4)]


def _t5_inner(at: str) -> list[tuple[str, int]]:
    return [(f"{at}.DenseReluDense.wi", 48), (f"{at}.DenseReluDense.wo", 32)]


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=6, num_heads=4, d_ff=48, num_layers=2, num_decoder_layers=1,
        relative_attention_num_buckets=8, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **TEXT, num_key_value_heads=4, q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        moe_intermediate_size=24, first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def _deepseek_attention(layer: int) -> list[tuple[str, int]]:
    at = f"model.layers.{layer}.self_attn"
    return [
        (f"{at}.q_a_proj", 28),
        (f"{at}.q_b_proj + {at}.kv_b_proj[query+key]", 32),
        (f"{at}.q_b_proj[query]", 16),
        (f"{at}.kv_a_proj_with_mqa", 20),
        (f"{at}.kv_a_proj_with_mqa[key]", 4),
        (f"{at}.kv_b_proj[value]", 24),
        (f"{at}.q_b_proj[heads]", 4),
        (f"{at}.o_proj", 32),
    ]


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, image_size=16, num_labels=5
    )
    return transformers.ConvNextForImageClassification(config)


def _convnext_layer(stage: int, width: int) -> list[tuple[str, int]]:
    at = f"convnext.encoder.stages.{stage}.layers.0"
    return [(f"{at}.dwconv.weight[parameter]", 49), (f"{at}.pwconv1", 4 * width), (f"{at}.pwconv2", width)]


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=12, hidden_sizes=[16, 24], depths=[1, 2], layer_type="bottleneck", num_labels=5, image_size=32
    )
    return transformers.ResNetForImageClassification(config)


def _resnet_layer(stage: int, layer: int, width: int) -> list[tuple[str, int]]:
    at = f"resnet.encoder.stages.{stage}.layers.{layer}"
    last = f"{at}.layer.2.convolution" + (f" + {at}.shortcut.convolution" if layer == 0 else "")
    inner = [(f"{at}.layer.{number}.convolution", width // 4) for number in range(2)]
    return [*inner, (last, width)]


ARCHITECTURES = [
    Architecture(
        "gpt2",
        _gpt2,
        [
            ("transformer.wte.weight[row]", 61),
            ("transformer.wte + transformer.wpe", 24),
            ("transformer.wpe.weight[row]", 16),
            *_gpt2_layer(0),
            *_gpt2_layer(1),
        ],
        # The stream at 5 places; per layer query/key and value channels within each of 3 heads, MLP units, heads.
        [(1, 24, 5), *[(3, 8, 1), (3, 8, 1), (1, 96, 1)] * 2, *[(1, 3, 17)] * 2],
    ),
    Architecture(
        "llama-grouped",
        lambda: _llama(num_key_value_heads=2),
        [
            ("model.embed_tokens.weight[row]", 61),
            ("model.embed_tokens", 32),
            *_grouped_llama_layer(0),
            *_grouped_llama_layer(1),
            ("lm_head", 61),
        ],
        # Value channels move with their 2 repeats; no query/key channel may move, because of the rotary embedding.
        [(1, 32, 5), *[(2, 8, 3), (1, 48, 1)] * 2, *[(2, 2, 17), (1, 2, 50)] * 2],
        pinned=["model.layers.0.self_attn.q_proj[query]", "model.layers.0.self_attn.k_proj[key]"],
    ),
    Architecture(
        "llama",
        lambda: _llama(tie_word_embeddings=True),
        [
            ("model.embed_tokens.weight[row]", 61),
            ("model.embed_tokens", 32),
            *_llama_layer(0),
            *_llama_layer(1),
        ],
        [(1, 32, 5), *[(4, 8, 1), (1, 48, 1)] * 2, *[(1, 4, 17)] * 2],
        pinned=["model.layers.0.self_attn.q_proj + model.layers.0.self_attn.k_proj[query+key]"],
    ),
    Architecture(
        "bert",
        _bert,
        [
            ("bert.embeddings.word_embeddings.weight[row]", 61),
            ("bert.embeddings.word_embeddings + bert.embeddings.token_type_embeddings", 32),
            ("bert.embeddings.token_type_embeddings.weight[row]", 2),
            ("bert.embeddings.position_embeddings.weight[row]", 32),
            *_bert_layer(0),
            *_bert_layer(1),
            ("cls.predictions.transform.dense", 32),
        ],
        # The head's tied matrix ties its input to the columns of the embedding: one more place for the stream.
        [(1, 32, 6), *[(4, 8, 1), (4, 8, 1), (1, 48, 1)] * 2, *[(1, 4, 17)] * 2],
    ),
    Architecture(
        "vit",
        _vit,
        [
            ("vit.embeddings.patch_embeddings.projection[in]", 48),
            ("vit.embeddings.patch_embeddings.projection + vit.embeddings.cls_token", 24),
            ("vit.embeddings.position_embeddings[row]", 17),
            *_vit_layer(0),
            *_vit_layer(1),
            ("classifier", 2),
        ],
        [(1, 24, 5), *[(3, 8, 1), (3, 8, 1), (1, 40, 1)] * 2, *[(1, 3, 17)] * 2],
    ),
    Architecture(
        "mixtral",
        _mixtral,
        [
            ("model.embed_tokens.weight[row]", 61),
            ("model.embed_tokens", 32),
            *_mixtral_layer(0),
            *_mixtral_layer(1),
            ("lm_head", 61),
        ],
        # 4 experts of 12 units each: units within an expert, and whole experts with their row of the router.
        [(1, 32, 5), *[(2, 8, 3), (4, 12, 1)] * 2, *[(2, 2, 17), (1, 2, 50), (1, 4, 13)] * 2],
    ),
    Architecture(
        "qwen3",
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8)),
        [
            ("model.embed_tokens.weight[row]", 61),
            ("model.embed_tokens", 32),
            *_qwen3_layer(0),
            *_qwen3_layer(1),
            ("lm_head", 61),
        ],
        # One norm over the channels of each head, shared by all heads, has neurons of its own and binds no head.
        [(1, 32, 5), *[(2, 8, 3), (1, 48, 1)] * 2, *[(2, 2, 17), (1, 2, 50)] * 2],
    ),
    Architecture(
        "gpt_neox",
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT, rotary_pct=0.5)),
        [
            ("gpt_neox.embed_in.weight[row]", 61),
            ("gpt_neox.embed_in", 32),
            *_gpt_neox_layer(0),
            *_gpt_neox_layer(1),
            ("lm_head", 61),
        ],
        # Attention and MLP write to the stream at once: 3 places.  Half of the channels of a head are not rotated.
        [(1, 32, 3), *[(4, 4, 1), (4, 8, 1), (1, 48, 1)] * 2, *[(1, 4, 17)] * 2],
        pinned=["gpt_neox.layers.0.attention.query_key_value[query+key]"],
    ),
    Architecture(
        "bloom",
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(
                vocab_size=61, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        ),
        [
            ("transformer.word_embeddings.weight[row]", 61),
            ("transformer.word_embeddings", 32),
            *_bloom_layer(0),
            *_bloom_layer(1),
        ],
        # Each head has a slope of its own (ALiBi): channels move within it, and no head does.
        [(1, 32, 5), *[(4, 8, 1), (4, 8, 1), (1, 128, 1)] * 2],
        pinned=["transformer.h.0.self_attention.query_key_value[heads]"],
    ),
    Architecture(
        "falcon-multi-query",
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(
                vocab_size=61,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        [
            ("transformer.word_embeddings.weight[row]", 61),
            ("transformer.word_embeddings", 32),
            *_falcon_layer(0),
            *_falcon_layer(1),
        ],
        # One key and one value for all heads, which move freely; a value channel has 4 repeats.
        [(1, 32, 3), *[(1, 8, 5), (1, 128, 1)] * 2, *[(1, 4, 17)] * 2],
        pinned=[
            "transformer.h.0.self_attention.query_key_value[query]",
            "transformer.h.0.self_attention.query_key_value[key]",
        ],
    ),
    Architecture(
        "t5",
        _t5,
        [
            ("shared.weight[row]", 61),
            ("shared", 32),
            *_t5_attention("encoder.block.0.layer.0.SelfAttention", *_t5_bias("encoder.block.0.layer.0")),
            *_t5_inner("encoder.block.0.layer.1"),
            *_t5_attention("encoder.block.1.layer.0.SelfAttention"),
            *_t5_inner("encoder.block.1.layer.1"),
            *_t5_attention("decoder.block.0.layer.0.SelfAttention", *_t5_bias("decoder.block.0.layer.0")),
            *_t5_attention(
                "decoder.block.0.layer.1.EncDecAttention",
                ("decoder.block.0.layer.1.EncDecAttention.q[heads]", 4),
            ),
            *_t5_inner("decoder.block.0.layer.2"),
        ],
        # One embedding ties the streams of encoder and decoder.  One bias for each head of all layers of the encoder
        # ties those heads: they are one node, and move together with the channels of both layers.
        [(1, 32, 8), *[(4, 6, 1)] * 8, *[(1, 48, 1)] * 3, (1, 4, 25), (1, 4, 13), (1, 4, 13)],
    ),
    Architecture(
        "deepseek_v3",
        _deepseek_v3,
        [
            ("model.embed_tokens.weight[row]", 61),
            ("model.embed_tokens", 32),
            *_deepseek_attention(0),
            ("model.layers.0.mlp.gate_proj + model.layers.0.mlp.up_proj", 48),
            ("model.layers.0.mlp.down_proj", 32),
            *_deepseek_attention(1),
            ("model.layers.1.mlp.gate", 4),
            ("model.layers.1.mlp.experts", 96),
            ("model.layers.1.mlp.experts + model.layers.1.mlp.shared_experts.down_proj", 32),
            ("model.layers.1.mlp.shared_experts.gate_proj + model.layers.1.mlp.shared_experts.up_proj", 24),
            ("lm_head", 61),
        ],
        # Latents move, the channels of a head that are not rotated within it, whole heads (8 such channels, 4 rotated
        # queries, 6 values and the head itself) though they share the rotated key, and whole experts.
        [
            (1, 32, 5),
            *[(1, 28, 1), (1, 20, 1), (4, 8, 1), (4, 6, 1), (1, 4, 19)] * 2,
            (1, 48, 1),
            (4, 24, 1),
            (1, 24, 1),
            (1, 4, 25),
        ],
        pinned=["model.layers.0.self_attn.kv_a_proj_with_mqa[key]"],
    ),
    Architecture(
        "convnext",
        _convnext,
        [
            ("convnext.embeddings.patch_embeddings[in]", 48),
            ("convnext.embeddings.patch_embeddings", 8),
            *_convnext_layer(0, 8),
            ("convnext.encoder.stages.1.downsampling_layer.1", 12),
            *_convnext_layer(1, 12),
            ("classifier", 5),
        ],
        # A depthwise kernel acts on each channel of the stream alone; its 49 taps are nodes.
        [(1, 8, 2), (1, 32, 1), (1, 12, 2), (1, 48, 1)],
        pinned=["convnext.encoder.stages.0.layers.0.dwconv.weight[parameter]"],
    ),
    Architecture(
        "resnet",
        _resnet,
        [
            ("resnet.embedder.embedder.convolution[in]", 3 * 49),
            ("resnet.embedder.embedder.convolution", 12),
            *_resnet_layer(0, 0, 16),
            *_resnet_layer(1, 0, 24),
            *_resnet_layer(1, 1, 24),
            ("classifier.1", 5),
        ],
        # A shortcut and what it is added to are the same fresh channels; without a shortcut there is a new place.
        [(1, 12, 1), *[(1, 4, 1)] * 2, (1, 16, 1), *[(1, 6, 1)] * 4, (1, 24, 2)],
    ),
    Architecture(
        "perceptron",
        Perceptron,
        [("input", 7), ("first", 16), ("second", 12), ("last", 3)],
        [(1, 16, 1), (1, 12, 1)],
        inputs=torch.linspace(-1, 1, 14).view(2, 7),
    ),
    Architecture(
        "convolutional",
        ConvolutionalNet,
        [
            ("input", 3),
            ("stem", 8),
            ("inner", 8),
            ("wide[taps]", 8 * 25),
            ("wide", 6),
            ("classifier[in]", 24),
            ("classifier", 5),
        ],
        # The residual sum ties the stem and the depthwise-filtered inner channels, which carry it, with their 25 taps.
        [(1, 8, 27), (1, 6, 5)],
        inputs=torch.linspace(-1, 1, 3 * 64).sin().view(1, 3, 8, 8),
    ),
    Architecture(
        "own-attention",
        FusedAttention,
        [
            ("embed.weight[row]", 30),
            ("embed", 16),
            ("position[row]", 8),
            ("qkv[query+key]", 16),
            ("qkv[value]", 16),
            ("qkv[heads]", 4),
            ("out", 16),
            ("gate_up", 20),
            ("down", 16),
            ("head", 30),
        ],
        [(1, 16, 3), (4, 4, 1), (4, 4, 1), (1, 20, 1), (1, 4, 9)],
        inputs=torch.arange(8).view(1, 8) * 3,
    ),
]
