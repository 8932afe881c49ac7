"""The path of the parameters, flat: two directions in which it goes farthest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .facts import Place


@dataclass(frozen=True)
class Flat:
    """A path in the plane.

    Attributes:
        places: what was given, in order.
        points: (x, y) of each, in the units of the projection: distances are about those between the parameters.
        shares: of the spread that the two directions hold, 0 to 1.
    """

    places: tuple[Place, ...]
    points: tuple[tuple[float, float], ...]
    shares: tuple[float, float]


def flatten(places: Sequence[Place]) -> Flat | None:
    """The two principal components of the places; ``None`` of fewer than 3, or of ones that never moved.

    The first direction points from the beginning to the end, the second so that the farthest place is above.
    """
    if len(places) < 3:
        return None
    matrix = np.array([place.point for place in places], dtype=np.float64)
    matrix -= matrix.mean(axis=0)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    if not values[0] > 0:
        return None
    points = np.zeros((len(places), 2))
    width = min(2, len(values))
    points[:, :width] = left[:, :width] * values[:width]
    if points[-1, 0] < points[0, 0]:
        points[:, 0] *= -1
    if points[np.argmax(np.abs(points[:, 1])), 1] < 0:
        points[:, 1] *= -1
    power = values**2 / (values**2).sum()
    shares = (float(power[0]), float(power[1]) if len(power) > 1 else 0.0)
    return Flat(tuple(places), tuple(map(tuple, points.tolist())), shares)
