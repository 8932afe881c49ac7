"""The small mathematics behind the pictures."""

import math

import numpy as np
import pytest

from hf_nino.report.facts import Nowcast, Place
from hf_nino.report.gains import with_gains
from hf_nino.report.numbers import difference, percent, seconds, short, signed, thin, ticks, tidy, value_at
from hf_nino.report.space import flatten


@pytest.mark.parametrize(("low", "high"), [(0, 2000), (3.1, 3.7), (-0.4, 0.02), (0, 1e-5), (1e9, 1.1e9)])
def test_ticks_are_few_round_and_inside(low, high):
    """Between 2 and 8 of them, evenly spaced, inside the axis, and short to write."""
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(short(tick)) <= 7 for tick in found)
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_an_axis_without_length_has_one_tick():
    """Even then something is written."""
    assert ticks(3.0, 3.0) == [3.0]


def test_thinning_keeps_ends_and_extremes():
    """A spike of one point among a hundred thousand is still there."""
    series = [(float(step), math.sin(step / 999)) for step in range(100_000)]
    series[54_321] = (54_321.0, 9.0)
    found = thin(tuple(series))
    assert len(found) <= 620
    assert found[0] == series[0] and found[-1] == series[-1] and series[54_321] in found
    assert thin(found[:50]) == found[:50]


def test_tidy_sorts_and_drops_what_is_not_finite():
    """The last value of a step counts."""
    assert tidy([(2, 1.0), (1, math.nan), (1, 3.0), (2, 4.0), (3, None)]) == ((1.0, 3.0), (2.0, 4.0))


def test_values_between_points_lie_on_lines():
    """And are level outside."""
    series = ((0.0, 1.0), (10.0, 3.0))
    assert [value_at(series, step) for step in (-1, 5, 99)] == [1.0, 2.0, 3.0]
    assert value_at((), 1) is None
    assert difference(series, ((10.0, 1.0), (20.0, 1.0))) == ((10.0, 2.0),)


def test_numbers_are_written_shortly():
    """As people would."""
    assert [short(x) for x in (0, 1500, 25_000, 3e6, 0.00025, -1e-5, 3.64086, math.inf)] == [
        *("0", "1500", "25k", "3M", "2.5e-4", "-1e-5", "3.641", "inf")
    ]
    assert [signed(x) for x in (0.123456, -0.002177)] == ["+0.123", "-0.00218"]
    assert [percent(x) for x in (0.0123, 0.5, 1.0)] == ["1.2%", "50%", "100%"]
    assert [seconds(x) for x in (0.002, 12.34, 120, 7200)] == ["2 ms", "12.3 s", "2 min", "2 h"]


def curve(drop: float, every: int = 5):
    """A logged loss that falls with the logarithm of the step, by ``drop`` more after step 500; with little noise."""
    noise = np.random.default_rng(0).normal(0, 1e-3, 1000)
    return tuple(
        (float(step), 4 - 0.3 * math.log(step - every / 2) - (drop if step > 500 else 0) + noise[step])
        for step in range(every, 1000, every)
    )


def test_a_gain_is_found_in_a_log():
    """A nowcast that lowers the loss by 0.1 is told from one that does nothing; a sparse log tells nothing."""
    nowcast = Nowcast(500, 4, 0.1, True)
    (better,) = with_gains([nowcast], curve(0.1), 10_000, patience=100)
    (same,) = with_gains([nowcast], curve(0.0), 10_000, patience=100)
    assert better.gain.excess == pytest.approx(-0.1, abs=0.005) and not better.gain.recorded
    assert abs(same.gain.excess) < 0.005
    (unknown,) = with_gains([nowcast], curve(0.1, every=50), 10_000, patience=100)
    (unwatched,) = with_gains([nowcast], curve(0.1), 10_000, patience=0)
    assert unknown.gain is None and unwatched.gain is None


def test_nowcasts_within_a_probation_get_no_gain_of_their_own():
    """The one that opened it speaks for them; a refused one gets none."""
    nowcasts = [Nowcast(500, 4, 0.1, True), Nowcast(550, 4, 0.1, True), Nowcast(580, 4, 0.1, False)]
    found = with_gains([*nowcasts, Nowcast(700, 4, 0.1, True)], curve(0.1), 10_000, patience=100)
    assert [nowcast.gain is not None for nowcast in found] == [True, False, False, True]


def test_a_path_in_a_plane_keeps_its_shape():
    """Two directions hold all of it, distances stay, and it runs from left to right."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    flat = np.zeros((5, 8))
    flat[:, :2] = [[0, 0], [1, 2], [3, 1], [5, 5], [9, 0]]
    found = flatten([Place(step, tuple(row)) for step, row in enumerate(flat @ turn)])
    assert sum(found.shares) == pytest.approx(1)
    points = np.array(found.points)
    expected = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert np.allclose(np.linalg.norm(points[:, None] - points[None], axis=-1), expected)
    assert points[-1, 0] > points[0, 0]


def test_paths_too_short_or_still_have_no_picture():
    """Two states, or three equal ones."""
    assert flatten([Place(0, (1.0, 2.0)), Place(1, (2.0, 2.0))]) is None
    assert flatten([Place(step, (1.0, 2.0)) for step in range(3)]) is None
    assert sum(flatten([Place(step, (float(step),)) for step in range(3)]).shares) == pytest.approx(1)
