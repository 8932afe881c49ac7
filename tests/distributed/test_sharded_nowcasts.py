"""A nowcast of several ranks is that of one process, and whatever happens on one rank happens on all."""

import copy
import logging
import time
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from backends import (
    BACKENDS,
    PERIOD,
    alone,
    apart,
    bare_model,
    drive,
    every_backend,
    same,
    started,
    used_model,
    whole,
    wrapped,
)
from launching import launch
from torch import nn

from hf_nino.graph import NeuralGraph
from hf_nino.nowcaster import NiNoModel, NowcasterConfig
from hf_nino.nowcaster.base import Nowcaster
from hf_nino.report import RunRecord
from hf_nino.report.record import read_record
from hf_nino.training import InvalidNowcast, NiNo
from hf_nino.training.stores import dtensor

pytestmark = pytest.mark.distributed

STEPS = 2 * PERIOD
EXACT = {"linear": "linear:context=3", "momentum": "momentum"}


class Foreign(Nowcaster):
    """Someone else's: it has a memory, knows nothing of shards, and needs whole states."""

    context, period, max_horizon = 3, PERIOD, 4

    def __init__(self):
        self.anchor = {}

    @property
    def has_memory(self):
        return True

    def settle(self, state):
        self.anchor = {name: tensor.clone() for name, tensor in state.items()}

    def memory(self):
        return dict(self.anchor)

    def load_memory(self, memory):
        self.anchor = dict(memory)

    def nowcast(self, graph, states, horizon):
        assert states[0]["2.weight"].shape[0] == 3  # all rows of it
        return {
            name: last + 0.5 * (last - states[0][name]) + 0.1 * (last - self.anchor[name]).mean()
            for name, last in states[-1].items()
        }


class Failing(Foreign):
    """Does what it is told on rank 1; elsewhere it is in order."""

    def __init__(self, how, rank):
        super().__init__()
        self.how = how if rank == 1 else ""

    def nowcast(self, graph, states, horizon):
        prediction = super().nowcast(graph, states, horizon)
        if self.how == "raises":
            raise OverflowError("out of luck")
        if self.how == "another shape":
            prediction["2.weight"] = prediction["2.weight"][:1]
        if self.how == "nan":
            for tensor in prediction.values():
                tensor.fill_(float("nan"))
        return prediction


