"""Methods that are an optimizer and nothing else; the others build on them."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from .base import Conditions, Method, Settings, Training

SGD_MOMENTUM = 0.9
SGD_SCALE = 100.0
"""Learning rate of SGD for one of AdamW.  A step moves an element by about the learning rate with AdamW, and by that
times 10 gradients with momentum 0.9: with gradients of a root mean square near 1e-3, 1 / (10 * 1e-3) makes them equal.
It only says where to begin: learning rates are swept."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a method trains, tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on matrices and larger, none on vectors: gains and biases (as ``Trainer``
    has it).  Groups without parameters are left out."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_scheduler(optimizer: torch.optim.Optimizer, conditions: Conditions) -> torch.optim.lr_scheduler.LRScheduler:
    """The run's schedule, of transformers: constant, or linear warm-up and a cosine to 0.

    Raises:
        ValueError: a schedule of another name.
    """
    if conditions.schedule == "constant":
        return get_scheduler("constant", optimizer)
    if conditions.schedule == "cosine":
        return get_scheduler("cosine", optimizer, conditions.warmup_steps, conditions.steps)
    raise ValueError(f"`schedule` must be 'constant' or 'cosine', got {conditions.schedule!r}")


def resolve_settings(method: str, settings: Settings, defaults: Settings) -> dict[str, Any]:
    """``defaults`` overwritten by ``settings``.

    Raises:
        ValueError: a setting that has no default.
    """
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        known = f"it knows {', '.join(sorted(defaults))}" if defaults else "it has none"
        raise ValueError(f"`settings` of method {method!r} must be its own ({known}), got {', '.join(unknown)}")
    return {**defaults, **settings}


class OptimizerMethod(Method):
    """A method that is a ``torch.optim.Optimizer`` under the run's schedule, without settings."""

    @abstractmethod
    def make_optimizer(self, model: nn.Module, conditions: Conditions) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters, at the peak learning rate, without a schedule."""

    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> Training:
        resolve_settings(self.name, settings, {})
        optimizer = self.make_optimizer(model, conditions)
        return Training(optimizer, make_scheduler(optimizer, conditions))


class AdamW(OptimizerMethod):
    """``torch.optim.AdamW`` with its own betas: what everything else is compared with."""

    name = "adamw"
    title = "AdamW"

    def make_optimizer(self, model: nn.Module, conditions: Conditions) -> torch.optim.Optimizer:
        groups = decay_groups(trainable(model), conditions.weight_decay)
        return torch.optim.AdamW(groups, lr=conditions.learning_rate)


class SGD(OptimizerMethod):
    """``torch.optim.SGD`` with momentum.

    Its weight decay is part of the gradient: a step shrinks matrices by ``learning_rate * weight_decay / (1 -
    momentum)``.  It is set so that this is what AdamW's decoupled one does at the corresponding learning rate.
    """

    name = "sgd"
    title = "SGD with momentum"
    learning_rate_scale = SGD_SCALE

    def make_optimizer(self, model: nn.Module, conditions: Conditions) -> torch.optim.Optimizer:
        decay = conditions.weight_decay * (1 - SGD_MOMENTUM) / SGD_SCALE
        groups = decay_groups(trainable(model), decay)
        return torch.optim.SGD(groups, lr=conditions.learning_rate, momentum=SGD_MOMENTUM)


class Combined(torch.optim.Optimizer):
    """Several optimizers, each over parameters of its own, that look like one: one list of groups, one state.

    A scheduler sees all groups; a nowcast that is taken back finds all state.

    Args:
        optimizers: not to be stepped on their own any more.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            # At every step: ``load_state_dict`` replaces both objects.
            optimizer.param_groups, optimizer.state = self.param_groups[first:last], self.state
            optimizer.step()
            first = last
        return value


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable matrices of hidden layers: neither embeddings (tied heads are some) nor the head, which is the last
    ``nn.Linear`` of the model."""
    layers = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(weight) for weight in layers[-1:]}
    return [parameter for parameter in trainable(model) if parameter.dim() == 2 and id(parameter) not in outer]


class Muon(OptimizerMethod):
    """``torch.optim.Muon`` for hidden matrices, AdamW for embeddings, the head, kernels, gains and biases.

    Muon's steps are scaled to the root mean square of AdamW's (arXiv 2502.16982): one learning rate, in AdamW's units,
    does for both.
    """

    name = "muon"
    title = "Muon"

    def make_optimizer(self, model: nn.Module, conditions: Conditions) -> torch.optim.Optimizer:
        matrices = hidden_matrices(model)
        taken = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in trainable(model) if id(parameter) not in taken]
        rate, decay = conditions.learning_rate, conditions.weight_decay
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            optimizers.append(torch.optim.AdamW(decay_groups(others, decay), lr=rate))
        return Combined(*optimizers)


class ScheduleFree(Method):
    """``AdamWScheduleFree`` of the package ``schedulefree`` (Defazio et al., 2024, arXiv 2405.15682).

    Its learning rate is constant, after a linear warm-up where the schedule has one.
    """

    name = "schedulefree"
    title = "Schedule-Free AdamW"

    def missing(self) -> str | None:
        if importlib.util.find_spec("schedulefree") is None:
            return "the package schedulefree is not installed: pip install schedulefree"
        return None

    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> Training:
        resolve_settings(self.name, settings, {})
        reason = self.missing()
        if reason is not None:
            raise ImportError(f"method {self.name!r}: {reason}")
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(
            decay_groups(trainable(model), conditions.weight_decay),
            lr=conditions.learning_rate,
            warmup_steps=0 if conditions.schedule == "constant" else conditions.warmup_steps,
        )
        return ScheduleFreeTraining(optimizer)


class ScheduleFreeTraining(Training):
    """Trains at the points where gradients are taken, and hands out the average."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        optimizer.train()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            # What the optimizer computes back is off by rounding.
            write(parameters, kept)


@torch.no_grad()
def write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors, in place."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
