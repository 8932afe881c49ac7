"""What the pictures and the report of a neural graph call things: short names of groups, parameters and reasons."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .folding import Joint, Layer, Stack
from .structure import EdgeType, NeuralGraph, NeuronGroup, Nodes

LINE = 26
"""Letters of a line in a box."""

PINS = {
    "token": "one for each token",
    "position": "one for each position",
    "row": "one for each row",
    "meets a constant that differs between neurons (rotary or sinusoidal table, mask)": "rotary or other fixed table",
    "mixed with other neurons of its head (rotary embedding)": "rotary embedding",
    "input of the model": "input of the model",
    "output of the model": "output of the model",
}
"""Shorter words for common reasons."""

NOUNS = {"head": "heads", "input": "inputs", "private": "private neurons", "row": "rows", "parameter": "nodes"}


def short_name(group: NeuronGroup, layer: str = "", root: str = "") -> str:
    """A group's name without that of its layer (or ``root``), what its kind says, and what its parts repeat.

    ``"h.0.mlp.gate_proj + h.0.mlp.up_proj"`` in layer ``"h.0"`` becomes ``"mlp.gate_proj + up_proj"``.
    """
    prefix = f"{layer}." if layer else root
    name = group.name.replace(f"[{group.kind}]", "").replace(".weight", "")
    first, *others = (part.removeprefix(prefix) for part in name.split(" + "))
    shared = first[: first.rfind(".") + 1]
    name = " + ".join([first, *(other.removeprefix(shared) for other in others)])
    if name.endswith("[heads]"):  # named after the layer that makes the queries
        name = f"{first.removesuffix('[heads]').rpartition('.')[0]} heads".strip()
    return name.replace("[", " ").replace("]", "").replace("query+key", "query, key")


def kind_of(group: NeuronGroup) -> str:
    """Its kind; heads that have a bias of their own are heads too."""
    return "head" if "[heads]" in group.name else group.kind


def root_of(stacks: Iterable[Stack]) -> str:
    """What the names of all outer stacks begin with, up to a dot: ``"model."``."""
    first = {stack.prefix.split(".")[0] + "." for stack in stacks if not stack.inner and "." in stack.prefix[:-1]}
    return first.pop() if len(first) == 1 else ""


def size_words(graph: NeuralGraph, number: int) -> str:
    """How many there are, and of what: ``"768 neurons"``, ``"32 heads x 128"``, ``"8 experts x 14,336 units"``."""
    group = graph.groups[number]
    centres: dict[int, set[int]] = defaultdict(set)
    for star in graph.constants:
        if star.edge_type == EdgeType.HEAD and star.target.group == number:
            centres[star.source.group] |= _distinct(star.source)
    for centre, members in centres.items():
        count = len(members)
        if count > 1 and group.size > count and group.size % count == 0:
            each = f"{group.size // count:,}"
            heads = kind_of(graph.groups[centre]) == "head"
            return f"{count} heads \u00d7 {each}" if heads else f"{count} experts \u00d7 {each} units"
    noun = {"token": "tokens", "position": "positions"}.get(group.pinned or "") or NOUNS.get(kind_of(group), "neurons")
    return f"{group.size:,} {noun if group.size > 1 else noun.removesuffix('s')}"


def _distinct(nodes: Nodes) -> set[int]:
    """The places in its group of what a selection has, repetitions left out."""
    moving = [(n, stride) for n, stride in zip(nodes.sizes, nodes.strides, strict=True) if stride]
    sizes, strides = tuple(n for n, _ in moving), tuple(stride for _, stride in moving)
    return set(Nodes(nodes.group, sizes, strides, nodes.offset).index().tolist())


def pin_words(group: NeuronGroup) -> str:
    """Why a group is pinned, in few words; empty if it is not."""
    reasons = [] if group.pinned is None else group.pinned.split("; ")
    return "; ".join(PINS.get(reason, reason) for reason in reasons)


def parameter_words(joint: Joint, root: str = "") -> str:
    """The parameters of a joint, without the layer that they belong to: ``"gate_proj, up_proj"``."""
    prefix = f"{joint.owner}." if joint.owner else root
    names = []
    for parameter in joint.parameters:
        parts = parameter.removeprefix(prefix).removesuffix(".weight").split(".")
        keep = 1 if len(parts[-1]) > 2 and parts[-1] not in ("dense", "linear", "conv", "convolution", "bias") else 2
        names.append(".".join(parts[-keep:]))
    return listed(dict.fromkeys(names))


def gain_words(joints: Sequence[Joint], root: str = "") -> list[tuple[tuple[EdgeType, ...], str]]:
    """Biases and gains of one group, by module: types and ``"ln_1.weight, bias"``."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    kinds: dict[str, dict[EdgeType, None]] = defaultdict(dict)
    for joint in joints:
        for parameter in joint.parameters:
            module, _, name = parameter.removeprefix(f"{joint.owner}." if joint.owner else root).rpartition(".")
            names[module][name] = kinds[module][joint.kind] = None
    return [(tuple(kinds[m]), (f"{m}." if m else "") + ", ".join(sorted(names[m], reverse=True))) for m in names]


def listed(names: Iterable[str], most: int = 2) -> str:
    """The first few names, and how many there are if not all are named: ``"a, b, … (5)"``."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")


def frame_words(stack: Stack, layer: Layer) -> str:
    """The title of a layer that is drawn: ``"B  model.layers.3 … 60  x 58"``."""
    letter = stack.letter(layer)
    numbers = [int(name[len(stack.prefix) :]) for name in layer.names]
    title = f"{letter}   {layer.name}" if letter else layer.name
    if layer.count == 1:
        return title
    run = numbers[-1] - numbers[0] == len(numbers) - 1
    rest = (
        f" … {numbers[-1]}" if run else ", " + ", ".join(map(str, numbers[1:3])) + (", …" if len(numbers) > 3 else "")
    )
    return f"{title}{rest}   \u00d7 {layer.count}"


def wrapped(text: str, lines: int, width: int = LINE) -> list[str]:
    """The text on a few lines, broken after dots, underscores and blanks; what does not fit loses its end."""
    found = [""]
    for piece in re.findall(r"[^ ._]*[ ._]|[^ ._]+$", text):
        if found[-1] and len(found[-1]) + len(piece.rstrip()) > width:
            found.append("")
        found[-1] += piece
    found = [line.strip() if len(line.strip()) <= width else line.strip()[: width - 1] + "…" for line in found]
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "…"]
    return found


def type_words(kind: EdgeType) -> str:
    """An edge type as the legends call it."""
    return "bias or other" if kind == EdgeType.OTHER else kind.name.lower().replace("_", " ")
