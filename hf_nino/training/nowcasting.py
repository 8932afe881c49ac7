"""Nowcasting during a run: the one object that ties history, horizon, guard and nowcaster together.

Every front end (:class:`~hf_nino.training.optimizer.NiNo`, :class:`~hf_nino.training.callback.NiNoCallback`,
:class:`~hf_nino.training.trainer.NiNoTrainer`) drives a :class:`Nowcasting` and holds no logic of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..nowcaster.auto import resolve_nowcaster
from ..nowcaster.base import Nowcaster
from .announcement import Announcement
from .attempt import Attempting
from .compatibility import check_optimizer
from .event import NowcastEvent
from .guard import InvalidNowcast
from .history import History
from .horizon import Horizon, Trust
from .losses import LossMeter
from .outlook import Outlook
from .overhead import NOT_KNOWN, Overhead
from .period import resolve_schedule, resolve_stop
from .probation import Probation, default_patience
from .probe import Batches, Probe
from .ranks import OneVoice, lone_rank
from .stores import make_store
from .undo import Undo

logger = OneVoice(logging.get_logger(__name__))

ON_INVALID = ("skip", "raise")


class Nowcasting(Attempting):
    """Takes snapshots during a run, nowcasts when it has enough of them, and writes the nowcasts into the model.

    Call :meth:`step` after every optimizer step.  Nowcasts fall on steps that are multiples of ``period``; the
    snapshots they read are the states after that step and 1, 2, .. ``context - 1`` intervals before it.  Parameters
    that did not move between them are left alone; the others are written in place.  Moments and other state of the
    base optimizer stay as they are.

    If training losses are told (:meth:`record_loss`), each nowcast is on probation for ``patience`` steps: if the loss
    is then worse than a forecast of the optimizer's own curve, by more than its noise, parameters and optimizer go
    back to what they were, bit for bit, the next horizon is shorter, and after ``max_failures`` in a row nowcasting
    stops (:mod:`hf_nino.training.probation`).

    Nothing happens during warm-up: no snapshot is taken while the learning rate rises at the start of training, nor up
    to ``start_step``.

    Args:
        nowcaster: a :class:`Nowcaster`, or the name, path or repo id of one.
        model: the model that is trained, wrapped (DDP, FSDP, DeepSpeed, ``torch.compile``), sharded (FSDP2, tensor
            parallel) or not.  Where several ranks train, each keeps and predicts its own rows, and everything here is
            to be called on all of them at once.
        period: optimizer steps between nowcasts; default: the nowcaster's, less in a short run
            (:func:`hf_nino.training.period.resolve_schedule`).
        interval: optimizer steps between snapshots; default ``period // context``.
        horizon: ``"lr-budget"``, ``"paper"``, ``"adaptive"`` or a number of intervals
            (:mod:`hf_nino.training.horizon`).
        start_step: no snapshot up to this step.
        stop_step: no nowcast after this step.
        stop_fraction: the same as a share of ``max_steps``.
        max_steps: length of the run in optimizer steps, if known.
        lr_scheduler: the run's scheduler; may be set later.  Without it the learning rate is taken to be constant.
        history_device: where snapshots live: ``"cpu"``, ``"model"`` or ``"device"`` (with the parameters),
            ``"disk:PATH"`` (files in a folder, written while training goes on) or a torch device.
        history_dtype: their dtype: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        on_invalid: ``"skip"`` a nowcast that fails or that the guard refuses (it is logged), or ``"raise"``.
        graph: the model's neural graph; built from the model when the nowcaster needs one.
        example_inputs: passed on to ``NeuralGraph.from_model``; or a function without arguments that returns them,
            which is only called when a graph is built.
        measure: a function that returns a loss; called right before and right after each nowcast is written.
        patience: steps for which a nowcast is on probation; 0: none is.  Default: 1% of ``max_steps``, but 30 to 200
            (none in runs of fewer than 300 steps); 100 if the length of the run is not known.
        max_failures: nowcasts refused or taken back in a row after which there are no more (unless ``patience`` is 0);
            sooner, if those taken back would cost more than 3% of ``max_steps``.
        undo_device: where the state before a nowcast on probation is kept; default: where snapshots live.
        probe_batches: a function that returns a loss, or batches for the model
            (:class:`~hf_nino.training.probe.Probe`): a nowcast after which their loss is not finite is put back at
            once; and they stand in for training losses where none are told.
        statistics_batches: batches (mappings of the model's arguments), or a function that returns some, from which
            the statistics of batch normalization are computed anew after each nowcast.
        observe_only: predict and measure, but write nothing.
        max_overhead: share of training time that nowcasts may take in models of at least 10 million parameters: where
            they are dearer, they are fewer (:mod:`hf_nino.training.overhead`); ``None``: whatever they take.

    Attributes:
        step_count: optimizer steps done.
        nowcasts: nowcasts written so far.
        rejected: nowcasts that failed or were refused.
        taken_back: nowcasts that were written and taken back.
        stopped: whether nowcasting has been given up for this run.
        seconds: spent on snapshots and nowcasts, and on finding out what they cost.
        own_parameters: elements that this rank keeps and predicts: its rows, or everything.
        events: what happened so far in this process.
        on_state: called with this rank's rows of all parameters, {name: tensor}, when a snapshot is taken and after a
            nowcast was written; for whoever would have to read them again.  It may be set on some ranks only.
        last_snapshot: the step of the last snapshot.
        announcement: its ``estimate`` is what nowcasting costs, once the first steps have been timed; logged once, as
            a warning above 5% of training time.

    Raises:
        ValueError: a bad argument, or a model whose parameters cannot be written (see
            :func:`hf_nino.training.stores.make_store`).
        InvalidNowcast: the neural graph cannot be built and ``on_invalid="raise"``.
    """

    def __init__(
        self,
        nowcaster: str | os.PathLike | Nowcaster,
        model: nn.Module,
        *,
        period: int | None = None,
        interval: int | None = None,
        horizon: str | int = "lr-budget",
        start_step: int = 0,
        stop_step: int | None = None,
        max_steps: int | None = None,
        lr_scheduler: Any = None,
        history_device: str | torch.device = "cpu",
        history_dtype: torch.dtype | str = torch.float32,
        on_invalid: str = "skip",
        graph: Any = None,
        example_inputs: Any = None,
        measure: Callable[[], float] | None = None,
        stop_fraction: float | None = None,
        patience: int | None = None,
        max_failures: int = 3,
        undo_device: str | torch.device | None = None,
        probe_batches: Batches | None = None,
        statistics_batches: Sequence[Mapping[str, Any]] | Callable[[], Sequence[Mapping[str, Any]]] | None = None,
        observe_only: bool = False,
        max_overhead: float | None = 0.01,
    ) -> None:
        if on_invalid not in ON_INVALID:
            raise ValueError(f"`on_invalid` must be one of {ON_INVALID}, got {on_invalid!r}")
        if start_step < 0:
            raise ValueError(f"`start_step` must be at least 0, got {start_step}")
        if stop_step is not None and stop_step < start_step:
            raise ValueError(f"`stop_step` must not be before `start_step` ({start_step}), got {stop_step}")
        if patience is not None and patience < 0:
            raise ValueError(f"`patience` must be at least 0 steps (0: no probation), got {patience}")
        if max_failures < 1:
            raise ValueError(f"`max_failures` must be at least 1, got {max_failures}")
        self.nowcaster = resolve_nowcaster(nowcaster)
        self.spec = type(nowcaster).__name__ if isinstance(nowcaster, Nowcaster) else str(nowcaster)
        max_steps = max_steps if max_steps is not None and max_steps > 0 else None
        self.period, self.interval = resolve_schedule(self.nowcaster, period, interval, max_steps)
        policy = Horizon(horizon)
        if policy.policy == "paper" and max_steps is None:
            raise ValueError("`horizon='paper'` needs `max_steps`, the length of the run, got None")
        self.start_step, self.stop_step = start_step, resolve_stop(stop_step, stop_fraction, max_steps)
        self.outlook = Outlook(policy, max_steps, lr_scheduler, self._say_once)
        self.on_invalid = on_invalid
        self.observe_only = observe_only
        self.store = make_store(model)
        probe = None if probe_batches is None else Probe(probe_batches, self.store.model, self.store)
        self.measure = probe if measure is None else measure
        self.statistics_batches = statistics_batches
        self.history = History(self.nowcaster.context, history_dtype, history_device)
        self.trust = Trust(policy.policy == "adaptive")
        patience = default_patience(max_steps) if patience is None else patience
        self.probation = Probation(0 if observe_only else patience, max_failures, max_steps)
        self.losses = LossMeter(self.store, self.probation.window + self.probation.patience + 8)
        self.undo = Undo(history_device if undo_device is None else undo_device)

        self.step_count = self.skipped_steps = 0
        self.nowcasts = 0
        self.rejected = 0
        self.taken_back = 0
        self.stopped = False
        self.seconds = 0.0
        self.events: list[NowcastEvent] = []
        self.on_state: Callable[[Mapping[str, Tensor]], None] | None = None
        self.last_snapshot: int | None = None
        self.enabled = True
        self._longest = 0.0
        self._live: Mapping[str, Tensor] | None = None
        self._begun = self._settled = False
        self._loaded: dict[str, list[float] | None] | None = None
        self._said: set[str] = set()
        self._signature = self.store.signature()
        self.own_parameters = self.store.elements(own=self.nowcaster.works_on_shards)
        self.overhead = Overhead(max_overhead, self.store.elements(own=False))
        self._example_inputs = example_inputs
        self._own_graph = graph is None
        self.graph = graph
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory({})  # the object may come from another run
        self.announcement = Announcement(self.nowcaster, self.interval, soon=self.overhead.bounded)
        if any(dtype in ("torch.bfloat16", "torch.float16") for _, _, dtype in self._signature):
            self._say_once(
                "Parameters are kept in 16 bits without a float32 copy: small moves, of the optimizer and of nowcasts "
                f"alike, are rounded away. Snapshots are kept in {self.history.dtype}."
            )
        self._build_graph()

    # -- driving it -------------------------------------------------------------------------------------------------

    def begin(
        self, global_step: int | None = None, optimizer: Any = None, *, scheduler_stepped: bool = True
    ) -> NowcastEvent | None:
        """Call once, before the first optimizer step of this process and after weights have been loaded.

        Args:
            global_step: optimizer steps already done, by the caller's count.
            optimizer: the base optimizer.
            scheduler_stepped: see :meth:`step`.

        Returns:
            The event of a nowcast that was due at ``global_step`` but is missing from the checkpoint, because that was
            taken in the middle of the step (checkpoints on SIGTERM); usually ``None``.
        """
        self._begun = True
        if lone := lone_rank():
            self._say_once(lone)
        # Anew: `accelerator.prepare` may have sharded the model since.
        self.own_parameters = self.store.elements(own=self.nowcaster.works_on_shards)
        self._check_optimizer(optimizer)
        late = self._check_loaded(global_step)
        self.outlook.find_warmup(self.step_count, optimizer, scheduler_stepped)
        if self.nowcaster.has_memory and not self._settled and self.step_count == 0 and self._first_step == 0:
            self._settle()
        return self.step(optimizer=optimizer, scheduler_stepped=scheduler_stepped) if late else None

    def step(
        self, global_step: int | None = None, optimizer: Any = None, *, scheduler_stepped: bool = False
    ) -> NowcastEvent | None:
        """Call after every optimizer step, not after micro-steps of gradient accumulation.

        Args:
            global_step: optimizer steps done; default: one more than at the last call.
            optimizer: the base optimizer; its learning rates are read.  Default: the scheduler's.
            scheduler_stepped: whether ``lr_scheduler.step()`` has already been called for this optimizer step.

        Returns:
            What happened, at steps at which a nowcast was due or was taken back; else ``None``.

        Raises:
            InvalidNowcast: with ``on_invalid="raise"``: the nowcaster failed or the guard refused.
        """
        if not self._begun:
            self.begin(None, optimizer, scheduler_stepped=scheduler_stepped)
        if self.outlook.warmup_end is None:  # the scheduler was given later
            self.outlook.find_warmup(self.step_count, optimizer, scheduler_stepped)
        self.step_count = self.step_count + 1 if global_step is None else global_step
        step = self.step_count
        self.losses.step(step)
        if self.enabled and not self.stopped:
            self.announcement.tick(self)
            self.overhead.tick(self.seconds)
        if not self.enabled or self.stopped or step < self._first_step:
            return None
        if self.probation.ends(step):
            event = self._end_probation(optimizer)
            if event is not None:
                self.events.append(event)
                return event
        if self.stop_step is not None and step > self.stop_step:
            self._forget()
            self.history.close()
            return None
        due = step % self.period == 0
        if self.nowcaster.has_memory and not self._settled:
            if due:
                self._settle()
                self._forget()
            return None
        ahead, remainder = divmod(-step % self.period, self.interval)
        if remainder or ahead >= self.history.context or step <= self.start_step:
            return None
        self._check_optimizer(optimizer)
        self._check_signature()
        position = self.history.context - 1 - ahead
        if position == 0 and self._has_to_wait():
            self._forget()
            return None
        if not self._snapshot(position, optimizer) or not due:
            return None
        event = self._nowcast(optimizer, scheduler_stepped)
        self.overhead.nowcast_made(self.seconds)
        self._forget()
        self.events.append(event)
        return event

    def skip(self) -> None:
        """Call instead of :meth:`step` when a gradient scaler skipped the optimizer step; it does not count."""
        self.skipped_steps += 1
        self.losses.drop()

    def close(self) -> None:
        """The run is over: give back the memory, and the files, of snapshots and of what was kept to be put back."""
        self.history.close()
        self.undo.close()

    def scalars(self) -> dict[str, float]:
        """``nino_*`` counters for trackers."""
        return {
            "nino_nowcasts": self.nowcasts,
            "nino_rejected": self.rejected,
            "nino_taken_back": self.taken_back,
            "nino_total_seconds": self.seconds,
        }

    @property
    def _first_step(self) -> int:
        return max(self.start_step, self.outlook.warmup_end or 0)

    @property
    def lr_scheduler(self) -> Any:
        """The run's learning-rate scheduler, which may be set once it exists."""
        return self.outlook.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.outlook.lr_scheduler = scheduler

    # -- taking snapshots -------------------------------------------------------------------------------------------

    def _snapshot(self, position: int, optimizer: Any) -> bool:
        """Take the snapshot at ``position`` of its window, unless earlier ones are missing; whether it was taken."""
        if position == 0:
            self._forget()
        elif len(self.history) != position or self.history.steps[-1] != self.step_count - self.interval:
            self._forget()
            return False
        started = time.perf_counter()
        live = self._read_live()
        if live is None:
            self._forget()
            return False
        self.history.append(live, self.step_count)
        self.seconds += time.perf_counter() - started
        self.last_snapshot = self.step_count
        self.outlook.record(optimizer)
        if self.on_state is not None:
            self.on_state(live)
            self._live = live if self.history.full else None
        return True

    def _check_signature(self) -> None:
        signature = self.store.signature()
        if signature == self._signature:
            return
        before, now = {entry[0]: entry for entry in self._signature}, {entry[0]: entry for entry in signature}
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        logger.warning(
            f"The trainable parameters changed at or before step {self.step_count} ({len(changed)} of them, such as "
            f"{changed[0]!r}): the history is dropped and nowcasting starts anew."
        )
        self._signature = signature
        self.own_parameters = self.store.elements(own=self.nowcaster.works_on_shards)
        self._forget()
        self._abandon()
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory({})
            self._settled = False
        if self._own_graph:
            self.graph = None
            self._build_graph()

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _build_graph(self) -> None:
        if not self.nowcaster.needs_graph or self.graph is not None:
            return
        from .blueprint import agreed_graph

        self.graph, reason, error = agreed_graph(self.store, self._example_inputs)
        self.enabled = not reason
        if not reason:
            return
        reason = f"the neural graph of {type(self.store.model).__name__} cannot be built ({reason})"
        if self.on_invalid == "raise":
            raise InvalidNowcast(reason) from error
        self._say_once(
            f"No nowcasts in this run: {reason}. Pass `example_inputs`, or a nowcaster that needs no graph."
        )

    def _check_optimizer(self, optimizer: Any) -> None:
        if optimizer is not None:
            check_optimizer(self._unwrap(optimizer))

    def _has_to_wait(self) -> bool:
        """Whether nowcasts have cost too much for another one now."""
        if not self.overhead.bounded:
            return False
        reason = self.store.agree(self.overhead.too_dear(self.step_count, self.seconds, self.announcement.expected))
        if reason and not reason.endswith(NOT_KNOWN):  # of several ranks, the one that says so is named
            self._say_once(f"Fewer nowcasts: {reason}.", about="overhead")
        return bool(reason)
