"""Small tools: intervals, packages that are missing, flags."""

import sys

import numpy as np
import pytest
from by_hand import refused
from scipy import stats

from lab.tools import cli, statistics
from moe import MoEConfig


def test_share_interval_is_wilsons():
    """The formula of the share's interval agrees with scipy's."""
    for right in (0, 3, 20):
        expected = stats.binomtest(right, 20).proportion_ci(method="wilson")
        assert statistics.share_interval(right, 20) == pytest.approx((expected.low, expected.high))


def test_bootstrap():
    """Without spread the interval is a point. Clusters count and not samples, seeds as one each."""
    clusters = [np.repeat(np.arange(25), 4)] * 3
    rng = np.random.default_rng(0)
    assert statistics.bootstrap([np.full(100, 0.25)] * 3, clusters) == (0.25, 0.25)
    values = [np.repeat(rng.normal(size=25), 4) for _ in clusters]
    low, high = statistics.bootstrap(values, clusters)
    near, far = statistics.bootstrap(values, [np.arange(100)] * 3)  # were copies samples
    assert high - low > 1.2 * (far - near)
    values = [np.full(4, 1.0), np.full(8, 3.0)]
    assert statistics.bootstrap(values, [[0, 0, 1, 1], range(8)]) == (1, 3)  # one seed twice


def test_without_scipy(monkeypatch):
    """Without scipy, one line says how to install it; the main job's bootstrap does not need it."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    with refused('need scipy: pip install -e ".[lab]"'):
        statistics.interval([1.0, 2.0])
    low, high = statistics.bootstrap([np.arange(9.0)], [range(9)])
    assert low < high


def test_wrong_flags_get_a_hint():
    """An unknown flag is answered with the nearest that there is, in a group or not."""
    parser = cli.Parser("tool")
    cli.add_flags(parser, MoEConfig)
    with refused("unknown flag --topk; did you mean --top-k?", error=cli.Usage):
        parser.parse(["--topk", "3"])
    assert parser.parse(["--dense-layers", "0,2", "--n-kv-heads", "none", "--no-tied"]) == {
        "dense_layers": (0, 2),
        "n_kv_heads": None,
        "tied": False,
    }
