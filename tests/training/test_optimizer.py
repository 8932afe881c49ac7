"""``NiNo`` behaves as the optimizer it is wrapped around, in every loop that takes an optimizer."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from training_helpers import MAX_STEPS, PERIOD, Line, Pull, RawLoop, Stay, mlp, parameters, same

from hf_nino.training import NiNo


@pytest.fixture(autouse=True)
def accelerate_afresh():
    """accelerate keeps its state for the whole process: settings of other modules' tests must not come in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make(model, nowcaster=None, base=torch.optim.AdamW, **options):
    return NiNo(base(model.parameters(), lr=1e-2), model, nowcaster or Line(), **({"period": PERIOD} | options))


def backward(model, seed=0):
    data = torch.Generator().manual_seed(seed)
    nn.functional.mse_loss(model(torch.randn(8, 4, generator=data)), torch.randn(8, 2, generator=data)).backward()


def test_it_is_the_base_optimizer_to_everyone_else():
    """Groups, state, defaults and ``state_dict`` are the base's, also after they have been replaced."""
    model = mlp()
    optimizer = make(model)
    base = optimizer.base_optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    backward(model)
    optimizer.step()
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups
    assert optimizer.defaults is base.defaults
    saved = optimizer.state_dict()
    assert saved.keys() == base.state_dict().keys() == {"state", "param_groups"}
    other = make(mlp())
    other.load_state_dict(saved)
    assert torch.equal(
        other.base_optimizer.state[other.param_groups[0]["params"][0]]["exp_avg"],
        base.state[base.param_groups[0]["params"][0]]["exp_avg"],
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(base.param_groups) == 2


def test_groups_that_are_stepped_one_by_one_make_one_step():
    """As DeepSpeed's ZeRO-1 and 2 do it.  Parameters and events are those of a loop that steps all groups at once,
    and the rates of all groups count."""

    def run(one_by_one):
        torch.manual_seed(0)
        model = mlp(dropout=0.0)
        tensors = list(model.parameters())
        groups = [{"params": tensors[:2], "lr": 1e-2}, {"params": tensors[2:], "lr": 2e-2}]
        optimizer = NiNo(torch.optim.AdamW(groups), model, Line(), period=PERIOD, horizon=2)
        optimizer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(2 * PERIOD + 2):
            backward(model, step)
            whole = optimizer.param_groups
            for group in whole if one_by_one else [None]:
                if group is not None:
                    optimizer.param_groups = [group]
                optimizer.step()
                optimizer.param_groups = whole
            optimizer.lr_scheduler.step()
            optimizer.zero_grad()
        return parameters(model), [(event.step, event.horizon) for event in optimizer.nowcasting.events]

    (states, events), (expected, expected_events) = run(True), run(False)
    assert len(events) == 2 and events == expected_events
    assert same(states, expected)


def test_hooks_run_with_the_base_optimizers_steps():
    """Step hooks registered on the wrapper are called once per step."""
    model = mlp()
    optimizer, calls = make(model), []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    backward(model)
    optimizer.step()
    assert calls == ["pre", "post"]


def test_closures_reach_the_base_optimizer():
    """``step(closure)`` returns the closure's loss, for LBFGS too."""
    model = mlp(dropout=0.0)
    optimizer = make(model, base=torch.optim.LBFGS)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.ones(3, 4)), torch.ones(3, 2))
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=MAX_STEPS),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_schedulers_take_it_for_an_optimizer(schedule):
    """A scheduler on the wrapper sets the base's learning rates exactly as on the base, with nowcasts in between."""
    rates = []
    for wrap in (True, False):
        model = mlp()
        optimizer = make(model, horizon=1, max_steps=MAX_STEPS)
        target = optimizer if wrap else optimizer.base_optimizer
        scheduler = schedule(target)
        optimizer.lr_scheduler = scheduler
        found = []
        for step in range(MAX_STEPS - 1):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            scheduler.step(*[1.0] * isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))
            found.append(optimizer.base_optimizer.param_groups[0]["lr"])
        rates.append(found)
        assert optimizer.nowcasting.nowcasts >= 1
    assert rates[0] == rates[1]


def test_a_scaler_that_skips_a_step_does_not_count_it():
    """With an infinite gradient the scaler leaves the step out: parameters, counter and snapshots do not move."""
    model = mlp()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum() * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = parameters(model)
        scaler.step(optimizer)
        scaler.update()
        assert same(before, parameters(model)) == (step == 1)
    assert optimizer.nowcasting.step_count == 2


def test_a_fused_base_optimizer_gets_its_gradients_unscaled():
    """``GradScaler`` divides the scale out for a fused base too: the step equals the one without a scaler."""
    results = []
    for scale in (1.0, 1024.0):
        model = mlp(dropout=0.0)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        optimizer = NiNo(base, model, Line(), period=PERIOD)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
        scaler.step(optimizer)
        results.append(parameters(model))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-7) for name in results[0])


def test_a_rehearsed_step_is_not_counted():
    """``torch.distributed.checkpoint`` fills an optimizer's state by a step with learning rate and gradients 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = mlp()
    optimizer = make(model)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.nowcasting.step_count == 0
    backward(model)
    optimizer.step()
    assert optimizer.nowcasting.step_count == 1


class Free(torch.optim.SGD):
    """What marks a schedule-free optimizer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group["train_mode"] = True


