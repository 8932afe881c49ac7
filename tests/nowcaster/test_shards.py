"""What ranks share a nowcast with: blocks of rows, scales of all rows, owners; and rules on shards."""

import math

import pytest
import torch
from nowcaster_cases import GRAPHS, trajectory
from ranks_cases import Meeting, Mute, divided, on_ranks, put_together, rows_of, taps_in_rows_graph, worst
from sample import each_type, sample_graph

from hf_nino.graph.restriction import restrict, taps_cross_rows
from hf_nino.nowcaster import (
    LinearNowcaster,
    MomentumNowcaster,
    NiNoModel,
    Nowcaster,
    Rows,
    Shards,
    SpectralNowcaster,
    WNNModel,
)
from hf_nino.nowcaster import spectral as spectral_module
from hf_nino.nowcaster.owners import from_owners, rounds, to_owners
from hf_nino.nowcaster.scaling import measure_scales

SHAPES = {"w": (12, 5), "k": (6, 2, 3, 3), "tall": (9, 2), "b": (12,), "one": (1, 4), "scalar": ()}
DIVISIONS = [(1, None), (2, None), (3, 1), (5, 2), (5, 3)]
divisions = pytest.mark.parametrize(("size", "seed"), DIVISIONS)


def states_of(shapes, count, seed=0):
    """A path of random steps."""
    generator = torch.Generator().manual_seed(seed)
    states = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}]
    for _ in range(count - 1):
        step = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        states.append({name: tensor + step[name] for name, tensor in states[-1].items()})
    return states


def check_restriction(graph, seed):
    """Every element of a block lies in one part of one rank, between its own neurons."""
    ranges = divided({name: graph.shapes[name] for name in graph.parameter_names}, 3, seed)
    numbers = {name: torch.arange(math.prod(graph.shapes[name])) for name in ranges}

    def ends(block, elements):
        """Elements with the neurons that they lie between, [elements, 2], in the order of elements."""
        source, target = graph.node_index(block.source), graph.node_index(block.target)
        between = (source[:, None] * graph.num_nodes + target).unsqueeze(-1).expand(elements.shape)
        return torch.stack([elements.flatten(), between.flatten()], dim=1)

    for block in graph.trainable_blocks:
        row = math.prod(graph.shapes[block.parameter][1:])
        found = []
        for rows in ranges[block.parameter]:
            start, stop = rows.start * row, rows.stop * row
            for part in restrict(block, start, stop):
                assert taps_cross_rows(block, row) or part.shape[2] == block.shape[2]
                # A part addresses the rows alone: it sees the numbers that the whole parameter has there.
                found.append(ends(part, part.view(numbers[block.parameter][start:stop].clone())))
        found, expected = torch.cat(found), ends(block, block.elements())
        assert torch.equal(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()]), block.parameter


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [*GRAPHS, "taps in rows"])
def test_blocks_of_rows_are_the_block(name, seed):
    """Whatever the ranges, the parts of a block hold each of its edges once, between the same neurons."""
    check_restriction((GRAPHS | {"taps in rows": taps_in_rows_graph})[name](), seed)


@each_type
def test_blocks_of_rows_of_real_models_are_the_block(kind, model_type):
    """The same in thirty types of models, none of which has edges that rows cut."""
    graph = sample_graph(kind, model_type)
    check_restriction(graph, 4)
    rows = {name: math.prod(graph.shapes[name][1:]) for name in graph.parameter_names}
    assert not any(taps_cross_rows(block, rows[block.parameter]) for block in graph.trainable_blocks)


def test_edges_that_rows_cut_are_told():
    """Taps along the first axis make edges of several rows, taps of a kernel do not; a cut between rows shows it."""
    cut, whole = taps_in_rows_graph(), GRAPHS["conv"]()
    told = {block.parameter for block in cut.trainable_blocks if taps_cross_rows(block, 6)}
    assert told == {"flat.weight", "other.weight"}
    flat = cut.trainable_blocks[0]
    assert flat.shape[2] == 3 and {part.shape[2] for part in restrict(flat, 0, 24)} == {1}
    for block in whole.trainable_blocks:
        assert not taps_cross_rows(block, math.prod(whole.shapes[block.parameter][1:]))


