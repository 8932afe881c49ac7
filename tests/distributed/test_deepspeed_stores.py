"""DeepSpeed's ZeRO on two gloo processes; run where it is installed: ``pytest -m deepspeed tests/distributed``."""

import os

import pytest
import torch
from backends import PERIOD, drive, same, started, used_model, whole
from launching import launch
from torch import nn

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed, pytest.mark.slow]


def engine_of(stage, dtype):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        # Some parameters stay whole between steps, others do not.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    model = used_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def _zero(rank, stage, dtype):
    engine, optimizer = engine_of(stage, dtype)
    found = {}
    for name, nowcaster in (("linear", "linear:context=3"), ("momentum", "momentum")):
        found[name] = drive(started(engine, nowcaster), 1, 2 * PERIOD)
    nowcasting = started(engine, "linear:context=3")
    store = nowcasting.store
    states, x = whole(store), torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)).to(dtype)
    reference = used_model().to(dtype)

    def live():
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.copy_(whole(store)[name])
            return float((engine(x) - reference(x)).abs().max())

    found["live"] = live()
    nowcasting.undo.keep(store, optimizer, {}, 0)
    moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    for _ in range(2):
        loss = nn.functional.mse_loss(engine(x).float(), x[:, :3].float())
        engine.backward(loss)
        engine.step()
    stepped = whole(store)
    found["step"] = max(float((stepped[name] - states[name]).abs().max()) for name in states)
    found["live after"] = live()
    nowcasting.undo.restore(store, optimizer)
    back = [value for entry in optimizer.state.values() for value in entry.values()]
    found["back"] = same(whole(store), states) and live() == 0.0
    if len(moments) == len(back):
        found["back"] = found["back"] and all(torch.equal(a, b) for a, b in zip(moments, back, strict=True))
    found["rows"] = sum(tensor.numel() for tensor in store.live().values())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_takes_nowcasts_into_masters_and_models(tmp_path, stage, dtype):
    """The nowcast is that of one process, bit for bit, in the float32 masters; the model runs with it at once, the
    next optimizer step starts from it (and does not take it back), and it can be put back, moments included."""
    first, second = launch(_zero, 2, tmp_path, stage, dtype)
    for name, nowcaster in (("linear", "linear:context=3"), ("momentum", "momentum")):
        expected = drive(started(used_model(), nowcaster), 1, 2 * PERIOD)
        assert all(same(expected[step], first[name][step]) for step in expected)
        assert all(same(first[name][step], second[name][step]) for step in expected)
    for found in (first, second):
        assert found["live"] == found["live after"] == 0.0 and found["back"]
        assert 0 < found["step"] < 0.01
    assert first["rows"] + second["rows"] == sum(p.numel() for p in used_model().parameters())
