"""What ``trajectory.json`` says of a run: model, optimizer, seed, software, and what of the parameters was kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .. import __version__
from ..graph.wrappers import inner_module
from ..training.stores import PlainStore
from .recipe import Recipe

ROWS_SEED = 0
"""Which rows of an embedding are kept depends on this and on how many there are, and so is the same in all runs."""

_NUMBERS = (bool, int, float, str, type(None))


def describe_run(
    model: nn.Module,
    *,
    optimizer: Mapping[str, Any],
    recipe: Recipe,
    rows: Mapping[str, Tensor],
    seed: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The description of a run that begins, for :class:`~hf_nino.metatrain.shards.TrajectoryWriter`.

    Args:
        optimizer: see :func:`describe_optimizer`.
        recipe: how it is recorded.
        rows: see :func:`choose_rows`.
        seed: of the run.
        more: further entries that JSON can hold, such as ``task`` and ``settings``.
    """
    store = PlainStore(model)
    parameters = {}
    for name, parameter in store.parameters().items():
        entry: dict[str, Any] = {"shape": list(parameter.shape), "dtype": name_of(parameter.dtype)}
        if name in rows:
            kept = rows[name]
            entry |= {"shape": [len(kept), *parameter.shape[1:]], "rows": kept.tolist(), "of": len(parameter)}
        parameters[name] = entry
    return {
        "model": describe_model(store.model),
        "optimizer": dict(optimizer),
        "seed": seed,
        "software": software(),
        "interval": recipe.every,
        "dtype": recipe.dtype,
        "with_moments": recipe.moments,
        "moments_dtype": name_of(recipe.moments_dtype),
        "rows_seed": ROWS_SEED,
        "parameters": parameters,
        **(more or {}),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class and, of a transformers model, configuration."""
    config = getattr(model, "config", None)
    found: dict[str, Any] = {"class": type(model).__name__}
    if isinstance(config, transformers.PreTrainedConfig):
        # In full: what differs from the defaults would depend on the version of transformers.
        found["config"] = json.loads(config.to_json_string(use_diff=False))
    return found


def describe_optimizer(optimizer: Any, store: PlainStore) -> dict[str, Any]:
    """Name, and of each parameter group the settings and the names of its parameters.

    Args:
        optimizer: without wrappers, see :func:`bare_optimizer`.
    """
    names = {id(parameter): name for name, parameter in store.parameters().items()}
    groups = []
    for group in getattr(optimizer, "param_groups", ()):
        settings = {key: _number(value) for key, value in group.items() if key != "params"}
        known = {key: value for key, value in settings.items() if isinstance(value, (*_NUMBERS, list))}
        groups.append(known | {"parameters": [names[id(p)] for p in group["params"] if id(p) in names]})
    return {"name": type(optimizer).__name__, "groups": groups}


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper and :class:`~hf_nino.training.optimizer.NiNo`."""
    while True:
        inner = getattr(optimizer, "base_optimizer", None) or getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return optimizer
        optimizer = inner


def software() -> dict[str, str]:
    """Versions."""
    return {
        "hf_nino": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def choose_rows(model: nn.Module, max_rows: int | None) -> dict[str, Tensor]:
    """Which rows of large embeddings to keep: {name: sorted int64 indices}; parameters that are kept whole are absent.

    Embeddings, and the output embeddings of a transformers model with their bias.  Tensors with equally many rows keep
    the same ones, so that tokens at both ends of a model stay the same tokens.

    Args:
        max_rows: of an embedding; ``None``: keep all.
    """
    if max_rows is None:
        return {}
    model = inner_module(model)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    output = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    tensors = [table.weight for table in tables]
    if isinstance(getattr(output, "weight", None), Tensor):
        tensors += [output.weight, *([output.bias] if isinstance(getattr(output, "bias", None), Tensor) else [])]
    large = {id(tensor) for tensor in tensors if len(tensor) > max_rows}
    found = {}
    for name, parameter in PlainStore(model).parameters().items():
        if id(parameter) in large:
            generator = torch.Generator().manual_seed(ROWS_SEED)
            found[name] = torch.randperm(len(parameter), generator=generator)[:max_rows].sort().values
    return found


def name_of(dtype: Any) -> str:
    """``"float32"`` from ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return list(value) if isinstance(value, tuple) else value
