"""Nowcasting on top of an optimizer, with the product's own defaults: probation, learning-rate budget, end of run."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....nowcaster.auto import load_nowcaster
from ....nowcaster.base import Nowcaster
from ....nowcaster.hub import bundled_nowcasters
from ....nowcaster.rules import LinearNowcaster, MomentumNowcaster
from ....nowcaster.spectral import SpectralNowcaster
from ....training.optimizer import NiNo
from ....training.rng import preserved_rng
from .base import Conditions, Method, Settings, Training
from .optimizers import OptimizerMethod, make_scheduler, resolve_settings

_WHEN: Mapping[str, Any] = {
    "period": None,
    "interval": None,
    "horizon": "lr-budget",
    "start_step": 0,
    "stop_step": None,
    "stop_fraction": None,
    "patience": None,
    "max_failures": 3,
    "max_overhead": 0.01,
}
"""Settings that every nowcasting method takes, with the product's defaults (:class:`hf_nino.training.Nowcasting`)."""


class NowcastTraining(Training):
    """Steps :class:`~hf_nino.training.NiNo` and tells it the training loss."""

    optimizer: NiNo

    def step(self, loss: Tensor) -> None:
        self.optimizer.record_loss(loss)
        super().step(loss)

    def report(self) -> dict[str, Any]:
        nowcasting = self.optimizer.nowcasting
        return {"events": [asdict(event) for event in nowcasting.events], "nowcast_seconds": nowcasting.seconds}

    def close(self) -> None:
        self.optimizer.nowcasting.close()


class NowcastMethod(Method):
    """A nowcaster over an optimizer.

    Settings are those of the nowcaster (:attr:`nowcaster_defaults`) and, for when and how far it looks ahead,
    ``period``, ``interval``, ``horizon``, ``start_step``, ``stop_step``, ``stop_fraction``, ``patience``,
    ``max_failures`` and ``max_overhead`` of :class:`hf_nino.training.Nowcasting`.  Without a ``period``, it is the
    nowcaster's own, or less in a run too short for four nowcasts.

    Args:
        base: the method whose optimizer trains between nowcasts.
        name: of the nowcaster alone; with a base other than AdamW, the method's is ``BASE+NAME``.
        title: likewise.
    """

    base: OptimizerMethod
    nowcaster_defaults: Mapping[str, Any] = {}
    when: Mapping[str, Any] = _WHEN

    def __init__(self, base: OptimizerMethod, name: str, title: str) -> None:
        self.base = base
        plain = base.name == "adamw"
        self.name = name if plain else f"{base.name}+{name}"
        self.title = f"{base.title} + {title}"
        self.learning_rate_scale = base.learning_rate_scale

    @abstractmethod
    def make_nowcaster(self, **settings: Any) -> Nowcaster:
        """The nowcaster, with all of its own settings given."""

    def missing(self) -> str | None:
        return self.base.missing()

    def begin(self, model: nn.Module, conditions: Conditions, settings: Settings) -> NowcastTraining:
        resolved = resolve_settings(self.name, settings, {**self.when, **self.nowcaster_defaults})
        own = {name: resolved.pop(name) for name in self.nowcaster_defaults}
        with preserved_rng():  # loading one may draw random numbers, which are the model's
            optimizer = NiNo(
                self.base.make_optimizer(model, conditions),
                model,
                self.make_nowcaster(**own),
                max_steps=conditions.steps,
                example_inputs=conditions.example_inputs,
                **resolved,
            )
        optimizer.lr_scheduler = make_scheduler(optimizer, conditions)
        return NowcastTraining(optimizer, optimizer.lr_scheduler)

    def given(self, settings: Settings, text: str) -> NowcastMethod:
        """The same with other defaults, and no more choice: ``NAME:TEXT``.

        Args:
            text: the settings, as they are written.

        Raises:
            ValueError: a setting that the method does not have, or one of the nowcaster's out of range.
        """
        name = f"{self.name}:{text}"
        resolved = resolve_settings(name, settings, {**self.when, **self.nowcaster_defaults})
        found = copy(self)
        found.name, found.title = name, f"{self.title} ({text.replace('=', ' ').replace(',', ', ')})"
        found.nowcaster_defaults = {key: resolved.pop(key) for key in self.nowcaster_defaults}
        found.when = resolved
        found.grid = ({key: value for key, value in self.grid[0].items() if key not in settings},)
        self.make_nowcaster(**found.nowcaster_defaults)
        return found


def _defaults(rule: type[Nowcaster], **others: Any) -> dict[str, Any]:
    """Defaults of a rule's arguments, but for the period, which is told to :class:`NiNo`."""
    parameters = inspect.signature(rule).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "period"} | others


class Linear(NowcastMethod):
    """:class:`~hf_nino.nowcaster.rules.LinearNowcaster`."""

    nowcaster_defaults = _defaults(LinearNowcaster)
    grid = (
        {},  # every 250 steps, at most 4 intervals of 50 steps
        {"max_intervals": 2},
        {"max_intervals": 1},
        {"period": 100},
        {"period": 100, "max_intervals": 2},
        {"period": 100, "max_intervals": 1},
    )

    def __init__(self, base: OptimizerMethod) -> None:
        super().__init__(base, "linear", "linear nowcasts")

    def make_nowcaster(self, **settings: Any) -> Nowcaster:
        return LinearNowcaster(**settings)


