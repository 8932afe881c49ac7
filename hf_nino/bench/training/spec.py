"""What identifies a run, and where its result lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class RunSpec:
    """One training run.  Equal specs are the same run, whatever protocol asks for it.

    Args:
        task, method: names in the registries.
        settings: the method's, as sorted pairs (see :meth:`of`).
        schedule: ``"constant"`` or ``"cosine"``.
        learning_rate: peak learning rate in AdamW's units.
        seed: of the initial parameters and of the order of the data.
        steps: optimizer steps.
    """

    task: str
    method: str
    settings: tuple[tuple[str, Any], ...]
    schedule: str
    learning_rate: float
    seed: int
    steps: int

    @classmethod
    def of(cls, *, settings: Mapping[str, Any], learning_rate: float, **rest: Any) -> RunSpec:
        """From plain values; the learning rate is rounded to 4 digits, so that equal sweeps meet."""
        if rest["schedule"] not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {rest['schedule']!r}")
        return cls(settings=tuple(sorted(settings.items())), learning_rate=float(f"{learning_rate:.4g}"), **rest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """The inverse of :meth:`to_dict`."""
        return cls.of(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "settings": dict(self.settings)}

    def path(self, out: Path) -> Path:
        """The run's result in the folder ``out`` of a benchmark, with a name that a person can read."""
        settings = "".join(f",{key}={value}" for key, value in self.settings)
        name = f"{self.method}{settings},{self.schedule},lr={self.learning_rate:g},steps={self.steps},seed={self.seed}"
        return out / "runs" / self.task / (re.sub(r"[^\w=.,+-]", "_", name) + ".json")

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.settings)
        with_settings = f"{self.method} ({settings})" if settings else self.method
        return f"{self.task}: {with_settings}, {self.schedule} {self.learning_rate:g}, seed {self.seed}"
