"""The original release's code on the same states, run from a checkout of it as it is.

What it computes is compared as well as what it costs.  Two things would hide whether both compute the same function:
its positional encoding has random signs, so ours is replaced by it; and in GPT-2's graph it hangs the bias of keys on
the residual stream, so the prediction is made on our graph and once more on a graph that is wired as its own is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...nowcaster import Engine
from .measure import PeakMemory, network_of, prepare, relative_difference, timed
from .models import Shape, trajectory
from .wiring import Wiring

CHECKPOINT = Path("checkpoints") / "nino_no_posw.pt"
CONSTANT_VALUES = 3
"""Edges without a parameter have the values 0, 1 and 2; parameters are numbered from here on."""


def check_checkout(path: Path) -> Path:
    """The absolute path of a checkout.

    Raises:
        ValueError: it is none.
    """
    if not (path / "optim" / "nino.py").is_file():
        raise ValueError(
            f"`original` must be a checkout of github.com/SamsungSAILMontreal/nino, but {path} has no optim/nino.py"
        )
    return path.resolve()


def check_runs() -> dict[str, Any]:
    """Nothing, if the release's code can be imported here."""
    _release()
    return {}


def original_nowcast(shape: Mapping[str, Any], checkpoint: str, horizon: int, file: str) -> dict[str, Any]:
    """Seconds and memory of one nowcast by the release's code, with its graph and prediction left in ``file``.

    Its graph is made before the clock starts, as ours is.
    """
    device = torch.device("cpu")
    model = Shape(**shape).model().eval()
    step, context = None, 1
    states = trajectory({name: tuple(p.shape) for name, p in model.named_parameters()}, 5, device, torch.float32)
    for number, state in enumerate(states):
        _load(model, state)
        if step is None:
            nothing = torch.optim.SGD(model.parameters(), lr=0.0)
            step = _release()(
                nothing, model, ckpt=checkpoint, period=5, verbose=0, nino_device="cpu", max_train_steps=50
            )
            context = step.ctx
        if number + 1 < context:
            step.step()  # takes a snapshot
    (_, seconds), memory = PeakMemory(device).of(lambda: timed(lambda: step.step(k=horizon), device))
    save_file(_explicit(step, model), file)
    return {"seconds": [seconds], "extra_bytes": memory}


def compare(shape: Mapping[str, Any], checkpoint: str, horizon: int, file: str) -> dict[str, float]:
    """How far predictions are from the release's in ``file``: norm of the difference over norm of its step.

    ``difference`` is that of ``float32`` on a graph wired like the release's, ``own_difference`` on our own;
    ``fast_difference`` is that of ``fast`` on the former.
    """
    device = torch.device("cpu")
    network = network_of(checkpoint, device)
    _, graph, history, _ = prepare(Shape(**shape), network, "host", torch.float32, device)
    states, theirs = history.states(), load_file(file)
    expected, first = {}, 0
    for name, tensor in states[-1].items():
        expected[name] = theirs["prediction"][first : first + tensor.numel()].view(tensor.shape)
        first += tensor.numel()
    wiring = Wiring(graph, list(states[-1]), theirs["ends"].long(), theirs["constants"].long())
    pos = theirs["pos"][wiring.theirs]
    like = wiring.graph()
    runs = {"own_difference": (graph, "float32"), "difference": (like, "float32"), "fast_difference": (like, "fast")}
    found = {"rewired_edges": float(wiring.rewired_edges)}
    for name, (on, mode) in runs.items():
        predicted = network.nowcast(on, states, horizon, pos=pos, engine=Engine(precision=mode))
        found[name] = relative_difference(predicted, expected, states[-1])
    return found


def _release() -> Any:
    """The release's optimizer wrapper; its checkout is first on the path."""
    return import_module("optim").NiNo


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def _explicit(step: Any, model: nn.Module) -> dict[str, Tensor]:
    """The release's prediction and its graph: nodes at both ends of every parameter and of every constant edge."""
    parameters: Sequence[Tensor] = [p.detach() for p in model.parameters()]
    prediction = torch.cat([p.flatten() for p in parameters])
    numbers = torch.arange(len(prediction), dtype=torch.float64)[:, None] + CONSTANT_VALUES
    data = step.graph.pyg_graph
    number = step.graph.to_edges(numbers)[:, 0].long() - CONSTANT_VALUES
    trained = number >= 0
    ends = torch.empty(2, len(prediction), dtype=torch.int32)
    ends[:, number[trained]] = data.edge_index[:, trained].int()
    loops = data.edge_index[0] == data.edge_index[1]
    rest = ~trained & ~loops
    constants = torch.cat([data.edge_index[:, rest], data.edge_type[None, rest]]).int()
    return {"prediction": prediction, "pos": data.pos.float().contiguous(), "ends": ends, "constants": constants}
