"""Models that are trained in one stack become what each would become alone, with torch's optimizers."""

from dataclasses import dataclass, replace

import pytest
import torch
from record_helpers import states_of
from torch import nn
from transformers import get_scheduler

from hf_nino.bench.training.tasks.base import Task
from hf_nino.metatrain.schedules import SCHEDULES, schedule_factor
from hf_nino.metatrain.stacked import ENGINES, StackedTraining, faster_engine, in_stacks
from hf_nino.metatrain.stacked_optimizers import adamw_, clip_, sgd_
from hf_nino.metatrain.tasks import recording_task
from hf_nino.metatrain.variation import RunSettings, draw_settings

CPU = torch.device("cpu")
STEPS = 30
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """A small network that learns another one; it has a parameter that is a single number."""

    kind = "test"

    def load(self, cache):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(64, 3, generator=generator)
        return x, torch.tanh(x @ torch.randn(3, 2, generator=generator)) * 3

    def build_model(self, data):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 2)
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, x):
                return self.outer(torch.tanh(self.inner(x))) * self.scale

        return Net()

    def batches(self, data, seed, device):
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(64, (self.batch_size,), generator=generator)
            yield {"x": data[0][rows].to(device), "y": data[1][rows].to(device)}

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def evaluate(self, model, data):
        raise NotImplementedError


TASK = Regression(name="regression", steps=STEPS, batch_size=8, learning_rate=1e-2, constant_learning_rate=1e-2)


def settings(count=6, task=TASK, **same):
    """Runs that differ in everything that may differ within a stack, optimizer by optimizer."""
    found = [
        RunSettings(
            task=task.name,
            index=i,
            steps=task.steps,
            optimizer="adamw" if i < count / 2 else "sgd",
            learning_rate=3e-3 * 1.5**i,
            schedule=SCHEDULES[i % 4],
            warmup_steps=3 * (i % 3),
            weight_decay=0.1 * (i % 2),
            batch_size=task.batch_size,
            max_grad_norm=None if i % 3 else 0.5,
            initialisation=1 + 0.3 * (i % 2),
            seed=100 + i,
        )
        for i in range(count)
    ]
    return [replace(one, **same) for one in found]


def alone(task, data, one, steps=STEPS):
    """The parameters and losses of one run, with torch's own optimizers, schedules and clipping, in the usual loop."""
    torch.manual_seed(one.seed)
    model = task.build_model(data)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(one.initialisation)
    rates = {"lr": one.learning_rate, "weight_decay": one.weight_decay}
    if one.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **rates)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **rates)
    factors = [schedule_factor(one.schedule, i, one.steps, one.warmup_steps) for i in range(one.steps + 1)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    batches, losses = task.batches(data, one.seed, CPU), []
    for _ in range(steps):
        loss = task.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        if one.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), one.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return states_of(model), losses


def worst(task, data, runs, engine, steps=STEPS, separate=None):
    """Largest difference between a stack and its models trained alone: of losses relative to the largest loss, of
    parameters relative to the largest move in the model."""
    training = StackedTraining(task, data, runs, CPU, engine)
    losses = torch.stack([training.step() for _ in range(steps)], 1)
    state, found = training.unflatten(training.flat), 0.0
    for i, one in enumerate(separate or runs):
        parameters, expected = alone(task, data, one, steps)
        before, _ = alone(task, data, one, 0)
        move = max(float((parameter - before[name]).abs().max()) for name, parameter in parameters.items())
        for name, parameter in parameters.items():
            found = max(found, float((state[name][i] - parameter).abs().max()) / move)
        found = max(found, float((losses[i] - torch.tensor(expected)).abs().max() / max(expected)))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stack_trains_as_its_models_would_alone(engine):
    """AdamW and SGD with momentum, with learning rates, decays, schedules, warm-ups, clipping, initialisations and
    data of their own: the same parameters and losses after 30 steps, to float32 accuracy."""
    assert worst(TASK, TASK.load(None), settings(), engine) < TOLERANCE


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.05},
        {"learning_rate": 3.01e-3},
        {"max_grad_norm": None},  # not another bound: AdamW makes the same of a gradient that is always shortened
        {"warmup_steps": 1},
        {"initialisation": 1.01},
        {"seed": 7},
    ],
    ids=str,
)
def test_a_setting_that_went_astray_would_be_noticed(change, optimizer):
    """The negative control: one setting of the runs alone is another."""
    runs = settings(2, optimizer=optimizer, max_grad_norm=0.5, warmup_steps=2)
    other = [replace(one, **change) for one in runs]
    assert worst(TASK, TASK.load(None), runs, "vmap", separate=other) > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["gpt2-1x16-h2-v320-kjv", "llama-1x16-h2k1-v320-kjv", "vit-1x16-h2-p7", "conv-4-6"])
