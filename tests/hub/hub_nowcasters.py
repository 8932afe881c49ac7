"""Nowcasters as the files of a repository."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from hf_nino.nowcaster import NowcasterConfig, WNNModel


def wnn(seed: int = 0, **settings) -> WNNModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WNNModel(NowcasterConfig(nowcaster_type="wnn", hidden_size=8, **settings))


def files(model: WNNModel, **changes) -> dict[str, bytes]:
    """What ``save_pretrained`` writes; ``changes`` are those of config.json."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    found["config.json"] = json.dumps({**json.loads(found["config.json"]), **changes}).encode()
    return found


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """The same weights, bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
