"""Starts real processes that talk over gloo, and brings back what each of them found."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in a server from which every process is forked.
PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "hf_nino.training.trainer"]
# Seconds that a collective waits for a rank that does not come, and a launch for its processes.
TIMEOUT, PATIENCE = 60, 180


def launch(function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout: float = TIMEOUT) -> list:
    """Run ``function(rank, folder, *args)`` on ``world_size`` processes; what each returned, by rank.

    Raises:
        AssertionError: with the traceback of every process that failed, or the stacks of those that did not end.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOAD)
    folder = Path(folder) / f"{function.__name__}-{world_size}-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    torch.save(args, folder / "arguments.pt")  # tensors would travel as open files, of which there may be too many
    processes = [
        context.Process(target=_process, args=(function, rank, world_size, str(folder), timeout))
        for rank in range(world_size)
    ]
    for rank, process in enumerate(processes):
        (folder / f"stacks-{rank}").touch()
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        os.kill(processes[rank].pid, signal.SIGUSR1)  # it writes down where it is
        processes[rank].join(2)
        processes[rank].kill()
        processes[rank].join()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    errors += [f"-- rank {rank} is at:\n{(folder / f'stacks-{rank}').read_text()}" for rank in late]
    assert not errors and not late, "\n".join([f"ranks {late} did not end", *errors])
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _process(function: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # accelerate asks for them; nobody connects there
    stacks = Path(folder, f"stacks-{rank}").open("w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, stacks)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        assert dist.get_world_size() == world_size
        args = torch.load(f"{folder}/arguments.pt", weights_only=False)
        # By the time the group is destroyed, `function` has returned and its models are gone: DDP's reducer would
        # otherwise be the last to hold the group, and wait for its threads without letting go of the GIL.  One of them
        # may need it to forget the last collective (torch 2.13; one run in about 100 did not end).
        torch.save(function(rank, *args), f"{folder}/result-{rank}.pt")
        if dist.is_initialized():
            dist.barrier()  # others may still be reading what this rank has sent
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"-- rank {rank}:\n{traceback.format_exc()}")
        raise
