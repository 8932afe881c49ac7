"""Makes docs/api.md from signatures and docstrings.

    python docs/make_api.py

``make docs`` calls it, and tests/test_docs.py fails if the page is not what it would make now.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_nino import Nowcaster
from hf_nino.nowcaster.hub import HubNowcaster

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API reference

Made by `make docs` from signatures and docstrings: what each name is, in a sentence or two. `help(name)` has the rest:
arguments, shapes and units, errors, and the paper it is from.
"""
PACKAGES = ("hf_nino", "hf_nino.offline", "hf_nino.merging", "hf_nino.report", "hf_nino.metatrain")
"""What is documented: their ``__all__``."""

GROUPS = {"training": "Training", "nowcaster": "Nowcasters", "graph": "The neural graph", "merging": "Merging"}
"""Headings for the names of ``hf_nino`` itself, by the package that they live in."""

WIDTH = 100


def page() -> str:
    """The whole page."""
    parts, seen = [HEAD], set()
    for name in PACKAGES:
        package = importlib.import_module(name)
        objects = {key: getattr(package, key) for key in package.__all__ if not key.startswith("__")}
        if name == "hf_nino":
            groups = {heading: _of(objects, f"hf_nino.{home}") for home, heading in GROUPS.items()}
        else:
            groups = {f"`{name}`": {key: value for key, value in objects.items() if key not in seen}}
        seen |= set(objects)
        for heading, members in groups.items():
            parts.append(f"## {heading}\n")
            if name != "hf_nino":
                parts.append(f"{paragraph(package)}\n")
            parts += [entry(key, value) for key, value in members.items()]
    return "\n".join(parts)


def _of(objects: dict[str, Any], home: str) -> dict[str, Any]:
    return {key: value for key, value in objects.items() if value.__module__.startswith(home)}


def entry(name: str, value: Any) -> str:
    """A heading, the signature, and the first paragraph; of a class its public methods too."""
    lines = [f"### `{name}`\n", f"```py\n{signature(name, value)}\n```\n", f"{paragraph(value)}\n"]
    if inspect.isclass(value):
        lines += [f"* `{method}`: {text}" for method, text in methods(value)]
        lines += [""] if lines[-1].startswith("*") else []
    return "\n".join(lines)


def signature(name: str, value: Any) -> str:
    """How it is called, without type hints, which ``help`` has; of a dataclass only the fields that are ours."""
    parameters = list(inspect.signature(value).parameters.values())
    ours = {parameter.name for parameter in parameters}
    if dataclasses.is_dataclass(value):
        bases = [base for base in value.__mro__ if base.__module__.startswith("hf_nino")]
        ours = {key for base in bases for key in inspect.get_annotations(base)}
    words, keyword_only = ([] if ours.issuperset(p.name for p in parameters) else ["..."]), False
    for parameter in parameters:
        if parameter.name not in ours:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words += ["*"] if not any(word.startswith("*") for word in words) else []
        words.append(_argument(parameter))
    line = f"{name}({', '.join(words)})"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + ")"


def _argument(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    if parameter.default is parameter.empty:
        return f"{star}{parameter.name}"
    # In double quotes, because ruff formats the blocks of pages too.
    default = json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
    return f"{parameter.name}={'...' if default.startswith('<') else default}"


def methods(cls: type) -> Iterator[tuple[str, str]]:
    """(name, first paragraph) of what a class adds to other documented ones; of nowcasters only what the Hub needs."""
    names = importlib.import_module("hf_nino").__all__
    documented = {base for base in cls.__mro__[1:] if base.__module__.startswith("hf_nino") and base.__name__ in names}
    inherited = {name for base in documented for name in vars(base)}
    found: dict[str, str] = {}
    for base in cls.__mro__:
        internal = issubclass(cls, Nowcaster) and base not in (Nowcaster, HubNowcaster)
        if internal or base in documented or not base.__module__.startswith("hf_nino"):
            continue
        for name, member in vars(base).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if name.startswith("_") or name in inherited or not inspect.isfunction(function) or not function.__doc__:
                continue
            found.setdefault(name, paragraph(function))
    yield from found.items()


def paragraph(value: Any) -> str:
    """The first paragraph of a docstring as Markdown, on one line."""
    text = re.split(r"\n\s*\n|::\n", inspect.getdoc(value) or "")[0]
    text = re.sub(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`", lambda role: f"`{_short(role[1])}`", text)
    return " ".join(re.sub(r"``(.+?)``", r"`\1`", text, flags=re.S).split()).rstrip(":")


def _short(path: str) -> str:
    return path if path.startswith("hf_nino.") and path.count(".") == 1 else path.rpartition(".")[2]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
