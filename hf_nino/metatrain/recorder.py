"""Records the parameter trajectory of any training run: as a callback of a Trainer, or around a loop of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .recipe import Recipe
from .recording import Recording
from .shards import SHARD_BYTES


class TrajectoryRecorder(TrainerCallback):
    """Writes the parameters of a run, every so many steps, into a folder that
    :class:`~hf_nino.metatrain.trajectory.Trajectory` reads.

    As a callback of any Trainer::

        Trainer(..., callbacks=[TrajectoryRecorder("trajectories/run-1", every=10)])

    or around a loop::

        with TrajectoryRecorder("trajectories/run-1", every=10).recording(model, optimizer) as record:
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                record.step(loss)

    The first snapshot is the state before the first step.  Of a Trainer, ``loss`` is the logged mean that covers the
    steps of a snapshot.  A run that resumes from a checkpoint goes on in the same folder: snapshots of later steps,
    which an interrupted part of it left, are dropped.  A full disk ends the recording with a warning, and not the
    training.  Under DDP the first process writes.

    Args:
        folder: of this run alone.
        every: steps between snapshots.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; the narrow ones round small moves away.
        max_rows: of an embedding with more rows so many are kept, the same ones at every step; ``None``: all.
        moments: record the optimizer's moments too (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``), in ``dtype``,
            or in bfloat16 where that is float16.
        overwrite: replace a trajectory that is in ``folder`` when a new run begins.
        description: further entries for ``trajectory.json`` that JSON can hold.
        shard_bytes: snapshots wait in host memory until there are so many bytes of them.

    Attributes:
        current: the :class:`Recording` of the current or last Trainer run; ``None`` before the first.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int = 10,
        *,
        dtype: torch.dtype | str = torch.float32,
        max_rows: int | None = 1024,
        moments: bool = False,
        overwrite: bool = False,
        description: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.recipe = Recipe(every, str(dtype).removeprefix("torch."), max_rows, moments)
        self.overwrite = overwrite
        self.description = dict(description or {})
        self.shard_bytes = shard_bytes
        self.current: Recording | None = None
        self._logged = 0
        self._running = False

    @contextmanager
    def recording(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        step: int = 0,
        seed: int | None = None,
        writes: bool = True,
    ) -> Iterator[Recording]:
        """Record a loop of one's own, inside ``with``; call ``record.step(loss)`` after every ``optimizer.step()``.

        To be able to resume, call ``record.checkpoint()`` with each of your own checkpoints, and pass the steps that a
        checkpoint holds as ``step``.

        Args:
            model, optimizer: wrapped or not.
            step: optimizer steps done before.
            seed: of the run, for the description.
            writes: ``False`` on all ranks but one.

        Raises:
            ValueError, OSError: see :class:`Recording`.
        """
        record = Recording(
            self.folder,
            self.recipe,
            model,
            optimizer,
            step=step,
            seed=seed,
            description=self.description,
            overwrite=self.overwrite,
            shard_bytes=self.shard_bytes,
            writes=writes,
        )
        try:
            yield record
        except BaseException:
            record.close(finished=False)
            raise
        record.close()

    # -- events of a Trainer ----------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer begins again, with a smaller batch, where memory ran out: what this object began may be replaced.
        began = self._running
        if self.current is not None:
            self.current.abandon()
        self.current = Recording(
            self.folder,
            self.recipe,
            model,
            optimizer,
            step=state.global_step,
            seed=args.seed,
            description={"max_steps": state.max_steps, **self.description},
            overwrite=self.overwrite or began,
            shard_bytes=self.shard_bytes,
            writes=state.is_world_process_zero,
        )
        self._logged = state.global_step
        self._running = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.current is not None and logs and "loss" in logs:
            first, self._logged = self._logged + 1, state.global_step
            self.current.record_mean_loss(float(logs["loss"]), first, self._logged)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.current.checkpoint()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current.close()
        self._running = False