@divisions
def test_scales_are_of_all_rows(size, seed):
    """Mean and deviation over all rows and snapshots, the same bits on every rank; of a parameter whose spread is
    small against its mean as well.  Without the sums they are not those."""
    shapes = SHAPES | {"gain": (8,)}
    states = [state | {"gain": 1 + 1e-2 * state["gain"]} for state in states_of(shapes, 4)]
    ranges = divided(shapes, size, seed)
    expected = measure_scales(states)

    def measure(shards):
        return measure_scales([rows_of(ranges, shards.ranks.rank, state) for state in states], shards.ranks)

    found = on_ranks(ranges, size, measure)
    assert all(other == found[0] for other in found)
    for name, scale in expected.items():
        assert tuple(found[0][name]) == pytest.approx(tuple(scale), rel=1e-5), name
    for sum_forgotten in (0, 1) if size > 1 else ():
        alone = on_ranks(ranges, size, measure, Meeting(size, frozenset({sum_forgotten})))
        assert tuple(alone[0]["w"]) != pytest.approx(tuple(expected["w"]), rel=1e-3)


@divisions
def test_parameters_come_together_and_go_back(size, seed):
    """Every parameter is whole at one rank once; what that rank makes of it arrives where the rows are."""
    (state,) = states_of(SHAPES, 1)
    ranges = divided(SHAPES, size, seed)
    turns = rounds({name: math.prod(shape) for name, shape in SHAPES.items()}, size)
    assert sorted(name for names in turns for name in names) == sorted(SHAPES)

    def work(shards):
        rows, result, seen = rows_of(ranges, shards.ranks.rank, state), {}, []
        for names in turns:
            whole = to_owners(shards, names, rows, torch.float64)
            if whole is not None:
                seen.append(names[shards.ranks.rank])
                assert torch.equal(whole, state[seen[-1]].double())
                whole = 2 * whole
            result |= from_owners(shards, names, whole, rows, torch.float64)
        return seen, result

    seen, results = zip(*on_ranks(ranges, size, work), strict=True)
    assert sorted(name for names in seen for name in names) == sorted(SHAPES)
    whole = put_together(ranges, results)
    assert all(torch.equal(whole[name], 2 * state[name].double()) for name in SHAPES)


@divisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_nowcasts_of_rows_are_rows_of_the_nowcast(size, seed, dtype):
    """Identical, and without a word between the ranks."""
    states = [{name: tensor.to(dtype) for name, tensor in state.items()} for state in states_of(SHAPES, 5)]
    ranges, nowcaster = divided(SHAPES, size, seed), LinearNowcaster()
    parts = [
        nowcaster.nowcast(
            None, [rows_of(ranges, rank, state) for state in states], 3, shards=Shards(ranges, Mute(rank, size))
        )
        for rank in range(size)
    ]
    whole, expected = put_together(ranges, parts), nowcaster.nowcast(None, states, 3)
    assert all(torch.equal(whole[name], expected[name]) for name in SHAPES)


def runs_of(make, states, ranges, size, settle_at=(), memory=None):
    """Nowcasts of all states in turn: whole ones, of one process, and those put together from ranks; and memories."""

    def nowcasts(nowcaster, states, shards):
        results = []
        for number, state in enumerate(states):
            results.append(nowcaster.nowcast(None, [state], 1, shards=shards))
            if number in settle_at:
                nowcaster.settle({name: tensor + 0.01 for name, tensor in results[-1].items()}, shards=shards)
        return results, nowcaster.memory()

    def on_rank(shards):
        rank = shards.ranks.rank
        nowcaster = make()
        if memory is not None:
            nowcaster.load_memory(divided_memory(nowcaster, memory, ranges, rank))
        return nowcasts(nowcaster, [rows_of(ranges, rank, state) for state in states], shards)

    alone = make()
    alone.load_memory(memory or {})
    parts, memories = zip(*on_ranks(ranges, size, on_rank), strict=True)
    ours = [put_together(ranges, part) for part in zip(*parts, strict=True)]
    return ours, whole_memory(alone, memories, ranges), *nowcasts(alone, states, None)


def whole_memory(nowcaster, memories, ranges):
    """The memory of one process, from those of ranks."""
    whole = {}
    for key in memories[0]:
        name = nowcaster.memory_rows(key)
        if name is None:
            assert all(torch.equal(memory[key], memories[0][key]) for memory in memories)
            whole[key] = memories[0][key]
        else:
            parts = [{name: memory[key]} for memory in memories]
            whole[key] = put_together({name: ranges[name]}, parts)[name]
    return whole


