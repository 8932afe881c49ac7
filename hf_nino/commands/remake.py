"""``hf-nino remake`` and ``hf-nino ablate``, from the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..metatrain.ablation import ablate
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


def ablate_bundled(
    name: str,
    trajectories: Path,
    out: Path | None,
    say: Callable[[str], None],
    *,
    steps: int | None = None,
    seeds: str = "0",
    only: str | None = None,
    device: str | None = None,
) -> None:
    """Take a bundled nowcaster's recipe apart.

    Args:
        out: default: ``runs/ablation-NAME``.
        seeds, only: comma-separated.

    Raises:
        ValueError: a seed that is no number, and as :func:`hf_nino.metatrain.ablate`.
        OSError, FloatingPointError: see there.
    """
    numbers = [part.strip() for part in seeds.split(",") if part.strip()]
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"`seeds` must be whole numbers with commas between, got {seeds!r}")
    names = None if only is None else [part.strip() for part in only.split(",") if part.strip()]
    ablate(
        making_of(name),
        trajectories,
        out or Path("runs") / f"ablation-{name}",
        steps=steps,
        seeds=[int(number) for number in numbers],
        only=names,
        device=device,
        say=say,
    )
