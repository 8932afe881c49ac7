"""What happens to a run after a nowcast: it is watched, and taken back if need be; after enough of that, no more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .event import NowcastEvent
from .forecast import FEWEST_BEFORE
from .horizon import Trust
from .learning_rate import optimizer_of
from .losses import LossMeter
from .probation import Probation
from .ranks import OneVoice
from .resume import Resumable
from .rng import preserved_rng
from .undo import NoUndo, Undo

logger = OneVoice(logging.get_logger(__name__))


class Watching(Resumable):
    """The part of :class:`~hf_nino.training.nowcasting.Nowcasting` that takes nowcasts back."""

    losses: LossMeter
    probation: Probation
    trust: Trust
    undo: Undo
    measure: Callable[[], float] | None
    taken_back: int
    stopped: bool
    events: list[NowcastEvent]
    _said: set[str]
    _check_signature: Callable[[], None]

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the training loss, before :meth:`step`: what ``backward`` was called on, for every micro-batch.

        A tensor stays on its device; the host does not wait for it.  Losses are what nowcasts on probation are judged
        by; without them nothing is taken back.
        """
        if self.probation.patience and not self.stopped:
            self.losses.record(loss)

    def record_mean_loss(self, loss: float, first: int, last: int) -> None:
        """Tell the mean training loss of optimizer steps ``first`` to ``last``, where single ones are not known."""
        if self.probation.patience and not self.stopped:
            self.losses.record_mean(loss, first, last)

    def synchronize(self) -> None:
        """Bring recorded losses to the host; where several ranks train, on all of them."""
        self.losses.read()

    def _say_once(self, message: str, about: str | None = None) -> None:
        """``about``: what makes it the same message, where numbers in it differ."""
        if (about or message) not in self._said:
            self._said.add(about or message)
            logger.warning(message)

    # -- opening ----------------------------------------------------------------------------------------------------

    def _can_watch(self, optimizer: Any) -> bool:
        """Whether a nowcast that is written now can be judged and taken back."""
        if not self.probation.patience:
            return False
        enough = self.measure is not None or len(self.losses) >= FEWEST_BEFORE
        blind = self.store.agree("" if enough and self._base(optimizer) is not None else self._blind(optimizer))
        if blind:
            self._say_once(f"Nowcasts are not watched and will not be taken back: {blind}.")
        return not blind

    def _blind(self, optimizer: Any) -> str:
        patience = self.probation.patience
        if self._base(optimizer) is None:
            what = "the optimizer is not known, so that its state cannot be put back. Pass `optimizer` to `step`"
        elif len(self.losses):
            what = (
                "too few training losses are known for the steps before them. Log the loss at least "
                f"every {max(patience // 12, 1)} steps, use NiNoTrainer (it sees every step), or pass `probe_batches`"
            )
        else:
            what = (
                "no training loss is known. Use NiNoTrainer, log the loss often, call `record_loss(loss)` or "
                "`step(closure)` in a loop of your own, or pass `probe_batches`"
            )
        return what

    def _keep_memory(self) -> str:
        """Keep what the nowcaster carries, before a nowcast changes it; why that was not possible."""
        try:
            self.undo.keep_memory(self.nowcaster.live_memory() if self.nowcaster.has_memory else {}, self.step_count)
        except Exception as error:
            return self._cannot_keep(error)
        return ""

    @staticmethod
    def _cannot_keep(error: Exception) -> str:
        return f"the state before them cannot be kept ({type(error).__name__}: {error})"

    def _keep(self, optimizer: Any, remembered: str) -> bool:
        """Keep the state before a nowcast is written, and open its probation; whether that was possible.

        Args:
            remembered: why the nowcaster's memory could not be kept before; empty if it was.
        """
        failure = remembered
        try:
            if not failure:
                self.undo.keep(self.store, self._base(optimizer), None, self.step_count)
        except NoUndo as error:
            failure = str(error)
        except Exception as error:
            failure = self._cannot_keep(error)
        failure = self.store.agree(failure)
        if failure:
            self.undo.release()
            self._say_once(f"Nowcasts are not watched and will not be taken back: {failure}.")
            return False
        self.probation.opens(self.step_count, self.outlook.warmup_end or 0)
        return True

    @staticmethod
    def _unwrap(optimizer: Any) -> Any:
        return getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper

    def _base(self, optimizer: Any) -> Any:
        return self._unwrap(optimizer_of(self.lr_scheduler) if optimizer is None else optimizer)

    # -- closing ----------------------------------------------------------------------------------------------------

    def _end_probation(self, optimizer: Any) -> NowcastEvent | None:
        """Judge the nowcast on probation; the event if it is taken back."""
        self._check_signature()
        if self.probation.opened is None:
            return None
        outcome = self.probation.judge(self.losses, self._measure())  # of the same numbers on all ranks
        if not outcome.worse:
            logger.info(f"The nowcast of step {self.probation.opened} has passed its probation.")
            self.probation.closes(False, self.step_count)
            self.trust.kept(outcome.paid_off)
            self.undo.release()
            return None
        return self._take_back(optimizer, outcome.reason)

    def _take_back(self, optimizer: Any, reason: str) -> NowcastEvent | None:
        step, back = self.step_count, self.probation.opened
        if not self._restore(optimizer):
            self.probation.abandon()
            return None
        self.taken_back += 1
        self.trust.taken_back()
        self.probation.closes(True, step)
        self.probation.last_nowcast = step
        self.losses.forget_after(back)
        event = NowcastEvent(step, self.probation.horizon, 0, 0.0, reason=reason, taken_back_to=back)
        logger.warning(f"NiNo: {event} The next one goes {self.trust.share:.3g} times as far.")
        self._stop_if_hopeless()
        return event

    def _restore(self, optimizer: Any) -> bool:
        """Put the kept state back; ``False`` if it is lost."""
        failure = ""
        try:
            self.undo.tensors()
        except OSError as error:
            failure = f"{type(error).__name__}: {error}"
        failure = self.store.agree(failure)
        if failure:
            self._say_once(f"A nowcast cannot be taken back ({failure}).")
            self.undo.release()
            return False
        memory = self.undo.restore(self.store, self._base(optimizer))
        self._forget()
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory(memory)
            self._settle()
        self.undo.release()
        return True

    def _stop_if_hopeless(self) -> None:
        why = self.probation.hopeless()
        if not why:
            return
        self.stopped = True
        self._say_once(f"No more nowcasts in this run: {why}. Training goes on with the optimizer alone.")
        self._forget()
        self.history.close()
        self.undo.close()
        self.losses.clear()
        self.probation.abandon()
        if self.nowcaster.has_memory:
            self.nowcaster.load_memory({})

    def _abandon(self) -> None:
        """Forget the nowcast on probation, which can no longer be taken back."""
        self.probation.abandon()
        self.undo.release()

    def _settle(self) -> None:
        """Tell a nowcaster with a memory what the base optimizer carries on from."""
        started = time.perf_counter()
        with self.store.together():
            shards, state = self.store.shards(), self.store.live()
            if shards is None:
                self.nowcaster.settle(state)
            elif self.nowcaster.works_on_shards:
                self.nowcaster.settle(state, shards=shards)
            else:
                self.nowcaster.settle(self.store.gather(state))
        self._settled = True
        self.seconds += time.perf_counter() - started

    def _measure(self) -> float | None:
        """The measured loss, averaged over the ranks; ``None`` if there is nothing to measure, or it failed on one."""
        if self.measure is None:
            return None
        loss, failure = math.nan, ""
        try:
            with preserved_rng():
                loss = float(self.measure())
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        failure = self.store.agree(failure)
        if failure:
            self._say_once(f"The loss around nowcasts cannot be measured ({failure}).")
            return None
        return self.store.average(torch.tensor([loss], dtype=torch.float64))[0]
