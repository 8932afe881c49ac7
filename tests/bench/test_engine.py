"""The engine benchmark: what it leaves, that it goes on where it stopped, and that it compares the same functions."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_nino import NeuralGraph, cli, convert_original
from hf_nino.bench.engine import benchmark, measure, worker
from hf_nino.bench.engine.benchmark import RESULTS, Settings, plan, run_engine_benchmark
from hf_nino.bench.engine.models import SHAPES, Shape, trajectory
from hf_nino.bench.engine.report import Row, as_dict, exponent, floors, rows, verdicts
from hf_nino.bench.engine.wiring import Wiring
from hf_nino.commands.bench import bench_engine, count

CPU = torch.device("cpu")


def tiny(width):
    settings = {"n_layer": 1, "n_embd": width, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    return Shape(f"tiny-{width}", "gpt2", settings)


TINY = tuple(tiny(width) for width in (8, 12, 16))


@pytest.fixture(scope="module")
def in_process():
    """Measurements that need no process of their own, and take no time; the keys of those that were done."""
    done = []

    def perform(kind, arguments, threads, *, paths=()):
        done.append(kind)
        return worker.perform(kind, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "measure", perform)
        patch.setattr(measure, "RATE_SECONDS", 0.0)
        patch.setattr(measure, "COPIED_BYTES", 1 << 16)
        patch.setattr(measure, "MOST_NOWCASTS", 2)
        yield done


@pytest.fixture(scope="module")
def finished(in_process, tmp_path_factory):
    """A folder with a whole benchmark of tiny models, and what was printed."""
    folder, said = tmp_path_factory.mktemp("bench"), []
    bench_engine(folder, said.append, device="cpu", threads=1, repeats=2, shapes=TINY)
    return folder, said


def settings(**kwargs):
    return Settings.of(**{"device": "cpu", "threads": 1, "repeats": 2, "shapes": TINY} | kwargs)


def test_it_leaves_a_table_a_picture_and_all_its_numbers(finished):
    """One row for every model and mode, in Markdown and in JSON; the picture is a PNG; time is told beforehand."""
    folder, said = finished
    numbers = json.loads((folder / RESULTS).read_text())
    assert len(numbers["done"]) == len(list(plan(settings()))) == 2 + 2 * 2 * 3 + 3
    report = (folder / "report.md").read_text()
    for shape in TINY:
        for mode in benchmark.MODES:
            assert report.count(f"| {shape.name} | {shape.parameters():,} | in host memory | {mode} |") == 1
    assert "at least 12 times as fast as the original on gpt2-3.4M |  | not measured |" in report
    assert (folder / "engine.png").read_bytes().startswith(b"\x89PNG")
    assert "16 measurements, about" in said[0] and said[-1] == report


def test_floors_and_rows_are_numbers_that_make_sense(finished):
    """Floors are positive, every row has some time and memory, work grows with the model, and `fast` has an error."""
    results = run_engine_benchmark(settings(), finished[0], lambda text: None)
    assert all(value > 0 for value in floors(results).values())
    table = rows(results)
    assert [row.parameters for row in table] == sorted(row.parameters for row in table)
    for row in table:
        assert row.busy > 0 and row.rate > 0 and row.matrix_floor > 0 and row.bandwidth_floor > 0
        assert (row.error is None) == (row.mode == "float32")
    work = [row.matrix_floor for row in table if row.mode == "float32"]
    assert work == sorted(set(work))
    assert len(json.loads(json.dumps(as_dict(results)))["rows"]) == len(table) == 6


def test_it_goes_on_where_it_stopped(in_process, finished, tmp_path):
    """What is done is not done again; what is missing is, and nothing else (the control)."""
    source = json.loads((finished[0] / RESULTS).read_text())
    (tmp_path / RESULTS).write_text(json.dumps(source))
    before = len(in_process)
    again = run_engine_benchmark(settings(), tmp_path, lambda text: None)
    assert again["done"] == source["done"] and len(in_process) == before
    del source["done"]["fast_error/tiny-12"]
    (tmp_path / RESULTS).write_text(json.dumps(source))
    run_engine_benchmark(settings(), tmp_path, lambda text: None)
    assert in_process[before:] == ["fast_error"]
    run_engine_benchmark(settings(repeats=3, max_parameters=TINY[0].parameters()), tmp_path, lambda text: None)
    assert in_process[before + 1 :] == ["floors", "nowcasts", "nowcasts"]


def test_a_measurement_that_fails_is_reported_and_tried_again(in_process, tmp_path, monkeypatch):
    """The others are done all the same."""

    def broken(kind, arguments, threads, *, paths=()):
        if kind == "nowcasts" and arguments["mode"] == "fast":
            raise ChildProcessError("no memory")
        return worker.perform(kind, arguments)

    small = settings(repeats=1, shapes=TINY[:1])
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "measure", broken)
        results = run_engine_benchmark(small, tmp_path, lambda text: None)
    assert list(results["failed"].values()) == ["no memory"] and len(rows(results)) == 1
    results = run_engine_benchmark(small, tmp_path, lambda text: None)
    assert results["failed"] == {} and len(rows(results)) == 2


def test_results_of_other_settings_are_refused(finished, tmp_path):
    """Times are compared within one run only; a file of something else is not overwritten."""
    with pytest.raises(ValueError, match=r"`out` .* holds results with another threads, .* choose another folder"):
        run_engine_benchmark(settings(threads=2), finished[0], lambda text: None)
    (tmp_path / RESULTS).write_text("[]")
    with pytest.raises(ValueError, match="no result of this benchmark"):
        run_engine_benchmark(settings(), tmp_path, lambda text: None)


def test_a_measurement_runs_in_a_process_of_its_own():
    """With its own threads and memory; what goes wrong there is one line."""
    arguments = {"mode": "fast", "place": "host", "dtype": "float32", "device": "cpu", "nowcaster": None}
    found = worker.measure("nowcasts", {"shape": TINY[0].to_dict(), "horizon": 1, **arguments}, 1)
    assert found["parameters"] == TINY[0].parameters() and found["extra_bytes"] >= 0
    assert all(wall > 0 for wall, _ in found["seconds"])


def test_a_checkout_that_cannot_run_is_one_line(tmp_path, monkeypatch):
    """A package that the original release's code needs and that is missing is named before anything is measured."""
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "__init__.py").write_text("from .nino import NiNo")
    (tmp_path / "optim" / "nino.py").write_text("import a_package_that_is_missing")
    monkeypatch.setattr(benchmark, "measure", worker.measure)
    with pytest.raises(ValueError, match=r"cannot be imported .*a_package_that_is_missing.*PYTHONPATH"):
        benchmark._check_original(tmp_path)


