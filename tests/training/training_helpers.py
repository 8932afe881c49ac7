"""Tiny models, data and nowcasters for the tests of ``hf_nino.training``."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_nino.nowcaster.base import Nowcaster
from hf_nino.training import NiNo, NiNoCallback, NiNoTrainer, NiNoTrainingArguments

# Tiny tensors: more threads only get in each other's way.
torch.set_num_threads(1)

MAX_STEPS = 16
PERIOD = 6  # with 3 snapshots: snapshots after 2, 4, 6; 8, 10, 12; .. and nowcasts after 6 and 12


class Line(Nowcaster):
    """A straight line through the first and the last of 3 snapshots."""

    context, period, max_horizon = 3, PERIOD, 4

    def nowcast(self, graph, states, horizon):
        return {name: last + (last - states[0][name]) * (horizon / 2) for name, last in states[-1].items()}


class Stay(Line):
    """Predicts that nothing moves, and draws random numbers while doing so."""

    def nowcast(self, graph, states, horizon):
        torch.rand(7)
        return {name: last.clone() for name, last in states[-1].items()}


class NotANumber(Line):
    def nowcast(self, graph, states, horizon):
        prediction = super().nowcast(graph, states, horizon)
        next(iter(prediction.values())).view(-1)[0] = float("nan")
        return prediction


class Huge(Line):
    def nowcast(self, graph, states, horizon):
        return {name: last + 1e4 for name, last in states[-1].items()}


class Raising(Line):
    def nowcast(self, graph, states, horizon):
        raise OverflowError("out of luck")


class Pull(Nowcaster):
    """Carries the state that training went on from, and goes half a displacement further."""

    context, period, max_horizon = 1, 4, 1

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
        return {name: last + (last - self.anchor[name]) * 0.5 for name, last in states[0].items()}


def mlp(seed=0, dropout=0.1, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)).to(dtype)


def tiny_gpt2(seed=0, dropout=0.1):
    set_seed(seed)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, **rates, **ids))


def tokens(count=40, seed=0):
    rows = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    labels = rows.clone()
    labels[:, 0] = -100  # never predicted; else the Trainer counts it when it averages the loss
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


class Record(TrainerCallback):
    """The parameters after every step, as callbacks after NiNo's see them."""

    def __init__(self):
        self.states = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = parameters(model)


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def arguments(folder, kind=TrainingArguments, **settings):
    defaults = {
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return kind(str(folder), **(defaults | settings))


def plain_trainer(folder, callbacks=(), **settings):
    return Trainer(tiny_gpt2(), arguments(folder, **settings), train_dataset=tokens(), callbacks=list(callbacks))


def callback_trainer(folder, nowcaster=None, options=None, **settings):
    callback = NiNoCallback(nowcaster or Line(), **({"period": PERIOD, "horizon": 2} | (options or {})))
    return plain_trainer(folder, [callback, Record()], **settings)


def nino_trainer(folder, nowcaster=None, **settings):
    args = arguments(folder, NiNoTrainingArguments, **({"nowcast_period": PERIOD, "nowcast_horizon": "2"} | settings))
    return NiNoTrainer(tiny_gpt2(), args, train_dataset=tokens(), callbacks=[Record()], nowcaster=nowcaster or Line())


def recorded(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Record)).states


def nowcasting(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, NiNoCallback)).nowcasting


class RawLoop:
    """A training loop of one's own: MLP with dropout, AdamW, cosine schedule; it can be saved and resumed."""

    def __init__(self, nowcaster=None, steps=MAX_STEPS, wrap=True, model=None, scheduled=True, **options):
        self.model = mlp() if model is None else model
        self.dtype = next(self.model.parameters()).dtype
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        settings = {"period": PERIOD, "max_steps": steps, "horizon": 2} | options
        self.optimizer = NiNo(base, self.model, nowcaster or Line(), **settings) if wrap else base
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        if wrap and scheduled:
            self.optimizer.lr_scheduler = self.scheduler
        torch.manual_seed(1)
        self.states = {}
        self.step = 0

    def run(self, until, save=None):
        self.model.train()
        while self.step < until:
            data = torch.Generator().manual_seed(self.step)
            x, y = torch.randn(16, 4, generator=data), torch.randn(16, 2, generator=data)
            loss = nn.functional.mse_loss(self.model(x.to(self.dtype)), y.to(self.dtype))
            self.optimizer.zero_grad()
            loss.backward()
            if isinstance(self.optimizer, NiNo):
                self.optimizer.record_loss(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            self.states[self.step] = parameters(self.model)
            if save is not None:
                self.save(Path(save) / str(self.step))
        return self.states[until]

    def save(self, folder):
        self.optimizer.save(folder)
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        state = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        torch.save(state | {"step": self.step, "rng": torch.get_rng_state()}, Path(folder) / "loop.pt")

    def load(self, folder):
        state = torch.load(Path(folder) / "loop.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        return self.optimizer.load(folder)
