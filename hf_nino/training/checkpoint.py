"""The two files that make a resume exact: ``nino_history.safetensors`` and ``nino_state.json``.  No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

HISTORY_NAME = "nino_history.safetensors"
STATE_NAME = "nino_state.json"
FORMAT_VERSION = 1


class UnreadableCheckpoint(Exception):
    """Nowcasting state is absent or cannot be used; the message says which file and why."""


def write_checkpoint(directory: str | os.PathLike, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; each appears whole or not at all.

    Args:
        directory: created if need be.
        state: what JSON can hold; Python's floats survive it exactly.
        tensors: snapshots (``"{position}/{name}"``) and the nowcaster's memory (``"memory/{name}"``).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The step ties the two files together: a crash between the two renames is noticed when reading.
    metadata = {"format": "pt", "step": str(state["step"])}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(directory / HISTORY_NAME, lambda path: save_file(tensors, path, metadata=metadata))
    text = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2) + "\n"
    _replace(directory / STATE_NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))


def read_checkpoint(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(state, tensors)`` as :func:`write_checkpoint` got them.

    Raises:
        UnreadableCheckpoint: a file is absent or malformed, of another format version, or the two do not belong
            together.
    """
    history, state_file = Path(directory) / HISTORY_NAME, Path(directory) / STATE_NAME
    for path in (state_file, history):
        if not path.is_file():
            raise UnreadableCheckpoint(f"{path.name} is not in {directory}")
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        version, step = state["format_version"], state["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableCheckpoint(f"{state_file} is malformed ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise UnreadableCheckpoint(f"{state_file} has format_version {version}, this version reads {FORMAT_VERSION}")
    try:
        with safe_open(str(history), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UnreadableCheckpoint(f"{history} is malformed ({type(error).__name__}: {error})") from error
    if metadata.get("step") != str(step):
        found = f"{history} is of step {metadata.get('step')} and {state_file.name} of step {step}"
        raise UnreadableCheckpoint(f"{found}: they were not saved together")
    return state, tensors


def _replace(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
