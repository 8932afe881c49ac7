"""``hf-nino record``, from the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..metatrain.recipe import Recipe
from ..metatrain.record import record_tasks


def record(
    tasks: str,
    out: Path,
    say: Callable[[str], None],
    *,
    every: int,
    dtype: str,
    max_rows: int,
    moments: bool,
    **options: Any,
) -> None:
    """Record tasks, and say where the trajectories are.

    Args:
        tasks: comma-separated names of tasks or groups.
        max_rows: of an embedding; 0: all.
        options: of :func:`hf_nino.metatrain.record.record_tasks`.

    Raises:
        ValueError, ImportError, ChildProcessError: see there.
    """
    recipe = Recipe(every=every, dtype=dtype, max_rows=max_rows or None, moments=moments)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    record_tasks(names, out, recipe=recipe, say=say, **options)
