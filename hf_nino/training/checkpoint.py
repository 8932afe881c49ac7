"""The files that make a resume exact: ``nino_history.safetensors`` and ``nino_state.json``.  No pickle.

Snapshots that live on the disk are files already: they are linked into the checkpoint, or copied where it lies on
another file system, as ``nino_snapshot_STEP.safetensors``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .snapshot_file import TornSnapshot, map_snapshot, verify_snapshot

HISTORY_NAME = "nino_history.safetensors"
STATE_NAME = "nino_state.json"
SNAPSHOT_NAME = "nino_snapshot_{step}.safetensors"
FORMAT_VERSION = 1


class UnreadableCheckpoint(Exception):
    """Nowcasting state is absent or cannot be used; the message says which file and why."""


def write_checkpoint(
    directory: str | os.PathLike,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    snapshots: Sequence[Path] = (),
) -> None:
    """Write the files; each appears whole or not at all, and what the folder held before is whole until then.

    Args:
        directory: created if need be.
        state: what JSON can hold; Python's floats survive it exactly.
        tensors: snapshots (``"{position}/{name}"``) and the nowcaster's memory (``"memory/{name}"``).
        snapshots: or one file for each of ``state["snapshot_steps"]``, as
            :func:`hf_nino.training.snapshot_file.write_snapshot` writes them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The step ties the two files together: a crash between the two renames is noticed when reading.
    metadata = {"format": "pt", "step": str(state["step"])}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = []
    for source, step in zip(snapshots, state["snapshot_steps"] if snapshots else (), strict=True):
        names.append(SNAPSHOT_NAME.format(step=step))
        _replace(directory / names[-1], lambda path, source=source: _link(source, path))
    _replace(directory / HISTORY_NAME, lambda path: save_file(tensors, path, metadata=metadata))
    files = {"snapshot_files": names} if names else {}
    text = json.dumps({"format_version": FORMAT_VERSION, **state, **files}, indent=2) + "\n"
    _replace(directory / STATE_NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))
    for old in directory.glob(SNAPSHOT_NAME.format(step="*")):
        if old.name not in names:
            old.unlink(missing_ok=True)


def read_checkpoint(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(state, tensors)`` as :func:`write_checkpoint` got them; snapshots in files of their own are memory-mapped.

    Raises:
        UnreadableCheckpoint: a file is absent, malformed or torn, of another format version, or they do not belong
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
    return state, tensors | _read_snapshots(Path(directory), state)


def _read_snapshots(directory: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    names = state.get("snapshot_files", [])
    steps = state["snapshot_steps"] if names else []
    if any(type(step) is not int for step in steps) or names != [SNAPSHOT_NAME.format(step=step) for step in steps]:
        raise UnreadableCheckpoint(f"{directory / STATE_NAME} is malformed (snapshot_files is {names!r:.200})")
    tensors = {}
    for position, (name, step) in enumerate(zip(names, steps, strict=True)):
        try:
            found = verify_snapshot(directory / name)
        except TornSnapshot as error:
            raise UnreadableCheckpoint(str(error)) from error
        if found != step:
            raise UnreadableCheckpoint(f"{directory / name} is of step {found}, not {step}")
        snapshot = map_snapshot(directory / name)
        tensors |= {f"{position}/{parameter}": tensor for parameter, tensor in snapshot.items()}
    return tensors


def _link(source: Path, target: str) -> None:
    """Snapshot files are never written to again, so a second name for the same file is as good as a copy."""
    # What a killed process left there may be another name of a snapshot, which copying would overwrite.
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _replace(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
