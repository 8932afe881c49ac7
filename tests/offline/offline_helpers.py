"""Runs that left checkpoints, for the tests of ``hf_nino.offline``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_nino.training.guard import judge, tame

torch.set_num_threads(1)

INTERVAL = 2


def tiny_gpt2(seed=0):
    set_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, **ids)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def rows(count=48):
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def arguments(folder, kind=TrainingArguments, **settings):
    defaults = {
        "max_steps": 12,
        "save_steps": INTERVAL,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(str(folder), **(defaults | settings))


def trainer(folder, **settings):
    return Trainer(model=tiny_gpt2(), args=arguments(folder, **settings), train_dataset=rows())


class Network(nn.Module):
    """A module with all that a checkpoint may hold beside parameters: statistics, a counter, tied weights."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.inner[0].weight

    def forward(self, x):
        return self.head(self.inner(x))


def states(count=5, seed=0, dtype=torch.float32):
    """State dicts of a :class:`Network` that drifts, statistics and counters included."""
    network = Network(seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    drift = {name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}
    found = []
    for _ in range(count):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter += drift[name].to(dtype) + 0.002 * torch.randn(parameter.shape, generator=generator).to(
                    dtype
                )
            network.inner[1].running_mean += 0.5
            network.inner[1].num_batches_tracked += 7
        found.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        found[-1]["head.weight"] = found[-1]["inner.0.weight"]  # tied, as in the module
    return found


PARAMETERS = [name for name, _ in Network().named_parameters()]


def write_files(folder: Path, suffix=".safetensors", steps=(10, 20, 30, 40, 50), **settings) -> list[Path]:
    """One file for each state, ``step-N``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for step, state in zip(steps, states(len(steps), **settings), strict=True):
        paths.append(folder / f"step-{step}{suffix}")
        if suffix == ".safetensors":
            save_file({name: tensor for name, tensor in state.items() if name != "head.weight"}, paths[-1])
        else:
            torch.save({"epoch": 3, "model": state, "lr": torch.tensor(0.1)}, paths[-1])
    return paths


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def expected(nowcaster, trajectory, horizon, names=None):
    """What the nowcaster says of states in memory, and the guard makes of it."""
    history = [{name: state[name] for name in names or state} for state in trajectory]
    found = nowcaster.nowcast(None, history, horizon)
    verdict = judge(history, found, horizon)
    assert verdict.accepted
    return {**history[-1], **tame(history[-1], found, verdict)}
