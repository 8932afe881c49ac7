"""One way to name a nowcaster everywhere: a rule, a bundled name, a path, a Hub repository, or the object itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .base import Nowcaster
from .hub import NowcasterFolder, bundled_nowcasters
from .modeling import NiNoModel, WNNModel
from .original import convert_original
from .precision import check_precision
from .rules import LinearNowcaster, MomentumNowcaster
from .spectral import SpectralNowcaster

RULES: dict[str, type[Nowcaster]] = {
    "linear": LinearNowcaster,
    "momentum": MomentumNowcaster,
    "spectral": SpectralNowcaster,
}
MODELS: dict[str, type[NiNoModel] | type[WNNModel]] = {"nino": NiNoModel, "wnn": WNNModel}


def load_nowcaster(spec: str | Path | Mapping[str, Any] | Nowcaster, **kwargs: Any) -> Nowcaster:
    """The nowcaster that ``spec`` names.

    Args:
        spec: one of

            * a :class:`Nowcaster`, which is returned as it is;
            * ``"linear"``, ``"momentum"`` or ``"spectral"``, with settings if need be, as in
              ``"momentum:momentum=0.8,period=100"``;
            * a mapping ``{"name": spec, **kwargs}``;
            * an existing directory with config.json and model.safetensors;
            * a ``.pt`` file of the original release;
            * a bundled nowcaster's name, without a slash;
            * a repository on the Hub, ``"org/name"``, or a revision of it, ``"org/name@revision"``.
        **kwargs: arguments of the rule, or ``revision``, ``token``, ``cache_dir``, ``force_download``,
            ``local_files_only`` and ``map_location`` for directories and repositories.

    Returns:
        The nowcaster; ``source`` of one with weights says where it is from, and which commit it is
        (:class:`~hf_nino.nowcaster.source.NowcasterSource`).

    Raises:
        ValueError: malformed settings, configuration or weights.
        FileNotFoundError: no such nowcaster; the message lists those that there are.
        OSError: the Hub could not be reached or refused.
        TypeError: ``spec`` is none of these, or an unknown keyword argument.
    """
    if isinstance(spec, Nowcaster):
        if kwargs:
            raise TypeError(f"`spec` is a nowcaster already, it takes no arguments, got {sorted(kwargs)}")
        return spec
    if isinstance(spec, Mapping):
        values = {**spec, **kwargs}
        if "name" not in values:
            raise ValueError(f"`spec` must have a 'name' when it is a mapping, got {sorted(values)}")
        return load_nowcaster(values.pop("name"), **values)
    if not isinstance(spec, str | Path) or not str(spec):
        raise TypeError(f"`spec` must be a name, a path, a mapping or a Nowcaster, got {spec!r}")
    name = str(spec)
    rule, colon, settings = name.partition(":")
    if rule in RULES:
        return _rule(rule, {**parse_settings(settings, name), **kwargs} if colon else kwargs)
    path = Path(name).expanduser()
    if path.suffix == ".pt" and not path.is_dir():
        if kwargs:
            raise TypeError(f"a checkpoint of the original release takes no arguments, got {sorted(kwargs)}")
        return convert_original(path)
    if "/" not in name and not path.is_dir() and name not in bundled_nowcasters():
        raise FileNotFoundError(
            f"no nowcaster {name!r}: rules are {sorted(RULES)}, bundled nowcasters are "
            f"{bundled_nowcasters() or 'none'}; otherwise give a directory, or a repository of the form 'org/name'"
        )
    map_location = kwargs.pop("map_location", "cpu")
    folder = NowcasterFolder(name, **kwargs)
    config = folder.config()
    return MODELS[config.nowcaster_type].from_folder(folder, config, map_location)


def resolve_nowcaster(nowcaster: str | os.PathLike | Nowcaster, precision: str | None = None) -> Nowcaster:
    """A :class:`Nowcaster` from an object, a bundled name, a path or a repo id.

    Args:
        precision: of the engine, for those that have one (:mod:`hf_nino.nowcaster.precision`); ``None`` leaves it.

    Raises:
        ValueError: an unknown precision.
    """
    if precision is not None:
        check_precision(precision)
    if not isinstance(nowcaster, Nowcaster):
        nowcaster = load_nowcaster(nowcaster)
    engine = getattr(nowcaster, "engine", None)
    if precision is not None and engine is not None:
        nowcaster.engine = replace(engine, precision=precision)
    return nowcaster


def _rule(name: str, values: Mapping[str, Any]) -> Nowcaster:
    try:
        return RULES[name](**values)
    except TypeError as error:
        raise TypeError(f"nowcaster {name!r} does not take these settings: {error}") from error


def parse_settings(text: str, spec: str) -> dict[str, Any]:
    """``"momentum=0.8,nesterov=false"`` -> values, each read as JSON.

    Args:
        text: what is after the colon of ``spec``.
        spec: for the error.

    Raises:
        ValueError: malformed.
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        try:
            if not equals:
                raise ValueError("there is no '='")
            values[key.strip()] = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"`spec` must look like 'linear:max_intervals=3,period=100', got {spec!r}: {error}"
            ) from error
    return values