def test_optimizers_that_cannot_be_nowcast_are_refused():
    """Schedule-free optimizers raise, whether told apart by their groups or by their state; so does what is none."""
    model = mlp()
    with pytest.raises(ValueError, match="must not be schedule-free, got Free"):
        make(model, base=Free)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.state[model[0].weight] = {"z": torch.zeros(1)}
    with pytest.raises(ValueError, match="schedule-free"):
        NiNo(base, model, Line())
    with pytest.raises(TypeError, match="must be a torch"):
        NiNo(model, model, Line())


def test_the_scheduler_may_be_set_after_construction():
    """With the scheduler known, the horizon shrinks as the rate decays; without, it is as for a constant rate."""

    class Far(Line):
        max_horizon = 10

    horizons = []
    for known in (True, False):
        loop = RawLoop(Far(), horizon="lr-budget", scheduled=known)
        loop.run(MAX_STEPS)
        horizons.append([event.horizon for event in loop.optimizer.nowcasting.events])
    assert len(horizons[0]) == len(horizons[1]) == 2
    assert sum(horizons[0]) < sum(horizons[1])


def test_the_budget_counts_the_steps_that_are_left_in_a_loop():
    """The rate decays linearly from 16 to 0 over 16 steps.  At step 12, before the scheduler's step, the rates 4, 3, 2
    and 1 are left: 10, and an interval at the history's mean of 7 needs 14.  One rate earlier there would be 14."""
    model = mlp()
    optimizer = make(model, max_steps=MAX_STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / MAX_STEPS)
    optimizer.lr_scheduler = scheduler
    for step in range(MAX_STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert [event.horizon for event in optimizer.nowcasting.events] == [2, 0]


# -- accelerate -----------------------------------------------------------------------------------------------------


def accelerated(nowcaster=None, accumulate=2, wrap=True):
    """model, optimizer, scheduler and an endless loader, prepared by accelerate."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"period": PERIOD, "horizon": 2, "max_steps": MAX_STEPS}
    optimizer = NiNo(base, model, nowcaster or Line(), **settings) if wrap else base
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MAX_STEPS)
    if wrap:
        optimizer.register_for_checkpointing(accelerator)
    nino = optimizer
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if wrap:
        nino.lr_scheduler = scheduler
    torch.manual_seed(1)
    return accelerator, model, optimizer, scheduler, nino


def run(parts, steps, start=0, save=None):
    """Train from optimizer step ``start`` to ``steps``, two micro-batches each; the states after every step."""
    accelerator, model, optimizer, scheduler, _ = parts
    states, done = {}, start
    for micro in itertools.count(2 * start):
        if done == steps:
            return states
        with accelerator.accumulate(model):
            data = torch.Generator().manual_seed(micro)
            x, y = torch.randn(8, 4, generator=data), torch.randn(8, 2, generator=data)
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            states[done] = parameters(accelerator.unwrap_model(model))
            if save is not None:
                accelerator.save_state(str(save / str(done)))
    return states


def test_accelerate_counts_optimizer_steps_not_micro_steps():
    """Under ``accumulate`` of 2, nowcasts fall on optimizer steps 6 and 12; with a nowcaster that stays, the run
    equals the plain one."""
    parts = accelerated()
    run(parts, MAX_STEPS)
    assert parts[-1].nowcasting.step_count == MAX_STEPS
    assert [event.step for event in parts[-1].nowcasting.events] == [6, 12]
    staying, plain = run(accelerated(Stay()), MAX_STEPS), run(accelerated(wrap=False), MAX_STEPS)
    assert all(same(staying[step], plain[step]) for step in plain)


@pytest.mark.parametrize("nowcaster", [Line, Pull])
def test_accelerate_saves_and_resumes_exactly(tmp_path, nowcaster):
    """``save_state`` and ``load_state`` anywhere in a window continue to the same bits; without pickles of ours."""
    whole = run(accelerated(nowcaster()), MAX_STEPS, save=tmp_path)
    files = {path.name for path in (tmp_path / "5").iterdir()}
    assert {"nino_history.safetensors", "nino_state.json"} <= files
    assert not any(name.startswith("custom_checkpoint") for name in files)
    for step in (3, 4, 6, 7, 12):
        parts = accelerated(nowcaster())
        parts[0].load_state(str(tmp_path / str(step)))
        assert same(run(parts, MAX_STEPS, start=step)[MAX_STEPS], whole[MAX_STEPS]), step


def test_accelerate_loads_a_folder_without_nowcasting_state(tmp_path, caplog):
    """It warms up with one warning instead of failing."""
    whole = run(accelerated(), 7, save=tmp_path)
    for name in ("nino_history.safetensors", "nino_state.json"):
        (tmp_path / "5" / name).unlink()
    parts = accelerated()
    parts[0].load_state(str(tmp_path / "5"))
    parts[-1].nowcasting.step_count = 5
    states = run(parts, 7, start=5)
    assert not same(states[6], whole[6])
    assert sum("warms up" in record.message for record in caplog.records) == 1
