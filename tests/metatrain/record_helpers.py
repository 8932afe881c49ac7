"""A tiny model with an embedding, a loop that records it, and comparisons, for the tests of recording."""

from __future__ import annotations

import torch
from torch import nn

from hf_nino.metatrain import Trajectory, TrajectoryRecorder

torch.set_num_threads(1)

TOKENS = 12


class Words(nn.Module):
    """Embedding, a layer, and an output embedding of its own, as nobody's model has it but of every kind of shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layer = nn.Linear(4, TOKENS)

    def forward(self, tokens):
        return self.layer(self.embedding(tokens) * self.scale)


def states_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Loop:
    """A loop of one's own: AdamW, a cosine schedule, batches that depend on the step; what was there is kept."""

    def __init__(self, optimizer=torch.optim.AdamW, steps=20, model=None, **settings):
        torch.manual_seed(0)
        self.model = Words() if model is None else model
        self.optimizer = optimizer(self.model.parameters(), **({"lr": 1e-2} | settings))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.done = 0
        self.states = {0: states_of(self.model)}
        self.losses = {}
        self.rates = {}

    def run(self, until, record=None):
        while self.done < until:
            tokens = torch.randint(TOKENS, (8,), generator=torch.Generator().manual_seed(self.done))
            loss = nn.functional.cross_entropy(self.model(tokens), (tokens + 1) % TOKENS)
            self.optimizer.zero_grad()
            loss.backward()
            self.done += 1
            self.rates[self.done] = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.scheduler.step()
            self.losses[self.done] = loss.item()
            self.states[self.done] = states_of(self.model)
            if record is not None:
                record.step(loss)
        return self


def recorded(folder, until=20, every=2, loop=None, **settings):
    """A loop that has been recorded, and its trajectory."""
    loop = loop or Loop()
    with TrajectoryRecorder(folder, every, **settings).recording(loop.model, loop.optimizer, seed=0) as record:
        loop.run(until, record)
    return loop, Trajectory(folder)


def holds(trajectory, states, shift=0):
    """Whether the snapshots are the states of their steps (or of ``shift`` steps later), bit for bit."""
    return all(
        torch.equal(trajectory.states(i, i + 1)[name][0], states[step + shift][name])
        for i, step in enumerate(trajectory.steps)
        if step + shift in states
        for name in states[0]
    )


def alike(first, second):
    """Whether two trajectories hold the same, bit for bit."""
    numbers = ("steps", "learning_rates", "learning_rate_sums", "shapes", "moments")
    if any(getattr(first, name) != getattr(second, name) for name in numbers):
        return False
    return all(
        torch.equal(a, second.states(0, len(second), kind=kind)[name])
        for kind in ("parameter", *first.moments)
        for name, a in first.states(0, len(first), kind=kind).items()
    )
