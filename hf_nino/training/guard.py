"""Accept or refuse a nowcast before it is written: is every number finite, and is every step of a plausible size?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A move below this share of the parameter's size (and of 1 per element) is rounding: a bias before a batch norm.
STILL = 1e-7

# A tensor may go this many times as far as its fastest interval of the history, times the horizon.
LIMIT = 10.0


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
        step_norm: Euclidean norm of (prediction - last state) over all parameters that moved; nan when refused for
            its shape.
        relative_step_norm: the same over the norm of the last state.
    """

    accepted: bool
    reason: str = ""
    unmoved: frozenset[str] = frozenset()
    step_norm: float = math.nan
    relative_step_norm: float = math.nan


@torch.no_grad()
def judge(
    states: Sequence[Mapping[str, Tensor]], prediction: Mapping[str, Tensor], horizon: int, limit: float = LIMIT
) -> Verdict:
    r"""Judge ``prediction``, ``horizon`` intervals after the last of ``states``.

    Refused when a name is missing or superfluous, a shape differs, a number is not finite, or for any parameter

    .. math:: \|\hat\theta - \theta_S\| > \text{limit} \cdot \text{horizon} \cdot \max_i \|\theta_{i+1} - \theta_i\| +
        10^{-5} (\|\theta_S\| + \sqrt{P}).

    With a single snapshot no move is known; then the root mean square of the step must not exceed ``limit`` times that
    of the parameter or of the whole model, whichever is larger.

    Args:
        states: the history, oldest first.
        prediction: {name: tensor}.
        horizon: intervals.
        limit: how generous to be; the default only stops what is absurd.
    """
    last = states[-1]
    if prediction.keys() != last.keys():
        odd = sorted(prediction.keys() ^ last.keys())
        return Verdict(False, f"the prediction must hold exactly the model's parameters; missing or odd: {odd[:3]}")
    for name, tensor in prediction.items():
        if tensor.shape != last[name].shape:
            shapes = f"shape {tuple(tensor.shape)}, the parameter {tuple(last[name].shape)}"
            return Verdict(False, f"the prediction of {name!r} has {shapes}")
    names = list(last)
    jumps = _norms(prediction[name].float() - last[name].float() for name in names)
    sizes = _norms(last[name].float() for name in names)
    moves = [0.0] * len(names)
    for before, after in itertools.pairwise(states):
        moved = _norms(after[name].float() - before[name].float() for name in names)
        moves = [max(a, b) for a, b in zip(moves, moved, strict=True)]
    numbers = {name: max(last[name].numel(), 1) for name in names}
    size = math.hypot(*sizes)
    model_rms = size / math.sqrt(sum(numbers.values()))

    for name, jump, norm, move in zip(names, jumps, sizes, moves, strict=True):
        root = math.sqrt(numbers[name])
        if not math.isfinite(jump):
            bad = int((~torch.isfinite(prediction[name])).sum())
            found = f"{bad} of {numbers[name]} predicted values of {name!r} are not finite"
            return Verdict(False, found if bad else f"the step of {name!r} overflows (norm {jump})")
        if len(states) == 1:
            allowed = limit * max(norm, model_rms * root)
            rule = f"{limit:g} times the parameter's size"
        elif move <= STILL * (norm + root):
            continue
        else:
            allowed = limit * horizon * move + 1e-5 * (norm + root)
            rule = f"{limit:g} x {horizon} intervals x its largest move {move:.3g} in the history"
        if jump > allowed:
            return Verdict(False, f"the step of {name!r} has norm {jump:.3g}, more than {allowed:.3g} ({rule})")

    still = (
        name
        for name, norm, move in zip(names, sizes, moves, strict=True)
        if move <= STILL * (norm + math.sqrt(numbers[name]))
    )
    unmoved = frozenset(still) if len(states) > 1 else frozenset()
    step = math.hypot(*(jump for name, jump in zip(names, jumps, strict=True) if name not in unmoved))
    return Verdict(True, unmoved=unmoved, step_norm=step, relative_step_norm=step / size if size > 0 else math.inf)


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    """Euclidean norms, with one transfer to the host rather than one per tensor."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
