"""What a nowcast is told beside states and graph: its horizon and the learning rates around it.

It is the same for all edges, so that it costs nothing per edge.  With features c of the history (log ratios of the
past learning rates to their mean) and k of the horizon::

    x^0, or e^0, gets  + Wr c                       a bias for all nodes (for WNN: edges) of a nowcast
    delta = (rows * g) act(Wh e + bh + d) + bias     with  d, log g = MLP(c, k), one number per hidden unit each

Both are folded into the decoder's weights.  The features of a constant learning rate are 0, apart from the horizon.

Shape letters: S samples, C snapshots, K horizons, H hidden, F taps, n edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .configuration import NowcasterConfig
from .rates import Rates

FLOOR = 1e-3
"""Of the history's mean: learning rates below it are taken for it, since warm-ups begin and decays end at 0."""

GAIN = 3.0
"""Largest logarithm of what a horizon multiplies a hidden unit by."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """Of S samples and K horizons of each.

    Args:
        horizons: [S, K] intervals.
        past: [S, C] past learning rates in units of their mean, see :class:`Rates`.
        ahead: [S, K] learning rate that is covered, in the same unit and intervals.
    """

    horizons: Tensor
    past: Tensor
    ahead: Tensor

    @classmethod
    def of(cls, horizons: Sequence[float], rates: Sequence[Rates]) -> Conditions:
        """Of one sample: horizons, and the learning rates for each of them."""
        past = [[rate / one.unit for rate in one.past] for one in rates[:1]]
        return cls(torch.tensor([horizons]).float(), torch.tensor(past), torch.tensor([[one.ahead for one in rates]]))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Conditions:
        moved = (tensor.to(device, dtype) for tensor in (self.horizons, self.past, self.ahead))
        return Conditions(*moved)

    def history(self) -> Tensor:
        """Features of the history, [S, C]."""
        return self.past.clamp(min=FLOOR).log()

    def outlook(self) -> Tensor:
        """Log ratio of the mean learning rate to come to that of the history, [S, K, 1]."""
        return (self.ahead / self.horizons).clamp(min=FLOOR).log().unsqueeze(-1)


class Modulation(nn.Module):
    """The MLP that turns features into a bias and a factor for each hidden unit of a decoder."""

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__()
        self.horizon_input, self.rate_input = config.horizon_input, config.rate_input
        self.log_most = math.log(max(config.max_horizon, 2))
        features = int(self.horizon_input) + (config.context + 1 if self.rate_input else 0)
        self.input = nn.Linear(features, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Biases and factors, [S, K, H] each; in the module's dtype."""
        parts = []
        if self.horizon_input:
            parts.append(conditions.horizons.log().unsqueeze(-1) / self.log_most)
        if self.rate_input:
            outlook = conditions.outlook()
            parts += [outlook, conditions.history().unsqueeze(1).expand(*outlook.shape[:2], -1)]
        features = torch.cat(parts, dim=-1).to(self.input.weight)
        shift, gain = self.output(silu(self.input(features))).chunk(2, dim=-1)
        # Bounded: a factor must not be able to leave the range of numbers.
        return shift, (GAIN * torch.tanh(gain / GAIN)).exp()


def decode_conditioned(
    inside: Tensor, biases: Tensor, rows: Tensor, rows_bias: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """``rows_k act(inside + bias_k) + rows_bias_k`` for K conditions of each sample: [S, n, F, K].

    Args:
        inside: [S, n, H].
        biases: [S or 1, K, H].
        rows, rows_bias: [S or 1, K, F, H] and [S or 1, K, F].
    """
    found = []
    for k in range(biases.shape[1]):
        hidden = activation(inside + biases[:, k, None])
        found.append(hidden @ rows[:, k].transpose(1, 2) + rows_bias[:, k, None])
    return torch.stack(found, dim=-1)
