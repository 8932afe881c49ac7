"""A measurement in a process of its own, so that its memory is its own.

``python -m hf_nino.bench.engine.worker JOB RESULT`` is that process; :func:`measure` starts it and gives
back what it wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
"""The folder that holds the package."""


def measure(kind: str, arguments: dict[str, Any], threads: int, *, paths: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a measurement returns in a new process with that many threads; :func:`perform` knows the kinds.

    Args:
        paths: where Python looks for modules first.

    Raises:
        ChildProcessError: it failed; the message is the last line of what it wrote.
    """
    search = [*map(str, paths), str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(search),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps({"kind": kind, "threads": threads, "arguments": arguments}))
        command = [sys.executable, "-m", "hf_nino.bench.engine.worker", str(job), str(result)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode == 0 and result.is_file():
            return json.loads(result.read_text())
    last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
    killed = f"the process was ended by signal {-done.returncode}" if done.returncode < 0 else last
    raise ChildProcessError(f"measuring {kind} failed: {killed}")


def perform(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A measurement in this process."""
    from . import measure as measurements
    from . import original

    kinds = {
        "floors": measurements.floors,
        "nowcasts": measurements.nowcasts,
        "fast_error": measurements.fast_error,
        "importable": original.check_runs,
        "original": original.original_nowcast,
        "compare": original.compare,
    }
    return kinds[kind](**arguments)


def main() -> None:
    """Do the job in the file that the first argument names and write its result to the second."""
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    result = perform(job["kind"], job["arguments"])
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
