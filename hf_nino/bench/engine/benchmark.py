"""What the engine benchmark measures, in which order, and how it goes on where it stopped.

Every measurement runs in a process of its own (:mod:`hf_nino.bench.engine.worker`).  All of them are done once before
any is repeated, so that what is compared was measured side by side, and the best of all repeats counts: others can
only make a measurement slower.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...training.estimate import in_words
from .measure import busy, network_of
from .models import SHAPES, Shape
from .original import CHECKPOINT, check_checkout
from .worker import measure

MODES = ("float32", "fast")
PLACES = {"cpu": ("host",), "cuda": ("host", "device")}
DEFAULTS = {"cpu": (12_000_000, 3), "cuda": (10_000_000_000, 1)}
"""Most parameters of a model, and repeats."""
LARGE = 2_000_000_000
"""Parameters from which snapshots are bfloat16 and live in host memory."""
COMPARED = {"cpu": 20_000_000, "cuda": LARGE}
"""Parameters up to which the error of ``fast`` is measured."""
HORIZON = 20
RESULTS = "results.json"

Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        device: ``"cpu"`` or ``"cuda"``, where nowcasts are computed.
        threads: of every process.
        repeats: of every measurement, but those of the original release, which are done once.
        max_parameters: no larger model is measured.
        nowcaster: see :func:`hf_nino.bench.engine.measure.network_of`.
        original: a checkout of the original release, to be measured as well.
        shapes: models to choose from.

    Raises:
        ValueError: an argument out of range.
        OSError: no such nowcaster.
    """

    device: str
    threads: int
    repeats: int
    max_parameters: int
    nowcaster: str | None = None
    original: Path | None = None
    shapes: tuple[Shape, ...] = SHAPES

    @classmethod
    def of(
        cls,
        device: str | None = None,
        threads: int | None = None,
        repeats: int | None = None,
        max_parameters: int | None = None,
        nowcaster: str | None = None,
        original: Path | None = None,
        shapes: tuple[Shape, ...] = SHAPES,
    ) -> Settings:
        """Settings with what suits the machine where ``None`` is given."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in PLACES:
            raise ValueError(f"`device` must be one of {tuple(PLACES)}, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` is 'cuda', but PyTorch finds no such device here; use 'cpu'")
        most, times = DEFAULTS[device]
        given = {"threads": threads, "repeats": repeats, "max_parameters": max_parameters}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if original is not None:
            original = check_checkout(original)
            if device != "cpu":
                raise ValueError(f"`original` is measured on the CPU only, got `device` {device!r}")
            nowcaster = nowcaster or str(original / CHECKPOINT)
            if not nowcaster.endswith(".pt"):
                raise ValueError(f"`nowcaster` must be a .pt file if `original` is to use it too, got {nowcaster}")
        if nowcaster is not None:
            nowcaster = str(Path(nowcaster).resolve()) if Path(nowcaster).exists() else nowcaster
            network_of(nowcaster, torch.device("cpu"))
        settings = cls(
            device,
            threads or torch.get_num_threads(),
            repeats or times,
            max_parameters or most,
            nowcaster,
            original,
            shapes,
        )
        if not settings.chosen():
            least = min(shape.parameters() for shape in shapes)
            raise ValueError(f"`max_parameters` must be at least {least:,}, got {max_parameters:,}")
        return settings

    def chosen(self) -> list[tuple[Shape, int]]:
        """Shapes that are not too large, and their parameters."""
        counted = [(shape, shape.parameters()) for shape in self.shapes]
        return [(shape, size) for shape, size in counted if size <= self.max_parameters]

    def identity(self) -> dict[str, Any]:
        """What must be the same for results to be comparable."""
        return {
            "machine": _machine(self.device),
            "torch": torch.__version__,
            "device": self.device,
            "threads": self.threads,
            "nowcaster": self.nowcaster or "random weights",
            "horizon": HORIZON,
        }


@dataclass(frozen=True)
class Job:
    """One measurement: ``key`` names its result, ``size`` are the parameters of its model."""

    key: str
    kind: str
    arguments: dict[str, Any]
    size: int = 0


def plan(settings: Settings) -> Iterator[Job]:
    """All measurements in the order in which they are done."""
    chosen = settings.chosen()
    same = {"device": settings.device, "nowcaster": settings.nowcaster, "horizon": HORIZON}
    for repeat in range(settings.repeats):
        yield Job(f"floors/{repeat}", "floors", {"device": settings.device, "threads": settings.threads})
        for shape, size in chosen:
            model = {"shape": shape.to_dict(), "dtype": "bfloat16" if size > LARGE else "float32"}
            for place in PLACES[settings.device][: 1 if size > LARGE else None]:
                for mode in MODES:
                    arguments = {**same, **model, "mode": mode, "place": place}
                    yield Job(f"nowcasts/{shape.name}/{place}/{mode}/{repeat}", "nowcasts", arguments, size)
            if repeat == 0 and size <= COMPARED[settings.device]:
                arguments = {**same, **model, "place": "host"}
                yield Job(f"fast_error/{shape.name}", "fast_error", arguments, size)
            if repeat == 0 and settings.original and shape.original:
                arguments = {"shape": shape.to_dict(), "checkpoint": settings.nowcaster, "horizon": HORIZON}
                yield Job(f"original/{shape.name}", "original", arguments, size)


def run_engine_benchmark(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what is not yet in ``folder/results.json``, which is written after every measurement.

    A measurement that fails is reported and left out; the same call tries it again.

    Args:
        say: is told beforehand how long it will take.

    Returns:
        ``{"identity": ..., "done": {key: result}, "failed": {key: message}}``, with all that the folder held before.

    Raises:
        ValueError: the folder holds results of other settings or another machine, or the original release's code
            cannot be imported.
        ChildProcessError: the very first measurement failed.
    """
    results = _read(folder / RESULTS, settings)
    jobs = list(plan(settings))
    results["failed"] = {}
    if settings.original and any(job.kind == "original" and job.key not in results["done"] for job in jobs):
        _check_original(settings.original)
    first, *_ = jobs
    if first.key not in results["done"]:
        results["done"][first.key] = measure(first.kind, first.arguments, settings.threads)
        _write(folder / RESULTS, results)
    missing = [job for job in jobs if job.key not in results["done"]]
    if missing:
        seconds = sum(expected_seconds(job, results["done"][first.key]["float32"]) for job in missing)
        say(f"{len(missing)} measurements, about {in_words(seconds)}; the same command goes on where this one stops")
    with tqdm(missing, desc="engine", unit="measurement", disable=not missing) as progress:
        for job in progress:
            progress.set_postfix_str(job.key)
            try:
                results["done"][job.key] = _measure(job, settings)
            except ChildProcessError as error:
                results["failed"][job.key] = str(error)
            _write(folder / RESULTS, results)
    return results


