"""The spectral nowcaster does the arithmetic that it states, and what it is for."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_nino.nowcaster import SpectralNowcaster, whitening
from hf_nino.nowcaster.whitening import (
    cosine,
    polar_by_gram,
    polar_by_steps,
    whitened,
    whitened_exactly,
    whiteness_of_noise,
    whitening_dtype,
    whitening_operations,
)


def matrix(*shape, seed=0, decay=0.0):
    """Random, with singular values that fall by factors of exp(-decay)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*shape, generator=generator)
    if not decay:
        return a
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    return u @ torch.diag(torch.exp(-decay * torch.arange(len(s)))) @ v


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4), (1, 7), (6, 3, 3, 3)])
def test_whitening_spreads_the_same_norm_over_all_directions(shape):
    """Singular values are equal within 4%, with the norm and the singular vectors of the matrix; its own are not equal
    (unless it has one direction only)."""
    a = matrix(*shape, decay=0) if len(shape) > 2 else matrix(*shape, decay=0.3)
    ours, exact = whitened(a).flatten(1), whitened_exactly(a).flatten(1)
    equal = a.norm() / math.sqrt(min(exact.shape))
    values = torch.linalg.svdvals(ours) / equal
    torch.testing.assert_close(values, torch.ones(len(values)), rtol=0.04, atol=0)
    torch.testing.assert_close(torch.linalg.svdvals(exact), equal.expand(len(values)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    if len(values) > 1:
        before = torch.linalg.svdvals(a.flatten(1)) / equal
        assert before.max() > 1.3 and before.min() < 0.6


def test_whitening_commutes_with_permutations_and_transposition():
    """Neurons have no order: permuted rows and columns come out permuted; another permutation does not match."""
    a = matrix(6, 10, decay=0.3)
    rows, columns = torch.randperm(6, generator=torch.Generator().manual_seed(1)), torch.arange(9, -1, -1)
    torch.testing.assert_close(whitened(a[rows][:, columns]), whitened(a)[rows][:, columns], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whitened(a.T), whitened(a).T, rtol=1e-4, atol=1e-5)
    assert (whitened(a[rows]) - whitened(a)).abs().max() > 0.1


def test_whitening_nothing_is_nothing():
    """A tensor that did not move, or whose numbers are as small as float32 has them, gives no NaN."""
    assert torch.equal(whitened(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert whitened(1e-30 * matrix(3, 4)).isfinite().all()


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (24, 500)])
def test_the_way_by_the_gram_matrix_is_the_same(shape):
    """Long matrices are whitened with two long products instead of two in every step; both ways agree to 1e-3 even
    where singular values fall by 600 times, and to 1e-5 where they are as even as those of noise."""
    for decay, near in ((0.0, 1e-5), (6.4 / (min(shape) - 1), 1e-3)):
        a = matrix(*shape, decay=decay)
        wide = a if shape[0] <= shape[1] else a.T
        x = wide / wide.norm()
        direct, by_gram = polar_by_steps(x), polar_by_gram(x)
        assert (direct - by_gram).norm() < near * direct.norm()
        assert (direct - polar_by_steps(x.flip(0))).norm() > 0.1 * direct.norm()


@pytest.fixture(params=[False, True])
def bfloat16(request, monkeypatch):
    """Whether the machine is said to multiply bfloat16 faster; what it cannot it does slowly."""
    monkeypatch.setattr(whitening, "_multiplies_bfloat16", lambda device: request.param)
    return request.param


def test_operations_are_those_of_the_products(bfloat16):
    """As torch counts them, on all ways and for kernels."""
    for shape in ((16, 16), (16, 31), (16, 32), (100, 8), (6, 3, 3, 3), (256, 520), (4096, 256)):
        with FlopCounterMode(display=False) as counter:
            whitened(torch.randn(shape))
        assert counter.get_total_flops() == whitening_operations(shape, whitening_dtype(shape, "cpu")), shape


@pytest.mark.parametrize("shape", [(256, 256), (256, 700), (300, 4, 100)])
def test_large_matrices_are_multiplied_in_bfloat16_where_that_is_fast(shape, monkeypatch):
    """The direction is the same to within a cosine of 0.999, at singular values that fall by 100 times, and of the
    same norm; neither small nor very long matrices are another bit for bit."""
    small, long = matrix(255, 400), matrix(256, 4096)
    a = matrix(*shape) if len(shape) > 2 else matrix(*shape, decay=math.log(100) / 255)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(whitening, "_multiplies_bfloat16", lambda device, fast=fast: fast)
        assert (whitening_dtype(shape, "cpu") == torch.bfloat16) == fast
        found.append([whitened(each) for each in (a, small, long)])
    (half, *others), (whole, *same) = found
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    exact = whitened_exactly(a)
    assert cosine(half, whole) > 0.999 and cosine(half, exact) > 0.999 > cosine(a, exact)
    torch.testing.assert_close(half.norm(), whole.norm(), rtol=0.01, atol=0)
    assert all(torch.equal(*pair) for pair in zip(others, same, strict=True))


def test_its_work_is_that_of_whitening_and_of_the_rest(bfloat16):
    """More for a square matrix than for a long one of as many elements, and for that than for a vector; without
    whitening they are all alike."""
    square, long, vector = (SpectralNowcaster().work([shape]) for shape in ((512, 512), (16, 16384), (262144,)))
    assert square > long > vector == 262144
    assert SpectralNowcaster(whiten=False).work([(512, 512), (16, 16384)]) == 2 * 262144


def written_out(states, nowcaster):
    """The definition, tensor by tensor, in float64: nowcasts for a list of displacements."""
    buffer, direction, gain, results = 0.0, None, nowcaster.gain, []
    for displacement in states:
        d = displacement.double()
        if direction is not None:
            target = nowcaster.target
            if nowcaster.whiten and d.ndim > 1:
                values = torch.linalg.svdvals(buffer.flatten(1))
                if values.mean() / values.square().mean().sqrt() > 0.95 * whiteness_of_noise(d.shape):
                    target *= 1 + nowcaster.restraint * gain
            gain *= math.exp(nowcaster.rate * (float(cosine(d, direction)) - target))
            gain = min(max(gain, 0.05), nowcaster.max_gain)
        buffer = nowcaster.momentum * buffer + (1 - nowcaster.momentum) * d
        direction = whitened_exactly(buffer) if nowcaster.whiten and d.ndim > 1 else buffer
        results.append(d + gain * direction)
    return results


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("shape", "decay"), [((5,), 0), ((4, 6), 0), ((4, 6), 1.0), ((3, 2, 3, 3), 0)])
def test_it_is_what_it_says(shape, decay, whiten):
    """Five nowcasts equal the definition written out: exactly where nothing is whitened (but for a direction kept in
    bfloat16), and as closely as the iteration is to a polar decomposition where something is."""
    nowcaster = SpectralNowcaster(whiten=whiten, momentum=0.7, rate=1.0)
    displacements = [matrix(*shape, seed=s, decay=decay) + 2 * matrix(*shape, seed=99, decay=decay) for s in range(5)]
    expected = written_out(displacements, nowcaster)
    state = torch.zeros(shape)
    nowcaster.settle({"w": state})
    for displacement, step in zip(displacements, expected, strict=True):
        new = nowcaster.nowcast(None, [{"w": state + displacement}])["w"]
        error = ((new - state).double() - step).norm() / step.norm()
        assert error < (0.04 if whiten and len(shape) > 1 else 0.01)
        state = new


@pytest.mark.parametrize("growth", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 3, 3), (5,)])
def test_norms_grow_as_much_as_they_may(growth, shape):
    """Against a jump that may add what it likes (the control, which makes matrices longer): the same direction from
    the origin, and of what it adds to the norm, that share; vectors are not touched."""
    start, steps = matrix(*shape, seed=7), [0.3 * matrix(*shape, seed=s) for s in range(4)]
    bounded, free = SpectralNowcaster(growth=growth), SpectralNowcaster()
    for nowcaster in (bounded, free):
        nowcaster.settle({"w": start})
    longer = 0
    for step in steps:
        free.load_memory(bounded.memory())
        state = bounded.memory()["anchor.w"] + step
        new, other = (nowcaster.nowcast(None, [{"w": state}])["w"] for nowcaster in (bounded, free))
        added = float(other.norm() - state.norm())
        expected = other
        if len(shape) > 1 and added > 0:
            expected = other * (state.norm() + growth * added) / other.norm()
            longer += 1
        torch.testing.assert_close(new, expected)
    assert longer > 0 or len(shape) == 1


