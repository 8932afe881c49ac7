"""Parameters in the flat parameters of ``FullyShardedDataParallel`` (FSDP1)."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._runtime_utils import _reshard

from .holders import Holder, Slice

PREFIX = "_fsdp_wrapped_module"


def is_fsdp(model: nn.Module) -> bool:
    """Whether some module is sharded by FSDP1."""
    return any(isinstance(module, FSDP) for module in model.modules())


def hold(model: nn.Module) -> tuple[dict[str, Holder], set[int]]:
    """The holders of all parameters in flat parameters, and the ids of the parameters that they stand for.

    Every rank holds an equal part of each unit's flat parameter, which ends anywhere, and that part is what the
    optimizer updates: it is read and written where it is, and no unit is gathered.
    """
    holders: dict[str, Holder] = {}
    known: set[int] = set()
    for prefix, module in model.named_modules():
        handle = module._handle if isinstance(module, FSDP) else None
        if handle is None:
            continue
        flat = handle.flat_param
        lazy = not hasattr(flat, "_local_shard")  # before the first forward pass
        here = flat.data if lazy else flat._local_shard
        if not lazy and handle.uses_sharded_strategy and not handle.needs_unshard():
            _reshard(module, handle, True)  # the root stays whole after an evaluation, and would be used like that
        originals = flat._params or [flat] * flat._num_params
        known |= {id(flat), *map(id, originals)}
        for fqn, shape, part, original in zip(
            flat._fqns, flat._shapes, flat._shard_param_infos, originals, strict=True
        ):
            if not (original.requires_grad and flat.is_floating_point()):
                continue
            name = ".".join(part for part in f"{prefix}.{fqn}".split(".") if part and part != PREFIX)
            if part.in_shard:
                piece = here[part.offset_in_shard : part.offset_in_shard + part.numel_in_shard]
                holders[name] = Slice(shape, piece, part.intra_param_start_idx)
            else:
                holders[name] = Slice(shape, here[:0], 0)
    return holders, known
