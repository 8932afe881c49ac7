"""What one demo is: everything that decides its numbers, in one frozen record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..defaults import NOWCASTER
from .models import ARCHITECTURES, language_model

LEARNING_RATE_SCHEDULES = ("linear", "cosine", "constant_with_warmup")


@dataclass(frozen=True)
class DemoSettings:
    """A pair of runs, alike in everything but the nowcasts.

    Args:
        arch: ``"gpt2"`` or ``"llama"`` (with grouped-query attention: 2 key-value heads for 4 query heads).
        nowcaster: name, folder or repo id of a nowcaster.
        steps: optimizer steps of each run.
        seed: of the initial parameters and of the data order, the same in both runs.
        period: steps between nowcasts; ``None`` for what the nowcaster prefers.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler: a schedule of the Trainer's, after ``warmup_steps``.
        evaluations: how often each run is evaluated, evenly spread.

    Raises:
        ValueError: a setting is out of range.
    """

    arch: str = "gpt2"
    nowcaster: str = NOWCASTER
    steps: int = 4000
    seed: int = 0
    period: int | None = None
    learning_rate: float = 1e-3
    lr_scheduler: str = "linear"
    warmup_steps: int = 100
    weight_decay: float = 0.01
    batch_size: int = 32
    block_length: int = 64
    vocabulary: int = 1024
    layers: int = 3
    width: int = 64
    evaluations: int = 80
    evaluation_blocks: int = 256
    text_share: float = 1.0

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"`arch` must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}")
        if self.lr_scheduler not in LEARNING_RATE_SCHEDULES:
            known = ", ".join(LEARNING_RATE_SCHEDULES)
            raise ValueError(f"`lr_scheduler` must be one of {known}, got {self.lr_scheduler!r}")
        if self.steps < 10:
            raise ValueError(f"`steps` must be at least 10, got {self.steps}")
        if self.period is not None and not 1 <= self.period <= self.steps:
            raise ValueError(f"`period` must be between 1 and `steps` = {self.steps}, got {self.period}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}")
        if not 0 < self.text_share <= 1:
            raise ValueError(f"`text_share` must be above 0 and at most 1, got {self.text_share}")

    def smoke(self) -> DemoSettings:
        """The same in tiny, to see that everything works; its numbers mean nothing."""
        return replace(
            self,
            steps=min(self.steps, 40),
            period=self.period or 10,
            warmup_steps=4,
            batch_size=8,
            vocabulary=384,
            layers=1,
            width=32,
            evaluations=8,
            evaluation_blocks=16,
            text_share=0.05,
        )

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations."""
        return max(1, self.steps // self.evaluations)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def build_model(self) -> PreTrainedModel:
        """A new model with random parameters, drawn from torch's global generator.

        No dropout: the two runs then differ in nothing but the nowcasts.
        """
        return language_model(
            self.arch,
            vocabulary=self.vocabulary,
            block_length=self.block_length,
            layers=self.layers,
            width=self.width,
        )
