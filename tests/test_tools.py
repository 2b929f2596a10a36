"""Command lines and small tools: intervals, packages that are missing, flags."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from by_hand import full, refused
from scipy import stats

import eval as eval_py
import train_toy
from lab.tools import cli, statistics
from lab.tools.settings import TrainConfig, commands_left
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


NEW_PAGES = """
import resource
from lab.tools import cli

if {kept}:
    cli.keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * 2**24 for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a property of glibc")
def test_freed_memory_is_kept():
    """What comes and goes in every step, here 64 MB, takes the same pages again."""
    n_pages = []
    for kept in (False, True):
        code = NEW_PAGES.format(kept=kept)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        n_pages.append(int(done.stdout))
    assert n_pages[0] > 8000 > 80 > n_pages[1]


def test_flags_of_every_type():
    """Tuples, numbers that may be none, and switches."""
    parser = cli.Parser("tool")
    cli.add_flags(parser, MoEConfig)
    assert parser.parse(["--dense-layers", "0,2", "--n-kv-heads", "none", "--no-tied"]) == {
        "dense_layers": (0, 2),
        "n_kv_heads": None,
        "tied": False,
    }


def test_commands_are_for_a_shell():
    """What is printed can be pasted, whatever a folder is called."""
    words = ["python", "train_toy.py", "--resume", "it's my run; $HOME"]
    assert shlex.split(cli.command(*words)) == words
    train = TrainConfig(seed=4, seeds=3, twin=True)
    left = commands_left(["--out", "my run"], train, 5, "moe")
    flags = [shlex.split(line)[4:] for line in left]
    assert flags == [
        ["--no-twin", "--model", "dense", "--seed", "5", "--seeds", "1"],
        ["--seed", "6", "--seeds", "1"],
    ]


MISTAKES = {  # command line -> exit code, what is said
    "train_toy --d-model 30": (2, "d_model 30 does not divide into 4 heads: try 32"),
    "train_toy --data skils": (2, "unknown value 'skils'; did you mean skills? (there are: skills"),
    "train_toy --steps 0": (2, "steps is 0; it must be at least 1"),
    "train_toy --top-k 20": (2, "top_k 20 is more than the 16 experts"),
    "train_toy --top-k 1 --norm-topk": (2, "the router gets no gradient; use"),
    "train_toy --preset cartesian --twin": (2, "a preset has no dense twin"),
    "train_toy --preset smoe_top3 --d-model 16": (2, "fine_grained at n_experts 15, d_expert 64"),
    "train_toy --data text": (2, "needs --data-file"),
    "train_toy --valid-file x": (2, "--valid-file does nothing with --data skills, but with text"),
    "train_toy --data tinystories --trained 1": (2, "does nothing with --data tinystories"),
    "train_toy --router nowhere:Mine": (1, "nowhere cannot be imported"),
    "eval": (2, "expected a command (there are: perplexity, routing, sample"),
    "eval remix --methods NDG": (2, "unknown method 'NDG'; did you mean NGD?"),
    "eval perplexity": (1, "no run in out/: train one with python train_toy.py"),
    "eval perplexity nowhere": (1, "nowhere holds no run"),
}
for flag in ("batch", "d-model", "n-layers", "n-experts", "d-expert", "d-shared"):
    MISTAKES[f"train_toy --{flag} {2**33}"] = (1, "need at least")  # before anything is made
for flag in ("resume", "out", "data-file", "router"):
    MISTAKES[f"train_toy --{flag}="] = (2, "is empty; leave it out")  # it starts no other run
NUMBERS = ["threads=0", "threads=99999999999", "tokens=0", "temperature=nan", "temperature=-1.0"]
for number in [*NUMBERS, "seed=-1", f"seed={2**64}"]:  # before anything is opened
    told = "--{} is {}; expected a number from".format(*number.split("="))
    MISTAKES[f"eval sample --{number}"] = (2, told)


@pytest.mark.parametrize("line", [*list(MISTAKES)[:1], *full(*list(MISTAKES)[1:])])
def test_wrong_usage(line, call, complaint):
    """A mistake is told in one line, and makes no file; exit code 2 for usage, 1 for failure."""
    code, message = MISTAKES[line]
    name, _, flags = line.partition(" ")
    assert call({"train_toy": train_toy, "eval": eval_py}[name], flags) == code
    assert message in complaint() and not Path("out").exists()
