"""The graph of a tiny model of every type in transformers: ``python -m hf_nino.graph.sweep``.

Each type runs in a process of its own, with a time limit, and adds one row to a JSON file (and to the table beside it
that the documentation quotes) as soon as it is done; an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .coverage import Row, count, summary, table
from .structure import NeuralGraph
from .tiny import NOT_OFFLINE, model_types, tiny_model

KINDS: Mapping[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
}
"""Name of each kind, and the automatic class behind it."""

SECONDS_PER_TYPE = 0.6
"""What a type costs on one core, for the announcement."""


def measure(kind: str, model_type: str) -> Row:
    """The row of one type; errors become part of it."""
    start = time.perf_counter()
    try:
        graph = NeuralGraph.from_model(tiny_model(KINDS[kind], model_type))
        row = count(kind, model_type, graph)
    except Exception as error:
        row = Row(kind, model_type, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Row(**(vars(row) | {"seconds": round(time.perf_counter() - start, 2)}))


def read(path: Path) -> list[Row]:
    """The rows of a file; none when it is absent or was made by another transformers."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return [Row(**row) for row in content["rows"]] if content["transformers"] == transformers.__version__ else []


def write(path: Path, rows: Sequence[Row]) -> None:
    """The rows as JSON, and as a table in the file of the same name that ends in ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"transformers": transformers.__version__, "rows": [asdict(row) for row in rows]}
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(path)
    path.with_suffix(".md").write_text(table(rows))


def _work(connection: Connection, kind: str, model_type: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    connection.send(measure(kind, model_type))


def run(tasks: Sequence[tuple[str, str]], jobs: int = 1, timeout: float = 60.0) -> Iterator[Row]:
    """Measure (kind, type) pairs, each in a process of its own; rows come in the order in which they are done.

    Args:
        jobs: processes at a time.
        timeout: seconds after which a type is given up; its row says so.
    """
    methods = multiprocessing.get_all_start_methods()
    # A fork server imports torch and transformers once for all processes.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["hf_nino.graph.build", "hf_nino.graph.tiny"])
    waiting = list(reversed(tasks))
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, tuple[str, str], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, *task), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (process, task, time.monotonic() + timeout)
            patience = max(0.0, min(deadline for _, _, deadline in running.values()) - time.monotonic())
            ready = set(wait(list(running), patience))
            for receiver, (process, task, deadline) in list(running.items()):
                if receiver not in ready and time.monotonic() < deadline:
                    continue
                try:
                    row = receiver.recv() if receiver in ready else Row(*task, error=f"no graph after {timeout:g} s")
                except EOFError:
                    process.join()
                    row = Row(*task, error=f"the process ended with exit code {process.exitcode}")
                process.kill()
                process.join()
                receiver.close()
                del running[receiver]
                yield row
    finally:
        for process, _, _ in running.values():
            process.kill()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m hf_nino.graph.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=[*KINDS], nargs="+", default=[*KINDS], help="kinds of models")
    parser.add_argument("--types", help="comma-separated model types, measured even if the file has them")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one type")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.json"), help="results; a table goes beside it")
    options = parser.parse_args(arguments)
    chosen = options.types.split(",") if options.types else None
    out = options.out.with_suffix(".json")
    rows = {(row.kind, row.type): row for row in read(out)}
    tasks = [
        (kind, name)
        for kind in options.kind
        for name in model_types(KINDS[kind])
        if name not in NOT_OFFLINE and (name in chosen if chosen else (kind, name) not in rows)
    ]
    minutes = len(tasks) * SECONDS_PER_TYPE / max(1, options.jobs) / 60
    with tqdm(total=len(tasks), unit="type", dynamic_ncols=True) as progress:
        progress.write(f"{len(tasks)} types with {options.jobs} jobs: about {minutes:.0f} minutes; results in {out}")
        for row in run(tasks, options.jobs, options.timeout):
            rows[row.kind, row.type] = row
            write(out, list(rows.values()))
            progress.write(row.line())
            progress.update()
        progress.write(summary(list(rows.values())))


if __name__ == "__main__":
    main()