def divided_memory(nowcaster, memory, ranges, rank):
    """A rank's part of the memory of one process."""
    names = {key: nowcaster.memory_rows(key) for key in memory}
    return {
        key: tensor if names[key] is None else ranges[names[key]][rank].of(tensor) for key, tensor in memory.items()
    }


@divisions
def test_momentum_of_rows_is_rows_of_the_momentum(size, seed):
    """Nowcasts and memory are identical, whatever is settled on in between."""
    ranges, states = divided(SHAPES, size, seed), states_of(SHAPES, 5)
    ours, memory, expected, expected_memory = runs_of(MomentumNowcaster, states, ranges, size, settle_at=(1, 3))
    for mine, other in zip(ours, expected, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in SHAPES)
    assert memory.keys() == expected_memory.keys()
    assert all(torch.equal(memory[key], expected_memory[key]) for key in memory)


@pytest.mark.parametrize("settings", [{}, {"whiten": False}, {"growth": 0.2}], ids=str)
@divisions
def test_spectral_nowcasts_of_rows_are_rows_of_the_nowcast(size, seed, settings):
    """To 1e-5 of the largest step of every parameter; the memory as well, of which the gains are the same bits on all
    ranks."""
    ranges, states = divided(SHAPES, size, seed), states_of(SHAPES, 5)
    # A tensor that does not move keeps its gain on ranks, too.
    states = [state | {"one": states[0]["one"]} for state in states]

    def make():
        return SpectralNowcaster(**settings)

    ours, memory, expected, expected_memory = runs_of(make, states, ranges, size, settle_at=(1,))
    for mine, other, last in zip(ours[1:], expected[1:], states[1:], strict=True):
        assert torch.equal(mine.pop("one"), other.pop("one"))
        assert worst(mine, other, last) < 1e-5
    assert memory.keys() == expected_memory.keys()
    for key, tensor in memory.items():
        # Directions are kept in bfloat16, so the last bit may be another one.
        tolerance = 1e-2 if key.startswith("direction") else 1e-5
        torch.testing.assert_close(tensor, expected_memory[key], rtol=tolerance, atol=1e-5)


def test_without_sums_spectral_nowcasts_are_others():
    """Negative control: gains that rows find for themselves are not those of their parameter."""
    ranges, states = divided(SHAPES, 3), states_of(SHAPES, 4)

    def work(shards):
        nowcaster = SpectralNowcaster()
        return [
            nowcaster.nowcast(None, [rows_of(ranges, shards.ranks.rank, state)], shards=shards) for state in states
        ][-1]

    right = put_together(ranges, on_ranks(ranges, 3, work))
    # Sums 0, 1, 3, .. agree on who remembers; 2, 4 and 6 are of products.
    forgetful = put_together(ranges, on_ranks(ranges, 3, work, Meeting(3, frozenset({2, 4, 6}))))
    assert worst(forgetful, right, states[-1]) > 1e-3


