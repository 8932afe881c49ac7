"""Parameters that are DTensors: FSDP2, HSDP, tensor parallel, and combinations of these."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from .holders import Holder
from .layout import Span


def reshard(model: nn.Module) -> None:
    """Let FSDP2 show its shards: after an evaluation it may still hold whole parameters for a backward pass."""
    for module in model.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()


def hold(name: str, parameter: nn.Parameter) -> Holder:
    """The holder of a DTensor: local rows as they are, or rows that are exchanged when read and written.

    Raises:
        ValueError: partial sums.
    """
    placements = parameter.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"parameter {name!r} is a DTensor of partial sums {placements}")
    if all(type(placement) in (Shard, Replicate) for placement in placements):
        if all(type(placement) is Replicate or placement.dim == 0 for placement in placements):
            return LocalRows(parameter)
        return Turned(parameter)
    return Gathered(parameter)


def rows_here(parameter: DTensor, placements: tuple) -> Span:
    """Elements of the flattened parameter that this rank holds, if ``placements`` cut nothing but the first axis."""
    first, count = 0, parameter.shape[0] if parameter.ndim else 1
    coordinate = parameter.device_mesh.get_coordinate() or ()
    for size, index, placement in zip(parameter.device_mesh.shape, coordinate, placements, strict=True):
        if type(placement) is Shard:
            chunk = -(-count // size)
            start, stop = min(index * chunk, count), min((index + 1) * chunk, count)
            first, count = first + start, stop - start
    width = math.prod(parameter.shape[1:])
    return first * width, (first + count) * width


class LocalRows(Holder):
    """A DTensor that is cut along the first axis alone, or not at all: rows are read and written where they are."""

    def __init__(self, parameter: DTensor) -> None:
        self._local = parameter.detach().to_local()
        self.shape, self.dtype, self.device = tuple(parameter.shape), parameter.dtype, self._local.device
        self.span = rows_here(parameter, parameter.placements)

    def read(self) -> Tensor:
        return self._local.reshape(-1)

    def write(self, flat: Tensor) -> None:
        self._local.copy_(flat.view(self._local.shape))


class Turned(Holder):
    """A DTensor that is cut along other axes than the first (tensor parallel): it is exchanged for rows, and back."""

    travels = True

    def __init__(self, parameter: DTensor) -> None:
        self._parameter = parameter
        self._rows = (Shard(0),) * parameter.device_mesh.ndim if parameter.ndim else parameter.placements
        self.shape, self.dtype, self.device = tuple(parameter.shape), parameter.dtype, parameter.to_local().device
        self.span = rows_here(parameter, self._rows)

    def read(self) -> Tensor:
        return self._parameter.detach().redistribute(placements=self._rows).to_local().reshape(-1)

    def write(self, flat: Tensor) -> None:
        parameter = self._parameter
        rows = DTensor.from_local(
            flat.view(-1, *parameter.shape[1:]) if flat.numel() else flat.view(0, *parameter.shape[1:]),
            parameter.device_mesh,
            self._rows,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        parameter.to_local().copy_(rows.redistribute(placements=parameter.placements).to_local())


class Gathered(Holder):
    """A DTensor that is cut in ways of its own (FSDP over tensor parallel): one parameter at a time is made whole."""

    travels = True

    def __init__(self, parameter: DTensor) -> None:
        self._parameter = parameter
        self.shape, self.dtype, self.device = tuple(parameter.shape), parameter.dtype, parameter.to_local().device
        self.span = (0, parameter.numel())

    def read(self) -> Tensor:
        return self._parameter.detach().full_tensor().reshape(-1)

    def write(self, flat: Tensor) -> None:
        parameter = self._parameter
        whole = DTensor.from_local(
            flat.view(self.shape),
            parameter.device_mesh,
            [Replicate()] * parameter.device_mesh.ndim,
            run_check=False,
        )
        parameter.to_local().copy_(whole.redistribute(placements=parameter.placements).to_local())
