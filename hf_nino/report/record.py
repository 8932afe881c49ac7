"""What training writes down for the report: ``nino_events.jsonl`` in the run's folder.

One JSON object a line, in the order in which things happened; ``record`` says what it is:

========== ======================================================================================================
run        the first line: ``format_version``, nowcaster, period, interval, patience, parameters, ...
resume     training went on from ``step``; lines after that step are gone
snapshot   ``point``: the projection (:mod:`.projection`) of the parameters at ``step``, before a nowcast of that step
nowcast    the fields of :class:`~hf_nino.training.event.NowcastEvent`; ``point`` after it was written or taken back
judged     the end of the probation of ``nowcast``: ``observed``, ``expected`` and ``error`` of the loss
estimate   what nowcasting costs, once training has timed its first steps
end        ``seconds`` on nowcasts, ``elapsed``, peak memory
========== ======================================================================================================

Every line has ``step`` and ``elapsed``, the wall time of the run so far.  About 1 KB a snapshot, 2000 of them at most
where the length of the run is known.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from .._version import __version__
from .projection import DIMENSIONS, project

if TYPE_CHECKING:
    from ..training.event import NowcastEvent
    from ..training.nowcasting import Nowcasting

logger = logging.get_logger(__name__)

RECORD_NAME = "nino_events.jsonl"
FORMAT_VERSION = 1
# Points of the path that are kept of a run whose length is known.
MOST_POINTS = 2000


class RunRecord:
    """Writes ``nino_events.jsonl`` into a folder, beside training.

    Call :meth:`begin` after ``Nowcasting.begin``, :meth:`before` and :meth:`after` around every ``Nowcasting.step``,
    and :meth:`end`; where several ranks train, on all of them.  Parameters that training reads anyway are not read a
    second time.  Nothing that goes wrong here reaches the run: a full disk ends the record with one warning.

    Args:
        folder: of the run; created if need be.
        writes: whether this process is the one that writes.  Its projections are of the parameters that it holds.
        dimensions: of the projections; 0: none are taken.
    """

    def __init__(self, folder: str | os.PathLike, *, writes: bool = True, dimensions: int = DIMENSIONS) -> None:
        self.path = Path(folder) / RECORD_NAME
        self.dimensions = dimensions
        self._writes = writes
        self._started = time.perf_counter()
        self._opened: int | None = None
        self._estimated = False
        self._blind = False
        self._every = 1
        # Of the current step: whether its first point has been read here, how many states were seen, and the last one.
        self._read = False
        self._seen = 0
        self._arrived: dict[str, list[float]] = {}

    def begin(self, nowcasting: Nowcasting) -> None:
        """A run begins, or goes on from a checkpoint: then what an interrupted part of it left behind is dropped."""
        self._opened = nowcasting.probation.opened
        length = nowcasting.outlook.max_steps
        self._every = 1 if length is None else math.ceil(length / nowcasting.interval / MOST_POINTS)
        self._started = time.perf_counter()
        try:
            earlier = read_record(self.path) if nowcasting.step_count and self._writes else []
        except (OSError, ValueError):
            earlier = []
        live = nowcasting.store.live()
        description = describe(nowcasting, live, self.dimensions)
        first = self._snapshot(live, nowcasting.step_count)
        if self._writes and self.dimensions:
            nowcasting.on_state = partial(self._see, nowcasting)
        earlier = [line for line in earlier if line.get("step", 0) <= nowcasting.step_count]
        if earlier:
            self._started -= max(line.get("elapsed", 0.0) for line in earlier)
            lines = [*earlier, self._line("resume", nowcasting.step_count)]
        else:
            lines = [self._line("run", nowcasting.step_count, description), *first]
        self._write(lines, "w")

    def before(self, nowcasting: Nowcasting) -> None:
        """Right before ``Nowcasting.step``, with the parameters as the optimizer left them."""
        step = nowcasting.step_count + 1
        self._opened, self._seen, self._arrived = nowcasting.probation.opened, 0, {}
        self._read = nowcasting.probation.ends(step) and self._due(nowcasting, step)
        if self._read:  # they may be taken back before a snapshot is taken
            self._write(self._snapshot(nowcasting.store.live(), step))

    def after(self, nowcasting: Nowcasting, event: NowcastEvent | None) -> None:
        """Right after ``Nowcasting.step``, with what it returned."""
        step, lines = nowcasting.step_count, []
        # The same on all ranks: training has not read them at this step (warm-up, or nowcasts have ended).
        if not self._read and nowcasting.last_snapshot != step and self._due(nowcasting, step):
            lines += self._snapshot(nowcasting.store.live(), step)
        estimate = nowcasting.announcement.estimate
        if estimate is not None and not self._estimated:
            self._estimated = True
            lines.append(self._line("estimate", step, estimate.to_dict()))
        if self._opened is not None and nowcasting.probation.opened != self._opened:
            opened, comparison = nowcasting.probation.judged or (None, None)
            if opened == self._opened:
                lines.append(self._line("judged", step, {"nowcast": opened, **_finite(asdict(comparison))}))
        if event is not None:
            point = self._arrived if event.accepted else {}
            if event.taken_back_to is not None and self._kept(nowcasting, step):
                point = self._point(nowcasting.store.live())
            lines.append(self._line("nowcast", step, _finite(asdict(event)) | point))
        self._write(lines)

    def _see(self, nowcasting: Nowcasting, state: Mapping[str, Tensor]) -> None:
        """What training reads anyway: the state of a snapshot, then perhaps what a nowcast has made of it."""
        step, self._seen = nowcasting.step_count, self._seen + 1
        if not self._kept(nowcasting, step):
            return
        if self._seen > 1:
            self._arrived = self._point(state)
        elif not self._read:
            self._write(self._snapshot(state, step))

    def end(self, nowcasting: Nowcasting) -> None:
        """The run is over."""
        device = nowcasting.store.device
        peak = {"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
        names = ("seconds", "nowcasts", "rejected", "taken_back", "stopped")
        totals = {name: getattr(nowcasting, name) for name in names} | peak
        self._write([self._line("end", nowcasting.step_count, totals)])
        nowcasting.on_state = None

    def _due(self, nowcasting: Nowcasting, step: int) -> bool:
        """Whether the path has a point at ``step``."""
        on_grid = (-step % nowcasting.period) % nowcasting.interval == 0
        return bool(self.dimensions) and on_grid and self._kept(nowcasting, step)

    def _kept(self, nowcasting: Nowcasting, step: int) -> bool:
        """Whether points of the period that ``step`` lies in are kept: of a long run only some periods' are."""
        return -(-step // nowcasting.period) % self._every == 0

    def _snapshot(self, state: Mapping[str, Tensor], step: int) -> list[dict[str, Any]]:
        point = self._point(state)
        return [self._line("snapshot", step, point)] if point else []

    def _point(self, state: Mapping[str, Tensor]) -> dict[str, list[float]]:
        if self._blind or not self._writes or not self.dimensions:
            return {}
        try:
            point = project(state, self.dimensions)
        except Exception as error:
            self._blind, point = True, []
            logger.warning(f"The parameters cannot be projected for the report ({type(error).__name__}: {error}).")
        if not point:
            return {}
        return {"point": point} if all(map(math.isfinite, point)) else {}

    def _line(self, record: str, step: int, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        elapsed = round(time.perf_counter() - self._started, 3)
        return {"record": record, **(values or {}), "step": step, "elapsed": elapsed}

    def _write(self, lines: list[dict[str, Any]], mode: str = "a") -> None:
        if not lines or not self._writes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            self._writes = False
            logger.warning(f"{self.path} cannot be written ({error}): the report will know less of this run.")


def describe(nowcasting: Nowcasting, live: Mapping[str, Tensor], dimensions: int = DIMENSIONS) -> dict[str, Any]:
    """The first line of a record, of a run whose parameters on this process are ``live``."""
    parameters = sum(tensor.numel() for tensor in live.values())
    return {
        "format_version": FORMAT_VERSION,
        "hf_nino": __version__,
        "model": type(nowcasting.store.model).__name__,
        "parameters": parameters,
        "parameter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in live.values()),
        "nowcaster": nowcasting.spec,
        "kind": type(nowcasting.nowcaster).__name__,
        "context": nowcasting.history.context,
        "period": nowcasting.period,
        "interval": nowcasting.interval,
        "horizon": str(nowcasting.outlook.horizon.policy),
        "patience": nowcasting.probation.patience,
        "max_steps": nowcasting.outlook.max_steps,
        "history_device": nowcasting.history.device,
        "history_dtype": str(nowcasting.history.dtype).removeprefix("torch."),
        "history_bytes": nowcasting.history.context * parameters * nowcasting.history.dtype.itemsize,
        "undo_device": nowcasting.undo.device,
        "dimensions": dimensions,
    }


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that a killed process left half-written at the end is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no record, or of another format version.
    """
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            if number == len(texts) and lines:
                break
            raise ValueError(f"line {number} of {path} is malformed ({error})") from error
        lines.append(line)
    version = lines[0].get("format_version") if lines else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}, this version reads {FORMAT_VERSION}")
    return lines


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
