"""What a neural graph has to say, as data and as text that can be read for a model of any depth."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from .coverage import count
from .folding import fold
from .structure import NeuralGraph
from .words import frame_words, pin_words, root_of, short_name, size_words, type_words

NAME, LONGEST = 46, 100
"""Letters of the column of names, and of the name of a symmetry."""

NOTES = 12
"""Lines of one kind that the text shows."""


def summary(graph: NeuralGraph) -> dict[str, Any]:
    """The graph in words and numbers, for ``json.dumps``.

    Returns:
        ``parameters``, ``nodes``, ``edges`` (parameter edges, constant edges and self loops); ``shares`` of the
        parameters' elements by what is known of the neurons on both sides (they add up to 1, ``moved`` apart: see
        :class:`hf_nino.graph.coverage.Row`); ``stacks`` of layers that repeat; ``groups`` with ``count``, how many
        each stands for when layers that are alike are folded; ``blocks`` by edge type; ``symmetries``, those that
        differ in the number of a layer taken together; ``private`` parameters with the reason; ``report``, line by
        line.
    """
    folding = fold(graph)
    row = count("", "", graph)
    whole = max(1, row.parameters)
    blocks: dict[str, Counter[str]] = defaultdict(Counter)
    for block in graph.trainable_blocks:
        blocks[type_words(block.edge_type)].update(blocks=1, parameters=block.edges * block.shape[2])
    for constant in graph.constants:
        blocks[type_words(constant.edge_type)].update(constants=1, edges=constant.edges)
    return {
        "parameters": graph.num_parameters,
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "shares": {
            name: getattr(row, name) / whole for name in ("placed", "private", "unreached", "unmoved", "moved")
        },
        "stacks": [
            {
                "prefix": stack.prefix,
                "pattern": stack.pattern(),
                "layers": [{"letter": stack.letter(layer), "names": list(layer.names)} for layer in stack.layers],
            }
            for stack in folding.stacks
        ],
        "groups": [
            {
                "name": graph.groups[number].name,
                "size": graph.groups[number].size,
                "kind": graph.groups[number].kind,
                "pinned": graph.groups[number].pinned,
                "count": len(folding.members[number]),
            }
            for number in folding.drawn
        ],
        "blocks": {name: dict(counts) for name, counts in blocks.items()},
        "symmetries": [
            {"name": name, "blocks": shape[0], "units": shape[1], "nodes_per_unit": shape[2], "count": times}
            for (name, shape), times in _alike((s.name, tuple(s.units.shape)) for s in graph.symmetries).items()
        ],
        "private": [{"parameter": name, "reason": reason} for name, reason in private_parameters(graph).items()],
        "report": list(graph.report),
    }


def text(graph: NeuralGraph) -> str:
    """The same to be read: groups (one layer of each kind), edges, symmetries, what is pinned or private, and why."""
    found = summary(graph)
    shares = found["shares"]
    lines = [
        f"{found['parameters']:,} parameters on {len(graph.trainable_blocks):,} blocks; {found['nodes']:,} nodes in "
        f"{len(graph.groups):,} groups; {len(graph.symmetries):,} symmetries",
        f"{shares['placed']:.1%} of the parameters lie on neurons that are interchangeable, or pinned for a reason; "
        f"{shares['private'] + shares['unreached']:.1%} on private neurons",
        "",
        *_group_lines(graph),
        "",
        "Edges",
        *_edge_lines(found),
        "",
        "Symmetries: neurons that may change places",
        *(_some(_symmetry_lines(found["symmetries"])) or ["  none"]),
    ]
    reasons = _reasons(graph)
    if reasons:
        lines += ["", "Pinned: neurons with an identity of their own", *_some(reasons)]
    folded = _alike((entry["parameter"], entry["reason"]) for entry in found["private"])
    private = [f"  {_times(times)}{name}: {reason}" for (name, reason), times in folded.items()]
    if private:
        lines += ["", "Private: parameters without neighbours", *_some(private)]
    notes = [f"  {_times(times)}{line}" for (line, _), times in _alike((line, None) for line in graph.report).items()]
    if notes:
        lines += ["", "Notes", *_some(notes)]
    return "\n".join(lines)


def private_parameters(graph: NeuralGraph) -> Mapping[str, str]:
    """Parameters (or parts of them) that lie between private neurons, and why."""
    found: dict[str, str] = {}
    for block in graph.trainable_blocks:
        for side in (block.source, block.target):
            group = graph.groups[side.group]
            if group.kind == "private":
                found.setdefault(block.parameter, group.pinned or "no rule could place it")
    return found


def _group_lines(graph: NeuralGraph) -> list[str]:
    folding = fold(graph)
    root = root_of(folding.stacks)
    lines = [f"{'Groups':<{NAME}}  {'size':<30}  pinned"]
    current = None
    hidden = sum(group.kind == "parameter" for group in graph.groups)
    patterns = {stack.prefix: stack.pattern() for stack in folding.stacks if len(stack.layers) > 1}
    for number in folding.drawn:
        group = graph.groups[number]
        if group.kind in ("parameter", "private"):
            continue
        stack, layer = folding.layer_of.get(number, (None, None))
        if layer is not current and layer is not None:
            pattern = patterns.pop(stack.prefix, "")
            lines += [f"  {stack.prefix.rstrip('.')}: {pattern}"] if pattern else []
            lines.append(f"  {frame_words(stack, layer)}")
        current = layer
        copies = folding.copies.get(number, 1)
        name = short_name(group, layer.name if layer else "", root) + (f" \u00d7 {copies}" if copies > 1 else "")
        indent = "    " if layer else "  "
        name = indent + (name if len(name) <= NAME - 4 else name[: NAME - 5] + "\u2026")
        lines.append(f"{name:<{NAME}}  {size_words(graph, number):<30}  {pin_words(group)}".rstrip())
    if hidden:
        lines.append(f"  and {hidden:,} nodes that biases and gains hang on, one for each")
    return lines


def _edge_lines(found: Mapping[str, Any]) -> Iterable[str]:
    for name, counts in found["blocks"].items():
        if "blocks" in counts:
            share = counts["parameters"] / max(1, found["parameters"])
            blocks = f"in {counts['blocks']:,} block{'s' * (counts['blocks'] > 1)}"
            yield f"  {name:<20} {counts['parameters']:>16,} parameters {share:>6.1%}  {blocks}"
        if "constants" in counts:
            yield f"  {name:<20} {counts['edges']:>16,} constant edges"


def _symmetry_lines(symmetries: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for s in symmetries:
        sets = f"{s['blocks']:,} sets of {s['units']:,}" if s["blocks"] > 1 else f"{s['units']:,}"
        nodes = f", {s['nodes_per_unit']:,} nodes each" if s["nodes_per_unit"] > 1 else ""
        name = s["name"] if len(s["name"]) <= LONGEST else s["name"][: LONGEST - 1] + "\u2026"
        lines.append(f"  {_times(s['count'])}{name}: {sets}{nodes}")
    return lines


def _reasons(graph: NeuralGraph) -> list[str]:
    """How many neurons and groups each reason pins; private neurons are listed on their own."""
    neurons: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    for group in graph.groups:
        if group.pinned is not None and group.kind not in ("parameter", "private"):
            neurons[group.pinned] += group.size
            groups[group.pinned] += 1
    return [f"  {n:,} in {groups[r]:,} group{'s' * (groups[r] > 1)}: {r}" for r, n in neurons.most_common()]


def _alike(entries: Iterable[tuple[str, Any]]) -> dict[tuple[str, Any], int]:
    """(name, what else must agree) -> how often, names that differ in their numbers taken together as ``#``."""
    counts: Counter[tuple[str, Any]] = Counter()
    first: dict[tuple[str, Any], str] = {}
    for name, other in entries:
        key = re.sub(r"(?<=\.)\d+(?=[.\s\[]|$)", "#", name), other
        counts[key] += 1
        first.setdefault(key, name)
    return {(key[0] if times > 1 else first[key], key[1]): times for key, times in counts.items()}


def _times(count: int) -> str:
    return f"{count:,} \u00d7 " if count > 1 else ""


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= NOTES else [*lines[: NOTES - 1], f"  and {len(lines) - NOTES + 1} more (see --json)"]
