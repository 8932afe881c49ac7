"""Run a model once and follow every parameter axis through the ATen operators.

Every tensor of the forward pass carries one of two kinds of provenance:

* a *view* of a parameter, as a shadow of the same shape and strides on the meta device, so that transposing, slicing
  and splitting weights needs no rule at all: the shadow's strides say which element is where;
* *neuron ids*, an int64 tensor of the same shape (kept with size 1 along dimensions where the ids do not change).

Movement operators run on ids and shadows as they are; pointwise operators, contractions, convolutions, normalisations
and reductions have rules in :mod:`hf_nino.graph.operators`.  An operator without a rule pins what goes in and forgets
it, so that a trace never fails where the model itself runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils import logging

from .provenance import NONE, Record, compact
from .views import ParameterView


@dataclass
class Call:
    """One operator call: its arguments by schema name, and what it returned."""

    function: Any
    arguments: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return self.function._schema.name

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    @cached_property
    def results(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.result) if isinstance(leaf, Tensor)]


class Trace(TorchDispatchMode):
    """Records, while active, where neurons come from; see the module's docstring.

    Args:
        model: its parameters (and the running statistics of its normalisations) are followed.
        inputs: tensors that are data; what is read from them becomes pinned input neurons.
        parameters: what takes the place of the model's parameters during the pass, by name.
    """

    def __init__(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        from .operators import apply_rule

        self._apply_rule = apply_rule
        self.record = Record()
        self._ids: dict[int, Tensor] = {}
        self._views: dict[int, ParameterView] = {}
        # Ids of storages that were written piece by piece: their tensors see what was written through others.
        self._canvases: dict[int, Tensor] = {}
        self._written: list[Tensor] = []
        # What is known of a tensor is forgotten when it dies, since its id() may then be another's.
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        # Activations that come from neurons but could not be followed to any.
        self._opaque: set[int] = set()
        # Numbers computed from one parameter alone: its mean, its norm; the parameter's name.
        self._statistics: dict[int, str] = {}
        # One number for each head, from its channels: the lowest id of those (a norm's variance).
        self._summaries: dict[int, Tensor] = {}
        self._inputs = {id(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._keep(leaf)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in (parameters or dict(model.named_parameters())).items():
            self._register(name, tensor)
        self._buffers = {id(buffer): (name, buffer) for name, buffer in model.named_buffers()}
        self._saved = model.state_dict(keep_vars=True).keys()

    def _register(self, name: str, tensor: Tensor) -> None:
        self.shapes[name] = tuple(tensor.shape)
        self._keep(tensor)
        self._views[id(tensor)] = ParameterView(name, torch.empty(tensor.shape, device="meta"))

    def _keep(self, tensor: Tensor) -> None:
        """Remember things about a tensor as long as it lives."""
        key = id(tensor)
        if key not in self._alive:
            self._alive[key] = weakref.ref(tensor, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        for known in (self._alive, self._ids, self._views, self._statistics, self._summaries):
            known.pop(key, None)
        self._opaque.discard(key)
        self._inputs.discard(key)

    def view(self, tensor: Any) -> ParameterView | None:
        """The parameter that a tensor is a view of."""
        return self._views.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def buffer_view(self, tensor: Any) -> ParameterView | None:
        """A registered buffer as if it were a frozen parameter: running statistics move with their channels."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) not in self._views and id(tensor) in self._buffers:
            self._register(*self._buffers[id(tensor)])
        return self._views.get(id(tensor))

    def saved_vector(self, tensor: Tensor) -> ParameterView | None:
        """A vector that checkpoints bring along (a router's correction), as if it were a frozen parameter."""
        name, _ = self._buffers.get(id(tensor), (None, None))
        if name not in self._saved or tensor.dim() != 1 or not tensor.is_floating_point():
            return None
        return self.buffer_view(tensor)

    def ids(self, tensor: Any) -> Tensor | None:
        """Compact neuron ids of an activation, or ``None``."""
        ids = self._ids.get(id(tensor)) if isinstance(tensor, Tensor) else None
        if ids is None and self._canvases and isinstance(tensor, Tensor) and self._on_canvas(tensor):
            canvas = self._canvases[tensor.untyped_storage()._cdata]
            ids = canvas.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if ids is None or bool((ids < 0).all()):
            return None
        return compact(self.record.find(ids))

    def full_ids(self, tensor: Tensor) -> Tensor | None:
        """Neuron ids expanded to the tensor's shape."""
        ids = self.ids(tensor)
        return None if ids is None else ids.expand(tensor.shape)

    def set_ids(self, tensor: Tensor, ids: Tensor | None) -> None:
        self._keep(tensor)
        self._views.pop(id(tensor), None)
        ids = None if ids is None else compact(ids)
        if ids is None or bool((ids < 0).all()):
            self._ids.pop(id(tensor), None)
        else:
            self._ids[id(tensor)] = ids

    def write(self, destination: Tensor, ids: Tensor | None, through: bool = False) -> None:
        """Ids of a tensor that was written in place, perhaps only a part of its storage.

        Args:
            through: tensors of another shape with the same storage see it even if all of the storage is written.
        """
        storage = destination.untyped_storage()
        # Other views of the storage are looked up through this one.
        self._written.append(destination)
        numel = storage.nbytes() // destination.element_size()
        whole = destination.numel() == numel and not through
        if (whole and storage._cdata not in self._canvases) or destination.is_meta:
            self.set_ids(destination, ids)
            return
        if storage._cdata not in self._canvases:
            canvas = torch.full((numel,), NONE)
            for key, known in self._ids.items():
                tensor = self._alive[key]()
                if tensor is not None and tensor.untyped_storage()._cdata == storage._cdata:
                    part = canvas.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
                    part.copy_(known.expand(tensor.shape))
            self._canvases[storage._cdata] = canvas
        self._keep(destination)
        self._ids.pop(id(destination), None)
        part = self._canvases[storage._cdata].as_strided(
            destination.shape, destination.stride(), destination.storage_offset()
        )
        part.copy_(torch.full((1,), NONE) if ids is None else ids.expand(destination.shape))

    def _on_canvas(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._canvases

    def set_view(self, tensor: Tensor, view: ParameterView) -> None:
        self._keep(tensor)
        self._views[id(tensor)] = view

    def is_input(self, tensor: Tensor) -> bool:
        """Whether a tensor is data given to the model, or was moved from it."""
        return id(tensor) in self._inputs

    def mark_input(self, tensor: Tensor) -> None:
        self._keep(tensor)
        self._inputs.add(id(tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = run_hollow(function, args, kwargs or {})
        names = [argument.name for argument in function._schema.arguments]
        call = Call(function, dict(zip(names, args, strict=False)) | (kwargs or {}), result)
        if any(self._followed(tensor) for tensor in call.tensors):
            self._apply_rule(self, call)
            self._mark_opaque(call)
        return result

    def _mark_opaque(self, call: Call) -> None:
        if any(self.is_opaque(tensor) or self.ids(tensor) is not None for tensor in call.tensors):
            for result in call.results:
                if self.ids(result) is None and id(result) not in self._views:
                    self._opaque.add(id(result))
                    self._keep(result)
                else:
                    self._opaque.discard(id(result))

    def summary(self, tensor: Tensor) -> Tensor | None:
        """Of a tensor with one number for each head: the lowest neuron that went into each, compact."""
        found = self._summaries.get(id(tensor))
        return None if found is None else compact(self.record.find(found))

    def set_summary(self, tensor: Tensor, lowest: Tensor) -> None:
        self._keep(tensor)
        self._summaries[id(tensor)] = lowest

    def statistic(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor was reduced from."""
        return self._statistics.get(id(tensor))

    def set_statistic(self, tensor: Tensor, parameter: str) -> None:
        self._keep(tensor)
        self._statistics[id(tensor)] = parameter

    def is_opaque(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on neurons that could not be followed to it."""
        return id(tensor) in self._opaque

    def _followed(self, tensor: Tensor) -> bool:
        key = id(tensor)
        known = key in self._ids or key in self._views or key in self._inputs or key in self._buffers
        known = known or key in self._opaque or key in self._statistics
        return known or (bool(self._canvases) and self._on_canvas(tensor))


@contextmanager
def quiet_forward(model: nn.Module):
    """Evaluation mode, eager attention, plain mathematics and no gradients; everything is put back afterwards.

    So are buffers that the forward pass writes.
    """
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    kinds = ("attn", "experts")
    names = [f"_{kind}_implementation_internal" for kind in kinds]
    before = [
        (config, name, vars(config)[name]) for config in configs.values() for name in names if name in vars(config)
    ]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        model.eval()
        for module in list(model.modules()):
            for kind in kinds:
                if getattr(getattr(module, "config", None), f"_{kind}_implementation", None) not in (None, "eager"):
                    getattr(module, f"set_{kind}_implementation", lambda _: None)("eager")
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        logging.set_verbosity(verbosity)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, name, buffer, version, values in buffers:
            # A forward pass may count, or keep what it has seen.
            module._buffers[name] = buffer
            if buffer._version != version:
                buffer.data = values
        for config, name, value in before:
            setattr(config, name, value)
        for module, flag in training.items():
            module.training = flag


def run_hollow(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Run an operator; where a parameter without values meets an activation, make up the result's values.

    Where neurons come from depends on shapes, on constants and on a router's choices, not on the weights.
    """
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if not any(tensor.is_meta for tensor in tensors):
        return function(*args, **kwargs)
    if all(tensor.is_meta for tensor in tensors):
        # There is nothing to move to another device.
        return function(*args, **{name: value for name, value in kwargs.items() if name != "device"})
    to_meta = partial(tree_map_only, Tensor, lambda tensor: tensor.to("meta"))
    result = function(*to_meta(args), **to_meta(dict(kwargs)))
    if function._schema.is_mutable:
        return args[0]
    return tree_map_only(Tensor, _make_up, result)


def _make_up(tensor: Tensor) -> Tensor:
    """Values for a meta tensor: random numbers, or zeros where they are no floating-point numbers."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def trace(model: nn.Module, arguments: tuple, keywords: Mapping[str, Any], hollow: bool = False) -> Trace:
    """Run ``model(*arguments, **keywords)`` once and return what was recorded.

    Neurons that reach the model's output are pinned: a caller knows them by position.

    Args:
        hollow: leave the parameters' values out (:func:`run_hollow`); for models that are large or on the meta device.
    """
    parameters = None
    if hollow:
        parameters = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    with quiet_forward(model):
        mode = Trace(model, (arguments, dict(keywords)), parameters)
        with mode:
            if parameters is None:
                output = model(*arguments, **keywords)
            else:
                output = functional_call(model, parameters, arguments, dict(keywords))
    for leaf in output_tensors(output):
        ids = mode.ids(leaf)
        if ids is not None:
            mode.record.pin(ids, "output of the model")
    return mode


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, whatever containers they are in.

    Of an output that has logits, only these and the loss: hidden states beside them (an encoder's) are by-products.
    """
    if isinstance(output, Mapping) and output.get("logits") is not None:
        output = {name: output[name] for name in ("loss", "logits") if output.get(name) is not None}
    elif hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def on_cpu(value: Any) -> Any:
    """Tensors inside nested arguments, moved to the CPU, where ids live."""
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), value)
