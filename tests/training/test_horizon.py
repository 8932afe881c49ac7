"""How far to look ahead, and what the learning rate will be."""

import itertools

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from training_helpers import mlp
from transformers import get_scheduler

from hf_nino.training import Horizon, Trust
from hf_nino.training.horizon import budget_horizon, paper_horizons
from hf_nino.training.learning_rate import UnforeseeableSchedule, foresee, future_learning_rates, warmup_steps

STEPS = 60


def make_optimizer(groups=1):
    parameters = list(mlp().parameters())
    split = [parameters[i::groups] for i in range(groups)]
    return torch.optim.AdamW([{"params": p, "lr": 1e-2 / (i + 1)} for i, p in enumerate(split)])


def sequential(optimizer):
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=20), schedulers.CosineAnnealingLR(optimizer, STEPS - 20)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[20])


SCHEDULES = {
    "cosine": lambda o: get_scheduler("cosine", o, 10, STEPS),
    "linear": lambda o: get_scheduler("linear", o, 10, STEPS),
    "constant": lambda o: get_scheduler("constant", o),
    "polynomial": lambda o: get_scheduler("polynomial", o, 10, STEPS),
    "inverse_sqrt": lambda o: get_scheduler("inverse_sqrt", o, 10),
    "warmup_stable_decay": lambda o: get_scheduler(
        "warmup_stable_decay", o, 10, STEPS, scheduler_specific_kwargs={"num_decay_steps": 20}
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=STEPS),
    "StepLR": lambda o: schedulers.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 30]),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=9), schedulers.ExponentialLR(o, 0.97)]
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=7, cycle_momentum=False),
}


def advance(optimizer, scheduler):
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("done", [0, 25])
def test_the_dry_run_foresees_the_learning_rates_and_touches_nothing(kind, done):
    """The rates foreseen are, to the last bit, those that the real scheduler then sets; nothing real has changed."""
    optimizer = make_optimizer(groups=2)
    scheduler = SCHEDULES[kind](optimizer)
    for _ in range(done):
        advance(optimizer, scheduler)
    rates_now, last_now = [group["lr"] for group in optimizer.param_groups], scheduler.get_last_lr()
    state = str(scheduler.state_dict())
    foreseen = list(itertools.islice(future_learning_rates(scheduler, stepped=True), STEPS - done))
    later = list(itertools.islice(future_learning_rates(scheduler, stepped=False), STEPS - done - 1))
    assert (rates_now, last_now) == ([group["lr"] for group in optimizer.param_groups], scheduler.get_last_lr())
    assert str(scheduler.state_dict()) == state
    real = []
    for _ in range(STEPS - done):
        real.append(tuple(group["lr"] for group in optimizer.param_groups))
        if len(real) < STEPS - done:
            advance(optimizer, scheduler)
    assert foreseen == real
    assert later == real[1:], "before the scheduler's step, the first rate to come is the one that it will set"


def test_the_dry_run_copies_neither_parameters_nor_state():
    """The copy of the scheduler holds an optimizer without parameters, whatever the scheduler's functions refer to."""
    optimizer = make_optimizer()

    class Owner:
        def __init__(self):
            self.optimizer = optimizer

        def factor(self, step):
            return 1 / (1 + step)

        def __deepcopy__(self, memo):
            raise AssertionError("the owner of a schedule was copied")

    scheduler = schedulers.LambdaLR(optimizer, Owner().factor)
    rates = [rate for (rate,) in itertools.islice(future_learning_rates(scheduler, stepped=True), 3)]
    assert rates == pytest.approx([1e-2, 1e-2 / 2, 1e-2 / 3])


def test_schedules_that_depend_on_training_are_said_once_and_taken_as_constant():
    """``ReduceLROnPlateau`` cannot be foreseen: the rate of now is used, and the reason is told."""
    optimizer = make_optimizer()
    scheduler = schedulers.ReduceLROnPlateau(optimizer)
    with pytest.raises(UnforeseeableSchedule, match="ReduceLROnPlateau"):
        next(future_learning_rates(scheduler))
    said = []
    rates = list(itertools.islice(foresee(scheduler, optimizer, say=said.append), 5))
    assert rates == [(1e-2,)] * 5
    assert len(said) == 1 and "ReduceLROnPlateau" in said[0]


def test_one_cycle_ends_where_its_steps_end():
    """A schedule that ends by itself yields no rates beyond its end."""
    optimizer = make_optimizer()
    scheduler = schedulers.OneCycleLR(optimizer, 1e-2, total_steps=20)
    assert len(list(future_learning_rates(scheduler, stepped=True))) == 20


@pytest.mark.parametrize(
    ("warmup", "kind"), [(0, "linear"), (10, "linear"), (10, "cosine"), (10, "constant_with_warmup")]
)
def test_the_end_of_the_warmup_is_where_the_rate_stops_rising(warmup, kind):
    """It equals the schedule's own number of warm-up steps."""
    scheduler = get_scheduler(kind, make_optimizer(), warmup, STEPS)
    rates = (rate for (rate,) in itertools.islice(future_learning_rates(scheduler, stepped=True), STEPS))
    assert warmup_steps(rates) == warmup


