"""What is said about many ranks on paper is what a few real ones do; and 70 billion parameters have a plan."""

import json
import math
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launching import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_nino.bench.engine.models import Shape
from hf_nino.bench.scaling import (
    LLAMA_70B,
    Machine,
    OnPaper,
    cost_of,
    fully_sharded,
    graphs,
    plan,
    replicated,
    table,
    usual_nowcasters,
)
from hf_nino.bench.scaling_measured import Counted, measure, measured
from hf_nino.bench.scaling_report import measured_markdown, paper_markdown
from hf_nino.commands.scaling import bench_scaling
from hf_nino.graph import EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Nodes
from hf_nino.graph.build import build_graph
from hf_nino.nowcaster import NiNoModel, NowcasterConfig, Shards
from hf_nino.nowcaster.portion import portion_of
from hf_nino.nowcaster.whitening import whitening_operations
from hf_nino.training.blueprint import graph_of
from hf_nino.training.ranks import ProcessGroupRanks
from hf_nino.training.stores import make_store

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 67}
SMALL = Shape("llama-small", "llama", SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2})
COUNTS = ("own_parameters", "history_bytes", "carried_bytes", "summed_bytes", "exchanged_bytes", "collectives")


def nowcasters():
    found = usual_nowcasters()
    return found | {"network": NiNoModel(NowcasterConfig(hidden_size=8, context=3))}


def _measures(rank, backend):
    return {name: measured(nowcaster, SMALL, backend) for name, nowcaster in nowcasters().items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "backend"),
    [
        (1, "fsdp2"),
        (2, "fsdp2"),
        (2, "ddp"),
        pytest.param(4, "fsdp2", marks=pytest.mark.slow),
        pytest.param(4, "ddp", marks=pytest.mark.slow),
    ],
)
def test_bytes_on_paper_are_those_of_real_processes(tmp_path, size, backend):
    """For every rank and nowcaster: what it keeps, what it puts into sums and sends to others, in how many calls; and
    for other numbers of ranks other numbers (the control)."""
    found = launch(_measures, size, tmp_path, backend)
    graph = build_graph(SMALL.model("meta"), verify=False)
    shapes = {name: graph.shapes[name] for name in graph.parameter_names}
    layouts = (fully_sharded if backend == "fsdp2" else replicated)(shapes, size)
    others = fully_sharded(shapes, size + 1)
    for rank, ranks_own in enumerate(found):
        for name, nowcaster in nowcasters().items():
            cost = cost_of(nowcaster, graph, layouts, rank)
            assert {key: getattr(cost, key) for key in COUNTS} == {key: ranks_own[name][key] for key in COUNTS}, name
            assert cost_of(nowcaster, graph, others, rank).history_bytes != ranks_own[name]["history_bytes"]


def taps_graph():
    """A matrix whose rows are the taps of edges: no rank has all of an edge, so that parameters need owners."""
    groups = NeuronGroup("source", 4), NeuronGroup("target", 6)
    ends = Nodes.all(0, 4), Nodes.all(1, 6)
    taps = {"feature_sizes": (3,), "feature_strides": (24,)}
    names = ("flat", "other", "third")
    blocks = (
        EdgeBlock(name, EdgeType.LINEAR, *ends, source_strides=(6,), target_strides=(1,), **taps) for name in names
    )
    return NeuralGraph(groups, tuple(blocks), (), (), dict.fromkeys(names, (12, 6)))


def _moves(rank):
    graph = taps_graph()
    layouts = fully_sharded(graph.shapes, dist.get_world_size())
    shards = Shards({name: layout.rows for name, layout in layouts.items()}, ProcessGroupRanks())
    network = nowcasters()["network"]
    generator = torch.Generator().manual_seed(rank)
    states = [
        {name: torch.randn(shards.local(name).local_shape, generator=generator) for name in layouts} for _ in range(3)
    ]
    with Counted(shards.ranks) as counted:
        network.nowcast(graph, states, 1, shards=shards)
    return counted.summed_bytes, counted.exchanged_bytes, counted.collectives


@pytest.mark.distributed
def test_bytes_of_parameters_with_owners_are_counted(tmp_path):
    """Whole parameters that travel to their owners and back, in two rounds; the second leaves one rank out."""
    graph = taps_graph()
    for rank, found in enumerate(launch(_moves, 2, tmp_path)):
        cost = cost_of(nowcasters()["network"], graph, fully_sharded(graph.shapes, 2), rank)
        assert (cost.summed_bytes, cost.exchanged_bytes, cost.collectives) == found
        assert found[1] > 0


