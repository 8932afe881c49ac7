"""A run of several ranks that is resumed equals the uninterrupted one; by other ranks it is divided anew."""

import copy
import json
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, PERIOD, apart, bare_model, drive, own_rows, same, started, used_model, wrapped
from launching import launch
from test_sharded_nowcasts import Foreign, Heard, Spoil, trained

from hf_nino.training import NiNo

pytestmark = pytest.mark.distributed

STEPS = 3 * PERIOD
NOWCASTERS = {
    "linear": lambda: "linear:context=3",
    "momentum": lambda: "momentum",
    "spectral": lambda: "spectral",
    "foreign": Foreign,
}
# Just after a snapshot, before a nowcast, at one and after it.
SAVED = (PERIOD - 1, PERIOD, PERIOD + 3)


def model_of(kind):
    return bare_model(kind) if kind == "alone" else wrapped(kind, bare_model(kind))


def begun(kind, name, place="cpu"):
    return started(model_of(kind), NOWCASTERS[name](), history_device=place)


def _saves(rank, folder, kind, names, place):
    """Go to the end, and save on the way; the states after every step."""
    found = {}
    for name in names:
        nowcasting = begun(kind, name, place)
        states, last = {}, 0
        for step in SAVED:
            states |= drive(nowcasting, last + 1, step)
            nowcasting.save(f"{folder}/{name}-{step}")
            last = step
        found[name] = states | drive(nowcasting, last + 1, STEPS)
        nowcasting.close()
    return found


def _resumes(rank, folder, kind, found, place):
    """Go on from every one of these; the states after every step, whether it was taken over, and what was said."""
    heard, result = Heard(), {}
    for name, states in found.items():
        for step in SAVED:
            nowcasting = begun(kind, name, place)
            nowcasting.store.write(own_rows(nowcasting.store, states[step]))
            nowcasting._begun = False
            taken = nowcasting.load(f"{folder}/{name}-{step}")
            nowcasting.begin(step)
            result[name, step] = taken, drive(nowcasting, step + 1, STEPS), nowcasting.nowcasts
            nowcasting.close()
    return result, heard.lines


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("ddp", "disk"),
        *(pytest.param(kind, "cpu", marks=pytest.mark.slow) for kind in ("ddp", "fsdp2", "fsdp1", "hsdp")),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, kind, place):
    """At the same number of ranks, from any step, bit for bit; each rank has a file of its own, with its own rows."""
    size, place = BACKENDS[kind], f"disk:{tmp_path}/history" if place == "disk" else place
    whole = launch(_saves, size, tmp_path, str(tmp_path), kind, list(NOWCASTERS), place)[0]
    results = launch(_resumes, size, tmp_path, str(tmp_path), kind, whole, place)
    for taken_over, heard in results:
        assert not [line for line in heard if "warms up" in line]
        for (name, step), (taken, states, nowcasts) in taken_over.items():
            assert taken and nowcasts == 3, (name, step)
            assert all(same(whole[name][later], states[later]) for later in states), (name, step)
    folder = tmp_path / f"linear-{PERIOD - 1}"
    stem = "nino_snapshot_2" if place.startswith("disk") else "nino_history"
    files = [folder / f"{stem}-{rank + 1:05d}-of-{size:05d}.safetensors" for rank in range(size)]
    assert all(path.is_file() for path in files) and not (folder / f"{stem}.safetensors").exists()
    one_snapshot = 4 * sum(p.numel() for p in bare_model(kind).parameters() if p.requires_grad)
    snapshots = 1 if place.startswith("disk") else 2
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in files)
    assert sum(path.stat().st_size for path in files) - headers == snapshots * one_snapshot


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        ("fsdp2", "fsdp2", 2),
        ("alone", "ddp", 2),
        pytest.param("ddp", "alone", 1, marks=pytest.mark.slow),
        pytest.param("ddp", "ddp", 3, marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp1-original", 3, marks=pytest.mark.slow),
    ],
)
def test_other_ranks_divide_a_checkpoint_anew(tmp_path, first, second, size):
    """Fewer, more, or otherwise divided ranks read the rows that they need: the run goes on bit for bit as it would
    have, and nothing is said."""
    before = 1 if first == "alone" else BACKENDS[first]
    kinds = {first, second}
    if any("sdp" in kind for kind in kinds) and kinds != {"fsdp2"}:
        first = "fsdp2"  # the parameters that FSDP takes
    names = ["linear", "momentum", "spectral", "foreign"]
    whole = launch(_saves, before, tmp_path, str(tmp_path), first, names, "cpu")[0]
    results = launch(_resumes, size, tmp_path, str(tmp_path), second, whole, "cpu")
    for taken_over, heard in results:
        assert not [line for line in heard if "warms up" in line]
        for (name, step), (taken, states, nowcasts) in taken_over.items():
            assert taken and nowcasts == 3, (name, step)
            for later in states:
                close = same if name in ("linear", "momentum") else lambda a, b: apart(a, b) < 1e-5
                assert close(whole[name][later], states[later]), (name, step, later)


