"""``hf-nino remake``, from the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..metatrain.remake import making_of, remake_nowcaster


def remake_bundled(
    name: str,
    out: Path | None,
    say: Callable[[str], None],
    *,
    trajectories: Path | None = None,
    jobs: int | None = None,
    device: str | None = None,
) -> None:
    """Make a bundled nowcaster again.

    Args:
        out: default: ``runs/NAME``.

    Raises:
        ValueError, OSError, ImportError, ChildProcessError, FloatingPointError: see
            :func:`hf_nino.metatrain.remake_nowcaster`.
    """
    out = out or Path("runs") / name
    remake_nowcaster(making_of(name), out, trajectories=trajectories, jobs=jobs, device=device, say=say)