class Heard(logging.Handler):
    """What this process logs."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("hf_nino").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


# -- the same nowcast -----------------------------------------------------------------------------------------------


def _nowcasts(rank, kind):
    found, heard = {}, Heard()
    for name, nowcaster in {**EXACT, "spectral": "spectral", "foreign": Foreign()}.items():
        nowcasting = started(wrapped(kind, bare_model(kind)), nowcaster)
        states = drive(nowcasting, 1, STEPS)
        found[name] = {
            "states": states,
            "written": nowcasting.nowcasts,
            "kept": sum(t.numel() for t in nowcasting.nowcaster.memory().values()),
            "norms": [event.relative_step_norm for event in nowcasting.events],
            "reasons": [event.reason for event in nowcasting.events],
        }
    return found | {"heard": heard.lines}


@pytest.mark.parametrize("kind", every_backend())
def test_a_nowcast_of_several_ranks_is_that_of_one_process(tmp_path, kind):
    """On the same states, rule nowcasters write the same bits as on one process, on every rank; spectral ones and
    nowcasters that gather, within rounding.  Each rank carries its own rows alone."""
    results = launch(_nowcasts, BACKENDS[kind], tmp_path, kind)
    for name, nowcaster in {**EXACT, "spectral": "spectral", "foreign": Foreign()}.items():
        expected = alone(kind, nowcaster, STEPS)
        states = [result[name]["states"] for result in results]
        assert [result[name]["reasons"] for result in results] == [["", ""]] * len(results)
        assert {result[name]["written"] for result in results} == {2}
        assert {tuple(result[name]["norms"]) for result in results} == {tuple(results[0][name]["norms"])}
        for step in expected:
            assert all(same(states[0][step], other[step]) for other in states)
            if name in EXACT:
                assert same(expected[step], states[0][step]), (name, step)
            else:
                assert apart(expected[step], states[0][step]) < 1e-5
    total = sum(p.numel() for p in bare_model(kind).parameters() if p.requires_grad)
    assert sum(result["momentum"]["kept"] for result in results) == 2 * total
    assert sum("gathers all snapshots" in line for line in results[0]["heard"]) == 1
    assert not any(result["heard"] for result in results[1:])


# -- one rank's trouble is everyone's -------------------------------------------------------------------------------


def _troubles(rank, kind):
    found = {}
    for how in ("raises", "another shape", "nan"):
        nowcasting = started(wrapped(kind, bare_model(kind)), Failing(how, rank))
        states = drive(nowcasting, 1, PERIOD)
        found[how] = {"states": states, "reason": nowcasting.events[0].reason, "written": nowcasting.nowcasts}
    nowcasting = started(wrapped(kind, bare_model(kind)), "linear:context=3")
    keep = nowcasting.history._place.keep
    if rank == 1:
        nowcasting.history._place.keep = _broken
    states = drive(nowcasting, 1, PERIOD)
    found["no room"] = {"states": states, "reason": nowcasting.events[0].reason, "written": nowcasting.nowcasts}
    nowcasting.history._place.keep = keep
    found["and then"] = drive(nowcasting, PERIOD + 1, STEPS) and nowcasting.nowcasts
    nowcasting = started(wrapped(kind, bare_model(kind)), Failing("raises", rank), on_invalid="raise")
    with pytest.raises(InvalidNowcast) as caught:
        drive(nowcasting, 1, PERIOD)
    found["error"] = str(caught.value)
    # A loss that one rank cannot measure.
    nowcasting = started(wrapped(kind, bare_model(kind)), "linear:context=3", measure=lambda: 1.0 / (1 - rank))
    drive(nowcasting, 1, PERIOD)
    found["measured"] = nowcasting.events[0].loss_before
    nowcasting = started(wrapped(kind, bare_model(kind)), "linear:context=3", measure=lambda: float(rank))
    drive(nowcasting, 1, PERIOD)
    found["mean"] = nowcasting.events[0].loss_before
    return found


def _broken(state, step):
    raise MemoryError("no room")


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_what_fails_on_one_rank_is_skipped_on_all(tmp_path, kind):
    """A rank that raises, predicts another shape or NaN, or cannot keep a snapshot: nobody hangs or writes, all give
    the same reason, and the parameters stay the same bits."""
    first, second = launch(_troubles, 2, tmp_path, kind)
    expected = {
        "raises": "rank 1: Failing failed (OverflowError: out of luck)",
        "another shape": "rank 1: the prediction of '2.weight' has shape (1, ",
        "nan": "not finite",
        "no room": f"rank 1: the history failed (OSError: the snapshot of step {PERIOD - 2} could not be kept",
    }
    for how, reason in expected.items():
        assert reason in first[how]["reason"] and first[how]["reason"] == second[how]["reason"]
        assert first[how]["written"] == second[how]["written"] == 0
        assert all(same(first[how]["states"][step], second[how]["states"][step]) for step in first[how]["states"])
    assert first["and then"] == second["and then"] == 1
    assert first["error"] == second["error"] and "out of luck" in first["error"]
    assert first["measured"] is second["measured"] is None
    assert first["mean"] == second["mean"] == 0.5


STAGES = {
    "preparing": "hf_nino.nowcaster.sharded.portion_of",
    "messages": "hf_nino.nowcaster.passes.Passes._received",
    "predicting": "hf_nino.nowcaster.passes.Passes.write",
    "judging": "hf_nino.training.attempt.judge",
}


def network_and_graph():
    torch.manual_seed(5)
    return NiNoModel(NowcasterConfig(hidden_size=16, context=3)), NeuralGraph.from_model(
        used_model(), torch.ones(1, 5)
    )


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _runs_out_of_memory(rank, kind):
    """Rank 1 has no memory for two nowcasts, and then it has."""
    found, heard = {}, Heard()
    for stage, where in STAGES.items():
        network, graph = network_and_graph()
        nowcasting = started(wrapped(kind, used_model()), network, graph=graph)
        with patch(where, out_of_memory) if rank == 1 else nullcontext():
            states = drive(nowcasting, 1, STEPS)
        states |= drive(nowcasting, STEPS + 1, STEPS + PERIOD + 1)
        events = [(event.accepted, event.reason) for event in nowcasting.events]
        found[stage] = {"states": states, "events": events, "heard": list(heard.lines)}
        heard.lines.clear()
    return found


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_rank_without_memory_skips_the_nowcast_with_the_others(tmp_path, kind):
    """A rank that runs out of memory at any stage of a network's nowcast on shards: all skip it, in much less than the
    time-out, say so once, and train on with the same parameters; the next nowcast that finds memory is written."""
    first, second = launch(_runs_out_of_memory, 2, tmp_path, kind)
    reason = "rank 1: NiNoModel ran out of memory (OutOfMemoryError: CUDA out of memory)"
    for stage in STAGES:
        assert first[stage]["events"] == second[stage]["events"] == [(False, reason)] * 2 + [(True, "")]
        assert all(same(state, second[stage]["states"][step]) for step, state in first[stage]["states"].items())
        assert sum(reason in line for line in first[stage]["heard"]) == 1 and not second[stage]["heard"]


def fails_once(function, at):
    """The function; but its call number ``at`` runs out of memory."""
    calls = 0

    def failing(*args):
        nonlocal calls
        calls += 1
        return out_of_memory() if calls == at else function(*args)

    return failing


def _fails_at_the_model(rank, kind):
    """At its first nowcast rank 1 has no memory to read, or to write, one of its parameters."""
    found, heard = {}, Heard()
    # Where parameters lie still: the second one.  Where they travel: what is told before the others begin.
    holder = dtensor.LocalRows if kind == "fsdp2" else dtensor.Turned if kind == "tp" else dtensor.Gathered
    for what in ("read", "write"):
        nowcasting = started(wrapped(kind, used_model(8)), "linear:context=3")
        read_before = sum(one.travels for one in nowcasting.store._holders().values()) if what == "write" else 0
        where, which = (what, 2) if kind == "fsdp2" else ("reserve", read_before + 1)
        states, whole_step = drive(nowcasting, 1, PERIOD - 1), nowcasting.step
        failing = fails_once(getattr(holder, where), which if rank == 1 else 0)
        nowcasting.step = partial(within, holder, where, failing, whole_step)
        states |= drive(nowcasting, PERIOD, PERIOD)
        nowcasting.step = whole_step
        states |= drive(nowcasting, PERIOD + 1, STEPS)
        events = [(event.step, event.accepted, event.reason) for event in nowcasting.events]
        found[what] = {"states": states, "events": events, "heard": list(heard.lines)}
        heard.lines.clear()
    late = started(wrapped(kind, used_model(8)), "linear:context=3", start_step=PERIOD)
    return found | {"late": drive(late, 1, STEPS)}


def within(holder, what, failing, step):
    with patch.object(holder, what, failing):
        return step()


@pytest.mark.parametrize("kind", ["fsdp2", "tp", pytest.param("fsdp2-tp", marks=pytest.mark.slow)])
def test_a_rank_that_cannot_read_or_write_its_parameters_skips_the_nowcast_with_the_others(tmp_path, kind):
    """In the middle of it, where parameters lie still and where they travel: nobody waits, what was written is put
    back, all train on as if that nowcast had not been, and the next one is written."""
    results = launch(_fails_at_the_model, BACKENDS[kind], tmp_path, kind)
    for found in results:
        assert [(step, accepted) for step, accepted, _ in found["write"]["events"]] == [(PERIOD, False), (STEPS, True)]
        assert "could not be written: rank 1: LinearNowcaster ran out of memory" in found["write"]["events"][0][2]
        assert [(step, accepted) for step, accepted, _ in found["read"]["events"]] == [(STEPS, True)]
        for what in ("read", "write"):
            assert all(same(state, found["late"][step]) for step, state in found[what]["states"].items())
    heard = [sum("memory" in line for line in found["read"]["heard"]) for found in results]
    assert heard == [1] + [0] * (len(results) - 1)


def _waits(rank):
    """As above, if ranks did not tell each other on the way."""
    network, graph = network_and_graph()
    nowcasting = started(wrapped("ddp", used_model()), network, graph=graph)
    nowcasting.store.ranks.together = nullcontext
    with (
        patch(STAGES["messages"], out_of_memory) if rank == 1 else nullcontext(),
        pytest.raises(RuntimeError) as caught,
    ):
        drive(nowcasting, 1, PERIOD)
    dist.destroy_process_group()
    return str(caught.value)


@pytest.mark.slow
def test_without_votes_ranks_would_wait_for_each_other(tmp_path):
    """Negative control: the run ends with the backend's time-out, about which it says so much."""
    first, second = launch(_waits, 2, tmp_path, timeout=5)
    assert "not here within the process group's time-out of 5 s" in first and "ran out of memory" not in second


