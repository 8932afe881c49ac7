"""What meta-training draws, from which trajectories, and what it leaves out."""

import math
import random
from collections import Counter

import pytest
import torch
from meta_helpers import SHAPES, config, lines, ramp, settings, training, waves, write_run

from hf_nino import NeuralGraph
from hf_nino.metatrain.meta_settings import MetaSettings
from hf_nino.metatrain.rounding import blocks_moved_by_rounding
from hf_nino.metatrain.sampling import Sampler, Slice, draw_signs, read_batch
from hf_nino.metatrain.shapes import Shapes
from hf_nino.metatrain.split import split_trajectories, task_of
from hf_nino.metatrain.tasks import recording_task
from hf_nino.nowcaster.scaling import measure_scales

CONTEXT = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of a task and five of another, 9 to 14 snapshots each; every state says which run and snapshot it is."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / f"run-{i}", ramp(i), snapshots=9 + i, interval=10, named="lonely" if i == 0 else "many")
        for i in range(6)
    ]


# -- slices ----------------------------------------------------------------------------------------------------------


def test_a_slice_is_of_one_run_and_its_snapshots_are_equally_far_apart(runs):
    """Past and future of every slice that is drawn are snapshots of the trajectory it was drawn from, in order, a
    stride apart; horizons end where the run does, and behind that the mask is False and the state the last one."""
    sampler = Sampler(runs, CONTEXT, (10, 30), seed=0)
    ends = 0
    for step in range(60):
        trajectory, slices, _ = sampler.draw(step, 0, 2)
        run = runs.index(trajectory)
        batch = read_batch(trajectory, slices, CONTEXT, horizons=4)
        for i, piece in enumerate(slices):
            told = batch.past["head.weight"][i].flatten(1)[:, 0] - 1000 * run
            assert told.tolist() == [piece.start + c * piece.stride for c in range(CONTEXT)]
            last = int(told[-1])
            there = [t for k in range(1, 5) if (t := last + k * piece.stride) < len(trajectory)]
            ends += len(there) < 4
            assert there, "a slice without any horizon teaches nothing"
            assert batch.mask[i].tolist() == [k < len(there) for k in range(batch.mask.shape[1])]
            future = batch.future["head.weight"][i].flatten(1)[:, 0] - 1000 * run
            assert future.tolist() == there + [last] * (batch.mask.shape[1] - len(there))
    assert 10 < ends < 110  # both kinds were seen


def test_tasks_are_drawn_uniformly_and_so_are_places_and_scales_of_intervals(runs):
    """A task with one run is drawn as often as one with five; short intervals as often as long ones, by the logarithm;
    every place of a run."""
    sampler = Sampler(runs, CONTEXT, (10, 30), seed=1)
    draws = [sampler.draw(step, 0, 2) for step in range(600)]
    tasks = Counter(task_of(trajectory) for trajectory, _, _ in draws)
    assert abs(tasks["lonely"] - 300) < 4 * math.sqrt(150)
    members = Counter(t.folder.name for t, _, _ in draws if task_of(t) == "many")
    assert len(members) == 5 and max(members.values()) < 2 * min(members.values())
    roomy = [slices for t, slices, _ in draws if len(t) > 3 * CONTEXT]  # for every stride
    strides = Counter(piece.stride for slices in roomy for piece in slices)
    shares = {stride: (1 / stride) / (1 + 1 / 2 + 1 / 3) for stride in (1, 2, 3)}
    assert strides.keys() == shares.keys()
    assert all(abs(strides[n] / (2 * len(roomy)) - share) < 0.08 for n, share in shares.items())
    starts = {piece.start for t, slices, _ in draws for piece in slices if t is runs[5] and piece.stride == 1}
    assert starts == set(range(14 - CONTEXT))


