"""What it takes to undo a nowcast, bit for bit: the state of the model, of the optimizer and of the nowcaster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .storage import DISK, DTYPES, Place, Snapshot, make_place
from .stores import ParameterStore

# What a learning-rate scheduler writes into parameter groups goes on; everything else in them is state.
_SCHEDULED = {"params", "lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "base_momentum", "max_momentum"}
_NUMBERS = (bool, int, float, str, type(None))


class NoUndo(Exception):
    """The state of this optimizer cannot be kept; the message says why."""


class Undo:
    """One state of a run, kept on the host, on the disk or on the device.

    Where several ranks train, each keeps its rows of the parameters and its part of the optimizer's state: its shards,
    or its rows of what all of them hold.

    Args:
        device: where, as for snapshots (:func:`hf_nino.training.storage.make_place`).  Each tensor keeps its dtype.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = str(device)
        self._places: dict[tuple[str, torch.dtype], Place] = {}
        self._kept: list[Snapshot] = []
        self._others: dict[str, Tensor] = {}
        self._numbers: dict[str, Any] = {}

    def keep_memory(self, memory: Mapping[str, Tensor], step: int) -> None:
        """Keep the nowcaster's memory as it is now, before a nowcast changes it, instead of the state kept before; the
        rest is for :meth:`keep`."""
        self.release()
        self._fill({f"memory/{name}": tensor for name, tensor in memory.items()}, step, "-memory")

    def keep(self, store: ParameterStore, optimizer: Any, memory: Mapping[str, Tensor] | None, step: int) -> None:
        """Keep the state as it is now, instead of the one kept before.

        Args:
            store: the parameters; the buffers that are saved with its model (statistics of batch normalization) are
                kept too.
            optimizer: its state, and what its groups hold beside settings of a schedule.
            memory: the nowcaster's; ``None``: what :meth:`keep_memory` kept.
            step: optimizer steps done.

        Raises:
            NoUndo: the optimizer keeps something else than tensors and numbers for a parameter (LBFGS).
        """
        live = store.live()  # before anything that may fail on one rank alone
        state, numbers = _optimizer_state(store, optimizer)
        if memory is not None:
            self.keep_memory(memory, step)
        tensors = {f"parameter/{name}": tensor for name, tensor in live.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in saved_buffers(store.model).items()}
        self._fill(tensors | state, step)
        self._numbers = numbers

    def restore(self, store: ParameterStore, optimizer: Any) -> dict[str, Tensor]:
        """Write the kept state back, in place; the nowcaster's memory is returned.

        Raises:
            OSError: it was to be on the disk and is not; nothing has been written then.
        """
        kept = self.tensors()
        store.write({name.removeprefix("parameter/"): t for name, t in kept.items() if name.startswith("parameter/")})
        with torch.no_grad():
            for name, tensor in saved_buffers(store.model).items():
                tensor.copy_(kept[f"buffer/{name}"])
            _restore_optimizer(store, optimizer, kept, self._numbers)
        return {name.removeprefix("memory/"): t for name, t in kept.items() if name.startswith("memory/")}

    def release(self) -> None:
        """Give the memory back; the next state may use it again."""
        for snapshot in self._kept:
            snapshot.release()
        self._kept, self._others, self._numbers = [], {}, {}

    def close(self) -> None:
        """Give back everything, files included."""
        self.release()
        for place in self._places.values():
            place.close()
        self._places = {}

    def tensors(self) -> dict[str, Tensor]:
        """{``"kind/name"``: tensor}; to be read only.

        Raises:
            OSError: it was to be on the disk and is not.
        """
        found = {name: tensor for snapshot in self._kept for name, tensor in snapshot.tensors().items()}
        return found | self._others

    def numbers(self) -> dict[str, Any]:
        """What the optimizer keeps that is no tensor; JSON can hold it."""
        return dict(self._numbers)

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], step: int) -> None:
        """Restore what :meth:`tensors` and :meth:`numbers` gave."""
        self.release()
        self._fill(dict(tensors), step)
        self._numbers = dict(numbers)

    def _fill(self, tensors: Mapping[str, Tensor], step: int, what: str = "") -> None:
        for dtype in DTYPES:
            part = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
            if part:
                self._kept.append(self._place(what, dtype).keep(part, step))
        self._others |= {name: t.detach().clone() for name, t in tensors.items() if t.dtype not in DTYPES}

    def _place(self, what: str, dtype: torch.dtype) -> Place:
        if (what, dtype) not in self._places:
            folder = f"/undo{what}-{str(dtype).removeprefix('torch.')}" if self.device.startswith(DISK) else ""
            self._places[what, dtype] = make_place(self.device + folder, dtype)
        return self._places[what, dtype]


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the buffers that are saved with a model: its statistics, not its masks and tables."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _optimizer_state(store: ParameterStore, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = {}, {}
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise NoUndo(f"{type(optimizer).__name__} keeps its state out of reach; use ZeRO-1 or FSDP to divide it")
    for place, parameter, entry in _entries(optimizer):
        numbers[place] = None  # it exists, were it empty
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{place}/{key}"] = value if parameter is None else store.rows_of_state(parameter, value)
            elif isinstance(value, _NUMBERS):
                numbers[f"{place}/{key}"] = value
            elif parameter is not None:
                raise NoUndo(f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}, in its state")
    return tensors, numbers


def _restore_optimizer(
    store: ParameterStore, optimizer: Any, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    state = getattr(optimizer, "state", {})
    for index, parameter in enumerate(_parameters(optimizer)):
        if f"state/{index}" not in numbers:
            state.pop(parameter, None)  # it has got state since
    rows = {}
    for place, parameter, entry in _entries(optimizer):
        for key in list(entry):
            name = f"{place}/{key}"
            if name in tensors:
                if not isinstance(entry[key], Tensor):
                    entry[key] = tensors[name].clone()
                elif parameter is None:
                    entry[key].copy_(tensors[name])
                else:
                    rows[name] = parameter, entry[key], tensors[name]
            elif name in numbers:
                entry[key] = numbers[name]
            elif parameter is not None:
                del entry[key]
    store.write_states(rows)


def _entries(optimizer: Any) -> list[tuple[str, Tensor | None, dict[str, Any]]]:
    """The optimizer's dictionaries with a place each: one for each parameter that has state, one for each group."""
    state = getattr(optimizer, "state", {})
    found = [(f"state/{i}", p, state[p]) for i, p in enumerate(_parameters(optimizer)) if p in state]
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        found.append((f"group/{index}", None, _Unscheduled(group)))
    return found


class _Unscheduled(dict):
    """The part of a parameter group that no scheduler writes; what is set here is set in the group."""

    def __init__(self, group: dict[str, Any]) -> None:
        super().__init__({key: value for key, value in group.items() if key not in _SCHEDULED})
        self._group = group

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._group[key] = value


def _parameters(optimizer: Any) -> list[Tensor]:
    """Those in the groups, and those that only the state knows (ZeRO-3 puts them into groups for the step alone)."""
    grouped = [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]
    known = {id(parameter) for parameter in grouped}
    return grouped + [p for p in getattr(optimizer, "state", {}) if isinstance(p, Tensor) and id(p) not in known]
