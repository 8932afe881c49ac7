"""One run as one page: what nowcasts did, what each of them brought, and what they cost.

Facts (:mod:`.facts`, read by :mod:`.sources`) -> numbers (:mod:`.numbers`, :mod:`.gains`, :mod:`.space`) -> pictures
(:mod:`.charts`, drawn by :mod:`.figure`) -> the page (:mod:`.page`).  :class:`.record.RunRecord` is what training
writes on the way, so that there is more to see.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .facts import Gain, Nowcast, RunFacts
    from .page import page_of
    from .record import RunRecord
    from .sources import read_run

_HOME = {
    "Gain": ".facts",
    "Nowcast": ".facts",
    "RunFacts": ".facts",
    "RunRecord": ".record",
    "page_of": ".page",
    "read_run": ".sources",
}

__all__ = ["Gain", "Nowcast", "RunFacts", "RunRecord", "page_of", "read_run"]


def __getattr__(name: str) -> Any:
    # On first use: training imports RunRecord from here, and the rest of this package imports training.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
