"""Judge a nowcast before it is written: is every number finite, and is every step of a plausible size?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..nowcaster.shards import Shards

# A move below this share of the parameter's size (and of 1 per element) is rounding: a bias before a batch norm.
STILL = 1e-7

# A tensor may go this many times as far as a straight line at its usual speed would, and is shortened to that.
LIMIT = 3.0
# Without a known speed: this many times the parameter's size.
LIMIT_OF_SIZE = 10.0
# A step that is this many times too long is no step to shorten: the tensor is left alone.
ABSURD = 10.0
# If more than this share of the tensors that move would be left alone, all of them are.
MOST_LEFT_ALONE = 0.5
# Elements that are measured at a time.
PIECE = 2**22


class InvalidNowcast(RuntimeError):
    """A nowcast was refused, or could not be made, and ``on_invalid="raise"``."""


@dataclass(frozen=True)
class Verdict:
    """What the guard found.

    Attributes:
        accepted: whether the prediction may be written.
        reason: why not: the parameter, what was found and the rule; empty when accepted.
        unmoved: parameters that did not move during the history, but for rounding.  Nothing can be foreseen about
            them, so they are left alone.
        shortened: {name: share of its step to take} of the parameters whose step is too long.
        left_alone: parameters whose step is absurd, while those of most others are not.
        step_norm: Euclidean norm of (prediction - last state) over all parameters that are written; nan when refused
            for its shape.
        relative_step_norm: the same over the norm of the last state.
        alignment: cosine between the step and the move of the whole history, over all parameters that moved; nan
            where the history is a single state.
    """

    accepted: bool
    reason: str = ""
    unmoved: frozenset[str] = frozenset()
    shortened: Mapping[str, float] = field(default_factory=dict)
    left_alone: frozenset[str] = frozenset()
    step_norm: float = math.nan
    relative_step_norm: float = math.nan
    alignment: float = math.nan

    @property
    def remarks(self) -> str:
        """What was done about steps that were too long; empty: nothing."""
        found = []
        for what, names in (("shortened", self.shortened), ("left alone", self.left_alone)):
            if names:
                found.append(f"{len(names)} {what} (such as {min(names)!r})")
        return f"steps that were too long: {', '.join(found)}" if found else ""


def judge(
    states: Sequence[Mapping[str, Tensor]],
    prediction: Mapping[str, Tensor],
    horizon: int,
    limit: float = LIMIT,
    shards: Shards | None = None,
) -> Verdict:
    r"""Judge ``prediction``, ``horizon`` intervals after the last of ``states``.

    Refused when a name is missing or superfluous, a shape differs, or a number is not finite.  A parameter's step is
    too long when

    .. math:: \|\hat\theta - \theta_S\| > \text{limit} \cdot \text{horizon} \cdot
        \mathrm{median}_i \|\theta_{i+1} - \theta_i\| + 10^{-5} (\|\theta_S\| + \sqrt{P}).

    It is then to be shortened to that; if it is more than 10 times as long, the parameter is to be left alone; and if
    that would be so of more than half of the parameters that move, the whole nowcast is refused.

    With a single snapshot no move is known; then the root mean square of the step must not exceed 10 times that of the
    parameter or of the whole model, whichever is larger, and the nowcast is refused otherwise.

    Args:
        states: the history, oldest first.
        prediction: {name: tensor}.
        horizon: intervals.
        limit: how much faster than usual a parameter may go; the length that a nowcaster intends is well below.
        shards: whose rows these are; the verdict is about whole parameters, and the same on all ranks.  Names and
            shapes must have been checked on all of them (:func:`odd_prediction`).
    """
    last = states[-1]
    odd = odd_prediction(last, prediction)
    if odd:
        return Verdict(False, odd)
    names = list(last)
    sizes = {name: tensor.numel() for name, tensor in last.items()}
    if shards is not None:
        sizes = {name: math.prod(shards.local(name).shape) for name in names}
    numbers = {name: max(size, 1) for name, size in sizes.items()}
    found = _measures(states, prediction, shards)
    jumps = {name: measures.jump for name, measures in found.items()}
    for name, jump in jumps.items():
        if not math.isfinite(jump):
            bad = found[name].bad
            text = f"{bad} of {numbers[name]} predicted values of {name!r} are not finite"
            return Verdict(False, text if bad else f"the step of {name!r} overflows (norm {jump})")
    size = math.hypot(*(measures.size for measures in found.values()))
    if len(states) == 1:
        model_rms = size / math.sqrt(sum(numbers.values()))
        for name, jump in jumps.items():
            allowed = LIMIT_OF_SIZE * max(found[name].size, model_rms * math.sqrt(numbers[name]))
            if jump > allowed:
                rule = f"{LIMIT_OF_SIZE:g} times the parameter's size"
                return Verdict(False, _too_long(name, jump, allowed, rule))
        return Verdict(True, **_lengths(jumps, size))

    rounding = {name: found[name].size + math.sqrt(numbers[name]) for name in names}
    unmoved = frozenset(name for name in names if max(found[name].moves) <= STILL * rounding[name])
    shortened, left_alone, worst = {}, [], ""
    for name in names:
        if name in unmoved:
            continue
        usual = statistics.median(found[name].moves)
        allowed = limit * horizon * usual + 1e-5 * rounding[name]
        if jumps[name] > ABSURD * allowed:
            left_alone.append(name)
            rule = f"{limit:g} x {horizon} intervals x its usual move {usual:.3g} in the history"
            worst = worst or _too_long(name, jumps[name], allowed, rule)
        elif jumps[name] > allowed:
            shortened[name] = allowed / jumps[name]
    if len(left_alone) > MOST_LEFT_ALONE * (len(names) - len(unmoved)):
        return Verdict(False, worst)
    written = {n: j * shortened.get(n, 1.0) for n, j in jumps.items() if n not in unmoved and n not in left_alone}
    return Verdict(
        True,
        unmoved=unmoved,
        shortened=shortened,
        left_alone=frozenset(left_alone),
        **_lengths(written, size),
        alignment=_alignment([found[name] for name in written]),
    )


def odd_prediction(last: Mapping[str, Tensor], prediction: Mapping[str, Tensor]) -> str:
    """What is wrong with the names and shapes of a prediction; empty: nothing."""
    if prediction.keys() != last.keys():
        odd = sorted(prediction.keys() ^ last.keys())
        return f"the prediction must hold exactly the model's parameters; missing or odd: {odd[:3]}"
    for name, tensor in prediction.items():
        if tensor.shape != last[name].shape:
            shapes = f"shape {tuple(tensor.shape)}, the parameter {tuple(last[name].shape)}"
            return f"the prediction of {name!r} has {shapes}"
    return ""


def tame(last: Mapping[str, Tensor], prediction: Mapping[str, Tensor], verdict: Verdict, share: float = 1.0) -> dict:
    """What is to be written: ``prediction`` without the parameters to leave alone, too long steps shortened.

    Args:
        last: the last state of the history.
        share: of every step that is to be taken.

    Returns:
        {name: tensor}; the tensors of ``prediction`` themselves where nothing is to be changed.
    """
    result = {}
    for name, tensor in prediction.items():
        if name in verdict.unmoved or name in verdict.left_alone:
            continue
        part = share * verdict.shortened.get(name, 1.0)
        start = last[name].to(tensor.device)
        result[name] = tensor if part == 1 else start + (tensor - start) * part
    return result


def _too_long(name: str, jump: float, allowed: float, rule: str) -> str:
    return f"the step of {name!r} has norm {jump:.3g}, more than {allowed:.3g} ({rule})"


def _lengths(jumps: Mapping[str, float], size: float) -> dict[str, float]:
    step = math.hypot(*jumps.values())
    return {"step_norm": step, "relative_step_norm": step / size if size > 0 else math.inf}


@dataclass(frozen=True)
class _Measures:
    """What is measured of one parameter: Euclidean norms of its step, its size and its move in each interval; numbers
    that are not finite; and the scalar product of step and whole move, with the squares of both."""

    jump: float
    size: float
    moves: tuple[float, ...]
    bad: int
    dot: float
    move: float


@torch.no_grad()
def _measures(
    states: Sequence[Mapping[str, Tensor]], prediction: Mapping[str, Tensor], shards: Shards | None
) -> dict[str, _Measures]:
    """With one transfer to the host, and one sum over the ranks, rather than one for each tensor."""
    rows = [_lengths_of([state[name] for state in states], prediction[name]) for name in states[-1]]
    table = torch.stack([row.to(rows[0].device) for row in rows]).cpu().double()
    table[:, :-2].square_()
    if shards is not None:
        shards.ranks.sum_([table])
    bad = torch.zeros(len(table))
    if not table[:, 0].isfinite().all():  # on all ranks alike: these are sums over them
        bad = torch.stack([(~prediction[name].isfinite()).sum().float().cpu() for name in states[-1]])
        if shards is not None:
            shards.ranks.sum_([bad])
    found = {}
    for name, (jump, size, *moves, dot, move), count in zip(states[-1], table.tolist(), bad.tolist(), strict=True):
        found[name] = _Measures(_root(jump), _root(size), tuple(map(_root, moves)), round(count), dot, move)
    return found


def _lengths_of(states: Sequence[Tensor], prediction: Tensor) -> Tensor:
    """Norms of step, size and moves; then the product of step and whole move, and the square of the latter.

    In pieces, so that no copy of a large parameter is made; float32, which is all that some devices have.
    """
    past, predicted = [state.flatten() for state in states], prediction.flatten()
    norms = torch.zeros(1 + len(states), device=predicted.device)
    products = torch.zeros(2, device=predicted.device)
    for start in range(0, predicted.numel(), PIECE):
        parts = [state[start : start + PIECE].float() for state in past]
        last = parts[-1]
        jump = predicted[start : start + PIECE].float() - last
        moves = [after - before for before, after in pairwise(parts)]
        norms = torch.hypot(norms, torch.stack([torch.linalg.vector_norm(part) for part in (jump, last, *moves)]))
        if moves:
            whole = last - parts[0]
            products += torch.stack([torch.dot(jump, whole), torch.dot(whole, whole)])
    return torch.cat([norms, products])


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


def _alignment(found: Sequence[_Measures]) -> float:
    dot, move = math.fsum(m.dot for m in found), math.fsum(m.move for m in found)
    jump = math.fsum(m.jump * m.jump for m in found)
    return dot / math.sqrt(jump * move) if jump > 0 and move > 0 else math.nan
