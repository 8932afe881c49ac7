"""``hf-nino nowcast``: from the checkpoints of a run to one that is ahead of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..offline import OfflineNowcast, nowcast_checkpoints
from ..training.guard import InvalidNowcast


def nowcast(
    checkpoints: Sequence[str],
    out: Path,
    say: Callable[[str], None],
    *,
    nowcaster: str,
    horizon: int | None = None,
    model: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Nowcast, and say what was done; arguments as for :func:`hf_nino.offline.nowcast_checkpoints`.

    Raises:
        ValueError: see there; also if the nowcast is refused.
    """
    options = {"horizon": horizon, "model": model, "device": device, "overwrite": overwrite}
    try:
        found = nowcast_checkpoints(list(checkpoints), nowcaster, out, **options)
    except InvalidNowcast as error:
        raise ValueError(f"{error}; nothing was written") from error
    say(json.dumps(found.to_dict(), indent=2) if as_json else as_text(found))


def as_text(found: OfflineNowcast) -> str:
    """The same for people."""
    last = found.checkpoints[-1]
    if found.interval is None:
        spacing, ahead = "", f"{found.horizon} intervals"
    else:
        spacing = f", {found.interval} {found.unit} apart"
        ahead = f"{found.horizon} x {found.interval} = {found.horizon_steps} {found.unit}"
    size = ""
    if found.relative_step_norm is not None:
        size = f", a step of {100 * found.relative_step_norm:.3g}% of their size"
    lines = [
        f"read       {len(found.checkpoints)} checkpoints{spacing}: {', '.join(found.checkpoints)}",
        f"nowcast    {found.nowcaster}, {ahead} ahead of {last}",
        f"written    {found.parameters:,} parameters in {found.tensors} tensors{size}",
    ]
    if found.unmoved:
        lines.append(f"unmoved    {found.unmoved} tensors, left alone")
    if found.carried:
        lines.append(f"carried    {len(found.carried)} other tensors (such as {found.carried[0]})")
    lines += [f"note       {remark}" for remark in found.remarks]
    return "\n".join([*lines, f"checkpoint {found.out} ({found.seconds:.1f} s)"])
