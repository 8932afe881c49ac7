"""Nowcast from the saved checkpoints of a run, into a checkpoint that training resumes from."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .._version import __version__
from ..graph import NeuralGraph
from ..nowcaster import Nowcaster, load_nowcaster
from ..training.guard import Verdict
from .conversion import Converted
from .output import SUMMARY, check_target, copy_beside, whole_folder, write_json
from .parameters import (
    NamesDiffer,
    Naming,
    bare_model,
    loadable,
    model_graph,
    names_in_file,
    names_in_model,
    tied_names,
)
from .predicting import apply_guard, carries, label, predict_into
from .runs import Selection, select
from .weights import Drafts, Renamed, Weights

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
REPLAYED = 5
"""Checkpoints that are shown at most to a nowcaster that carries a memory and reads one state at a time."""


@dataclass(frozen=True)
class OfflineNowcast:
    """What was done; ``nino_nowcast.json`` says the same.

    Attributes:
        out: the new checkpoint.
        nowcaster: its name, or its class.
        checkpoints: names of those that were read, oldest first.
        steps: at which they were saved, where that is known.
        interval: how far they are apart, in ``unit``: ``"steps"`` or ``"saves"``.
        horizon: intervals ahead of the last one.
        horizon_steps: the same in ``unit``.
        parameters: numbers that were predicted.
        tensors: tensors that they are in.
        unmoved: tensors that did not move and were left alone.
        shortened, left_alone: tensors whose step was too long, or absurd.
        carried: other tensors of the last checkpoint, which were carried over.
        step_norm, relative_step_norm, alignment: see :class:`~hf_nino.training.guard.Verdict`; ``None``
            where there is none.
        remarks: what a person should know.
        seconds: that it took.
    """

    out: str
    nowcaster: str
    checkpoints: list[str]
    steps: list[int] | None
    interval: int | None
    unit: str | None
    horizon: int
    horizon_steps: int | None
    parameters: int
    tensors: int
    unmoved: int
    shortened: list[str]
    left_alone: list[str]
    carried: list[str]
    step_norm: float | None
    relative_step_norm: float | None
    alignment: float | None
    remarks: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"format_version": FORMAT_VERSION, "hf_nino": __version__, **asdict(self)}


def nowcast_checkpoints(
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
    nowcaster: str | os.PathLike | Nowcaster,
    out: str | os.PathLike,
    *,
    horizon: int | None = None,
    model: nn.Module | str | Path | None = None,
    graph: NeuralGraph | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> OfflineNowcast:
    """Write the checkpoint that a nowcaster predicts from the last ones of a run.

    The result is the last checkpoint with other parameters: buffers, tensors of integers, tied weights, dtypes,
    shards, and every other file (optimizer, scheduler, random numbers, tokenizer, configuration) are as they were, so
    that training resumes from it; only the history of nowcasts made during training, which ends with the old
    parameters, is left behind.  The guard of training judges it (:mod:`hf_nino.training.guard`).

    Safetensors are read and written tensor by tensor, in place of a mapped file, so that the memory taken grows with
    the largest tensor (about a dozen times its float32 size, half of it pages of files that the system may drop; next
    to nothing but these where every element is predicted alone) and not with the model.  Pickles (``.pt``, ``.bin``)
    are read with ``weights_only=True``, and the new state is in memory until it is written.

    Where a checkpoint's tensors are not the model's parameters (transformers fuses experts when it loads them), a
    nowcaster that needs the graph gets the parameters of the loaded model, one in memory at a time, the others in
    files; one that does not gets the tensors of the checkpoint.

    Args:
        checkpoints: a run's folder (of Trainer, of accelerate's ``save_state``, or with plain files), of which the
            newest equally spaced checkpoints are taken; or the checkpoints, oldest first: folders or files.
        nowcaster: a :class:`Nowcaster`, or what :func:`hf_nino.load_nowcaster` takes.  An interval is the spacing of
            the checkpoints, whatever the nowcaster's own is.  One that carries a memory sees the last 2 to 5, as if
            training had never used what it said; its memory is empty afterwards.
        out: folder to write; it appears when it is whole, or not at all.
        horizon: intervals ahead; default: as many as the nowcaster reads snapshots (one period), less if it never
            goes so far.
        model: it, or where its configuration is; default: ``config.json`` of the last checkpoint.  Only needed by
            nowcasters on the graph; without it, buffers are known by name (``running_mean``, ``running_var``).
        graph: the model's neural graph, if it is at hand.
        device: where a nowcaster with weights computes; default: where it is.
        overwrite: whether ``out`` may be replaced.

    Returns:
        What was done.

    Raises:
        ValueError: too few checkpoints, not equally spaced, or that cannot be read; no graph; a bad ``out`` or
            ``horizon``.
        InvalidNowcast: the guard refused it; nothing is written.
    """
    started = time.perf_counter()
    chosen = load_nowcaster(nowcaster)
    several = isinstance(checkpoints, Sequence) and not isinstance(checkpoints, str)
    paths = [Path(path).expanduser() for path in (checkpoints if several else [checkpoints])]
    if not paths:
        raise ValueError("`checkpoints` must name a run, or its checkpoints, got none")
    out = Path(out).expanduser()
    horizon = min(chosen.context, chosen.reach) if horizon is None else horizon
    if not 1 <= horizon <= chosen.max_horizon:
        raise ValueError(
            f"`horizon` must be from 1 to {chosen.max_horizon} intervals for this nowcaster, got {horizon}"
        )
    selection = select(paths, range(REPLAYED, 1, -1) if carries(chosen) else [chosen.context])
    folders = [checkpoint.path for checkpoint in selection.checkpoints]
    check_target(out, folders, overwrite)
    weights = _consistent([Weights.at(path) for path in folders], folders)
    if device is not None and isinstance(chosen, nn.Module):
        chosen.to(device)
    work = _Work(chosen, folders, weights, model, graph, horizon)
    with whole_folder(out, folders, overwrite) as draft:
        drafts = Drafts(weights[-1], draft)
        verdict, tensors, parameters = work.run(drafts, draft)
        drafts.finish()
        last = folders[-1]
        if last.is_dir():
            held = {file.path.name for file in weights[-1].files}
            copy_beside(last, draft, lambda path: path.name in held)
        found = _summary(out, label(nowcaster, chosen), selection, horizon, verdict, tensors, parameters, work.carried)
        found = OfflineNowcast(**found, seconds=time.perf_counter() - started)
        values = found.to_dict()
        del values["out"]  # folders are moved
        write_json(draft / SUMMARY, values)
    return found


class _Work:
    """One nowcast: which tensors, by which names, and how they come back."""

    def __init__(
        self,
        nowcaster: Nowcaster,
        folders: Sequence[Path],
        weights: Sequence[Weights],
        model: nn.Module | str | Path | None,
        graph: NeuralGraph | None,
        horizon: int,
    ) -> None:
        self.nowcaster, self.folders, self.weights, self.horizon = nowcaster, folders, weights, horizon
        self.graph, self.naming, self.carried = None, None, []
        last = folders[-1]
        if not nowcaster.needs_graph:
            self.naming = names_in_file(weights[-1], bare_model(model, last))
            return
        self.graph = model_graph(model, last) if graph is None else graph
        wanted = {name: self.graph.shapes[name] for name in self.graph.parameter_names}
        tied = dict(self.graph.aliases)
        if isinstance(model, nn.Module):
            tied |= tied_names(model)
        try:
            self.naming = names_in_model(weights[-1], wanted, tied)
        except NamesDiffer as error:
            if loadable(last) is None or not all(path.is_dir() for path in folders):
                raise NamesDiffer(f"{error}; name the model that was saved (`--model`)") from error
            logger.info(f"{error}: the checkpoints are loaded by transformers, one after the other.")

    def run(self, drafts: Drafts, folder: Path) -> tuple[Verdict, int, int]:
        """Predict, judge, write; the verdict, and how many tensors and numbers it is about."""
        if self.naming is not None:
            return self._by_name(self.naming, drafts)
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
            dtype = next(iter(self.weights[-1].values())).dtype
            converted = Converted(loadable(self.folders[-1]), self.folders, dtype, Path(scratch))
            names = {name: name for name in self.graph.parameter_names}
            results = converted.results()
            verdict = self._predict([Renamed(state, names) for state in converted.states], Renamed(results, names))
            tensors = converted.write(results, drafts)
            return verdict, tensors, self.graph.num_parameters

    def _by_name(self, naming: Naming, drafts: Drafts) -> tuple[Verdict, int, int]:
        results = Renamed(drafts, naming.names)
        verdict = self._predict([Renamed(weights, naming.names) for weights in self.weights], results)
        for alias, name in naming.aliases.items():
            drafts[alias].copy_(results[name].clone())
        last = self.weights[-1]
        written = {*naming.names.values(), *naming.aliases}
        self.carried = sorted({*last, *last.others} - written)
        return verdict, len(results), sum(torch.Size(last.shape(name)).numel() for name in naming.names.values())

    def _predict(self, states: Sequence[Mapping[str, Tensor]], results: Mapping[str, Tensor]) -> Verdict:
        predict_into(self.nowcaster, self.graph, states, self.horizon, results)
        return apply_guard(states, results, self.horizon, self.nowcaster.context)


def _consistent(weights: list[Weights], folders: Sequence[Path]) -> list[Weights]:
    """The same, if all hold the same tensors."""
    first = weights[0]
    for other, folder in zip(weights[1:], folders[1:], strict=True):
        odd = sorted(other.keys() ^ first.keys())
        odd = odd or [name for name in other if other.shape(name) != first.shape(name)]
        if odd:
            raise ValueError(
                f"checkpoints must hold the same tensors, but {folder} and {folders[0]} differ in {odd[:3]}; are they "
                "of one run?"
            )
    return weights


def _summary(
    out: Path,
    nowcaster: str,
    selection: Selection,
    horizon: int,
    verdict: Verdict,
    tensors: int,
    parameters: int,
    carried: list[str],
) -> dict[str, Any]:
    remarks = [remark for remark in (selection.remark, verdict.remarks) if remark]
    interval = selection.interval
    measured = {name: getattr(verdict, name) for name in ("step_norm", "relative_step_norm", "alignment")}
    return {
        "out": str(out),
        "nowcaster": nowcaster,
        "checkpoints": [checkpoint.name for checkpoint in selection.checkpoints],
        "steps": None if interval is None else [checkpoint.number for checkpoint in selection.checkpoints],
        "interval": interval,
        "unit": selection.unit,
        "horizon": horizon,
        "horizon_steps": None if interval is None else horizon * interval,
        "parameters": parameters,
        "tensors": tensors,
        "unmoved": len(verdict.unmoved),
        "shortened": sorted(verdict.shortened),
        "left_alone": sorted(verdict.left_alone),
        "carried": carried,
        **{name: value if math.isfinite(value) else None for name, value in measured.items()},
        "remarks": remarks,
    }
