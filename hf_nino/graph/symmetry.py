"""Which neurons may change places: proposals from a trace, to be verified by :mod:`hf_nino.graph.verify`.

Neurons that must move together (one residual channel at all depths, a value channel and its repeats) form a *class*.
Classes of the same composition, within the same heads, are interchangeable; so are heads that share their key/value
head, and whole key/value heads with all of their query heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .positional import components
from .structure import Symmetry


def propose(
    group_of: np.ndarray,
    group_names: Sequence[str],
    pinned: np.ndarray,
    together: Iterable[tuple[np.ndarray, np.ndarray]],
    stars: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Symmetry]:
    """Symmetries that the trace suggests.

    Args:
        group_of: group of each node, int [N].
        group_names: their names, for the symmetries' own.
        pinned: whether a node has an identity of its own, bool [N].
        together: pairs of nodes that move together (unions across places, ties of shared parameters, repeats).
        stars: pairs (head or other coarse node, fine node).
    """
    size = len(group_of)
    heads_of: dict[int, set[int]] = defaultdict(set)
    channels_of: dict[int, list[int]] = defaultdict(list)
    for head, channel in stars:
        for h, c in zip(head.tolist(), channel.tolist(), strict=True):
            if h not in heads_of[c]:
                heads_of[c].add(h)
                channels_of[h].append(c)
    pairs = [np.stack(pair) for pair in together]
    edges = torch.from_numpy(np.concatenate(pairs, axis=1)) if pairs else torch.empty(2, 0, dtype=torch.int64)
    label = np.unique(components(size, edges).numpy(), return_inverse=True)[1]
    order = np.lexsort((np.arange(size), group_of, label))
    members = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    return [
        *_channels(members, group_of, group_names, pinned, heads_of, set(channels_of)),
        *_heads(members, label, group_of, group_names, pinned, heads_of, channels_of),
    ]


def _channels(members, group_of, group_names, pinned, heads_of, heads) -> list[Symmetry]:
    """Classes that may be permuted among themselves, block by block (a block is a head, or a key/value head)."""
    families: dict[tuple, dict[frozenset, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for nodes in members:
        if pinned[nodes].any() or not heads.isdisjoint(nodes.tolist()):
            continue
        signature = tuple(group_of[nodes].tolist())
        block = frozenset(h for node in nodes.tolist() for h in heads_of.get(node, ()))
        families[signature][block].append(nodes)
    found = []
    for signature, blocks in families.items():
        by_size: dict[int, list[np.ndarray]] = defaultdict(list)
        for units in blocks.values():
            if len(units) > 1:
                by_size[len(units)].append(np.stack(units))
        for number, group in by_size.items():
            others = len(set(signature)) - 1
            name = group_names[signature[0]] + (f" and {others} more groups" if others else "")
            suffix = "" if len(by_size) == 1 else f" ({number})"
            found.append(Symmetry(f"neurons of {name}{suffix}", torch.from_numpy(np.stack(group))))
    return found


def _heads(members, label, group_of, group_names, pinned, heads_of, channels_of) -> list[Symmetry]:
    """Permutations of whole heads: of those that share key/value heads, then of key/value heads with all of theirs."""
    by_group: dict[int, list[int]] = defaultdict(list)
    for head in channels_of:
        by_group[int(group_of[head])].append(head)
    found = []
    for group, heads in by_group.items():
        sharing: dict[tuple, list[np.ndarray]] = defaultdict(list)
        for head in sorted(heads):
            own = [c for c in channels_of[head] if heads_of[c] == {head}]
            if pinned[head] or len(own) != len(channels_of[head]):
                continue
            classes = np.unique(label[own])
            related = np.concatenate([members[index] for index in classes])
            parents = sorted((int(n) for n in related if n not in heads_of), key=lambda n: (group_of[n], n))
            unit = [head, *sorted(own, key=lambda n: (group_of[n], n))]
            sharing[tuple(parents)].append(np.array(unit))
        found += _within(sharing, f"heads of {group_names[group]}")
        if () not in sharing:
            whole = [np.concatenate([np.array(parents), *units]) for parents, units in sharing.items()]
            found += _within({(): whole}, f"key/value heads of {group_names[group]}")
    return found


def _within(sharing: dict[tuple, list[np.ndarray]], name: str) -> list[Symmetry]:
    """One symmetry for all sets of units of the same shape."""
    by_shape: dict[tuple, list[np.ndarray]] = defaultdict(list)
    for units in sharing.values():
        if len(units) > 1 and len({len(unit) for unit in units}) == 1:
            stacked = np.stack(units)
            by_shape[stacked.shape].append(stacked)
    return [Symmetry(name, torch.from_numpy(np.stack(blocks))) for blocks in by_shape.values()]
