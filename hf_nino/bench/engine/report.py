"""Numbers, table and verdicts of the engine benchmark; nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...training.estimate import readable
from .benchmark import best_seconds


@dataclass(frozen=True)
class Row:
    """Nowcasts of one model in one mode, the best of all repeats.

    Attributes:
        busy: seconds that count (:func:`hf_nino.bench.engine.measure.busy`); all that follows is computed with them.
        rate: FLOP/s.
        matrix_floor, bandwidth_floor: seconds that the matrix products, and reading and writing states, take alone.
        error: of ``fast``, relative to the predicted step.
    """

    model: str
    parameters: int
    place: str
    mode: str
    busy: float
    wall: float
    extra_bytes: int
    rate: float
    matrix_floor: float
    bandwidth_floor: float
    error: float | None

    @property
    def microseconds(self) -> float:
        """Per parameter."""
        return 1e6 * self.busy / self.parameters


@dataclass(frozen=True)
class Against:
    """One model with the original release's code, and the ratios to rows of the same run."""

    model: str
    busy: float
    extra_bytes: int
    speedup: dict[str, float]
    memory: dict[str, float]
    difference: float
    own_difference: float


@dataclass(frozen=True)
class Verdict:
    """A target, what was found (``None``: not measured), and whether that is good enough."""

    target: str
    found: str | None
    passed: bool


def floors(results: dict[str, Any]) -> dict[str, float]:
    """The best of all repeats."""
    found = [result for key, result in results["done"].items() if key.startswith("floors/")]
    return {name: max(floor[name] for floor in found) for name in found[0]}


def rows(results: dict[str, Any]) -> list[Row]:
    """One for every model, place and mode, in the order of measurement."""
    limits, found = floors(results), {}
    for key, result in results["done"].items():
        kind, *names = key.split("/")
        if kind != "nowcasts" or tuple(names[:3]) in found:
            continue
        model, place, mode = names[:3]
        prefix = f"nowcasts/{model}/{place}/{mode}/"
        busy, wall = best_seconds(results, prefix)
        rest = result["operations"] - result["edge_operations"]
        error = results["done"].get(f"fast_error/{model}", {}).get("fast_error") if mode == "fast" else None
        found[model, place, mode] = Row(
            model,
            result["parameters"],
            place,
            mode,
            busy,
            wall,
            max(other["extra_bytes"] for name, other in results["done"].items() if name.startswith(prefix)),
            result["operations"] / busy,
            result["edge_operations"] / limits[mode] + rest / limits["float32"],
            result["moved_bytes"] / limits["bandwidth"],
            error,
        )
    return sorted(found.values(), key=lambda row: row.parameters)


def against(results: dict[str, Any]) -> list[Against]:
    """The comparisons with the original release."""
    table, found = rows(results), []
    for key, result in results["done"].items():
        kind, _, model = key.partition("/")
        if kind != "original":
            continue
        busy, _ = best_seconds(results, key)
        ours = {row.mode: row for row in table if row.model == model}
        found.append(
            Against(
                model,
                busy,
                result["extra_bytes"],
                {mode: busy / row.busy for mode, row in ours.items()},
                {mode: row.extra_bytes / result["extra_bytes"] for mode, row in ours.items()},
                result["difference"],
                result["own_difference"],
            )
        )
    return found


def exponent(table: list[Row], place: str, mode: str) -> float | None:
    """b of the least-squares line ``log seconds = a + b log parameters``; ``None`` for less than three models."""
    points = [(math.log(r.parameters), math.log(r.busy)) for r in table if (r.place, r.mode) == (place, mode)]
    if len(points) < 3:
        return None
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The engine's targets on this kind of device."""
    table = rows(results)
    if results["identity"]["device"] == "cuda":
        return _device_verdicts(table)
    found = []
    for mode in ("float32", "fast"):
        slope = exponent(table, "host", mode)
        text = None if slope is None else f"{slope:.3f}"
        found.append(
            Verdict(f"{mode}: seconds grow as parameters ** 1.1 at most", text, slope is not None and slope <= 1.1)
        )
    pair = next((pair for pair in against(results) if pair.model == "gpt2-3.4M"), None)
    for mode, times in (("float32", 5), ("fast", 12)):
        value = None if pair is None else pair.speedup[mode]
        text = None if value is None else f"{value:.1f} times"
        target = f"{mode}: at least {times} times as fast as the original on gpt2-3.4M"
        found.append(Verdict(target, text, value is not None and value >= times))
    share = None if pair is None else max(pair.memory.values())
    text = None if share is None else f"{share:.3f}"
    found.append(Verdict("at most a tenth of its extra memory", text, share is not None and share <= 0.1))
    same = None if pair is None else pair.difference
    text = None if same is None else f"{same:.1e}"
    found.append(
        Verdict(
            "float32: the same prediction to 1e-4 of the step, on its wiring", text, same is not None and same <= 1e-4
        )
    )
    return found


