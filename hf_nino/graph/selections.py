"""From lists of neurons and elements to a few strided selections.

A parameter's axis, as traced, is a list of (group, position in the group, element offset).  :func:`segments` cuts it
into the fewest regular pieces: runs with constant steps, and rows of equal runs (one per head, say).
"""

from __future__ import annotations

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
    group: np.ndarray, position: np.ndarray, element: np.ndarray, label: np.ndarray, distinct: bool = True
) -> list[Segment]:
    """Cut an axis into regular pieces, ordered by where they begin.

    Args:
        group, position: where each neuron lies, int64 [n].
        element: offset of its elements in the flattened parameter, int64 [n].
        label: pieces never reach over a change of label (the role in attention), int64 [n].
        distinct: whether no neuron may occur twice in a piece.
    """
    waiting: dict[tuple[int, int, int, tuple[int, int]], list[int]] = {}
    for start, length, steps in _runs(group, position, element, label):
        waiting.setdefault((int(group[start]), int(label[start]), length, steps), []).append(start)
    pieces: list[Segment] = []
    for (number, _, length, steps), starts in waiting.items():
        least = (length - 1) * steps[0] + 1 if distinct else 0
        remaining = starts
        while remaining:
            rows, moves = _equal_rows(remaining, position, element, least)
            start, remaining = remaining[0], remaining[rows:]
            sizes, node_strides, element_strides = (length,), (steps[0],), (steps[1],)
            if rows > 1:
                sizes, node_strides, element_strides = (rows, length), (moves[0], steps[0]), (moves[1], steps[1])
            nodes = Nodes(number, sizes, node_strides, int(position[start]))
            pieces.append(Segment(nodes, element_strides, int(element[start]), start))
    return sorted(pieces, key=lambda piece: piece.start)


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


def _equal_rows(
    starts: list[int], position: np.ndarray, element: np.ndarray, least: int
) -> tuple[int, tuple[int, int]]:
    """How many of the first runs are rows of one two-factor selection, and the steps from row to row."""
    rows, moves = 1, (0, 0)
    while rows < len(starts):
        here, previous = starts[rows], starts[rows - 1]
        move = (int(position[here] - position[previous]), int(element[here] - element[previous]))
        if move[0] < least or move[1] < 0 or (rows > 1 and move != moves):
            break
        moves = move
        rows += 1
    return rows, moves
