"""A folder that appears under its name when all of it is there, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..training.snapshot_file import sync_directory

SUMMARY = "nino_nowcast.json"
"""Says how the weights beside it were made."""

HISTORY = ("nino_history.safetensors", "nino_state.json", "nino_snapshot_*.safetensors", SUMMARY)
"""Belongs to the weights that were there before: a history that ends with them."""


def is_nowcast(folder: Path) -> bool:
    """Whether a checkpoint was made from others, and is none of the run itself."""
    return (folder / SUMMARY).is_file()


def check_target(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Raise ``ValueError`` if ``out`` must not be written: see :func:`whole_folder`."""
    target = out.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise ValueError(f"`out` must be a folder of its own, but {out} is, holds or is in what is read: {path}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder, but {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"`out` must be a new or empty folder, but {out} holds something; --overwrite replaces it")


@contextmanager
def whole_folder(out: Path, inputs: Sequence[Path], overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside ``out`` to write to; it becomes ``out`` at the end, or goes if there was an error.

    Args:
        inputs: what is read; none of it may be in ``out``.
        overwrite: whether ``out`` may hold something, which is then replaced.

    Raises:
        ValueError: ``out`` is a file, holds something, or is among the inputs.
    """
    check_target(out, inputs, overwrite)
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.resolve().name}-", dir=out.resolve().parent))
    try:
        draft.chmod(0o777 & ~_umask())
        yield draft
        sync_directory(draft)
        _put(draft, out.resolve())
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def copy_beside(source: Path, target: Path, skip: Callable[[Path], bool]) -> None:
    """Copy everything in a folder, byte by byte, but for what ``skip`` says of the paths in it."""
    for path in sorted(source.iterdir()):
        if skip(path) or any(path.match(pattern) for pattern in HISTORY):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``values``, for people and programs."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _put(draft: Path, out: Path) -> None:
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        os.replace(out, old / "replaced")
    try:
        os.replace(draft, out)
    except OSError:
        if old is not None:
            os.replace(old / "replaced", out)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    sync_directory(out.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
