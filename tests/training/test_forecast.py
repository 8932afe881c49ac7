"""The forecast of the optimizer's own curve, and what counts as worse."""

import math

import numpy as np
import pytest

from hf_nino.training.forecast import WORSE, compare


def curve(steps):
    """What losses of real runs look like: a power of the step, above a floor."""
    return 2.0 + 12.0 * np.asarray(steps, dtype=float) ** -0.4


def draws(at, patience=20, shift=0.0, noise=0.08, count=400):
    """Comparisons of plain runs (or of runs that are ``shift`` above the curve), with the luck of batches."""
    random = np.random.default_rng(0)
    before, after = np.arange(at - 50, at + 1), np.arange(at + patience // 2 + 1, at + patience + 1)
    return [
        compare(
            before,
            curve(before) + noise * random.standard_normal(len(before)),
            after,
            curve(after) + shift + noise * random.standard_normal(len(after)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("at", [150, 500, 3000])
def test_a_plain_run_is_hardly_ever_worse_than_its_forecast(at):
    """Early, on a steep curve, and late: fewer than 1% of the windows are beyond the limit, and the mean is right."""
    found = [comparison.z for comparison in draws(at)]
    assert np.mean(np.array(found) > WORSE) < 0.01
    assert abs(np.mean(found)) < 0.3


def test_a_run_that_is_worse_is_found_out():
    """The negative control: 0.2 above the curve, 2.5 times the noise of a step, is found in most windows."""
    assert np.mean([comparison.z > WORSE for comparison in draws(500, shift=0.2)]) > 0.9
    assert np.mean([comparison.z < -WORSE for comparison in draws(500, shift=-0.2)]) > 0.9


def test_without_noise_the_error_is_what_curves_bend():
    """On a straight line in log steps the forecast is exact, and only the slack on the drop is left as an error."""
    before, after = np.arange(50, 101), np.arange(111, 121)
    line = 3 - 0.5 * np.log(np.arange(1, 200))
    found = compare(before, line[before - 1], after, line[after - 1])
    assert found.observed == pytest.approx(found.expected, abs=1e-9)
    drop = line[99] - found.expected
    assert found.error == pytest.approx(0.5 * drop, rel=1e-6)


def test_a_single_batch_does_not_decide():
    """One loss of 1000 among those before, or among those after, changes the verdict by less than the noise."""
    plain = draws(500, count=1)[0]
    random = np.random.default_rng(0)
    before, after = np.arange(450, 501), np.arange(511, 521)
    first = curve(before) + 0.08 * random.standard_normal(51)
    second = curve(after) + 0.08 * random.standard_normal(10)
    first[20] = second[3] = 1000.0
    odd = compare(before, first, after, second)
    assert abs(odd.expected - plain.expected) < 0.08 and abs(odd.observed - plain.observed) < 0.08


def test_losses_that_are_not_finite_are_worse_than_anything_if_they_are_most():
    """Half of the losses nan is luck of a gradient scaler, more is divergence; before a nowcast they are left out."""
    before, after = np.arange(50, 101), np.arange(111, 121)
    first = curve(before) + 0.01 * np.sin(before)
    first[3] = math.nan
    second = curve(after)
    second[:4] = math.inf
    assert compare(before, first, after, second).z < WORSE
    second[:5] = math.nan
    assert compare(before, first, after, second).z == math.inf


def test_too_few_losses_say_nothing():
    """Fewer than 8 before or 3 after: no verdict."""
    steps, losses = list(range(1, 9)), [3.0, 2.9, 2.7, 2.8, 2.6, 2.5, 2.6, 2.4]
    assert compare(steps, losses, [13, 14, 15], [2.4] * 3) is not None
    assert compare(steps[1:], losses[1:], [13, 14, 15], [2.4] * 3) is None
    assert compare(steps, losses, [13, 14], [2.4] * 2) is None
    assert compare(steps, [*losses[1:], math.nan], [13, 14, 15], [2.4] * 3) is None
