"""The rules without weights do the arithmetic that they state."""

import pytest
import torch

from hf_nino.nowcaster import LinearNowcaster, MomentumNowcaster


def line(context=5, dtype=torch.float32):
    """A trajectory that moves by the same amount every interval: (states, move)."""
    start, move = torch.arange(6.0).view(2, 3), torch.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, -0.25]])
    return [
        {"w": (start + t * move).to(dtype), "b": torch.full((2,), float(t), dtype=dtype)} for t in range(context)
    ], move


@pytest.mark.parametrize("context", [2, 5])
@pytest.mark.parametrize("horizon", [1, 2, 4, 7])
def test_linear_is_exact_on_a_straight_line(context, horizon):
    """It lands where the line is min(horizon, max_intervals) intervals later."""
    states, move = line(context)
    nowcast = LinearNowcaster(context=context).nowcast(None, states, horizon)
    ahead = min(horizon, 4)
    torch.testing.assert_close(nowcast["w"], states[-1]["w"] + ahead * move, rtol=0, atol=0)
    torch.testing.assert_close(nowcast["b"], states[-1]["b"] + ahead, rtol=0, atol=0)


def test_linear_continues_the_mean_move_of_any_history():
    """last + factor * intervals * (last - first) / (context - 1); what lies between does not count."""
    states = [{"w": torch.tensor([value])} for value in (0.0, 9.0, -3.0, 5.0, 2.0)]
    nowcaster = LinearNowcaster(max_intervals=3, factor=0.5)
    assert nowcaster.nowcast(None, states, 3)["w"].item() == pytest.approx(2.0 + 0.5 * 3 * 2.0 / 4)
    assert nowcaster.nowcast(None, states, 40)["w"].item() == pytest.approx(2.0 + 0.5 * 3 * 2.0 / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "momentum"])
def test_low_precision_is_computed_in_float32(kind, dtype):
    """The result has the state's dtype and is the float32 result, rounded once."""

    def run(states):
        if kind == "linear":
            return LinearNowcaster().nowcast(None, states, 3)["w"]
        nowcaster = MomentumNowcaster(momentum=0.9)
        for state in states:
            result = nowcaster.nowcast(None, [state])["w"]
            nowcaster.settle(state)
        return result

    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(64, generator=generator).to(torch.bfloat16).to(dtype)} for _ in range(5)]
    result = run(states)
    assert result.dtype == dtype
    single = run([{"w": state["w"].float()} for state in states]).to(dtype)
    assert (result - single).abs().max() <= 1e-6
    if dtype == torch.bfloat16:
        last, first = states[-1]["w"], states[0]["w"]
        assert not torch.equal(last + (last - first) * 0.75, LinearNowcaster().nowcast(None, states, 3)["w"])


def test_linear_leaves_the_states_alone():
    """The result shares no memory with the states and carries no gradient."""
    states, _ = line()
    states = [{name: tensor.requires_grad_() for name, tensor in state.items()} for state in states]
    nowcast = LinearNowcaster().nowcast(None, states, 1)
    assert all(not t.requires_grad and t.data_ptr() != states[-1][name].data_ptr() for name, t in nowcast.items())


def train(position, steps):
    """A stand-in for the base optimizer: some deterministic, nonlinear steps."""
    for _ in range(steps):
        position = position - 0.1 * torch.sin(position) - 0.01 * position
    return position


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("momentum", "factor"), [(0.5, 1.0), (0.8, 0.7), (0.0, 1.0)])
def test_momentum_is_snoo(momentum, factor, nesterov):
    """b = mu b + d, w = w + factor (mu b + d) with d the displacement (arXiv 2510.15830), against a loop written out;
    and the same from torch.optim.SGD on the negative displacement, which is how the paper states it."""
    start = torch.tensor([0.5, -1.0, 2.0])
    nowcaster = MomentumNowcaster(momentum=momentum, factor=factor, nesterov=nesterov)
    nowcaster.settle({"w": start})
    slow, buffer, ours = start.clone(), torch.zeros(3), start.clone()
    outer = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([outer], lr=factor, momentum=momentum, nesterov=nesterov and momentum > 0)
    for _ in range(6):
        displacement = train(slow, 4) - slow
        buffer = momentum * buffer + displacement
        slow = slow + factor * (displacement + momentum * buffer if nesterov else buffer)
        ours = nowcaster.nowcast(None, [{"w": train(ours, 4)}])["w"]
        outer.grad = outer.detach() - train(outer.detach(), 4)
        sgd.step()
        torch.testing.assert_close(ours, slow)
        torch.testing.assert_close(ours, outer.detach())
    if momentum:
        # Negative control: without momentum it is elsewhere.
        assert (slow - train(start, 24)).abs().max() > 1e-2


def test_momentum_zero_is_lookahead():
    """w = w + factor (w~ - w), the slow weights of Lookahead (arXiv 1907.08610)."""
    nowcaster = MomentumNowcaster(momentum=0.0, factor=0.5)
    nowcaster.settle({"w": torch.tensor([0.0])})
    assert nowcaster.nowcast(None, [{"w": torch.tensor([2.0])}])["w"].item() == 1.0
    assert nowcaster.nowcast(None, [{"w": torch.tensor([2.0])}])["w"].item() == 1.5


