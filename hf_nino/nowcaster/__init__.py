"""States and a neural graph -> a future state.  Knows graphs; knows nothing of models or trainers."""

from .auto import load_nowcaster
from .base import Nowcaster
from .configuration import NowcasterConfig
from .engine import Engine
from .modeling import NiNoModel, WNNModel
from .original import convert_original
from .rates import Rates
from .rules import LinearNowcaster, MomentumNowcaster
from .shards import Ranks, Rows, Shards
from .spectral import SpectralNowcaster

__all__ = [
    "Engine",
    "LinearNowcaster",
    "MomentumNowcaster",
    "NiNoModel",
    "Nowcaster",
    "NowcasterConfig",
    "Ranks",
    "Rates",
    "Rows",
    "Shards",
    "SpectralNowcaster",
    "WNNModel",
    "convert_original",
    "load_nowcaster",
]
