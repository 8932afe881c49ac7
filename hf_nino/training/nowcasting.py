"""Nowcasting during a run: the one object that ties history, horizon, guard and nowcaster together.

Every front end (:class:`~hf_nino.training.optimizer.NiNo`, :class:`~hf_nino.training.callback.NiNoCallback`,
:class:`~hf_nino.training.trainer.NiNoTrainer`) drives a :class:`Nowcasting` and holds no logic of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..nowcaster.base import Nowcaster
from .announcement import Announcement
from .event import NowcastEvent
from .guard import InvalidNowcast, Verdict, judge
from .history import History
from .horizon import Horizon
from .outlook import Outlook
from .parameters import check_optimizer, make_store
from .period import resolve_schedule
from .resume import Resumable
from .rng import preserved_rng

logger = logging.get_logger(__name__)

ON_INVALID = ("skip", "raise")


def resolve_nowcaster(nowcaster: str | os.PathLike | Nowcaster) -> Nowcaster:
    """A :class:`Nowcaster` from an object, a bundled name, a path or a repo id."""
    if isinstance(nowcaster, Nowcaster):
        return nowcaster
    from ..nowcaster.auto import load_nowcaster

    return load_nowcaster(nowcaster)


class Nowcasting(Resumable):
    """Takes snapshots during a run, nowcasts when it has enough of them, and writes the nowcasts into the model.

    Call :meth:`step` after every optimizer step.  Nowcasts fall on steps that are multiples of ``period``; the
    snapshots they read are the states after that step and 1, 2, .. ``context - 1`` intervals before it.  Parameters
    that did not move between them are left alone; the others are written in place.  Moments and other state of the
    base optimizer stay as they are.

    Nothing happens during warm-up: no snapshot is taken while the learning rate rises at the start of training, nor up
    to ``start_step``.

    Args:
        nowcaster: a :class:`Nowcaster`, or the name, path or repo id of one.
        model: the model that is trained, wrapped (DDP, ``torch.compile``) or not.
        period: optimizer steps between nowcasts; default: the nowcaster's, less in a short run
            (:func:`hf_nino.training.period.resolve_schedule`).
        interval: optimizer steps between snapshots; default ``period // context``.
        horizon: ``"lr-budget"``, ``"paper"`` or a number of intervals (:mod:`hf_nino.training.horizon`).
        start_step: no snapshot up to this step.
        stop_step: no nowcast after this step.
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

    Attributes:
        step_count: optimizer steps done.
        nowcasts: nowcasts written so far.
        rejected: nowcasts that failed or were refused.
        seconds: spent on snapshots and nowcasts.
        events: what happened so far in this process.
        announcement: its ``estimate`` is what nowcasting costs, once the first steps have been timed; logged once, as
            a warning above 5% of training time.

    Raises:
        ValueError: a bad argument, or a model whose parameters cannot be written (see
            :func:`hf_nino.training.parameters.make_store`).
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
    ) -> None:
        if on_invalid not in ON_INVALID:
            raise ValueError(f"`on_invalid` must be one of {ON_INVALID}, got {on_invalid!r}")
        if start_step < 0:
            raise ValueError(f"`start_step` must be at least 0, got {start_step}")
        if stop_step is not None and stop_step < start_step:
            raise ValueError(f"`stop_step` must not be before `start_step` ({start_step}), got {stop_step}")
        self.nowcaster = resolve_nowcaster(nowcaster)
        self.spec = type(nowcaster).__name__ if isinstance(nowcaster, Nowcaster) else str(nowcaster)
        max_steps = max_steps if max_steps is not None and max_steps > 0 else None
        self.period, self.interval = resolve_schedule(self.nowcaster, period, interval, max_steps)
        policy = Horizon(horizon)
        if policy.policy == "paper" and max_steps is None:
            raise ValueError("`horizon='paper'` needs `max_steps`, the length of the run, got None")
        self.start_step, self.stop_step = start_step, stop_step
        self.outlook = Outlook(policy, max_steps, lr_scheduler, self._say_once)
        self.on_invalid = on_invalid
        self.measure = measure
        self.store = make_store(model)
        self.history = History(self.nowcaster.context, history_dtype, history_device)

        self.step_count = 0
        self.skipped_steps = 0
        self.nowcasts = 0
        self.rejected = 0
        self.seconds = 0.0
        self.events: list[NowcastEvent] = []
        self.enabled = True
        self._begun = False
        self._settled = False
        self._loaded: dict[str, list[float] | None] | None = None
        self._said: set[str] = set()
        self._signature = self.store.signature()
        self._example_inputs = example_inputs
        self._own_graph = graph is None
        self.graph = graph
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory({})  # the object may come from another run
        self.announcement = Announcement(self.nowcaster, self.interval)
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
            What happened, at steps at which a nowcast was due; else ``None``.

        Raises:
            InvalidNowcast: with ``on_invalid="raise"``: the nowcaster failed or the guard refused.
        """
        if not self._begun:
            self.begin(None, optimizer, scheduler_stepped=scheduler_stepped)
        if self.outlook.warmup_end is None:  # the scheduler was given later
            self.outlook.find_warmup(self.step_count, optimizer, scheduler_stepped)
        self.step_count = self.step_count + 1 if global_step is None else global_step
        step = self.step_count
        if self.enabled:
            self.announcement.tick(self)
        if not self.enabled or step < self._first_step:
            return None
        if self.stop_step is not None and step > self.stop_step:
            self._forget()
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
        if not self._snapshot(position=self.history.context - 1 - ahead, optimizer=optimizer) or not due:
            return None
        event = self._nowcast(optimizer, scheduler_stepped)
        self._forget()
        self.events.append(event)
        return event

    def skip(self) -> None:
        """Call instead of :meth:`step` when a gradient scaler skipped the optimizer step; it does not count."""
        self.skipped_steps += 1

    def scalars(self) -> dict[str, float]:
        """``nino_*`` counters for trackers."""
        return {"nino_nowcasts": self.nowcasts, "nino_rejected": self.rejected, "nino_total_seconds": self.seconds}

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
        self.history.append(self.store.live(), self.step_count)
        self.seconds += time.perf_counter() - started
        self.outlook.record(optimizer)
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
        self._forget()
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory({})
            self._settled = False
        if self._own_graph:
            self.graph = None
            self._build_graph()

    # -- nowcasting -------------------------------------------------------------------------------------------------

    def _nowcast(self, optimizer: Any, scheduler_stepped: bool) -> NowcastEvent:
        started = time.perf_counter()
        step = self.step_count
        horizon = self.outlook.choose(
            step=step,
            scheduled_step=step + self.skipped_steps,
            period=self.period,
            interval=self.interval,
            max_horizon=self.nowcaster.max_horizon,
            optimizer=optimizer,
            scheduler_stepped=scheduler_stepped,
        )
        horizon = min(horizon, self.nowcaster.reach)
        if horizon < 1:
            seconds = time.perf_counter() - started
            return NowcastEvent(step, 0, 0, seconds, reason="the learning rate that is left allows no interval")
        error: Exception | None = None
        prediction: dict[str, Tensor] = {}
        try:
            states = self.history.states()
            with preserved_rng(), torch.no_grad():
                prediction = self.nowcaster.nowcast(self.graph, states, horizon)
            verdict = judge(states, prediction, horizon)
        except Exception as caught:
            error = caught
            who = "the history" if isinstance(caught, OSError) else type(self.nowcaster).__name__
            verdict = Verdict(False, f"{who} failed ({type(caught).__name__}: {caught})")
        accepted = self.store.agree(verdict.accepted)
        reason = verdict.reason or ("" if accepted else "another rank refused it")
        common = {"step": step, "horizon": horizon, "horizon_steps": horizon * self.interval}
        if reason:
            return self._refuse(reason, error, common, started)

        measuring = time.perf_counter()
        before = self._measure()
        writing = time.perf_counter()
        self.store.write({name: tensor for name, tensor in prediction.items() if name not in verdict.unmoved})
        del prediction
        if self.nowcaster.has_memory:
            self._settle()
        seconds = measuring - started + time.perf_counter() - writing
        self.nowcasts += 1
        self.seconds += seconds
        return NowcastEvent(
            **common,
            seconds=seconds,
            step_norm=verdict.step_norm,
            relative_step_norm=verdict.relative_step_norm,
            accepted=True,
            loss_before=before,
            loss_after=self._measure(),
        )

    def _refuse(self, reason: str, error: Exception | None, common: dict[str, int], started: float) -> NowcastEvent:
        self.rejected += 1
        if self.nowcaster.has_memory:  # what it carries may be spoilt by what it just computed
            self.nowcaster.load_memory({})
            self._settle()
        if self.on_invalid == "raise":
            self._forget()
            raise InvalidNowcast(f"nowcast at step {common['step']}: {reason}") from error
        if error is None:
            logger.warning(f"Nowcast at step {common['step']} skipped: {reason}.")
        else:
            self._say_once(f"Nowcast skipped: {reason}. Training goes on; this is said once.")
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return NowcastEvent(**common, seconds=seconds, reason=reason)

    def _settle(self) -> None:
        self.nowcaster.settle(self.store.live())
        self._settled = True

    def _measure(self) -> float | None:
        if self.measure is None:
            return None
        try:
            with preserved_rng():
                return float(self.measure())
        except Exception as error:
            self._say_once(f"The loss around nowcasts cannot be measured ({type(error).__name__}: {error}).")
            return None

    def _build_graph(self) -> None:
        if not self.nowcaster.needs_graph or self.graph is not None:
            return
        from ..graph import NeuralGraph

        try:
            with preserved_rng():
                inputs = self._example_inputs() if callable(self._example_inputs) else self._example_inputs
                self.graph = NeuralGraph.from_model(self.store.model, inputs)
            self.enabled = True
        except Exception as error:
            kind = type(self.store.model).__name__
            reason = f"the neural graph of {kind} cannot be built ({type(error).__name__}: {error})"
            if self.on_invalid == "raise":
                raise InvalidNowcast(reason) from error
            self.enabled = False
            self._say_once(
                f"No nowcasts in this run: {reason}. Pass `example_inputs`, or a nowcaster that needs no graph."
            )

    def _check_optimizer(self, optimizer: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        if optimizer is not None:
            check_optimizer(optimizer)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)
