"""The Trainer and accelerate loops on several ranks: nowcasts come, ranks stay together, and runs resume."""

import os
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from backends import own_rows, same, used_model, whole, wrapped
from launching import launch
from packaging.version import Version
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_nino.nowcaster import NiNoModel, NowcasterConfig
from hf_nino.training import NiNo, NiNoCallback, NiNoTrainer, NiNoTrainingArguments, Nowcasting

pytestmark = pytest.mark.distributed

STEPS, SAVED = 14, (5, 8)
# How FSDP2's checkpoints are written: whole by the first rank, or by torch.distributed.checkpoint, rank by rank.
STATE_DICTS = {"fsdp2": "FULL_STATE_DICT", "fsdp2 in shards": "SHARDED_STATE_DICT"}
exact_in_shards = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="accelerate 1.12 does not restore the optimizer's state from a checkpoint in shards; 1.15 does",
)


def saved(backend):
    """Steps to resume at; none where the Trainer itself cannot: transformers 5.17 loads the optimizer of several
    processes to a device "cpu:0", which torch refuses."""
    return () if backend == "ddp" and Version(transformers.__version__) < Version("5.23") else SAVED


def tiny_gpt2():
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=18, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def tokens():
    rows = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


class Watch(TrainerCallback):
    """All parameters, whole, after every step."""

    def __init__(self):
        self.states = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.states[state.global_step] = whole(self.store())


def trainer_of(front, folder, nowcaster="linear:context=3", **settings):
    common = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": "ACCELERATE_USE_FSDP" not in os.environ,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    } | settings
    watch = Watch()
    if front == "callback":
        callback = NiNoCallback(nowcaster, period=6, horizon=2)
        args = TrainingArguments(str(folder), **common)
        trainer = Trainer(tiny_gpt2(), args, train_dataset=tokens(), callbacks=[callback, watch])
        watch.store = lambda: callback.nowcasting.store
    else:
        args = NiNoTrainingArguments(str(folder), nowcast_period=6, nowcast_horizon="2", nowcaster=nowcaster, **common)
        trainer = NiNoTrainer(tiny_gpt2(), args, train_dataset=tokens(), callbacks=[watch])
        watch.store = lambda: trainer.nowcasting.store
    return trainer, watch


def _fsdp2_on_cpu(backend):
    """accelerate shards on accelerators only; it is told that this is one."""
    from accelerate.state import DistributedType, PartialState

    os.environ.update(
        ACCELERATE_TORCH_DEVICE="cpu",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="GPT2Block",
        FSDP_STATE_DICT_TYPE=STATE_DICTS[backend],
    )
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def _trains(rank, front, backend, folder, nowcaster):
    if backend in STATE_DICTS:
        _fsdp2_on_cpu(backend)
    trainer, watch = trainer_of(front, folder, nowcaster)
    assert trainer.args.world_size == 2
    trainer.train()
    shards = watch.store().shards()
    found = {"states": watch.states, "own": sum(shards.local(name).numel for name in shards.ranges)}
    found["log"] = [entry for entry in trainer.state.log_history if "nino_accepted" in entry]
    for step in saved(backend):
        again, seen = trainer_of(front, folder, nowcaster, save_strategy="no")
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
        found[step] = seen.states
    return found


