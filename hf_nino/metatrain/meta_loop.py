"""Meta-training under way: steps, what they cost, checkpoints of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from ..nowcaster.modeling import NiNoModel, WNNModel
from .meta_checkpoint import load_checkpoint, read_state, save_checkpoint
from .meta_settings import MetaSettings
from .objective import Objective
from .sampling import Batch, Sampler, Slice, draw_horizons, draw_signs, read_batch
from .shapes import ModelShape, Shapes
from .trajectory import Trajectory

logger = logging.get_logger(__name__)

HOPELESS = 50
"""So many skipped steps in a row end the run."""

Item = TypeVar("Item")
Example = tuple[ModelShape, Batch, Tensor | None]


class MetaTraining:
    """A nowcaster while it learns.

    Args:
        network: on the host; it is moved to the accelerator's device.
        sampler: of what it learns from.
        shapes: of the models that trajectories are of.
        settings: the recipe.
        accelerator: one process, or several that each learn from trajectories of their own and average gradients.

    Attributes:
        step_count: steps done, skipped ones included.
        skipped: numbers of the steps whose loss or gradient was not finite; nothing was changed in them.
        losses: ``{"step", "loss", "persistence", "gradient_norm", "learning_rate"}``, means since the last one.
        seconds: spent in steps.
    """

    def __init__(
        self,
        network: NiNoModel | WNNModel,
        sampler: Sampler,
        shapes: Shapes,
        settings: MetaSettings,
        accelerator: Accelerator,
    ) -> None:
        self.sampler, self.shapes, self.settings, self.accelerator = sampler, shapes, settings, accelerator
        self.objective = Objective(network.train(), settings.mask_rounding).to(accelerator.device)
        self.network = network
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.wrapped: torch.nn.Module = self.objective
        self.step_count = 0
        self.skipped: list[int] = []
        self.losses: list[dict[str, float]] = []
        self.seconds = 0.0
        self._window: list[list[float]] = []
        self._skipped_in_a_row = 0

    def prepare(self) -> None:
        """Wrap the objective for several processes; from now on, it must be called through what wraps it."""
        self.wrapped = self.accelerator.prepare_model(self.objective)

    def run(self, stop: int) -> Iterator[int]:
        """Do steps until ``stop`` are done; yields after each how many are.

        Raises:
            FloatingPointError: :data:`HOPELESS` steps in a row had to be skipped.
        """
        ahead = self.accelerator.device.type == "cuda"
        steps = range(self.step_count, stop)
        for examples in read_ahead(self.examples, steps) if ahead else map(self.examples, steps):
            started = time.perf_counter()
            self._step(list(examples))
            self.seconds += time.perf_counter() - started
            yield self.step_count

    def examples(self, step: int) -> Iterator[Example]:
        """What this process learns from in a step: model shape, slices, and signs of the positional encoding."""
        for number in range(self.settings.batch_size):
            yield self.example(step, number)

    def example(self, step: int, number: int) -> Example:
        """One of :meth:`examples`."""
        process = self.accelerator.process_index
        trajectory, slices, source = self.sampler.draw(step, number, self.settings.slices, process)
        signs = None
        if self.settings.sign_flips and isinstance(self.network, NiNoModel):
            signs = draw_signs(source, len(slices), self.network.config.positional_size)
        return self.shapes.of(trajectory), self.read(trajectory, slices, source), signs

    def read(self, trajectory: Trajectory, slices: Sequence[Slice], source: random.Random) -> Batch:
        """What is learned from slices of a trajectory."""
        context, most = self.network.context, self.network.max_horizon
        if self.network.modulation is not None:
            there = [min(piece.horizons(len(trajectory), context), most) for piece in slices]
            pairs = zip(slices, there, strict=True)
            slices = [draw_horizons(source, piece, available, self.settings.horizons) for piece, available in pairs]
        return read_batch(trajectory, slices, context, most, self.settings.target_neighbours)

    def _step(self, examples: list[Example]) -> None:
        rate = self.settings.rate(self.step_count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros(2, device=self.accelerator.device)
        for number, (shape, batch, signs) in enumerate(examples):
            last = number == len(examples) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(shape, batch.to(self.accelerator.device), signs)
                self.accelerator.backward(losses.loss / len(examples))
            total += torch.stack([loss.detach() for loss in losses]) / len(examples)
        # Every process gets the same numbers, and so decides the same.
        loss, persistence = self.accelerator.reduce(total, "mean").tolist()
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.max_grad_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self._window.append([loss, persistence, norm])
            self._skipped_in_a_row = 0
        else:
            self._skip(loss, norm)
        self.optimizer.zero_grad()
        self.step_count += 1

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped.append(self.step_count)
        self._skipped_in_a_row += 1
        if self.accelerator.is_main_process:
            logger.warning(
                f"Step {self.step_count} of meta-training was skipped: its loss is {loss} and the norm of its "
                f"gradient {norm}. That makes {len(self.skipped)} so far."
            )
        if self._skipped_in_a_row >= HOPELESS:
            raise FloatingPointError(
                f"{HOPELESS} steps of meta-training in a row had a loss or a gradient that is not finite: the weights "
                "or the trajectories are spoilt; go on from an earlier checkpoint with a lower `learning_rate`"
            )

    def log(self) -> dict[str, float]:
        """Means since the last call, which are added to :attr:`losses`; empty if all steps since were skipped."""
        if not self._window:
            return {}
        means = [sum(column) / len(self._window) for column in zip(*self._window, strict=True)]
        self._window = []
        rate = self.settings.rate(self.step_count - 1)
        self.losses.append(
            dict(zip(("loss", "persistence", "gradient_norm"), means, strict=True))
            | {"step": self.step_count, "learning_rate": rate}
        )
        return self.losses[-1]

    def save(self, out: Path, more: Mapping[str, Any]) -> None:
        """Write a checkpoint; to be called by one process.

        Args:
            more: entries of its ``state.json``, see :meth:`load`.
        """
        state = {
            "step": self.step_count,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "losses": self.losses,
            "window": self._window,
            "seconds": self.seconds,
            **more,
        }
        save_checkpoint(out, self.network, self.optimizer, state, self.step_count)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Go on from a checkpoint: all further steps are as if there had been no interruption.  Draws depend on the
        step alone, so that there are no generators to restore.

        Returns:
            What is in its ``state.json``.

        Raises:
            OSError, ValueError: it cannot be read, or is of another nowcaster.
        """
        state = read_state(checkpoint)
        load_checkpoint(checkpoint, self.network, self.optimizer)
        self.step_count, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        self.losses, self._window = state["losses"], state["window"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        return state


def read_ahead(make: Callable[[int], Iterator[Item]], steps: range) -> Iterator[list[Item]]:
    """``make(step)`` of all steps as lists, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for step in steps:
            following = pool.submit(lambda step=step: list(make(step)))
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
