"""Markup that is well-formed by construction: everything that is text is escaped, whatever it holds."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

# What XML cannot hold, not even escaped.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EMPTY = ("meta", "br")


class Markup(str):
    """A string that is markup already."""


def text(value: object) -> Markup:
    """``value`` as text: markup stays, everything else is escaped."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_UNWRITABLE.sub("\ufffd", str(value)), quote=True))


def element(tag: str, attributes: Mapping[str, object] | None = None, *children: object) -> Markup:
    """``<tag attributes>children</tag>``; attributes that are ``None`` are left out."""
    given = "".join(f' {name}="{text(value)}"' for name, value in (attributes or {}).items() if value is not None)
    if tag in _EMPTY:
        return Markup(f"<{tag}{given} />")
    return Markup(f"<{tag}{given}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other."""
    return Markup("".join(text(part) for part in parts))


def table(headers: Iterable[object], rows: Iterable[Iterable[object]], caption: str) -> Markup:
    """A table that scrolls sideways where the page is narrow."""
    head = element("tr", None, *(element("th", {"scope": "col"}, header) for header in headers))
    body = [element("tr", None, *(element("td", None, cell) for cell in row)) for row in rows]
    whole = element(
        "table", None, element("caption", None, caption), element("thead", None, head), element("tbody", None, *body)
    )
    return element("div", {"class": "scroll", "tabindex": 0, "role": "region", "aria-label": caption}, whole)
