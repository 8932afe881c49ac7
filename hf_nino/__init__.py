"""Nowcasting for Hugging Face training: predict where the parameters are going, and jump there.

The names below are imported on first use, so that ``import hf_nino`` costs nothing and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .graph import NeuralGraph
    from .merging import merge_models
    from .nowcaster import (
        LinearNowcaster,
        MomentumNowcaster,
        NiNoModel,
        Nowcaster,
        NowcasterConfig,
        SpectralNowcaster,
        WNNModel,
        convert_original,
        load_nowcaster,
    )
    from .training import (
        NiNo,
        NiNoArguments,
        NiNoCallback,
        NiNoTrainer,
        NiNoTrainerMixin,
        NiNoTrainingArguments,
        NowcastEvent,
        Nowcasting,
    )

_HOME = {
    "NeuralGraph": "graph",
    "merge_models": "merging",
    "LinearNowcaster": "nowcaster",
    "MomentumNowcaster": "nowcaster",
    "NiNoModel": "nowcaster",
    "Nowcaster": "nowcaster",
    "NowcasterConfig": "nowcaster",
    "SpectralNowcaster": "nowcaster",
    "WNNModel": "nowcaster",
    "convert_original": "nowcaster",
    "load_nowcaster": "nowcaster",
    "NiNo": "training",
    "NiNoArguments": "training",
    "NiNoCallback": "training",
    "NiNoTrainer": "training",
    "NiNoTrainerMixin": "training",
    "NiNoTrainingArguments": "training",
    "NowcastEvent": "training",
    "Nowcasting": "training",
}

__all__ = [
    "LinearNowcaster",
    "MomentumNowcaster",
    "NeuralGraph",
    "NiNo",
    "NiNoArguments",
    "NiNoCallback",
    "NiNoModel",
    "NiNoTrainer",
    "NiNoTrainerMixin",
    "NiNoTrainingArguments",
    "NowcastEvent",
    "Nowcaster",
    "NowcasterConfig",
    "Nowcasting",
    "SpectralNowcaster",
    "WNNModel",
    "__version__",
    "convert_original",
    "load_nowcaster",
    "merge_models",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