def test_draws_depend_on_seed_step_and_process_alone(runs):
    """The same again after any other draws, and another for each of seed, step, number and process."""
    sampler = Sampler(runs, CONTEXT, (10, 30), seed=0)

    def drawn(*place, sampler=sampler, process=0):
        trajectory, slices, source = sampler.draw(*place, 8, process)
        return trajectory.folder, tuple(slices), source.random()

    first = drawn(5, 1)
    others = [drawn(5, 0), drawn(6, 1), drawn(5, 1, process=1), drawn(5, 1, sampler=Sampler(runs, 3, (10, 30), 1))]
    assert drawn(5, 1) == first and first not in others


def test_runs_without_room_are_left_out(runs):
    """Of strides 4, only runs with 13 snapshots have room for three of them and a horizon; of 5, none."""
    sampler = Sampler(runs, CONTEXT, (40, 40), seed=0)
    assert [len(one) for one in sampler.trajectories] == [13, 14] and len(sampler.left_out) == 4
    with pytest.raises(ValueError, match="`trajectories` must hold runs with 4 snapshots that are 50 to 50 steps"):
        Sampler(runs, CONTEXT, (50, 50), seed=0)
    with pytest.raises(ValueError, match="`trajectories` must hold runs"):
        Sampler(runs, CONTEXT, (3, 7), seed=0)  # no whole number of snapshots lies between


def test_states_that_are_not_finite_are_no_targets(tmp_path):
    """A NaN in the future masks its horizon, one in the past the whole slice; neither gets into what is computed."""

    def motion(name, shape, t):
        state = torch.full(shape, float(t))
        if name == "head.bias" and t == 5:
            state[2] = math.nan
        return state

    run = write_run(tmp_path / "run", motion)
    batch = read_batch(run, [Slice(0, 1), Slice(4, 1), Slice(6, 1)], CONTEXT, horizons=4)
    assert batch.mask.tolist() == [[True, True, False, True], [False] * 4, [True, True, True, False]]
    tensors = [*batch.past.values(), *batch.future.values(), *batch.mean.values(), *batch.spread.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_scales_are_those_of_a_nowcast(tmp_path):
    """Of the past alone, as nowcasters measure them."""
    run = write_run(tmp_path / "run", waves())
    batch = read_batch(run, [Slice(1, 2)], CONTEXT, horizons=2)
    states = [{name: tensor[0] for name, tensor in run.states(t, t + 1).items()} for t in (1, 3, 5)]
    assert batch.scales == [measure_scales(states)]
    other = measure_scales([*states[:2], {name: tensor + 1 for name, tensor in states[2].items()}])
    assert batch.scales != [other]


def test_signs_are_drawn_for_each_slice_and_column():
    """1 and -1, equally often, and not the same for all slices."""
    signs = draw_signs(random.Random(0), 500, 8)
    assert signs.shape == (500, 1, 8) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean((0, 1)).abs().max() < 0.2 and len(signs.flatten(1).unique(dim=0)) > 200


# -- what is held out ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return [
        write_run(folder / task / f"run-{i}", lines(i), snapshots=4, named=task)
        for task in ("a", "b", "c-kjv", "d-kjv")
        for i in range(3)
    ]


@pytest.mark.parametrize("tasks", [None, (), ("*-kjv",), ("a", "c-kjv")])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_out_is_not_learned_from(many, tasks, seed):
    """Three disjoint parts that are all trajectories; whole tasks in one of them, and of each other task a run."""
    split = split_trajectories(many, share=0.25, tasks=tasks, seed=seed)
    folders = [{one.folder for one in part} for part in (split.train, split.runs, split.tasks)]
    assert sum(map(len, folders)) == len(set.union(*folders)) == len(many)
    known, unknown = {task_of(one) for one in split.train}, {task_of(one) for one in split.tasks}
    expected = {None: 1, (): 0, ("*-kjv",): 2, ("a", "c-kjv"): 2}[tasks]
    assert len(unknown) == expected and not known & unknown
    assert {task_of(one) for one in split.runs} == known and len(split.runs) == len(known)
    again = split_trajectories(many[::-1], share=0.25, tasks=tasks, seed=seed)
    assert [{one.folder for one in part} for part in (again.train, again.runs, again.tasks)] == folders


