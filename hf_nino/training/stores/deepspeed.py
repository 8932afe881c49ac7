"""Parameters that DeepSpeed's ZeRO keeps as float32 masters in flat partitions, beside the ones that models run with.

Measured: what is written into a model's own parameters is taken back by the next step, from the masters; masters alone
leave them as they were until the next step, so that an evaluation or a checkpoint in between sees old ones.  Both are
written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .holders import Holder, Replica, Slice


def hold(name: str, parameter: nn.Parameter) -> Holder:
    """The holder of a parameter that DeepSpeed manages.

    Raises:
        ValueError: one without a master: no optimizer was made with the engine, or it is swapped to NVMe.
    """
    if not hasattr(parameter, "ds_id"):
        return _fragment(parameter)
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None:
        raise ValueError(f"parameter {name!r} is partitioned by ZeRO-3 without an optimizer")
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ValueError(f"parameter {name!r} is swapped to NVMe by ZeRO-3")
    return Partition(parameter)


def _fragment(parameter: nn.Parameter) -> Holder:
    """ZeRO-1, ZeRO-2 and the bfloat16 optimizer: ranks share the masters, and each has all of the model."""
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it is on other ranks
        empty = torch.empty(0, dtype=torch.float32, device=parameter.device)
        holder = Slice(tuple(parameter.shape), empty, 0)
    else:
        master = mapping.get_hp_fragment().view(-1)
        holder = Slice(tuple(parameter.shape), master, mapping.lp_fragment_address.start)
    holder.copy = Replica(parameter)
    return holder


class Partition(Holder):
    """ZeRO-3: an equal part of the flattened parameter, the last one padded, in float32 and as the model runs it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self.shape, self.dtype = tuple(parameter.ds_shape), torch.float32
        part = parameter.ds_tensor
        self.device = part.device
        first = torch.distributed.get_rank(parameter.ds_process_group) * part.ds_numel
        self.span = (min(first, parameter.ds_numel), min(first + part.ds_numel, parameter.ds_numel))

    @property
    def _count(self) -> int:
        return self.span[1] - self.span[0]

    def read(self) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(self._parameter).detach().reshape(-1)[: self._count].to(self.device)

    def write(self, flat: Tensor) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.utils import safe_set_local_fp32_param

        parameter = self._parameter
        padded = flat.new_zeros(parameter.ds_tensor.numel())
        padded[: self._count] = flat
        safe_set_local_fp32_param(parameter, padded)
        # Small parameters stay whole on every rank between steps.
        whole = parameter.ds_status == ZeroParamStatus.AVAILABLE
        if whole:
            parameter.partition([parameter])
        parameter.ds_tensor.data.view(-1)[: self._count].copy_(flat)
        if whole:
            parameter.all_gather([parameter])
