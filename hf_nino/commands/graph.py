"""``hf-nino graph``: what the neural graph of a model has, in words and in two pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..graph.plot import KINDS, plot
from ..graph.source import graph_of, name_of
from ..graph.summary import summary, text


def show_graph(
    model: str,
    out: Path | None,
    say: Callable[[str], None],
    *,
    picture_format: str = "png",
    as_json: bool = False,
    meta: bool = False,
) -> None:
    """Report on the graph of a model, and draw it.

    Args:
        model: see :func:`hf_nino.graph.source.graph_of`.
        out: folder for the pictures, ``NAME-diagram`` and ``NAME-matrix``; none are drawn when it is ``None``.
        say: gets the report, and where the pictures are.
        picture_format: suffix of the pictures.
        as_json: say one JSON document instead of text.
        meta: never make weights.
    """
    graph, described = graph_of(model, meta)
    if not as_json:
        say(f"{described}\n{text(graph)}")
    pictures: dict[str, str] = {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            path = out / f"{name_of(model)}-{kind}.{picture_format}"
            plot(graph, path, kind, title=described)
            pictures[kind] = str(path)
    if as_json:
        say(json.dumps({"model": described, "pictures": pictures, **summary(graph)}, indent=1))
    else:
        for kind, path in pictures.items():
            say(f"{kind.capitalize()}: {path}")
