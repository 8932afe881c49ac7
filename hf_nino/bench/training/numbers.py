"""Numbers as text, with no more digits than their spread supports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .statistics import Spread

NONE = "none"
"""Did not get there, or diverged."""


def percent(value: float) -> str:
    """``"25%"``: whole percent; ``"none"`` for what was not reached."""
    return f"{_whole(100 * value)}%" if math.isfinite(value) else NONE


def percent_spread(spread: Spread | None, aside: Spread | None = None) -> str:
    """``"25% (18%) [22..28]"``: median, another median if there is one, lowest and highest; empty if there is
    nothing."""
    if spread is None:
        return ""
    text = percent(spread.median)
    if aside is not None and spread.reached:
        text += f" ({percent(aside.median)})"
    if spread.count == 1 or spread.missed == spread.count:
        return text
    low, high = (percent(value).rstrip("%") for value in (spread.low, spread.high))
    return f"{text} [{low}..{high}]"


def small_percent(spread: Spread | None) -> str:
    """``"0.3%"``: one digit after the point below 10%, for shares that are nearly nothing."""
    if spread is None:
        return ""
    value = 100 * spread.median
    return "<0.1%" if 0 < value < 0.05 else f"{value:.1f}%" if value < 9.95 else f"{value:.0f}%"


def number_spread(spread: Spread | None, alone: int, most: int = 4, signed: bool = False) -> str:
    """``"3.38 [3.37..3.39]"``: digits down to those in which seeds differ.

    Args:
        alone: digits after the point if there is no range to tell; negative for tens and hundreds.
        most: digits at most.
        signed: write a plus, too.
    """
    if spread is None:
        return ""
    digits = decimals(spread.width, alone, most)
    text = _number(spread.median, digits, signed)
    if spread.count == 1 or spread.missed == spread.count:
        return text
    return f"{text} [{_number(spread.low, digits, signed)}..{_number(spread.high, digits, signed)}]"


def decimals(width: float | None, alone: int, most: int = 4) -> int:
    """Digits after the point that a range of ``width`` supports: the last one has 3 to 30 units in it."""
    return alone if not width else min(math.floor(math.log10(30 / width)), most)


def settings_text(settings: Mapping[str, Any]) -> str:
    """``"period 100, momentum 0.8"``; ``"default"`` for none."""
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "default"


def _number(value: float, digits: int, signed: bool) -> str:
    if not math.isfinite(value):
        return NONE
    rounded = round(value, digits) + 0.0  # no negative zero
    return f"{rounded:{'+' if signed else ''},.{max(digits, 0)}f}"


def _whole(value: float) -> int:
    """Halves go up in size, as people expect."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))
