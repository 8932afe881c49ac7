"""AdamW and SGD with momentum for many models at once: a row is a model, and each has settings of its own.

Plain tensor mathematics on ``[M, P]`` tensors (M models, P parameters), written in place.  Each row is what
``torch.optim.AdamW`` and ``torch.optim.SGD`` make of the parameters of that model, to the last digits of float32.
Settings are ``[M, 1]`` tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MOMENTUM = 0.9


@torch.no_grad()
def clip_(gradient: Tensor, max_norm: Tensor) -> None:
    """Shorten each model's gradient to at most ``max_norm``, like ``torch.nn.utils.clip_grad_norm_``.

    Args:
        gradient: ``[M, P]``.
        max_norm: ``[M, 1]``; infinity leaves a gradient as it is.
    """
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    # Infinity over a finite norm is infinity, and over a norm that is infinite too NaN: that gradient stays so.
    gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1))


@torch.no_grad()
def adamw_(
    parameters: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: Tensor,
    weight_decay: Tensor,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019), with torch's default betas and epsilon.

    Args:
        parameters, gradient, exp_avg, exp_avg_sq: ``[M, P]``; the moments begin at 0.
        step: number of this step, from 1.
        learning_rate, weight_decay: ``[M, 1]``; the decay is decoupled, and multiplied by the learning rate.
    """
    parameters.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(gradient, 1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    denominator = (exp_avg_sq.sqrt() / (1 - BETA2**step) ** 0.5).add_(EPSILON)
    parameters.sub_(torch.div(exp_avg, denominator, out=denominator).mul_(learning_rate / (1 - BETA1**step)))


@torch.no_grad()
def sgd_(
    parameters: Tensor, gradient: Tensor, momentum_buffer: Tensor, *, learning_rate: Tensor, weight_decay: Tensor
) -> None:
    """One step of SGD with momentum 0.9, as torch has it: the decay is added to the gradient.

    Args:
        parameters, gradient, momentum_buffer: ``[M, P]``; the buffer begins at 0.
        learning_rate, weight_decay: ``[M, 1]``.
    """
    momentum_buffer.mul_(MOMENTUM).add_(gradient).addcmul_(parameters, weight_decay)
    parameters.sub_(momentum_buffer * learning_rate)
