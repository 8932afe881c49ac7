"""Which neurons may change places: proposals from a trace, to be verified by :mod:`hf_nino.graph.verify`.

Neurons that must move together (one residual channel at all depths, a value channel and its repeats) form a *class*.
Classes of the same composition, within the same heads, are interchangeable; so are heads that share their key/value
head, and whole key/value heads with all of their query heads.  An expert is a head whose channels are its units.

A mixture of experts has millions of units, so that everything here runs on arrays of nodes; only heads, and sets of
interchangeable neurons, are looked at one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .positional import components
from .structure import Symmetry

Pairs = tuple[np.ndarray, np.ndarray]
"""Two lists of nodes, paired element by element."""


@dataclass(frozen=True)
class Lists:
    """Lists of integers, end to end: list r is ``values[bounds[r] : bounds[r + 1]]``."""

    values: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, owner: np.ndarray, values: np.ndarray, count: int) -> Lists:
        """``count`` lists, of which list r has the values whose owner is r, in the order in which they come."""
        order = np.argsort(owner, kind="stable")
        return cls(values[order], np.searchsorted(owner[order], np.arange(count + 1)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self.bounds[number] : self.bounds[number + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    @property
    def owners(self) -> np.ndarray:
        """The list that each value is in."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def nonempty(self) -> Iterator[np.ndarray]:
        """The lists that have values."""
        return (self[number] for number in np.flatnonzero(self.lengths).tolist())

    def take(self, numbers: np.ndarray) -> Lists:
        """Some of the lists."""
        lengths = self.bounds[numbers + 1] - self.bounds[numbers]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        place = np.arange(bounds[-1]) + np.repeat(self.bounds[numbers] - bounds[:-1], lengths)
        return Lists(self.values[place], bounds)

    def numbered(self) -> np.ndarray:
        """A number for each list, the same for equal lists and only for those."""
        lengths = self.lengths
        number = lengths.copy()
        for place in range(lengths.max(initial=0)):
            longer = np.flatnonzero(lengths > place)
            # Fresh numbers, which no shorter list has.
            fresh = _paired(number[longer], self.values[self.bounds[longer] + place])
            number[longer] = number.max() + 1 + fresh
        return number


@dataclass(frozen=True)
class Heads:
    """Which head each node belongs to, int [N]; -1 for none.

    Args:
        count: number of heads.
        of_centre: for the node of a head, and for those of parameters with one element for each head.
        of_channel: for its channels.
    """

    count: int
    of_centre: np.ndarray
    of_channel: np.ndarray

    def centres(self) -> Lists:
        """The nodes of each head."""
        return _members(self.of_centre, self.count)

    def channels(self) -> Lists:
        """The channels of each head."""
        return _members(self.of_channel, self.count)


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
    pinned = pinned.copy()
    pinned[_joined(left_out)] = True
    size = len(pinned)
    together = list(together)
    ties, coarse = _ties_among(coarse, _classes(together, group_of), group_of)
    together += ties
    per_head, per_channel, alone = _sort_shared(shared, kept, size)
    gates, per_gate, of_no_head = _sort_shared(coarse, kept, size)
    heads = _heads_from([*kept, *per_head, *gates, *_partitions(of_no_head, group_of)], size)
    moved_along = [*per_channel, *alone, *per_gate]
    # A head moves without the parameters that it shares with all others.
    head_classes = _classes(together, group_of)
    classes = _classes([*together, *moved_along], group_of) if moved_along else head_classes
    return [
        *_channel_symmetries(classes, group_of, group_names, pinned, heads, confined),
        *_head_symmetries(head_classes, group_of, group_names, pinned, heads, lost),
    ]


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.empty(0, dtype=np.int64)])


def _joined_pairs(pairs: Sequence[Pairs]) -> Pairs:
    return _joined(first for first, _ in pairs), _joined(second for _, second in pairs)


