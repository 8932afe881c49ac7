"""Pictures of a benchmark: loss curves, loss against learning rate, and all savings at a glance."""

from .curves import draw_curves
from .overview import draw_overview
from .sweeps import draw_sweeps

__all__ = ["draw_curves", "draw_overview", "draw_sweeps"]
