"""A run small enough for tests, with a record of it; and a page, taken apart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import torch
from torch import nn

from hf_nino.nowcaster.rules import LinearNowcaster
from hf_nino.report import RunRecord
from hf_nino.training import Nowcasting

PERIOD = 10


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(network: nn.Module, steps: int, record: RunRecord | None = None, first: int = 0, **settings) -> Nowcasting:
    """``steps`` steps of Adam on noise, with nowcasts every :data:`PERIOD`, recorded if so told."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    settings = {"max_steps": 400, "patience": 0, **settings}
    nowcasting = Nowcasting(LinearNowcaster(period=PERIOD), network, **settings)
    nowcasting.begin(first, optimizer)
    if record is not None:
        record.begin(nowcasting)
    for step in range(first, first + steps):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (network(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nowcasting.record_loss(loss)
        if record is not None:
            record.before(nowcasting)
        event = nowcasting.step(optimizer=optimizer)
        if record is not None:
            record.after(nowcasting, event)
    if record is not None:
        record.end(nowcasting)
    return nowcasting


def trainer_folder(folder: Path, logs: list[dict], steps: int, **state) -> Path:
    """A folder with the log of a Trainer in its last checkpoint."""
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir(parents=True)
    written = {"global_step": steps, "max_steps": steps, "log_history": logs, **state}
    (checkpoint / "trainer_state.json").write_text(json.dumps(written))
    return folder


def parse(text: str) -> ET.Element:
    """The page as a tree; raises if it is not well-formed."""
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


def words(tree: ET.Element) -> str:
    """Everything that is text, but for the style sheet."""
    return " ".join(" ".join(e.itertext()) for e in tree.iter() if e.tag in ("main", "footer", "title"))


def charts(tree: ET.Element) -> list[ET.Element]:
    """The pictures that tell something; keys of legends are hidden from readers."""
    return [svg for svg in tree.iter("svg") if svg.get("role") == "img"]
