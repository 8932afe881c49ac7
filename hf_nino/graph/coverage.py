"""How much of a model its neural graph explains: counts, totals and the table that the documentation quotes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers

from .structure import EdgeType, NeuralGraph
from .tiny import NOT_OFFLINE

UNREACHED = "not reached"
"""How the reason of a private group begins whose parameters took no part in the forward pass."""


@dataclass(frozen=True)
class Row:
    """What the graph of one type says.

    Args:
        parameters: trainable elements; the other counts are elements too, each in the first class that applies.
        unreached: private because the forward pass did not use them.
        private: private for another reason.
        unmoved: on a group that is neither moved by a verified permutation, nor pinned for a reason, nor tied by
            matchings to one that is.
        moved: elements (of any class) that some verified permutation moves.
        groups, symmetries: of the graph.
        refuted: proposals that failed the permutation test, as the report names them.
        pins: number of neurons by the reason that pins them.
        seconds: for the model and its graph together.
        error: why there is no graph; all counts are 0 then.
    """

    kind: str
    type: str
    parameters: int = 0
    unreached: int = 0
    private: int = 0
    unmoved: int = 0
    moved: int = 0
    groups: int = 0
    symmetries: int = 0
    refuted: tuple[str, ...] = ()
    pins: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    @property
    def placed(self) -> int:
        """Elements on verified groups or on groups that are pinned with a reason."""
        return self.parameters - self.unreached - self.private - self.unmoved

    @property
    def verified(self) -> bool:
        """Whether there is a graph, and every proposed permutation passed the test."""
        return self.error is None and not self.refuted

    def line(self) -> str:
        """The row in words."""
        if self.error is not None:
            return f"{self.kind} {self.type}: {self.error}"
        return (
            f"{self.kind} {self.type}: {self.placed} of {self.parameters} parameters on verified or pinned groups, "
            f"{self.private} private, {self.unreached} unreached, {self.unmoved} unmoved; {self.groups} groups, "
            f"{self.symmetries} symmetries, {len(self.refuted)} refuted; {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Totals:
    """The figures that the project promises, over all types that can be made offline."""

    types: int
    errors: int
    verified: int
    """Types whose proposals all passed."""
    placed: float
    """Share of the elements of all types on verified or pinned groups; each type counts alike."""

    @property
    def verified_share(self) -> float:
        return self.verified / max(1, self.types)


def count(kind: str, model_type: str, graph: NeuralGraph) -> Row:
    """Count a graph's elements by what is known of the neurons on both of their sides."""
    free = torch.zeros(graph.num_nodes, dtype=torch.bool)
    for symmetry in graph.symmetries:
        free[symmetry.units.flatten()] = True
    explained = free | _pinned(graph)
    moves, stays = [], []
    for start, group in zip(graph.group_offsets, graph.groups, strict=True):
        moves.append(bool(free[start : start + group.size].any()))
        stays.append(group.size > 1 and not bool(explained[start : start + group.size].all()))
    classes: Counter[str] = Counter()
    for block in graph.trainable_blocks:
        groups = [block.source.group, block.target.group]
        elements = block.edges * block.shape[2]
        states = {_state(graph, g, stays[g]) for g in groups}
        worst = next(state for state in ("unreached", "private", "unmoved", "placed") if state in states)
        classes[worst] += elements
        classes["moved"] += elements * any(moves[g] for g in groups)
    pins: Counter[str] = Counter()
    for group in graph.groups:
        if group.pinned is not None:
            pins[group.pinned] += group.size
    return Row(
        kind,
        model_type,
        parameters=graph.num_parameters,
        groups=len(graph.groups),
        symmetries=len(graph.symmetries),
        refuted=tuple(line for line in graph.report if line.startswith("refuted:")),
        pins=dict(pins),
        **{name: classes[name] for name in ("unreached", "private", "unmoved", "moved")},
    )


def _pinned(graph: NeuralGraph) -> torch.Tensor:
    """Nodes of pinned groups, and those that matchings tie to them: bool of shape [N]."""
    pinned = torch.cat([torch.full((group.size,), group.pinned is not None) for group in graph.groups])
    offsets = graph.group_offsets
    pairs = [
        torch.stack([offsets[side.group] + side.index() for side in (edges.source, edges.target)])
        for edges in graph.constants
        if edges.edge_type == EdgeType.RESIDUAL
    ]
    source, target = torch.cat(pairs, dim=1) if pairs else torch.empty(2, 0, dtype=torch.int64)
    count = -1
    while count != (count := int(pinned.sum())):
        tied = pinned[source] | pinned[target]
        pinned[source[tied]] = pinned[target[tied]] = True
    return pinned


