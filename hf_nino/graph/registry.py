"""Where the rules for operators are registered, by operator name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .trace import Call, Trace

Rule = Callable[[Trace, Call], None]
RULES: dict[str, Rule] = {}


def register(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of the named operators."""

    def decorate(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return decorate


def aligned(ids: Tensor, dims: int) -> Tensor:
    """Leading dimensions of size 1, as broadcasting adds them."""
    return ids.reshape((1,) * (dims - ids.dim()) + tuple(ids.shape))


def uniform(tensor: Tensor) -> bool:
    """Whether all elements are equal."""
    return tensor.numel() <= 1 or (not tensor.is_meta and bool((tensor == tensor.flatten()[0]).all()))