class Momentum(NowcastMethod):
    """:class:`~hf_nino.nowcaster.rules.MomentumNowcaster`: SNOO (arXiv 2510.15830).

    Its horizon is one period: under a schedule that ends at 0 it runs until what is left of the learning rate carries
    less far than one, or for less than a probation.
    """

    nowcaster_defaults = _defaults(MomentumNowcaster)
    grid: tuple[Settings, ...] = (
        {},  # every 50 steps, momentum 0.5, factor 1
        {"momentum": 0.8},
        {"momentum": 0.8, "factor": 0.7},
        {"momentum": 0.7, "factor": 0.7},
        {"period": 25},
        {"period": 100},
    )

    def __init__(self, base: OptimizerMethod, name: str = "momentum", title: str = "momentum nowcasts") -> None:
        super().__init__(base, name, title)

    def make_nowcaster(self, **settings: Any) -> Nowcaster:
        return MomentumNowcaster(**settings)


class Lookahead(Momentum):
    """The same without momentum: Lookahead (arXiv 1907.08610) up to a factor of 1, extrapolation above."""

    nowcaster_defaults = _defaults(MomentumNowcaster, momentum=0.0, factor=0.5)
    grid = (
        {},  # every 50 steps, half the way
        {"factor": 0.8},
        {"factor": 1.5},
        {"factor": 1.5, "period": 100},
        {"period": 10},  # near the 5 to 10 steps of the paper
    )

    def __init__(self, base: OptimizerMethod) -> None:
        super().__init__(base, "lookahead", "Lookahead")


class Spectral(NowcastMethod):
    """:class:`~hf_nino.nowcaster.spectral.SpectralNowcaster`, everywhere as it is: nothing of it is chosen."""

    nowcaster_defaults = _defaults(SpectralNowcaster)

    def __init__(self, base: OptimizerMethod, name: str = "spectral", title: str = "spectral nowcasts") -> None:
        super().__init__(base, name, title)

    def make_nowcaster(self, **settings: Any) -> Nowcaster:
        return SpectralNowcaster(**settings)


class Unbounded(Spectral):
    """The same at whatever cost, for large models on small batches, where others wait."""

    grid = ({"max_overhead": None},)

    def __init__(self, base: OptimizerMethod) -> None:
        super().__init__(base, "spectral-unbounded", "spectral nowcasts at any cost")


class LearnedNowcasts(NowcastMethod):
    """A nowcaster with weights.

    Args:
        spec: a ``.pt`` file of the original release, a folder, or a bundled name; a repository on the Hub too.
    """

    kind = "nino"
    """Names are ``KIND:SPEC``."""

    words = "nowcasts of"
    """In titles."""

    def __init__(self, base: OptimizerMethod, spec: str) -> None:
        path = Path(spec).expanduser()
        name = path.stem if path.suffix == ".pt" else path.name
        super().__init__(base, f"{self.kind}:{spec}", f"{self.words} {name}")
        self.spec = spec
        nearer: tuple[Settings, ...] = ({}, {"horizon": 5}, {"horizon": 10})
        # The original release was meta-trained for a period of 1000, and saves more with one of 250.
        self.grid = tuple({"period": 250, **one} for one in nearer) if path.suffix == ".pt" else nearer

    def missing(self) -> str | None:
        path = Path(self.spec).expanduser()
        if path.exists() or self.spec in bundled_nowcasters() or self._is_repository():
            return self.base.missing()
        bundled = ", ".join(bundled_nowcasters()) or "none"
        return f"there is no file or folder {self.spec!r}, nor a bundled nowcaster of that name (there is {bundled})"

    def make_nowcaster(self, **settings: Any) -> Nowcaster:
        reason = self.missing()
        if reason is not None:
            raise FileNotFoundError(f"method {self.name!r}: {reason}")
        return load_nowcaster(self.spec)

    def _is_repository(self) -> bool:
        """Whether it may be one on the Hub: ``org/name``."""
        first, slash, rest = self.spec.partition("/")
        return bool(slash and rest) and "/" not in rest and not first.startswith((".", "~")) and bool(first)


class AsPublished(LearnedNowcasts):
    """The same as the paper has it: every 1000 steps, horizons that decay however the loss does, and nothing is taken
    back."""

    kind = "paper-nino"
    words = "the paper's nowcasts of"

    def __init__(self, base: OptimizerMethod, spec: str) -> None:
        super().__init__(base, spec)
        self.grid = ({"period": 1000, "horizon": "paper", "patience": 0},)


LEARNED: dict[str, type[LearnedNowcasts]] = {method.kind: method for method in (LearnedNowcasts, AsPublished)}

NOWCASTS: dict[str, type[Linear] | type[Momentum] | type[Lookahead] | type[Spectral]] = {
    "linear": Linear,
    "momentum": Momentum,
    "lookahead": Lookahead,
    "spectral": Spectral,
    "spectral-unbounded": Unbounded,
}
