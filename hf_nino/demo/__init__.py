"""The demo: one small language model, real text, trained twice, with and without nowcasts."""

from .compare import DemoError, run_demo
from .models import ARCHITECTURES
from .packages import MissingPackage
from .settings import LEARNING_RATE_SCHEDULES, DemoSettings

__all__ = ["ARCHITECTURES", "LEARNING_RATE_SCHEDULES", "DemoError", "DemoSettings", "MissingPackage", "run_demo"]
