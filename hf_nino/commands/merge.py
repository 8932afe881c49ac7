"""``hf-nino merge``: one checkpoint out of several that were fine-tuned from one base."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..merging import FolderMerge, MergeRecipe, merge_folders
from ..training.guard import InvalidNowcast


def merge(
    base: str,
    fine_tuned: Sequence[str],
    out: Path,
    say: Callable[[str], None],
    *,
    nowcaster: str | None = None,
    method: str = "nowcast",
    scale: float | None = None,
    horizons: str | None = None,
    order: str | None = None,
    rotate: bool | None = None,
    keep: Sequence[str] = (),
    model: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Merge, and say what was done; arguments as for :func:`hf_nino.merging.merge_folders`.

    Args:
        horizons, order: whole numbers, comma-separated.

    Raises:
        ValueError: see there; also if the merge is refused.
    """
    recipe = MergeRecipe(
        method=method,
        scale=scale,
        horizons=_numbers("horizons", horizons),
        order=_numbers("order", order),
        rotate=rotate,
        keep=tuple(keep),
    )
    options = {"recipe": recipe, "model": model, "device": device, "overwrite": overwrite}
    try:
        found = merge_folders(base, list(fine_tuned), out, nowcaster, **options)
    except InvalidNowcast as error:
        raise ValueError(f"{error}; nothing was written") from error
    say(json.dumps(found.to_dict(), indent=2) if as_json else as_text(found))


def as_text(found: FolderMerge) -> str:
    """The same for people."""
    lines = [
        f"base     {found.base}",
        f"merged   {', '.join(found.fine_tuned)}: {found.parameters:,} parameters in {found.tensors} tensors",
        f"method   {found.method}" + ("" if found.method == "average" else f", scale {found.scale:g}"),
    ]
    if found.nowcaster is not None:
        order = " ".join("base" if number == 0 else str(number) for number in found.order)
        lines.append(
            f"nowcast  {found.nowcaster}, mean of horizons {', '.join(map(str, found.horizons))}; states: {order}"
            + (", in every rotation" if found.rotate else "")
        )
    if found.kept:
        lines.append(f"kept     {len(found.kept)} tensors of the base (such as {found.kept[0]})")
    return "\n".join([*lines, f"model    {found.out} ({found.seconds:.1f} s)"])


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise ValueError(f"`{name}` must be whole numbers separated by commas, got {text!r}") from error
