"""NiNo on models with an encoder and a decoder: text to text, and speech to text."""

import pytest
import torch
from integration_helpers import (
    NOWCASTERS,
    STEPS,
    Moves,
    callback,
    make_nowcaster,
    nowcasts,
    same,
    settings,
    uncovered,
    written,
)
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_nino import NiNoTrainer, NiNoTrainingArguments

WORDS, FRAMES, MELS = 12, 16, 8
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def t5():
    set_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, **TOKENS, dropout_rate=0.0))


def whisper():
    set_seed(0)
    encoder = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": MELS}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 32}
    sizes = {"d_model": 16, "max_source_positions": FRAMES // 2, "max_target_positions": WORDS}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None, "bos_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**encoder, **decoder, **sizes, **none, **TOKENS))


def sentences(count=32):
    """A text and the same backwards."""
    rows = torch.randint(2, 32, (count, WORDS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.flip(0)} for row in rows]


def recordings(count=32):
    """Each token a bump in a band of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, 2 + MELS, (count, WORDS), generator=generator)
    noise = torch.randn(count, MELS, FRAMES, generator=generator) / 10
    for frame in range(WORDS):
        noise[torch.arange(count), labels[:, frame] - 2, frame] += 1
    return [{"input_features": sound, "labels": row} for sound, row in zip(noise, labels, strict=True)]


MODELS = pytest.mark.parametrize(("make", "data"), [(t5, sentences), (whisper, recordings)], ids=["t5", "whisper"])


@MODELS
@NOWCASTERS
def test_nowcasts_reach_encoder_and_decoder(tmp_path, make, data, nowcaster):
    """With NiNoTrainer all nowcasts that are due are written, every trainable parameter is seen, and those of encoder,
    decoder and cross-attention all move at a nowcast otherwise than without."""
    args = NiNoTrainingArguments(str(tmp_path), **nowcasts())
    moves, plain = Moves(), Moves()
    trainer = NiNoTrainer(
        model=make(), args=args, train_dataset=data(), nowcaster=make_nowcaster(nowcaster), callbacks=[moves]
    )
    trainer.train()
    assert written(trainer) == [5, 10, 15]
    assert not uncovered(trainer.nowcasting, trainer.model)
    args = NiNoTrainingArguments(str(tmp_path), **nowcasts(nowcaster="none", max_steps=5))
    NiNoTrainer(model=make(), args=args, train_dataset=data(), callbacks=[plain]).train()
    assert same(moves.states[4], plain.states[4])
    first, last = plain.states[4], plain.states[5]
    moving = {name for name in last if not torch.equal(first[name], last[name])}
    jumped = {name for name in last if not torch.equal(moves.states[5][name], last[name])}
    assert moving <= jumped
    for part in ("encoder.", "decoder."):
        assert any(part in name for name in jumped)
    assert any("EncDecAttention" in name or "encoder_attn" in name for name in jumped)


@MODELS
def test_the_sequence_to_sequence_trainer_takes_the_callback(tmp_path, make, data):
    """Seq2SeqTrainer with the callback nowcasts, learns, and generates in its evaluation afterwards."""
    ours = {"eval_strategy": "no", "predict_with_generate": True, "generation_max_length": WORDS}
    args = Seq2SeqTrainingArguments(str(tmp_path), **settings(learning_rate=3e-3, **ours))
    lengths = []
    trainer = Seq2SeqTrainer(
        model=make(),
        args=args,
        train_dataset=data(),
        eval_dataset=data(4),
        callbacks=[callback("linear")],
        compute_metrics=lambda prediction: lengths.append(prediction.predictions.shape) or {},
    )
    trainer.train()
    assert written(trainer) == [5, 10, 15]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0] and lengths and lengths[0][0] == 4
