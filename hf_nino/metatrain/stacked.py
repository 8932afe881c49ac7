"""Many models of one shape, trained at once: their parameters are the rows of one tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bench.training.tasks.base import Batch, Task
from ..training.undo import saved_buffers
from .stacked_optimizers import adamw_, clip_, sgd_
from .variation import RunSettings

ENGINES = ("vmap", "loop")
"""How gradients are computed: all models in one vectorised pass, or one model after the other.

A GPU is kept busy by the former only.  On a CPU the former spares overhead and the latter memory traffic: which is
faster depends on the shape (:func:`faster_engine`).
"""

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""What the optimizers remember of each parameter, by the names that torch's have."""


class StackedTraining:
    """Models of one task that differ in their settings, trained side by side, none of them aware of the others.

    Args:
        task: builds the models, gives batches and computes the loss.
        data: what ``task.load`` gave.
        settings: one for each model; ``task``, ``steps`` and ``batch_size`` the same in all.
        device: where to train.
        engine: see :data:`ENGINES`.

    Attributes:
        template: one of the models; what it computes is computed with the parameters of all.
        names, shapes: of its parameters.
        flat: float32 ``[M, P]``: row m holds all parameters of model m, one after the other.
        moments: {kind: ``[M, P]``}: ``exp_avg`` and ``exp_avg_sq`` of AdamW; ``momentum_buffer`` of SGD.  Rows of
            models with the other optimizer stay 0.
        step_count: steps done.

    Raises:
        ValueError: an unknown engine or optimizer, no settings or settings that cannot be stacked, or models with
            statistics (batch normalization), which are no parameters.
    """

    def __init__(
        self, task: Task, data: Any, settings: Sequence[RunSettings], device: torch.device, engine: str = "vmap"
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}")
        if len({(one.task, one.steps, one.batch_size) for one in settings}) != 1:
            raise ValueError("`settings` must be at least one, all with the same task, steps and batch size")
        self.task, self.settings, self.device, self.engine = task, list(settings), device, engine
        models = [self._initial(one, data) for one in settings]
        self.template = models[0].to(device).train()
        statistics = sorted(saved_buffers(self.template))
        if statistics:
            raise ValueError(
                f"models with statistics cannot be stacked, and those of {task.name} have {statistics[0]!r}"
            )
        self.names = [name for name, _ in self.template.named_parameters()]
        self.shapes = [tuple(parameter.shape) for parameter in self.template.parameters()]
        rows = [torch.cat([p.detach().flatten().float().cpu() for p in model.parameters()]) for model in models]
        self.flat = torch.stack(rows).to(device)
        self._leaves = {
            f"model.{name}": part.detach().requires_grad_() for name, part in self.unflatten(self.flat).items()
        }
        self._loss = _Loss(task, self.template)
        self._groups = {kind: _Rows(self.settings, kind, device) for kind in sorted({s.optimizer for s in settings})}
        kinds = {kind for group in self._groups.values() for kind in group.moments}
        self.moments = {kind: torch.zeros_like(self.flat) for kind in sorted(kinds)}
        self.step_count = 0
        sized = replace(task, batch_size=settings[0].batch_size)
        self._batches = [sized.batches(data, one.seed, torch.device("cpu")) for one in settings]

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def learning_rates(self) -> list[float]:
        """Of the next step, one for each model."""
        return [one.rate(self.step_count) for one in self.settings]

    def step(self) -> Tensor:
        """One optimizer step of every model; the training losses ``[M]``, on the device."""
        losses, gradient = self.gradients(self.next_batch())
        rates = torch.tensor(self.learning_rates, device=self.device).unsqueeze(1)
        self.step_count += 1
        for group in self._groups.values():
            group.step(self.flat, gradient, self.moments, rates, self.step_count)
        return losses

    def next_batch(self) -> Batch:
        """{name: ``[M, batch, ...]``} on the device; each model has batches of its own."""
        batches = [next(batches) for batches in self._batches]
        stacked = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
        if self.device.type == "cuda":
            return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in stacked.items()}
        return {name: tensor.to(self.device) for name, tensor in stacked.items()}

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses ``[M]`` and gradients ``[M, P]`` of a stacked batch."""
        if self.engine == "vmap":
            # The fused kernels of attention would be called once for each model.
            with sdpa_kernel(SDPBackend.MATH):
                losses = vmap(self._evaluate)(self._leaves, dict(batch))
            # No model sees another's parameters, so the gradient of the sum has those of the models in its rows.
            parts = torch.autograd.grad(losses.sum(), list(self._leaves.values()))
            return losses.detach(), torch.cat([part.reshape(len(self), -1) for part in parts], 1)
        gradient, losses = torch.empty_like(self.flat), []
        for i in range(len(self)):
            leaves = {name: leaf.detach()[i].requires_grad_() for name, leaf in self._leaves.items()}
            loss = self._evaluate(leaves, {name: tensor[i] for name, tensor in batch.items()})
            parts = torch.autograd.grad(loss, list(leaves.values()))
            torch.cat([part.flatten() for part in parts], out=gradient[i])
            losses.append(loss.detach())
        return torch.stack(losses), gradient

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """{name: view ``[..., *shape]``} of tensors ``[..., P]`` that hold all parameters in their last axis."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = zip(self.names, self.shapes, flat.split(sizes, -1), strict=True)
        return {name: part.unflatten(-1, shape) if shape else part.squeeze(-1) for name, shape, part in parts}

    def _evaluate(self, leaves: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return functional_call(self._loss, leaves, (batch,))

    def _initial(self, settings: RunSettings, data: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = self.task.build_model(data)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(settings.initialisation)
        return model


class _Loss(nn.Module):
    """The loss as a module, so that its parameters can be exchanged."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model, batch)


class _Rows:
    """The models of a stack that have one optimizer in common: their rows, and their settings as ``[rows, 1]``."""

    def __init__(self, settings: Sequence[RunSettings], optimizer: str, device: torch.device) -> None:
        if optimizer not in MOMENTS:
            raise ValueError(f"`optimizer` must be one of {', '.join(MOMENTS)}, got {optimizer!r}")
        self.optimizer = optimizer
        self.moments = MOMENTS[optimizer]
        found = [i for i, one in enumerate(settings) if one.optimizer == optimizer]
        self.rows = slice(found[0], found[-1] + 1)
        if found != list(range(len(settings)))[self.rows]:
            raise ValueError("`settings` with the same optimizer must stand side by side")
        chosen = settings[self.rows]
        self.weight_decay = torch.tensor([[one.weight_decay] for one in chosen], device=device)
        bounds = [float("inf") if one.max_grad_norm is None else one.max_grad_norm for one in chosen]
        self.max_norm = torch.tensor(bounds, device=device).unsqueeze(1)
        self.clips = min(bounds) < float("inf")

    def step(
        self, flat: Tensor, gradient: Tensor, moments: dict[str, Tensor], learning_rates: Tensor, step: int
    ) -> None:
        parameters, gradient = flat[self.rows], gradient[self.rows]
        if self.clips:
            clip_(gradient, self.max_norm)
        settings = {"learning_rate": learning_rates[self.rows], "weight_decay": self.weight_decay}
        kept = [moments[kind][self.rows] for kind in self.moments]
        if self.optimizer == "adamw":
            adamw_(parameters, gradient, *kept, step=step, **settings)
        else:
            sgd_(parameters, gradient, *kept, **settings)


def faster_engine(make: Callable[[str], StackedTraining], device: torch.device, steps: int = 3) -> tuple[str, float]:
    """The engine to take, and the seconds of one of its steps (of all models), from a few steps.

    Args:
        make: ``make(engine)`` gives a new :class:`StackedTraining`.
        steps: of which the fastest counts.  On a CPU processor time is counted, so that other work on the machine does
            not decide.
    """
    engines = ("vmap",) if device.type == "cuda" else ENGINES
    seconds = {engine: _step_seconds(make(engine), device, steps) for engine in engines}
    best = min(seconds, key=seconds.__getitem__)
    return best, seconds[best]


def _step_seconds(training: StackedTraining, device: torch.device, steps: int) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found = []
    for _ in range(steps):
        started = clock()
        training.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - started)
    return min(found)


def in_stacks(settings: Sequence[RunSettings], size: int) -> Iterator[list[RunSettings]]:
    """Settings that can be trained together, at most ``size`` at once, optimizer by optimizer."""
    groups: dict[tuple[str, int, int], list[RunSettings]] = {}
    for one in settings:
        groups.setdefault((one.task, one.steps, one.batch_size), []).append(one)
    for group in groups.values():
        group.sort(key=lambda one: (one.optimizer, one.index))
        count = -(-len(group) // size)
        for i in range(count):  # evenly, rather than a last stack of one
            yield group[len(group) * i // count : len(group) * (i + 1) // count]
