"""How models are merged, apart from which: the settings, checked, and the order in which a nowcaster sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from ..nowcaster import Nowcaster
from ..offline.predicting import carries

METHODS = ("nowcast", "average", "task-arithmetic")
HORIZONS = (1, 2, 3, 4, 5)
SCALES = {"nowcast": 1.0, "average": 1.0, "task-arithmetic": 0.4}
"""Default scales; a scale does nothing to an average."""

ORDERS = {(2, 5): (0, 1, 2, 2, 1), (3, 5): (0, 1, 2, 2, 3)}
"""(task models, context) -> which model each snapshot is, 0 the base: as in the original release."""


@dataclass(frozen=True)
class MergeRecipe:
    """Settings of a merge.

    Args:
        method: ``"average"``: the mean of the task models.  ``"task-arithmetic"`` (Ilharco et al., 2023,
            arXiv 2212.04089): base + scale * sum of (task - base); with scale 1 / number of tasks, the average.
            ``"nowcast"`` (MetaMerge, 2026): the models are taken for a trajectory, and merged is
            ``last + scale * (mean of its nowcasts - last)``.
        scale: see ``method``; default: 1, for task arithmetic 0.4.
        horizons: intervals of the nowcasts; default: 1 to 5, as far as the nowcaster goes.
        order: which model each snapshot is (0: the base, 1, 2, ..: task models); default: see
            :func:`states_order`.
        rotate: nowcast once for every rotation of the task models and take the mean, so that it does not matter which
            of them comes last; as many times the work.  Default: not for nowcasters with weights, as in the original
            release, but for rules without: a straight line from the base to the last model never sees the others.
        average_embeddings: whether token embeddings are averaged instead of nowcast.
        keep: patterns (``"classifier.*"``) of parameters that stay as they are in the base.

    Raises:
        ValueError: an argument out of range.
    """

    method: str = "nowcast"
    scale: float | None = None
    horizons: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    rotate: bool | None = None
    average_embeddings: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be a finite number, got {self.scale}")
        if isinstance(self.keep, str):
            raise ValueError(f"`keep` must be a list of patterns, got the text {self.keep!r}")
        for name in ("horizons", "order"):
            values = getattr(self, name)
            if values is not None and (not values or any(type(value) is not int for value in values)):
                raise ValueError(f"`{name}` must be whole numbers, at least one, got {values!r}")

    @property
    def factor(self) -> float:
        """The scale, or its default."""
        return SCALES[self.method] if self.scale is None else float(self.scale)

    def keeps(self, name: str) -> bool:
        """Whether a parameter stays as it is in the base."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def for_nowcaster(self, nowcaster: Nowcaster | None, tasks: int) -> MergeRecipe:
        """The same, with ``horizons``, ``order`` and ``rotate`` settled; nothing changes for other methods.

        Raises:
            ValueError: no nowcaster, or an order or horizons that it cannot have.
        """
        if self.method != "nowcast":
            return self
        if nowcaster is None:
            raise ValueError("`nowcaster` must be given for `method='nowcast'`, got None")
        horizons = self.horizons or tuple(h for h in HORIZONS if h <= nowcaster.max_horizon)
        if not all(1 <= horizon <= nowcaster.max_horizon for horizon in horizons):
            raise ValueError(
                f"`horizons` must be from 1 to {nowcaster.max_horizon} for this nowcaster, got {list(horizons)}"
            )
        order = self.order or states_order(nowcaster, tasks)
        _check_order(order, nowcaster, tasks)
        rotate = not isinstance(nowcaster, nn.Module) if self.rotate is None else self.rotate
        return replace(self, horizons=horizons, order=order, rotate=rotate)

    def orders(self, tasks: int) -> list[tuple[int, ...]]:
        """The order, and if ``rotate`` every rotation of the task models in it."""
        turns = range(tasks if self.rotate else 1)
        return [tuple(0 if i == 0 else (i - 1 + turn) % tasks + 1 for i in self.order) for turn in turns]


def states_order(nowcaster: Nowcaster, tasks: int) -> tuple[int, ...]:
    """Which model each snapshot is: 0 the base, 1 .. ``tasks`` the task models.

    A nowcaster with 5 snapshots gets 0 1 2 2 1, 0 1 2 2 3 and 0 1 2 3 4 for two, three and four models, as in the
    original release ("some heuristic order that works well", it says of the first, and of the second that it was not
    tested).  For any other number of snapshots the task models are named forwards and backwards in turn until they
    are enough: 0 1 2 3 3 2 1 1 2.  One that reads a single state and carries a memory is shown the base and every task
    model once, as displacements from the base.

    Raises:
        ValueError: more models than snapshots.
    """
    if carries(nowcaster):
        return tuple(range(tasks + 1))
    context = nowcaster.context
    if tasks + 1 > context:
        raise ValueError(
            f"a base and {tasks} task models are {tasks + 1} states, and this nowcaster reads {context}: merge some "
            "of them first, give an `order` that leaves some out, or use method 'average' or 'task-arithmetic'"
        )
    if (tasks, context) in ORDERS:
        return ORDERS[tasks, context]
    there = list(range(1, tasks + 1))
    rounds = (there + there[::-1]) * context
    return (0, *rounds[: context - 1])


def _check_order(order: Sequence[int], nowcaster: Nowcaster, tasks: int) -> None:
    if not carries(nowcaster) and len(order) != nowcaster.context:
        raise ValueError(f"`order` must have {nowcaster.context} entries for this nowcaster, got {list(order)}")
    if len(order) < 2 or not all(0 <= number <= tasks for number in order):
        raise ValueError(f"`order` must be numbers from 0 (the base) to {tasks}, got {list(order)}")
