"""Small mathematics for pictures: tidy series, ticks, and numbers as people write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from .facts import Series

# Points of a curve that are drawn at most: beyond that a screen shows no more.
MOST_POINTS = 600


def tidy(pairs: Iterable[tuple[float, float | None]]) -> Series:
    """(step, value) pairs sorted by step, the last of each step, without values that are not finite."""
    found = {float(step): float(value) for step, value in pairs if value is not None and math.isfinite(value)}
    return tuple(sorted(found.items()))


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most about ``most`` points that look the same: of every stretch the lowest and the highest."""
    if len(series) <= most:
        return series
    size = math.ceil(2 * len(series) / most)
    found = [series[0]]
    for start in range(0, len(series), size):
        stretch = series[start : start + size]
        found += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return tuple(sorted({*found, series[-1]}))


def value_at(series: Series, step: float) -> float | None:
    """The value at ``step``, on straight lines between the points and level outside; ``None`` of no points."""
    if not series:
        return None
    if step <= series[0][0]:
        return series[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(series):
        if step <= x1:
            return y0 + (y1 - y0) * (step - x0) / (x1 - x0)
    return series[-1][1]


def difference(series: Series, other: Series) -> Series:
    """``series - other``, at the steps that both have."""
    values = dict(other)
    return tuple((step, value - values[step]) for step, value in series if step in values)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / stride - 1e-9)
    found = []
    while (tick := first * stride) <= high + 1e-9 * stride:
        found.append(0.0 if abs(tick) < 1e-12 * stride else tick)
        first += 1
    return found


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """An interval around ``values`` with some room at both ends."""
    low, high = min(values), max(values)
    room = share * (high - low) or abs(high) * share or 1.0
    return low - room, high + room


def short(value: float) -> str:
    """A number for an axis or a table: four digits; from 10 thousand on as k, M or B."""
    if not math.isfinite(value):
        return str(value)
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 1000 stays as it is: "1k" steps would say less than it knows.
        if abs(value) >= max(factor, 1e4):
            return f"{value / factor:.4g}{unit}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def signed(value: float) -> str:
    """A difference: with its sign, and three digits."""
    return f"{'-' if value < 0 else '+'}{short(float(f'{abs(value):.3g}'))}"


def percent(share: float) -> str:
    """A share in percent, with two digits that say something."""
    return f"{100 * share:.2g}%" if abs(share) < 0.1 else f"{100 * share:.0f}%"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value >= 5400:
        return f"{value / 3600:.3g} h"
    if value >= 90:
        return f"{value / 60:.3g} min"
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.2g} ms"
