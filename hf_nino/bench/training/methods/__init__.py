"""Methods by name."""

from __future__ import annotations

from .averaging import EMA, LAWA
from .base import Conditions, Method, Settings, Training
from .learned import L2O
from .nowcasts import NOWCASTS, LearnedNowcasts
from .optimizers import SGD, AdamW, Muon, OptimizerMethod, ScheduleFree

__all__ = ["BASES", "METHODS", "Conditions", "Method", "Settings", "Training", "method"]

BASES: dict[str, OptimizerMethod] = {base.name: base for base in (AdamW(), SGD(), Muon())}
"""Optimizers that nowcasts can be put on."""

METHODS: dict[str, Method] = {
    **BASES,
    **{nowcast(base).name: nowcast(base) for base in BASES.values() for nowcast in NOWCASTS.values()},
    **{other.name: other for other in (EMA(), LAWA(), ScheduleFree(), L2O())},
}
"""Methods that have a name of their own; :func:`method` knows more."""


def method(name: str) -> Method:
    """The method of this name.

    Args:
        name: one of :data:`METHODS`; or ``nino:SPEC`` or ``BASE+nino:SPEC`` with a nowcaster that has weights: a
            ``.pt`` file of the original release, a folder, or a bundled name.

    Raises:
        ValueError: no such method.
    """
    if name in METHODS:
        return METHODS[name]
    base, plus, nowcast = name.partition("+") if not name.startswith("nino:") else ("adamw", "+", name)
    kind, colon, spec = nowcast.partition(":")
    if base in BASES and plus and kind == "nino" and colon and spec:
        return LearnedNowcasts(BASES[base], spec)
    raise ValueError(
        f"`method` must be one of {', '.join(METHODS)}, or nino:SPEC or BASE+nino:SPEC with the file, folder or "
        f"bundled name of a nowcaster and a base of {', '.join(BASES)}, got {name!r}"
    )
