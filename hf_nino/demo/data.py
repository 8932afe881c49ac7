"""Text -> byte-pair tokenizer -> ``datasets.Dataset`` of blocks of equal length."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(text: str, vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer: any text survives encoding and decoding.

    Args:
        text: what the merges are learned from; never the validation text.
        vocabulary: number of tokens, at least 257 (every byte, and the end of a text).

    Raises:
        ValueError: ``vocabulary`` is below 257.
    """
    if vocabulary < 257:
        raise ValueError(f"`vocabulary` must be at least 257, for all bytes and the end of a text, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def blocks(text: str, tokenizer: PreTrainedTokenizerFast, length: int, limit: int | None = None) -> Dataset:
    """The text's tokens in a row, cut into blocks of ``length``; the last, shorter one is dropped.

    Args:
        limit: at most that many blocks, evenly spread over the text; ``None`` for all.

    Returns:
        A dataset with ``input_ids`` and ``labels``, both of ``length`` tokens (causal models shift labels themselves).

    Raises:
        ValueError: the text has fewer than ``length`` tokens.
    """
    lines = tokenizer.backend_tokenizer.encode_batch(text.splitlines(keepends=True))
    tokens = [token for line in lines for token in line.ids]
    count = len(tokens) // length
    if count < 1:
        raise ValueError(f"`text` must have at least `length` = {length} tokens, got {len(tokens)}")
    step = 1 if limit is None else max(1, count // limit)
    rows = [tokens[i * length : (i + 1) * length] for i in range(0, count, step)][:limit]
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def tokenizer_for(text: str, vocabulary: int, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that was saved in ``folder``, or else a new one, trained on ``text`` and saved there."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = train_tokenizer(text, vocabulary)
    tokenizer.save_pretrained(folder)
    return tokenizer