@pytest.mark.parametrize("engine", ENGINES)
def test_transformers_and_convolutions_train_in_a_stack_as_alone(name, engine):
    """Attention, rotary and tied embeddings, convolutions: nothing of one model is seen by another.  With SGD: where a
    gradient is 0 but for rounding, as that of key biases, AdamW makes moves out of the rounding."""
    task = replace(recording_task(name), batch_size=4, steps=5)
    runs = settings(3, task, optimizer="sgd", warmup_steps=0, schedule="constant")
    assert worst(task, noise(task), runs, engine, steps=5) < 5 * TOLERANCE


def noise(task):
    """Data of a task's kind, without its files."""
    from hf_nino.bench.training.tasks.images import Images
    from hf_nino.bench.training.tasks.language import Blocks

    generator = torch.Generator().manual_seed(0)
    if task.kind == "language":
        blocks = torch.randint(task.vocabulary, (32, task.block_length), generator=generator, dtype=torch.int16)
        return Blocks(blocks, blocks)
    images = torch.randint(256, (32, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(32) % 10
    return Images(images, labels, images, labels)


def test_a_model_that_diverges_leaves_its_neighbours_alone():
    runs = settings(4, optimizer="sgd", max_grad_norm=None, schedule="constant", warmup_steps=0)
    wild = [replace(runs[0], learning_rate=1e6), *runs[1:]]
    data = TASK.load(None)
    stacks = [StackedTraining(TASK, data, some, CPU) for some in (runs, wild)]
    for training in stacks:
        for _ in range(STEPS):
            training.step()
    calm, hurt = (training.flat for training in stacks)
    assert not hurt[0].isfinite().all() and torch.equal(calm[1:], hurt[1:])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_step_of_the_stacked_optimizers_is_torchs(optimizer):
    """Over 50 steps with gradients of sizes from 1e-6 to 1, each row to float32 accuracy."""
    torch.manual_seed(0)
    sizes = 10.0 ** torch.linspace(-6, 0, 5).unsqueeze(1)
    flat = torch.randn(5, 40)
    rates, decay = 10.0 ** torch.linspace(-4, -1, 5).unsqueeze(1), torch.linspace(0, 0.3, 5).unsqueeze(1)
    rows = [nn.Parameter(row.clone()) for row in flat]
    kinds = {
        "adamw": lambda p, **s: torch.optim.AdamW([p], **s),
        "sgd": lambda p, **s: torch.optim.SGD([p], momentum=0.9, **s),
    }
    optimizers = [
        kinds[optimizer](row, lr=float(r), weight_decay=float(d)) for row, r, d in zip(rows, rates, decay, strict=True)
    ]
    moments = [torch.zeros_like(flat) for _ in range(2 if optimizer == "adamw" else 1)]
    for step in range(1, 51):
        gradient = torch.randn(5, 40) * sizes
        for row, single, own in zip(rows, gradient, optimizers, strict=True):
            row.grad = single.clone()
            own.step()
        if optimizer == "adamw":
            adamw_(flat, gradient, *moments, step=step, learning_rate=rates, weight_decay=decay)
        else:
            sgd_(flat, gradient, *moments, learning_rate=rates, weight_decay=decay)
    torch.testing.assert_close(flat, torch.stack([row.detach() for row in rows]), rtol=1e-5, atol=1e-6)


def test_clipping_is_torchs():
    """Row by row; infinity clips nothing."""
    torch.manual_seed(0)
    gradient = torch.randn(4, 30) * torch.tensor([[0.01], [1.0], [100.0], [100.0]])
    bounds = torch.tensor([[1.0], [1.0], [1.0], [float("inf")]])
    rows = [nn.Parameter(torch.zeros(30)) for _ in range(4)]
    for row, single, bound in zip(rows, gradient, bounds, strict=True):
        row.grad = single.clone()
        nn.utils.clip_grad_norm_([row], float(bound))
    clipped = gradient.clone()
    clip_(clipped, bounds)
    torch.testing.assert_close(clipped, torch.stack([row.grad for row in rows]))
    assert torch.equal(clipped[[0, 3]], gradient[[0, 3]]) and not torch.equal(clipped[2], gradient[2])


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_transformers(schedule, warmup):
    """The learning rate of every step of a run, warm-up included."""
    names = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
    extra = {"num_decay_steps": 10, "decay_type": "linear"} if schedule == "wsd" else None
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(names.get(schedule, schedule), optimizer, warmup, 50, scheduler_specific_kwargs=extra)
    for step in range(50):
        assert schedule_factor(schedule, step, 50, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_schedule_without_room_for_its_warm_up_ends_in_it():
    """Steps beyond the end have the learning rate of the end."""
    assert [schedule_factor("linear", step, 2, 4) for step in range(2)] == [0, 0.25]
    assert schedule_factor("cosine", 9, 5, 0) == pytest.approx(0)


def test_the_faster_engine_is_found_and_counts_its_time():
    made = []

    def make(engine):
        made.append(engine)
        return StackedTraining(TASK, TASK.load(None), settings(), CPU, engine)

    engine, seconds = faster_engine(make, CPU)
    assert engine in ENGINES and tuple(made) == ENGINES and seconds > 0


def test_stacks_hold_what_can_be_trained_together():
    """Every run is in one stack; none is larger than allowed; tasks and batch sizes do not mix, and optimizers stand
    side by side."""
    tasks = [replace(TASK, name=name) for name in ("a", "b")]
    runs = [draw_settings(task, index, 0) for task in tasks for index in range(20)]
    stacks = list(in_stacks(runs, 4))
    assert sorted((one.task, one.index) for stack in stacks for one in stack) == sorted(
        (o.task, o.index) for o in runs
    )
    assert max(len(stack) for stack in stacks) <= 4
    for stack in stacks:
        assert len({(one.task, one.batch_size) for one in stack}) == 1
        assert [one.optimizer for one in stack] == sorted(one.optimizer for one in stack)


def test_settings_cover_what_users_vary_and_do_not_depend_on_their_number():
    """Two decades of learning rates, all schedules, both optimizers; run 3 is the same in 4 runs and in 400."""
    runs = [draw_settings(TASK, index, seed=1) for index in range(400)]
    adam = [one.learning_rate for one in runs if one.optimizer == "adamw"]
    assert 1e-3 <= min(adam) < 1.2e-3 and 0.083 < max(adam) <= 0.1 and 0.6 < len(adam) / 400 < 0.9
    assert {one.schedule for one in runs} == set(SCHEDULES)
    assert {one.batch_size for one in runs} == {4, 8, 16}
    assert len({one.seed for one in runs}) == 400
    for value in (0, None, 1.0):
        chosen = {"warmup_steps": 0, "max_grad_norm": None, "initialisation": 1.0}
        name = next(key for key, usual in chosen.items() if usual == value and type(usual) is type(value))
        assert 0.1 < sum(getattr(one, name) == value for one in runs) / 400 < 0.7
    assert [draw_settings(TASK, index, seed=1) for index in range(4)] == runs[:4]
    assert draw_settings(TASK, 0, seed=2) != runs[0]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "must be at least one, all with the same task"),
        (settings(1) + settings(1, batch_size=3), "the same task, steps and batch size"),
        (settings(1, optimizer="lion"), "`optimizer` must be one of adamw, sgd, got 'lion'"),
        (
            settings(3, optimizer="sgd")[:1] + settings(3, optimizer="adamw")[:1] + settings(1, optimizer="sgd"),
            "side by side",
        ),
    ],
)
def test_settings_that_cannot_be_stacked_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        StackedTraining(TASK, TASK.load(None), runs, CPU)


def test_models_with_statistics_are_refused():
    class Normed(Regression):
        def build_model(self, data):
            return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    task = Normed(name="normed", steps=1, batch_size=8, learning_rate=1e-2, constant_learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"models with statistics cannot be stacked, and those of normed have '1\."):
        StackedTraining(task, task.load(None), settings(1, task), CPU)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="`engine` must be one of vmap, loop, got 'jit'"):
        StackedTraining(TASK, TASK.load(None), settings(1), CPU, "jit")
