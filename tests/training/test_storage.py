"""Where snapshots live: on the device, in host memory, on the disk; and what is left when a process is killed."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import (
    MAX_STEPS,
    Line,
    RawLoop,
    callback_trainer,
    mlp,
    nino_trainer,
    nowcasting,
    parameters,
    same,
)

from hf_nino.training import History, NiNoTrainingArguments, disk, make_store, snapshot_file, storage
from hf_nino.training.snapshot_file import TornSnapshot, map_snapshot, verify_snapshot, write_snapshot
from hf_nino.training.storage import HostPlace, Place, as_dtype, make_place, pack

PLACES = ("cpu", "model", "device", "disk")
TORN = {
    "a byte short": lambda data: data[:-1],
    "cut in the header": lambda data: data[:40],
    "empty": lambda data: b"",
    "a byte long": lambda data: data + b"\0",
    "a bit of a value": lambda data: flipped(data, len(data) - 3),
    "a bit of a name": lambda data: flipped(data, data.index(b"0.weight")),
    "a bit of the checksum": lambda data: flipped(data, data.index(b'crc32":"') + 9),
    "no snapshot": lambda data: b"{" * len(data),
}


def where(place, folder):
    return f"disk:{folder / 'history'}" if place == "disk" else place


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def odd_state():
    """No elements, one element without axes, a transposed view, an odd number of odd numbers."""
    torch.manual_seed(0)
    tensors = {
        "none": torch.zeros(0, 3),
        "one": torch.tensor(1.5),
        "turned": torch.randn(3, 5).t(),
        "odd": torch.tensor([torch.pi, -0.0, float("inf"), 1e-40, 3.0]),
    }
    return tensors


def run_folders(path):
    return sorted(path.glob(disk.PREFIX + "*"))


@pytest.fixture
def snapshot(tmp_path):
    """A whole snapshot file and what is in it."""
    state = {name: tensor.contiguous() for name, tensor in make_store(mlp()).live().items()}
    write_snapshot(tmp_path / "snapshot.safetensors", state, 7)
    return tmp_path / "snapshot.safetensors", state


# -- every place ----------------------------------------------------------------------------------------------------


def returns_what_it_was_given(place, dtype):
    """Whether two states come back, rounded to ``dtype`` and nothing else, although the tensors changed since."""
    state = odd_state()
    kept, expected = [], []
    for step in (1, 2):
        expected.append({name: tensor.to(dtype, copy=True) for name, tensor in state.items()})
        kept.append(place.keep(state, step))
        for tensor in state.values():
            tensor.add_(1)
    found = [snapshot.tensors() for snapshot in kept]
    exact = all(
        same(a, b) and all(t.is_contiguous() for t in a.values()) for a, b in zip(found, expected, strict=True)
    )
    for snapshot in kept:
        snapshot.release()
    place.close()
    return exact


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("place", PLACES)
def test_a_snapshot_is_what_was_there_when_it_was_taken(place, dtype, tmp_path):
    """float32 states come back bit for bit from a float32 history, wherever it lives; from a narrower one they come
    back rounded once, and steps that follow leave no trace in either."""
    assert returns_what_it_was_given(make_place(where(place, tmp_path), as_dtype(dtype)), as_dtype(dtype))


def test_a_place_that_does_not_copy_would_be_noticed():
    """The negative control."""

    class Reference(Place):
        def keep(self, state, step):
            return storage._Tensors(dict(state))

    assert not returns_what_it_was_given(Reference(torch.float32), torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_does_not_depend_on_where_snapshots_live(place, tmp_path):
    """The same run, bit for bit, with every place; with snapshots in 16 bits it is another one."""
    reference = RawLoop(Line()).run(MAX_STEPS)
    assert same(RawLoop(Line(), history_device=where(place, tmp_path)).run(MAX_STEPS), reference)
    rounded = RawLoop(Line(), history_device=where(place, tmp_path), history_dtype="bfloat16").run(MAX_STEPS)
    assert not same(rounded, reference)


@pytest.mark.parametrize("device", ["nowhere", "disk", "disk:", "cpu:disk", None])
def test_an_unknown_place_is_refused(device):
    """One error, from the arguments and from the history alike; nothing is created."""
    with pytest.raises(ValueError, match="`history_device` must be 'cpu', 'model'"):
        History(3, device=device)
    with pytest.raises(ValueError, match="`history_device` must be 'cpu', 'model'"):
        NiNoTrainingArguments("unused", nowcast_history_device=device)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    """Before training starts, with the path; so is a dtype that is none."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`history_device` must name a folder.*disk:.*file"):
        History(3, device=f"disk:{tmp_path / 'file'}")
    with pytest.raises(ValueError, match="history_dtype"):
        NiNoTrainingArguments("unused", nowcast_history_dtype="int8")


