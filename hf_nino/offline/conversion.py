"""Checkpoints whose tensors are not the model's parameters: transformers fuses or renames them when it loads them.

The states are then those of the loaded models, kept as files beside the result; the way back is the one by which
transformers saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..training.snapshot_file import write_snapshot
from .parameters import NamesDiffer
from .tensor_files import SafetensorsFile
from .weights import Drafts, Weights


class Converted:
    """Checkpoints as transformers loads them: one model in memory at a time, its parameters in a file.

    Args:
        cls: what loads them.
        checkpoints: folders, oldest first.
        dtype: of the parameters in them.
        scratch: folder for the files.

    Attributes:
        states: the parameters of each, memory-mapped.
    """

    def __init__(
        self, cls: type[PreTrainedModel], checkpoints: Sequence[Path], dtype: torch.dtype, scratch: Path
    ) -> None:
        self.cls, self.last, self.dtype, self.scratch = cls, checkpoints[-1], dtype, scratch
        self.states = []
        for number, checkpoint in enumerate(checkpoints):
            path = scratch / f"{number}.safetensors"
            model = self._load(checkpoint)
            write_snapshot(path, {name: p.detach().contiguous() for name, p in model.named_parameters()}, number)
            del model
            self.states.append(Weights([SafetensorsFile(path)]))

    def results(self) -> Drafts:
        """Where the prediction is to be written: the last state, to begin with."""
        folder = self.scratch / "results"
        folder.mkdir()
        return Drafts(self.states[-1], folder)

    def write(self, results: Mapping[str, Tensor], drafts: Mapping[str, Tensor]) -> int:
        """Write a state into the files of a checkpoint.

        Args:
            results: a state, by the names of the model's parameters.
            drafts: by the names of the checkpoint.

        Returns:
            Tensors that were written.

        Raises:
            NamesDiffer: transformers does not save the model under the names that the checkpoint has.
        """
        model = self._load(self.last)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(results[name])
        folder = self.scratch / "saved"
        model.save_pretrained(folder)
        del model
        saved = Weights.at(folder)
        missing = sorted(drafts.keys() - saved.keys())
        if missing:
            raise NamesDiffer(f"{self.cls.__name__} does not save {missing[:3]}, which {self.last} has")
        for name in drafts:
            drafts[name].copy_(saved[name])
        return len(drafts)

    def _load(self, checkpoint: Path) -> PreTrainedModel:
        return self.cls.from_pretrained(checkpoint, dtype=self.dtype, local_files_only=True)