def test_first_momentum_nowcast_only_sets_the_anchor():
    """Without an anchor the state comes back unchanged (as a copy), and counts as the anchor from then on."""
    nowcaster, state = MomentumNowcaster(momentum=0.5), {"w": torch.tensor([1.0])}
    first = nowcaster.nowcast(None, [state])
    assert torch.equal(first["w"], state["w"]) and first["w"].data_ptr() != state["w"].data_ptr()
    state["w"].fill_(100.0)
    assert nowcaster.nowcast(None, [{"w": torch.tensor([2.0])}])["w"].item() == 1.0 + 1.0 + 0.5


def test_settle_moves_the_anchor_and_keeps_the_momentum():
    """After a nowcast that was taken back, the next displacement starts from the settled state; other parameters than
    before start afresh."""
    nowcaster = MomentumNowcaster(momentum=0.5)
    nowcaster.settle({"w": torch.tensor([0.0])})
    nowcaster.nowcast(None, [{"w": torch.tensor([1.0])}])  # buffer 1, anchor 1.5
    nowcaster.settle({"w": torch.tensor([1.0])})
    assert nowcaster.nowcast(None, [{"w": torch.tensor([1.0])}])["w"].item() == 1.0 + 0.5 * 0.5
    other = {"v": torch.tensor([3.0, 4.0])}
    assert torch.equal(nowcaster.nowcast(None, [other])["v"], other["v"])
    assert set(nowcaster.memory()) == {"anchor.v", "buffer.v"}


def test_memory_round_trip():
    """A nowcaster with restored memory continues exactly like the one that was saved; forgetting does not."""
    saved, states = MomentumNowcaster(momentum=0.8), line()[0]
    for state in states[:3]:
        saved.nowcast(None, [state])
    memory = saved.memory()
    assert set(memory) == {"anchor.w", "anchor.b", "buffer.w", "buffer.b"}
    assert all(tensor.dtype == torch.float32 for tensor in memory.values())
    restored, fresh = MomentumNowcaster(momentum=0.8), MomentumNowcaster(momentum=0.8)
    restored.load_memory(memory)
    fresh.load_memory({})
    for tensor in memory.values():
        tensor.fill_(7.0)  # neither shares memory with what it gave or was given
    for state in states[3:]:
        expected, ours, without = (n.nowcast(None, [state]) for n in (saved, restored, fresh))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not torch.equal(without["w"], expected["w"])
    restored.load_memory({})
    assert restored.memory() == {}


@pytest.mark.parametrize(
    "memory",
    [
        {"slow.w": torch.zeros(1)},
        {"anchor": torch.zeros(1)},
        {"anchor.w": torch.zeros(1)},
        {"anchor.w": torch.zeros(1), "buffer.w": torch.zeros(2)},
    ],
)
def test_malformed_memory_is_refused_and_changes_nothing(memory):
    """One error that names the key; the memory stays as it was."""
    nowcaster = MomentumNowcaster()
    nowcaster.settle({"w": torch.tensor([1.0])})
    with pytest.raises(ValueError, match="`memory` of a MomentumNowcaster"):
        nowcaster.load_memory(memory)
    assert nowcaster.memory()["anchor.w"].item() == 1.0


def test_only_momentum_has_memory():
    """has_memory tells callers whether settle and memory can be skipped."""
    assert MomentumNowcaster().has_memory and not LinearNowcaster().has_memory
    assert not LinearNowcaster.needs_graph and not MomentumNowcaster.needs_graph


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LinearNowcaster(context=1), "context"),
        (lambda: LinearNowcaster(max_intervals=0), "max_intervals"),
        (lambda: LinearNowcaster(factor=float("nan")), "factor"),
        (lambda: LinearNowcaster(period=0), "period"),
        (lambda: MomentumNowcaster(momentum=1.0), "momentum"),
        (lambda: MomentumNowcaster(momentum="0.5"), "momentum"),
        (lambda: MomentumNowcaster(factor=0), "factor"),
        (lambda: MomentumNowcaster(period=2.5), "period"),
    ],
)
def test_arguments_out_of_range_are_refused(make, name):
    """The error names the argument."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


def test_bad_states_are_refused():
    """Too few snapshots, other names, other shapes and horizons out of range: one error each."""
    nowcaster, (states, _) = LinearNowcaster(), line()
    with pytest.raises(ValueError, match="5 snapshots"):
        nowcaster.nowcast(None, states[:4], 1)
    with pytest.raises(ValueError, match="same names"):
        nowcaster.nowcast(None, [*states[:4], {"w": states[4]["w"]}], 1)
    with pytest.raises(ValueError, match="same shape"):
        nowcaster.nowcast(None, [*states[:4], {**states[4], "b": torch.zeros(3)}], 1)
    with pytest.raises(ValueError, match="from 1 to 40"):
        nowcaster.nowcast(None, states, 41)
    with pytest.raises(ValueError, match="from 1 to 1"):
        MomentumNowcaster().nowcast(None, states[:1], 2)


def test_linear_says_how_far_it_looks():
    """Its reach is what it really does: further horizons are accepted and predict the same state."""
    states = [{"w": torch.tensor([float(i)])} for i in range(5)]
    nowcaster = LinearNowcaster(max_intervals=3)
    assert nowcaster.reach == 3 < nowcaster.max_horizon
    assert nowcaster.nowcast(None, states, 3)["w"].equal(nowcaster.nowcast(None, states, 40)["w"])
    assert not nowcaster.nowcast(None, states, 2)["w"].equal(nowcaster.nowcast(None, states, 3)["w"])
    assert LinearNowcaster(max_intervals=2.5).reach == 3