# -- from CUDA to the host ------------------------------------------------------------------------------------------


class FakeStream:
    """A stream that does nothing until someone waits for it: the latest that a device may be."""

    def __init__(self, device=None):
        self.work, self.recorded = [], []

    def wait_stream(self, other):
        self.recorded.append(other)

    def wait_event(self, event):
        event.synchronize()


class FakeEvent:
    def record(self, stream):
        self.stream, self.end = stream, len(stream.work)

    def synchronize(self):
        for position in range(self.end):
            self.stream.work[position]()
            self.stream.work[position] = lambda: None


class Deferred(TorchDispatchMode):
    """Copies that need not block are done when the stream gets to them."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.stream.work.append(lambda: func(*args))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_cuda(monkeypatch):
    """``torch.cuda`` as far as :class:`storage.Lane` needs it; ``room`` says what the device has free."""

    class Cuda:
        training, free, kept = FakeStream(), 2**40, []

    monkeypatch.setattr(storage, "travels", lambda device: True)
    monkeypatch.setattr(HostPlace, "_pinned", lambda self, size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", Deferred)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Cuda.training)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (Cuda.free, 2**40))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: Cuda.kept.append(tensor), raising=False)
    return Cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free", [2**40, 0], ids=["room", "no room"])
def test_a_copy_that_is_late_does_not_see_the_next_step(fake_cuda, free, dtype):
    """However late the copy to the host is, it brings the parameters as they were: from a copy on the device if there
    is room for one, otherwise because the training stream waits."""
    fake_cuda.free = free
    assert returns_what_it_was_given(HostPlace(dtype), dtype)


def test_without_the_wait_it_would(fake_cuda, monkeypatch):
    """The negative control: no room, and a training stream that does not wait."""
    fake_cuda.free = 0
    monkeypatch.setattr(FakeStream, "wait_event", lambda stream, event: None)
    assert not returns_what_it_was_given(HostPlace(torch.float32), torch.float32)


def test_with_room_on_the_device_training_does_not_wait(fake_cuda):
    """The copy to the host is still to be done when ``append`` returns, and begins after what training has started;
    the copy on the device is kept until it has been read."""
    history = History(2)
    state = {"a": torch.ones(3), "b": torch.ones(2)}
    history.append(state, 1)
    (lane,) = history._place._lanes.values()
    assert len(lane.stream.work) == 2 and lane.stream.recorded == [fake_cuda.training]
    assert len(fake_cuda.kept) == 2 and not any(kept is tensor for kept in fake_cuda.kept for tensor in state.values())
    assert same(history.states()[0], state)


@pytest.mark.parametrize("far", [True, False])
def test_host_memory_is_used_again(far, request):
    """A cleared history's buffers serve the next one, pinned or not, unless the parameters have changed their shapes;
    a closed one has given them back."""
    if far:
        request.getfixturevalue("fake_cuda")
    history = History(2)

    def addresses(size):
        history.append({"a": torch.ones(size), "b": torch.ones(2)}, len(history) + 1)
        return [tensor.data_ptr() for tensor in history.states()[-1].values()]

    first, second = addresses(3), addresses(3)
    history.clear()
    assert {*first, *second} == {*addresses(3), *addresses(3)} and not {*first} & {*second}
    history.clear()
    addresses(5)
    assert history.states()[0]["a"].shape == (5,)
    kept = [weakref.ref(tensor) for tensor in history.states()[0].values()]
    history.clear()
    assert all(tensor() is not None for tensor in kept)
    history.close()
    assert all(tensor() is None for tensor in kept)


def test_pinned_memory_is_packed():
    """Tensors lie apart, aligned, inside slabs that are powers of two; a model of many odd sizes loses little, where
    rounding each tensor up by itself would lose half."""
    sizes = {"wte": 50257 * 768 * 4} | {f"{i} {n}": 3072 * n for i in range(12) for n in (768, 2304, 3072)}
    sizes |= {f"bias {i}": 3072 for i in range(99)} | {"empty": 0}
    slabs, places = pack(sizes)
    assert all(slab & (slab - 1) == 0 for slab in slabs)
    for number, slab in enumerate(slabs):
        inside = sorted((first, first + sizes[name]) for name, (where, first) in places.items() if where == number)
        assert all(first % storage.ALIGNMENT == 0 for first, _ in inside) and inside[-1][1] <= slab
        assert all(end <= first for (_, end), (first, _) in itertools.pairwise(inside))
    assert places.keys() == sizes.keys()
    total, each = sum(sizes.values()), sum(1 << (size - 1).bit_length() for size in sizes.values() if size)
    assert sum(slabs) < 1.35 * total < each


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_snapshot_file_is_plain_safetensors(snapshot):
    """Others can read it, its metadata names the step, and nothing temporary is left."""
    path, state = snapshot
    assert same(load_file(path), state) and same(map_snapshot(path), state)
    assert verify_snapshot(path) == 7
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("how", TORN)
def test_a_torn_file_is_told_from_a_whole_one(snapshot, how):
    """Cut short, too long, or with one bit of a value, a name or the checksum changed."""
    path, _ = snapshot
    path.write_bytes(TORN[how](path.read_bytes()))
    with pytest.raises(TornSnapshot, match=r"snapshot\.safetensors is torn"):
        verify_snapshot(path)


def test_a_changed_bit_would_be_read_without_the_checksum(snapshot):
    """The negative control: safetensors alone takes a changed value for what was saved."""
    path, state = snapshot
    path.write_bytes(TORN["a bit of a value"](path.read_bytes()))
    assert not same(map_snapshot(path), state)


def test_safetensors_of_other_origin_are_no_snapshots(tmp_path):
    """Even if they carry a step."""
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"step": "7"})
    with pytest.raises(TornSnapshot):
        verify_snapshot(tmp_path / "other.safetensors")


def test_a_write_that_is_no_longer_wanted_leaves_nothing(tmp_path):
    """Nor does one that fails half-way; what had this name before stays."""
    path, state = tmp_path / "snapshot.safetensors", {"a": torch.zeros(8)}
    assert write_snapshot(path, state, 1)
    assert not write_snapshot(path, state, 2, wanted=lambda: False)
    with pytest.raises(KeyError):
        write_snapshot(path, {"a": torch.zeros(8, dtype=torch.int8)}, 3)
    assert verify_snapshot(path) == 1 and list(tmp_path.iterdir()) == [path]


# -- on the disk ----------------------------------------------------------------------------------------------------


@contextmanager
def slow_disk(monkeypatch):
    """Files are not finished before the block is left, or ``go`` is set."""
    go, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(snapshot_file.os, "fsync", lambda descriptor: (go.wait(60), fsync(descriptor)))
    try:
        yield go
    finally:
        go.set()


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """``append`` returns, and ``states`` can be read, before the file is there; ``files`` waits for it."""
    store = make_store(mlp())
    history = History(2, device=f"disk:{tmp_path}")
    with slow_disk(monkeypatch) as go:
        history.append(store.live(), 1)
        assert same(history.states()[0], store.snapshot())
        assert not list(tmp_path.glob("*/*1.safetensors"))
        go.set()
        assert history.files() == list(tmp_path.glob("*/*1.safetensors"))
    assert same(history.states()[0], store.snapshot())


def test_host_memory_holds_one_snapshot_at_most(tmp_path, monkeypatch):
    """The next one waits until the last is on the disk; then it is read from there, memory-mapped."""
    history = History(3, device=f"disk:{tmp_path}")
    state = make_store(mlp()).live()
    with slow_disk(monkeypatch) as go:
        history.append(state, 1)
        second = threading.Thread(target=history.append, args=(state, 2))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        go.set()
        second.join(60)
    files = history.files()
    states = history.states()
    assert all(snapshot._host is None for snapshot in history._snapshots)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not say what is mapped")
    assert len(states) == 2 and all(str(file) in maps.read_text() for file in files)
    del states
    gc.collect()
    assert not any(str(file) in maps.read_text() for file in files)


def test_files_go_with_their_snapshots(tmp_path, monkeypatch):
    """Cleared, whether written or not: no files.  Closed: no folder, and the history may be used again.  Forgotten
    without either: no folder."""
    state = make_store(mlp()).live()
    history = History(3, device=f"disk:{tmp_path}")
    history.append(state, 1)
    history.files()
    with slow_disk(monkeypatch):
        history.append(state, 2)
        history.clear()
    history.append(state, 3)
    history.files()
    (folder,) = run_folders(tmp_path)
    assert [file.name for file in folder.glob("*.safetensors*")] == ["000000000003.safetensors"]
    history.close()
    assert not run_folders(tmp_path)
    history.append(state, 4)
    assert same(history.states()[0], state) and len(run_folders(tmp_path)) == 1
    del history
    gc.collect()
    assert not run_folders(tmp_path)


def test_two_runs_may_share_a_folder(tmp_path, caplog):
    """Each has a folder of its own, and neither touches the other's."""
    first, second = (make_store(mlp(seed)) for seed in range(2))
    histories = [History(2, device=f"disk:{tmp_path}") for _ in range(2)]
    for history, store in zip(histories, (first, second), strict=True):
        history.append(store.live(), 1)
        history.files()
    third = History(2, device=f"disk:{tmp_path}")
    assert same(histories[0].states()[0], first.snapshot()) and same(histories[1].states()[0], second.snapshot())
    assert len(run_folders(tmp_path)) == 3 and not caplog.records
    third.close()


