"""Which neurons are proposed as interchangeable, against a reference that says it with sets; and at what cost."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TEXT

from hf_nino.graph import NeuralGraph, Symmetry, build
from hf_nino.graph.symmetry import Lists, in_order, propose

Described = set[tuple[str, frozenset[frozenset[tuple[int, ...]]]]]
"""Name and blocks of units of each symmetry; units are tuples of nodes."""


def described(symmetries: Iterable[Symmetry]) -> Described:
    return {
        (s.name, frozenset(frozenset(tuple(unit) for unit in block) for block in s.units.tolist())) for s in symmetries
    }


def united(size: int, pairs: Iterable[tuple[int, int]]) -> dict[int, set[int]]:
    """The set of each number after uniting those of all pairs."""
    own = {number: {number} for number in range(size)}
    for a, b in pairs:
        if own[a] is not own[b]:
            own[a] |= own[b]
            for number in own[b].copy():
                own[number] = own[a]
    return own


def flat(pairs) -> list[tuple[int, int]]:
    return [pair for first, second in pairs for pair in zip(first.tolist(), second.tolist(), strict=True)]


def reference(group_of, names, pinned, together, stars, shared=(), coarse=(), confined=(), lost=None) -> Described:
    """What ``propose`` says, node by node."""
    size, together = len(group_of), list(together)
    fixed = {node for node in range(size) if pinned[node]}
    gone = {node for node in range(size) if lost is not None and lost[node]}

    def in_order(nodes) -> tuple[int, ...]:
        return tuple(sorted(nodes, key=lambda node: (group_of[node], node)))

    def composition(nodes) -> tuple[int, ...]:
        return tuple(int(group_of[node]) for node in nodes)

    def partitions(pairs):
        heads = defaultdict(set)
        for head, channel in flat(pairs):
            heads[group_of[head], channel].add(head)
        overlapping = {group for (group, _), found in heads.items() if len(found) > 1}
        keep = [np.array([group_of[h] not in overlapping for h in head], dtype=bool) for head, _ in pairs]
        return [(h[k], c[k]) for (h, c), k in zip(pairs, keep, strict=True)]

    kept = partitions(stars)
    for (head, _), (still, _) in zip(stars, kept, strict=True):
        if len(still) < len(head):
            fixed |= set(head.tolist())
    star_of = defaultdict(set)
    for head, channel in flat(kept):
        star_of[channel].add(head)

    def sort(pairs):
        sorted_pairs = {"head": [], "channel": [], "none": []}
        for element, neuron in pairs:
            users = defaultdict(set)
            for e, n in flat([(element, neuron)]):
                users[e].add(frozenset(star_of[n]))
            found = set().union(*users.values())
            one_each = all(len(heads) == 1 for heads in users.values()) and len(found) == len(users) > 1
            kind = "none" if found <= {frozenset()} else "head" if one_each and frozenset() not in found else "channel"
            sorted_pairs[kind].append((element, neuron))
        return sorted_pairs

    streams = united(size, flat(together))

    def is_tie(pairs) -> bool:
        met = defaultdict(set)
        for one, many in flat([pairs]):
            met[one].add(many)
        as_one = all(len({id(streams[many]) for many in found}) == 1 for found in met.values())
        apart = all(len({group_of[many] for many in found}) == len(found) for found in met.values())
        return as_one or apart

    together += [pairs for pairs in coarse if is_tie(pairs)]
    by_share, by_gate = sort(shared), sort([pairs for pairs in coarse if not is_tie(pairs)])
    arms = flat([*kept, *by_share["head"], *by_gate["head"], *partitions(by_gate["none"])])
    centres_of = defaultdict(list)
    for centre, channel in arms:
        centres_of[channel].append(centre)
    same_head = united(size, [(found[0], other) for found in centres_of.values() for other in found])
    heads = {id(same_head[centre]): same_head[centre] for centre, _ in arms}
    head_of = {channel: id(same_head[found[0]]) for channel, found in centres_of.items()}
    channels_of = defaultdict(set)
    for channel, head in head_of.items():
        channels_of[head].add(channel)

    result = []
    classes = united(size, flat([*together, *by_share["channel"], *by_share["none"], *by_gate["channel"]]))
    families = defaultdict(lambda: defaultdict(set))
    for members in {id(found): found for found in classes.values()}.values():
        unit = in_order(members)
        if not fixed & members and not members & set().union(*heads.values()):
            inside = frozenset(head_of[node] for node in unit if node in head_of)
            sets = frozenset(i for i, part in enumerate(confined) if members & set(part.tolist()))
            families[composition(unit)][inside, sets].add(unit)
    for kinds, blocks in families.items():
        sizes = {len(units) for units in blocks.values() if len(units) > 1}
        others = len(set(kinds)) - 1
        for count in sizes:
            name = f"neurons of {names[kinds[0]]}" + f" and {others} more groups" * (others > 0)
            alike = frozenset(frozenset(units) for units in blocks.values() if len(units) == count)
            result.append((name + f" ({count})" * (len(sizes) > 1), alike))

    moving = united(size, flat(together))
    by_group = defaultdict(lambda: defaultdict(set))
    first_centre: dict[int, int] = {}
    for head, centres in heads.items():
        group = int(group_of[min(centres)])
        first_centre[group] = min(min(centres), first_centre.get(group, size))
        related = set().union(*(moving[channel] for channel in channels_of[head]))
        if not fixed & centres and not gone & (related | centres):
            parents = in_order(node for node in related if node not in head_of)
            unit = in_order(centres) + in_order(channels_of[head])
            by_group[group][parents].add(unit)

    def alike(blocks) -> list[frozenset]:
        """Blocks of disjoint units of one composition, put together if they are alike."""
        found = defaultdict(set)
        for units in blocks:
            disjoint = len(set().union(*units)) == sum(len(unit) for unit in units)
            if len(units) > 1 and disjoint and len({composition(unit) for unit in units}) == 1:
                found[len(units), composition(next(iter(units)))].add(frozenset(units))
        return [frozenset(blocks) for blocks in found.values()]

    whole, name_of = defaultdict(tuple), {}
    for group, sharing in sorted(by_group.items(), key=lambda item: first_centre[item[0]]):
        result += [(f"heads of {names[group]}", blocks) for blocks in alike(sharing.values())]
        if () not in sharing:
            for parents, units in sharing.items():
                # Units are put together in the order of their heads, which is that of their first nodes.
                whole[parents] += sum(sorted(units), ())
                name_of.setdefault(parents, f"key/value heads of {names[group]}")
    for name in set(name_of.values()):
        block = {parents + units for parents, units in whole.items() if name_of[parents] == name}
        result += [(name, blocks) for blocks in alike([block])]
    return set(result)


def proposals(build_it: Callable[[], NeuralGraph], monkeypatch) -> tuple[Any, ...]:
    """The arguments with which ``propose`` is called when a graph is built."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(build, "propose", lambda *arguments: caught.append(arguments) or [])
        build_it()
    return caught[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_proposals_are_those_of_the_reference(architecture, monkeypatch) -> None:
    """Same names, blocks and units; and with one node more pinned, or one star less, not the same as before."""
    model = architecture.model()
    arguments = proposals(lambda: NeuralGraph.from_model(model, architecture.inputs, verify=False), monkeypatch)
    expected = reference(*arguments)
    found = propose(*arguments)
    assert described(found) == expected and len(found) == len(expected) > 1
    group_of, names, pinned, *rest = arguments
    other = pinned.copy()
    other[found[0].units.flatten()[0]] = True
    assert described(propose(group_of, names, other, *rest)) == reference(group_of, names, other, *rest) != expected


def random_network(seed: int) -> tuple[Any, ...]:
    """Arguments of ``propose`` in which anything may overlap with anything."""
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 30))
    group_of = np.unique(np.sort(random.integers(0, random.integers(1, 7), size)), return_inverse=True)[1]

    def pairs(lists: int, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
        lengths = random.integers(0, longest, random.integers(0, lists))
        return [(random.integers(0, size, n), random.integers(0, size, n)) for n in lengths]

    names = [f"group {number}" for number in range(int(group_of.max()) + 1)]
    confined = [first for first, _ in pairs(3, 5)]
    return (
        group_of, names, random.random(size) < 0.1, pairs(3, 4), pairs(3, 8), pairs(3, 4), pairs(2, 4), confined,
        random.random(size) < 0.05,
    )  # fmt: skip


def test_proposals_are_those_of_the_reference_whatever_overlaps() -> None:
    """Random classes, heads, shared parameters and confining sets; most of them with something to permute."""
    several = 0
    for seed in range(400):
        arguments = random_network(seed)
        expected = reference(*arguments)
        assert described(propose(*arguments)) == expected, seed
        several += len(expected) > 1
    assert several > 50


def test_lists_are_numbered_alike_only_if_they_are_equal() -> None:
    """Also lists of different lengths that begin alike, and empty ones; ``take`` and ``of`` keep values in order."""
    random = np.random.default_rng(0)
    owner, values = random.integers(0, 200, 300), random.integers(0, 3, 300)
    stored = Lists.of(owner, values, 200)
    lists = [tuple(values[owner == number].tolist()) for number in range(200)]
    assert [tuple(stored[i].tolist()) for i in range(200)] == lists
    numbers = stored.numbered().tolist()
    assert len(set(zip(lists, numbers, strict=True))) == len(set(lists)) == len(set(numbers)) > 20
    some = random.permutation(200)[:50]
    assert [tuple(stored.take(some)[i].tolist()) for i in range(50)] == [lists[i] for i in some]
    assert in_order(np.array([7, 3, 7, 9, 3])).tolist() == [0, 1, 0, 2, 1]


def count_calls(function: Callable[[], Any]) -> int:
    """Python and C functions that are called."""
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_nothing_is_done_neuron_by_neuron(monkeypatch) -> None:
    """Eight times as many units, experts' and all, take (nearly) as many calls; the reference takes many more."""
    calls, slow = [], []
    for factor in (1, 8):
        sizes = TEXT | {"hidden_size": 32 * factor, "intermediate_size": 40 * factor, "num_key_value_heads": 2}
        config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        with torch.device("meta"):
            model = transformers.MixtralForCausalLM(config)
        arguments = proposals(lambda model=model: NeuralGraph.from_model(model, verify=False), monkeypatch)
        calls.append(count_calls(lambda arguments=arguments: propose(*arguments)))
        slow.append(count_calls(lambda arguments=arguments: reference(*arguments)))
    assert calls[1] < 1.2 * calls[0]
    assert slow[1] > 4 * slow[0]