@pytest.mark.parametrize("name", ["linear", "spectral", "network"])
def test_more_ranks_keep_and_work_less(name):
    """History and memory fall as the number of ranks grows, all together stay what they were, work never grows; what
    leaves a rank in sums is at most twice what it puts in.  A nowcaster without sums sends nothing."""
    graph = build_graph(SMALL.model("meta"), verify=False)
    shapes = {key: graph.shapes[key] for key in graph.parameter_names}
    nowcaster = nowcasters()[name]
    costs = {size: cost_of(nowcaster, graph, fully_sharded(shapes, size)) for size in (1, 2, 4, 8)}
    for before, after in pairwise(costs.values()):
        assert after.history_bytes < before.history_bytes
        assert after.operations <= before.operations
    for size, cost in costs.items():
        each = [cost_of(nowcaster, graph, fully_sharded(shapes, size), rank) for rank in range(size)]
        assert sum(part.history_bytes for part in each) == costs[1].history_bytes
        assert all(part.own_parameters <= cost.own_parameters for part in each)
        assert (cost.sent_bytes == 0) == (size == 1 or name == "linear")
        assert cost.sent_bytes <= 2 * cost.summed_bytes + cost.exchanged_bytes
        # Slower in every respect is slower.
        assert (
            cost.seconds(Machine(1e9, 1e9, 1e9, 1e9, 1e9, 1e-3))
            > cost.seconds(Machine(1e12, 1e12, 1e12, 1e12, 1e12, 1e-6))
            > 0
        )


def test_large_matrices_are_counted_in_bfloat16():
    """A matrix of 256 by 300 beside one of 256 by 4096 and one of 16 by 300: each in the dtype of its products, all of
    one rank's, the costliest of each kind where every matrix has a rank of its own; a network has none of them."""
    shapes = {"large": (256, 300), "long": (4096, 256), "small": (16, 300)}
    graph = SimpleNamespace(shapes=shapes, parameter_names=list(shapes))
    operations = {name: whitening_operations(shape) for name, shape in shapes.items()}
    half = whitening_operations(shapes["large"], torch.bfloat16)
    for size, whole in ((1, operations["long"] + operations["small"]), (4, operations["long"])):
        cost = cost_of(nowcasters()["spectral"], graph, fully_sharded(shapes, size))
        assert (cost.operations, cost.half_operations) == (whole, half)
        slow = cost.seconds(Machine(half_flops=1.0))
        assert slow == pytest.approx(half, rel=0.01) and cost.seconds(Machine()) < 1 < slow
    assert cost_of(nowcasters()["linear"], graph, fully_sharded(shapes, 1)).half_operations == 0


def test_ranks_on_paper_are_silent():
    """A plan that would need an answer fails, instead of going on with numbers of one rank."""
    with pytest.raises(RuntimeError, match="on paper"):
        OnPaper(0, 2).sum_([torch.ones(1)])


@contextmanager
def nobody_else(world_size, rank, shapes):
    """A process group of one rank that is alone; what the others would say of their spans is what FSDP2 gives them."""
    spans = [layout.held for layout in fully_sharded(shapes, world_size).values()]
    said = list(torch.tensor(spans).unbind(1))

    def gather(self, numbers):
        return said if numbers.shape == said[0].shape else [numbers] * world_size

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessGroupRanks, "gather", gather)
        try:
            yield said[rank]
        finally:
            dist.destroy_process_group()