def expected_seconds(job: Job, rate: float) -> float:
    """About how long a measurement takes where float32 products run at ``rate`` FLOP/s."""
    one = 3e5 * job.size / rate
    work = {
        "floors": 4.0,
        "nowcasts": one + min(4 * one, 2.0),
        "fast_error": 2 * one,
        "original": 3e6 * job.size / rate + 3 * one,
    }
    return 7.0 + 5e-7 * job.size + work[job.kind]


def best_seconds(results: dict[str, Any], prefix: str) -> tuple[float, float] | None:
    """The least (busy, wall) seconds of all nowcasts whose keys begin with ``prefix``."""
    identity = results["identity"]
    taken = [s for key, result in results["done"].items() if key.startswith(prefix) for s in result["seconds"]]
    if not taken:
        return None
    return min(busy(s, identity["threads"], identity["device"]) for s in taken), min(wall for wall, _ in taken)


def _measure(job: Job, settings: Settings) -> dict[str, Any]:
    if job.kind != "original":
        return measure(job.kind, job.arguments, settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        arguments = job.arguments | {"file": str(Path(folder) / "original.safetensors")}
        found = measure("original", arguments, settings.threads, paths=(settings.original,))
        return found | measure("compare", arguments, settings.threads)


def _check_original(path: Path) -> None:
    try:
        measure("importable", {}, 1, paths=(path,))
    except ChildProcessError as error:
        raise ValueError(
            f"the code in `original` {path} cannot be imported ({error}); install what it needs, or put it on "
            "PYTHONPATH"
        ) from error


def _read(path: Path, settings: Settings) -> dict[str, Any]:
    empty = {"identity": settings.identity(), "done": {}, "failed": {}}
    if not path.is_file():
        return empty
    try:
        known = json.loads(path.read_text("utf-8"))
        identity, done = known["identity"], known["done"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`out` has a {path.name} that is no result of this benchmark; delete {path}") from error
    different = [name for name, value in empty["identity"].items() if identity.get(name) != value]
    if different:
        raise ValueError(
            f"`out` {path.parent} holds results with another {' and '.join(different)}, and times are compared "
            "within one run only; choose another folder"
        )
    return empty | {"done": done}


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1), "utf-8")
    os.replace(new, path)


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, {os.cpu_count()} cores"
