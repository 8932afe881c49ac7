"""Leave the streams of random numbers as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside, Python's, NumPy's and torch's generators (CPU and CUDA) go on as if nothing had been.

    A nowcast, a measured loss or a traced graph must not change the dropout masks or the data order of the run.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
