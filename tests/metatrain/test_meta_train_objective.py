"""What meta-training minimises, and how held-out errors are measured: compared with the plain definitions."""

import math
import random

import pytest
import torch
from meta_helpers import SHAPES, config, lines, settings, training, waves, write_run
from torch_geometric.data import Data

from hf_nino.metatrain import objective as objective_module
from hf_nino.metatrain.held_out import FACTORS, evaluation_slices, measure, summarise
from hf_nino.metatrain.meta_report import draw_evaluation, evaluation_table
from hf_nino.metatrain.meta_training import start_network
from hf_nino.metatrain.objective import Objective, as_edges, scaled_deltas
from hf_nino.metatrain.sampling import Slice, draw_signs, read_batch
from hf_nino.metatrain.shapes import ModelShape
from hf_nino.nowcaster.scaling import EPSILON, measure_scales

CONTEXT, HORIZONS = 3, 4
SLICES = [Slice(0, 1), Slice(3, 2), Slice(7, 1)]  # of 12 snapshots: 4, 2 and 2 horizons
KINDS = ["nino", "wnn"]


def still_at_first(name, shape, t):
    """Waves, but for a bias that stays where it is until snapshot 6."""
    return waves()(name, shape, max(t, 6) if name == "head.bias" else t)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("objective") / "run", still_at_first)


def network_of(kind, scale=20.0):
    """A nowcaster whose predictions are of the size of what is to be predicted."""
    network = start_network(config(nowcaster_type=kind), None, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1)
    return network


