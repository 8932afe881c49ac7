"""Merging: what each method computes, for models, state dicts and folders alike."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from typer.testing import CliRunner

from hf_nino import (
    LinearNowcaster,
    MomentumNowcaster,
    NeuralGraph,
    NiNoModel,
    NowcasterConfig,
    WNNModel,
    cli,
    merge_models,
)
from hf_nino.merging import MergeRecipe, as_markdown, compare_merges, merge_folders
from hf_nino.merging.recipe import states_order
from hf_nino.offline.predicting import mean_of_horizons
from hf_nino.training.guard import InvalidNowcast

torch.set_num_threads(1)


def gpt2(**sizes):
    set_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(**({"vocab_size": 32} | sizes), n_positions=8, n_embd=16, n_layer=1, n_head=2, **ids)
    )


def tuned(base, seed, size=0.02):
    """A model that was trained a little, in a direction of its own."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models():
    base = gpt2()
    return base, [tuned(base, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """The same as checkpoints; the base also has what training leaves."""
    folder = tmp_path_factory.mktemp("models")
    base, tasks = models
    for name, model in zip(("base", "one", "two"), (base, *tasks), strict=True):
        model.save_pretrained(folder / name)
    (folder / "base" / "tokenizer.json").write_text("{}")
    for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth", "training_args.bin"):
        (folder / "base" / name).write_text("of training")
    return folder / "base", [folder / "one", folder / "two"]


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def random_nino(kind=NiNoModel):
    torch.manual_seed(1)
    model = kind(NowcasterConfig("nino" if kind is NiNoModel else "wnn", hidden_size=8)).eval()
    nn.init.normal_(model.edge_out.weight, std=0.3)
    return model


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- methods --------------------------------------------------------------------------------------------------------


def test_an_average_is_the_mean_of_the_task_models(models):
    """The base does not count; it and the task models are as before, tied weights stay tied."""
    base, tasks = models
    before = copy.deepcopy(parameters(base))
    merged = merge_models(base, tasks, method="average")
    one, two = map(parameters, tasks)
    close(parameters(merged), {name: (one[name] + two[name]) / 2 for name in one})
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged is not base and all(torch.equal(before[name], p) for name, p in parameters(base).items())


def test_task_arithmetic_adds_what_each_model_learned(models):
    """base + scale * sum of differences; 1 / models is the average, 0 the base."""
    base, tasks = models
    start, one, two = map(parameters, (base, *tasks))
    merged = parameters(merge_models(base, tasks, method="task-arithmetic", scale=0.7))
    close(merged, {name: start[name] + 0.7 * (one[name] + two[name] - 2 * start[name]) for name in start})
    close(parameters(merge_models(base, tasks, method="task-arithmetic", scale=0.0)), start)
    average = parameters(merge_models(base, tasks, method="average"))
    close(parameters(merge_models(base, tasks, method="task-arithmetic", scale=0.5)), average)


@pytest.mark.parametrize("kind", [NiNoModel, WNNModel])
def test_a_nowcast_follows_the_original(models, kind):
    """States base, 1, 2, 2, 1; horizons 1 to 5 averaged; token embeddings averaged; here by the long way round."""
    base, tasks = models
    nowcaster = random_nino(kind)
    graph = NeuralGraph.from_model(base) if kind is NiNoModel else None
    start, one, two = map(parameters, (base, *tasks))
    found = [nowcaster.nowcast(graph, [start, one, two, two, one], horizon) for horizon in range(1, 6)]
    wanted = {name: sum(state[name] for state in found) / 5 for name in start}
    wanted["transformer.wte.weight"] = (one["transformer.wte.weight"] + two["transformer.wte.weight"]) / 2
    merged = parameters(merge_models(base, tasks, nowcaster))
    close(merged, wanted)
    assert not torch.allclose(merged["transformer.h.0.mlp.c_fc.weight"], one["transformer.h.0.mlp.c_fc.weight"])
    scaled = parameters(merge_models(base, tasks, nowcaster, scale=0.3, average_embeddings=False, horizons=[2]))
    close(scaled, {name: one[name] + 0.3 * (found[1][name] - one[name]) for name in one})


@pytest.mark.parametrize("kind", [NiNoModel, WNNModel])
def test_the_mean_of_horizons_takes_one_pass_and_is_exact(models, kind):
    """The last map is linear; the nowcaster that was given stays as it is."""
    base, tasks = models
    nowcaster = random_nino(kind)
    before = nowcaster.edge_out.weight.clone()
    graph = NeuralGraph.from_model(base) if kind is NiNoModel else None
    states = [parameters(model) for model in (base, *tasks, *tasks)]
    found = [nowcaster.nowcast(graph, states, horizon) for horizon in (1, 7, 40)]
    mean = mean_of_horizons(nowcaster, [1, 7, 40]).nowcast(graph, states, 1)
    close(mean, {name: sum(state[name] for state in found) / 3 for name in mean})
    assert torch.equal(nowcaster.edge_out.weight, before)


def test_rotation_makes_the_last_model_no_better_than_the_others(models):
    """Without it a straight line ends at the last model and knows nothing of the other; with it, as rules have it
    unless told otherwise, it is task arithmetic."""
    base, tasks = models
    start, one, two = map(parameters, (base, *tasks))
    options = {"average_embeddings": False, "horizons": [4]}
    close(
        parameters(merge_models(base, tasks, "linear", rotate=False, **options)),
        {name: one[name] + (one[name] - start[name]) for name in one},
    )
    rotated = parameters(merge_models(base, tasks, "linear", **options))
    close(rotated, {name: one[name] + two[name] - start[name] for name in one})
    swapped = parameters(merge_models(base, tasks[::-1], "linear", **options))
    close(swapped, rotated)


def test_rules_with_memory_see_each_model_as_a_displacement_from_the_base(models):
    """Two of them, with momentum m: base + (1 + m) d2 + m^2 d1 for one order; the mean of both for all rotations."""
    base, tasks = models
    start, one, two = map(parameters, (base, *tasks))
    nowcaster = MomentumNowcaster(momentum=0.5)
    merged = parameters(merge_models(base, tasks, nowcaster, average_embeddings=False, rotate=False))
    close(merged, {n: start[n] + 1.5 * (two[n] - start[n]) + 0.25 * (one[n] - start[n]) for n in start})
    assert not nowcaster.memory(), "what it carried is about models that are no run"
    rotated = parameters(merge_models(base, tasks, nowcaster, average_embeddings=False))
    close(rotated, {n: start[n] + 0.875 * (one[n] + two[n] - 2 * start[n]) for n in start})


def test_merging_is_deterministic(models):
    """Twice the same, bit for bit, whatever the random state."""
    base, tasks = models
    torch.manual_seed(3)
    first = parameters(merge_models(base, tasks, random_nino(), rotate=True))
    torch.rand(9)
    second = parameters(merge_models(base, tasks, random_nino(), rotate=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("tasks", "context", "order"),
    [
        (2, 5, (0, 1, 2, 2, 1)),  # as in the original release
        (3, 5, (0, 1, 2, 2, 3)),
        (4, 5, (0, 1, 2, 3, 4)),
        (2, 3, (0, 1, 2)),
        (2, 7, (0, 1, 2, 2, 1, 1, 2)),
        (3, 9, (0, 1, 2, 3, 3, 2, 1, 1, 2)),
    ],
)
def test_the_order_of_states(tasks, context, order):
    """The base first; every model at least once; more models than snapshots are refused."""
    nowcaster = LinearNowcaster(context=context)
    assert states_order(nowcaster, tasks) == order
    with pytest.raises(ValueError, match=f"{context + 1} states, and this nowcaster reads {context}"):
        states_order(nowcaster, context)
    assert states_order(MomentumNowcaster(), 7) == tuple(range(8))


# -- what is merged -------------------------------------------------------------------------------------------------


def test_models_state_dicts_and_folders_give_the_same(models, folders, tmp_path):
    """Of whatever kind they are; folders also from the shell, as a folder that ``from_pretrained`` loads."""
    base, tasks = models
    wanted = parameters(merge_models(base, tasks, random_nino()))
    graph = NeuralGraph.from_model(base)
    dicts = merge_models(base.state_dict(), [task.state_dict() for task in tasks], random_nino(), graph=graph)
    assert dicts.keys() == base.state_dict().keys() and dicts["lm_head.weight"] is dicts["transformer.wte.weight"]
    close({name: dicts[name] for name in wanted}, wanted)
    close(merge_models(folders[0], folders[1], random_nino()), wanted)
    mixed = merge_models(base, [tasks[0].state_dict(), folders[1][1]], random_nino())
    close(parameters(mixed), wanted)
    found = merge_folders(*folders, tmp_path / "out", random_nino())
    close(parameters(GPT2LMHeadModel.from_pretrained(tmp_path / "out")), wanted)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "nino_merge.json"}
    assert found.order == [0, 1, 2, 2, 1] and found.parameters == sum(p.numel() for p in base.parameters())
    rotated = merge_folders(*folders, tmp_path / "rotated", random_nino(), recipe=MergeRecipe(rotate=True))
    assert rotated.rotate
    wanted = parameters(merge_models(base, tasks, random_nino(), rotate=True))
    close(parameters(GPT2LMHeadModel.from_pretrained(tmp_path / "rotated")), wanted)


def test_statistics_integers_and_dtypes_are_the_bases():
    """Only parameters are merged; a frozen one, which no graph has, is averaged."""

    def network(value):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model[1].running_mean.fill_(value)
        model[1].num_batches_tracked.fill_(int(value))
        model[2].weight.requires_grad_(False)
        return model

    base, tasks = network(1.0), [network(2.0), network(4.0)]
    graph = NeuralGraph.from_model(base, torch.ones(3, 4, dtype=torch.bfloat16))
    merged = merge_models(base, tasks, random_nino(), graph=graph)
    assert float(merged[1].running_mean[0]) == 1.0 and int(merged[1].num_batches_tracked) == 1
    assert merged[2].weight.dtype == torch.bfloat16 and bool((merged[2].weight == 3.0).all())
    dicts = merge_models(base.state_dict(), [task.state_dict() for task in tasks], method="average")
    assert float(dicts["1.running_mean"][0]) == 1.0 and float(dicts["0.bias"][0]) == 3.0


def test_parameters_that_differ_are_named_with_what_to_do(folders, tmp_path):
    """Another vocabulary or another head: refused, unless they are kept as in the base."""
    base, tasks = gpt2(), [tuned(gpt2(), 1), tuned(gpt2(vocab_size=40), 2)]
    with pytest.raises(
        ValueError, match=r"model 2 differ in the shapes of 1 param.*wte.weight' \(32, 16\) and \(40, 16\).*keep"
    ):
        merge_models(base, tasks, "linear")
    for nowcaster in ("linear", random_nino()):
        merged = parameters(merge_models(base, tasks, nowcaster, keep=["*.wte.*"]))
        assert torch.equal(merged["transformer.wte.weight"], base.transformer.wte.weight)
        assert not torch.equal(merged["transformer.wpe.weight"], base.transformer.wpe.weight)
    extra = dict(tasks[0].state_dict(), **{"score.weight": torch.ones(2, 16)})
    dicts = [tasks[0].state_dict(), extra]
    with pytest.raises(ValueError, match=r"differ in 1 parameters: 'score.weight' \(only in model 2\)"):
        merge_models(base.state_dict(), dicts, "linear")
    assert "score.weight" not in merge_models(base.state_dict(), dicts, "linear", keep=["score*"])
    tasks[1].save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wte\.weight"):
        merge_folders(folders[0], [folders[1][0], tmp_path / "wide"], tmp_path / "out", "linear")
    recipe = MergeRecipe(keep=("*wte*",))
    kept = merge_folders(folders[0], [folders[1][0], tmp_path / "wide"], tmp_path / "out", "linear", recipe=recipe)
    assert kept.kept == ["transformer.wte.weight"]


@pytest.mark.parametrize("method", ["nowcast", "average", "task-arithmetic"])
def test_numbers_that_are_not_finite_are_refused(models, method):
    """Whichever method; the error names the parameter."""
    base, tasks = models
    broken = copy.deepcopy(tasks[1])
    broken.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidNowcast, match=r"h\.0\.mlp\.c_fc\.weight"):
        merge_models(base, [tasks[0], broken], "linear", method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "`method` must be one of nowcast, average"),
        ({"nowcaster": None}, "`nowcaster` must be given"),
        ({"scale": float("nan")}, "`scale` must be a finite number"),
        ({"horizons": [0]}, "`horizons` must be from 1 to 40"),
        ({"horizons": []}, "`horizons` must be whole numbers"),
        ({"order": [0, 1, 2]}, "`order` must have 5 entries"),
        ({"order": [0, 1, 2, 3, 1]}, r"`order` must be numbers from 0 \(the base\) to 2"),
        ({"keep": "head"}, "`keep` must be a list of patterns"),
        ({"fine_tuned": []}, "`fine_tuned` must be a list of at least 2 models, got 0"),
        ({"base": {"a": torch.ones(1)}, "nowcaster": random_nino()}, "`graph` must be the model's NeuralGraph"),
    ],
)
def test_bad_arguments_are_named(models, options, message):
    """In one line each."""
    arguments = {"base": models[0], "fine_tuned": models[1], "nowcaster": "linear"} | options
    with pytest.raises(ValueError, match=message):
        merge_models(**arguments)


