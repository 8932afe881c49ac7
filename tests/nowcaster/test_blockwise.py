"""The fast path computes the same function as the reference, in bounded memory."""

import pytest
import torch
from nowcaster_cases import (
    GRAPHS,
    attention_graph,
    blockwise_deltas,
    mlp_graph,
    original_nowcaster,
    positions,
    random_nowcaster,
    reference_deltas,
    scales_of,
    trajectory,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_nino.nowcaster import Engine
from hf_nino.nowcaster.blockwise import blockwise_samples
from hf_nino.nowcaster.folding import fold
from hf_nino.nowcaster.modeling import token_rows
from hf_nino.nowcaster.operations import operations, working_memory

TOLERANCE = 1e-5
NOWCASTERS = {
    "original": original_nowcaster,
    "2 layers": lambda: random_nowcaster(num_layers=2),
    "3 layers": lambda: random_nowcaster(num_layers=3),
    "4 layers, gelu": lambda: random_nowcaster(num_layers=4, hidden_size=7, activation="gelu"),
    "context 3": lambda: random_nowcaster(context=3, positional_size=4, max_features=12),
}


def assert_close(ours, expected, tolerance=TOLERANCE):
    """Scaled deltas agree to `tolerance`, in units of the parameter's spread or, if larger, of the largest delta."""
    assert len(ours) == len(expected) > 0
    for mine, other in zip(ours, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_reference(name, nowcaster):
    """Blocks and the explicit graph give the same scaled deltas, for one horizon and for all."""
    graph, model = GRAPHS[name](), NOWCASTERS[nowcaster]()
    states, pos = trajectory(graph, model.context), positions(graph, model.config.positional_size)
    with torch.no_grad():
        for horizon in (1, model.max_horizon, None):
            expected = reference_deltas(model, graph, states, horizon, pos)
            assert_close(blockwise_deltas(model, graph, states, horizon, pos), expected)
        # Negative control: other states, other deltas.
        other = blockwise_deltas(model, graph, trajectory(graph, model.context, seed=1), None, pos)
        assert max(float((a - b).abs().max()) for a, b in zip(other, expected, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", GRAPHS)
def test_does_not_depend_on_the_tile(name):
    """Tiles of one edge, of a few that divide nothing, and of everything give the same deltas."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    with torch.no_grad():
        whole = blockwise_deltas(model, graph, states, 2, pos, engine=Engine(tile=10**6))
        for tile in (1, 7, 50):
            assert_close(blockwise_deltas(model, graph, states, 2, pos, engine=Engine(tile=tile)), whole)


def test_token_positions():
    """A table of token positions changes the tokens' nodes in both forms alike."""
    graph, model = attention_graph(), random_nowcaster(token_position_vocabulary=20)
    states, pos, token = trajectory(graph), positions(graph), token_rows(graph, 20)
    with torch.no_grad():
        ours = blockwise_deltas(model, graph, states, 2, pos, token=token)
        assert_close(ours, reference_deltas(model, graph, states, 2, pos, token))
        without = blockwise_deltas(model, graph, states, 2, pos, token=torch.zeros_like(token))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, without, strict=True)) > 100 * TOLERANCE


def test_gradients_equal_the_reference():
    """Differentiable in the weights: gradients of both forms agree, and every weight gets one."""
    graph, model = attention_graph(), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    gradients = []
    for deltas in (reference_deltas, blockwise_deltas):
        model.zero_grad()
        sum(delta.square().mean() for delta in deltas(model, graph, states, None, pos)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # The network knows 9 taps and all edge types, this graph has one tap and some types.
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_do_not_depend_on_what_is_kept_or_tiled(name):
    """Recomputed tiles, kept tiles and one tile give the same gradients; a shared folded network does too."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)

    def gradients(engine, folded=None):
        model.zero_grad()
        deltas = blockwise_deltas(model, graph, states, 3, pos, engine=engine, folded=folded)
        sum(delta.square().sum() for delta in deltas).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients(Engine(tile=10**6, recompute=False))
    for engine, folded in (
        (Engine(tile=7), None),
        (Engine(tile=7, recompute=False), None),
        (Engine(tile=50), fold(model, 3)),
    ):
        for name, gradient in gradients(engine, folded).items():
            torch.testing.assert_close(
                gradient, whole[name], rtol=1e-4, atol=1e-5 * max(1.0, float(whole[name].abs().max()))
            )


def kept(graph, model, engine):
    """Bytes that autograd keeps between the passes of one differentiable nowcast."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        deltas = blockwise_deltas(model, graph, trajectory(graph), 3, positions(graph), engine=engine)
    assert all(delta.requires_grad for delta in deltas)
    return sum(storage.nbytes() for storage in storages.values())


def test_recomputing_keeps_nothing_of_the_edges():
    """With gradients and `recompute`, what is kept is far below edges x H; without it, it is several times that."""
    graph, model = attention_graph(tokens=150, heads=4, width=12), random_nowcaster(hidden_size=32)
    edges = graph.num_edges * model.config.hidden_size * 4
    assert kept(graph, model, Engine(tile=256)) < 0.5 * edges
    assert kept(graph, model, Engine(tile=256, recompute=False)) > 3 * edges


@pytest.mark.parametrize("name", GRAPHS)
def test_samples_of_one_graph_at_once(name):
    """Several histories of one graph in one call give what each gives alone, with one tile and with many."""
    graph, model = GRAPHS[name](), random_nowcaster()
    samples, pos = [trajectory(graph, seed=seed) for seed in range(3)], positions(graph)
    with torch.no_grad():
        alone = [blockwise_deltas(model, graph, states, None, pos) for states in samples]
        for tile in (9, 10**6):
            scales = [scales_of(graph, states) for states in samples]
            together = list(blockwise_samples(model, graph, samples, scales, None, pos, engine=Engine(tile=tile)))
            for number, deltas in enumerate(alone):
                assert_close([delta[number] for _, delta in together], deltas)
        # Positions of their own, and a negative control: they matter.
        own = torch.stack([pos, pos, positions(graph, seed=1)])
        shifted = [delta for _, delta in blockwise_samples(model, graph, samples, scales, None, own)]
    assert_close([delta[0] for delta in shifted], alone[0])
    assert max(float((d[2] - a).abs().max()) for d, a in zip(shifted, alone[2], strict=True)) > 100 * TOLERANCE


class Live(TorchDispatchMode):
    """Follows the storages that operators return: the largest of them, and the most bytes alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in [*args, *(kwargs or {}).values()] if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_memory_is_bounded_by_tiles_and_nodes(num_layers):
    """A nowcast holds no more than `working_memory` says beside its result; the reference holds edges x H."""
    graph = attention_graph(tokens=1500, heads=8, width=12)
    model = random_nowcaster(hidden_size=32, num_layers=num_layers)
    states, pos, engine = trajectory(graph), positions(graph), Engine(memory=300_000)
    edges, result = graph.num_edges * model.config.hidden_size * 4, graph.num_parameters * 4
    bound = working_memory(graph, model, engine)
    assert bound < edges / 8
    with torch.no_grad(), Live() as live:
        nowcast = model.nowcast(graph, states, 3, pos=pos, engine=engine)
    assert live.peak <= bound + result
    with torch.no_grad(), Live() as live:
        model.nowcast(graph, states, 3, pos=pos, engine=Engine(tile=10**7))
    assert live.peak > bound + result, "negative control: one tile of everything does not fit"
    assert all(tensor.isfinite().all() for tensor in nowcast.values())


def test_the_memory_argument_bounds_the_tile():
    """Half the bytes, half the edges; never less than one edge, however little there is."""
    device, kind = torch.device("cpu"), torch.float32
    tile = Engine(memory=1 << 20).tile_edges(device, kind, 128)
    assert tile == (1 << 20) // (2 * 128 * 4)
    assert Engine(memory=1 << 19).tile_edges(device, kind, 128) == tile // 2
    assert Engine(memory=1).tile_edges(device, kind, 128) == 1
    assert Engine(memory=1 << 20, tile=10**9).tile_edges(device, kind, 128) == tile
    with pytest.raises(ValueError, match="`memory` of an Engine must be a positive whole number or None, got 0"):
        Engine(memory=0)


@pytest.mark.parametrize("num_layers", [2, 3, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_operations_are_counted_exactly(name, num_layers):
    """`operations` is what PyTorch counts while a nowcast runs."""
    graph, model = GRAPHS[name](), random_nowcaster(num_layers=num_layers)
    states, folded = trajectory(graph), fold(model, 3)
    with FlopCounterMode(display=False) as counter:  # with gradients: it knows no products in place
        blockwise_deltas(model, graph, states, 3, positions(graph), folded=folded)
    assert operations(graph, model).total == counter.get_total_flops()


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("form", [reference_deltas, blockwise_deltas])
def test_equivariant(name, form):
    """Permuting interchangeable neurons of the states permutes the deltas; permuting pinned neurons does not."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)

    def deltas_of(permutation):
        permuted = [graph.permute(state, permutation=permutation) for state in states]
        return as_state(graph, form(model, graph, permuted, 4, pos))

    still = deltas_of(torch.arange(graph.num_nodes))
    free = graph.permutation(torch.Generator().manual_seed(3))
    moved = graph.permute(still, permutation=free)
    assert any(not torch.equal(moved[name], still[name]) for name in still)
    assert difference(deltas_of(free), moved) < TOLERANCE

    pinned = torch.arange(graph.num_nodes)
    group = next(i for i, group in enumerate(graph.groups) if group.pinned)
    nodes = slice(graph.group_offsets[group], graph.group_offsets[group] + graph.groups[group].size)
    pinned[nodes] = pinned[nodes].flip(0)
    assert difference(deltas_of(pinned), graph.permute(still, permutation=pinned)) > 100 * TOLERANCE


def as_state(graph, deltas):
    state = {name: torch.zeros(graph.shapes[name]) for name in graph.parameter_names}
    with torch.no_grad():
        for block, delta in zip(graph.trainable_blocks, deltas, strict=True):
            block.write(state[block.parameter], delta)
    return state


def difference(ours, expected):
    return max(float((ours[name] - expected[name]).abs().max()) for name in expected)


def test_reads_snapshots_of_any_layout_and_dtype():
    """Transposed, float64 and bfloat16 snapshots give what their contiguous float32 copies give."""
    graph, model = mlp_graph(), random_nowcaster()
    states, pos = trajectory(graph), positions(graph)
    rounded = [{name: tensor.bfloat16().float() for name, tensor in state.items()} for state in states]
    odd = [
        {name: t.bfloat16() if i % 2 else t.double().t().contiguous().t() for name, t in state.items()}
        for i, state in enumerate(rounded)
    ]
    with torch.no_grad():
        assert_close(blockwise_deltas(model, graph, odd, 2, pos), blockwise_deltas(model, graph, rounded, 2, pos))