def _dear(rank):
    """Nowcasts are dear on rank 1 alone, by its own clock."""
    heard = Heard()
    with patch("hf_nino.training.overhead.LARGE", 1):
        nowcasting = started(wrapped("ddp", bare_model()), "momentum", max_overhead=1e6)
    drive(nowcasting, 1, 2 * PERIOD)
    nowcasting.overhead._cost = 1e12 if rank else 1e-9  # seconds
    drive(nowcasting, 2 * PERIOD + 1, 3 * PERIOD)
    nowcasting.overhead._cost = 1e-9
    states = drive(nowcasting, 3 * PERIOD + 1, 4 * PERIOD)
    return {"steps": [event.step for event in nowcasting.events], "state": states[4 * PERIOD], "heard": heard.lines}


def test_a_nowcast_that_is_too_dear_for_one_rank_waits_on_all(tmp_path):
    """Clocks differ; nowcasts are at the same steps on all ranks, and the first rank says why one waits.  None is made
    before the first rank has found out what it takes, after 8 steps; of that nothing is said."""
    first, second = launch(_dear, 2, tmp_path)
    assert first["steps"] == second["steps"] == [2 * PERIOD, 4 * PERIOD]
    assert same(first["state"], second["state"])
    assert sum("Fewer nowcasts: rank 1: a nowcast takes 1e+12 s" in line for line in first["heard"]) == 1
    assert not any("not known yet" in line for line in first["heard"] + second["heard"])


