"""The benchmark's methods: each is what it says, bit for bit where it can be."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from hf_nino.bench.training.methods import BASES, METHODS, Conditions, method
from hf_nino.bench.training.methods.learned import (
    FEATURES,
    RECIPE,
    WEIGHTS,
    LearnedOptimizer,
    UpdateRule,
    load_rule,
)
from hf_nino.bench.training.methods.meta_tasks import KINDS, Schedule, TinyTask
from hf_nino.bench.training.methods.meta_training import (
    InnerRun,
    Recipe,
    export,
    final_loss,
    meta_gradient,
    meta_train,
    validate,
)
from hf_nino.bench.training.methods.optimizers import decay_groups, hidden_matrices, trainable
from hf_nino.bench.training.presets import PRESETS
from hf_nino.commands.bench import chosen

torch.set_num_threads(1)

CONDITIONS = Conditions(steps=40, learning_rate=1e-2, schedule="cosine", warmup_steps=4, weight_decay=0.1)
AVERAGES = {"ema": {"decay": 0.5}, "lawa": {"every": 3, "last": 2}, "schedulefree": {}}
NOWCASTS = [f"{base}{name}" for base in ("", "sgd+", "muon+") for name in ("linear", "momentum", "lookahead")]


def net(seed=0, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def gpt2(seed=0):
    set_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def batch(step):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return x, x[:, :2] * x[:, 2:]


def drive(model, training, steps, first=1):
    """Train as the benchmark's loop does; the losses."""
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        training.step(loss.detach())
        losses.append(loss.item())
    return losses


def begin(name, model=None, settings=None, **conditions):
    """The model and its training, with the learning rate in AdamW's units."""
    model = net() if model is None else model
    chosen = method(name)
    told = replace(CONDITIONS, **conditions)
    told = replace(told, learning_rate=told.learning_rate * chosen.learning_rate_scale)
    return model, chosen.begin(model, told, chosen.grid[0] if settings is None else settings)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_adamw_is_that_of_torch(schedule):
    """`adamw` makes the steps of torch.optim.AdamW under transformers' schedule, bit for bit; another weight decay
    does not."""

    def by_hand(decay):
        model = net()
        optimizer = torch.optim.AdamW(
            [
                {"params": [model[0].weight, model[2].weight, model[4].weight], "weight_decay": decay},
                {"params": [model[0].bias, model[2].bias, model[4].bias], "weight_decay": 0.0},
            ],
            lr=1e-2,
        )
        scheduler = get_scheduler(schedule, optimizer, 4, 40)
        for step in range(1, 21):
            x, y = batch(step)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        return state(model)

    model, training = begin("adamw", schedule=schedule)
    drive(model, training, 20)
    assert same(state(model), by_hand(0.1))
    assert not same(state(model), by_hand(0.0))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip


def bert():
    return BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize("build", [gpt2, llama])
def test_weight_decay_falls_on_what_trainer_lets_it_fall_on(build, tmp_path):
    """The parameters with weight decay are those of `Trainer`, and every trainable parameter is in one group."""
    model = build()
    names = Trainer(model, TrainingArguments(str(tmp_path), report_to="none")).get_decay_parameter_names(model)
    decayed, plain = decay_groups(trainable(model), 0.1)
    expected = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    assert plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_sgd_decays_weights_as_fast_as_adamw():
    """Without gradients both optimizers shrink a matrix by the same factor, once momentum is up, and no bias."""
    shrunk = {}
    for name in ("adamw", "sgd"):
        model, training = begin(name, schedule="constant", weight_decay=0.5)
        bias, norms = model[0].bias.detach().clone(), []
        for _ in range(200):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            training.step(torch.tensor(0.0))
            norms.append(model[0].weight.norm().item())
        assert torch.equal(model[0].bias, bias)
        shrunk[name] = norms[-1] / norms[-2]
    assert shrunk["sgd"] == pytest.approx(shrunk["adamw"], rel=1e-3)
    assert shrunk["sgd"] < 0.999


