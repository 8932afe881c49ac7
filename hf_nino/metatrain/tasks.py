"""What ``hf-nino record`` trains: small models by name, whose names say all that there is to say.

==================================  ===================================================================================
``gpt2-2x32-h4-v512-kjv``           GPT-2: 2 layers, width 32, 4 heads, vocabulary 512, on the King James Bible
``llama-2x32-h4k2-v512-pystdlib``   Llama: the same, with 2 key-value heads, on Python source
``conv-8-16-16``                    convolutions of 8, 16 and 16 channels, on Fashion-MNIST
``vit-2x32-h4-p7``                  vision transformer: 2 layers, width 32, 4 heads, patches of 7 by 7 pixels
==================================  ===================================================================================

Texts: ``kjv``, ``pystdlib``, ``sotu``, ``wordnet`` (:mod:`hf_nino.bench.training.tasks.texts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.training.tasks.base import Task
from ..bench.training.tasks.images import ConvNet, ImageTask
from ..bench.training.tasks.language import LanguageTask
from ..bench.training.tasks.texts import TEXTS

CLASSES, PIXELS = 10, 28
"""Of Fashion-MNIST."""

_SHAPES = (
    "gpt2-1x16-h2-v320",
    "gpt2-2x24-h3-v320",
    "gpt2-2x32-h4-v512",
    "gpt2-3x32-h2-v512",
    "gpt2-3x48-h4-v512",
    "gpt2-2x64-h4-v1024",
    "llama-1x16-h2k1-v320",
    "llama-2x32-h4k2-v512",
    "llama-3x32-h4k1-v512",
    "llama-2x48-h4k4-v512",
    "llama-1x64-h4k2-v1024",
    "llama-2x64-h4k1-v1024",
)
_IMAGES = (
    "conv-8-16-16",
    "conv-12-16-24",
    "conv-16-24-24",
    "conv-16-32",
    "vit-1x16-h2-p7",
    "vit-2x32-h4-p7",
    "vit-3x32-h2-p7",
)

GROUPS: dict[str, tuple[str, ...]] = {
    **{f"language-{text}": tuple(f"{shape}-{text}" for shape in _SHAPES) for text in TEXTS},
    "language": tuple(f"{shape}-{text}" for text in TEXTS for shape in _SHAPES),
    "images": _IMAGES,
    "smoke": ("gpt2-1x16-h2-v320-kjv", "llama-1x16-h2k1-v320-kjv"),
}
GROUPS["all"] = (*GROUPS["language"], *GROUPS["images"])
"""Names that stand for several tasks."""

_LANGUAGE = {"steps": 2000, "batch_size": 16, "learning_rate": 2e-3, "constant_learning_rate": 3e-4}
_PICTURES = {"steps": 1500, "batch_size": 32, "learning_rate": 2e-3, "constant_learning_rate": 2e-3}
_PATTERNS = {
    "gpt2": re.compile(r"gpt2-(?P<layers>\d+)x(?P<width>\d+)-h(?P<heads>\d+)-v(?P<vocabulary>\d+)-(?P<text>[a-z]+)"),
    "llama": re.compile(
        r"llama-(?P<layers>\d+)x(?P<width>\d+)-h(?P<heads>\d+)k(?P<key_value_heads>\d+)-v(?P<vocabulary>\d+)"
        r"-(?P<text>[a-z]+)"
    ),
    "conv": re.compile(r"conv(?P<channels>(-\d+)+)"),
    "vit": re.compile(r"vit-(?P<layers>\d+)x(?P<width>\d+)-h(?P<heads>\d+)-p(?P<patch>\d+)"),
}


@dataclass(frozen=True, kw_only=True)
class ConvolutionTask(ImageTask):
    """Fashion-MNIST with a network like the paper's, of any channels.

    Args:
        channels: of the convolutions.

    Raises:
        ValueError: there are none.
    """

    model: str = "conv"
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"`channels` must be one positive number a convolution, got {self.channels}")

    def build_model(self, data: Any) -> nn.Module:
        return ConvNet(self.channels, CLASSES)

    def tracing_inputs(self) -> dict[str, Tensor]:
        """Two images of noise, to trace the model with."""
        return {"pixel_values": torch.randn(2, 1, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))}


def recording_task(name: str) -> Task:
    """The task that a name describes.

    Raises:
        ValueError: the name describes none.
    """
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(name):
            parts = {key: int(value) if value.isdigit() else value for key, value in found.groupdict().items()}
            return _build(name, kind, parts)
    raise ValueError(
        f"`tasks` must be names such as gpt2-2x32-h4-v512-kjv, llama-2x32-h4k2-v512-sotu, conv-8-16-16, "
        f"vit-2x32-h4-p7, or one of {', '.join(GROUPS)}, got {name!r}"
    )


def _build(name: str, kind: str, parts: dict[str, Any]) -> Task:
    if kind == "conv":
        channels = tuple(int(channel) for channel in parts["channels"].strip("-").split("-"))
        return ConvolutionTask(name=name, channels=channels, **_PICTURES)
    if kind == "vit":
        if parts["width"] % parts["heads"] or PIXELS % parts["patch"]:
            raise ValueError(
                f"`tasks`: the width of {name!r} must be a multiple of its heads, and its patches must divide "
                f"{PIXELS} pixels"
            )
        return ImageTask(name=name, model="vit", **parts, **_PICTURES)
    if parts["text"] not in TEXTS:
        raise ValueError(f"`tasks`: the text of {name!r} must be one of {', '.join(TEXTS)}")
    if kind == "gpt2":
        parts |= {"key_value_heads": parts["heads"]}
    return LanguageTask(name=name, arch=kind, **parts, **_LANGUAGE)


def expand(names: Iterable[str]) -> list[str]:
    """Names of tasks, with groups written out, each once and in order.

    Raises:
        ValueError: a name is neither a task nor a group, or there is none.
    """
    found = dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,)))
    if not found:
        raise ValueError(f"`tasks` must name at least one task, or one of {', '.join(GROUPS)}")
    for name in found:
        recording_task(name)
    return list(found)