def test_a_matrix_of_zeros_does_not_become_nothing():
    """The norm of zeros is 0: a first jump from there, as of an adapter's, is no division by it."""
    nowcaster = SpectralNowcaster(growth=0.0)
    nowcaster.settle({"w": torch.zeros(3, 4)})
    assert torch.equal(nowcaster.nowcast(None, [{"w": torch.zeros(3, 4)}])["w"], torch.zeros(3, 4))
    moved = matrix(3, 4)
    new = nowcaster.nowcast(None, [{"w": moved}])["w"]
    torch.testing.assert_close(new.norm(), moved.norm())


def follow(learning_rate, nowcaster, steps=600, period=10):
    """Gradient descent with noise on a long valley, with nowcasts; mean loss of the last steps, and the last gain."""
    curvature = torch.tensor([1.0, 0.003])
    generator = torch.Generator().manual_seed(0)
    position, losses = torch.tensor([1.0, 10.0]), []
    if nowcaster is not None:
        nowcaster.settle({"w": position})
    for step in range(1, steps + 1):
        noise = 0.05 * torch.randn(2, generator=generator)
        position = position - learning_rate * (curvature * position + noise)
        if nowcaster is not None and step % period == 0:
            position = nowcaster.nowcast(None, [{"w": position}])["w"]
        losses.append(float((curvature * position**2).sum() / 2))
    return sum(losses[-50:]) / 50, None if nowcaster is None else float(nowcaster.memory()["gain.w"])


