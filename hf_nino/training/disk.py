"""Snapshots on the disk: a folder for each run, a file for each snapshot, written while training goes on."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from transformers.utils import logging

from .snapshot_file import TEMPORARY, map_snapshot, write_snapshot
from .storage import HostPlace, Place, Snapshot

try:
    import fcntl
except ImportError:  # Windows: what a killed run leaves behind stays there
    fcntl = None

logger = logging.get_logger(__name__)

PREFIX = "nino-history-"
LOCK = "lock"
# Seconds that training may wait for the disk before a word is said.
PATIENCE = 1.0


class DiskPlace(Place):
    """Snapshots as safetensors files, memory-mapped when read.

    What training waits for is the copy to the host.  A thread writes it to the disk while training goes on; host
    memory holds one snapshot until it is written, so that the next one waits if the disk is slower than that.

    Every run (and every rank) has a folder of its own inside ``path``, which goes when the run ends.  A run that was
    killed leaves its folder; the next run that is told the same ``path`` removes it, with one warning.  Files of a
    running process are locked and left alone.

    Args:
        path: folder; created if need be.

    Raises:
        ValueError: nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.path = Path(path).expanduser()
        self._host = HostPlace(dtype)
        self._folder: Path | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._last: Future | None = None
        self._remove: weakref.finalize | None = None
        self._told = False
        try:
            self._open()
        except OSError as error:
            raise ValueError(
                f"`history_device` must name a folder in which files can be written, got 'disk:{path}' "
                f"({type(error).__name__}: {error})"
            ) from error

    def keep(self, state: Mapping[str, Tensor], step: int) -> Snapshot:
        if self._folder is None:
            self._open()
        self._await_writer()
        snapshot = _DiskSnapshot(self._folder / f"{step:012d}.safetensors", step, self._host.keep(state, step))
        self._last = snapshot.writing = self._writer.submit(snapshot.write)
        snapshot.writing.add_done_callback(snapshot.settled)
        return snapshot

    def close(self) -> None:
        if self._folder is None:
            return
        self._writer.shutdown(wait=True)
        self._remove()
        self._folder = self._last = None
        self._host.close()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / f".{PREFIX}{LOCK}"):
            _remove_leftovers(self.path)
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.path))
            lock = open(self._folder / LOCK, "wb")  # noqa: SIM115 (held for as long as the folder is)
            _try_lock(lock)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nino-history")
        self._remove = weakref.finalize(self, _remove_folder, self._folder, lock, os.getpid())

    def _await_writer(self) -> None:
        if self._last is None or self._last.done():
            return
        started = time.perf_counter()
        wait([self._last])
        if time.perf_counter() - started > PATIENCE and not self._told:
            self._told = True
            logger.warning(
                f"Training waits for snapshots to be written to {self.path}, which is too slow for the interval "
                "between them; a longer period, a smaller `history_dtype` or a faster disk would help."
            )


class _DiskSnapshot(Snapshot):
    """Read from the host until it is on the disk."""

    def __init__(self, path: Path, step: int, host: Snapshot) -> None:
        self.path, self.step = path, step
        self.writing: Future[bool]
        self._host: Snapshot | None = host
        self._released = False

    def write(self) -> bool:
        """Called in the writer's thread."""
        try:
            return write_snapshot(self.path, self._host.tensors(), self.step, wanted=lambda: not self._released)
        finally:
            self._forget_host()

    def settled(self, writing: Future) -> None:
        """Called once it is written, or given up."""
        if self._released:
            self.path.unlink(missing_ok=True)

    def tensors(self) -> dict[str, Tensor]:
        host = self._host  # the thread may set it to None meanwhile; its buffers stay until the next snapshot
        return map_snapshot(self.file()) if host is None else host.tensors()

    def file(self) -> Path:
        """See :meth:`Snapshot.file`; waits for the writer."""
        self.writing.result()
        return self.path

    def release(self) -> None:
        self._released = True
        if self.writing.cancel():
            self._forget_host()
        elif self.writing.done():
            self.path.unlink(missing_ok=True)

    def _forget_host(self) -> None:
        host, self._host = self._host, None
        host.release()


# -- folders and locks ----------------------------------------------------------------------------------------------


def _remove_leftovers(path: Path) -> None:
    """Remove the folders of runs that are no longer alive, and say so once."""
    whole = torn = 0
    for folder in sorted(path.glob(f"{PREFIX}*")):
        if fcntl is None or not folder.is_dir():
            continue
        try:
            with open(folder / LOCK, "ab") as lock:
                if not _try_lock(lock):
                    continue
                torn += len(list(folder.glob(f"*{TEMPORARY}")))
                whole += len(list(folder.glob("*.safetensors")))
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            logger.info(f"{folder} is left as it is ({type(error).__name__}: {error})")
    if whole or torn:
        logger.warning(
            f"Removed the snapshots of a run that was killed from {path}: {whole} whole and {torn} torn in the middle "
            "of writing. Checkpoints hold their own."
        )


def _remove_folder(folder: Path, lock: IO[bytes], owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child, such as a data loader's
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _try_lock(file: IO[bytes]) -> bool:
    """Lock for as long as the file is open in any process; ``False`` if another holds it or locks are not known."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system knows locks."""
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                logger.info(f"{path} cannot be locked ({error})")
        yield
