"""Which optimizers nowcasts can be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names under which optimizers keep averages, or a second set, of the parameters themselves.
_AVERAGES = {
    "ax": "an average",  # torch.optim.ASGD
    "ema": "an average",
    "param_ema": "an average",
    "ema_param": "an average",
    "avg_param": "an average",
    "x_avg": "an average",
    "slow_param": "a slow copy",  # Lookahead, in several packages
    "slow_params": "a slow copy",
    "slow_buffer": "a slow copy",
    "slow_weights": "a slow copy",
    "cached_params": "a slow copy",
}
# Update the parameters in the backward pass, so that their step is no step: LOMO, and layer-wise GaLore and APOLLO.
_IN_BACKWARD = ("Lomo", "AdaLomo", "LayerWiseDummyOptimizer")


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers that nowcasts would corrupt, or that would undo them.

    Raises:
        ValueError: the optimizer is schedule-free or keeps averages of the parameters (EMA, Lookahead, ASGD): what a
            nowcast writes would contradict them; or it updates the parameters during the backward pass (LOMO).
    """
    kind = type(optimizer).__name__
    groups, state = getattr(optimizer, "param_groups", []), getattr(optimizer, "state", {})
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)]
    if any("train_mode" in group for group in groups) or any("z" in entry for entry in entries):
        raise ValueError(
            f"`optimizer` must not be schedule-free, got {kind}: it keeps averages of the parameters that a nowcast "
            "would contradict; use the plain form of the optimizer, for example AdamW"
        )
    if any(base.__name__ in _IN_BACKWARD for base in type(optimizer).__mro__):
        raise ValueError(
            f"`optimizer` must update the parameters in its step, got {kind}, which does so during the backward pass: "
            "a step cannot be told from the next, nor be taken back; use an optimizer that steps, for example AdamW"
        )
    names = {name for entry in entries for name in entry} | {name for group in groups for name in group}
    averages = "ASGD" if kind == "ASGD" else min(names & _AVERAGES.keys(), default=None)
    if averages is not None:
        what = _AVERAGES.get(averages, "an average")
        raise ValueError(
            f"`optimizer` must not keep averages of the parameters, got {kind}, which keeps {what} of them: a nowcast "
            "would contradict it; use the plain form of the optimizer. An average that a callback keeps is fine "
            "if it comes after the nowcasts"
        )
