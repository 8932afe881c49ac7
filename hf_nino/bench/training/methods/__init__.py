"""Methods by name."""

from __future__ import annotations

from ....nowcaster.auto import parse_settings
from .averaging import EMA, LAWA
from .base import Conditions, Method, Settings, Training
from .learned import L2O
from .nowcasts import LEARNED, NOWCASTS, NowcastMethod
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
        name: one of :data:`METHODS`; or one of those that nowcast by a rule, with settings of the nowcaster or of when
            it is asked, such as ``spectral:growth=1`` or ``muon+momentum:momentum=0.8,period=100``; or ``nino:SPEC``
            or ``BASE+nino:SPEC`` with a nowcaster that has weights: a ``.pt`` file of the original release, a folder,
            or a bundled name; or ``paper-nino:SPEC`` likewise, for nowcasts when and as far as the paper has them.

    Raises:
        ValueError: no such method, or settings that it does not have.
    """
    if name in METHODS:
        return METHODS[name]
    before, colon, spec = name.partition(":")
    if colon and isinstance(rule := METHODS.get(before), NowcastMethod):
        return rule.given(parse_settings(spec, name), spec)
    base, plus, kind = before.rpartition("+")
    base = base if plus else "adamw"
    if colon and spec and base in BASES and kind in LEARNED:
        return LEARNED[kind](BASES[base], spec)
    raise ValueError(
        f"`method` must be one of {', '.join(METHODS)}, or a rule with settings such as spectral:growth=1, or "
        f"nino:SPEC or BASE+nino:SPEC (or paper-nino:SPEC) with the file, folder or bundled name of a nowcaster and a "
        f"base of {', '.join(BASES)}, got {name!r}"
    )
