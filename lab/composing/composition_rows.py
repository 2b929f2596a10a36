"""The rows of the experiment on compositions, and what their runs say.

A row is a preset with some settings changed, and several seeds. Here `lines` are the lines of the
results file: what composition.py keeps of a run.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.composing.figures import composition_figure
from lab.tools import cli, statistics

DECLARED = """Declared before its runs: cartesian answers more of the unseen pairs than
fine_grained, each with its best settings on dev seeds; 8 new seeds, paired t-test, two-sided,
p < 0.01."""

# Learning rate and weight decay of both kinds: the same tries, on dev seeds, after 2,500 steps.
RATES, DECAYS = (3e-3, 1e-2, 2e-2), (1.0, 2.0, 4.0)
TRIES = [{"lr": lr, "weight_decay": decay} for lr in RATES for decay in DECAYS]
# The best is at the edge of these tries for both kinds; the edge has not been extended yet.
TUNED = {
    "cartesian": {"lr": 3e-3, "weight_decay": 4.0},
    "fine_grained": {"lr": 3e-3, "weight_decay": 4.0},
}
MAIN = ("cartesian", "fine_grained")
# Whose settings the others take.
LIKE = {
    "cartesian_parallel": "cartesian",
    "cartesian_chain": "cartesian",
    "cartesian_pairs": "cartesian",
    "dense_two": "cartesian",
    "dense": "fine_grained",
    "smoe_share": "fine_grained",
}
WITH_TWO_ROUTERS = ("cartesian", "cartesian_parallel")
# What is changed to see where it fails, in both kinds.
REGIMES = [
    {"weight_decay": 0.1},
    {"trained": 0.4},
    {"trained": 0.55},
    {"trained": 0.85},
    {"n_functions": 32},
    {"steps": 5000},
    {"n_layers": 2},
    {"n_in_a_row": 3, "trained": 0.3},
    {"n_in_a_row": 3, "trained": 0.3, "n_layers": 2},
]
DEV_SEEDS = range(100, 103)
TEST_SEEDS = range(200, 208)
FEW_SEEDS = range(200, 204)


class Row(NamedTuple):
    """Runs that differ in their seed alone."""

    group: str
    preset: str
    changes: dict  # settings of train_toy.py

    @property
    def name(self) -> str:
        """Such as "cartesian, n_layers 2"."""
        marks = [f"{name} {value:g}" for name, value in self.changes.items()]
        return ", ".join([self.preset, *marks])


def planned_rows() -> dict[str, list[tuple[Row, range]]]:
    """Every row of each group, and its seeds."""
    tries = itertools.product(MAIN, TRIES)
    regimes = itertools.product(REGIMES, MAIN)
    return {
        "tries": [(Row("tries", preset, changes), DEV_SEEDS) for preset, changes in tries],
        "test": [(Row("test", preset, {}), TEST_SEEDS) for preset in MAIN],
        "controls": [(Row("controls", preset, {}), FEW_SEEDS) for preset in LIKE],
        "regimes": [(Row("regimes", preset, changes), FEW_SEEDS) for changes, preset in regimes],
    }


# ---- what they say


def lines_of(lines: list[dict], row: Row) -> list[dict]:
    """The runs of a row."""
    wanted = row._asdict()
    return [line for line in lines if all(line[name] == wanted[name] for name in wanted)]


def unseen(lines: list[dict], row: Row) -> dict[int, float]:
    """The share of unseen pairs, of the test split, that each seed of a row answers right."""
    return {line["seed"]: line["test"]["accuracy"] for line in lines_of(lines, row)}


def table(lines: list[dict]) -> str:
    """Every group of the results file as a table, and what the declared test says."""
    blocks = []
    for group, rows in planned_rows().items():
        body = [table_row(lines, row) for row, _ in rows if unseen(lines, row)]
        if body:
            header = [
                group,
                "seeds",
                "parameters",
                "activated",
                "trained",
                "single",
                "unseen pairs",
            ]
            header += ["cartesian minus fine_grained"]
            blocks.append(cli.table(body, header=header))
    ours, theirs = (unseen(lines, Row("test", preset, {})) for preset in MAIN)
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) > 1:
        p = statistics.paired([ours[s] for s in seeds], [theirs[s] for s in seeds])
        blocks.append(f"{DECLARED}\n  {difference(ours, theirs)}, p = {p:.2g}, {len(seeds)} seeds")
    return "\n\n".join(blocks)


def table_row(lines: list[dict], row: Row) -> list[str]:
    """A row's name, its seeds and sizes, and its scores on the test split."""
    shares = unseen(lines, row)
    own = lines_of(lines, row)
    test = [line["test"] for line in own]
    trained, single = (np.mean([t[k] for t in test]) for k in ("trained_pairs", "single_steps"))
    gap = ""
    if row.preset == "cartesian":
        gap = difference(shares, unseen(lines, row._replace(preset="fine_grained")))
    sizes = [f"{own[0]['total']:,}", f"{own[0]['activated']:,}"]
    answered = statistics.mean_interval(list(shares.values()))
    answered = {name: np.clip(value, 0, 1) for name, value in answered.items()}
    answered = statistics.with_interval(answered)
    scores = [f"{trained:.1%}", f"{single:.1%}", answered]
    return [row.name, str(len(own)), *sizes, *scores, gap]


def difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """The mean difference in points over common seeds, with its 95 % interval."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return ""
    mean, half = statistics.interval([100 * (ours[seed] - theirs[seed]) for seed in seeds])
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}) points"


def draw_figure(lines: list[dict], path: Path):
    """Unseen pairs over the steps and at the end, and which router looks at which function."""
    curves, shares, told = {}, {}, {}
    for group in ("test", "controls"):
        for row, _ in planned_rows().get(group, []):
            own = lines_of(lines, row)
            if not own:
                continue
            shares[row.name] = [line["test"]["accuracy"] for line in own]
            if row.preset in MAIN:
                steps = [step for step, _ in own[0]["curve"]]
                seeds = [[share for _, share in line["curve"]] for line in own]
                curves[row.name] = np.array(steps), np.array(seeds)
            if row.preset in WITH_TWO_ROUTERS:
                told[row.name] = {
                    place: np.mean([line["information"][place] for line in own], axis=0)
                    for place in own[0]["information"]
                }
    composition_figure(curves, shares, told, path)