def test_the_end_of_training_leaves_no_files(tmp_path):
    """After ``train()`` of both front ends the folder is empty, and nowcasts were made from it."""
    cpu = callback_trainer(tmp_path / "cpu")
    cpu.train()
    place = f"disk:{tmp_path / 'history'}"
    for make, options in (
        (callback_trainer, {"options": {"history_device": place}}),
        (nino_trainer, {"nowcast_history_device": place}),
    ):
        trainer = make(tmp_path / "out", **options)
        assert len(run_folders(tmp_path / "history")) == 0
        trainer.train()
        assert nowcasting(trainer).nowcasts == 2 and not run_folders(tmp_path / "history")
        assert same(parameters(trainer.model), parameters(cpu.model))


def test_a_run_that_was_broken_off_does_not_leave_its_folder_to_the_next(tmp_path):
    """``train()`` after an exception: the first call's folder goes."""
    trainer = callback_trainer(tmp_path, options={"history_device": f"disk:{tmp_path / 'history'}"})
    callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "nowcasting"))
    step, trainer.training_step = trainer.training_step, None
    with pytest.raises(TypeError):
        trainer.train()
    assert len(run_folders(tmp_path / "history")) == 1
    trainer.training_step = step
    trainer.train()
    assert callback.nowcasting.nowcasts == 2 and not run_folders(tmp_path / "history")


