"""From lists of neurons and elements to a few strided selections.

A parameter's axis, as traced, is a list of (group, position in the group, element offset).  :func:`segments` cuts it
into the fewest regular pieces: runs with constant steps, and rows of equal runs (one per head, say).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .structure import Nodes


@dataclass(frozen=True)
class Segment:
    """A regular piece of an axis: a selection of neurons and the element strides of its factors."""

    nodes: Nodes
    strides: tuple[int, ...]
    offset: int
    start: int
    """Where the piece begins in the traced axis; its length is ``len(nodes)``."""


def segments(
    group: np.ndarray,
    position: np.ndarray,
    element: np.ndarray,
    label: np.ndarray,
    distinct: bool = True,
) -> list[Segment]:
    """Cut an axis into regular pieces, ordered by where they begin.

    Args:
        group, position: where each neuron lies, int64 [n].
        element: offset of its elements in the flattened parameter, int64 [n].
        label: pieces never reach over a change of label (the role in attention), int64 [n].
        distinct: whether no neuron may occur twice in a piece.
    """
    order = np.arange(len(group))
    if distinct:
        # A neuron that two elements make (gate and up) is in two pieces: all first elements, then all second ones.
        round_ = _occurrence(group, position)
        # In the order of the neurons: how a model flattens its axes (channels before heads) is of no account.
        order = np.lexsort((position, group, label, round_))
        label = label * (int(round_.max(initial=0)) + 1) + round_
        group, position, element, label = group[order], position[order], element[order], label[order]
    waiting: dict[tuple[int, int, int, tuple[int, int]], list[int]] = {}
    for start, length, steps in _runs(group, position, element, label):
        waiting.setdefault((int(group[start]), int(label[start]), length, steps), []).append(start)
    pieces: list[Segment] = []
    for (number, _, length, steps), starts in waiting.items():
        least = (length - 1) * steps[0] + 1 if distinct else 0
        places = {(int(position[start]), int(element[start])): start for start in starts}
        while places:
            rows, moves = _rows(places, least)
            start = rows[0]
            sizes, node_strides, element_strides = (length,), (steps[0],), (steps[1],)
            if len(rows) > 1:
                sizes, node_strides, element_strides = (len(rows), length), (moves[0], steps[0]), (moves[1], steps[1])
            nodes = Nodes(number, sizes, node_strides, int(position[start]))
            pieces.append(Segment(nodes, element_strides, int(element[start]), int(order[start])))
            for row in rows:
                del places[int(position[row]), int(element[row])]
    return sorted(pieces, key=lambda piece: piece.start)


def _occurrence(group: np.ndarray, position: np.ndarray) -> np.ndarray:
    """How many times each neuron was in the axis before, int64 [n]."""
    order = np.lexsort((np.arange(len(group)), position, group))
    same = (np.diff(group[order], prepend=-1) == 0) & (np.diff(position[order], prepend=-1) == 0)
    index = np.arange(len(group))
    first = np.maximum.accumulate(np.where(same, 0, index))
    occurrence = np.empty_like(index)
    occurrence[order] = index - first
    return occurrence


Run = tuple[int, int, tuple[int, int]]
"""Start, length, and the steps of nodes and of elements."""


def _runs(group: np.ndarray, position: np.ndarray, element: np.ndarray, label: np.ndarray) -> list[Run]:
    """Maximal runs of constant steps that stay in one group and label and do not walk backwards."""
    total = len(group)
    node_step, element_step = np.diff(position), np.diff(element)
    cut = (np.diff(group) != 0) | (np.diff(label) != 0) | (node_step <= 0) | (element_step < 0)
    runs: list[Run] = []
    start = 0
    while start < total:
        if start + 1 == total or cut[start]:
            runs.append((start, 1, (1, 1)))
            start += 1
            continue
        steps = int(node_step[start]), int(element_step[start])
        regular = (node_step[start:] == steps[0]) & (element_step[start:] == steps[1]) & ~cut[start:]
        taken = len(regular) if regular.all() else int(np.argmin(regular))
        runs.append((start, taken + 1, steps))
        start += taken + 1
    return runs


# How many of the following runs are tried as the second row of a selection.
_LOOK_AHEAD = 4


def _rows(places: dict[tuple[int, int], int], least: int) -> tuple[list[int], tuple[int, int]]:
    """Starts of the longest row of equal runs that begins with the first one, and the steps from row to row.

    Args:
        places: (position in the group, element offset) of each run -> where it starts, in order.
        least: smallest step in the group, so that no neuron is in two rows.
    """
    keys = list(itertools.islice(places, _LOOK_AHEAD + 1))
    best, best_move = [places[keys[0]]], (0, 0)
    for other in keys[1:]:
        move = (other[0] - keys[0][0], other[1] - keys[0][1])
        if move[0] < least or move[1] < 0:
            continue
        rows, at = [], keys[0]
        while at in places:
            rows.append(places[at])
            at = (at[0] + move[0], at[1] + move[1])
            if move == (0, 0):
                break
        if len(rows) > len(best):
            best, best_move = rows, move
    return best, best_move
