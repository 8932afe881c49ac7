"""A nowcaster that sees the graph cannot tell interchangeable neurons apart, in any of thirty types of models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nowcaster_cases import random_nowcaster, trajectory
from sample import each_type, sample_graph
from torch import Tensor

from hf_nino.graph import NeuralGraph
from hf_nino.nowcaster import NiNoModel

HORIZON = 3


@pytest.fixture(scope="module")
def nowcaster() -> NiNoModel:
    """Random and small, with weights large enough that neighbours matter."""
    return random_nowcaster(hidden_size=8)


State = dict[str, Tensor]


def deviation(
    nowcaster: NiNoModel, graph: NeuralGraph, states: list[State], move: Callable[[State], State]
) -> dict[str, float]:
    """Of the nowcast of a moved history from the moved nowcast, relative to the largest step of each parameter."""
    moved = [move(state) for state in states]
    found = nowcaster.nowcast(graph, moved, HORIZON)
    expected = move(nowcaster.nowcast(graph, states, HORIZON))
    assert found.keys() == expected.keys() == set(graph.parameter_names)
    steps = {name: (expected[name] - moved[-1][name]).abs().max() for name in expected}
    assert all(step > 0 for step in steps.values())
    return {name: float((found[name] - expected[name]).abs().max() / steps[name]) for name in expected}


def tear(graph: NeuralGraph) -> Callable[[State], State]:
    """Exchanges the neurons that the largest matrix of the model makes, without their edges of other parameters."""
    block = max(graph.trainable_blocks, key=lambda block: min(block.shape[:2]) * block.edges)

    def move(state: State) -> State:
        parameter = state[block.parameter].clone()
        block.write(parameter, block.view(state[block.parameter]).roll(1, dims=1))
        return {**state, block.parameter: parameter}

    return move


@each_type
def test_nowcasts_of_permuted_histories_are_permuted_nowcasts(kind, model_type, nowcaster) -> None:
    """For a product of all symmetries, and every parameter, to 1e-5 of its step.

    The negative control: neurons that one parameter exchanges and the others do not make another network, and it is
    foreseen otherwise.
    """
    graph = sample_graph(kind, model_type)
    states = trajectory(graph)
    permutation = graph.permutation(torch.Generator().manual_seed(1))

    def permute(state: State) -> State:
        return graph.permute(state, permutation=permutation)

    moved = permute(states[-1])
    assert any(not moved[name].equal(states[-1][name]) for name in moved)
    assert max(deviation(nowcaster, graph, states, permute).values()) < 1e-5
    assert max(deviation(nowcaster, graph, states, tear(graph)).values()) > 1e-3