# -- comparing, and the shell ---------------------------------------------------------------------------------------


def test_all_methods_in_one_table(models):
    """One row each, evaluated by the same function; the table has a column for each metric."""
    base, tasks = models
    start = parameters(base)

    def distance(model):
        moved = [(p - start[name]).norm().item() for name, p in parameters(model).items()]
        return {"distance": sum(moved), "tensors": len(moved)}

    rows = compare_merges(
        base,
        {"math": tasks[0], "code": tasks[1]},
        {"linear": "linear", "mine": random_nino()},
        distance,
        scales=(0.0, 1),
    )
    labels = [
        "base",
        "math",
        "code",
        "average",
        "task arithmetic, scale 0",
        "task arithmetic, scale 1",
        "linear",
        "mine",
    ]
    assert [row["method"] for row in rows] == labels
    assert rows[0]["distance"] == rows[4]["distance"] == 0.0 and rows[3]["distance"] < rows[1]["distance"]
    lines = as_markdown(rows).splitlines()
    assert lines[0] == "| method | distance | tensors |" and len(lines) == 2 + len(labels)


def command(*options):
    return CliRunner().invoke(cli.app, ["merge", *map(str, options)], catch_exceptions=False)


def test_the_command_merges_folders(folders, tmp_path):
    """By every method, with what was done for people and for programs."""
    base, tasks = folders
    told = command(base, *tasks, "--nowcaster", "linear", "--out", tmp_path / "a").output
    assert "mean of horizons 1, 2, 3, 4, 5; states: base 1 2 2 1, in every rotation" in told
    options = ["--method", "task-arithmetic", "--scale", "0.25", "--keep", "*wte*", "--out", tmp_path / "b", "--json"]
    values = json.loads(command(base, *tasks, *options).output)
    assert (values["method"], values["scale"], values["kept"]) == ("task-arithmetic", 0.25, ["transformer.wte.weight"])
    assert values["nowcaster"] is None and values["fine_tuned"] == ["one", "two"]
    average = command(base, *tasks, "--method", "average", "--out", tmp_path / "c").output
    assert "method   average\n" in average
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "c")
    wanted = merge_models(base, tasks, method="average")
    assert all(torch.equal(wanted[name], parameter) for name, parameter in merged.named_parameters())


def test_the_command_fails_in_one_line(folders, tmp_path, monkeypatch, capsys):
    """Exit code 1, and nothing is written."""
    base, tasks = folders
    for options, message in (
        ([base, *tasks], "`nowcaster` must be given for `method='nowcast'`"),
        ([base, tasks[0], "--nowcaster", "linear"], "at least 2 models, got 1"),
        ([base, *tasks, "--nowcaster", "linear", "--horizons", "1;2"], "`horizons` must be whole numbers separated"),
        ([base, *tasks, "--method", "average", "--out", str(base)], "`out` must be a folder of its own"),
    ):
        given = [*map(str, options)] if "--out" in options else [*map(str, options), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["hf-nino", "merge", *given])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 1 and message in said[-1]
    assert not (tmp_path / "out").exists()
