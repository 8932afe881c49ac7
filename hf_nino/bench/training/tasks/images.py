"""Image classification on Fashion-MNIST: the convolutional networks of the paper, and a small vision transformer."""

from __future__ import annotations

import copy
import gzip
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from .base import Batch, Task
from .measuring import accuracy_and_loss
from .prepared import shuffled_rows
from .races import FinishLine

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package puts the files."""

VARIABLE = "FASHION_MNIST"
MEAN, DEVIATION = 0.1307, 0.3081
"""Pixels of 0 to 1 are normalised with these in the original release (they are MNIST's)."""

CONVOLUTIONS = {"conv16": (16, 32, 32), "conv32": (32, 64, 64)}
"""Channels of the networks that the paper calls FM/16 and FM/32."""

MODELS = (*CONVOLUTIONS, "vit")


class MissingImages(ImportError):
    """The files of Fashion-MNIST are not where they are looked for."""


@dataclass(frozen=True)
class Images:
    """Images uint8 ``[rows, height, width]`` and labels int64 ``[rows]``; ``evaluation`` ones are the test split."""

    training: Tensor
    training_labels: Tensor
    evaluation: Tensor
    evaluation_labels: Tensor

    @property
    def classes(self) -> int:
        """Number of classes: labels are 0 to one less."""
        return int(self.training_labels.max()) + 1


class ConvNet(nn.Module):
    """Convolutions of 3x3 with ReLU, the first of stride 2 without padding, the others of stride 1 that keep the size;
    then the mean over the image and a linear map.

    Args:
        channels: of the convolutions.
        classes: number of outputs.
    """

    def __init__(self, channels: tuple[int, ...], classes: int) -> None:
        super().__init__()
        first, *rest = channels
        layers: list[nn.Module] = [nn.Conv2d(1, first, 3, stride=2), nn.ReLU()]
        for inputs, outputs in zip(channels, rest, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding="same"), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, 1, height, width]``."""
        return self.head(self.convolutions(pixel_values).mean((2, 3)))


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """Classification of the 10 classes of Fashion-MNIST.

    As in the paper, training takes the first eleven twelfths of the training split (55,000 images), and evaluation
    the test split.

    Args:
        model: ``"conv16"`` or ``"conv32"``, the paper's FM/16 and FM/32 (14,378 and 56,394 parameters), or ``"vit"``.
        target: accuracy at which the paper counts a task as done, between 0 and 1.
        race: runs at a constant learning rate end at the target, as in the paper.
        path: folder with the four ``*-ubyte.gz`` files; ``None`` for that in the environment variable
            ``FASHION_MNIST``, or else of the Debian package ``dataset-fashion-mnist``.
        evaluation_images: that many of the test split, evenly spread; ``None`` for all.
        width, layers, heads, patch: of the vision transformer.

    Raises:
        ValueError: a setting is out of range.
    """

    model: str
    target: float | None = None
    race: bool = False
    path: str | None = None
    evaluation_images: int | None = None
    width: int = 64
    layers: int = 4
    heads: int = 4
    patch: int = 4

    kind = "images"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"`model` must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"`target` must be an accuracy between 0 and 1, got {self.target}")
        if self.race and self.target is None:
            raise ValueError("`race` must have a `target` to end at, got none")

    def load(self, cache: Path) -> Images:
        """The images; nothing is kept in ``cache``, for the files are as quick to read.

        Raises:
            ImportError: the files are absent; the message says how to get them.
            ValueError: a file is not what it should be.
        """
        folder = self._folder()
        training, training_labels = read_split(folder, "train")
        evaluation, evaluation_labels = read_split(folder, "t10k")
        kept = len(training) - len(training) // 12
        count = min(len(evaluation), self.evaluation_images or len(evaluation))
        spread = torch.arange(count) * len(evaluation) // count
        return Images(training[:kept], training_labels[:kept], evaluation[spread], evaluation_labels[spread])

    def _folder(self) -> Path:
        named = self.path or os.environ.get(VARIABLE)
        folder = Path(named or FOLDER).expanduser()
        if not (folder / "train-images-idx3-ubyte.gz").is_file():
            raise MissingImages(
                f"Fashion-MNIST is not in {folder}: install the Debian package {PACKAGE} (`apt install {PACKAGE}`), "
                f"or set {VARIABLE} to a folder with its four files (train-images-idx3-ubyte.gz and so on)"
            )
        return folder

    def build_model(self, data: Images) -> nn.Module:
        if self.model in CONVOLUTIONS:
            return ConvNet(CONVOLUTIONS[self.model], data.classes)
        config = ViTConfig(
            image_size=data.training.shape[1],
            patch_size=self.patch,
            num_channels=1,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=data.classes,
        )
        return ViTForImageClassification(config).train()

    def batches(self, data: Images, seed: int, device: torch.device) -> Iterator[Batch]:
        """``pixel_values``, normalised float32 ``[batch_size, 1, height, width]``, and ``labels`` int64."""
        images, labels = data.training.to(device), data.training_labels.to(device)
        for rows in shuffled_rows(len(images), self.batch_size, seed):
            chosen = rows.to(device)
            yield {"pixel_values": normalised(images[chosen]), "labels": labels[chosen]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(self._logits(model, batch["pixel_values"]).float(), batch["labels"])

    def evaluate(self, model: nn.Module, data: Images) -> dict[str, float]:
        return accuracy_and_loss(
            model,
            lambda images: self._logits(model, normalised(images)).float(),
            (data.evaluation,),
            data.evaluation_labels,
        )

    def finish_line(self, data: Images) -> Callable[[nn.Module], bool] | None:
        if not self.race or self.target is None:
            return None

        def rough(model: nn.Module, rows: Tensor) -> Tensor:
            images = data.evaluation[rows].to(next(model.parameters()).device)
            return self._logits(model, normalised(images).bfloat16())

        line = FinishLine(
            self.target, data.evaluation_labels, rough, lambda model: self.evaluate(model, data)["accuracy"]
        )
        return lambda model: line.crossed(model, copy.deepcopy(model).bfloat16())

    def _logits(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        outputs = model(pixel_values)
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    def example_inputs(self, batch: Batch) -> Batch:
        """Two images: enough to trace the model with."""
        return {"pixel_values": batch["pixel_values"][:2]}


def normalised(images: Tensor) -> Tensor:
    """uint8 ``[batch, height, width]`` -> float32 ``[batch, 1, height, width]`` around 0."""
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(DEVIATION)


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[rows, height, width]`` and labels int64 ``[rows]`` of ``"train"`` or ``"t10k"``.

    Raises:
        ValueError: a file is malformed, or there is not one label for each image.
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 1).long()
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} must have one label for each image of {split}, got {len(images)} and {len(labels)}"
        )
    return images, labels


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor in a gzipped file of the IDX format: two zeros, 8 for bytes, the number of dimensions, their
    sizes as big-endian 32-bit integers, then the bytes.

    Raises:
        ValueError: the file is absent or something else.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} must be a gzipped IDX file, but cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape) or not math.prod(shape):
        raise ValueError(f"{path} must be an IDX file of bytes with {dimensions} dimensions, got {len(content)} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
