"""Processes that share work: what is raised when one is killed, and that none outlives its work or its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hf_nino.workers import workers


def _kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def _fail():
    raise KeyError("of the work itself")


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _gone(process: int, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while _alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not _alive(process)


def test_a_killed_process_is_one_clear_error_and_an_error_of_the_work_stays_what_it_is():
    with (
        pytest.raises(ChildProcessError, match=r"killed, for want of memory perhaps: .* fewer `jobs`"),
        workers(1) as pool,
    ):
        pool.submit(_kill_myself).result()
    with pytest.raises(KeyError, match="of the work itself"), workers(1) as pool:
        pool.submit(_fail).result()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks processes up in /proc")
def test_processes_are_gone_when_the_pool_is_left():
    """Even one that is still at work; while the pool is there, it lives."""
    with workers(1) as pool:
        process = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        assert _alive(process)
    assert _gone(process)


ORPHAN = """
import os, time
from hf_nino.workers import workers
if __name__ == "__main__":
    with workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks processes up in /proc")
def test_processes_leave_with_a_parent_that_is_killed(tmp_path):
    """A killed parent runs no code of its own, so its workers have to notice."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    process = int(parent.stdout.readline())
    assert _alive(process)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(process)
