"""Means, shares, and their intervals."""

import numpy as np
from scipy import stats


def interval(values, level: float = 0.95):
    """Mean of n independent values and half the width of its confidence interval (Student's t, n - 1 degrees)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, found {len(values)}")
    spread = values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), stats.t.ppf(0.5 + level / 2, len(values) - 1) * spread


def share_interval(right: int, n: int, level: float = 0.95):
    """The confidence interval of a share, `right` of n independent trials (Wilson's): (low, high)."""
    low, high = stats.binomtest(right, n).proportion_ci(level, method="wilson")
    return low, high
