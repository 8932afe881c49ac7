r"""Where the optimizer alone would be now: a forecast of the training loss, with its error.

The loss of a step is the optimizer's curve plus the luck of the batch.  Before a nowcast the curve is close to a
straight line in :math:`\log t` (t: optimizer steps done), which bends less than one in :math:`t` and needs no learning
rate: measured on plain runs under constant, linear and cosine schedules, straight lines in steps and in cumulative
learning rate were off by more.  The line is fitted to the losses of a window; outliers beyond 3 robust standard
deviations are pulled in.  Its error has three parts: the luck of the batches after the nowcast, that of the fit, and
:data:`SLACK` times the drop that it foretells, because curves bend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# How wrong the foretold drop of the loss may be, as a share of it: one standard deviation.
SLACK = 0.5
# Worse means this many standard errors above the forecast: fewer than 1% of the windows of plain runs are.
WORSE = 2.5
# Fewer losses than this before, or after, say nothing.
FEWEST_BEFORE, FEWEST_AFTER = 8, 3
# Outliers are pulled in to this many robust standard deviations.
_OUTLIER = 3.0


@dataclass(frozen=True)
class Comparison:
    """What came, against what was foretold.

    Attributes:
        observed: mean loss of the steps that are judged; infinite if most of them were not finite.
        expected: the forecast for them.
        error: standard error of the difference.
    """

    observed: float
    expected: float
    error: float

    @property
    def excess(self) -> float:
        """Loss above the forecast; below 0: the nowcast paid off."""
        return self.observed - self.expected

    @property
    def z(self) -> float:
        """The excess in standard errors."""
        if self.excess == 0 or math.isnan(self.excess):
            return 0.0
        return self.excess / self.error if self.error > 0 else math.copysign(math.inf, self.excess)


def compare(
    steps_before: Sequence[float],
    losses_before: Sequence[float],
    steps_after: Sequence[float],
    losses_after: Sequence[float],
    slack: float = SLACK,
) -> Comparison | None:
    """Compare the losses after a nowcast with a forecast from those before it.

    Args:
        steps_before, losses_before: steps (above 0, increasing) and their losses before the nowcast; values that are
            not finite are left out.
        steps_after, losses_after: the same for the steps that are judged.
        slack: see :data:`SLACK`.

    Returns:
        ``None`` when there are too few losses on either side (:data:`FEWEST_BEFORE`, :data:`FEWEST_AFTER`).
    """
    before = np.asarray(losses_before, dtype=np.float64)
    finite = np.isfinite(before)
    before, x = before[finite], np.log(np.asarray(steps_before, dtype=np.float64)[finite])
    after = np.asarray(losses_after, dtype=np.float64)
    if len(before) < FEWEST_BEFORE or len(after) < FEWEST_AFTER:
        return None
    last = x[-1]
    line, deviation, covariance = _fit(x - last, before)
    where = np.array([1.0, np.mean(np.log(np.asarray(steps_after, dtype=np.float64)) - last)])
    expected = float(where @ line)
    drop = float(line[1] * where[1])
    variance = deviation**2 * (1 / len(after) + float(where @ covariance @ where)) + (slack * drop) ** 2
    finite = np.isfinite(after)
    observed = float(np.mean(_pull_in(after[finite]))) if 2 * finite.sum() > len(after) else math.inf
    return Comparison(observed, expected, math.sqrt(variance))


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Line through the points, standard deviation around it, covariance of the line for a deviation of 1."""
    design = np.stack([np.ones_like(x), x], axis=1)
    covariance = np.linalg.pinv(design.T @ design)
    line = covariance @ design.T @ y
    fitted = design @ line
    line = covariance @ design.T @ (fitted + _pull_in(y - fitted))
    residuals = _pull_in(y - design @ line)
    return line, math.sqrt(float(residuals @ residuals) / max(len(x) - 2, 1)), covariance


def _pull_in(values: np.ndarray) -> np.ndarray:
    middle = np.median(values)
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    return np.clip(values, middle - _OUTLIER * spread, middle + _OUTLIER * spread) if spread > 0 else values
