"""What the benchmark nowcasts: models from 0.2 million to 8 billion parameters, and histories of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTLESS = 50_000_000
"""Parameters from which a model is built without weights: its graph needs none."""
SPREAD, MOVE = 0.02, 1e-3
"""Deviation of the weights, and of what an element moves between two snapshots."""


@dataclass(frozen=True)
class Shape:
    """A model by its configuration.

    Args:
        name: in tables and in keys of results.
        model_type: of transformers; the model is the one of ``AutoModelForCausalLM``.
        settings: fields of its configuration.
        original: whether the original release's code is measured with it, where that is asked for.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    original: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, bos_token_id=0, eos_token_id=0, pad_token_id=0, **self.settings)

    def model(self, device: str = "cpu") -> nn.Module:
        """The model with random weights in float32; none on the device ``"meta"``."""
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)

    def parameters(self) -> int:
        """How many it has, tied ones counted once."""
        return sum(p.numel() for p in self.model("meta").parameters())


def _gpt2(name: str, width: int, layers: int, vocabulary: int, original: bool = False) -> Shape:
    settings = {"n_embd": width, "n_layer": layers, "n_head": max(width // 32, 4), "n_positions": 64}
    return Shape(name, "gpt2", settings | {"vocab_size": vocabulary}, original)


def _llama(name: str, width: int, inner: int, layers: int, heads: int, groups: int, tied: bool) -> Shape:
    settings = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    settings |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    return Shape(name, "llama", settings | {"vocab_size": 128256, "tie_word_embeddings": tied})


SHAPES = (
    _gpt2("gpt2-0.2M", 64, 3, 1024, original=True),
    _gpt2("gpt2-1M", 128, 4, 1024),
    _gpt2("gpt2-3.4M", 64, 3, 50257, original=True),
    _gpt2("gpt2-10M", 160, 5, 50257),
    _gpt2("gpt2-30M", 384, 6, 50257),
    _llama("llama-93M", 512, 1792, 8, 8, 2, tied=True),
    _llama("llama-1B", 2048, 8192, 16, 32, 8, tied=True),
    _llama("llama-8B", 4096, 14336, 32, 32, 8, tied=False),
)
"""From small to large; the last two have the shapes of Llama-3.2-1B and Llama-3.1-8B."""


def trajectory(
    shapes: Mapping[str, tuple[int, ...]], snapshots: int, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """The same parameters again and again, moved a little in between: a steady part and as much noise.

    The same numbers for the same arguments; what was handed out changes when the next is asked for.
    """
    generator = torch.Generator(device)

    def noise(number: int, snapshot: int) -> Tensor:
        generator.manual_seed(1000 * number + snapshot)
        shape = shapes[names[number]]
        return torch.randn(math.prod(shape), generator=generator, device=device).view(shape)

    names = list(shapes)
    state = {}
    for number, name in enumerate(names):
        center = float(len(shapes[name]) == 1 and name.endswith("weight"))  # gains of normalizations
        state[name] = (center + SPREAD * noise(number, 0)).to(dtype)
    yield state
    for snapshot in range(1, snapshots):
        for number, name in enumerate(names):
            steady = noise(number, 999)
            state[name] += (MOVE * steady.add_(noise(number, snapshot))).to(dtype)
        yield state
