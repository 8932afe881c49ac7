"""``hf-nino meta-train``, from the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..metatrain.meta_settings import MetaSettings
from ..metatrain.meta_training import PERIOD, meta_train
from ..nowcaster.configuration import NowcasterConfig


def train_nowcaster(
    trajectories: str,
    out: Path,
    say: Callable[[str], None],
    *,
    initial: str | None = None,
    kind: str | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    context: int | None = None,
    max_horizon: int | None = None,
    period: int | None = None,
    horizon_input: bool = False,
    rate_input: bool = False,
    intervals: str | None = None,
    held_out_tasks: str | None = None,
    report_to: str = "none",
    device: str | None = None,
    save_every: int | None = None,
    evaluate_every: int | None = None,
    evaluation_slices: int = 8,
    **settings: Any,
) -> None:
    """Meta-train a nowcaster, and say where it is.

    Args:
        kind: ``"nino"`` or ``"wnn"``; this, the sizes and the inputs only without ``initial``.  ``None``: the default.
        intervals: ``"LOW-HIGH"`` or one number, in steps; see ``interval_range``.
        held_out_tasks: comma-separated patterns; ``"none"`` for no task.
        report_to: comma-separated names of trackers.
        settings: of :class:`~hf_nino.metatrain.meta_settings.MetaSettings`.

    Raises:
        ValueError, OSError, FloatingPointError: see :func:`hf_nino.metatrain.meta_training.meta_train`.
    """
    sizes = {
        "nowcaster_type": kind,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "context": context,
        "max_horizon": max_horizon,
        "period": period,
        "horizon_input": horizon_input or None,
        "rate_input": rate_input or None,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    if initial is not None and given:
        raise ValueError(f"`{next(iter(given))}` must be left out with `initial`, whose configuration is kept")
    meta_train(
        trajectories,
        out,
        config=None if initial is not None else NowcasterConfig(**({"period": PERIOD} | given)),
        settings=MetaSettings(interval_range=_range(intervals), held_out_tasks=_patterns(held_out_tasks), **settings),
        initial=initial,
        device=device,
        report_to=[name.strip() for name in report_to.split(",") if name.strip()],
        save_every=save_every,
        evaluate_every=evaluate_every,
        evaluation_slices=evaluation_slices,
        say=say,
    )


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"`intervals` must be a number of steps, or two like 25-100, got {text!r}") from None


def _patterns(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())
