"""Which neurons may change places: proposals from a trace, to be verified by :mod:`hf_nino.graph.verify`.

Neurons that must move together (one residual channel at all depths, a value channel and its repeats) form a *class*.
Classes of the same composition, within the same heads, are interchangeable; so are heads that share their key/value
head, and whole key/value heads with all of their query heads.  An expert is a head whose channels are its units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .positional import components
from .structure import Symmetry

Pairs = tuple[np.ndarray, np.ndarray]
"""Two lists of nodes, paired element by element."""


@dataclass(frozen=True)
class Heads:
    """Heads and the channels that belong to each.

    Args:
        centres: nodes of each head: its own, and those of parameters with one element for each head.
        channels: its channels.
        of: the heads that a channel belongs to.
    """

    centres: list[list[int]]
    channels: list[list[int]]
    of: dict[int, set[int]]


def propose(
    group_of: np.ndarray,
    group_names: Sequence[str],
    pinned: np.ndarray,
    together: Iterable[Pairs],
    stars: Sequence[Pairs],
    shared: Sequence[Pairs] = (),
    coarse: Sequence[Pairs] = (),
    confined: Sequence[np.ndarray] = (),
    lost: np.ndarray | None = None,
) -> list[Symmetry]:
    """Symmetries that the trace suggests.

    Args:
        group_of: group of each node, int [N].
        group_names: their names, for the symmetries' own.
        pinned: whether a node has an identity of its own, bool [N].
        together: nodes that move together (unions across places, ties of shared parameters, repeats).
        stars: (head, channel).
        shared: (node of a parameter's element, neuron that uses it): a parameter shared by several neurons.  If those
            are all of one head, the element belongs to the head; else all of them move together with it.
        coarse: (neuron, neuron that it meets elementwise together with others): a gate for each head.  Sorted like
            ``shared``; where there are no heads, it makes some.
        confined: sets of nodes that may only be permuted among themselves (the sides of a block-diagonal map).
        lost: whether a node could not be followed any further, bool [N]; a head with such a node is left out.
    """
    lost = np.zeros_like(pinned) if lost is None else lost
    kept = _partitions(stars, group_of)
    # Experts that share their units cannot be told from here: their routers stay where they are.
    left_out = [head for (head, _), (still, _) in zip(stars, kept, strict=True) if len(still) < len(head)]
    pinned = pinned | np.isin(np.arange(len(pinned)), np.concatenate([*left_out, np.empty(0, dtype=np.int64)]))
    stars = kept
    per_head, per_channel, alone = _sort_shared(shared, stars)
    per_channel += alone
    gates, per_gate, of_no_head = _sort_shared(coarse, stars)
    heads = _heads_from([*stars, *per_head, *gates, *_partitions(of_no_head, group_of)])
    per_channel += per_gate
    together = list(together)
    blocks: dict[int, set[int]] = defaultdict(set)
    for number, nodes in enumerate(confined):
        for node in nodes.tolist():
            blocks[node].add(number)
    # A head moves without the parameters that it shares with all others.
    classes, head_classes = _classes([*together, *per_channel], group_of), _classes(together, group_of)
    return [
        *_channel_symmetries(classes, group_of, group_names, pinned, heads, blocks),
        *_head_symmetries(
            head_classes, group_of, group_names, pinned, heads, pinned & False if lost is None else lost
        ),
    ]


def _classes(pairs: Sequence[Pairs], group_of: np.ndarray) -> list[np.ndarray]:
    """Nodes that move together, each class sorted by group and node."""
    size = len(group_of)
    stacked = [np.stack(pair) for pair in pairs]
    edges = torch.from_numpy(np.concatenate(stacked, axis=1)) if stacked else torch.empty(2, 0, dtype=torch.int64)
    label = components(size, edges).numpy()
    order = np.lexsort((np.arange(size), group_of, label))
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1)


def _sort_shared(shared: Sequence[Pairs], stars: Sequence[Pairs]) -> tuple[list[Pairs], list[Pairs], list[Pairs]]:
    """What is shared with one element for each head, otherwise, and by neurons of no head at all."""
    heads_of: dict[int, set[int]] = defaultdict(set)
    for head, channel in stars:
        for h, c in zip(head.tolist(), channel.tolist(), strict=True):
            heads_of[c].add(h)
    per_head, per_channel, of_no_head = [], [], []
    for element, neuron in shared:
        heads: dict[int, set[frozenset[int]]] = defaultdict(set)
        for e, n in zip(element.tolist(), neuron.tolist(), strict=True):
            heads[e].add(frozenset(heads_of.get(n, ())))
        if all(sets == {frozenset()} for sets in heads.values()):
            of_no_head.append((element, neuron))
            continue
        one_head = all(len(sets) == 1 and frozenset() not in sets for sets in heads.values())
        if one_head and len(set.union(*heads.values())) == len(heads) > 1:
            per_head.append((element, neuron))
        else:
            per_channel.append((element, neuron))
    return per_head, per_channel, of_no_head


def _partitions(stars: Sequence[Pairs], group_of: np.ndarray) -> list[Pairs]:
    """Without the stars of groups in which two heads have a channel in common (experts that share their outputs)."""
    heads_of: dict[tuple[int, int], set[int]] = defaultdict(set)
    for head, channel in stars:
        for h, c in zip(head.tolist(), channel.tolist(), strict=True):
            heads_of[int(group_of[h]), c].add(h)
    overlapping = {group for (group, _), found in heads_of.items() if len(found) > 1}
    kept = [~np.isin(group_of[head], sorted(overlapping)) for head, _ in stars]
    return [(head[keep], channel[keep]) for (head, channel), keep in zip(stars, kept, strict=True)]


def _heads_from(stars: Iterable[Pairs]) -> Heads:
    """Centres that have a channel in common are one head."""
    centres_of: dict[int, list[int]] = defaultdict(list)
    for centre, channel in stars:
        for a, c in zip(centre.tolist(), channel.tolist(), strict=True):
            if a not in centres_of[c]:
                centres_of[c].append(a)
    centres = sorted({a for found in centres_of.values() for a in found})
    number = {a: i for i, a in enumerate(centres)}
    pairs = {(number[found[0]], number[a]) for found in centres_of.values() for a in found[1:]}
    edges = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2).T
    label = np.unique(components(len(centres), edges).numpy(), return_inverse=True)[1].tolist()
    heads = Heads([[] for _ in set(label)], [[] for _ in set(label)], {})
    for a, head in zip(centres, label, strict=True):
        heads.centres[head].append(a)
    for channel, found in centres_of.items():
        head = label[number[found[0]]]
        heads.channels[head].append(channel)
        heads.of[channel] = {head}
    return heads


def _channel_symmetries(classes, group_of, group_names, pinned, heads: Heads, blocks) -> list[Symmetry]:
    """Classes that may be permuted among themselves, block by block (a block is a head, or a key/value head)."""
    centres = {centre for nodes in heads.centres for centre in nodes}
    families: dict[tuple, dict[tuple, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for nodes in classes:
        listed = nodes.tolist()
        if pinned[nodes].any() or not centres.isdisjoint(listed):
            continue
        signature = tuple(group_of[nodes].tolist())
        of_heads = frozenset(head for node in listed for head in heads.of.get(node, ()))
        of_blocks = frozenset(block for node in listed for block in blocks.get(node, ()))
        families[signature][of_heads, of_blocks].append(nodes)
    found = []
    for signature, in_blocks in families.items():
        by_size: dict[int, list[np.ndarray]] = defaultdict(list)
        for units in in_blocks.values():
            if len(units) > 1:
                by_size[len(units)].append(np.stack(units))
        for number, group in by_size.items():
            others = len(set(signature)) - 1
            name = group_names[signature[0]] + (f" and {others} more groups" if others else "")
            suffix = "" if len(by_size) == 1 else f" ({number})"
            found.append(Symmetry(f"neurons of {name}{suffix}", torch.from_numpy(np.stack(group))))
    return found


def _head_symmetries(classes, group_of, group_names, pinned, heads: Heads, lost) -> list[Symmetry]:
    """Permutations of whole heads: of those that share key/value heads, then of key/value heads with all of theirs."""
    class_of = {node: number for number, nodes in enumerate(classes) for node in nodes.tolist()}
    by_group: dict[int, list[int]] = defaultdict(list)
    for head, centres in enumerate(heads.centres):
        by_group[int(group_of[centres[0]])].append(head)
    found = []
    for group, mine in by_group.items():
        sharing: dict[tuple, list[np.ndarray]] = defaultdict(list)
        for head in mine:
            centres, own = heads.centres[head], heads.channels[head]
            if pinned[centres].any() or not own:
                continue
            related = np.concatenate([classes[number] for number in {class_of[node] for node in own}])
            if lost[related].any() or lost[centres].any():
                continue
            parents = _sorted((int(node) for node in related if node not in heads.of), group_of)
            sharing[tuple(parents)].append(np.array([*_sorted(centres, group_of), *_sorted(own, group_of)]))
        found += _within(sharing, group_of, f"heads of {group_names[group]}")
        if sharing and () not in sharing:
            whole = [np.concatenate([np.array(parents), *units]) for parents, units in sharing.items()]
            found += _within({(): whole}, group_of, f"key/value heads of {group_names[group]}")
    return found


def _sorted(nodes: Iterable[int], group_of: np.ndarray) -> list[int]:
    return sorted(nodes, key=lambda node: (group_of[node], node))


def _within(sharing: dict[tuple, list[np.ndarray]], group_of: np.ndarray, name: str) -> list[Symmetry]:
    """One symmetry for all sets of units that are alike; units of different composition, or overlapping, have none."""
    alike: dict[tuple, list[np.ndarray]] = defaultdict(list)
    for units in sharing.values():
        signatures = {tuple(group_of[unit].tolist()) for unit in units}
        stacked = np.concatenate(units)
        if len(units) > 1 and len(signatures) == 1 and len(np.unique(stacked)) == len(stacked):
            alike[len(units), signatures.pop()].append(np.stack(units))
    return [Symmetry(name, torch.from_numpy(np.stack(blocks))) for blocks in alike.values()]