@pytest.mark.parametrize(
    ("front", "backend", "nowcaster"),
    [
        ("trainer", "ddp", "linear:context=3"),
        pytest.param("callback", "ddp", "momentum", marks=pytest.mark.slow),
        pytest.param("trainer", "fsdp2", "momentum", marks=pytest.mark.slow),
        pytest.param("callback", "fsdp2", "linear:context=3", marks=pytest.mark.slow),
        pytest.param("trainer", "fsdp2 in shards", "momentum", marks=exact_in_shards),
    ],
)
def test_a_trainer_nowcasts_on_shards_and_resumes_exactly(tmp_path, front, backend, nowcaster):
    """Two ranks of a real Trainer: nowcasts are written, parameters are the same bits on both at every step, each
    rank's history is in the checkpoint, and a resumed run equals the uninterrupted one bit for bit."""
    first, second = launch(_trains, 2, tmp_path, front, backend, str(tmp_path / "out"), nowcaster)
    assert sum(entry["nino_accepted"] for entry in first["log"]) == 2
    assert first["states"].keys() == set(range(1, STEPS + 1))
    assert all(same(first["states"][step], second["states"][step]) for step in first["states"])
    total = sum(p.numel() for p in tiny_gpt2().parameters())
    assert first["own"] + second["own"] == total
    assert 0.4 * total < first["own"] < 0.6 * total
    for rank in (1, 2):
        assert (tmp_path / "out" / "checkpoint-5" / f"nino_history-{rank:05d}-of-00002.safetensors").is_file()
    for step in saved(backend):
        for later, state in first[step].items():
            assert later > step and same(first["states"][later], state), (step, later)
        assert len(first[step]) == STEPS - step