def _state(graph: NeuralGraph, number: int, stays: bool) -> str:
    group = graph.groups[number]
    if group.kind == "private":
        return "unreached" if (group.pinned or "").startswith(UNREACHED) else "private"
    return "unmoved" if stays else "placed"


EXPLAINED: Mapping[str, str] = {
    "blt": "the local encoder's cross attention adds one output to several slots of a patch",
    "deepseek_v4": "its compressor keeps two overlapping windows of keys in one tensor, which are not paired up",
    "gemma3n_text": "what the layers add to all streams at once moves with streams that are pinned",
    "markuplm": "a table of the subscripts of tags is made but never used by the model",
    "mobilebert": "its output matrix is put together from two parameters at every call",
    "nemo_speechlm": "the encoder of word times takes no part in the forward pass",
    "nllb-moe": "transformers takes the mask of experts for their numbers: no token reaches more than two",
    "phi4_multimodal": "sound beside an image passes another projection than sound alone; one of the two is not used",
    "qwen4_exp": "the first hyper-connection meets the one stream that it makes four of, which is pinned",
    "qwen4_exp_text": "as qwen4_exp",
    "swinv2": "cosine attention: norms of queries and keys are not followed, so that heads are not proposed",
    "zaya": "queries and keys are mixed before and after convolutions in groups, which pin them",
    "xlnet": "the parameters of masks and segments are not used without them",
}
"""Why types that are not explained in full are not: refuted proposals, or less than 99% of the elements placed."""


def unexplained(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows that need a reason and have none, and types with a reason that no row needs."""
    needy = [row for row in rows if not row.verified or row.placed < 0.99 * row.parameters]
    return [row for row in needy if row.type not in EXPLAINED], sorted(set(EXPLAINED) - {row.type for row in needy})


def totals(rows: Sequence[Row]) -> Totals:
    """The figures over all rows, types that cannot be made offline apart."""
    rows = [row for row in rows if row.type not in NOT_OFFLINE]
    shares = [row.placed / row.parameters if row.parameters else 0.0 for row in rows]
    return Totals(
        types=len(rows),
        errors=sum(row.error is not None for row in rows),
        verified=sum(row.verified for row in rows),
        placed=sum(shares) / max(1, len(shares)),
    )


def summary(rows: Sequence[Row]) -> str:
    """The totals in one sentence."""
    found = totals(rows)
    return (
        f"{found.types} types, {found.errors} without a graph; {found.verified} ({found.verified_share:.1%}) with "
        f"all proposals verified; {found.placed:.2%} of parameter elements on verified or pinned groups"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows and totals as Markdown."""
    lines = [
        f"Tiny models of every type, transformers {transformers.__version__}: {summary(rows)}.",
        "",
        "| kind | type | parameters | placed | private | unreached | unmoved | groups | symmetries | refuted | s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.error is not None:
            lines.append(f"| {row.kind} | {row.type} | {row.error.replace('|', '/')} | | | | | | | | |")
            continue
        share = row.placed / max(1, row.parameters)
        counts = (row.private, row.unreached, row.unmoved, row.groups, row.symmetries, len(row.refuted), row.seconds)
        lines.append(f"| {row.kind} | {row.type} | {row.parameters} | {share:.1%} | {' | '.join(map(str, counts))} |")
    needy = {row.type for row in rows if not row.verified or row.placed < 0.99 * row.parameters}
    reasons = [f"| {name} | {reason} |" for name, reason in EXPLAINED.items() if name in needy]
    if reasons:
        lines += ["", "Types of which something is refuted, or less than 99% placed, and why:", ""]
        lines += ["| type | reason |", "|---|---|", *reasons]
    if NOT_OFFLINE:
        lines += ["", "Types that cannot be made offline:", "", "| type | reason |", "|---|---|"]
        lines += [f"| {name} | {reason} |" for name, reason in NOT_OFFLINE.items()]
    return "\n".join(lines) + "\n"
