"""``merge_folders``: checkpoints in, a complete one out, tensor by tensor."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..graph import NeuralGraph
from ..nowcaster import Nowcaster, load_nowcaster
from ..offline.output import check_target, copy_beside, whole_folder, write_json
from ..offline.parameters import model_graph
from ..offline.predicting import label
from ..offline.runs import BESIDE
from ..offline.weights import Drafts, Renamed, Weights
from .reading import check_count, named_alike, naming_of
from .recipe import MergeRecipe
from .states import merge_states

SUMMARY = "nino_merge.json"
"""Says how the weights beside it were made."""

OF_TRAINING = (*BESIDE, "trainer_state", "custom_checkpoint", "global_step", "runs", "logs", "nino_")
"""How the names of files begin that belong to the base's training and not to its model."""


@dataclass(frozen=True)
class FolderMerge:
    """What was done; ``nino_merge.json`` says the same, but for ``out``.

    Attributes:
        out: the merged model.
        method, scale, horizons, order: as they were used; see :class:`MergeRecipe`.
        nowcaster: its name, or its class.
        base, fine_tuned: names of the models.
        tensors, parameters: that were merged.
        kept: tensors that are the base's.
        seconds: that it took.
    """

    out: str
    method: str
    nowcaster: str | None
    scale: float
    horizons: list[int] | None
    order: list[int] | None
    rotate: bool
    base: str
    fine_tuned: list[str]
    tensors: int
    parameters: int
    kept: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"format_version": 1, "hf_nino": __version__, **asdict(self)}


def merge_folders(
    base: str | os.PathLike,
    fine_tuned: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    nowcaster: str | os.PathLike | Nowcaster | None = None,
    *,
    recipe: MergeRecipe | None = None,
    model: nn.Module | str | Path | None = None,
    graph: NeuralGraph | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> FolderMerge:
    """:func:`~hf_nino.merging.merge_models` for checkpoints, in the memory of a few of the largest tensor.

    The result is the base's folder with other weights, in its dtypes and shards: ``from_pretrained`` loads it.  What
    belongs to training (optimizer, ``trainer_state.json`` and so on) is left out.

    Args:
        base, fine_tuned: folders or files of weights; the names in them must be the same.
        out: folder to write; it appears when it is whole, or not at all.
        recipe: settings; default: ``MergeRecipe()``.
        model, graph, device: as for :func:`hf_nino.offline.nowcast_checkpoints`.
        overwrite: whether ``out`` may be replaced.

    Raises:
        ValueError, InvalidNowcast: see :func:`~hf_nino.merging.merge_models`; nothing is written then.
    """
    started = time.perf_counter()
    recipe = recipe or MergeRecipe()
    folders = [Path(path).expanduser() for path in (base, *check_count(fine_tuned))]
    out = Path(out).expanduser()
    chosen = load_nowcaster(nowcaster) if nowcaster is not None and recipe.method == "nowcast" else None
    recipe = recipe.for_nowcaster(chosen, len(folders) - 1)
    check_target(out, folders, overwrite)
    if device is not None and isinstance(chosen, nn.Module):
        chosen.to(device)
    weights = [Weights.at(folder) for folder in folders]
    if chosen is None or not chosen.needs_graph:
        graph = None
    elif graph is None:
        graph = model_graph(model, folders[0])
    naming = naming_of(weights[0], folders[0], model, graph)
    start, *states = named_alike(weights, naming)
    with whole_folder(out, folders, overwrite) as draft, tempfile.TemporaryDirectory(dir=draft) as scratch:
        drafts = Drafts(weights[0], draft)
        results = Renamed(drafts, naming.names)

        def room() -> Renamed:
            return Renamed(Drafts(weights[0], Path(tempfile.mkdtemp(dir=scratch))), naming.names)

        merge_states(recipe, chosen, graph, start, states, results, room)
        for alias, name in naming.aliases.items():
            drafts[alias].copy_(results[name].clone())
        drafts.finish()
        held = {Path(scratch).name, *(file.path.name for file in weights[0].files)}
        if folders[0].is_dir():
            copy_beside(folders[0], draft, lambda path: path.name in held or path.name.startswith(OF_TRAINING))
        kept = sorted(name for name in naming.names if recipe.keeps(name))
        merged = [name for name in naming.names if name not in kept]
        found = FolderMerge(
            out=str(out),
            method=recipe.method,
            nowcaster=None if chosen is None else label(nowcaster, chosen),
            scale=recipe.factor,
            horizons=recipe.horizons and list(recipe.horizons),
            order=recipe.order and list(recipe.order),
            rotate=bool(recipe.rotate),
            base=folders[0].resolve().name,
            fine_tuned=[folder.resolve().name for folder in folders[1:]],
            tensors=len(merged),
            parameters=sum(torch.Size(weights[0].shape(naming.names[name])).numel() for name in merged),
            kept=kept,
            seconds=time.perf_counter() - started,
        )
        write_json(draft / SUMMARY, {key: value for key, value in found.to_dict().items() if key != "out"})
    return found
