"""``hf-nino estimate``: what nowcasting would cost, before anything is trained."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import nn

from ..defaults import NOWCASTER
from ..graph.source import configuration, model_class
from ..nowcaster.auto import resolve_nowcaster
from ..training.estimate import TOO_MUCH, Estimate, calibrate, estimate, matrix_rate, readable, step_seconds
from ..training.period import resolve_schedule
from ..training.storage import as_dtype, check_place

BATCH_TOKENS = 2**15
# Seconds that the largest trial takes at least, where the model is not smaller.
TRIAL = 0.2


def estimate_model(
    model: str,
    nowcaster: str = NOWCASTER,
    *,
    period: int | None = None,
    history_device: str = "cpu",
    history_dtype: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
    seconds_per_step: float | None = None,
) -> tuple[str, Estimate]:
    """The name of a model's class, and what nowcasts would cost it on this machine.

    The model is built from its configuration, without weights.

    Args:
        model: a folder, a config.json, a model type such as ``"llama"`` or a repository on the Hub.
        nowcaster, period, history_device, history_dtype: as for :class:`~hf_nino.training.nowcasting.Nowcasting`.
        batch_tokens: tokens of one optimizer step; only read when ``seconds_per_step`` is not given.
        seconds_per_step: of the base optimizer; else 6 operations per parameter and token at the rate of this
            machine's matrix products, which is the least that it can be.

    Raises:
        ValueError: an argument out of range, no such model, or one that cannot be built without weights.
        OSError: no such nowcaster.
    """
    check_place(history_device)
    dtype = as_dtype(history_dtype)
    if batch_tokens < 1:
        raise ValueError(f"`batch_tokens` must be at least 1, got {batch_tokens}")
    if seconds_per_step is not None and not 0 < seconds_per_step < float("inf"):
        raise ValueError(f"`step_seconds` must be above 0, got {seconds_per_step}")
    chosen = resolve_nowcaster(nowcaster)
    period, interval = resolve_schedule(chosen, period, None, None)
    network = without_weights(model)
    shapes = [tuple(p.shape) for p in network.parameters() if p.requires_grad and p.is_floating_point()]
    parameters = sum(math.prod(shape) for shape in shapes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = {"device": device, "history_device": history_device, "history_dtype": dtype}
    calibration = calibrate(chosen, parameters, **place, long_enough=TRIAL)
    steps_are = "as given"
    if seconds_per_step is None:
        rate = matrix_rate(device)
        seconds_per_step = step_seconds(parameters, batch_tokens, rate)
        steps_are = f"at least, for {batch_tokens:,} tokens at {rate / 1e12:.2g} TFLOP/s"
    return type(network).__name__, estimate(
        calibration,
        chosen,
        parameters,
        work=chosen.work(shapes, device),
        period=period,
        interval=interval,
        history_device=history_device,
        history_dtype=dtype,
        seconds_per_step=seconds_per_step,
        steps_are=steps_are,
    )


def without_weights(model: str) -> nn.Module:
    """The model that a configuration describes, on the meta device.

    Raises:
        ValueError: there is no such configuration, or it cannot be built so.
    """
    config, _ = configuration(model)
    build = model_class(config, model)
    try:
        with torch.device("meta"):
            return build(config)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"MODEL {model} cannot be built without its weights ({error})") from error


def as_json(name: str, found: Estimate) -> str:
    """All numbers, in seconds and bytes."""
    values: dict[str, Any] = {"model": name, **found.to_dict(), "too_much": found.overhead > TOO_MUCH}
    return json.dumps(values, indent=2)


def as_table(name: str, nowcaster: str, found: Estimate) -> str:
    """The same for people."""
    each = readable(found.snapshot_bytes)
    rows = [("placement", f"memory of {found.context} snapshots of {each}" if found.context > 1 else "memory")]
    rows += [
        (place, " and ".join(f"{readable(size)} of {kind}" for kind, size in memory.items()))
        for place, memory in found.memory.items()
    ]
    undo = f"{readable(found.undo_bytes)}, while a nowcast can be taken back (AdamW); {found.seconds_per_undo:.3g} s"
    rows.append(("probation", undo))
    if found.carried_bytes:
        rows.append(("nowcaster", f"{readable(found.carried_bytes)}, carried from nowcast to nowcast"))
    rows += [
        ("", ""),
        ("nowcast", f"{found.seconds_per_nowcast:.3g} s, once every {found.period} steps"),
        (
            "snapshot",
            f"{found.seconds_per_snapshot:.3g} s that training waits, once every {found.interval} steps, on "
            f"{found.history_device}",
        ),
        ("step", f"{found.seconds_per_step:.3g} s ({found.steps_are})"),
        ("overhead", f"{100 * found.overhead:.2g}% of training time"),
    ]
    lines = [f"{name}: {found.parameters:,} trainable parameters, nowcaster {nowcaster}", ""]
    lines += [f"{label:<10} {text}".rstrip() for label, text in rows]
    if found.overhead > TOO_MUCH:
        lines += ["", f"More than {TOO_MUCH:.0%}: a longer period, or a nowcaster without weights, costs less."]
    return "\n".join(lines)
