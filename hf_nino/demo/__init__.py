"""The demo: one small language model, real text, trained twice, with and without nowcasts."""

from .compare import DemoError, run_demo
from .models import ARCHITECTURES
from .settings import LEARNING_RATE_SCHEDULES, DemoSettings
from .text import MissingText

__all__ = ["ARCHITECTURES", "LEARNING_RATE_SCHEDULES", "DemoError", "DemoSettings", "MissingText", "run_demo"]
