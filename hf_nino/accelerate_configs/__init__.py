"""Files for ``accelerate launch --config_file``: ``ddp``, ``fsdp2``, ``zero2`` and ``zero3``.

From the shell, ``python -m hf_nino.accelerate_configs fsdp2`` says where a file is.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def config_names() -> tuple[str, ...]:
    """What :func:`config_file` knows, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def config_file(name: str) -> Path:
    """The file of one configuration, as it ships: 8 processes on one machine, bfloat16.

    Options of ``accelerate launch`` take precedence: ``--num_processes 2 --mixed_precision no``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in config_names():
        raise ValueError(f"`name` of a configuration must be one of {', '.join(config_names())}, got {name!r}")
    return FOLDER / f"{name}.yaml"
