"""Parameters that this process holds whole, and alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...graph.wrappers import canonical_name, inner_module
from .base import ParameterStore, Signature, check_state


class PlainStore(ParameterStore):
    """The parameters of a model on one process.

    Args:
        model: the model, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = inner_module(model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """{name: parameter}, the model's own objects."""
        return {
            canonical_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }

    def live(self) -> dict[str, Tensor]:
        """{name: tensor} that share memory with the parameters, outside autograd."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    @property
    def device(self) -> torch.device:
        return next(iter(self.live().values())).device

    def signature(self) -> Signature:
        return tuple((name, tuple(p.shape), str(p.dtype)) for name, p in self.parameters().items())

    @torch.no_grad()
    def write(self, state: Mapping[str, Tensor]) -> None:
        parameters = self.parameters()
        check_state(state, {name: parameter.shape for name, parameter in parameters.items()})
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
