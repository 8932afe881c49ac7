"""Nowcasts stay within their share of training time where they are dear, and are left alone elsewhere."""

import time

import pytest
import torch
from training_helpers import MAX_STEPS, PERIOD, Line, Pull, RawLoop, same

from hf_nino import NiNo, NiNoTrainingArguments
from hf_nino.training import announcement
from hf_nino.training import overhead as overhead_module
from hf_nino.training.overhead import Overhead


class Clock:
    """Time that passes as it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(overhead_module.time, "perf_counter", lambda: self.now)


def simulate(clock, limit, steps, period=10, cost=2.0, step_seconds=1.0, parameters=10**7, evaluation=0.0, told=0.0):
    """Steps at which nowcasts are made, and what is spent on them."""
    overhead, spent, made = Overhead(limit, parameters), 0.0, []
    for step in range(1, steps + 1):
        clock.now += step_seconds + (evaluation if step % 100 == 0 else 0.0)
        overhead.tick(spent)
        if step % period == 0 and not overhead.too_dear(step, spent, None if step < 15 and told else told):
            clock.now += cost
            spent += cost
            overhead.nowcast_made(spent)
            made.append(step)
    return made, spent


def test_what_is_spent_stays_below_the_limit(monkeypatch):
    """A nowcast that takes as long as 2 steps is made at once, and then every 200 steps for 1%, every 40 for 5%; what
    is spent is at most that share of the steps' time at every nowcast but the first.  Without a limit, with a loose
    one, and in a small model, every period has one."""
    clock = Clock(monkeypatch)
    for limit, apart in ((0.01, 200), (0.05, 40)):
        made, spent = simulate(clock, limit, 1000)
        assert made == [10, *range(2 * apart, 1001, apart)]
        assert spent <= limit * 1000
    every = list(range(10, 1001, 10))
    assert simulate(clock, None, 1000)[0] == simulate(clock, 0.2, 1000)[0] == every
    assert simulate(clock, 0.01, 1000, parameters=10**7 - 1)[0] == every


def test_the_first_one_waits_as_well_where_its_cost_is_expected(monkeypatch):
    """What is spent is at most 1% of the time at every nowcast, if the first one was told right; none is made before
    anything is known."""
    clock = Clock(monkeypatch)
    assert simulate(clock, 0.01, 1000, told=2.0)[0] == list(range(200, 1001, 200))
    assert simulate(clock, 0.01, 1000, told=1.0)[0] == [100, *range(400, 1001, 200)]
    assert simulate(clock, 0.01, 1000, cost=0.09, told=0.09)[0] == list(range(20, 1001, 10))
    assert simulate(clock, 0.01, 1000, cost=0.09)[0] == list(range(10, 1001, 10))


def test_cheap_nowcasts_do_not_wait(monkeypatch):
    """0.09 s in 10 steps of 1 s are below 1%, 0.11 s are not."""
    clock = Clock(monkeypatch)
    assert len(simulate(clock, 0.01, 1000, cost=0.09)[0]) == 100
    assert 80 < len(simulate(clock, 0.01, 1000, cost=0.11)[0]) < 100


def test_evaluations_are_no_training_time(monkeypatch):
    """Half of the time goes into evaluations: as many nowcasts as without them."""
    clock = Clock(monkeypatch)
    assert simulate(clock, 0.01, 1000, evaluation=100.0) == simulate(clock, 0.01, 1000)


def test_it_goes_on_after_a_checkpoint(monkeypatch):
    """Saved and loaded in the middle, the same nowcasts are made; forgotten, it begins anew."""
    clock = Clock(monkeypatch)
    first = Overhead(0.01, 10**7)
    for _ in range(30):
        clock.now += 1.0
        first.tick(0.0)
    clock.now += 2.0
    first.nowcast_made(2.0)
    second = Overhead(0.01, 10**7)
    second.load(first.state())
    assert second.step_seconds == 1.0
    assert second.too_dear(390, 2.0) == first.too_dear(390, 2.0) != ""
    assert second.too_dear(400, 2.0) == first.too_dear(400, 2.0) == ""
    second.forget()
    assert second.too_dear(40, 0.0) == ""


class Slow(Pull):
    """Takes its time."""

    def nowcast(self, *args, **kwargs):
        time.sleep(0.05)
        return super().nowcast(*args, **kwargs)


class SlowLine(Line):
    """Likewise, without a memory."""

    def nowcast(self, *args, **kwargs):
        time.sleep(0.05)
        return super().nowcast(*args, **kwargs)


@pytest.mark.parametrize("nowcaster", [Slow, SlowLine])
def test_a_run_has_fewer_nowcasts_and_says_why_once(nowcaster, monkeypatch, caplog):
    """Where they are dearer than steps there are none, and one message that names the argument; with `None`, and in
    small models, there are all; with a loose limit all but the one before their cost is known."""
    every = MAX_STEPS // PERIOD
    assert made(nowcaster()) == every
    monkeypatch.setattr(overhead_module, "LARGE", 1)
    caplog.clear()
    assert made(nowcaster()) == 0
    assert sum("`max_overhead`" in record.message for record in caplog.records) == 1
    assert made(nowcaster(), max_overhead=None) == every
    assert made(nowcaster(), max_overhead=1000.0) == every - 1


def made(nowcaster, **options):
    loop = RawLoop(nowcaster, **options)
    loop.run(MAX_STEPS)
    return loop.optimizer.nowcasting.nowcasts


def test_waiting_changes_nothing_else(monkeypatch):
    """A run whose nowcasts wait is the run that has none; where nobody can say what the first one takes, it is made,
    and the run is the one that has only that."""
    monkeypatch.setattr(overhead_module, "LARGE", 1)
    none = RawLoop(SlowLine()).run(MAX_STEPS)
    monkeypatch.setattr(announcement, "calibrate", cannot)
    one = RawLoop(SlowLine()).run(MAX_STEPS)
    monkeypatch.undo()
    assert same(none, RawLoop(SlowLine(), start_step=MAX_STEPS).run(MAX_STEPS))
    assert same(one, RawLoop(SlowLine(), start_step=PERIOD, stop_step=2 * PERIOD).run(MAX_STEPS))
    assert not same(one, none) and not same(one, RawLoop(SlowLine()).run(MAX_STEPS))


def cannot(*args, **kwargs):
    raise RuntimeError("no clock")


@pytest.mark.parametrize("limit", [0, -0.1, float("nan"), float("inf"), True, "0.01"])
def test_a_limit_that_is_none_is_refused(limit, tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`max_overhead` must be a share"):
        NiNo(torch.optim.SGD(model.parameters(), 0.1), model, "linear", max_overhead=limit)
    with pytest.raises(ValueError, match="`nowcast_max_overhead` must be a share"):
        NiNoTrainingArguments(str(tmp_path), nowcast_max_overhead=limit)