def _slow(rank):
    heard = Heard()
    nowcasting = started(wrapped("ddp", bare_model()), "linear:context=3")
    drive(nowcasting, 1, PERIOD)
    nowcasting._longest = 40.0 if rank else 0.0  # seconds
    drive(nowcasting, PERIOD + 1, 3 * PERIOD)
    return {"events": [event.reason for event in nowcasting.events], "heard": heard.lines}


def test_a_nowcast_that_could_outlast_the_time_out_is_not_begun(tmp_path):
    """If one took more than half of the time-out on any rank, further ones are skipped on all, which is said once,
    with the time-out and what to do."""
    first, second = launch(_slow, 2, tmp_path, timeout=60)
    assert first["events"] == second["events"] and first["events"][0] == ""
    assert "40 s, more than half of the process group's time-out of 60 s" in first["events"][1]
    assert sum("time-out of 60 s" in line for line in first["heard"]) == 1 and not second["heard"]


def _dies(rank, folder):
    nowcasting = started(wrapped("ddp", bare_model()), "linear:context=3")
    if rank == 1:
        dist.destroy_process_group()
        return "gone"  # as if it had been killed: it leaves the group
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="one has ended"):
        drive(nowcasting, 1, PERIOD)
    dist.destroy_process_group()
    return time.monotonic() - begun


def test_a_rank_that_dies_is_an_error_and_not_a_hang(tmp_path):
    """The others get an error within the time-out, which says what it may be."""
    seconds, _ = launch(_dies, 2, tmp_path, str(tmp_path), timeout=10)
    assert seconds < 30


# -- taking back ----------------------------------------------------------------------------------------------------


class Spoil(Nowcaster):
    """Ruins the model."""

    context, period, max_horizon, works_on_shards = 3, 30, 4, True

    def nowcast(self, graph, states, horizon, *, shards=None):
        return {name: last + 5 * (last - states[0][name]) for name, last in states[-1].items()}


