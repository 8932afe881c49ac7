"""The guard stops what is absurd and nothing else."""

import math

import pytest
import torch

from hf_nino.training import guard, judge, tame


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
    """2.9 times a straight line at the usual speed passes as it is; 3.1 times is shortened to 3 times."""
    history = states()
    below, above = line(history, 2 * 2.9), line(history, 2 * 3.1)
    assert judge(history, below, 2).shortened == {}
    verdict = judge(history, above, 2)
    assert verdict.accepted and "2 shortened (such as 'a')" in verdict.remarks
    written, limit = tame(history[-1], above, verdict), line(history, 2 * 3)
    assert all(torch.allclose(written[name], limit[name], rtol=1e-3, atol=1e-3) for name in limit)
    assert verdict.step_norm == pytest.approx(judge(history, limit, 2).step_norm, rel=1e-3)


def many(absurd):
    """Ten parameters, and a prediction that is absurd for some of them."""
    history = [{f"{i}": torch.full((3,), 1.0 + 0.1 * t + i) for i in range(10)} for t in range(3)]
    prediction = line(history, 2)
    return history, prediction | {f"{i}": prediction[f"{i}"] + 100 for i in range(absurd)}


def test_a_tensor_with_an_absurd_step_is_left_alone_and_most_of_them_refuse_the_nowcast():
    """Up to half of the parameters are left out, the others written as predicted; with more, nothing is written, and
    the reason names a parameter and the rule."""
    history, prediction = many(5)
    verdict = judge(history, prediction, 2)
    assert verdict.accepted and verdict.left_alone == {"0", "1", "2", "3", "4"}
    written = tame(history[-1], prediction, verdict)
    assert written.keys() == {"5", "6", "7", "8", "9"} and all(written[n] is prediction[n] for n in written)
    history, prediction = many(6)
    verdict = judge(history, prediction, 2)
    assert not verdict.accepted
    assert "'0'" in verdict.reason and "3 x 2 intervals" in verdict.reason


def test_one_leap_in_the_history_does_not_raise_the_limit():
    """The usual move is the median: an interval in which a parameter moved a hundred times as far does not count."""
    history = states(count=5)
    for state in history[3:]:
        state["b"] = state["b"] + 100
    jump = history[-1] | {"b": history[-1]["b"] + 50}
    assert "b" in judge(history, jump, 2).left_alone


def test_the_alignment_is_the_cosine_with_the_historys_move():
    """1 for a straight line, -1 for the way back, near 0 for noise, unknown for a history of one state."""
    history = states()
    assert judge(history, line(history, 2), 2).alignment == pytest.approx(1.0, abs=1e-5)
    assert judge(history, line(history, -1), 2).alignment == pytest.approx(-1.0, abs=1e-5)
    large = [{"a": torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * t} for t in range(3)]
    noise = {"a": large[-1]["a"] + torch.randn(10_000, generator=torch.Generator().manual_seed(1))}
    assert abs(judge(large, noise, 2).alignment) < 0.05
    assert math.isnan(judge(history[-1:], history[-1], 1).alignment)


def test_a_share_of_the_step_can_be_taken():
    """``share=0.5`` goes half of the way."""
    history = states()
    prediction = line(history, 2)
    half = tame(history[-1], prediction, judge(history, prediction, 2), share=0.5)
    expected = line(history, 1)
    assert all(torch.allclose(half[name], expected[name], atol=1e-6) for name in expected)


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
    assert verdict.accepted
    assert ("b" in verdict.unmoved) is still and ("b" in verdict.left_alone) is not still


@pytest.mark.parametrize("count", [1, 4])
def test_large_parameters_are_measured_in_pieces(count, monkeypatch):
    """The verdict on pieces of 7 elements is that on the whole; where numbers are not finite, they are counted in
    all pieces."""
    history = states(count)
    prediction = {name: 1.5 * tensor for name, tensor in history[-1].items()}
    whole = judge(history, prediction, 20)
    spoilt = {name: tensor.clone() for name, tensor in prediction.items()}
    spoilt["a"][[0, 2, 5], 0] = torch.tensor([math.nan, math.inf, -math.inf])
    monkeypatch.setattr(guard, "PIECE", 7)
    pieces = judge(history, prediction, 20)
    for found, expected in zip(vars(pieces).values(), vars(whole).values(), strict=True):
        assert found == (pytest.approx(expected, rel=1e-5, nan_ok=True) if isinstance(expected, float) else expected)
    assert judge(history, spoilt, 20).reason == "3 of 30 predicted values of 'a' are not finite"