@pytest.mark.parametrize(
    ("build", "others"),
    [
        (gpt2, {"transformer.wte.weight", "transformer.wpe.weight"}),
        (llama, {"model.embed_tokens.weight"}),
        (bert, {"classifier.weight", *(f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type"))}),  # noqa: E501
        (net, {"4.weight"}),
    ],
)  # fmt: skip
def test_muon_takes_the_matrices_of_hidden_layers(build, others):
    """All matrices but embeddings and the head, tied or not, are Muon's."""
    model = build()
    taken = {id(parameter) for parameter in hidden_matrices(model)}
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert {name for name, parameter in matrices.items() if id(parameter) not in taken} == others
    assert 0 < len(taken) == len(matrices) - len(others)


def test_muon_steps_every_parameter_once():
    """A step of `muon` is one of torch's Muon on hidden matrices and one of AdamW on the rest, bit for bit, and both
    learning rates follow the schedule to 0."""
    model, training = begin("muon")
    groups = training.optimizer.param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())

    reference = net()
    hidden = [reference[0].weight, reference[2].weight]
    muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    biases = [reference[0].bias, reference[2].bias, reference[4].bias]
    rest = [{"params": [reference[4].weight], "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=0.0)
    for step in range(1, 41):
        rates = {group["lr"] for group in groups}
        assert len(rates) == 1 and len(groups) == 3
        for group in (*muon.param_groups, *adamw.param_groups):
            (group["lr"],) = rates
        x, y = batch(step)
        nn.functional.mse_loss(reference(x), y).backward()
        muon.step(), adamw.step(), muon.zero_grad(), adamw.zero_grad()
        drive(model, training, 1, step)
        assert same(state(model), state(reference))
    assert {group["lr"] for group in groups} == {0.0}


def test_muon_state_can_be_saved_and_loaded():
    """A run that goes on from `state_dict` equals one that was never interrupted, and one that forgets does not."""

    def interrupted(keep):
        model, training = begin("muon", schedule="constant")
        drive(model, training, 5)
        kept, saved = training.optimizer.state_dict(), state(model)
        model, training = begin("muon", schedule="constant")
        model.load_state_dict(saved)
        if keep:
            training.optimizer.load_state_dict(kept)
        drive(model, training, 5, 6)
        return state(model)

    whole, training = begin("muon", schedule="constant")
    drive(whole, training, 10)
    assert same(interrupted(True), state(whole))
    assert not same(interrupted(False), state(whole))


def test_muon_runs_without_hidden_matrices():
    """Where only a head is trained, `muon` is AdamW."""
    results = []
    for name in ("muon", "adamw"):
        model = net()
        model[:4].requires_grad_(False)
        drive(model, begin(name, model)[1], 5)
        results.append(state(model))
    assert same(*results)


# -- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AVERAGES)
def test_evaluation_swaps_an_average_in_and_out(name):
    """Inside `evaluation` the model holds other parameters, afterwards its own bit for bit, and evaluations change
    nothing about the run, were they to fail."""
    runs = []
    for evaluate in (True, False):
        model, training = begin(name, net(norm=True), AVERAGES[name])
        for step in range(1, 13):
            drive(model, training, 1, step)
            if evaluate:
                before = state(model)
                with pytest.raises(ZeroDivisionError), training.evaluation():
                    inside = state(model)
                    raise ZeroDivisionError
                assert same(state(model), before)
                moved = {key for key in before if not torch.equal(inside[key], before[key])}
        runs.append(state(model))
        if evaluate:
            statistics = {"1.running_mean", "1.running_var"} if name != "schedulefree" else set()
            assert moved == {key for key, _ in model.named_parameters()} | statistics
    assert same(*runs)


@pytest.mark.parametrize("name", ["ema", "lawa"])
def test_averages_leave_the_run_to_adamw(name):
    """EMA and LAWA train as `adamw` does, bit for bit."""
    runs = []
    for which in (name, "adamw"):
        model, training = begin(which, settings=AVERAGES.get(which, {}))
        drive(model, training, 10)
        runs.append(state(model))
    assert same(*runs)


def averaged(name, settings, steps=12):
    """Every state of a run, and every average that was handed out."""
    model, training = begin(name, net(norm=True), settings)
    states, averages = [], []
    for step in range(1, steps + 1):
        drive(model, training, 1, step)
        states.append(state(model))
        with training.evaluation():
            averages.append(state(model))
    return states, averages


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_ema_is_the_exponential_average(decay):
    """EMA equals its recursion, written out; the statistics of batch normalization are averaged alike."""
    states, averages = averaged("ema", {"decay": decay})
    for key in ("0.weight", "5.bias", "1.running_var"):
        expected = states[0][key]
        for t, (now, found) in enumerate(zip(states, averages, strict=True), start=1):
            if t > 1:
                d = min(decay, t / (t + 9))
                expected = d * expected + (1 - d) * now[key]
            torch.testing.assert_close(found[key], expected)
    assert torch.equal(averages[-1]["1.num_batches_tracked"], states[-1]["1.num_batches_tracked"])


def test_lawa_is_the_mean_of_the_last_snapshots():
    """LAWA equals the mean of the states after the last multiples of `every`; before there are enough, the state."""
    states, averages = averaged("lawa", {"every": 2, "last": 3})
    for t, found in enumerate(averages, start=1):
        last = [states[s - 1] for s in range(1, t + 1) if s % 2 == 0][-3:]
        for key in ("0.weight", "1.running_mean"):
            if len(last) < 3:
                assert torch.equal(found[key], states[t - 1][key])
            else:
                torch.testing.assert_close(found[key], sum(entry[key] for entry in last) / 3)


def test_schedule_free_has_no_decay():
    """Schedule-Free keeps its learning rate after warm-up, under either schedule."""
    model, training = begin("schedulefree")
    rates = []
    for step in range(1, 9):
        drive(model, training, 1, step)
        rates.append(training.optimizer.param_groups[0]["scheduled_lr"])
    assert rates == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, *[1e-2] * 5])
    model, training = begin("schedulefree", schedule="constant")
    drive(model, training, 1)
    assert training.optimizer.param_groups[0]["scheduled_lr"] == 1e-2


# -- nowcasts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOWCASTS)
def test_nowcasts_are_written_on_every_base(name):
    """A nowcasting method writes nowcasts and so leaves its base's trajectory; with a period beyond the run it is its
    base bit for bit.  Its report is JSON and counts its time."""
    base = name.partition("+")[0] if "+" in name else "adamw"
    runs = []
    for which, settings in ((base, {}), (name, {"period": 10}), (name, {"period": 1000})):
        model, training = begin(which, settings=settings, schedule="constant")
        drive(model, training, 40)
        runs.append(state(model))
        report = json.loads(json.dumps(training.report()))
        if settings == {"period": 10}:
            assert [event["step"] for event in report["events"]] == [10, 20, 30, 40]
            assert sum(event["accepted"] for event in report["events"]) > 0
            assert 0 < report["nowcast_seconds"] < math.inf
        elif settings:
            assert report["events"] == []
        training.close()
    plain, often, never = runs
    assert same(plain, never)
    assert not same(plain, often)


def test_nowcasts_are_on_probation():
    """The training loss is told at every step: a nowcast backwards is taken back, one forwards is not."""
    for factor, taken_back in ((-2.5, [50]), (0.5, [])):
        settings = {"period": 50, "factor": factor, "patience": 30}
        model, training = begin("muon+linear", settings=settings, steps=400, schedule="constant")
        drive(model, training, 90)
        events = training.report()["events"]
        assert [event["step"] for event in events if event["accepted"]] == [50]
        assert [event["taken_back_to"] for event in events if event["taken_back_to"]] == taken_back


def test_learned_nowcasters_run(shared):
    """`nino:PATH` serves the original release's files, with a graph and without, on any base, and draws no random
    number."""
    for name in (f"nino:{shared}/upstream/nino_mlp.pt", f"muon+nino:{shared}/upstream/nino_no_posw.pt"):
        model = gpt2()
        random = torch.get_rng_state()
        inputs = {"input_ids": torch.arange(8)[None]}
        _, training = begin(name, model, {"period": 10}, example_inputs=inputs, schedule="constant")
        assert torch.equal(torch.get_rng_state(), random)
        for _ in range(12):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            training.step(loss.detach())
        assert [event["accepted"] for event in training.report()["events"]] == [True]
        assert method(name).grid[0] == {"period": 250}


# -- the learned optimizer ------------------------------------------------------------------------------------------

SHORT = Recipe(
    imitation=3,
    blocks=2,
    iterations=2,
    runs=2,
    window=5,
    longest=60,
    validate_every=1,
    validation=1,
    validation_steps=10,
)


def learned_steps(rule, start, gradients):
    """Where the learned optimizer goes from ``start``."""
    parameter = nn.Parameter(start.clone())
    optimizer = LearnedOptimizer([parameter], rule, lr=0.01)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.fixture(scope="module")
def walk():
    """A start and some gradients of a matrix."""
    torch.manual_seed(0)
    return torch.randn(6, 5), torch.randn(8, 6, 5) * torch.rand(6, 5).exp()


def test_the_learned_optimizer_knows_no_places(walk):
    """Permute the elements of a tensor and of its gradients, and its steps are permuted; permute only the gradients,
    and they are others."""
    start, gradients = walk
    order = torch.randperm(30)
    mixed = gradients.flatten(1)[:, order].view_as(gradients)
    expected = learned_steps(load_rule(), start, gradients).flatten()[order].view_as(start)
    found = learned_steps(load_rule(), start.flatten()[order].view_as(start), mixed)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(learned_steps(load_rule(), start, mixed), expected, atol=1e-3)


def test_the_learned_optimizer_knows_no_sign_and_no_scale(walk):
    """Mirrored gradients and parameters make mirrored steps, bit for bit; a loss scaled by 1000 changes nothing; and
    where there never was a gradient nothing moves."""
    start, gradients = walk
    gradients = gradients.clone()
    gradients[:, 2] = 0
    found = learned_steps(load_rule(), start, gradients)
    assert torch.equal(learned_steps(load_rule(), -start, -gradients), -found)
    torch.testing.assert_close(learned_steps(load_rule(), start, 1000 * gradients), found)
    moved = found != start
    assert not moved[2].any() and moved[[0, 1, 3, 4, 5]].all()


def test_the_learned_optimizer_learns(monkeypatch):
    """The loss falls under `l2o`; with the sign of the rule's direction turned around it rises."""
    rule = load_rule()
    with torch.no_grad():
        rule.layers[-1].weight[0] *= -1
        rule.layers[-1].bias[0] *= -1
    for turned in (False, True):
        if turned:
            monkeypatch.setattr("hf_nino.bench.training.methods.learned.load_rule", lambda: rule)
        model, training = begin("l2o", schedule="constant")
        losses = drive(model, training, 100)
        start, end = sum(losses[:20]), sum(losses[-20:])
        assert end > 2 * start if turned else end < 0.95 * start


def test_the_learned_optimizer_follows_learning_rate_and_factor():
    """The first step is proportional to both; weight decay is AdamW's; no random number is drawn."""

    def first(settings, rate, decay=0.0):
        model = net()
        random = torch.get_rng_state()
        _, training = begin("l2o", model, settings, learning_rate=rate, weight_decay=decay, schedule="constant")
        assert torch.equal(torch.get_rng_state(), random)
        drive(model, training, 1)
        return model[0].weight.detach() - net()[0].weight.detach()

    step = first({}, 1e-2)
    torch.testing.assert_close(first({"factor": 2.0}, 1e-2), 2 * step, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(first({}, 3e-2), 3 * step, rtol=1e-3, atol=1e-6)
    decayed = first({"factor": 2.0}, 1e-2, decay=0.1) - 2 * step
    torch.testing.assert_close(decayed, -1e-3 * net()[0].weight.detach(), rtol=1e-2, atol=1e-6)


def test_the_shipped_weights_are_those_of_the_recipe():
    """They load, have the recorded shapes, are small, and were the best of their meta-training."""
    about = json.loads(RECIPE.read_text("utf-8"))
    rule = load_rule()
    assert {name: list(tensor.shape) for name, tensor in rule.state_dict().items()} == about["shapes"]
    assert about["shapes"]["layers.0.weight"] == [32, FEATURES]
    assert WEIGHTS.stat().st_size < 100_000
    history, every = about["validation"]["after_imitation_and_blocks"], about["recipe"]["validate_every"]
    assert history[about["validation"]["chosen_block"] // every] == min(history)
    assert len(history) == about["recipe"]["blocks"] // every + 1 and Recipe(**about["recipe"])
    assert about["command"].startswith("python -m hf_nino.bench.training.methods.meta_training")


@pytest.mark.slow
def test_the_shipped_weights_do_what_is_recorded():
    """Their validation, done again, is the recorded one."""
    about = json.loads(RECIPE.read_text("utf-8"))
    history = about["validation"]["after_imitation_and_blocks"]
    assert validate(load_rule(), Recipe(**about["recipe"])) == pytest.approx(min(history), abs=0.01)


def test_other_weights_are_refused(tmp_path):
    """An absent file, and shapes that are not the recorded ones, give one clear error."""
    recipe = tmp_path / "l2o.json"
    with pytest.raises(FileNotFoundError, match=r"'l2o.json' is absent"):
        load_rule(recipe=recipe)
    about = json.loads(RECIPE.read_text("utf-8"))
    about["shapes"]["layers.0.weight"] = [32, 1]
    recipe.write_text(json.dumps(about), "utf-8")
    with pytest.raises(ValueError, match=r"must have the shapes .*make it anew with python -m hf_nino"):
        load_rule(recipe=recipe)
    with pytest.raises(ValueError, match="`factor` of method 'l2o' must be above 0, got 0"):
        begin("l2o", settings={"factor": 0})


class Slope(TinyTask):
    """A loss that is linear in its parameters: the gradient is the same everywhere."""

    def initial(self):
        self.slopes = [self.normal(6, 2), self.normal(3)]
        return [self.normal(6, 2), self.normal(3)]

    def loss(self, parameters):
        return 9 + sum((slope * parameter).sum() for slope, parameter in zip(self.slopes, parameters, strict=True))


def test_the_meta_gradient_is_a_derivative():
    """Where gradients do not depend on earlier steps, it is the derivative of the mean log loss by the weights:
    checked with finite differences along random directions."""
    torch.manual_seed(0)
    rule = UpdateRule()
    with torch.no_grad():
        rule.layers[0].weight[:, 0] = 0  # the feature that sees where the parameter is

    def objective():
        return meta_gradient(rule, InnerRun(Slope(0), Schedule(8, 0.2, cosine=True)), 8)

    objective()
    gradient = [parameter.grad.clone() for parameter in rule.parameters()]
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in rule.parameters()]
        direction[0][:, 0] = 0
        values = []
        for shift in (1e-3, -1e-3):
            for parameter, part in zip(rule.parameters(), direction, strict=True):
                parameter.data.add_(part, alpha=shift)
            values.append(objective())
            for parameter, part in zip(rule.parameters(), direction, strict=True):
                parameter.data.sub_(part, alpha=shift)
        slope = sum((part * other).sum().item() for part, other in zip(direction, gradient, strict=True))
        assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.03) and abs(slope) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_tasks_can_be_learned(kind):
    """Adam lowers their loss, and they are decided by their seed."""
    seed = KINDS.index(kind)
    task, again, other = kind(seed), kind(seed), kind(seed + len(KINDS))
    losses = [entry.gradients(entry.initial())[0] for entry in (task, again, other)]
    assert losses[0] == losses[1] != losses[2]
    assert final_loss(None, seed, 1e-2, 100) < 0.97 * losses[0]


def test_meta_training_resumes(tmp_path, monkeypatch):
    """Interrupted and resumed it ends with the same weights, bit for bit, and leaves files that load; another seed
    gives others, and another recipe does not go on from its checkpoint."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    whole = meta_train(SHORT, tmp_path / "whole")
    meta_train(SHORT, tmp_path / "parts", blocks=1)
    parts = meta_train(SHORT, tmp_path / "parts")
    assert whole.history == parts.history and len(whole.history) == 3
    assert same(state(whole.rule), state(parts.rule)) and same(whole.best, parts.best)
    other = meta_train(replace(SHORT, seed=1), tmp_path / "other")
    assert not same(state(whole.rule), state(other.rule))
    with pytest.raises(ValueError, match=r"of another recipe, with \{'seed': 1\}: give another folder"):
        meta_train(SHORT, tmp_path / "other")
    export(whole, tmp_path / "weights.safetensors", tmp_path / "recipe.json")
    assert same(state(load_rule(tmp_path / "weights.safetensors", tmp_path / "recipe.json")), whole.best)


# -- names and settings ---------------------------------------------------------------------------------------------


def test_every_method_is_found_by_its_name():
    """Names are unique, printable in a table and without spaces; every setting of every grid is JSON."""
    for name in ("nino:there", "muon+nino:there", "paper-nino:there", "sgd+paper-nino:there"):
        assert method(name).name == name and ("the paper's" in method(name).title) == ("paper" in name)
    for name, found in METHODS.items():
        assert method(name) is found and found.name == name and " " not in name and found.title
        assert found.missing() is None
        assert len({json.dumps(settings, sort_keys=True) for settings in found.grid}) == len(found.grid) <= 6


def test_a_rule_with_settings_is_a_method_of_its_own():
    """Its runs have its name and no more settings to choose; what was not given stays, the method without too."""
    found = method("muon+momentum:momentum=0.8,period=100")
    assert found.name == "muon+momentum:momentum=0.8,period=100" and found.base is BASES["muon"]
    assert found.title.endswith("(momentum 0.8, period 100)") and found.grid == ({},)
    plain = METHODS["muon+momentum"]
    assert plain.nowcaster_defaults["momentum"] != 0.8 == found.nowcaster_defaults["momentum"]
    assert found.nowcaster_defaults == {**plain.nowcaster_defaults, "momentum": 0.8}
    assert plain.when["period"] is None and found.when == {**plain.when, "period": 100}
    assert method("spectral-unbounded:growth=1").grid == ({"max_overhead": None},)
    assert method("spectral-unbounded:max_overhead=0.5").grid == ({},)


def test_settings_in_the_name_train_as_those_of_the_run_do():
    """Bit for bit; and not as without."""

    def trained(name, settings):
        model, training = begin(name, settings=settings, steps=12)
        drive(model, training, 12)
        training.close()
        return torch.cat([one.detach().flatten() for one in model.parameters()])

    inside = trained("momentum:momentum=0.8,factor=1.5,period=2", {})
    assert inside.equal(trained("momentum", {"momentum": 0.8, "factor": 1.5, "period": 2}))
    assert not inside.equal(trained("momentum", {"momentum": 0.8, "factor": 0.5, "period": 2}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spectral:growth=2", "`growth` of a SpectralNowcaster must be a share"),
        ("spectral:grow=1", "method 'spectral:grow=1' must be its own .*growth.*, got grow"),
        ("spectral:growth", "must look like 'linear:max_intervals=3,period=100', got 'spectral:growth'"),
        ("spectral:", "must look like"),
    ],
)
def test_settings_in_the_name_are_checked_when_it_is_looked_up(name, message):
    with pytest.raises(ValueError, match=message):
        method(name)


def test_commas_in_settings_do_not_end_a_name():
    """On the command line names are between commas, and so are settings."""
    asked = " spectral:growth=1,period=50, ema ,nino:a.pt,muon+linear:period=9"
    matrix = chosen(PRESETS["smoke"], tasks=None, methods=asked, protocols=None, seeds=None, steps=None)
    assert matrix.methods == ("spectral:growth=1,period=50", "ema", "nino:a.pt", "muon+linear:period=9")


@pytest.mark.parametrize("name", [name for name in METHODS])
def test_every_setting_of_every_grid_is_taken(name):
    """Every method trains with each of its settings under both schedules, to finite losses."""
    for settings, schedule in itertools.product(method(name).grid, ("constant", "cosine")):
        model, training = begin(name, settings=settings, schedule=schedule, steps=12)
        losses = drive(model, training, 12)
        training.close()
        assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "name", ["adam", "nino:", "ema+linear", "muon+", "+nino:x", "muon+nino", "other:x", "ema:decay=0.9"]
)
def test_an_unknown_method_is_refused(name):
    """The error names what there is."""
    with pytest.raises(ValueError, match=r"`method` must be one of adamw, sgd, muon, linear, .* got"):
        method(name)


@pytest.mark.parametrize("name", ["nino:absent.pt", "sgd+nino:./absent", "nino:absent"])
def test_a_nowcaster_that_is_absent_is_missing(name):
    """`missing` says so before a benchmark starts, and `begin` refuses."""
    assert "absent" in method(name).missing()
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        begin(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adamw", {"momentum": 0.5}, "method 'adamw' must be its own .it has none., got momentum"),
        ("muon+linear", {"momentum": 0.5}, "method 'muon.linear' .*context, .*max_intervals, .* got momentum"),
        ("ema", {"decay": 1.0}, "`decay` of method 'ema' must be from 0 to below 1, got 1.0"),
        ("lawa", {"every": 0}, "`every` of method 'lawa' must be a whole number of at least 1, got 0"),
        ("schedulefree", {"x": 1}, "method 'schedulefree' must be its own"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(name, settings, message):
    """One error names the method, its settings and what was found."""
    with pytest.raises(ValueError, match=message):
        begin(name, settings=settings)


def test_a_schedule_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`schedule` must be 'constant' or 'cosine', got 'linear'"):
        begin("adamw", schedule="linear")


def test_without_the_package_schedule_free_is_missing(monkeypatch):
    """The reason names the package."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install schedulefree" in method("schedulefree").missing()
    with pytest.raises(ImportError, match="pip install schedulefree"):
        begin("schedulefree")
