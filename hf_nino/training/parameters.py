"""Read and write a model's parameters in place, for each backend that holds them.

:func:`make_store` picks the backend.  Two exist: the plain one, and one for parameters that are replicated over the
ranks of ``torch.distributed`` (DDP).  Sharded parameters are refused with an error that says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..graph.wrappers import canonical_name, inner_module

Signature = tuple[tuple[str, tuple[int, ...], str], ...]


class ParameterStore:
    """The trainable floating-point parameters of a model, by the names that they have in the bare model.

    Tied parameters appear once, under the name that ``named_parameters()`` gives them.  Parameters are looked up anew
    at every call, so a parameter that is frozen, thawed or exchanged during a run is seen (compare
    :meth:`signature`).  They are only ever written in place, never replaced: optimizers, DDP buckets, CUDA graphs and
    tied modules hold on to them.

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
        """Where the first parameter is: what is computed beside training is computed there."""
        return next(iter(self.live().values())).device

    def signature(self) -> Signature:
        """(name, shape, dtype) of every parameter; it changes when parameters are frozen, thawed, added or resized."""
        return tuple((name, tuple(p.shape), str(p.dtype)) for name, p in self.parameters().items())

    def snapshot(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A contiguous copy of the state in ``dtype``; ``device="model"``: each tensor where its parameter is."""
        return {
            name: tensor.to(
                device=tensor.device if device == "model" else device,
                dtype=dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            for name, tensor in self.live().items()
        }

    @torch.no_grad()
    def write(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the parameters of these names, in place, cast to their dtype and device.

        Raises:
            ValueError: a name that is no trainable parameter, or another shape than the parameter's; nothing has been
                written then.
        """
        parameters = self.parameters()
        for name, tensor in state.items():
            if name not in parameters:
                raise ValueError(f"`state` must hold trainable parameters of the model only, found {name!r}")
            if tensor.shape != parameters[name].shape:
                raise ValueError(
                    f"`state` must hold tensors of the parameters' shapes; {name!r} has {tuple(tensor.shape)} and the "
                    f"parameter {tuple(parameters[name].shape)}"
                )
        for name, tensor in state.items():
            parameters[name].copy_(tensor)

    def agree(self, accepted: bool) -> bool:
        """Whether every rank says so; ranks must take the same decision, or their parameters drift apart."""
        return accepted

    def average(self, values: Tensor) -> list[float]:
        """``values`` on the host, averaged over the ranks; on all ranks at once."""
        return values.tolist()

    @torch.no_grad()
    def fingerprint(self) -> list[float]:
        """Sum and sum of magnitudes over all parameters (float64): tells one state of a model from another."""
        live = self.live().values()
        total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in live)
        size = sum(float(torch.linalg.vector_norm(tensor, 1, dtype=torch.float64)) for tensor in live)
        return [total, size]


class ReplicatedStore(ParameterStore):
    """Parameters that every rank of the default process group holds in full (DDP).

    Every rank computes the nowcast; what rank 0 has written is then sent to the others, because DDP never
    synchronises parameters again and a difference in the last bit would stay for good.
    """

    def write(self, state: Mapping[str, Tensor]) -> None:
        super().write(state)
        parameters = self.parameters()
        for name in state:
            torch.distributed.broadcast(parameters[name].data, src=0)

    def agree(self, accepted: bool) -> bool:
        votes = torch.tensor(int(accepted), dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN)
        return bool(votes.item())

    def average(self, values: Tensor) -> list[float]:
        values = values.to(self.device, copy=True)
        torch.distributed.all_reduce(values)
        return (values / torch.distributed.get_world_size()).tolist()


def make_store(model: nn.Module) -> ParameterStore:
    """The store for ``model``: the plain one, or :class:`ReplicatedStore` if ``torch.distributed`` runs several ranks.

    Raises:
        ValueError: parameters that are sharded (FSDP, tensor parallel, DeepSpeed) or not materialised (meta device),
            or no trainable floating-point parameter at all.
    """
    bare = inner_module(model)
    for module in bare.modules():
        if any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__):
            raise ValueError(_unsupported("the model is sharded by FSDP"))
    for name, parameter in bare.named_parameters():
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__) or hasattr(parameter, "placements"):
            raise ValueError(_unsupported(f"parameter {name!r} is a DTensor (FSDP2 or tensor parallel)"))
        if hasattr(parameter, "ds_id") or getattr(parameter, "_hp_mapping", None) is not None:
            raise ValueError(_unsupported(f"parameter {name!r} is managed by DeepSpeed"))
        if parameter.requires_grad and parameter.device.type == "meta":
            raise ValueError(_unsupported(f"parameter {name!r} is on the meta device (offloaded or not materialised)"))
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = several and torch.distributed.get_world_size() > 1
    store = ReplicatedStore(bare) if several else ParameterStore(bare)
    if not store.parameters():
        raise ValueError("`model` must have trainable floating-point parameters, found none (is everything frozen?)")
    return store


def signature_hash(signature: Signature) -> str:
    """SHA-256 of a signature, for checkpoints."""
    return hashlib.sha256(json.dumps(signature).encode()).hexdigest()


def _unsupported(what: str) -> str:
    return (
        f"`model` must hold its parameters whole on every rank (single process or DDP), but {what}; nowcasting "
        "sharded models is not supported in this version: train it without nowcasts, or unsharded"
    )