def _broken(rank, folder):
    heard, found = Heard(), {}
    for what, name in (("a file is gone", "linear-7"), ("a file is torn", "linear-4"), ("another run", "linear-3")):
        nowcasting = started(wrapped("ddp", bare_model()), "linear:context=3", interval=1 if "run" in what else None)
        found[what] = nowcasting.load(f"{folder}/{name}"), len(nowcasting.history)
    return found, heard.lines


def test_a_checkpoint_that_one_rank_cannot_read_is_dropped_by_all(tmp_path):
    """With one warning, from the first rank, that says which file and why; then nowcasting warms up."""
    launch(_saves, 2, tmp_path, str(tmp_path), "ddp", ["linear"], "cpu")
    second = "nino_history-00002-of-00002.safetensors"
    (tmp_path / "linear-7" / second).unlink()
    (tmp_path / "linear-4" / second).write_bytes(b"torn")
    path = tmp_path / "linear-3" / "nino_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"interval": 2}))
    (found, heard), (others, silent) = launch(_broken, 2, tmp_path, str(tmp_path))
    assert found == others == dict.fromkeys(found, (False, 0))
    warnings = [line for line in heard if "warms up" in line]
    assert len(warnings) == 3 and not silent
    assert second in warnings[0] and "malformed" in warnings[1] and "interval" in warnings[2]


def _full_disk(rank, folder):
    nowcasting = started(wrapped("ddp", bare_model()), "linear:context=3")
    drive(nowcasting, 1, 3)
    target = Path(folder, "saved")
    if rank == 1:
        target = Path(folder, "a file", "saved")  # no folder can be made there
    with pytest.raises(OSError) as caught:
        nowcasting.save(target)
    return str(caught.value)


def test_a_rank_that_cannot_write_is_an_error_on_all(tmp_path):
    """Nobody goes on as if the checkpoint were whole."""
    (tmp_path / "a file").write_text("")
    first, second = launch(_full_disk, 2, tmp_path, str(tmp_path))
    assert first == second and "rank 1: NotADirectoryError" in first
    assert not (tmp_path / "saved" / "nino_state.json").exists()


def _probation(rank, folder, kind):
    """Interrupted while a nowcast is on probation that will be taken back."""

    def run():
        model = wrapped(kind, used_model())
        base = torch.optim.AdamW(model.parameters(), lr=0.003)
        return model, NiNo(base, model, Spoil(), horizon=4, patience=12)

    model, optimizer = run()
    trained(model, optimizer, 30, rank)
    states = trained(model, optimizer, 35, rank, first=31, worse=3.0)
    optimizer.save(f"{folder}/{kind}")
    moments = copy.deepcopy(optimizer.state_dict())
    states |= trained(model, optimizer, 50, rank, first=36, worse=3.0)
    again, resumed = run()
    resumed.nowcasting.store.write(own_rows(resumed.nowcasting.store, states[35]))
    resumed.load_state_dict(moments)
    taken = resumed.load(f"{folder}/{kind}")
    later = trained(again, resumed, 50, rank, first=36, worse=3.0)
    back = [event.taken_back_to for event in resumed.nowcasting.events]
    return taken, back, all(same(states[step], later[step]) for step in later)


@pytest.mark.parametrize("kind", ["fsdp2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "fsdp1"))])
def test_a_nowcast_on_probation_survives_a_resume(tmp_path, kind):
    """Interrupted between a nowcast and its verdict, with AdamW: the nowcast is taken back all the same, and the run
    equals the uninterrupted one bit for bit."""
    assert launch(_probation, 2, tmp_path, str(tmp_path), kind) == [(True, [30], True)] * 2


def test_a_nowcast_on_probation_stays_when_ranks_change(tmp_path):
    """One process goes on from two: the history is taken over, and what could no longer be put back is forgotten."""
    launch(_probation, 2, tmp_path, str(tmp_path), "ddp")
    optimizer = NiNo(torch.optim.AdamW((model := used_model()).parameters()), model, Spoil(), patience=12)
    assert optimizer.load(tmp_path / "ddp")
    nowcasting = optimizer.nowcasting
    assert (nowcasting.step_count, nowcasting.nowcasts, nowcasting.probation.opened) == (35, 1, None)
