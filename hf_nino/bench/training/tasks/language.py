"""Language models of GPT-2's and Llama's shape, from scratch, on real text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ....demo.models import ARCHITECTURES, language_model
from .base import Batch, Task
from .measuring import evaluating
from .prepared import prepared, shuffled_rows
from .texts import read_text, text_version

TOKENIZER_CHARACTERS = 4_000_000
"""At most so much training text decides the vocabulary: seconds, not minutes."""

SECTIONS = 10
"""Parts of the text of which each gives a part of the evaluation text, so that both are about the same things."""

ROWS = 64
"""Blocks evaluated at a time."""


@dataclass(frozen=True)
class Blocks:
    """Tokens in blocks of equal length, int16 or int32.

    Args:
        training: ``[blocks, block_length]``.
        evaluation: ``[evaluation_blocks, block_length]``, from other parts of the text.
    """

    training: Tensor
    evaluation: Tensor


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """Next-token prediction with a small transformer.

    Args:
        arch: ``"gpt2"``, or ``"llama"`` (tied embeddings, an MLP of three times the width).
        text: see :func:`~hf_nino.bench.training.tasks.texts.read_text`.
        layers, width, heads: of the transformer.
        key_value_heads: of a Llama; fewer than ``heads`` for grouped-query attention.
        vocabulary: of a byte-pair tokenizer that is trained on the training text.
        block_length: tokens that the model sees at once.
        evaluation_blocks: blocks of held-back text to measure on, evenly spread over it.
        validation: the held-back share of the text, in contiguous pieces.
        text_share: how much of the text is used at all.

    Raises:
        ValueError: a setting is out of range.
    """

    arch: str
    text: str
    layers: int = 3
    width: int = 64
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 1024
    block_length: int = 64
    evaluation_blocks: int = 256
    validation: float = 0.05
    text_share: float = 1.0

    kind = "language"

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"`arch` must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}")
        if self.width % self.heads:
            raise ValueError(f"`width` must be a multiple of `heads` = {self.heads}, got {self.width}")
        if self.heads % self.key_value_heads:
            found = f"{self.heads} and {self.key_value_heads}"
            raise ValueError(f"`heads` must be a multiple of `key_value_heads`, got {found}")
        if not 0 < self.validation < 1:
            raise ValueError(f"`validation` must be a fraction between 0 and 1, got {self.validation}")
        if not 0 < self.text_share <= 1:
            raise ValueError(f"`text_share` must be above 0 and at most 1, got {self.text_share}")

    def load(self, cache: Path) -> Blocks:
        """Tokens of the text, prepared once.

        Texts that are downloaded lie in the folder ``texts`` next to ``cache``, for all tasks.

        Raises:
            ImportError: the package that holds the text is absent; the message says how to get it.
            ValueError: the text is unknown or too short.
        """
        names = ("text", "vocabulary", "block_length", "evaluation_blocks", "validation", "text_share")
        settings = {name: getattr(self, name) for name in names} | {"version": text_version(self.text)}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return Blocks(**prepared(cache / f"tokens-{digest}.safetensors", lambda: self._tokenise(cache)))

    def _tokenise(self, cache: Path) -> dict[str, Tensor]:
        # Imports `datasets`, which takes seconds; most runs find their tokens prepared.
        from ....demo.data import train_tokenizer

        text = read_text(self.text, cache.parent / "texts")
        training, held_back = split(text, self.validation, self.text_share)
        share = min(1.0, TOKENIZER_CHARACTERS / max(1, sum(map(len, training))))
        tokenizer = train_tokenizer("".join(part[: int(len(part) * share)] for part in training), self.vocabulary)
        dtype = torch.int16 if self.vocabulary <= torch.iinfo(torch.int16).max else torch.int32
        blocks = {
            "training": _blocks(training, tokenizer, self.block_length, dtype),
            "evaluation": _blocks(held_back, tokenizer, self.block_length, dtype),
        }
        found = len(blocks["evaluation"])
        if found < self.evaluation_blocks:
            raise ValueError(
                f"`evaluation_blocks` must be at most the number of blocks in the held-back text, {found} of "
                f"{self.block_length} tokens in {self.text!r}, got {self.evaluation_blocks}"
            )
        spread = torch.arange(self.evaluation_blocks) * found // self.evaluation_blocks
        return blocks | {"evaluation": blocks["evaluation"][spread]}

    def build_model(self, data: Blocks) -> nn.Module:
        """A new GPT-2 or Llama without dropout; ``model(input_ids, labels=input_ids).loss`` is the mean next-token
        loss."""
        return language_model(
            self.arch,
            vocabulary=self.vocabulary,
            block_length=self.block_length,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
        )

    def batches(self, data: Blocks, seed: int, device: torch.device) -> Iterator[Batch]:
        """``input_ids`` and ``labels``, both int64 ``[batch_size, block_length]`` and the same tensor."""
        blocks = data.training.to(device)
        for rows in shuffled_rows(len(blocks), self.batch_size, seed):
            tokens = blocks.index_select(0, rows.to(device)).long()
            yield {"input_ids": tokens, "labels": tokens}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch).loss

    def evaluate(self, model: nn.Module, data: Blocks) -> dict[str, float]:
        with evaluating(model) as device:
            blocks = data.evaluation.to(device).long()
            # Blocks are equally long, so the mean over blocks is the mean over tokens.
            sums = [self.loss(model, {"input_ids": part, "labels": part}) * len(part) for part in blocks.split(ROWS)]
        return {"loss": torch.stack(sums).sum().item() / len(blocks)}

    def example_inputs(self, batch: Batch) -> Batch:
        """Two sequences: enough to trace the model with."""
        return {"input_ids": batch["input_ids"][:2]}


def split(text: str, validation: float, share: float = 1.0) -> tuple[list[str], list[str]]:
    """(training parts, validation parts): the last part of each of ``SECTIONS`` contiguous sections of the text is
    for validation.

    Contiguous parts, and not every n-th line, because neighbouring lines resemble each other; several of them, because
    the end of a text may be about something else (the last twentieth of WordNet has verbs only).  All cuts are between
    words.

    Args:
        share: only the first part of each section is used.
    """
    training, held_back = [], []
    cuts = [_word_end(text, len(text) * i // SECTIONS) for i in range(SECTIONS + 1)]
    for start, end in pairwise(cuts):
        section = text[start:end]
        section = section[: _word_end(section, int(len(section) * share))]
        cut = _word_end(section, int(len(section) * (1 - validation)))
        training.append(section[:cut])
        held_back.append(section[cut:])
    return training, held_back


def _word_end(text: str, position: int) -> int:
    """The last place at or before ``position`` where a word begins or the text ends."""
    if position >= len(text):
        return len(text)
    return max(text.rfind(" ", 0, position), text.rfind("\n", 0, position)) + 1


def _blocks(parts: list[str], tokenizer: PreTrainedTokenizerFast, length: int, dtype: torch.dtype) -> Tensor:
    """All tokens in a row, cut into ``[blocks, length]``; the last, shorter one is dropped."""
    tokens = []
    for part in parts:
        lines = tokenizer.backend_tokenizer.encode_batch(part.splitlines(keepends=True))
        tokens.append(torch.tensor([token for line in lines for token in line.ids], dtype=dtype))
    row = torch.cat(tokens)
    return row[: len(row) // length * length].view(-1, length)
