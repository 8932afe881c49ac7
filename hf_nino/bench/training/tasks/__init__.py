"""The tasks of the benchmark, by name.

Learning rates are not swept: ``learning_rate`` is what a careful user takes for such a model, and
``constant_learning_rate`` that of the paper or about a third of the former.  The ``tuned`` protocol finds better ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import Task
from .fine_tuning import FineTuningTask
from .images import ImageTask
from .language import LanguageTask
from .reasoning import ReasoningTask


class OtherBatches(LanguageTask):
    """A language task again with batches of another size; a kind of its own, so as not to count twice."""

    kind = "batches"


def _small(make: type[LanguageTask] = LanguageTask, **settings: Any) -> LanguageTask:
    """About a minute on one core: 220 thousand parameters, one and a half epochs of the shortest text."""
    common = {"steps": 2000, "batch_size": 16, "learning_rate": 1e-3, "constant_learning_rate": 3e-4}
    return make(**common | settings)


def _large(**settings: Any) -> LanguageTask:
    """For a GPU: 1 to 11 million parameters."""
    common = {"steps": 8000, "batch_size": 32, "learning_rate": 1e-3, "constant_learning_rate": 3e-4}
    common |= {"warmup_steps": 200, "weight_decay": 0.1, "evaluate_every": 100}
    shape = {"layers": 6, "width": 256, "vocabulary": 4096, "block_length": 256}
    return LanguageTask(**common | shape | settings)


def _conv(**settings: Any) -> ImageTask:
    """A convolutional network of the paper, with its batch size, learning rate and weight decay."""
    common = {"steps": 2000, "batch_size": 128, "learning_rate": 6e-3, "constant_learning_rate": 6e-3}
    return ImageTask(**common | {"weight_decay": 0.0, "max_grad_norm": None} | settings)


def _tweets(learning_rate: float, **settings: Any) -> FineTuningTask:
    """400 steps of fine-tuning, with the same learning rate in all protocols that do not sweep it."""
    common = {"steps": 400, "batch_size": 16, "warmup_steps": 40, "evaluate_every": 50}
    rates = {"learning_rate": learning_rate, "constant_learning_rate": learning_rate}
    return FineTuningTask(**common | rates | settings)


ENGLISH = "kjv+sotu+wordnet"
"""For models that would learn one of the texts by heart."""

_128 = {"layers": 4, "width": 128}
_384 = {"width": 384, "heads": 6, "learning_rate": 6e-4}

_RACE = {"race": True, "steps": 10_000, "evaluate_every": 200}

_TASKS: tuple[Task, ...] = (
    _small(
        name="tiny",
        arch="gpt2",
        text="kjv",
        layers=1,
        width=32,
        vocabulary=384,
        text_share=0.05,
        evaluation_blocks=16,
        steps=60,
        warmup_steps=6,
        evaluate_every=10,
    ),
    _small(name="gpt2-32-kjv", arch="gpt2", text="kjv", layers=2, width=32, vocabulary=512),
    _small(name="gpt2-64-kjv", arch="gpt2", text="kjv"),
    _small(name="llama-64-sotu", arch="llama", text="sotu"),
    _small(name="gpt2-64-wordnet", arch="gpt2", text="wordnet"),
    _small(name="llama-64-pystdlib", arch="llama", text="pystdlib"),
    _small(OtherBatches, name="gpt2-64-kjv-batch4", arch="gpt2", text="kjv", batch_size=4),
    _small(OtherBatches, name="gpt2-64-kjv-batch64", arch="gpt2", text="kjv", batch_size=64),
    _large(name="gpt2-128-sotu", arch="gpt2", text="sotu", **_128),
    _large(name="llama-128-wordnet", arch="llama", text="wordnet", **_128),
    _large(name="gpt2-256-sotu", arch="gpt2", text="sotu", steps=3000),
    _large(name="llama-384-sotu", arch="llama", text="sotu", steps=3000, **_384),
    _large(name="gpt2-256-english", arch="gpt2", text=ENGLISH),
    _large(name="llama-384-english", arch="llama", text=ENGLISH, **_384),
    _conv(name="fm-conv16", model="conv16", target=0.895),
    _conv(name="fm-conv32", model="conv32", target=0.905),
    _conv(name="fm-conv16-paper", model="conv16", target=0.895, **_RACE),
    _conv(name="fm-conv32-paper", model="conv32", target=0.905, bf16=True, **_RACE),
    ImageTask(
        name="fm-vit",
        model="vit",
        steps=2000,
        batch_size=128,
        learning_rate=1e-3,
        constant_learning_rate=3e-4,
        evaluation_images=2500,
    ),
    _tweets(name="minilm-tweets", mode="full", learning_rate=3e-5, evaluate_every=25),
    _tweets(name="minilm-tweets-head", mode="head", learning_rate=1e-3),
    _tweets(name="minilm-tweets-lora", mode="lora", learning_rate=5e-4),
    ReasoningTask(
        name="smollm2-reasoning",
        steps=160,
        batch_size=8,
        learning_rate=5e-5,
        constant_learning_rate=5e-5,
        warmup_steps=16,
        evaluate_every=20,
        bf16=True,
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def task(name: str) -> Task:
    """A task by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def shortened(task: Task, steps: int) -> Task:
    """The same task with another number of steps; warm-up and the steps between evaluations, and looks, are
    scaled with it.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    names = ("warmup_steps", "evaluate_every", "look_every")
    scaled = {name: max(1, round(getattr(task, name) * steps / task.steps)) for name in names}
    return replace(task, steps=steps, **scaled)
