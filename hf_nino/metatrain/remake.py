"""The bundled nowcasters made again, from nothing but the recipe that comes with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..nowcaster.configuration import NowcasterConfig
from ..nowcaster.hub import BUNDLED
from .meta_settings import MetaSettings
from .meta_training import meta_train
from .recipe import Recipe
from .record import record_tasks

logger = logging.get_logger(__name__)

RECIPE = "recipe.json"
TRAJECTORIES, NOWCASTER = "trajectories", "nowcaster"
"""Folders that :func:`remake_nowcaster` leaves."""


@dataclass(frozen=True)
class Making:
    """Everything that decides a nowcaster, but for the rounding of the machine that makes it.

    Args:
        record: ``tasks``, ``runs``, ``steps`` and ``seed`` of :func:`~hf_nino.metatrain.record.record_tasks`, and what
            differs from the defaults of :class:`~hf_nino.metatrain.recipe.Recipe`.
        config: what differs from the defaults of :class:`~hf_nino.nowcaster.NowcasterConfig`.
        settings: what differs from the defaults of :class:`~hf_nino.metatrain.MetaSettings`.
    """

    record: Mapping[str, Any]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Making:
        """What :meth:`to_json` gave, from a file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def to_json(self) -> str:
        parts = {"record": dict(self.record), "config": dict(self.config), "settings": dict(self.settings)}
        return json.dumps(parts, indent=1) + "\n"


def making_of(name: str) -> Making:
    """How a bundled nowcaster was made.

    Raises:
        ValueError: there is none of that name.
    """
    recipes = {path.parent.name: path for path in sorted(BUNDLED.glob(f"*/{RECIPE}"))}
    if name not in recipes:
        raise ValueError(f"`name` must be one of the bundled nowcasters {list(recipes)}, got {name!r}")
    return Making.read(recipes[name])


def remake_nowcaster(
    making: Making,
    out: Path,
    *,
    trajectories: Path | None = None,
    jobs: int | None = None,
    device: str | None = None,
    say: Callable[[str], Any] = logger.info,
) -> dict[str, Any]:
    """Record trajectories and meta-train on them; goes on where it was interrupted.

    Args:
        out: folder for both.
        trajectories: folder of the trajectories, where several nowcasters are made from the same; default: in ``out``.
        jobs: processes that record at once.
        device: ``"cpu"`` or ``"cuda"``; default: what there is.
        say: is told what it will cost, and where things are.

    Returns:
        What is in ``meta_training.json`` of the nowcaster.

    Raises:
        ValueError, OSError, ImportError, ChildProcessError, FloatingPointError: of the two parts.
    """
    trajectories = trajectories or out / TRAJECTORIES
    record = dict(making.record)
    run = {name: record.pop(name) for name in ("tasks", "runs", "steps", "seed") if name in record}
    record_tasks(out=trajectories, recipe=Recipe(**record), jobs=jobs, device=device, say=say, **run)
    settings = MetaSettings.from_dict(making.settings)
    config = NowcasterConfig(**making.config)
    return meta_train(trajectories, out / NOWCASTER, config=config, settings=settings, device=device, say=say)
