"""Processes that share work out among the cores, and are gone when who started them is."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from transformers.utils import logging


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(jobs: int) -> int:
    """Threads of each of so many processes: its share of the cores, or OMP_NUM_THREADS where that is set (1 is best on
    a busy machine: small models lose far more by waiting than they gain by sharing)."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // jobs))


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``jobs`` new processes with :func:`threads_of_each`, which only log errors.

    At the end they are terminated, finished or not; and a worker whose parent dies, however it does, dies too.

    Raises:
        ChildProcessError: one of them was killed, for want of memory perhaps.
    """
    before, threads = os.environ.get("OMP_NUM_THREADS"), threads_of_each(jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # workers read it when they start
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A process was killed, for want of memory perhaps: the same command with fewer `jobs` goes on where it "
            "stopped"
        ) from error
    finally:
        processes = list((pool._processes or {}).values())  # shutting down forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        if before is None:
            os.environ.pop("OMP_NUM_THREADS")
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    # A parent that is killed cannot terminate anybody, and a worker would only notice at the end of its task.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