def test_peak_memory_is_what_the_work_needs():
    """128 MiB that are used are seen; those of before are not, and neither is what is only reserved (the controls)."""
    size = 1 << 27

    def use():
        return float(torch.ones(size // 4).sum())

    use()
    assert 0.99 * size < measure.PeakMemory(CPU).of(use)[1] < 1.5 * size
    assert measure.PeakMemory(CPU).of(lambda: torch.empty(size // 4).numel())[1] < size / 4


def test_trajectories_are_the_same_every_time_and_move():
    """Two processes see the same states without handing them over; snapshots differ."""
    shapes = {"weight": (3, 4), "norm.weight": (4,)}
    first, second = (
        [
            {name: tensor.clone() for name, tensor in state.items()}
            for state in trajectory(shapes, 3, CPU, torch.float32)
        ]
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in shapes)
    moves = [(first[i + 1]["weight"] - first[i]["weight"]) for i in range(2)]
    assert not torch.equal(*moves) and float(torch.cosine_similarity(*map(torch.flatten, moves), dim=0)) > 0


def test_the_shapes_are_as_large_as_they_are_called():
    """Within 10 percent, from small to large."""
    sizes = [shape.parameters() for shape in SHAPES]
    assert sizes == sorted(sizes)
    for shape, size in zip(SHAPES, sizes, strict=True):
        named = float(shape.name.split("-")[1][:-1]) * {"M": 1e6, "B": 1e9}[shape.name[-1]]
        assert abs(size / named - 1) < (0.25 if named == 1e9 else 0.1)


@pytest.fixture(scope="module")
def golden(shared):
    """The release's explicit graph of a small GPT-2, its states and predictions, and our graph of the same model."""
    tensors = load_file(shared / "upstream" / "gpt2_tiny.safetensors")
    config = GPT2Config(n_layer=2, n_embd=24, n_head=3, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    owner = tensors["edge_parameter"][:, 0].long()
    ends = torch.empty(2, len(tensors["states"]), dtype=torch.int64)
    ends[:, owner[owner >= 0]] = tensors["edge_index"][:, owner >= 0].long()
    rest = (owner < 0) & (tensors["edge_type"] != 13)
    constants = torch.cat([tensors["edge_index"][:, rest], tensors["edge_type"][None, rest]]).long()
    return NeuralGraph.from_model(model), dict(model.named_parameters()), ends, constants, tensors


def test_wired_like_the_original_the_engine_predicts_what_the_original_does(golden, shared):
    """To 1e-5 of the step; on our own graph, where key biases hang on keys, it does not (the control)."""
    graph, parameters, ends, constants, tensors = golden
    wiring = Wiring(graph, list(parameters), ends, constants)
    assert wiring.rewired_edges == 2 * 24
    network = convert_original(shared / "upstream" / "nino_no_posw.pt")

    def split(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}

    states, expected = [split(column) for column in tensors["states"].T], split(tensors["nino_no_posw.k40"])
    pos = tensors["laplacian_pe"][wiring.theirs]
    error = {
        name: measure.relative_difference(network.nowcast(on, states, 40, pos=pos), expected, states[-1])
        for name, on in (("same", wiring.graph()), ("own", graph))
    }
    assert error["same"] < 1e-5 and error["own"] > 1e-3


def test_graphs_that_differ_in_more_are_refused(golden):
    """An edge that hangs elsewhere alone, a head edge elsewhere, or one too many."""
    graph, parameters, ends, constants, _ = golden
    names = list(parameters)
    wrong = ends.clone()
    wrong[1, 5] = ends[1, 6]
    with pytest.raises(ValueError, match=r"differ in the edges of 'transformer\.wte\.weight'"):
        Wiring(graph, names, wrong, constants)
    with pytest.raises(ValueError, match="edges without a parameter"):
        Wiring(graph, names, ends, torch.cat([constants, constants[:, -1:]], dim=1))
    moved = constants.clone()
    first = int((constants[2] == 11).nonzero()[0])
    moved[0, first] += 1
    with pytest.raises(ValueError, match="differ in their head edges"):
        Wiring(graph, names, ends, moved)


def row(model, parameters, place, mode, seconds, extra=1):
    return Row(model, parameters, place, mode, seconds, seconds, extra, 1.0, 1.0, 1.0, None)


def test_the_exponent_of_a_power_law_is_found():
    """And none of two points, through which every power law goes."""
    table = [row("m", n, "host", "fast", 3e-6 * n**1.5) for n in (10, 100, 1000)]
    assert exponent(table, "host", "fast") == pytest.approx(1.5)
    assert exponent(table[:2], "host", "fast") is None and exponent(table, "host", "float32") is None


@pytest.mark.parametrize(("seconds", "passed"), [(2.9, True), (3.1, False), (None, False)])
def test_targets_of_a_gpu_are_judged(seconds, passed):
    """The row of llama-1B with states in host memory passes below 3 seconds, and not when it was not measured."""
    done = {"floors/0": {"float32": 1e12, "fast": 1e13, "bandwidth": 1e12}}
    result = {"parameters": 10**9, "extra_bytes": 3 << 30, "operations": 10**14, "edge_operations": 10**14}
    if seconds is not None:
        done["nowcasts/llama-1B/host/fast/0"] = {**result, "moved_bytes": 1, "seconds": [[seconds, 9.0], [9.0, 9.0]]}
    found = verdicts({"identity": {"device": "cuda", "threads": 1}, "done": done, "failed": {}})
    assert [verdict.passed for verdict in found] == [passed, seconds is not None, False, False]
    assert math.isclose(float(found[0].found.split()[0]), seconds) if seconds else found[0].found is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "`threads` must be at least 1, got 0"),
        (["--repeats", "0"], "`repeats` must be at least 1, got 0"),
        (["--max-parameters", "many"], "`max_parameters` must be a number such as 3000000, 100M or 8B, got 'many'"),
        (["--max-parameters", "10K"], "`max_parameters` must be at least 219,712, got 10,000"),
        (["--original", "."], "`original` must be a checkout of github.com/SamsungSAILMontreal/nino"),
        (["--nowcaster", "linear"], "`nowcaster` must be a graph network (NiNoModel), got LinearNowcaster linear"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    """Each names the argument, the rule and what was found; nothing is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-nino", "bench", "engine", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_has_help_with_an_example():
    """As every command."""
    result = CliRunner().invoke(cli.app, ["bench", "engine", "--help"])
    assert result.exit_code == 0 and "Example: hf-nino bench engine" in result.output
    assert count("1.5K") == 1500 and count(None) is None
