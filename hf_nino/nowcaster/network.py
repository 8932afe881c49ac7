"""What nowcasters with weights have in common: sizes, initial weights, what they are told, checks of their input.

Shape letters: S samples, E edges, F kernel taps, C snapshots, H hidden width, K horizons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .base import Nowcaster
from .conditions import Conditions, Modulation
from .configuration import ACTIVATIONS, NowcasterConfig
from .hub import HubNowcaster
from .rates import Rates

if TYPE_CHECKING:
    from torch_geometric.data import Data

INITIALIZER_RANGE = 0.02


class NowcasterNetwork(nn.Module, Nowcaster, HubNowcaster):
    """What both models share: sizes from the configuration, initial weights, checks of their input."""

    nowcaster_type: ClassVar[str]
    works_on_shards = True

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__()
        if config.nowcaster_type != self.nowcaster_type:
            raise ValueError(
                f"`config.nowcaster_type` must be {self.nowcaster_type!r} for {type(self).__name__}, "
                f"got {config.nowcaster_type!r}"
            )
        self.config = config
        self.context = config.context
        self.period = config.period
        self.max_horizon = config.max_horizon
        self.activation = ACTIVATIONS[config.activation]

    def _add_conditions(self) -> None:
        """The parts that hear of the horizon and of learning rates; after all others, whose initial weights they leave
        as they are without."""
        config = self.config
        told = config.horizon_input or config.rate_input
        self.modulation = Modulation(config) if told else None
        self.rate_in = nn.Linear(config.context, config.hidden_size, bias=False) if config.rate_input else None
        if self.modulation is not None:
            nn.init.normal_(self.modulation.input.weight)  # a few features between -7 and 1, not hidden units
            nn.init.normal_(self.modulation.output.weight, std=INITIALIZER_RANGE)
            nn.init.zeros_(self.modulation.input.bias)
            nn.init.zeros_(self.modulation.output.bias)
        if self.rate_in is not None:
            nn.init.normal_(self.rate_in.weight, std=INITIALIZER_RANGE)

    def _init_weights(self) -> None:
        """Normal weights of deviation 0.02 and no biases, as in the original release."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def reads_rates(self) -> bool:
        return self.config.rate_input

    @property
    def any_horizon(self) -> bool:
        return self.config.horizon_input

    def conditions(self, horizon: float | None, rates: Rates | None = None) -> Conditions | None:
        """What a nowcast is told, for networks that are told anything; ``None`` for the others.

        Args:
            horizon: ``None`` for all whole ones.
            rates: ``None``: constant.

        Raises:
            ValueError: ``rates`` for a network that does not read them or for all horizons, or of another context.
        """
        if rates is not None:
            if not self.reads_rates:
                raise ValueError(
                    "`rates` must be left out for a nowcaster that does not read them (`rate_input` is off), got some"
                )
            if horizon is None:
                raise ValueError("`rates` must be left out with all horizons, for which it does not say what is ahead")
            if len(rates.past) != self.context:
                raise ValueError(f"`rates` must have {self.context} past learning rates, got {len(rates.past)}")
        if self.modulation is None:
            return None
        horizons = range(1, self.max_horizon + 1) if horizon is None else [horizon]
        told = [Rates.constant(self.context, each) if rates is None else rates for each in horizons]
        return Conditions.of(list(horizons), told).to(self.edge_in.weight.device)

    def decoder_rows(self, horizon: float | None) -> tuple[Tensor, Tensor]:
        """Weights [F, K, H] and biases [F, K] of the last map; K = 1 for a given horizon, and if there is one row."""
        rows = 1 if self.config.horizon_input else self.max_horizon
        chosen = slice(None) if horizon is None or rows == 1 else slice(int(horizon) - 1, int(horizon))
        weight, bias = (part.unflatten(0, (-1, rows)) for part in (self.edge_out.weight, self.edge_out.bias))
        return weight[:, chosen], bias[:, chosen]

    def conditioned_rows(self, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor]:
        """What S samples and K horizons make of the decoder: biases of its hidden units [S, K, H], to be added to
        their own, and weights [S, K, F, H] and biases [S, K, F] of the last map."""
        shift, factor = self.modulation(conditions)
        weight, bias = (part.transpose(0, 1) for part in self.decoder_rows(None))
        rows = torch.zeros_like(conditions.horizons) if self.config.horizon_input else conditions.horizons - 1
        rows = rows.long()
        return shift, weight[rows] * factor.unsqueeze(2), bias[rows]

    def _check_horizon(self, horizon: float | None) -> None:
        if horizon is None:
            return
        right = type(horizon) in ((int, float) if self.any_horizon else (int,))
        if not right or not 1 <= horizon <= self.max_horizon:
            number = "number" if self.any_horizon else "whole number"
            raise ValueError(
                f"`horizon` must be a {number} from 1 to {self.max_horizon}, or None for all, got {horizon}"
            )

    def _edge_states(self, data: Data) -> Tensor:
        """``data.edge_attr`` as [E, F, C]."""
        states = data.edge_attr
        if states.dim() != 2 or states.shape[1] == 0 or states.shape[1] % self.context:
            raise ValueError(
                f"`data.edge_attr` must be [edges, taps * {self.context} snapshots], got {tuple(states.shape)}"
            )
        return states.unflatten(1, (-1, self.context))
