"""Effects: how much one preset's perplexity differs from another's, over seeds.

Runs that differ in their seed alone are a *kind*, such as "cartesian lr 0.003". Here `kinds` are
{name of a kind: {seed: run}}, where a run is a line of the results file (see compare.py).
"""

import math
from typing import NamedTuple

import numpy as np

from lab.composing.presets import PRESETS
from lab.tools import statistics

BASE = "fine_grained"
MARKS = {  # settings in which runs may differ -> how the names of kinds tell them
    "lr": "lr {:g}",
    "norm_topk": "norm",
    "dropout": "dropout {:g}",
    "embedding_scale": "scale {:g}",
    "residual_init": "init {:g}",
}
MARGIN = 0.5  # percent of perplexity: an interval inside of +-0.5 is NO_DIFFERENCE
NO_DIFFERENCE = "no difference"


def group_runs(lines: list[dict], steps: int) -> dict[str, dict[int, dict]]:
    """The runs of so many steps as kinds, in the order of PRESETS.

    A kind is named by its preset, and by those of its settings in which these runs differ.
    """
    presets = list(PRESETS)
    lines = [line for line in lines if line["steps"] == steps]
    differ = {field for field in MARKS if len({line[field] for line in lines}) > 1}

    def order(line):
        return [presets.index(line["preset"]), *(line[field] for field in MARKS)]

    kinds = {}
    for line in sorted(lines, key=order):
        name = " ".join([line["preset"], *marks_of(line, differ)])
        kinds.setdefault(name, {})[line["seed"]] = line
    return kinds


def settings_in_common(lines: list[dict], steps: int) -> str:
    """What is not in the names of the kinds, since all these runs have it; empty if nothing is."""
    lines = [line for line in lines if line["steps"] == steps]
    shared = {field for field in MARKS if len({line[field] for line in lines}) == 1}
    return ", ".join(marks_of(lines[0], shared)) if lines else ""


def marks_of(line: dict, fields: set[str]) -> list[str]:
    """What names say of some of a run's settings: nothing where one is zero, or off."""
    chosen = [field for field in MARKS if field in fields and line[field]]
    return [MARKS[field].format(line[field]) for field in chosen]


def first_run(runs: dict[int, dict]) -> dict:
    """A run of a kind, for what its runs have in common."""
    return next(iter(runs.values()))


def main_kind(kinds: dict, preset: str, dropout: float = 0.0) -> tuple[str, dict]:
    """The kind of a preset that has most seeds, then the best dev loss -> (name, runs).

    ("none", {}) where there is none.
    """

    def merit(kind):
        _, runs = kind
        dev = np.mean([run["dev"]["loss"] for run in runs.values()])
        return len(runs), -dev

    suitable = []
    for name, runs in kinds.items():
        run = first_run(runs)
        if run["preset"] == preset and run["dropout"] == dropout:
            suitable.append((name, runs))
    return max(suitable, key=merit, default=("none", {}))


# ---- effects


class Effect(NamedTuple):
    """How much higher one perplexity is than another, in percent."""

    middle: float
    low: float  # the ends of its 95 % interval; high is infinite where runs are too few for one
    high: float
    p: float  # of its t-test, two-sided
    each: list[float]  # the effect of each pair or run
    runs: str  # how many, in words


FEWEST_RUNS = 3  # so many pairs or runs have an interval: two runs are two numbers


def paired_effect(ours: dict[int, float], theirs: dict[int, float]) -> Effect | None:
    """The effect of one kind against another, from a loss for each seed; None without pairs.

    For declared tests, and for what runs of one seed have in common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    a = [ours[seed] for seed in seeds]
    b = [theirs[seed] for seed in seeds]
    gaps = np.subtract(a, b)
    words = "one pair" if len(seeds) == 1 else f"{len(seeds)} pairs"
    if len(seeds) < FEWEST_RUNS:
        return in_percent(np.mean(gaps), math.inf, 1.0, gaps, words)
    mean, half = statistics.interval(gaps)
    return in_percent(mean, half, statistics.paired(a, b), gaps, words)


def unpaired_effect(ours: dict[int, float], theirs: dict[int, float]) -> Effect | None:
    """The same by Welch's t-test, from all runs of either kind; None where one has none.

    For test losses of presets: those of one seed are no more alike than others.
    """
    if not ours or not theirs:
        return None
    a, b = list(ours.values()), list(theirs.values())
    gaps = np.array(a) - np.mean(b)
    words = f"{len(a)} and {len(b)} runs"
    if min(len(a), len(b)) < FEWEST_RUNS:
        return in_percent(np.mean(gaps), math.inf, 1.0, gaps, words)
    mean, half, p = statistics.welch(a, b)
    return in_percent(mean, half, p, gaps, words)


def in_percent(mean: float, half: float, p: float, gaps, words: str) -> Effect:
    """An effect from a difference of losses and half the width of its interval, in nats."""
    each = [percent(gap) for gap in gaps]
    return Effect(percent(mean), percent(mean - half), percent(mean + half), p, each, words)


def percent(nats: float) -> float:
    """A difference of losses as one of perplexities, in percent."""
    return 100 * math.expm1(nats)


def describe_effect(effect: Effect | None) -> str:
    """An effect, its interval, and what that allows to say; empty where there is none."""
    if effect is None:
        return ""
    if math.isinf(effect.high):
        return " and ".join(f"{each:+.2f} %" for each in effect.each) + f", {effect.runs}"
    inside = effect.low > -MARGIN and effect.high < MARGIN
    if effect.low > 0:
        verdict = "higher"
    elif effect.high < 0:
        verdict = "lower"
    elif inside:
        verdict = NO_DIFFERENCE
    else:
        verdict = "inconclusive"
    if inside and verdict != NO_DIFFERENCE:
        verdict += ", inside the margin"
    return f"{effect.middle:+.2f} % ({effect.low:+.2f} to {effect.high:+.2f}): {verdict}"


def test_losses(runs: dict[int, dict]) -> dict[int, float]:
    """The test loss of each seed of a kind."""
    return {seed: run["test"]["loss"] for seed, run in runs.items()}


def effects_against_base(kinds: dict) -> dict[str, Effect | None]:
    """The effect of each kind against BASE with the same dropout."""
    effects = {}
    for name, runs in kinds.items():
        base_name, base = main_kind(kinds, BASE, first_run(runs)["dropout"])
        effects[name] = None
        if name != base_name:
            effects[name] = unpaired_effect(test_losses(runs), test_losses(base))
    return effects


def effects_by_steps(lines: list[dict], at_the_end=paired_effect) -> dict[str, Effect | None]:
    """Cartesian against BASE after each number of steps, and on dev on the way there."""
    effects = {}
    for steps in sorted({line["steps"] for line in lines}):
        kinds = group_runs(lines, steps)
        name, ours = main_kind(kinds, "cartesian")
        base_name, theirs = main_kind(kinds, BASE)

        # On the way there: without the untrained model and the end.
        curve = first_run(ours).get("curve", []) if ours and theirs else []
        for place in range(1, len(curve) - 1):
            a = {seed: run["curve"][place][1] for seed, run in ours.items()}
            b = {seed: run["curve"][place][1] for seed, run in theirs.items()}
            effects[f"step {curve[place][0]} of {steps} (dev)"] = unpaired_effect(a, b)

        # At the end.
        effect = at_the_end(test_losses(ours), test_losses(theirs))
        effects[f"{steps} steps, {name} against {base_name}"] = effect
    return effects