def reference(network, run, skip, signs):
    """The loss of :data:`SLICES` as its definition says: explicit graphs, one slice, horizon and element at a time."""
    shape, losses = SHAPES.of(run), []
    for number, piece in enumerate(SLICES):

        def state(t):
            return {name: tensor[0] for name, tensor in run.states(t, t + 1).items()}

        past = [state(piece.start + c * piece.stride) for c in range(CONTEXT)]
        scales = measure_scales(past)
        scaled = [{name: scales[name].apply(tensor) for name, tensor in one.items()} for one in past]
        data = shape.graph.to_pyg(scaled, features=9, pos=4)
        if signs is not None:
            data.pos = data.pos * signs[number]
        predicted = network(Data(**{key: data[key] for key in ("edge_index", "edge_type", "edge_attr", "pos")}))
        errors = []
        for k in range(1, HORIZONS + 1):
            t = piece.start + (CONTEXT - 1 + k) * piece.stride
            if t >= len(run):
                continue
            edge, future = 0, state(t)
            for i, block in enumerate(shape.graph.trainable_blocks):
                name, edges = block.parameter, block.edges
                delta = predicted[edge : edge + edges, : block.shape[2], k - 1]
                edge += edges
                if i in skip or torch.equal(past[0][name], past[-1][name]):
                    continue
                move = (block.view(future[name]) - block.view(past[-1][name])) / (scales[name].std + EPSILON)
                errors.append((delta - move.reshape(edges, -1)).abs().flatten())
        losses.append(torch.cat(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("kind", "flips"), [("nino", False), ("nino", True), ("wnn", False)])
def test_the_loss_is_its_definition(run, kind, flips):
    """L1 on scaled moves, mean over elements and those horizons that there are, then over slices; without a parameter
    that has not moved and blocks that are to be skipped; with signs of the encoding of each slice's own."""
    network, signs = network_of(kind), draw_signs(random.Random(3), 3, 4) if flips else None
    batch = read_batch(run, SLICES, CONTEXT, HORIZONS)
    assert batch.mask.sum(1).tolist() == [4, 2, 2] and batch.moves["head.bias"].tolist() == [False, True, True]
    shape = SHAPES.of(run)
    some = ModelShape(shape.graph, frozenset({1, 2}))
    for masks, skip in ((True, {1, 2}), (False, set())):
        losses = Objective(network, mask_rounding=masks)(some, batch, signs)
        torch.testing.assert_close(losses.loss, reference(network, run, skip, signs), rtol=1e-4, atol=1e-6)
        assert (losses.loss - losses.persistence).abs() > 0.01 * losses.persistence > 0  # predictions do matter
    if flips:
        assert (losses.loss - Objective(network, False)(some, batch).loss).abs() > 1e-3 * losses.loss


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_what_is_kept(run, kind, monkeypatch):
    """Computed again in the backward pass, or kept: the same gradients, for every weight."""
    batch, gradients = read_batch(run, SLICES, CONTEXT, HORIZONS), []
    for kept in (0, 1 << 40):
        monkeypatch.setattr(objective_module, "KEPT_BYTES", kept)
        network = network_of(kind)
        Objective(network)(SHAPES.of(run), batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().sum() > 0, name


def test_states_are_seen_along_edges_as_blocks_see_them(run):
    """[S, K, *shape] -> [S, J, I, F, K] is the block's own view of each state."""
    states = read_batch(run, SLICES, CONTEXT, HORIZONS).future
    for block in SHAPES.of(run).graph.trainable_blocks:
        edges = as_edges(block, states[block.parameter])
        for i in range(len(SLICES)):
            for k in range(HORIZONS):
                assert torch.equal(edges[i, ..., k], block.view(states[block.parameter][i, k]))


# -- learning --------------------------------------------------------------------------------------------------------


def learned(run, shuffled):
    """Held-out errors after 60 steps on one run; ``shuffled``: the moves to be predicted are other elements'."""
    recipe = settings(steps=60, batch_size=1, slices=4, learning_rate=1e-2, interval_range=(1, 1))
    sizes = {"nowcaster_type": "wnn", "hidden_size": 32, "context": 5, "period": 5}
    meta = training([run], config(**sizes), recipe)
    if shuffled:
        example = meta.example

        def other_elements(step, number):
            shape, batch, signs = example(step, number)
            generator = torch.Generator().manual_seed(step)
            for name, tensor in batch.future.items():
                last = batch.past[name][:, -1:]
                moves = (tensor - last).flatten(2)
                order = torch.randperm(moves.shape[2], generator=generator)
                tensor.copy_(last + moves[:, :, order].view_as(tensor))
            return shape, batch, signs

        meta.example = other_elements
    for _ in meta.run(60):
        pass
    return summarise(measure(meta.network, [run], SHAPES, 1))["error"]["ALL"]["mean"]


def test_a_nowcaster_learns_what_no_straight_line_follows(tmp_path):
    """On a run in which every element swings, the error falls to less than half of that of the best straight line;
    with the moves to be predicted shuffled among the elements of a parameter, it stays above 0.8 of it (a bias with
    two elements is not shuffled by much)."""
    run = write_run(tmp_path / "run", waves(), snapshots=60)
    mean = learned(run, shuffled=False)
    assert mean["nowcaster"] < 0.5 * mean["linear"] and mean["linear"] <= mean["persistence"]
    control = learned(run, shuffled=True)
    assert control["nowcaster"] > 0.8 * control["linear"]


def test_the_graph_network_learns_too(tmp_path):
    """Its error falls below that of the best straight line within 50 steps."""
    run = write_run(tmp_path / "run", waves(), snapshots=60)
    recipe = settings(steps=50, batch_size=1, slices=4, learning_rate=1e-2, interval_range=(1, 1))
    meta = training([run], config(hidden_size=16, context=5, period=5), recipe)
    errors = []
    for step in meta.run(50):
        if step in (1, 50):
            errors.append(summarise(measure(meta.network, [run], SHAPES, 1))["error"]["ALL"]["mean"])
    before, after = errors
    assert after["nowcaster"] < 0.8 * after["linear"] and before["nowcaster"] > 0.95 * before["linear"]


# -- held-out errors -------------------------------------------------------------------------------------------------


def test_errors_on_straight_lines_are_zero_for_a_straight_line(tmp_path):
    """Its best factor is 1 at every horizon; standing still is off by the whole move, and so is a nowcaster that
    predicts no move.  Horizons that no slice has are told as such."""
    run = write_run(tmp_path / "run", lines(), interval=10)
    network = start_network(config(), None, 0)
    with torch.no_grad():
        network.edge_out.weight.zero_()
    found = summarise(measure(network, [run], SHAPES, 20, slices=3))  # of 12 snapshots: 3, 2 and 1 horizons
    table = found["error"]["ALL"]
    assert found["slices"] == 3 and found["error"]["factors"] == [1.0, 1.0, 1.0, None]
    assert found["error"]["one_factor"] == 1.0 and table["nowcaster"][3] is None
    assert all(value < 1e-4 for value in table["linear"][:3])
    assert table["nowcaster"][:3] == pytest.approx(table["persistence"][:3]) and table["persistence"][0] > 0.05
    assert found["relative"]["ALL"]["nowcaster"][:3] == pytest.approx([1.0] * 3)
    assert {"CONVOLUTION", "LINEAR", "OTHER"} <= found["error"].keys() and "QUERY" not in found["error"]
    assert found["better_than_linear"] == 0


def test_errors_are_means_over_elements_slices_and_tasks(run, tmp_path):
    """Against a plain loop: each horizon and type of edge; slices count the same in a task, and tasks the same."""
    other = write_run(tmp_path / "other", waves(seed=1, period=5.0), snapshots=9, named="conv-02-3")
    network, per_task = network_of("nino"), {}
    for one in (run, other):
        slices = evaluation_slices(one, CONTEXT, 1, 3)
        batch = read_batch(one, slices, CONTEXT, HORIZONS)
        sums = {name: torch.zeros(len(slices), HORIZONS) for name in ("ALL", "LINEAR")}
        still, line, counts = torch.zeros(len(slices), HORIZONS), torch.zeros(len(slices), HORIZONS), {}
        for _, block, delta in scaled_deltas(network, SHAPES.of(one), batch):
            for i in range(len(slices)):
                past, future = (table[block.parameter][i] for table in (batch.past, batch.future))
                if torch.equal(past[0], past[-1]):
                    continue
                for name in {"ALL", block.edge_type.name} & sums.keys():
                    counts[name, i] = counts.get((name, i), 0) + math.prod(block.shape)
                for k in range(batch.mask.shape[1]):
                    spread = batch.scales[i][block.parameter].std + EPSILON
                    move = block.view(future[k] - past[-1]) / spread
                    slope = block.view(past[-1] - past[0]) / spread / (CONTEXT - 1)
                    for name in {"ALL", block.edge_type.name} & sums.keys():
                        sums[name][i, k] += (delta[i, ..., k] - move).abs().sum()
                    still[i, k] += move.abs().sum()
                    line[i, k] += (0.3 * (k + 1) * slope - move).abs().sum()
        for name, total in (*sums.items(), ("still", still), ("line", line)):
            row = []
            for k in range(HORIZONS):
                kind = name if name in sums else "ALL"
                of_slices = [total[i, k] / counts[kind, i] for i in range(len(slices)) if batch.mask[i, k]]
                row.append(sum(of_slices) / len(of_slices))
            per_task.setdefault(name, []).append(torch.stack(row))
    expected = {name: torch.stack(rows).mean(0) for name, rows in per_task.items()}
    with torch.no_grad():
        found = summarise(measure(network, [run, other], SHAPES, 1, slices=3))
    for name in ("ALL", "LINEAR"):
        torch.testing.assert_close(torch.tensor(found["error"][name]["nowcaster"]), expected[name], rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(found["error"]["ALL"]["persistence"]), expected["still"])
    best = torch.tensor(found["error"]["ALL"]["linear"])
    assert (best <= expected["line"] + 1e-6).all() and set(found["error"]["factors"]) <= set(FACTORS)
    assert found["slices"] == 6 and len(found["tasks"]) == 2


def test_slices_of_an_evaluation_are_spread_over_the_run(run):
    assert [piece.start for piece in evaluation_slices(run, CONTEXT, 1, 3)] == [0, 4, 8]
    assert [piece.start for piece in evaluation_slices(run, CONTEXT, 3, 9)] == [0, 1, 2]
    assert {piece.stride for piece in evaluation_slices(run, CONTEXT, 3, 9)} == {3}
    assert evaluation_slices(run, CONTEXT, 5, 9) == []


def test_the_report_has_a_table_and_a_picture_of_what_was_measured(run, tmp_path):
    """Numbers of the table are those of the JSON; a part without trajectories is left out."""
    part = summarise(measure(network_of("nino"), [run], SHAPES, 1, slices=3))
    found = {"interval": 1, "slices_per_trajectory": 3, "runs": part, "tasks": summarise([])}
    table = evaluation_table(found)
    assert "Further runs" in table and "Other tasks" not in table
    mean = part["error"]["ALL"]["mean"]
    row = next(line for line in table.splitlines() if line.startswith("| nowcaster |"))
    assert row.split("|")[-2].strip() == f"{mean['nowcaster']:.4f}"
    assert "| convolution |" in table
    draw_evaluation(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