def check_plan(layers, world_size):
    """Plan the part of one rank of a Llama with the widths of 70B, sharded as accelerate does; its parameters."""
    rank, model = world_size // 2, Shape("llama", "llama", LLAMA_70B | {"num_hidden_layers": layers}).model("meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with nobody_else(world_size, rank, shapes):
        assert dist.get_world_size() == world_size
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        store = make_store(model)
        graph, shards, rows = graph_of(store), store.shards(), store.live()
        store.write(rows)
        # The rows of a rank are what FSDP2 gives it, parameter by parameter: nothing is read or written elsewhere.
        for name, parameter in model.named_parameters():
            assert rows[name].shape == parameter.to_local().shape == shards.local(name).local_shape
    layouts = fully_sharded({name: graph.shapes[name] for name in graph.parameter_names}, world_size)
    planned = plan(layouts, rank)
    assert all(planned.local(name) == shards.local(name) for name in layouts)
    assert all(layout.holds_own and layout.owns_held for layout in layouts.values())
    # Every element of the rank's rows lies on one edge of its portion, and its views fit the rows.
    portion = portion_of(graph, shards)
    assert not portion.moved
    elements = dict.fromkeys(layouts, 0)
    for block in portion.blocks:
        elements[block.parameter] += math.prod(block.shape)
        assert block.view(rows[block.parameter]).shape == block.shape
    assert elements == {name: shards.local(name).numel for name in layouts}
    for name, nowcaster in usual_nowcasters().items():
        cost = cost_of(nowcaster, graph, layouts, rank)
        total = cost.parameters
        assert total == sum(math.prod(graph.shapes[each]) for each in layouts)
        assert cost.own_parameters == pytest.approx(total / world_size, rel=0.01)
        assert cost.history_bytes == cost.own_parameters * 4 * nowcaster.context
        # What a rank needs does not grow with the model's parameters, but for one matrix or the nodes.
        matrix, nodes = max(math.prod(layout.shape) for layout in layouts.values()), graph.num_nodes * 128
        assert cost.working_bytes < 5 * cost.own_parameters + 4 * (4 * matrix + 8 * nodes) + 2**30, name
    return total


def test_a_model_as_wide_as_70b_has_a_plan_for_64_ranks():
    """With meta tensors and a fake process group: graph, layout, rows, portion and memory of a rank, 2 layers."""
    assert check_plan(2, 64) > 3e9


@pytest.mark.slow
def test_all_of_70b_has_a_plan_for_64_ranks():
    """The same with all 80 layers."""
    assert 70e9 < check_plan(80, 64) < 71e9


@pytest.mark.slow
def test_the_page_has_the_tables_of_these_formulas():
    """docs/scaling.md holds what the code makes, models of 1, 8 and 71 billion parameters; another number differs."""
    models = graphs()
    sizes = [sum(math.prod(graph.shapes[name]) for name in graph.parameter_names) for graph in models.values()]
    assert [round(size / 1e9) for size in sizes] == [1, 8, 71]
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
    made = paper_markdown(table(models, usual_nowcasters()))
    assert made in page
    assert made.replace("GiB", "MiB") not in page


def test_measured_numbers_that_differ_from_paper_are_named():
    """The report of a measurement says for every line whether the counts are those on paper."""
    counts = {"history_bytes": 8, "summed_bytes": 4, "exchanged_bytes": 0, "collectives": 1}
    row = {"nowcaster": "linear", "ranks": 2, "seconds": 0.5, "share": 0.6, **counts}
    assert "| as on paper |" in measured_markdown([row | {"on_paper": counts}])
    assert "| summed_bytes |" in measured_markdown([row | {"on_paper": counts | {"summed_bytes": 5}}])


def test_the_command_says_tables_or_json(monkeypatch):
    """``bench_scaling`` says the tables of all nowcasters, or the same numbers as JSON."""
    small = {"small": build_graph(SMALL.model("meta"), verify=False)}
    monkeypatch.setattr("hf_nino.commands.scaling.graphs", lambda: small)
    said = []
    bench_scaling(said.append)
    bench_scaling(said.append, as_json=True)
    assert said[0] == paper_markdown(table(small, usual_nowcasters())).rstrip()
    assert [line for line in said[0].splitlines() if line.startswith("#")] == [
        "### linear",
        "### spectral",
        "### network",
    ]
    assert json.loads(said[1]) == table(small, usual_nowcasters())


@pytest.mark.slow
@pytest.mark.distributed
def test_the_measurement_agrees_with_paper():
    """What ``hf-nino bench scaling --measured`` does: new processes, and counts as on paper."""
    rows = measure(SMALL, (1, 2))
    assert [(row["nowcaster"], row["ranks"]) for row in rows] == [
        (name, size) for name in ("linear", "spectral", "network") for size in (1, 2)
    ]
    for row in rows:
        assert row["on_paper"].items() <= row.items()
        assert row["share"] == 1 or row["ranks"] == 2
