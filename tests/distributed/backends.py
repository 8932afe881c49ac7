"""One small model, wrapped as each backend wraps models; what its parameters are; and runs driven by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hf_nino.training import Nowcasting

# Processes with which a backend is tested.
BACKENDS = {"ddp": 2, "fsdp2": 3, "fsdp1": 2, "fsdp1-original": 3, "tp": 2, "hsdp": 4, "fsdp2-tp": 4}
USUAL = ("ddp", "fsdp2", "fsdp1")
"""Those whose tests always run; the others' are slow ones."""
PERIOD = 4


def every_backend():
    """Parameters for ``parametrize``."""
    return [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in BACKENDS]


def used_model(width=7):
    """A model all of whose parameters are used: it can be trained by every backend."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3), nn.LayerNorm(3))


def bare_model(kind="", dtype=torch.float32):
    """Uneven rows where the backend allows them, a scalar and an empty parameter where it takes them."""
    model = used_model(8 if "tp" in kind else 7)
    model.tiny = nn.Parameter(torch.ones(1))
    if "sdp" not in kind:
        model.scale = nn.Parameter(torch.tensor(2.0))
        model.empty = nn.Parameter(torch.zeros(0, 3))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    if kind == "fsdp1":
        del model.frozen  # flat parameters are frozen as a whole
    return model.to(dtype)


def wrapped(kind, model, **policies):
    """The model on this process, as ``kind`` holds it; ``policies`` are those of FSDP2."""
    size = dist.get_world_size()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        return _fully_shard(model, init_device_mesh("cpu", (size,)), **policies)
    if kind == "hsdp":
        return _fully_shard(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards")))
    if kind == "tp":
        return _parallel(model, init_device_mesh("cpu", (size,)))
    if kind == "fsdp2-tp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
        return _fully_shard(_parallel(model, mesh["tensor"]), mesh["data"], split=False)
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"use_orig_params": kind == "fsdp1-original", "device_id": torch.device("cpu")}
    model[0] = FullyShardedDataParallel(model[0], **options)
    return FullyShardedDataParallel(model, **options)


def _fully_shard(model, mesh, split=True, **policies):
    from torch.distributed.fsdp import fully_shard

    if split:
        fully_shard(model[0], mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def _parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def path(shapes, step):
    """The state after ``step`` of a run that is only made up: a smooth path with noise, the same everywhere."""
    noise = torch.Generator().manual_seed(step)
    state = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        start = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + index))
        state[name] = start + 0.05 * step * start.cos() + 0.01 * torch.randn(shape, generator=noise)
    return state


def shapes_of(nowcasting):
    return {name: shape for name, shape, _ in nowcasting.store.signature()}


def own_rows(store, state):
    """This rank's rows of whole tensors."""
    shards = store.shards()
    return state if shards is None else {name: shards.local(name).of(tensor) for name, tensor in state.items()}


def whole(store):
    """All parameters, whole, on every rank; copies."""
    return {name: tensor.clone() for name, tensor in store.gather(store.snapshot(dtype=torch.float64)).items()}


def drive(nowcasting, first, last):
    """Let a run go along :func:`path` from step ``first`` to ``last``, displaced by the nowcasts; the states after."""
    store, shapes, after = nowcasting.store, shapes_of(nowcasting), {}
    for step in range(first, last + 1):
        before = store.snapshot()
        there, here = path(shapes, step), path(shapes, step - 1)
        rows = own_rows(store, {name: there[name] - here[name] for name in shapes})
        store.write({name: before[name] + rows[name] for name in shapes})
        nowcasting.step()
        after[step] = whole(store)
    return after


def started(model, nowcaster, **options):
    """A nowcasting whose model is at the start of :func:`path`."""
    settings = {"period": PERIOD, "horizon": 2, "patience": 0} | options
    nowcasting = Nowcasting(nowcaster, model, **settings)
    nowcasting.store.write(own_rows(nowcasting.store, path(shapes_of(nowcasting), 0)))
    nowcasting.begin(0)
    return nowcasting


def alone(kind, nowcaster, steps, **options):
    """What a single process makes of the same path."""
    return drive(started(bare_model(kind), nowcaster, **options), 1, steps)


def same(first, second):
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def apart(first, second):
    """The largest difference, relative to the largest number of that parameter."""
    assert first.keys() == second.keys()
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp_min(1e-12))
        for name in first
        if first[name].numel()
    )
