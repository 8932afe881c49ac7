"""What defines a nowcaster with weights, apart from the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT_VERSION = 1
"""Of nowcasters without any of :data:`SWITCHES`."""

SWITCHES_VERSION = 2
"""Of nowcasters with one: who knows only version 1 refuses them."""

SWITCHES = ("horizon_input", "rate_input")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

# Largest accepted sizes: a configuration from the Hub must not be able to ask for more memory than any sensible
# nowcaster needs.
_RANGES = {
    "context": (2, 64),
    "hidden_size": (1, 4096),
    "num_layers": (2, 16),
    "max_horizon": (1, 1000),
    "max_features": (1, 1024),
    "edge_types": (14, 256),
    "positional_size": (1, 256),
    "token_position_vocabulary": (1, 1_000_000),
    "period": (1, 1_000_000_000),
}


@dataclass(frozen=True)
class NowcasterConfig:
    """Sizes and settings of a :class:`NiNoModel` or :class:`WNNModel`; the defaults are the original release's.

    Args:
        nowcaster_type: ``"nino"`` (graph network) or ``"wnn"`` (each parameter alone).
        format_version: version of this format; readers refuse what they do not know.  ``None``: the one that these
            settings need, 2 if one of the switches at the end is on and 1 otherwise.
        context: snapshots that it reads, C.
        hidden_size: width of the nowcaster, H.
        num_layers: message-passing layers as the paper counts them.  The last one would only update nodes that nothing
            reads, so it has no weights here and is not computed.  Unused by ``"wnn"``.
        max_horizon: the largest horizon, in intervals, K.
        max_features: kernel taps that one edge may have, F.  Unused by ``"wnn"``, which sees every tap alone.
        edge_types: rows of the edge type embedding, see :class:`hf_nino.graph.EdgeType`.
        positional_size: Laplacian eigenvectors per node.  Unused by ``"wnn"``.
        activation: ``"silu"``, ``"relu"``, ``"gelu"`` or ``"tanh"``.
        token_position_vocabulary: tokens that the table of token positions knows (it has one row more, row 0, for
            neurons that are no tokens); ``None`` for nowcasters without such a table, which fit any vocabulary.
        period: optimizer steps between nowcasts that it was trained for.
        scale: how parameters are scaled before the network sees them; only ``"std"``, per tensor.
        meta_trained_on: free text about the training data.
        horizon_input: the horizon is an input of the decoder, which then has one output row instead of K, and may be
            any number from 1 to K.
        rate_input: it is told the learning rates, see :class:`hf_nino.nowcaster.Rates`.

    Raises:
        ValueError: a value of the wrong type or out of range; the message names the field, the rule and the value.
    """

    nowcaster_type: str = "nino"
    format_version: int | None = None
    context: int = 5
    hidden_size: int = 128
    num_layers: int = 3
    max_horizon: int = 40
    max_features: int = 9
    edge_types: int = 15
    positional_size: int = 8
    activation: str = "silu"
    token_position_vocabulary: int | None = None
    period: int = 1000
    scale: str = "std"
    meta_trained_on: str | None = None
    horizon_input: bool = False
    rate_input: bool = False

    def __post_init__(self) -> None:
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` of a nowcaster must be true or false, got {getattr(self, name)!r}")
        needed = _version_for({name: getattr(self, name) for name in SWITCHES})
        if self.format_version is None:
            object.__setattr__(self, "format_version", needed)
        _check_version(self.format_version, needed)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if name == "token_position_vocabulary" and value is None:
                continue
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"`{name}` of a nowcaster must be a whole number from {low} to {high}, got {value!r}")
        choices = {"nowcaster_type": ("nino", "wnn"), "activation": tuple(ACTIVATIONS), "scale": ("std",)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` of a nowcaster must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.meta_trained_on, str | None):
            raise ValueError(f"`meta_trained_on` of a nowcaster must be text or None, got {self.meta_trained_on!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json; without the switches where the format version knows none."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in SWITCHES or self.format_version == SWITCHES_VERSION
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NowcasterConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            ValueError: not a mapping, ``format_version`` or ``nowcaster_type`` missing or unknown, unknown keys, or a
                value that the class refuses.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a nowcaster's configuration must be a mapping of names to values, got {values!r:.80}")
        for name in ("format_version", "nowcaster_type"):
            if name not in values:
                raise ValueError(f"a nowcaster's configuration must have `{name}`, got only {sorted(values)}")
        # Before the keys: a newer version is expected to have keys that this one does not know.
        _check_version(values["format_version"], _version_for(values))
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"a nowcaster's configuration has unknown keys {unknown}; known are {sorted(known)}")
        return cls(**values)


def _version_for(values: Mapping[str, Any]) -> int:
    """The format version that settings need."""
    return SWITCHES_VERSION if any(values.get(name) for name in SWITCHES) else FORMAT_VERSION


def _check_version(version: Any, needed: int) -> None:
    if type(version) is not int or version != needed:
        raise ValueError(f"`format_version` of a nowcaster must be {needed}, got {version!r}; try a newer hf_nino")
