"""Read and write a model's parameters in place, for each backend that holds them.

:func:`make_store` picks the backend, parameter by parameter: plain ones, replicas (DDP), DTensors (FSDP2, HSDP, tensor
parallel), flat parameters (FSDP1) and masters (DeepSpeed ZeRO-1, 2 and 3).
"""

from __future__ import annotations

from torch import nn

from ...graph.wrappers import canonical_name, inner_module
from ..ranks import ProcessGroupRanks, running
from .base import ParameterStore, Signature, signature_hash
from .divided import DividedStore
from .holders import Holder, Replica
from .plain import PlainStore

__all__ = ["ParameterStore", "PlainStore", "Signature", "make_store", "plain_store", "signature_hash"]


def make_store(model: nn.Module) -> ParameterStore:
    """The store for ``model``; where ``torch.distributed`` runs several ranks, to be called on all of them at once.

    Raises:
        ValueError: parameters that cannot be written (on the meta device, swapped to a disk, partial sums, or not the
            same on all ranks), or no trainable floating-point parameter at all; on all ranks.
    """
    bare = _bare(model)
    if not running():
        return plain_store(bare)
    ranks, holders, failure = ProcessGroupRanks(), {}, ""
    try:
        holders = find_holders(bare)
        failure = "" if holders else _NOTHING
    except Exception as error:
        failure = str(error)
    failure = ranks.agree(failure)
    if failure:
        raise ValueError(failure)
    if ranks.size == 1 and all(isinstance(holder, Replica) for holder in holders.values()):
        return PlainStore(bare)
    return DividedStore(bare, find_holders, holders)


def plain_store(model: nn.Module) -> PlainStore:
    """The store of a model whose parameters this process holds whole, whatever other ranks do.

    Raises:
        ValueError: parameters that are sharded (FSDP, tensor parallel, DeepSpeed) or not materialised, or no trainable
            floating-point parameter at all.
    """
    bare = _bare(model)
    for name, parameter in bare.named_parameters():
        found = _kind(parameter)
        if found and (parameter.requires_grad or found != _META):
            raise ValueError(f"{_WHOLE}, but parameter {name!r} {found}")
    if any(base.__name__ == "FullyShardedDataParallel" for m in bare.modules() for base in type(m).__mro__):
        raise ValueError(f"{_WHOLE}, but it is sharded by FSDP")
    store = PlainStore(bare)
    if not store.parameters():
        raise ValueError(_NOTHING)
    return store


def find_holders(model: nn.Module) -> dict[str, Holder]:
    """{name: holder} of the trainable parameters of ``model``, as they are now; in the same order on all ranks.

    Raises:
        ValueError: a parameter that is not supported; it is named.
    """
    from . import deepspeed, dtensor, fsdp

    dtensor.reshard(model)
    holders, known = fsdp.hold(model) if fsdp.is_fsdp(model) else ({}, set())
    for name, parameter in model.named_parameters():
        if id(parameter) in known or not (parameter.requires_grad and parameter.is_floating_point()):
            continue
        name = canonical_name(name)
        found = _kind(parameter)
        try:
            if found == _META:
                raise ValueError(f"parameter {name!r} {found}")
            if found == _MANAGED:
                holders[name] = deepspeed.hold(name, parameter)
            elif found == _DTENSOR:
                holders[name] = dtensor.hold(name, parameter)
            else:
                holders[name] = Replica(parameter)
        except ValueError as error:
            raise ValueError(f"`model` must have parameters that nowcasts can be written into, but {error}") from None
    return holders


_NOTHING = "`model` must have trainable floating-point parameters, found none (is everything frozen?)"
_WHOLE = "`model` must hold its parameters whole on every rank (single process or DDP)"
_META = "is on the meta device (offloaded or not materialised)"
_DTENSOR = "is a DTensor (FSDP2 or tensor parallel)"
_MANAGED = "is managed by DeepSpeed"


def _kind(parameter: nn.Parameter) -> str:
    """What is special about a parameter; empty: nothing."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return _MANAGED
    if any(base.__name__ == "DTensor" for base in type(parameter).__mro__):
        return _DTENSOR
    return _META if parameter.device.type == "meta" else ""


def _bare(model: nn.Module) -> nn.Module:
    if any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__):
        model = model.module
    return inner_module(model)