def trained(model, optimizer, steps, rank, first=1, tell=True, accumulate=1, worse=0.0):
    """States after each step; ranks but the first say that their loss is ``worse``."""
    states = {}
    for step in range(first, steps + 1):
        optimizer.zero_grad()
        for micro in range(accumulate):
            data = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            x = torch.randn(8, 5, generator=data)
            loss = nn.functional.mse_loss(model(x), x[:, :3] * 0.5) / accumulate
            loss.backward()
            if tell:
                optimizer.record_loss(loss + worse * rank)
        optimizer.step()
        states[step] = whole(optimizer.nowcasting.store)
    return states


def _taken_back(rank, kind):
    model = wrapped(kind, used_model())
    optimizer = NiNo(
        torch.optim.AdamW(model.parameters(), lr=0.003),
        model,
        Spoil(),
        horizon=4,
        patience=12,
        max_failures=1,
    )
    kept, undo = [], optimizer.nowcasting.undo
    states = trained(model, optimizer, 30, rank)
    kept = sum(t.numel() for name, t in undo.tensors().items() if name.startswith(("parameter/", "state/")))
    state = copy.deepcopy(optimizer.base_optimizer.state_dict()["state"])
    states |= trained(model, optimizer, 42, rank, first=31, worse=3.0)
    back = copy.deepcopy(optimizer.base_optimizer.state_dict()["state"])
    moments = all(
        torch.equal(_local(value), _local(back[p][key])) for p, entry in state.items() for key, value in entry.items()
    )
    states |= trained(model, optimizer, 45, rank, first=43)
    events = [(event.step, event.taken_back_to) for event in optimizer.nowcasting.events]
    stopped = optimizer.nowcasting.stopped
    return {"states": states, "events": events, "moments": moments, "kept": kept, "stopped": stopped}


def _local(value):
    return value.to_local() if hasattr(value, "to_local") else value


@pytest.mark.parametrize("kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp2", "fsdp1"))])
def test_ranks_take_a_nowcast_back_together(tmp_path, kind):
    """One rank alone sees how bad it was, and the decision is the same everywhere, and so is that there are no more;
    parameters and moments are the bits from before, and of what is kept for that each rank has its share."""
    results = launch(_taken_back, 2, tmp_path, kind)
    total = sum(p.numel() for p in used_model().parameters())
    for found in results:
        assert found["events"] == [(30, None), (42, 30)] and found["moments"] and found["stopped"]
        assert all(same(found["states"][step], results[0]["states"][step]) for step in found["states"])
    states = results[0]["states"]
    assert not same(states[30], states[42]) and apart(states[29], states[42]) < 0.05 < apart(states[29], states[30])
    counters = sum(found["kept"] for found in results) - 3 * total
    assert 0 <= counters <= 2 * 8  # step counts of every parameter


# -- what training adds ---------------------------------------------------------------------------------------------


