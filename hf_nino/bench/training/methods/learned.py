"""A small learned optimizer: a network that sees one parameter at a time and says where it should go.

In the style of Metz et al. (2020, arXiv 2009.11243; 2022, arXiv 2203.11860): a perceptron with two hidden layers of
32, the same for every element of every tensor, turns features of an element into a direction and a magnitude.  Its
weights come with the package; :mod:`.meta_training` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ....training.rng import preserved_rng
from .base import Conditions, Method, Settings, Training
from .optimizers import decay_groups, make_scheduler, resolve_settings, trainable

WEIGHTS = Path(__file__).with_name("l2o.safetensors")
RECIPE = Path(__file__).with_name("l2o.json")

DECAYS = (0.5, 0.9, 0.99, 0.999)
"""Of the moving averages of the gradient."""
SECOND_DECAY = 0.999
TIMESCALES = (1, 3, 10, 30, 100, 300)
"""Steps.  None longer than meta-training is: features do not leave the range that the network knows."""
HIDDEN = 32
FEATURES = 2 + len(DECAYS) + 1 + len(DECAYS) + len(TIMESCALES)
LIMIT = 5.0
"""Of features, either way."""
EXPONENT = 0.1
ROWS = 1 << 14
"""Elements that go through the network at once, so that its activations stay in cache."""
_TINY = 1e-30


def rule_inputs(
    parameter: Tensor, gradient: Tensor, averages: Tensor, second: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """What the network sees of the N elements of one tensor.

    Gradient, parameter and moving averages over their root mean squares in the tensor; gradient and averages over the
    root of the element's own second moment (as in Adam, bias corrected); all of them limited, and times the sign of
    the average that decays by 0.9.  Last, ``tanh(step / timescale - 1)``.

    Scaling the loss changes nothing; neither does the order of the elements, but for rounding.

    Args:
        parameter, gradient: [N].
        averages: moving averages of the gradient, [len(DECAYS), N].
        second: moving average of its square, [N].
        step: 1 for the first.

    Returns:
        Features [N, FEATURES] and signs [N].
    """
    decays = torch.tensor(DECAYS, device=gradient.device).unsqueeze(1)
    averages = averages / (1 - decays**step)
    moments = torch.cat([gradient.unsqueeze(0), averages])
    tensors = torch.cat([parameter.unsqueeze(0), moments])
    own = moments * (second / (1 - SECOND_DECAY**step) + _TINY).rsqrt()
    shared = tensors * (tensors.square().mean(1, keepdim=True) + _TINY).rsqrt()
    sign = averages[DECAYS.index(0.9)].sign()
    seen = torch.cat([shared, own]).clamp_(-LIMIT, LIMIT) * sign
    time = torch.tanh(step / torch.tensor(TIMESCALES, device=gradient.device) - 1)
    return torch.cat([seen.T, time.expand(len(sign), -1)], dim=1), sign


class UpdateRule(nn.Module):
    """The network: features [N, FEATURES] and signs [N] to steps [N], in learning rates.

    ``step = sign * direction * exp(0.1 * magnitude)``.  Features and step are multiplied by the same sign: mirror all
    gradients and parameters, and it does the mirrored thing; where there never was a gradient, it does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
        )

    def forward(self, features: Tensor, sign: Tensor) -> Tensor:
        direction, magnitude = self.layers(features).unbind(1)
        return sign * direction * torch.exp(EXPONENT * magnitude)


def observe(averages: Tensor, second: Tensor, gradient: Tensor) -> None:
    """Take a gradient [N] into the moving averages [len(DECAYS), N] and [N], in place."""
    decays = torch.tensor(DECAYS, device=gradient.device).unsqueeze(1)
    averages.mul_(decays).add_((1 - decays) * gradient)
    second.lerp_(gradient.square(), 1 - SECOND_DECAY)


class LearnedOptimizer(torch.optim.Optimizer):
    """``parameter -= lr * (factor * rule(features) + weight_decay * parameter)``.

    Args:
        params: parameters, or groups of them.
        rule: is not trained.
        lr: times the rule's step, which is of the size of one of Adam's.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Any, rule: UpdateRule, lr: float, weight_decay: float = 0.0, factor: float = 1.0
    ) -> None:
        self.rule = rule
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "factor": factor})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; elements of tensors without a gradient stay."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"], group["factor"])
        return value

    def _step(self, parameter: Tensor, lr: float, weight_decay: float, factor: float) -> None:
        gradient = parameter.grad.detach().reshape(-1).float()
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["averages"] = gradient.new_zeros(len(DECAYS), len(gradient))
            state["second"] = torch.zeros_like(gradient)
        state["step"] += 1
        observe(state["averages"], state["second"], gradient)
        values = parameter.detach().reshape(-1).float()
        inputs, sign = rule_inputs(values, gradient, state["averages"], state["second"], state["step"])
        parts = zip(inputs.split(ROWS), sign.split(ROWS), strict=True)
        steps = torch.cat([self.rule(*part) for part in parts])
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(steps.view_as(parameter), alpha=lr * factor)


def load_rule(weights: Path = WEIGHTS, recipe: Path = RECIPE) -> UpdateRule:
    """The rule that comes with the package.

    Args:
        weights: a safetensors file.
        recipe: the JSON beside it, with the shapes.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: weights that are not those of an :class:`UpdateRule`, or not those that the recipe is about.
    """
    for path in (weights, recipe):
        if not path.is_file():
            raise FileNotFoundError(f"no learned optimizer: {path.name!r} is absent from {str(path.parent)!r}")
    expected = {name: list(shape) for name, shape in json.loads(recipe.read_text("utf-8"))["shapes"].items()}
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    rule = UpdateRule()
    needed = {name: list(tensor.shape) for name, tensor in rule.state_dict().items()}
    if not found == expected == needed:
        raise ValueError(
            f"the learned optimizer in {weights.name!r} must have the shapes {needed}, got {found}, and {expected} in "
            f"{recipe.name!r}; make it anew with python -m {__package__}.meta_training"
        )
    rule.load_state_dict(tensors)
    return rule.requires_grad_(False)


class L2O(Method):
    """The learned optimizer that comes with the package.

    It has no schedule of its own beyond its first 300 steps: its steps are multiplied by the learning rate, which
    follows the run's schedule, and by the setting ``factor``.
    """

    name = "l2o"
    title = "Learned optimizer"
    defaults: Mapping[str, Any] = {"factor": 1.0}
    grid = ({}, {"factor": 0.5}, {"factor": 2.0}, {"factor": 4.0})

    def missing(self) -> str | None:
        absent = [path.name for path in (WEIGHTS, RECIPE) if not path.is_file()]
        return f"{', '.join(absent)} of the package is absent" if absent else None

    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> Training:
        factor = resolve_settings(self.name, settings, self.defaults)["factor"]
        if not factor > 0:
            raise ValueError(f"`factor` of method 'l2o' must be above 0, got {factor}")
        parameters = trainable(model)
        with preserved_rng():  # making the network draws random numbers, which are the model's
            rule = load_rule()
        rule.to(parameters[0].device)
        optimizer = LearnedOptimizer(
            decay_groups(parameters, conditions.weight_decay), rule, conditions.learning_rate, factor=factor
        )
        return Training(optimizer, make_scheduler(optimizer, conditions))
