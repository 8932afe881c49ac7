"""Processes that share work: they have their threads, and do not outlive who started them."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, time
from hf_nino.workers import threads_of_each, workers
import torch
if __name__ == "__main__":
    with workers(1) as pool:
        print(pool.submit(os.getpid).result(), pool.submit(torch.get_num_threads).result(), flush=True)
        pool.submit(time.sleep, 600)
        {then}
"""


def start(tmp_path, then):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(then=then), "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment)
    worker, threads = map(int, process.stdout.readline().split())
    assert threads == 1
    return process, worker


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pid, patience=60):
    end = time.monotonic() + patience
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_worker_dies_with_a_parent_that_is_killed(tmp_path):
    """A worker in the middle of ten minutes of work is gone soon after its parent was killed outright; not before."""
    process, worker = start(tmp_path, "time.sleep(600)")
    try:
        time.sleep(0.5)
        assert alive(worker)
        process.kill()
        process.wait(60)
        assert gone(worker)
    finally:
        process.kill()
        process.stdout.close()


def test_workers_are_terminated_at_the_end(tmp_path):
    """Leaving the block ends workers that are still at work, and the parent goes on at once."""
    process, worker = start(tmp_path, "time.sleep(0.5)")
    with process.stdout:
        assert process.wait(120) == 0
    assert gone(worker)