def _device_verdicts(table: list[Row]) -> list[Verdict]:
    """For ``fast``, on one H200-class device."""
    by = {(row.model, row.place): row for row in table if row.mode == "fast"}
    found = []
    for model, place, seconds in (("llama-1B", "host", 3.0), ("llama-1B", "device", 1.5), ("llama-8B", "host", 30.0)):
        row = by.get((model, place))
        text = None if row is None else f"{row.wall:.2f} s"
        target = f"{model}, states {_where(place)}: under {seconds:g} s"
        found.append(Verdict(target, text, row is not None and row.wall < seconds))
        if model == "llama-1B" and place == "host":
            text = None if row is None else readable(row.extra_bytes)
            target = f"{model}, states {_where(place)}: under 4 GB of device memory beyond the model"
            found.append(Verdict(target, text, row is not None and row.extra_bytes < 4e9))
    return found


def as_dict(results: dict[str, Any]) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        **results["identity"],
        "floors": floors(results),
        "rows": [asdict(row) | {"microseconds_per_parameter": row.microseconds} for row in rows(results)],
        "original": [asdict(pair) for pair in against(results)],
        "verdicts": [asdict(verdict) for verdict in verdicts(results)],
        "failed": results["failed"],
    }


def markdown(results: dict[str, Any], picture: str) -> str:
    """The report: what was measured where, the table, the original beside it, the targets."""
    identity, limits, table = results["identity"], floors(results), rows(results)
    clock = "process time" if identity["threads"] == 1 and identity["device"] == "cpu" else "wall time"
    lines = [
        "# What a nowcast costs",
        "",
        f"{identity['machine']}, PyTorch {identity['torch']}, {_threads(identity['threads'])}; nowcaster: "
        f"{Path(identity['nowcaster']).name}. Seconds are {clock}, the best of all repeats; memory is what a nowcast "
        "needs at most beyond the states, the prediction included. Graphs and positional encodings, made once for a "
        "run, are not in these numbers.",
        "",
        f"Floors: matrix products at {limits['float32'] / 1e9:,.0f} GFLOP/s in float32 and at "
        f"{limits['fast'] / 1e9:,.0f} as `fast` has them, {limits['bandwidth'] / 1e9:,.1f} GB/s copied.",
        "",
        f"![Seconds and memory of a nowcast against parameters]({picture})",
        "",
        "| model | parameters | states | mode | seconds | µs per parameter | GFLOP/s | of the matrix rate "
        "| extra memory | error of the step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        error = "" if row.error is None else f"{row.error:.2%}"
        lines.append(
            f"| {row.model} | {row.parameters:,} | {_where(row.place)} | {row.mode} | {row.busy:.3g} "
            f"| {row.microseconds:.3g} | {row.rate / 1e9:,.0f} | {row.matrix_floor / row.busy:.0%} "
            f"| {readable(row.extra_bytes)} | {error} |"
        )
    pairs = against(results)
    if pairs:
        lines += [
            "",
            "## Against the original release",
            "",
            "Same states, same checkpoint, same run. *Same wiring* is the difference of float32 predictions, relative "
            "to the step, on a graph wired as the original's; *own graph* is the difference on ours.",
            "",
            "| model | original, seconds | float32 | fast | original, memory | float32 | fast | same wiring "
            "| own graph |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for pair in pairs:
        speed = " | ".join(f"{pair.speedup[mode]:.1f} times as fast" for mode in ("float32", "fast"))
        memory = " | ".join(f"{pair.memory[mode]:.1%}" for mode in ("float32", "fast"))
        lines.append(
            f"| {pair.model} | {pair.busy:.3g} | {speed} | {readable(pair.extra_bytes)} | {memory} "
            f"| {pair.difference:.0e} | {pair.own_difference:.1%} |"
        )
    lines += ["", "## Targets", "", "| target | found | |", "|---|---|---|"]
    for verdict in verdicts(results):
        word = "not measured" if verdict.found is None else "pass" if verdict.passed else "**fail**"
        lines.append(f"| {verdict.target} | {verdict.found or ''} | {word} |")
    if results["failed"]:
        lines += ["", "## Failed", "", *(f"* {key}: {why}" for key, why in results["failed"].items())]
    return "\n".join(lines) + "\n"


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _where(place: str) -> str:
    return {"host": "in host memory", "device": "on the device"}[place]
