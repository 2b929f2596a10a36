"""Means, shares, and their intervals."""

import math
from statistics import NormalDist

import numpy as np

LEVEL = 0.95  # of all intervals


def interval(values):
    """Mean of n independent values, and half the width of its confidence interval.

    The interval is Student's t with n - 1 degrees of freedom. ValueError for fewer than 2 values.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> print(f"{mean:.2f} +- {half:.2f}")
    2.00 +- 2.48
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, found {n}")
    error = values.std(ddof=1) / n**0.5  # standard error of the mean
    t = scipy_stats().t.ppf(0.5 + LEVEL / 2, n - 1)
    return values.mean(), t * error


def mean_interval(values) -> dict:
    """The mean of independent values with its 95 % interval; of fewer than three the values alone:
    two numbers make no interval."""
    result = {"mean": float(np.mean(values)), "each": [float(value) for value in values]}
    if len(values) > 2:
        mean, half = interval(values)
        result |= {"low": float(mean - half), "high": float(mean + half)}
    return result


def with_interval(share: dict) -> str:
    """A share of `mean_interval`, in percent, as text."""
    text = f"{share['mean']:.1%}"
    if "low" in share:
        text += f" ({share['low']:.1%} to {share['high']:.1%})"
    return text


def in_points(mean: float, low: float, high: float) -> str:
    """A difference of shares and its interval, in points of a hundred, as text.

    >>> in_points(0.006, -0.009, 0.021)
    '+0.6 (-0.9 to +2.1)'
    """
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def paired(a, b) -> float:
    """The p-value (two-sided) of a paired t-test: do a and b, a value for each seed, differ?

    Where they are the same for every seed it is 1, and 0 where they always differ by the same.
    """
    differences = np.subtract(a, b)
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(scipy_stats().ttest_rel(a, b).pvalue)


def welch(a, b) -> tuple[float, float, float]:
    """mean(a) - mean(b) of independent values, half the width of its confidence interval, and the
    p-value (two-sided), by Welch's t-test: without pairs, and for unequal variances."""
    test = scipy_stats().ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return float(low + high) / 2, float(high - low) / 2, float(test.pvalue)


def share_interval(right: int, n: int):
    """Wilson's confidence interval (low, high) of a share: `right` of n independent trials.

    >>> low, high = share_interval(8, 10)
    >>> print(f"{low:.2f} to {high:.2f}")
    0.49 to 0.94
    """
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low = middle - half if right > 0 else 0.0
    high = middle + half if right < n else 1.0
    return low, high


def bootstrap(values, clusters):
    """The interval (low, high) of a mean over seeds of the mean within a seed.

    Seeds are drawn with replacement, and within each of them its clusters, such as cues.
    values, clusters: for each seed an array (n,) of values and one (n,) of labels.
    """
    # The sum and the size of each cluster are all that its draws need.
    sums, sizes = [], []
    for value, label in zip(values, clusters, strict=True):
        number = np.unique(label, return_inverse=True)[1]  # (n,) clusters counted from 0
        sums.append(np.bincount(number, value))  # (C,)
        sizes.append(np.bincount(number))  # (C,)

    # Draw the seeds, and how often each of their clusters counts.
    rng = np.random.default_rng(0)
    draws = 2000
    S = len(sums)
    means = np.zeros(draws)
    for picked in rng.integers(S, size=(S, draws)):  # (draws,) the seed that is drawn
        for seed in range(S):
            mine = picked == seed
            C = len(sums[seed])
            # How often each cluster is drawn: (draws of this seed, C).
            times = rng.multinomial(C, np.full(C, 1 / C), size=int(mine.sum()))
            means[mine] += (times @ sums[seed]) / (times @ sizes[seed]) / S
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return low, high


def scipy_stats():
    """The module scipy.stats. ValueError, with how to install it, where it is missing."""
    try:
        from scipy import stats
    except ImportError:
        hint = 'pip install -e ".[lab]"'
        raise ValueError(f"intervals and tests over seeds need scipy: {hint}") from None
    return stats
