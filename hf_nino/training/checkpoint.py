"""The files that make a resume exact: ``nino_history.safetensors`` and ``nino_state.json``.  No pickle.

Where several ranks train, each writes its rows into a file of its own, ``nino_history-00001-of-00002.safetensors``,
and the first of them the JSON.  Snapshots that live on the disk are files already: they are linked into the
checkpoint, or copied where it lies on another file system, as ``nino_snapshot_STEP.safetensors`` (or
``nino_snapshot_STEP-00001-of-00002.safetensors``).
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


def part_name(name: str, part: int, parts: int) -> str:
    """The name of the file of rank ``part``, which is ``name`` if there are no others."""
    stem, _, suffix = name.rpartition(".")
    return name if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.{suffix}"


# -- writing --------------------------------------------------------------------------------------------------------


def write_tensors(
    directory: str | os.PathLike,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    snapshots: Sequence[Path] = (),
    part: int = 0,
    parts: int = 1,
) -> None:
    """Write the tensors of one rank; each file appears whole or not at all.

    Args:
        directory: created if need be.
        state: what :func:`write_state` is about to write.
        tensors: snapshots (``"{position}/{name}"``), the nowcaster's memory (``"memory/{name}"``) and more.
        snapshots: or one file for each of ``state["snapshot_steps"]``, as
            :func:`hf_nino.training.snapshot_file.write_snapshot` writes them.
        part, parts: rank and number of ranks.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The step ties the files together: a crash between the renames is noticed when reading.
    metadata = {"format": "pt", "step": str(state["step"])}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for source, name in zip(snapshots, _snapshot_names(state, part, parts) if snapshots else (), strict=True):
        _replace(directory / name, lambda path, source=source: _link(source, path))
    _replace(directory / part_name(HISTORY_NAME, part, parts), lambda path: save_file(tensors, path, metadata))


def write_state(
    directory: str | os.PathLike, state: Mapping[str, Any], parts: int = 1, snapshots_in_files: bool = False
) -> None:
    """Write the JSON, once all tensors are written, and remove files that do not belong to it.

    Args:
        state: what JSON can hold; Python's floats survive it exactly.
        parts: number of ranks.
        snapshots_in_files: whether snapshots are in files of their own.
    """
    directory = Path(directory)
    extras: dict[str, Any] = {} if parts == 1 else {"ranks": parts}
    names = {part_name(HISTORY_NAME, part, parts) for part in range(parts)}
    if snapshots_in_files and state["snapshot_steps"]:
        extras["snapshot_files"] = _snapshot_names(state)
        names |= {name for part in range(parts) for name in _snapshot_names(state, part, parts)}
    text = json.dumps({"format_version": FORMAT_VERSION, **state, **extras}, indent=2) + "\n"
    _replace(directory / STATE_NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))
    for pattern in (part_name(HISTORY_NAME, 0, 1).replace(".", "*."), SNAPSHOT_NAME.format(step="*")):
        for old in directory.glob(pattern):
            if old.name not in names:
                old.unlink(missing_ok=True)


# -- reading --------------------------------------------------------------------------------------------------------


def read_state(directory: str | os.PathLike) -> dict[str, Any]:
    """``state`` as :func:`write_state` got it.

    Raises:
        UnreadableCheckpoint: the file is absent, malformed or of another format version.
    """
    path = Path(directory) / STATE_NAME
    if not path.is_file():
        raise UnreadableCheckpoint(f"{STATE_NAME} is not in {directory}")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, _ = state["format_version"], state["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableCheckpoint(f"{path} is malformed ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise UnreadableCheckpoint(f"{path} has format_version {version}, this version reads {FORMAT_VERSION}")
    names = state.get("snapshot_files", [])
    steps = state["snapshot_steps"] if names else []
    if any(type(step) is not int for step in steps) or names != [SNAPSHOT_NAME.format(step=step) for step in steps]:
        raise UnreadableCheckpoint(f"{path} is malformed (snapshot_files is {names!r:.200})")
    return state


def parts_of(state: Mapping[str, Any]) -> int:
    """How many ranks wrote a checkpoint."""
    return int(state.get("ranks", 1))


def read_tensors(directory: str | os.PathLike, state: Mapping[str, Any], part: int = 0) -> dict[str, Tensor]:
    """The tensors of one rank, as it gave them to :func:`write_tensors`; snapshot files are memory-mapped.

    Raises:
        UnreadableCheckpoint: a file is absent, malformed or torn, or does not belong to this state.
    """
    parts = parts_of(state)
    history = Path(directory) / part_name(HISTORY_NAME, part, parts)
    if not history.is_file():
        raise UnreadableCheckpoint(f"{history.name} is not in {directory}")
    try:
        with safe_open(str(history), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UnreadableCheckpoint(f"{history} is malformed ({type(error).__name__}: {error})") from error
    if metadata.get("step") != str(state["step"]):
        found = f"{history} is of step {metadata.get('step')} and {STATE_NAME} of step {state['step']}"
        raise UnreadableCheckpoint(f"{found}: they were not saved together")
    for position, path in enumerate(_verified_snapshots(Path(directory), state, part)):
        snapshot = map_snapshot(path)
        tensors |= {f"{position}/{parameter}": tensor for parameter, tensor in snapshot.items()}
    return tensors


def _verified_snapshots(directory: Path, state: Mapping[str, Any], part: int) -> list[Path]:
    if not state.get("snapshot_files"):
        return []
    paths = [directory / name for name in _snapshot_names(state, part, parts_of(state))]
    for path, step in zip(paths, state["snapshot_steps"], strict=True):
        try:
            found = verify_snapshot(path)
        except TornSnapshot as error:
            raise UnreadableCheckpoint(str(error)) from error
        if found != step:
            raise UnreadableCheckpoint(f"{path} is of step {found}, not {step}")
    return paths


def _snapshot_names(state: Mapping[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    return [part_name(SNAPSHOT_NAME.format(step=step), part, parts) for step in state["snapshot_steps"]]


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
