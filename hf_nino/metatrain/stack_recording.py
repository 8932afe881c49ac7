"""Trains a stack of models to the end, and writes the trajectory of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .describe import choose_rows, describe_run
from .recipe import Recipe
from .shards import TrajectoryWriter
from .stacked import MOMENTS, StackedTraining
from .stacked_optimizers import BETA1, BETA2, EPSILON, MOMENTUM
from .variation import RunSettings

SHARD_BYTES = 8 * 2**20
"""Smaller than those of one run alone: all models of a stack fill shards at once."""


def record_stack(
    training: StackedTraining,
    recipe: Recipe,
    folders: Sequence[Path],
    progress: Callable[[int], Any] = lambda steps: None,
) -> None:
    """Train to the end, with a snapshot of every model at step 0 and every ``recipe.every`` steps.

    A model whose loss or parameters are no longer finite is recorded until the last snapshot before, and its
    description says ``"diverged": true``; the others go on.  What is in the folders of unfinished runs is replaced.

    Args:
        folders: one for each model.
        progress: is told steps times models as they are done.

    Raises:
        OSError: a folder cannot be written to.
    """
    rows = choose_rows(training.template, recipe.max_rows)
    writers = [
        TrajectoryWriter(
            folder, _description(training, settings, recipe, rows), overwrite=True, shard_bytes=SHARD_BYTES
        )
        for settings, folder in zip(training.settings, folders, strict=True)
    ]
    rate_sums = [0.0] * len(training)
    finite = _take(training, recipe, writers, rows, training.learning_rates, rate_sums, None)
    total: Tensor | float = 0.0
    for step in range(1, training.settings[0].steps + 1):
        rates = training.learning_rates
        total = total + training.step()
        rate_sums = [before + rate for before, rate in zip(rate_sums, rates, strict=True)]
        if step % recipe.every == 0:
            means = (total / recipe.every).tolist()
            finite = _take(training, recipe, writers, rows, rates, rate_sums, means)
            total = 0.0
            progress(recipe.every * len(training))
            if not any(finite):
                break
    progress((training.settings[0].steps - training.step_count // recipe.every * recipe.every) * len(training))
    for writer in writers:
        writer.close()


def _take(
    training: StackedTraining,
    recipe: Recipe,
    writers: Sequence[TrajectoryWriter],
    rows: Mapping[str, Tensor],
    rates: Sequence[float],
    rate_sums: Sequence[float],
    losses: Sequence[float] | None,
) -> list[bool]:
    """A snapshot of every model that is finite; which ones are."""
    step = training.step_count
    healthy = torch.isfinite(training.flat).all(1)
    if losses is not None:
        healthy &= torch.isfinite(torch.tensor(losses, device=healthy.device))
    finite = [ok and not writer.description["diverged"] for ok, writer in zip(healthy.tolist(), writers, strict=True)]
    states = {"": _kept(training, training.flat, rows)}
    if recipe.moments:
        states |= {kind: _kept(training, flat, rows) for kind, flat in training.moments.items()}
    for i, (writer, settings) in enumerate(zip(writers, training.settings, strict=True)):
        if not finite[i]:
            writer.description["diverged"] = True
            continue
        if losses is not None:
            writer.add_loss(losses[i], step - recipe.every + 1, step)
        kinds = MOMENTS[settings.optimizer] if recipe.moments else ()
        writer.add(
            step,
            {name: tensor[i] for name, tensor in states[""].items()},
            moments={f"{kind}/{name}": tensor[i] for kind in kinds for name, tensor in states[kind].items()},
            learning_rate=rates[i],
            learning_rate_sum=rate_sums[i],
        )
    return finite


def _kept(training: StackedTraining, flat: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: ``[M, *shape as recorded]``} on the host."""
    parts = training.unflatten(flat.cpu())
    return {name: part.index_select(1, rows[name]) if name in rows else part for name, part in parts.items()}


def _description(
    training: StackedTraining, settings: RunSettings, recipe: Recipe, rows: Mapping[str, Tensor]
) -> dict[str, Any]:
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "parameters": training.names}
    if settings.optimizer == "adamw":
        optimizer = {"name": "AdamW", "groups": [{**common, "betas": [BETA1, BETA2], "eps": EPSILON}]}
    else:
        optimizer = {"name": "SGD", "groups": [{**common, "momentum": MOMENTUM}]}
    return describe_run(
        training.template,
        optimizer=optimizer,
        recipe=recipe,
        rows=rows,
        seed=settings.seed,
        more={
            "max_steps": settings.steps,
            "task": training.task.to_dict(),
            "settings": settings.to_dict(),
            "recipe": asdict(recipe),
            "engine": training.engine,
            "diverged": False,
        },
    )