def _trains_lean(rank, backend, folder):
    if backend in STATE_DICTS:
        _fsdp2_on_cpu(backend)
        # What `bf16=True` comes to, which the arguments refuse without `use_cpu`, and with it nothing is sharded.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    options = {"bf16": backend == "ddp", "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    trainer, watch = trainer_of("trainer", folder, max_steps=12, save_strategy="no", **options)
    trainer.train()
    log = [entry["nino_accepted"] for entry in trainer.state.log_history if "nino_accepted" in entry]
    blocks = [module for module in trainer.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert trainer.accelerator.mixed_precision == "bf16"
    return watch.states, log, {dtype for _, _, dtype in watch.store().signature()}, len(blocks)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_trainer_that_saves_memory_nowcasts_all_the_same(tmp_path, backend):
    """bf16, gradient accumulation and ``gradient_checkpointing=True`` at once: two nowcasts in 12 optimizer steps, of
    float32 parameters, and the same bits on both ranks after every step."""
    first, second = launch(_trains_lean, 2, tmp_path, backend, str(tmp_path / "out"))
    assert first[1] == [1, 1]
    assert first[2] == {"torch.float32"} and first[3] > 0
    assert first[0].keys() == set(range(1, 13))
    assert all(same(state, second[0][step]) for step, state in first[0].items())


def carried(nowcasting):
    """Whole on every rank: the parameters, and what nowcasting knows of their past."""
    store, found = nowcasting.store, {"parameters": whole(nowcasting.store)}
    for step, state in zip(nowcasting.history.steps, nowcasting.history.states(), strict=True):
        found[f"snapshot {step}"] = store.gather(state)
    parts = {}
    for key, tensor in nowcasting.nowcaster.memory().items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return found | {part: store.gather(state) for part, state in parts.items()}


class Carried(TrainerCallback):
    """:func:`carried` at the beginning of every step."""

    def __init__(self):
        self.found = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.found[state.global_step] = carried(self.nowcasting())


def _carries(rank, nowcaster, folder, resume):
    _fsdp2_on_cpu("fsdp2 in shards")
    settings = {"max_steps": SAVED[-1] + 2, "save_steps": SAVED[-1] if resume is None else 100}
    trainer, _ = trainer_of("trainer", folder, nowcaster, **settings)
    watch = Carried()
    watch.nowcasting = lambda: trainer.nowcasting
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    return watch.found, trainer.nowcasting.nowcasts


@pytest.mark.slow
@pytest.mark.parametrize(("nowcaster", "what"), [("linear:context=3", "snapshot 8"), ("momentum", "buffer")])
def test_more_ranks_go_on_from_a_checkpoint_in_shards(tmp_path, nowcaster, what):
    """A Trainer on FSDP2 that saved with torch.distributed.checkpoint on two ranks is resumed on three: parameters,
    snapshots and the nowcaster's memory are the same bits, divided anew."""
    folder, step = tmp_path / "out", SAVED[-1]
    before, _ = launch(_carries, 2, tmp_path, nowcaster, str(folder), None)[0]
    checkpoint = folder / f"checkpoint-{step}"
    assert len(list(checkpoint.glob("*/*.distcp"))) > 2 and not list(checkpoint.glob("*.safetensors.index.json"))
    results = launch(_carries, 3, tmp_path, nowcaster, str(tmp_path / "again"), str(checkpoint))
    for after, nowcasts in results:
        assert min(after) == step and nowcasts == 1
        assert before[step].keys() == after[step].keys() >= {"parameters", what}
        assert all(same(state, after[step][name]) for name, state in before[step].items())


def _accelerates(rank, backend, folder):
    from accelerate import Accelerator

    if backend in STATE_DICTS:
        _fsdp2_on_cpu(backend)
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"

    def run():
        accelerator = Accelerator(cpu=backend == "ddp")
        assert accelerator.num_processes == 2
        model = used_model()
        optimizer = NiNo(torch.optim.AdamW(model.parameters(), lr=0.01), model, "momentum", period=4, patience=0)
        optimizer.register_for_checkpointing(accelerator)
        model, prepared = accelerator.prepare(model, optimizer)
        return accelerator, model, prepared, optimizer

    def train(accelerator, model, prepared, optimizer, first, last):
        states = {}
        for step in range(first, last + 1):
            data = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(8, 5, generator=data)
            loss = nn.functional.mse_loss(model(x), x[:, :3])
            prepared.zero_grad()
            accelerator.backward(loss)
            prepared.step()
            states[step] = whole(optimizer.nowcasting.store)
        return states

    parts = run()
    train(*parts, 1, 6)
    parts[0].save_state(folder)
    expected = train(*parts, 7, 12)
    again = run()
    again[0].load_state(folder)
    states = train(*again, 7, 12)
    return all(same(expected[step], states[step]) for step in expected), again[3].nowcasting.nowcasts


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2 in shards", marks=exact_in_shards)])
def test_an_accelerate_loop_saves_and_loads_its_ranks(tmp_path, backend):
    """``save_state`` and ``load_state`` on two ranks: each history is in the folder, and the run goes on exactly."""
    assert launch(_accelerates, 2, tmp_path, backend, str(tmp_path / "state")) == [(True, 3), (True, 3)]
    names = {path.name for path in Path(tmp_path / "state").glob("nino_*")}
    assert names == {"nino_state.json", *(f"nino_history-0000{rank}-of-00002.safetensors" for rank in (1, 2))}


def network():
    torch.manual_seed(5)
    return NiNoModel(NowcasterConfig(hidden_size=16, context=3))


def _networks(rank, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_gpt2().eval()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = wrapped("ddp", model)
    return _predicted(Nowcasting(network(), model, period=6, horizon=3, patience=0))


def _predicted(nowcasting):
    store = nowcasting.store
    nowcasting.begin(0)
    for step in range(1, 7):
        shapes = {name: shape for name, shape, _ in store.signature()}
        noise = {n: torch.randn(s, generator=torch.Generator().manual_seed(len(n) + step)) for n, s in shapes.items()}
        before, rows = store.snapshot(), own_rows(store, noise)
        store.write({name: before[name] + 0.01 * (rows[name] + before[name].cos()) for name in before})
        last = whole(store)
        nowcasting.step()
    return last, whole(store), nowcasting.events[0].reason


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_network_nowcasts_a_sharded_model(tmp_path, kind):
    """The graph of a model of which no rank holds all is that of the model; the network's nowcast on shards is that of
    one process to 1e-5 of its step, and the same bits on both ranks."""
    first, second = launch(_networks, 2, tmp_path, kind)
    last, expected, reason = _predicted(Nowcasting(network(), tiny_gpt2().eval(), period=6, horizon=3, patience=0))
    assert (first[2], second[2], reason) == ("", "", "")
    assert same(first[1], second[1]) and same(first[0], last)
    for name in expected:
        step = (expected[name] - last[name]).abs().max()
        assert float((first[1][name] - expected[name]).abs().max()) <= 1e-5 * float(step) + 1e-7, name
