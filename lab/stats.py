"""Means, shares, and their intervals."""

import numpy as np
from scipy import stats


def interval(values, level: float = 0.95):
    """Mean of n independent values and half the width of its confidence interval (Student's t, n - 1 degrees).

    >>> "{:.2f} +- {:.2f}".format(*interval([1.0, 2.0, 3.0]))
    '2.00 +- 2.48'
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, found {len(values)}")
    spread = values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), stats.t.ppf(0.5 + level / 2, len(values) - 1) * spread


def share_interval(right: int, n: int, level: float = 0.95):
    """The confidence interval of a share, `right` of n independent trials (Wilson's): (low, high)."""
    low, high = stats.binomtest(right, n).proportion_ci(level, method="wilson")
    return low, high


def bootstrap(values, clusters, level: float = 0.95, draws: int = 2000):
    """The interval (low, high) of the mean over seeds of the mean within a seed: seeds are drawn with replacement, and
    within each of them its clusters, such as cues. values, clusters: for each seed an array (n,), and labels (n,)."""
    clusters = [np.unique(label, return_inverse=True)[1] for label in clusters]
    sums = [np.bincount(label, value) for value, label in zip(values, clusters, strict=True)]  # (C,) for each seed
    counts = [np.bincount(label) for label in clusters]
    rng, S, means = np.random.default_rng(0), len(sums), np.zeros(draws)
    for pick in rng.integers(S, size=(S, draws)):
        for s in range(S):
            C, mine = len(sums[s]), pick == s
            weight = rng.multinomial(C, np.full(C, 1 / C), size=int(mine.sum()))  # (draws, C) how often each is drawn
            means[mine] += (weight @ sums[s]) / (weight @ counts[s]) / S
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return low, high


def paired(a, b) -> float:
    """The two-sided p-value of a paired t-test: a and b, a value each for every seed, differ in their mean."""
    return float(stats.ttest_rel(a, b).pvalue)