def test_every_matrix_is_whitened_by_one_rank(monkeypatch):
    """Of equal matrices each rank whitens its share, whole, and no other."""
    import threading

    shapes = {f"layer.{number}": (6, 8) for number in range(12)} | {"bias": (6,)}
    ranges, states, done = divided(shapes, 4), states_of(shapes, 3), []
    plain = spectral_module.whitened
    monkeypatch.setattr(
        spectral_module,
        "whitened",
        lambda matrix: done.append((threading.current_thread().name, matrix.shape)) or plain(matrix),
    )

    def work(shards):
        nowcaster = SpectralNowcaster()
        return [nowcaster.nowcast(None, [rows_of(ranges, shards.ranks.rank, s)], shards=shards) for s in states]

    on_ranks(ranges, 4, work)
    assert {shape for _, shape in done} == {(6, 8)}
    nowcasts = len(states) - 1
    assert [sum(rank == str(number) for rank, _ in done) for number in range(4)] == [12 // 4 * nowcasts] * 4


@pytest.mark.parametrize("make", [MomentumNowcaster, SpectralNowcaster])
def test_memory_can_be_divided_among_others(make):
    """The memory of two ranks, put together and cut for three, goes on as that of one process does; an empty memory
    does not."""
    states = states_of(SHAPES, 6)
    two, three = divided(SHAPES, 2, 5), divided(SHAPES, 3, 6)
    _, memory, _, _ = runs_of(make, states[:3], two, 2)
    ours, _, expected, _ = runs_of(make, states[3:], three, 3, memory=memory)
    for mine, other, last in zip(ours, expected, states[3:], strict=True):
        assert worst(mine, other, last) < 1e-5
    forgetful, *_ = runs_of(make, states[3:], three, 3)
    assert worst(forgetful[0], expected[0], states[3]) > 1e-3


@pytest.mark.parametrize("make", [MomentumNowcaster, SpectralNowcaster])
def test_ranks_begin_afresh_together(make):
    """If one rank has forgotten, none nowcasts from memory: no rank is left waiting, and no rows move alone."""
    ranges, states = divided(SHAPES, 3), states_of(SHAPES, 4)

    def work(shards):
        nowcaster, rows = make(), [rows_of(ranges, shards.ranks.rank, state) for state in states]
        for state in rows[:2]:
            nowcaster.nowcast(None, [state], shards=shards)
        if shards.ranks.rank == 1:
            nowcaster.load_memory({})
        return [nowcaster.nowcast(None, [state], shards=shards) for state in rows[2:]]

    first, second = (put_together(ranges, parts) for parts in zip(*on_ranks(ranges, 3, work), strict=True))
    assert all(torch.equal(first[name], states[2][name]) for name in SHAPES)
    alone = make()
    alone.settle(states[2])
    assert worst(second, alone.nowcast(None, [states[3]]), states[3]) < 1e-5


def test_ours_work_on_shards_and_others_need_not():
    """A nowcaster that knows nothing of shards is one all the same, and says so."""

    class Foreign(Nowcaster):
        context, period, max_horizon = 1, 10, 1

        def nowcast(self, graph, states, horizon):
            return {name: tensor + 1 for name, tensor in states[-1].items()}

    assert not Foreign.works_on_shards and Foreign().memory_rows("anything") is None
    assert torch.equal(Foreign().nowcast(None, [{"w": torch.zeros(2)}], 1)["w"], torch.ones(2))
    ours = (LinearNowcaster, MomentumNowcaster, SpectralNowcaster, NiNoModel, WNNModel)
    assert all(nowcaster.works_on_shards for nowcaster in ours)


@pytest.mark.parametrize("make", [LinearNowcaster, MomentumNowcaster, SpectralNowcaster])
def test_rows_that_are_not_this_ranks_are_refused(make):
    """Before anything is said to the other ranks, with the parameter's name and both shapes."""
    nowcaster, shards = make(), Shards({"w": (Rows((4, 3), 0, 3), Rows((4, 3), 3, 4))}, Mute(1, 2))

    def nowcast(state):
        nowcaster.nowcast(None, [state] * nowcaster.context, 1, shards=shards)

    with pytest.raises(ValueError, match=r"rows 3 to 4 of 'w' on rank 1, of shape \(1, 3\), got \(4, 3\)"):
        nowcast({"w": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"`shards` must have the ranges of every parameter .* none of 'b'"):
        nowcast({"w": torch.zeros(1, 3), "b": torch.zeros(1)})
    if nowcaster.has_memory:
        with pytest.raises(ValueError, match="of shape"):
            nowcaster.settle({"w": torch.zeros(4, 3)}, shards=shards)


@pytest.mark.parametrize(
    "rows",
    [
        (Rows((4,), 0, 2), Rows((4,), 3, 4)),
        (Rows((4,), 0, 3), Rows((4,), 2, 4)),
        (Rows((4,), 0, 2), Rows((4,), 2, 3)),
        (Rows((4,), 0, 4),),
    ],
    ids=["gap", "overlap", "too few rows", "too few ranks"],
)
def test_ranges_are_the_whole(rows):
    """Rows that nobody has, or several have, would be lost or overwritten; ranges in order are accepted."""
    with pytest.raises(ValueError, match="`ranges` of 'w' must"):
        Shards({"w": rows}, Mute(0, 2))
    Shards({"w": (Rows((4,), 0, 0), Rows((4,), 0, 4))}, Mute(0, 2))
    with pytest.raises(ValueError, match="must be rows of a parameter"):
        Rows((4,), 2, 5)


def test_trajectories_have_steps():
    """What `worst` divides by is never 0 in the hand-made trajectories (a check of the yardstick)."""
    states = trajectory(GRAPHS["conv"](), 2)
    assert worst(states[1], states[1], states[0]) == 0 and worst(states[0], states[1], states[0]) == 1
