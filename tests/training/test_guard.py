"""The guard stops what is absurd and nothing else."""

import math

import pytest
import torch

from hf_nino.training import judge


def states(count=3, move=0.1, size=1.0):
    generator = torch.Generator().manual_seed(0)
    start = {"a": size * torch.randn(6, 5, generator=generator), "b": size * torch.randn(4, generator=generator)}
    steps = {name: torch.randn(t.shape, generator=generator) for name, t in start.items()}
    return [{name: t + move * i * steps[name] for name, t in start.items()} for i in range(count)]


def line(history, horizon):
    first, last = history[0], history[-1]
    return {name: last[name] + (last[name] - first[name]) * horizon / (len(history) - 1) for name in last}


@pytest.mark.parametrize("horizon", [1, 4, 40])
def test_a_straight_line_passes_at_any_horizon(horizon):
    """Continuing the history's own speed is plausible, and its length is reported."""
    history = states()
    prediction = line(history, horizon)
    verdict = judge(history, prediction, horizon)
    norm = math.sqrt(sum(float((prediction[n] - history[-1][n]).square().sum()) for n in prediction))
    size = math.sqrt(sum(float(t.square().sum()) for t in history[-1].values()))
    assert verdict.accepted and verdict.reason == ""
    assert verdict.step_norm == pytest.approx(norm, rel=1e-5)
    assert verdict.relative_step_norm == pytest.approx(norm / size, rel=1e-5)


def test_the_limit_is_where_it_says():
    """9.9 times the horizon times the largest move passes, 10.1 times does not; the message has name and numbers."""
    history = states()
    below, above = line(history, 2 * 9.9), line(history, 2 * 10.1)
    assert judge(history, below, 2).accepted
    verdict = judge(history, above, 2)
    assert not verdict.accepted
    assert "'a'" in verdict.reason and "10 x 2 intervals" in verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_number_that_is_not_finite_is_enough(value):
    """One of 34 values refuses the nowcast, and the parameter is named."""
    history = states()
    prediction = line(history, 1)
    prediction["b"][2] = value
    verdict = judge(history, prediction, 1)
    assert not verdict.accepted and "1 of 4 predicted values of 'b' are not finite" in verdict.reason


def test_what_did_not_move_is_left_alone():
    """A parameter at rest is neither judged by size nor to be written; but it must be finite."""
    history = states()
    for state in history:
        state["b"] = torch.ones(4)
    prediction = line(history, 1)
    prediction["b"] = torch.full((4,), 1.5)
    verdict = judge(history, prediction, 1)
    assert verdict.accepted and verdict.unmoved == {"b"}
    prediction["b"][0] = math.nan
    assert not judge(history, prediction, 1).accepted


def test_names_and_shapes_must_be_the_parameters():
    """A missing name, an unknown name and another shape are refused."""
    history = states()
    prediction = line(history, 1)
    assert "['b']" in judge(history, {"a": prediction["a"]}, 1).reason
    assert "['c']" in judge(history, prediction | {"c": torch.zeros(1)}, 1).reason
    assert "shape (5, 6)" in judge(history, prediction | {"a": prediction["a"].T}, 1).reason


def test_a_single_snapshot_is_compared_with_the_size_of_the_parameters():
    """Without a known move, a step of several times the parameters passes and one of a hundred times does not."""
    history = states(count=1)
    assert judge(history, {name: 3 * tensor for name, tensor in history[0].items()}, 1).accepted
    verdict = judge(history, {name: 100 * tensor for name, tensor in history[0].items()}, 1)
    assert not verdict.accepted and "times the parameter's size" in verdict.reason


def test_a_small_parameter_may_move_as_the_model_does():
    """With one snapshot, a parameter that happens to be near zero does not veto the nowcast."""
    history = [{"a": torch.ones(10, 10), "gate": torch.tensor([1e-6])}]
    assert judge(history, {"a": torch.ones(10, 10), "gate": torch.tensor([0.5])}, 1).accepted


@pytest.mark.parametrize(("move", "still"), [(1e-9, True), (1e-5, False)])
def test_a_parameter_that_only_rounds_vetoes_nothing(move, still):
    """A bias before a batch norm has no gradient and moves by rounding: it is left alone, whatever is predicted.

    A parameter that moves by a small learning rate is judged as all others.
    """
    history = states()
    for i, state in enumerate(history):
        state["b"] = torch.ones(4) + move * i
    prediction = line(history, 2) | {"b": history[-1]["b"] + 0.02}
    verdict = judge(history, prediction, 2)
    assert verdict.accepted is still
    assert ("b" in verdict.unmoved) is still