# -- a disk that fails ----------------------------------------------------------------------------------------------


def failing(monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot_file.os, "fsync", full)


def test_a_full_disk_costs_nowcasts_and_nothing_else(tmp_path, monkeypatch, caplog):
    """Training goes on as without nowcasts, which are skipped with one warning; nothing half-written is left."""
    failing(monkeypatch)
    loop = RawLoop(Line(), history_device=f"disk:{tmp_path}")
    final = loop.run(MAX_STEPS)
    plain = RawLoop(wrap=False)
    assert same(final, plain.run(MAX_STEPS))
    assert [(event.accepted, "No space left" in event.reason) for event in loop.optimizer.nowcasting.events] == [
        (False, True),
        (False, True),
    ]
    assert sum("No space left" in record.message for record in caplog.records) == 1
    assert not list(tmp_path.glob("*/*.safetensors*"))


def test_a_checkpoint_of_a_full_disk_holds_everything_else(tmp_path, monkeypatch, caplog):
    """The counters are saved, a warning says what is not, and a resumed run begins a new window."""
    loop = RawLoop(Line(), history_device=f"disk:{tmp_path / 'history'}")
    with monkeypatch.context() as patched:
        failing(patched)
        loop.run(11)
        loop.save(tmp_path / "checkpoint")
    assert sum("saved without them" in record.message for record in caplog.records) == 1
    resumed = RawLoop(Line())
    assert resumed.load(tmp_path / "checkpoint")
    assert (len(resumed.optimizer.nowcasting.history), resumed.optimizer.nowcasting.rejected) == (0, 1)
    resumed.run(MAX_STEPS)


