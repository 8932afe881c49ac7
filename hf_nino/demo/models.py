"""Small language models with random parameters, for the demo and the benchmark."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

ARCHITECTURES = ("gpt2", "llama")


def language_model(
    arch: str,
    *,
    vocabulary: int,
    block_length: int,
    layers: int,
    width: int,
    heads: int = 4,
    key_value_heads: int = 2,
) -> PreTrainedModel:
    """A new model, drawn from torch's global generator, without dropout; ``model(input_ids, labels=input_ids).loss``
    is the mean next-token loss.

    Args:
        arch: one of :data:`ARCHITECTURES`; a Llama has grouped-query attention and tied embeddings.
        key_value_heads: of a Llama.
    """
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if arch == "gpt2":
        config = GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=block_length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # transformers guesses it from the class name and warns that it cannot
        return model
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=block_length,
        tie_word_embeddings=True,
        **common,
    )
    return LlamaForCausalLM(config)
