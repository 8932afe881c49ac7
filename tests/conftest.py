"""What all tests share: no network, few threads, and the folder of files that are too large for the repository."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread: the models are so tiny that two threads would mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` next to the repository, with checkpoints of the original release and their outputs."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` next to the repository, with the original release's checkpoints, is absent")
    return SHARED
