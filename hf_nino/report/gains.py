"""What each nowcast brought, against a forecast of the optimizer alone, from losses that were logged.

Training compares them itself (:mod:`hf_nino.training.probation`); where it left no record of that, this module does
it again with the same formula (:mod:`hf_nino.training.forecast`) from the means in the log.  A mean must lie wholly
between a nowcast and the end of its probation, so this takes a log entry at least every twelfth of the patience.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..training.forecast import compare
from ..training.probation import FEWEST, WINDOW, default_patience
from .facts import Gain, Nowcast, Series


def with_gains(
    nowcasts: Sequence[Nowcast], train_loss: Series, max_steps: int | None, patience: int | None = None
) -> tuple[Nowcast, ...]:
    """``nowcasts`` with the gain of those that opened a probation and were logged around closely enough.

    A nowcast that comes within the probation of another shares its judgement and gets none of its own.  One that was
    taken back keeps its gain: losses after it are those that the log has up to that moment.

    Args:
        nowcasts: in order.
        train_loss: each value the mean since the step of the one before.
        max_steps: of the run, if known.
        patience: steps; default: what training takes by default.
    """
    patience = default_patience(max_steps) if patience is None else patience
    if not patience:
        return tuple(nowcasts)
    found, last, opened = [], 0, None
    for nowcast in nowcasts:
        if not nowcast.accepted:
            found.append(nowcast)
            continue
        if nowcast.gain is None and (opened is None or nowcast.step >= opened + patience):
            opened = nowcast.step
            nowcast = replace(nowcast, gain=_gain(nowcast.step, last, train_loss, patience))
        last = nowcast.step if nowcast.taken_back_at is None else nowcast.taken_back_at
        found.append(nowcast)
    return tuple(found)


def _gain(step: int, last: int, train_loss: Series, patience: int) -> Gain | None:
    window = max(round(WINDOW * patience), FEWEST)
    middle = last + (step - last) // 2 if last else 0
    start = max(min(middle, step - FEWEST), step - window, 0)
    late = step + 2 * patience // 3
    logged = [
        (before, at, loss) for (before, _), (at, loss) in zip(((0.0, 0.0), *train_loss), train_loss, strict=False)
    ]
    before = [((a + 1 + b) / 2, loss) for a, b, loss in logged if a >= start and b <= step]
    after = [((a + 1 + b) / 2, loss) for a, b, loss in logged if a >= late and b <= step + patience]
    if not before or not after:
        return None
    found = compare(*zip(*before, strict=True), *zip(*after, strict=True))
    return None if found is None else Gain(found.observed, found.expected, found.error, recorded=False)
