"""Packages that are only there for the models or the data inside them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


class MissingPackage(ImportError):
    """A package that holds a model or data is not installed."""


def package_folder(module: str, distribution: str, extra: str = "bench", use: str = "fine-tuning") -> Path:
    """Folder of an installed package, which is not imported.

    Args:
        distribution: what pip calls it.
        extra: of this package, which brings it.
        use: what it is needed for, in words.

    Raises:
        MissingPackage: it is not installed; the message names it.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackage(
            f"{use} needs the package {distribution}, which is not installed; run `pip install hf_nino[{extra}]`"
        )
    return Path(spec.origin).parent