# -- killed ---------------------------------------------------------------------------------------------------------

CHILD = """
import sys, threading, time
from training_helpers import Line, RawLoop
from hf_nino.training import snapshot_file

place, checkpoint = sys.argv[1:]
loop = RawLoop(Line(), history_device=f"disk:{place}")
loop.run(3)
loop.save(checkpoint)
chunks = snapshot_file._chunks

def torn(tensor):
    data = next(chunks(tensor))
    yield data[: len(data) // 2]
    print("writing", flush=True)
    time.sleep(600)

snapshot_file._chunks = torn
loop.run(5)
time.sleep(600)
"""


def test_a_killed_run_resumes_from_what_is_whole(tmp_path, caplog):
    """SIGKILL in the middle of writing a snapshot: the next run finds it, says so once and removes it; resumed from
    the last checkpoint, whose snapshots are its own, it equals the uninterrupted run bit for bit."""
    place, checkpoint = tmp_path / "history", tmp_path / "checkpoint"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    command = [sys.executable, "-c", CHILD, str(place), str(checkpoint)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "writing\n"
            alive = RawLoop(Line(), history_device=f"disk:{place}")
            assert len(run_folders(place)) == 2 and not caplog.records, "the folder of a living process is let alone"
        finally:
            child.send_signal(signal.SIGKILL)
    alive.optimizer.nowcasting.history.close()
    (folder,) = run_folders(place)
    names = {file.name for file in folder.iterdir()}
    assert names == {"lock", "000000000002.safetensors", "000000000004.safetensors.tmp"}
    with pytest.raises(TornSnapshot):
        verify_snapshot(folder / "000000000004.safetensors.tmp")

    whole = RawLoop(Line()).run(MAX_STEPS)
    loop = RawLoop(Line(), history_device=f"disk:{place}")
    assert loop.load(checkpoint) and not folder.exists()
    assert same(loop.run(MAX_STEPS), whole) and loop.optimizer.nowcasting.nowcasts == 2
    # Only what the disk says: the announcement of the cost is a warning or not, by the clock.
    (warning,) = [record.message for record in caplog.records if record.name == "hf_nino.training.disk"]
    assert "1 whole and 1 torn" in warning
