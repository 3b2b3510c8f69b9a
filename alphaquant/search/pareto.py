"""Pareto fronts: which points no other point beats.

All coordinates are minimized. A point is dominated if another one is nowhere larger and somewhere
smaller; of equal points the first counts. Letters: N points, D coordinates.
"""

import numpy as np
import numpy.typing as npt

from alphaquant.errors import ConfigError
from alphaquant.search.arrays import BoolArray, FloatArray


def nondominated(points: npt.ArrayLike) -> BoolArray:
    """Mark the exact front.

    Worked example: (1, 5) (2, 3) (2, 4) (3, 3) (2, 3) -> True True False False False.

    Args:
        points: [N, D], D >= 1; infinities are allowed.

    Returns:
        bool [N].

    Raises:
        ConfigError: a coordinate is NaN, or `points` is not [N, D].
    """
    table = np.asarray(points, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0 or np.isnan(table).any():
        raise ConfigError(
            f"points of shape {list(table.shape)} with {int(np.isnan(table).sum())} NaN; "
            "give [N, D] numbers, one row per scored assignment"
        )
    return _nondominated_pairs(table) if table.shape[1] == 2 else nondominated_reference(table)


def nondominated_reference(points: FloatArray) -> BoolArray:
    """The definition, point by point in O(N^2 D); also the fast version's oracle.

    Args:
        points: float64 [N, D] without NaN.

    Returns:
        bool [N].
    """
    keep = np.ones(len(points), dtype=np.bool_)
    for n, point in enumerate(points):
        is_no_larger = (points <= point).all(axis=1)
        is_smaller = (points < point).any(axis=1)
        is_earlier = np.arange(len(points)) < n
        keep[n] = not (is_no_larger & (is_smaller | is_earlier)).any()
    return keep


def _nondominated_pairs(points: FloatArray) -> BoolArray:
    """O(N log N): in order of the first coordinate, a point of the front lowers the second."""
    keep = np.zeros(len(points), dtype=np.bool_)
    order = np.lexsort((points[:, 1], points[:, 0]))  # stable: of equal points the first leads
    seconds = points[order, 1]
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], seconds[:-1]]))
    keep[order] = seconds < least_before
    keep[order[:1]] = True
    return keep
