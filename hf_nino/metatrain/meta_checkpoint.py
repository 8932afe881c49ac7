"""Checkpoints of meta-training: folders with safetensors and JSON, whole or absent.

=========================  =========================================================================================
``model.safetensors``      the nowcaster's weights
``optimizer.safetensors``  ``"KIND/NAME"``: what AdamW keeps of each weight
``state.json``             steps done, what was skipped, losses so far, and what decides the run
=========================  =========================================================================================
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..training.snapshot_file import TEMPORARY, sync_directory

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
KEPT = 2
"""Checkpoints that are kept: the last ones."""

_FOLDER = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    out: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], step: int
) -> Path:
    """Write ``out/checkpoint-STEP`` and delete those before the last :data:`KEPT`.

    Args:
        optimizer: over the parameters of ``network``, in their order.
        state: what JSON can hold.
    """
    folder = out / f"checkpoint-{step}"
    temporary = out / f"{folder.name}{TEMPORARY}"
    for path in (temporary, folder):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_on_host(network.state_dict()), temporary / MODEL)
    save_file(_on_host(_optimizer_tensors(network, optimizer)), temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(dict(state)) + "\n", encoding="utf-8")
    os.replace(temporary, folder)
    sync_directory(out)
    for _, path in _checkpoints(out)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def last_checkpoint(out: Path) -> Path | None:
    """The checkpoint after most steps, if there is one."""
    found = _checkpoints(out)
    return found[-1][1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        ValueError: it is absent or malformed.
    """
    try:
        return json.loads((checkpoint / STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint / STATE} cannot be read ({error}): delete {checkpoint.name} to go on from the one before"
        ) from error


def load_checkpoint(checkpoint: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and optimizer, bit for bit.

    Raises:
        OSError, ValueError: a file is absent, or has other tensors than the nowcaster.
    """
    device = next(network.parameters()).device
    weights, kept = (load_file(checkpoint / name, device=str(device)) for name in (MODEL, OPTIMIZER))
    names = [name for name, _ in network.named_parameters()]
    kinds = sorted({key.split("/", 1)[0] for key in kept})
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
        raise ValueError(f"{checkpoint / MODEL} must hold the nowcaster's weights, but has other names or shapes")
    if kept.keys() != {f"{kind}/{name}" for kind in kinds for name in (names if kinds else ())}:
        raise ValueError(f"{checkpoint / OPTIMIZER} must hold the same for every weight of the nowcaster")
    network.load_state_dict(weights)
    # AdamW counts steps on the host, wherever the weights are.
    state = {
        number: {kind: _counted(kind, kept[f"{kind}/{name}"]) for kind in kinds} for number, name in enumerate(names)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state if kinds else {}})


def _counted(kind: str, tensor: Tensor) -> Tensor:
    return tensor.cpu() if kind == "step" else tensor


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": tensor
        for name, parameter in network.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    found = [(_FOLDER.fullmatch(path.name), path) for path in out.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())
