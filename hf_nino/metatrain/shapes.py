"""The neural graph of every model shape that trajectories have, built once each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..graph import NeuralGraph
from ..training.rng import preserved_rng
from .rebuild import example_inputs
from .rounding import blocks_moved_by_rounding
from .trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What all trajectories of one model shape share.

    Args:
        graph: the neural graph.
        rounding: numbers of its trainable blocks that only move by rounding.
    """

    graph: NeuralGraph
    rounding: frozenset[int] = frozenset()
    _positions: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def positions(self, size: int, device: torch.device) -> Tensor:
        """The positional encoding, float32 [N, size], on that device."""
        if (size, device) not in self._positions:
            self._positions[size, device] = self.graph.positional_encoding(size).to(device)
        return self._positions[size, device]


class Shapes:
    """Model shapes by what decides them: class, configuration and shapes of the recorded parameters."""

    def __init__(self) -> None:
        self._known: dict[str, ModelShape] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, trajectory: Trajectory) -> ModelShape:
        """The shape of a trajectory's model, built if none like it was met before.

        Raises:
            ValueError: the trajectory does not say how to build its model.
        """
        key = shape_key(trajectory)
        if key not in self._known:
            self._known[key] = build_shape(trajectory)
        return self._known[key]

    def build(self, trajectories: Iterable[Trajectory], quiet: bool = False) -> None:
        """Build the shapes of all of them now, with a progress bar."""
        first = {shape_key(one): one for one in trajectories}
        missing = [one for key, one in first.items() if key not in self._known]
        for one in tqdm(missing, desc="neural graphs", unit="shape", leave=False, disable=quiet):
            self.of(one)


def shape_key(trajectory: Trajectory) -> str:
    """Equal for trajectories whose models have the same graph."""
    model = trajectory.description["model"]
    return json.dumps([model["class"], model.get("config"), sorted(trajectory.shapes.items())], sort_keys=True)


def build_shape(trajectory: Trajectory) -> ModelShape:
    """See :meth:`Shapes.of`."""
    with preserved_rng():
        model, inputs = trajectory.build_model(), example_inputs(trajectory)
        graph = NeuralGraph.from_model(model, inputs)
        return ModelShape(graph, blocks_moved_by_rounding(model, graph, inputs))
