"""The checkpoints of a run: which there are, at which steps, and which of them are equally far apart."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .output import is_nowcast
from .tensor_files import SUFFIXES
from .weights import holds_weights

BESIDE = ("optimizer", "scheduler", "rng_state", "random_states", "training_args", "scaler", "sampler", "dl_state")
"""How files begin that lie beside weights, with the same suffixes."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved state.

    Args:
        path: its folder, or its file.
        number: where in the run it was saved; ``None`` if neither the folder nor its name says.
        unit: what ``number`` counts: ``"steps"`` of the optimizer or ``"saves"``.
    """

    path: Path
    number: int | None
    unit: str | None

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """A checkpoint; its step is read from ``trainer_state.json`` or ``nino_state.json``, or else from its name."""
        for file, key in (("trainer_state.json", "global_step"), ("nino_state.json", "step")):
            try:
                step = json.loads((path / file).read_text("utf-8"))[key]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if isinstance(step, int):
                return cls(path, step, "steps")
        name = path.stem if path.is_file() else path.name
        found = re.search(r"(?:steps?|iter(?:ation)?)[-_]?(\d+)|^checkpoint-(\d+)", name)
        if found:
            return cls(path, int(found[1] or found[2]), "steps")
        numbers = re.findall(r"\d+", name)
        return cls(path, int(numbers[-1]), "saves") if numbers else cls(path, None, None)

    @property
    def name(self) -> str:
        return self.path.resolve().name


@dataclass(frozen=True)
class Selection:
    """Equally spaced checkpoints, oldest first.

    Attributes:
        interval: how far they are apart, in ``unit``; ``None`` if that is not known.
        remark: what a person should know about the choice; empty: nothing.
    """

    checkpoints: tuple[Checkpoint, ...]
    interval: int | None
    unit: str | None
    remark: str = ""


def select(paths: Sequence[Path], numbers: Sequence[int]) -> Selection:
    """The newest equally spaced checkpoints among those that ``paths`` stand for.

    Args:
        paths: one folder with the checkpoints of a run, or the checkpoints themselves, oldest first.
        numbers: how many are wanted, best first.

    Raises:
        ValueError: too few, in no order, or not equally spaced; the message names the steps.
    """
    named = len(paths) > 1 or (not _children(paths[0]) and holds_weights(paths[0]))
    found = [Checkpoint.at(path) for path in paths] if named else checkpoints_of(paths[0])
    least = min(numbers)
    if len(found) < least:
        where = ", ".join(str(path) for path in paths)
        raise ValueError(
            f"the nowcaster reads {least} checkpoints, got {len(found)}: {where}; save more of them (`save_steps`, "
            "`save_total_limit`), or use a nowcaster that reads fewer"
        )
    units = {checkpoint.unit for checkpoint in found}
    if units not in ({"steps"}, {"saves"}):
        if not named:
            odd = next(checkpoint for checkpoint in found if checkpoint.unit != "steps")
            raise ValueError(
                f"{paths[0]} must hold checkpoints whose steps are known, but {odd.name} says none; name those that "
                "are meant, oldest first"
            )
        count = max(number for number in numbers if number <= len(found))
        return Selection(
            tuple(found[-count:]), None, None, "nothing says at which steps they were saved; taken as equally spaced"
        )
    (unit,) = units
    steps = [checkpoint.number for checkpoint in found]
    if named and any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(f"checkpoints must be named oldest first, got {unit} {_listed(steps)}")
    by_step = {checkpoint.number: checkpoint for checkpoint in found}
    for count in numbers:
        chosen = equally_spaced(steps, count) if not named or len(found) > count else _all_or_none(steps, count)
        if chosen:
            remark = "" if chosen[-1] == max(steps) else f"not from the newest, which was saved at {max(steps)}"
            return Selection(tuple(by_step[step] for step in chosen), chosen[1] - chosen[0], unit, remark)
    raise ValueError(
        f"the nowcaster reads {least} equally spaced checkpoints, and those here were saved at {unit} "
        f"{_listed(steps)}; name {least} that are, or use a nowcaster that reads fewer"
    )


def checkpoints_of(run: Path) -> list[Checkpoint]:
    """The checkpoints in a folder, by number: its subfolders that hold weights, or else its files of weights.

    Raises:
        ValueError: there are none, or two with the same number.
    """
    found = [Checkpoint.at(path) for path in _children(run)]
    if not found:
        raise ValueError(
            f"{run} holds no checkpoints" if run.is_dir() else f"there is no run and no checkpoint at {run}"
        )
    found.sort(key=lambda checkpoint: (checkpoint.number is None, checkpoint.number, checkpoint.name))
    for before, after in itertools.pairwise(found):
        if before.number == after.number and before.number is not None:
            raise ValueError(
                f"{run} holds two checkpoints of number {before.number}, {before.name} and {after.name}; name those "
                "that are meant, oldest first"
            )
    return found


def equally_spaced(steps: Sequence[int], count: int) -> list[int]:
    """``count`` (2 or more) of some steps that are equally far apart, ascending: the newest, then the closest."""
    known = set(steps)
    newest_first = sorted(known, reverse=True)
    for position, end in enumerate(newest_first):
        for before in newest_first[position + 1 :]:
            wanted = [end - (end - before) * i for i in range(count)]
            if known.issuperset(wanted):
                return wanted[::-1]
    return []


def _all_or_none(steps: Sequence[int], count: int) -> list[int]:
    """The steps that were named, if they are equally far apart."""
    gaps = {after - before for before, after in itertools.pairwise(steps)}
    return list(steps) if len(steps) == count and len(gaps) == 1 else []


def _children(run: Path) -> list[Path]:
    """What a folder holds that may be the checkpoints of a run; not what was nowcast from them."""
    if not run.is_dir():
        return []
    for folder in (run, run / "checkpoints"):  # accelerate's automatic names
        if folder.is_dir():
            folders = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
            found = [path for path in folders if holds_weights(path) and not is_nowcast(path)]
            if found:
                return found
    if holds_weights(run):
        return []
    files = (path for path in run.iterdir() if path.is_file() and path.suffix in SUFFIXES)
    return [path for path in files if re.search(r"\d", path.stem) and not path.name.startswith(BESIDE)]


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:12]))
    return f"{shown}, ..." if len(steps) > 12 else shown
