"""One nowcast: predict, judge, write; or say why not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..nowcaster import Rates
from .batch_norm import recompute, with_statistics
from .event import NowcastEvent
from .guard import InvalidNowcast, Verdict, judge, odd_prediction, tame
from .ranks import FailedElsewhere, LostRanks, OneVoice
from .rng import preserved_rng
from .watching import Watching

logger = OneVoice(logging.get_logger(__name__))

# The share of the process group's time-out that a nowcast may take.
PATIENCE = 0.5


class Attempting(Watching):
    """The part of :class:`~hf_nino.training.nowcasting.Nowcasting` that makes a nowcast and writes it.

    Where several ranks train, all of them come here at the same step.  What may fail on one of them alone is caught,
    and all hear of it (``store.agree``, or at the next collective: ``store.together``) before they go on.
    """

    graph: Any
    on_invalid: str
    observe_only: bool
    statistics_batches: Any
    announcement: Any
    on_state: Callable[[Mapping[str, Tensor]], None] | None
    _longest: float
    _live: Mapping[str, Tensor] | None

    def _nowcast(self, optimizer: Any, scheduler_stepped: bool) -> NowcastEvent:
        started = time.perf_counter()
        step, live, self._live = self.step_count, self._live, None
        horizon = self.outlook.choose(
            step=step,
            scheduled_step=step + self.skipped_steps,
            period=self.period,
            interval=self.interval,
            max_horizon=self.nowcaster.max_horizon,
            optimizer=optimizer,
            scheduler_stepped=scheduler_stepped,
        )
        horizon, share = self.trust.reach(min(self.store.least(horizon), self.nowcaster.reach))
        if horizon < 1:
            seconds = time.perf_counter() - started
            return NowcastEvent(step, 0, 0, seconds, reason="the learning rate that is left allows no interval")
        watch = not self.observe_only and self.probation.opened is None and self._can_watch(optimizer)
        if watch and self.probation.too_late(step):
            reason = f"the run ends before its probation of {self.probation.patience} steps would"
            return NowcastEvent(step, 0, 0, time.perf_counter() - started, reason=reason)
        slow = self.store.agree(self._too_slow())
        if slow:
            self._say_once(f"Nowcast skipped: {slow}.")
            return NowcastEvent(step, 0, 0, time.perf_counter() - started, reason=slow)
        remembered = self._keep_memory() if watch else ""
        rates = None
        if self.nowcaster.reads_rates:
            rates = self.outlook.rates(
                scheduled_step=step + self.skipped_steps,
                horizon=horizon,
                interval=self.interval,
                optimizer=optimizer,
                scheduler_stepped=scheduler_stepped,
            )
        writes, verdict, error = self._predict(horizon, share, rates)
        self._longest = max(self._longest, time.perf_counter() - started)
        reason = verdict.reason or self.probation.refuses(verdict.alignment)
        common = {"step": step, "horizon": horizon, "horizon_steps": horizon * self.interval}
        if reason:
            if watch:
                self.undo.release()
            return self._refuse(reason, error, common, started)
        if verdict.remarks:
            logger.info(f"Nowcast at step {step}, {verdict.remarks}.")
        norms = {"step_norm": share * verdict.step_norm, "relative_step_norm": share * verdict.relative_step_norm}
        norms |= {"shortened": len(verdict.shortened), "left_alone": len(verdict.left_alone)}
        seconds = time.perf_counter() - started
        before = self._measure()
        if self.observe_only:
            return self._observe(writes, before, {**common, **norms, "seconds": seconds})

        writing = time.perf_counter()
        kept = watch and self._keep(optimizer, remembered)
        if kept:
            self.probation.describe(horizon, verdict.alignment, before)
        failed = self._write(writes)
        if failed is not None:
            names = list(writes)
            del writes, live
            self._put_back(names, optimizer, kept)
            return self._refuse(f"it could not be written: {self._why(failed)}", failed, common, started)
        self._renew_statistics()
        seconds += time.perf_counter() - writing
        if self.on_state is not None and live is not None:
            self.on_state({**live, **writes})
        del writes, live
        after = self._measure()
        if kept and before is not None and math.isfinite(before) and (after is None or not math.isfinite(after)):
            self._restore(optimizer)
            self.probation.abandon()
            return self._refuse(f"the loss on the fixed batches is {after} after it", None, common, started)
        if self.nowcaster.has_memory:
            self._settle()
        self.probation.last_nowcast = step
        self.nowcasts += 1
        self.seconds += seconds
        return NowcastEvent(**common, **norms, seconds=seconds, accepted=True, loss_before=before, loss_after=after)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read_live(self) -> Mapping[str, Tensor] | None:
        """This rank's rows of the parameters as they are; ``None`` if a rank cannot read its own."""
        try:
            return self.store.live()
        except LostRanks:
            raise
        except Exception as caught:
            clear_frames(caught.__traceback__)
            why = self._why(caught)
            if self.on_invalid == "raise":
                raise InvalidNowcast(f"snapshot at step {self.step_count}: {why}") from caught
            self._say_once(f"A snapshot cannot be taken: {why}. Training goes on; this is said once.")
            return None

    # -- predicting -------------------------------------------------------------------------------------------------

    def _predict(
        self, horizon: int, share: float, rates: Rates | None = None
    ) -> tuple[dict[str, Tensor], Verdict, Exception | None]:
        """What is to be written, the verdict on it, and the error of this rank, if it had one."""
        error: Exception | None = None
        states: list[dict[str, Tensor]] = []
        try:
            states = self.history.states()
            self._place()
        except Exception as caught:
            error = caught
        failure = self.store.agree(self._failure(error))
        if failure:
            return {}, Verdict(False, failure), error
        verdict, writes = Verdict(False), {}
        try:
            with self.store.together(), preserved_rng(), torch.no_grad():
                prediction, odd = self._foresee(states, horizon, rates)
                verdict = Verdict(False, self.store.agree(odd))
                if not verdict.reason:
                    verdict = judge(states, prediction, horizon, shards=self.store.shards())
                if verdict.accepted:
                    writes = tame(states[-1], prediction, verdict, share)
        except LostRanks:
            raise
        except Exception as caught:
            clear_frames(caught.__traceback__)  # gives back what it ran out of, if that was memory
            return {}, Verdict(False, self._why(caught)), caught
        return writes, verdict, None

    def _foresee(
        self, states: Sequence[Mapping[str, Tensor]], horizon: int, rates: Rates | None
    ) -> tuple[Mapping[str, Tensor], str]:
        """What the nowcaster predicts of this rank's rows, and what is wrong with its names and shapes."""
        shards, options = self.store.shards(), {} if rates is None else {"rates": rates}
        if shards is not None and not self.nowcaster.works_on_shards:
            whole = self._gathered(states)
            prediction = self.nowcaster.nowcast(self.graph, whole, horizon, **options)
            odd = odd_prediction(whole[-1], prediction)
            return {} if odd else {name: shards.local(name).of(t) for name, t in prediction.items()}, odd
        if shards is not None:  # nowcasters of other people need not know of them
            options["shards"] = shards
        prediction = self.nowcaster.nowcast(self.graph, states, horizon, **options)
        return prediction, odd_prediction(states[-1], prediction)

    def _gathered(self, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        self._say_once(
            f"{type(self.nowcaster).__name__} does not work on shards: every rank gathers all snapshots for it, and "
            "predicts the whole model."
        )
        return [self.store.gather(state) for state in states]

    def _why(self, error: Exception) -> str:
        """What went wrong, on the rank where it did; for errors that all ranks have come to know of."""
        return self.store.agree("" if isinstance(error, FailedElsewhere) else self._failure(error))

    def _failure(self, error: Exception | None) -> str:
        if error is None:
            return ""
        if isinstance(error, torch.OutOfMemoryError):
            # The rest of the message are numbers, which differ from one nowcast to the next.
            what = str(error).partition(". ")[0]
            return f"{type(self.nowcaster).__name__} ran out of memory ({type(error).__name__}: {what})"
        who = "the history" if isinstance(error, OSError) else type(self.nowcaster).__name__
        return f"{who} failed ({type(error).__name__}: {error})"

    def _too_slow(self) -> str:
        """Why a nowcast is not begun: other ranks, or the backend's watchdog, would give this one up."""
        if self.store.ranks is None:
            return ""
        estimate = self.announcement.estimate
        seconds = max(self._longest, 0.0 if estimate is None else estimate.seconds_per_nowcast)
        timeout = self.store.ranks.timeout
        if seconds <= PATIENCE * timeout:
            return ""
        return (
            f"it would take {seconds:.3g} s, more than half of the process group's time-out of {timeout:g} s (pass a "
            "larger `timeout` to init_process_group, `ddp_timeout` to the Trainer), or use a faster nowcaster"
        )

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write(self, writes: Mapping[str, Tensor]) -> Exception | None:
        """Write into the model; on all ranks the error, if it failed on one of them."""
        try:
            self.store.write(writes)
        except LostRanks:
            raise
        except Exception as caught:
            clear_frames(caught.__traceback__)  # gives back what it ran out of, if that was memory
            return caught
        return None

    def _put_back(self, names: Sequence[str], optimizer: Any, kept: bool) -> None:
        """Some parameters may have been written, and others not: all go back to what they were.

        Args:
            kept: whether their state before the nowcast was; else the last snapshot has it, in the history's dtype.
        """
        if kept:
            self.probation.abandon()
        if not kept or not self._restore(optimizer):
            last = self.history.states()[-1]
            self.store.write({name: last[name] for name in names})

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _observe(self, writes: dict[str, Tensor], before: float | None, found: dict[str, Any]) -> NowcastEvent:
        """Measure the loss of what would have been written; the model is as it was afterwards, bit for bit."""
        after = None
        if before is not None:
            with self.store.together():
                live = self.store.live()
                kept = {name: live[name].clone() for name in writes}
            self.store.write(writes)
            after = self._measure()
            self.store.write(kept)
        if self.nowcaster.has_memory:
            self._settle()
        self.seconds += found["seconds"]
        return NowcastEvent(**found, loss_before=before, loss_after=after, reason="only observed")

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
        if self.probation.patience:
            self.probation.refused()
            self._stop_if_hopeless()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return NowcastEvent(**common, seconds=seconds, reason=reason)

    def _place(self) -> None:
        """Move a network to where the model is: its weights are small, and what it computes is not."""
        device = self.store.device
        if isinstance(self.nowcaster, nn.Module) and any(p.device != device for p in self.nowcaster.parameters()):
            self.nowcaster.to(device)

    def _renew_statistics(self) -> None:
        """Recompute the statistics of batch normalization for the parameters that were written."""
        if not with_statistics(self.store.model):
            return
        batches = self.statistics_batches
        batches = batches() if callable(batches) else batches
        if not batches:
            self._say_once(
                "The statistics of batch normalization are those from before the nowcasts until training has renewed "
                "them: evaluate some steps after a nowcast, or pass `statistics_batches` (NiNoTrainer does)."
            )
            return
        try:
            recompute(self.store.model, batches, lambda batch: self.store.model(**batch))
        except Exception as error:
            self._say_once(
                f"The statistics of batch normalization cannot be recomputed ({type(error).__name__}: {error}); "
                "training renews them in some steps."
            )