def test_the_gain_grows_where_steps_are_too_short_and_shrinks_where_they_are_too_long():
    """On a long valley with a tenth of the learning rate the gain rises far above its start and the loss ends far
    below that of plain descent; with one at the edge of stability it falls below its start."""
    small, gain = follow(0.05, SpectralNowcaster())
    plain, _ = follow(0.05, None)
    assert gain > 2 and small < 0.5 * plain
    _, gain = follow(1.9, SpectralNowcaster())
    assert gain < 0.5
    _, kept = follow(0.05, SpectralNowcaster(rate=0))
    assert kept == 0.5


@pytest.mark.parametrize("shape", [(100, 100), (60, 120), (30, 240), (64, 3, 3, 3)])
def test_noise_is_as_white_as_the_law_says(shape):
    """Its whiteness, by singular values and as the angle that is used, is the law's within 0.02; that of a matrix with
    few strong directions is far below."""
    noise, few = matrix(*shape), matrix(30, 30, decay=0.2)
    for a in (noise, noise + 3):
        values = torch.linalg.svdvals(a.flatten(1))
        assert abs(float(values.mean() / values.square().mean().sqrt()) - float(cosine(a, whitened(a)))) < 0.02
    assert abs(float(cosine(noise, whitened(noise))) - whiteness_of_noise(shape)) < 0.02
    assert float(cosine(few, whitened(few))) < 0.8 * whiteness_of_noise(few.shape)


def test_where_moves_are_white_a_long_jump_needs_more_agreement():
    """With the same agreement between moves, the gain of a matrix that moves in all directions alike stays where the
    agreement backs it; that of one with few directions, or without restraint, goes on growing.  Vectors have no
    directions to neglect."""

    def gain(noise, restraint):
        nowcaster = SpectralNowcaster(restraint=restraint)
        state = torch.zeros_like(noise[0])
        nowcaster.settle({"w": state})
        for move in noise:
            state = nowcaster.nowcast(None, [{"w": state + move}])["w"]
        return float(nowcaster.memory()["gain.w"])

    drift, few = matrix(24, 24, seed=50), matrix(24, 24, seed=50, decay=1.0)
    white = [matrix(24, 24, seed=s) + 0.7 * drift for s in range(40)]
    strong = [matrix(24, 24, seed=s, decay=1.0) + 0.7 * few for s in range(40)]
    assert gain(white, 3.0) < 0.6 * gain(white, 0.0)
    assert gain(strong, 3.0) == gain(strong, 0.0)
    vectors = [move.flatten() for move in white]
    assert gain(vectors, 3.0) == gain(vectors, 0.0)


def test_a_tensor_that_never_moves_stays_and_keeps_its_gain():
    """No NaN from the angle between nothing and nothing."""
    nowcaster, still = SpectralNowcaster(), {"w": matrix(3, 3), "b": torch.zeros(3)}
    nowcaster.settle(still)
    for _ in range(3):
        new = nowcaster.nowcast(None, [still])
        assert all(torch.equal(new[name], still[name]) for name in still)
    assert float(nowcaster.memory()["gain.w"]) == 0.5


def test_it_continues_from_its_memory():
    """A nowcaster with restored memory goes on bit for bit; one without does not."""
    saved, state = SpectralNowcaster(), {"w": matrix(4, 5), "b": torch.zeros(5)}
    saved.settle(state)
    saved.nowcast(None, [{name: tensor + 1 + matrix(*tensor.shape, seed=3) for name, tensor in state.items()}])
    memory = saved.memory()
    assert {key.partition(".")[0] for key in memory} == {"anchor", "buffer", "direction", "gain"}
    restored, fresh = SpectralNowcaster(), SpectralNowcaster()
    restored.load_memory(memory)
    fresh.settle({name: memory[f"anchor.{name}"] for name in state})
    following = {name: memory[f"anchor.{name}"] + matrix(*tensor.shape, seed=4) for name, tensor in state.items()}
    expected, ours, without = (n.nowcast(None, [following]) for n in (saved, restored, fresh))
    assert all(torch.equal(ours[name], expected[name]) for name in state)
    assert not torch.equal(without["w"], expected["w"])


def test_memory_that_does_not_fit_is_refused():
    """One error that names the part."""
    nowcaster = SpectralNowcaster()
    nowcaster.settle({"w": torch.zeros(2, 2)})
    memory = nowcaster.memory()
    with pytest.raises(ValueError, match="gain that fits"):
        SpectralNowcaster().load_memory({**memory, "gain.w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'speed\.w'"):
        SpectralNowcaster().load_memory({**memory, "speed.w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"period": 0}, "period"),
        ({"gain": 9.0}, "gain"),
        ({"gain": 0.01}, "gain"),
        ({"rate": -1}, "rate"),
        ({"target": 1.5}, "target"),
        ({"restraint": -1.0}, "restraint"),
        ({"growth": 1.5}, "growth"),
        ({"max_gain": float("inf")}, "max_gain"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, name):
    """The error names the argument."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        SpectralNowcaster(**arguments)