def _distinct(first: np.ndarray, second: np.ndarray) -> Pairs:
    """Pairs of numbers without repetition, sorted."""
    base = int(second.max(initial=0)) + 1
    code = np.sort(first * base + second)
    return np.divmod(code[np.diff(code, prepend=-1) > 0], base)


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number for each pair, the same for equal pairs and only for those."""
    base = int(second.max(initial=0)) + 1
    return np.unique(first * base + second, return_inverse=True)[1]


def _members(owner: np.ndarray, count: int) -> Lists:
    """The nodes that each of ``count`` sets owns, given the set of each node, or -1."""
    nodes = np.flatnonzero(owner >= 0)
    return Lists.of(owner[nodes], nodes, count)


def in_order(number: np.ndarray) -> np.ndarray:
    """Equal numbers as 0, 1, ... in the order in which they first appear."""
    _, first, inverse = np.unique(number, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _sorted(nodes: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """By group, then by node."""
    return nodes[np.lexsort((nodes, group_of[nodes]))]


def _classes(pairs: Sequence[Pairs], group_of: np.ndarray) -> Lists:
    """Nodes that move together: classes in the order of their first nodes, each sorted by group and node."""
    size = len(group_of)
    label = components(size, torch.from_numpy(np.stack(_joined_pairs(pairs)))).numpy()
    order = np.lexsort((np.arange(size), group_of, label))
    return Lists(order, np.flatnonzero(np.diff(label[order], prepend=-1, append=size)))


def _ties_among(coarse: Sequence[Pairs], classes: Lists, group_of: np.ndarray) -> tuple[list[Pairs], list[Pairs]]:
    """Pairs of one neuron with several that move together anyway, or that are each in a group of their own.

    These are no channels of a head but one channel of several streams, and the one moves with them.
    """
    class_of = np.empty(len(classes.values), dtype=np.int64)
    class_of[classes.values] = classes.owners
    ties, left = [], []
    for one, many in coarse:
        one, many = _distinct(one, many)
        together = len(_distinct(one, class_of[many])[0]) == len(np.unique(one))
        apart = len(_distinct(one, group_of[many])[0]) == len(one)
        (ties if together or apart else left).append((one, many))
    return ties, left


def _sort_shared(
    shared: Sequence[Pairs], stars: Sequence[Pairs], size: int
) -> tuple[list[Pairs], list[Pairs], list[Pairs]]:
    """What is shared with one element for each head, otherwise, and by neurons of no head at all."""
    per_head, per_channel, of_no_head = [], [], []
    if not shared:
        return per_head, per_channel, of_no_head
    head, channel = _joined_pairs(stars)
    heads_of = Lists.of(*_distinct(channel, head), size)
    sets = np.where(heads_of.lengths > 0, heads_of.numbered(), -1)
    for element, neuron in shared:
        elements, found = _distinct(element, sets[neuron] + 1)
        if not found.any():
            of_no_head.append((element, neuron))
        elif found.all() and len(np.unique(elements)) == len(np.unique(found)) == len(found) > 1:
            per_head.append((element, neuron))
        else:
            per_channel.append((element, neuron))
    return per_head, per_channel, of_no_head


def _partitions(stars: Sequence[Pairs], group_of: np.ndarray) -> list[Pairs]:
    """Without the stars of groups in which two heads have a channel in common (experts that share their outputs)."""
    channel, head = _distinct(*reversed(_joined_pairs(stars)))
    place = group_of[head] * len(group_of) + channel
    places, heads = np.unique(place, return_counts=True)
    overlapping = np.unique(places[heads > 1] // len(group_of))
    if not len(overlapping):
        return list(stars)
    kept = [~np.isin(group_of[head], overlapping) for head, _ in stars]
    return [(head[keep], channel[keep]) for (head, channel), keep in zip(stars, kept, strict=True)]


def _heads_from(stars: Sequence[Pairs], size: int) -> Heads:
    """Centres that have a channel in common are one head; heads in the order of their first centres."""
    channel, centre = _distinct(*reversed(_joined_pairs(stars)))
    again = np.flatnonzero(channel[1:] == channel[:-1])
    first = components(size, torch.from_numpy(np.stack([centre[again], centre[again + 1]]))).numpy()
    known, head = np.unique(first[centre], return_inverse=True)
    heads = Heads(len(known), np.full(size, -1), np.full(size, -1))
    heads.of_centre[centre] = head
    heads.of_channel[channel] = head
    return heads


def _channel_symmetries(
    classes: Lists,
    group_of: np.ndarray,
    group_names: Sequence[str],
    pinned: np.ndarray,
    heads: Heads,
    confined: Sequence[np.ndarray],
) -> list[Symmetry]:
    """Classes that may be permuted among themselves, block by block (a block is a head, or a key/value head)."""
    bound = pinned | (heads.of_centre >= 0)
    tied = np.bincount(classes.owners[bound[classes.values]], minlength=len(classes))
    free = np.flatnonzero(tied == 0)
    sets = np.repeat(np.arange(len(confined)), [len(nodes) for nodes in confined])
    sets_of = Lists.of(*_distinct(_joined(confined), sets), len(group_of))
    found = []
    # Interchangeable classes begin in the same group.
    first = group_of[classes.values[classes.bounds[:-1][free]]]
    for mine in Lists.of(first, free, len(group_names)).nonempty():
        for family in _families(classes.take(mine), group_of, heads, sets_of):
            for units in family:
                groups = group_of[units[0, 0]]
                others = len(np.unique(groups)) - 1
                name = group_names[groups[0]] + (f" and {others} more groups" if others else "")
                suffix = "" if len(family) == 1 else f" ({units.shape[1]})"
                found.append(Symmetry(f"neurons of {name}{suffix}", torch.from_numpy(units)))
    return found


def _families(classes: Lists, group_of: np.ndarray, heads: Heads, sets_of: Lists) -> Iterator[list[np.ndarray]]:
    """For classes of each composition, what may be permuted: node arrays [blocks, units, nodes], one for each size.

    A block holds the classes of the same heads and the same confining sets.
    """
    count, owners = len(classes), classes.owners
    composition = in_order(Lists(group_of[classes.values], classes.bounds).numbered())
    head = heads.of_channel[classes.values]
    of_heads = Lists.of(*_distinct(owners[head >= 0], head[head >= 0]), count).numbered()
    sets = sets_of.take(classes.values)
    of_sets = Lists.of(*_distinct(owners[sets.owners], sets.values), count).numbered()
    block = in_order(_paired(_paired(composition, of_heads), of_sets))
    units = np.bincount(block)[block]
    several = np.flatnonzero(units > 1)
    for members in Lists.of(composition[several], several, count).nonempty():
        members = members[np.argsort(block[members], kind="stable")]
        sizes = units[members]
        yield [
            classes.take(members[sizes == size]).values.reshape((sizes == size).sum() // size, size, -1)
            for size in dict.fromkeys(sizes.tolist())
        ]


def _head_symmetries(
    classes: Lists,
    group_of: np.ndarray,
    group_names: Sequence[str],
    pinned: np.ndarray,
    heads: Heads,
    lost: np.ndarray,
) -> list[Symmetry]:
    """Permutations of whole heads: of those that share key/value heads, then of key/value heads with all of theirs."""
    centres_of, channels_of = heads.centres(), heads.channels()
    class_of = np.empty(len(group_of), dtype=np.int64)
    class_of[classes.values] = classes.owners
    by_group: dict[int, list[int]] = defaultdict(list)
    for head in range(heads.count):
        by_group[int(group_of[centres_of[head][0]])].append(head)
    found = []
    whole: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    names: dict[tuple[int, ...], str] = {}
    for group, mine in by_group.items():
        sharing: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        for head in mine:
            centres, own = centres_of[head], channels_of[head]
            related = classes.take(np.unique(class_of[own])).values
            if pinned[centres].any() or lost[centres].any() or lost[related].any():
                continue
            parents = _sorted(related[heads.of_channel[related] < 0], group_of)
            unit = np.concatenate([_sorted(centres, group_of), _sorted(own, group_of)])
            sharing[tuple(parents.tolist())].append(unit)
        found += _within(sharing.values(), group_of, f"heads of {group_names[group]}")
        if () not in sharing:
            for parents, units in sharing.items():
                # Layers that share keys and values move with them together.
                whole[parents] += units
                names.setdefault(parents, f"key/value heads of {group_names[group]}")
    by_name: dict[str, list[np.ndarray]] = defaultdict(list)
    for parents, units in whole.items():
        by_name[names[parents]].append(_joined([np.array(parents), *units]))
    for name, units in by_name.items():
        found += _within([units], group_of, name)
    return found


def _within(sharing: Iterable[list[np.ndarray]], group_of: np.ndarray, name: str) -> list[Symmetry]:
    """One symmetry for all sets of units that are alike; units of different composition, or overlapping, have none."""
    alike: dict[tuple[int, bytes], list[np.ndarray]] = defaultdict(list)
    for units in sharing:
        signatures = {group_of[unit].tobytes() for unit in units}
        joined = np.concatenate(units)
        if len(units) > 1 and len(signatures) == 1 and len(np.unique(joined)) == len(joined):
            alike[len(units), signatures.pop()].append(np.stack(units))
    return [Symmetry(name, torch.from_numpy(np.stack(blocks))) for blocks in alike.values()]