def _policies(how):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    if how == "mixed precision":
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    return {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if how == "offload" else {}


def _trains(rank, how):
    model = used_model()
    if how == "checkpointing":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model[2] = checkpoint_wrapper(model[2])
    if how == "compile":
        model = torch.compile(model, backend="eager")
    model = wrapped("ddp" if how in ("accumulation", "compile") else "fsdp2", model, **_policies(how))
    base = torch.optim.AdamW(model.parameters(), lr=0.003)
    optimizer = NiNo(base, model, "linear:context=3", period=PERIOD, horizon=1, patience=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        states = trained(model, optimizer, STEPS, rank, accumulate=2 if how == "accumulation" else 1)
    nowcasting = optimizer.nowcasting
    return {"states": states, "nowcasts": nowcasting.nowcasts, "signature": nowcasting.store.signature()}


@pytest.mark.parametrize("how", ["autocast", "accumulation", "checkpointing", "compile", "mixed precision", "offload"])
def test_training_as_people_train(tmp_path, how):
    """bf16 autocast, gradient accumulation, activation checkpointing, compiled models, FSDP's own mixed precision and
    its offload to the host: nowcasts come when due, of float32 parameters under the bare model's names, and ranks stay
    together."""
    first, second = launch(_trains, 2, tmp_path, how)
    assert {(name, dtype) for name, _, dtype in first["signature"]} == {
        (name, "torch.float32") for name, _ in used_model().named_parameters()
    }
    assert first["nowcasts"] == second["nowcasts"] == 2
    assert all(same(first["states"][step], second["states"][step]) for step in first["states"])


SKIPPED = 3


def _scales(rank, kind):
    """float16 autocast with a scaler that skips step 3, whose gradient is infinite on rank 1."""
    model = wrapped(kind, used_model())
    base = torch.optim.AdamW(model.parameters(), lr=0.003)
    optimizer = NiNo(base, model, "linear:context=3", period=PERIOD, horizon=1, patience=0)
    scaler, states = torch.amp.GradScaler("cpu", init_scale=256.0), {}
    for step in range(1, STEPS + 2):
        optimizer.zero_grad()
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), x[:, :3] * 0.5)
        scaler.scale(loss * (float("inf") if step == SKIPPED and rank else 1.0)).backward()
        optimizer.record_loss(loss)
        scaler.step(optimizer)
        scaler.update()
        states[step] = whole(optimizer.nowcasting.store)
    nowcasting = optimizer.nowcasting
    return {
        "states": states,
        "count": nowcasting.step_count,
        "events": [(event.step, event.accepted) for event in nowcasting.events],
        "scale": scaler.get_scale(),
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_steps_that_a_scaler_skips_do_not_count_on_any_rank(tmp_path, kind):
    """An infinite gradient on one rank: all of them skip the step, count the others alone, and nowcast when these make
    a period."""
    first, second = launch(_scales, 2, tmp_path, kind)
    for found in (first, second):
        assert found["count"] == STEPS and found["scale"] == 128.0
        assert found["events"] == [(PERIOD, True), (2 * PERIOD, True)]
        assert same(found["states"][SKIPPED - 1], found["states"][SKIPPED])
        assert not same(found["states"][SKIPPED], found["states"][SKIPPED + 1])
    assert all(same(first["states"][step], second["states"][step]) for step in first["states"])


def _records(rank, folder, records):
    """How often rows travel in a run whose warm-up ends after one period, and the record of it."""
    nowcasting = started(wrapped("fsdp1", bare_model("fsdp1")), f"linear:context={PERIOD}", start_step=PERIOD)
    ranks, step, travels = nowcasting.store.ranks, nowcasting.step, []
    exchange, record = ranks.exchange, RunRecord(folder, writes=rank == 0)

    def recorded():
        record.before(nowcasting)
        record.after(nowcasting, step())

    ranks.exchange = lambda *tensors: travels.append(0) or exchange(*tensors)
    if records:
        record.begin(nowcasting)
        nowcasting.step = recorded
    drive(nowcasting, 1, 3 * PERIOD)
    return len(travels), len(read_record(record.path)) if records and rank == 0 else 0


def test_the_record_of_a_run_moves_no_rows_that_training_does_not_move(tmp_path):
    """On FSDP1, where parameters travel to be read: once at the start, and at the steps of the warm-up that the path
    shows; never where training takes a snapshot or nowcasts."""
    plain = launch(_records, 2, tmp_path, str(tmp_path / "run"), False)
    recorded = launch(_records, 2, tmp_path, str(tmp_path / "run"), True)
    # An interval is one step.
    assert [found[0] for found in recorded] == [found[0] + 1 + PERIOD for found in plain]
    assert recorded[0][1] >= 2 + 3 * PERIOD + 2 and recorded[1][1] == 0


def _losses(rank):
    """Rank 1 does not tell its losses."""
    model = wrapped("ddp", used_model())
    base = torch.optim.AdamW(model.parameters(), lr=0.003)
    optimizer = NiNo(base, model, "linear:context=3", period=30, horizon=1, patience=12)
    trained(model, optimizer, 45, rank, tell=rank == 0)
    return optimizer.nowcasting.nowcasts, optimizer.nowcasting.losses.read()


def test_losses_that_one_rank_alone_tells_are_not_used(tmp_path):
    """A loop that records its loss on the first rank only is not watched, and does not hang."""
    assert launch(_losses, 2, tmp_path) == [(1, []), (1, [])]