def test_without_a_share_nothing_is_held_out_and_too_much_is_refused(many):
    split = split_trajectories(many, share=0.0)
    assert len(split.train) == len(many) and not split.runs and not split.tasks
    with pytest.raises(ValueError, match=r"'\*-sotu' fits none of a, b, c-kjv, d-kjv"):
        split_trajectories(many, tasks=("*-sotu",))
    with pytest.raises(ValueError, match="`held_out_tasks` must leave a task"):
        split_trajectories(many, tasks=("*",))
    with pytest.raises(ValueError, match=r"`held_out_share` must be from 0 to below 1, got 1\.5"):
        split_trajectories(many, share=1.5)


# -- model shapes ----------------------------------------------------------------------------------------------------


def test_the_graph_of_a_model_shape_is_built_once(tmp_path):
    """Also for tasks of different names (channels may have leading zeros); but not for another model."""
    shapes = Shapes()
    runs = [write_run(tmp_path / name, lines(), snapshots=4, named=name) for name in ("conv-2-3", "conv-02-3")]
    runs.append(write_run(tmp_path / "c", lines(), snapshots=4, task="conv-2-2"))
    shapes.build(runs, quiet=True)
    assert len(shapes) == 2 and shapes.of(runs[0]) is shapes.of(runs[1])
    assert [shapes.of(runs[i]).graph.num_parameters for i in (0, 2)] == [117, 88]


def test_key_biases_of_gpt2_are_found_to_move_by_rounding_and_nothing_else_is():
    """The middle third of the fused bias; in a Llama, which has no such bias, nothing."""
    found = {}
    for name in ("gpt2-1x16-h2-v320-kjv", "llama-1x16-h2k1-v320-kjv"):
        model = recording_task(name).build_model(None)
        graph = NeuralGraph.from_model(model, verify=False)
        blocks = [graph.trainable_blocks[number] for number in blocks_moved_by_rounding(model, graph)]
        found[name[:5]] = [(b.parameter, b.offset, b.shape) for b in blocks]
    assert found == {"gpt2-": [("transformer.h.0.attn.c_attn.bias", 16, (1, 16, 1))], "llama": []}


def test_a_convolution_network_has_nothing_that_moves_by_rounding(tmp_path):
    assert not SHAPES.of(write_run(tmp_path / "run", lines(), snapshots=4)).rounding


# -- settings --------------------------------------------------------------------------------------------------------


def test_settings_survive_json_and_refuse_nonsense():
    recipe = MetaSettings(interval_range=(10, 40), held_out_tasks=("*-kjv",))
    assert MetaSettings.from_dict(recipe.to_dict()) == recipe != MetaSettings()
    for wrong, message in {
        "steps": "`steps` must be at least 1, got 0",
        "learning_rate": "`learning_rate` must be above 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            MetaSettings(**{wrong: 0})
    with pytest.raises(ValueError, match="`interval_range` must be two numbers of steps, the lower one first"):
        MetaSettings(interval_range=(40, 10))
    with pytest.raises(ValueError, match="have no 'horizon'"):
        MetaSettings.from_dict({"horizon": 3})


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    recipe = MetaSettings(steps=100, warmup_steps=10, learning_rate=2.0)
    assert [recipe.rate(step) for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 1, 2, 1, 0])


def test_intervals_are_those_of_the_nowcaster_unless_given():
    assert MetaSettings().intervals(50) == (25, 100)
    assert MetaSettings(interval_range=(10, 20)).intervals(50) == (10, 20)


def test_examples_have_signs_only_where_asked_and_of_use(tmp_path):
    run = write_run(tmp_path / "run", waves())
    signs = {
        (kind, flips): training([run], config(nowcaster_type=kind), settings(sign_flips=flips)).example(0, 0)[2]
        for kind, flips in (("nino", True), ("nino", False), ("wnn", True))
    }
    assert signs["nino", True].shape == (2, 1, 4) and signs["nino", False] is None and signs["wnn", True] is None
