"""One run while its trajectory is recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..training.learning_rate import learning_rates
from ..training.stores import PlainStore, plain_store
from .describe import bare_optimizer, choose_rows, describe_optimizer, describe_run
from .recipe import Recipe
from .shards import SHARD_BYTES, TrajectoryWriter, write_text

logger = logging.get_logger(__name__)

CHECKPOINTS = "checkpoints.json"
"""What a resumed run needs of the sums at each checkpoint, beside the snapshots."""


class Recording:
    """One run while it is recorded.  :meth:`TrajectoryRecorder.recording` makes it for a loop of one's own.

    A disk that fails while training goes on ends the recording, with one warning, and not the training.

    Args:
        folder: of this run alone.
        recipe: how it is recorded.
        model: whose trainable parameters are recorded, wrapped or not.
        optimizer: that trains it; read for learning rates, settings and moments.
        step: optimizer steps that were done before; above 0 the trajectory in the folder goes on.
        seed: of the run.
        description: further entries for ``trajectory.json``.
        overwrite: a new run may replace a trajectory that is in the folder.
        shard_bytes: see :class:`~hf_nino.metatrain.shards.TrajectoryWriter`.
        writes: whether this process is the one of all ranks that writes.

    Attributes:
        step_count: optimizer steps done.
        failed: whether recording was given up.

    Raises:
        ValueError: parameters that this process does not hold whole; a folder with another trajectory.
        OSError: nothing can be written to the folder.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        model: nn.Module,
        optimizer: Any,
        *,
        step: int = 0,
        seed: int | None = None,
        description: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        writes: bool = True,
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self.optimizer = bare_optimizer(optimizer)
        self.step_count = step
        self.failed = not writes
        self.store = _store(model)
        self._signature = self.store.signature()
        self._rows = choose_rows(model, recipe.max_rows)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self._rate: float | None = None
        self._rate_sum = 0.0
        self._loss: tuple[Tensor | float, int] = (0.0, 0)
        self._hook = None
        if not writes:
            return
        self.writer = TrajectoryWriter(
            folder,
            describe_run(
                model,
                optimizer=describe_optimizer(self.optimizer, self.store),
                recipe=recipe,
                rows=self._rows,
                seed=seed,
                more=description,
            ),
            resume_at=step or None,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
        )
        self._resume()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # At the moment of the step: a scheduler may be stepped before or after the recording is told of it.
            self._hook = self.optimizer.register_step_pre_hook(lambda *_: self._see_rate())
        if step % recipe.every == 0 and self.writer.last_step != step:
            self._guarded(lambda: self._snapshot(_rate(self.optimizer)))

    def step(self, loss: Tensor | float | None = None) -> None:
        """One optimizer step has been done.

        Args:
            loss: training loss of the step; a tensor stays on its device until the next snapshot.
        """
        if loss is not None and not self.failed:
            total, steps = self._loss
            self._loss = total + (loss.detach().float() if isinstance(loss, Tensor) else loss), steps + 1
        self.advance(self.step_count + 1)

    def advance(self, step: int) -> None:
        """Optimizer steps up to number ``step`` have been done; a snapshot is taken if one is due now."""
        done, self.step_count = step - self.step_count, step
        if self.failed:
            return
        # Where no step was seen a gradient scaler skipped it.
        rate = _rate(self.optimizer) if self._hook is None else self._rate or 0.0
        self._rate_sum += rate * done
        self._rate = None
        if step % self.recipe.every == 0:
            self._guarded(lambda: self._snapshot(rate))

    def record_mean_loss(self, loss: float, first: int, last: int) -> None:
        """Tell the mean training loss of the steps ``first`` to ``last``, before or after their snapshots."""
        if not self.failed:
            self.writer.add_loss(float(loss), first, last)

    def checkpoint(self) -> None:
        """Write all snapshots until now; a run that resumes from this step goes on exactly."""
        self._guarded(self._checkpoint)

    def close(self, finished: bool = True) -> None:
        """Write what is left, and let the optimizer go.

        Args:
            finished: whether the run came to its end.
        """
        self._guarded(lambda: self.writer.close(finished))
        self.abandon()

    def abandon(self) -> None:
        """Forget what is not written, and let the optimizer go."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not self.failed:
            self.failed = True
            self.writer.discard()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _see_rate(self) -> None:
        self._rate = _rate(self.optimizer)

    def _snapshot(self, rate: float) -> None:
        if self.store.signature() != self._signature:
            self._give_up("the trainable parameters have changed (frozen, thawed, added or resized)")
            return
        total, steps = self._loss
        self._loss = 0.0, 0
        if steps:
            self.writer.add_loss(float(total) / steps, self.step_count - steps + 1, self.step_count)
        parameters = self.store.parameters()
        self.writer.add(
            self.step_count,
            {name: self._chosen(name, parameter.detach()) for name, parameter in parameters.items()},
            moments=self._moments(parameters) if self.recipe.moments else None,
            learning_rate=rate,
            learning_rate_sum=self._rate_sum,
        )

    def _moments(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """{``"exp_avg/NAME"``: tensor}: all state of the optimizer that has the shape of its parameter."""
        found = {}
        for name, parameter in parameters.items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                # A step count has the shape of a parameter that is a single number.
                if isinstance(value, Tensor) and value.shape == parameter.shape and kind != "step":
                    found[f"{kind}/{name}"] = self._chosen(name, value.detach())
        return found

    def _chosen(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._rows:
            return tensor
        key = name, tensor.device
        if key not in self._on_device:
            self._on_device[key] = self._rows[name].to(tensor.device)
        return tensor.index_select(0, self._on_device[key])

    def _checkpoint(self) -> None:
        self.writer.flush()
        path = self.folder / CHECKPOINTS
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        known = {step: sums for step, sums in known.items() if int(step) < self.step_count}
        losses = [piece for piece in self.writer.open_losses if math.isfinite(piece[0])]
        total, steps = self._loss
        if steps and math.isfinite(float(total)):
            losses.append([float(total) / steps, self.step_count - steps + 1, self.step_count])
        known[str(self.step_count)] = {"learning_rate_sum": self._rate_sum, "losses": losses}
        write_text(path, json.dumps(known) + "\n")

    def _resume(self) -> None:
        """Take up the sums at the step where the run resumes."""
        self._rate_sum = self.writer.learning_rate_sum
        path = self.folder / CHECKPOINTS
        if not self.step_count:
            path.unlink(missing_ok=True)
            return
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if str(self.step_count) in known:
            sums = known[str(self.step_count)]
            self._rate_sum = sums["learning_rate_sum"]
            for loss, first, last in sums["losses"]:
                self.writer.add_loss(loss, first, last)
        elif self.writer.last_step not in (None, self.step_count):
            # The steps since the last snapshot, of which nothing was kept, at the rate of now.
            self._rate_sum += _rate(self.optimizer) * (self.step_count - self.writer.last_step)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do it; if the disk fails, warn and stop recording."""
        if self.failed:
            return
        try:
            work()
        except OSError as error:
            self._give_up(f"it could not be written ({type(error).__name__}: {error})")

    def _give_up(self, why: str) -> None:
        self.failed = True
        self.writer.discard()
        logger.warning(
            f"Recording to {self.folder} stops at step {self.step_count}: {why}. What was written until then "
            "can be read; training goes on."
        )


def _store(model: nn.Module) -> PlainStore:
    try:
        return plain_store(model)
    except ValueError as error:
        raise ValueError(f"the trajectory of this model cannot be recorded: {error}") from error


def _rate(optimizer: Any) -> float:
    """Mean over parameter groups."""
    rates = learning_rates(optimizer)
    return math.fsum(rates) / len(rates)