@pytest.mark.parametrize(("rates", "end"), [([1, 1, 1], 0), ([0, 0, 1, 1, 2, 2, 1, 5], 4), ([3, 2, 9], 0), ([], 0)])
def test_warmup_of_odd_schedules(rates, end):
    """Plateaus on the way up belong to the warm-up; what rises after a fall does not."""
    assert warmup_steps(rates) == end


def test_paper_horizons_are_the_published_ones():
    """Ten nowcasts of at most 40 intervals: 40 33 26 21 16 11 8 5 3 1; fifteen as in the release."""
    assert paper_horizons(40, 10) == [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    assert paper_horizons(40, 15) == [40, 35, 31, 27, 23, 20, 16, 13, 11, 8, 6, 5, 3, 2, 1]
    policy = Horizon("paper")
    steps = range(1000, 10_001, 1000)
    found = [policy.now(step=s, period=1000, interval=200, max_horizon=40, max_steps=10_000) for s in steps]
    assert found == paper_horizons(40, 10)


def test_the_budget_under_a_constant_rate_is_what_is_left_of_the_run():
    """With a constant rate the horizon is the remaining steps over the interval, rounded down, at most the maximum."""
    for remaining, expected in ((0, 0), (9, 0), (10, 1), (39, 3), (40, 4), (400, 4)):
        assert budget_horizon([(0.3,)] * remaining, (0.3,), 10, 4) == expected


def test_the_budget_never_exceeds_the_learning_rate_that_is_left():
    """Under a linear decay, horizon x interval x mean rate stays within the sum of future rates; one more does not."""
    rates = [1 - step / 100 for step in range(100)]
    shrunk = 0
    for step in range(20, 100, 5):
        past, future = sum(rates[step - 20 : step]) / 20, [(rate,) for rate in rates[step:]]
        horizon = budget_horizon(future, (past,), 5, 40)
        left = sum(rates[step:])
        assert horizon * 5 * past <= left + 1e-6 < (horizon + 1) * 5 * past
        shrunk += horizon < (100 - step) // 5
    assert shrunk > 10, "a constant rate would have allowed more"


def test_the_most_restricted_group_decides_and_groups_at_rest_are_not_asked():
    """Two groups: the horizon is that of the one with less to come; a group at learning rate 0 does not count."""
    future = [(1.0, 0.1, 0.5)] * 100
    assert budget_horizon(future, (1.0, 1.0, 0.0), 10, 40) == 1
    assert budget_horizon(future, (1.0, 0.1, 0.0), 10, 40) == 10
    assert budget_horizon(future, (0.0, 0.0, 0.0), 10, 40) == 0


def test_a_number_is_taken_at_its_word_within_the_nowcasters_reach():
    """``horizon=8`` is 8, also from a command line, and never beyond ``max_horizon``."""
    where = {"step": 10, "period": 10, "interval": 2}
    assert Horizon(8).now(**where, max_horizon=40) == Horizon("8").now(**where, max_horizon=40) == 8
    assert Horizon(8).now(**where, max_horizon=4) == 4
    assert Horizon("constant:8") == Horizon(8)


@pytest.mark.parametrize("policy", ["budget", "constant", "constant:0", 0, -1, 1.5, True, "0", None])
def test_bad_policies_are_refused(policy):
    """Anything but the two names and whole numbers from 1 raises and names the argument."""
    with pytest.raises(ValueError, match="`horizon` must be"):
        Horizon(policy)


def test_adaptive_follows_the_budget_and_what_nowcasts_brought():
    """Its own horizon is the budget's; trust begins at a half, grows when nowcasts pay off, up to the whole, and falls
    when they do not."""
    rates = {"past": (1.0,), "future": [(1.0,)] * 100}
    where = {"step": 10, "period": 10, "interval": 5, "max_horizon": 40}
    assert Horizon("adaptive").now(**where, **rates) == Horizon("lr-budget").now(**where, **rates) == 20
    trust = Trust(adaptive=True)
    assert trust.reach(20) == (10, 1.0)
    trust.kept(None)
    assert trust.reach(20) == (10, 1.0)
    trust.kept(True)
    assert trust.reach(20) == (15, 1.0)
    trust.kept(True)
    assert trust.reach(20) == (20, 1.0)
    for _ in range(40):
        trust.kept(False)
    assert 0 < trust.share < 0.1


def test_below_one_interval_the_step_gets_shorter():
    """Halved from 4 intervals: 2, 1, then half and a quarter of the step to the first; passing doubles it again."""
    trust, found = Trust(adaptive=False), []
    for _ in range(4):
        trust.taken_back()
        found.append(trust.reach(4))
    assert found == [(2, 1.0), (1, 1.0), (1, 0.5), (1, 0.25)]
    for _ in range(9):
        trust.kept(None)
    assert trust.reach(4) == (4, 1.0) and trust.reach(0) == (0, 1.0)
