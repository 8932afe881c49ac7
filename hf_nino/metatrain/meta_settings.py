"""The recipe of meta-training: everything that decides the weights beside data, sizes and the machine's rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .schedules import schedule_factor


@dataclass(frozen=True, kw_only=True)
class MetaSettings:
    """The recipe; defaults are the paper's (arXiv 2409.04434 and its code), where it has one.

    Args:
        steps: optimizer steps.
        batch_size: trajectories that a step learns from, in each process; each of a task drawn anew.
        slices: of each of these trajectories.
        learning_rate: of AdamW, at its peak.
        warmup_steps: in which it rises from 0; then it falls as half a cosine to 0.
        weight_decay: of all weights.
        max_grad_norm: longer gradients are shortened to this.
        interval_range: optimizer steps between the snapshots of a slice, from and to, drawn for each slice;
            ``None``: from half to twice ``period // context`` of the nowcaster.
        mask_rounding: leave out parameters that only move because gradients are rounded, such as key biases.
        horizons: of each slice, drawn anew, for nowcasters that are told the horizon or learning rates; others learn
            from all that there are.
        target_neighbours: recorded snapshots on each side that a target is averaged with.  A nowcast should aim at
            where the run is going and not at its noise.
        sign_flips: give the columns of the positional encoding random signs.
        held_out_share: of the runs of each task, and of the tasks, that nothing is learned from.
        held_out_tasks: patterns of the tasks that nothing is learned from, instead of a share.
        seed: of initial weights, of what is drawn, and of what is held out.

    Raises:
        ValueError: a setting is out of range.
    """

    steps: int = 20_000
    batch_size: int = 4
    slices: int = 4
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 1e-2
    max_grad_norm: float = 5.0
    interval_range: tuple[int, int] | None = None
    mask_rounding: bool = True
    horizons: int = 4
    target_neighbours: int = 0
    sign_flips: bool = True
    held_out_share: float = 0.1
    held_out_tasks: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "slices", "horizons"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be above 0 and finite, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "target_neighbours"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"`held_out_share` must be from 0 to below 1, got {self.held_out_share}")
        if self.interval_range is not None:
            low, high = self.interval_range
            if not 1 <= low <= high:
                raise ValueError(
                    f"`interval_range` must be two numbers of steps, the lower one first and at least 1, got "
                    f"{low} and {high}"
                )

    def rate(self, step: int) -> float:
        """Learning rate of the optimizer step after ``step`` steps."""
        return self.learning_rate * schedule_factor("cosine", step, self.steps, self.warmup_steps)

    def intervals(self, interval: int) -> tuple[int, int]:
        """The range of intervals, for a nowcaster whose own is ``interval`` steps."""
        return self.interval_range or (max(1, interval // 2), 2 * interval)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MetaSettings:
        """The settings that :meth:`to_dict` wrote.

        Raises:
            ValueError: an unknown name, or a value that the class refuses.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"settings of meta-training have no {unknown[0]!r}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
