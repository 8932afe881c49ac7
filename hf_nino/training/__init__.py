"""Nowcasting during a run: the engine and its front ends.

The front ends for ``transformers.Trainer`` are imported when first used; a plain training loop does not need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .event import NowcastEvent
from .guard import InvalidNowcast, Verdict, judge, tame
from .history import History
from .horizon import Horizon, Trust
from .nowcasting import Nowcasting
from .optimizer import NiNo
from .probation import Probation
from .stores import ParameterStore, make_store

if TYPE_CHECKING:
    from .callback import NiNoCallback
    from .trainer import NiNoArguments, NiNoTrainer, NiNoTrainerMixin, NiNoTrainingArguments

_LAZY = {
    "NiNoArguments": ".trainer",
    "NiNoCallback": ".callback",
    "NiNoTrainer": ".trainer",
    "NiNoTrainerMixin": ".trainer",
    "NiNoTrainingArguments": ".trainer",
}

__all__ = [
    "History",
    "Horizon",
    "InvalidNowcast",
    "NiNo",
    "NiNoArguments",
    "NiNoCallback",
    "NiNoTrainer",
    "NiNoTrainerMixin",
    "NiNoTrainingArguments",
    "NowcastEvent",
    "Nowcasting",
    "ParameterStore",
    "Probation",
    "Trust",
    "Verdict",
    "judge",
    "make_store",
    "tame",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
