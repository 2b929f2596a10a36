"""The claims of both papers, and what came out here: one table, its numbers from results/.

A row is (claim, what the paper published, what came out here, the verdict).
"""

import json
import math
from pathlib import Path

import numpy as np

from lab.composing.compare import read_runs
from lab.composing.effects import BASE, describe_effect, group_runs, main_kind, paired_effect
from lab.tools.statistics import interval

RESULTS = Path(__file__).parents[2] / "results"
HEAD = (
    "| claim | published | here, with 95 % interval | verdict | command |\n|---|---|---|---|---|\n"
)
# What an effect on perplexity says about a claim that it is lower: after a declared test, or not.
DECLARED_VERDICTS = {"lower": "holds here", "higher": "the other way"}
VERDICTS = {"lower": "points that way", "higher": "points the other way"}
NULL = "oracle's null"
COMPOSING = "composing experts is what helps, not having two routers"
EQUAL_LOSS = "the same, where {} of a token's experts is lost in both"


def stored(name: str):
    """What a command wrote to results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def runs(*names: str) -> list[dict]:
    """The runs of some comparisons in results/."""
    lines = []
    for name in names:
        lines += read_runs(str(RESULTS / f"{name}.jsonl"))
    return lines


def claims() -> str:
    """The table, in markdown."""
    compared = group_runs(runs("compare"), 2500)
    second = group_runs(runs("second"), 2500)
    parts = {
        "eval.py remix": remixing_rows(stored("remix-skills-test")),
        "eval.py remix --ablate": setting_rows(stored("remix-skills-dev-ablation")),
        "lab.composing.compare": cartesian_rows(compared, second),
    }
    text = HEAD
    for command, rows in parts.items():
        for row in rows:
            text += f"| {' | '.join(row)} | `{command}` |\n"
    return text


# ---- C3PO


def gain(row: dict) -> str:
    """A gain in points, with its interval."""
    mean, low, high = (100 * row[key] for key in ("gain", "low", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


def p_value(p: float) -> str:
    """A p-value, as people write it."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def direction(low: float, high: float) -> str:
    """Which way an effect points that was not tested, by its interval."""
    if low > 0:
        return "points that way"
    return "points the other way" if high < 0 else "inconclusive here"


def declared(result: dict, rival: str) -> str:
    """The verdict of a test that was named beforehand: NGD against a rival, at p < 0.01."""
    rows = result["rows"]
    if result["p"][rival] >= 0.01:
        return "**inconclusive here**"
    ahead = rows["NGD"]["accuracy"] > rows[rival]["accuracy"]
    return "**holds here**" if ahead else "**the other way**"


def both_gain(*rows: dict) -> str:
    """The verdict on methods of which each is said to gain."""
    if all(row["low"] > 0 for row in rows):
        return "points that way"
    return "points the other way" if all(row["high"] < 0 for row in rows) else "no gain seen"


def ngd_minus(rows: dict, *rivals: str) -> tuple[str, str]:
    """NGD minus each rival, in points with Student's interval over seeds, and a verdict."""
    texts, verdicts = [], []
    for rival in rivals:
        mean, half = interval(np.subtract(rows["NGD"]["each"], rows[rival]["each"]))
        low, high = mean - half, mean + half
        texts.append(f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        verdicts.append(direction(low, high))
    same = len(set(verdicts)) == 1
    return "NGD minus it: " + " and ".join(texts), verdicts[0] if same else "; ".join(verdicts)


def remixing_rows(result: dict) -> list[tuple]:
    """C3PO's claims (arXiv 2504.07964) on the skills task.

    Published: OLMoE-1B-7B, means over six benchmarks. Effects are NGD minus the rival, in points.
    """
    rows = result["rows"]
    share = {name: f"{100 * row['accuracy']:.1f}" for name, row in rows.items()}
    gains = {name: gain(row) for name, row in rows.items()}
    p = {name: p_value(value) for name, value in result["p"].items()}
    ngd = share["NGD"]
    broken, fixed = (100 * rows["NGD"][key] for key in ("broken", "fixed"))
    return [
        (
            "C3PO: NGD beats the model as it is",
            "69.9 → 79.2",
            f"{share['base']} → {ngd}: {gains['NGD']}, {p['base']}",
            declared(result, "base"),
        ),
        (
            "so do mode finding and kernel regression",
            "72.4 and 76.9",
            f"{gains['mode finding']} and {gains['kernel regression']}",
            both_gain(rows["mode finding"], rows["kernel regression"]),
        ),
        (
            "NGD is the best of the three",
            "79.2 against 76.9",
            f"{ngd} against {share['kernel regression']}, {p['kernel regression']}",
            declared(result, "kernel regression"),
        ),
        ("it beats in-context learning", "73.7", *ngd_minus(rows, "in-context")),
        (
            "it beats prefix tuning and soft prompts (here fitted to each prompt)",
            "71.3 and 72.2",
            *ngd_minus(rows, "prefix for each", "soft prompt for each"),
        ),
        (
            "there is more to win (the oracle)",
            "85.2",
            f"{share['oracle']}: {gains['oracle']}; its null {share[NULL]}",
            direction(rows["oracle"]["low"], rows["oracle"]["high"]),
        ),
        (
            "few right answers are broken",
            "5.1 % (ARC-C)",
            f"{broken:.1f} % broken, {fixed:.1f} % of the wrong fixed",
            "much the same",
        ),
        (
            "it beats a dense model (3.5 times the activated parameters, 1.1 times all)",
            "1-3B against 7-9B",
            *ngd_minus(rows, "larger, dense"),
        ),
    ]


def setting_rows(sweeps: dict) -> list[tuple]:
    """What C3PO says of its settings, with one varied at a time, on dev."""

    def swept(setting: str, *values: str) -> str:
        return ", ".join(f"{value} {gain(sweeps[setting][value])}" for value in values)

    return [
        (
            "the last layers are the best choice",
            "last 5 of 16: 79.2, all: 77.7",
            "of 4: " + swept("critical layers", "all", "last:2", "last:1"),
            "points the other way",
        ),
        (
            "some core experts are as good as all",
            "20 of 64: the same",
            "of 16: " + swept("core experts", "6", "16"),
            "cannot be told here",
        ),
        (
            "ten steps are enough",
            "3: 74.2, 10: 79.2, 50: 79.2",
            swept("steps", "3", "10", "50"),
            "points that way",
        ),
        (
            "three neighbours are best",
            "1: 75.3, 3: 79.2, 5: 77.7",
            swept("neighbours", "1", "3", "5", "16"),
            "cannot be told here",
        ),
        (
            "the Gaussian kernel is best",
            "70.0, 76.3 and 79.2",
            swept("kernel", "linear", "matern", "gaussian"),
            "can show nothing: here they weigh three neighbours alike",
        ),
        (
            "the last token is the one to re-mix",
            "last 79.2, middle 71.4, first 74.5",
            swept("token", "last", "middle", "first", "all"),
            "points that way",
        ),
    ]


# ---- CartesianMoE

PAPER = "dense_paper"  # the paper's dense row: 162 million parameters, where its MoEs activate 247


def cartesian_rows(kinds: dict, second: dict) -> list[tuple]:
    """CartesianMoE's claims (arXiv 2410.16077) on TinyStories.

    Published: Pile, 100B tokens, base and large. second: the runs of the second declared test.
    """
    rows = [
        (
            "CartesianMoE: lower perplexity than fine-grained",
            "7.33 → 7.19: -1.9 %",
            *against(kinds, "cartesian", BASE, alpha=0.01),
        ),
        (
            "the same, at rates chosen after 2,500 steps",
            "-",
            *against(second, "cartesian", BASE, alpha=0.005),
        ),
    ]
    theirs = {"smoe_share": 7.37, "smoe_top3": 7.40, "hash": 7.47, "top_p": 7.41}
    for name, published in theirs.items():
        here = against(kinds, "cartesian", name)
        rows.append((f"and than {name}", f"{published:.2f} → 7.19", *here))
    for claim, published, ours, other in (
        (
            "a MoE beats dense of 0.66 (here 0.75) times its activated size",
            "8.55 → 7.33",
            BASE,
            PAPER,
        ),
        ("so does Cartesian", "8.55 → 7.19", "cartesian", PAPER),
        ("a MoE beats dense of its activated size", "-", BASE, "dense"),
        ("so does Cartesian", "-", "cartesian", "dense"),
        (COMPOSING, "-", "cartesian", "cartesian_parallel"),
        ("its shared expert helps", "6.15 → 6.08", "cartesian", "cartesian_no_shared"),
    ):
        rows.append((claim, published, *against(kinds, ours, other)))
    for claim, published, protocol in (
        ("first choices disabled: far less is lost", "3095 → 27.7", "top-1"),
        (EQUAL_LOSS.format("a quarter"), "-", "a quarter"),
        (EQUAL_LOSS.format("a half"), "-", "a half"),
    ):
        before, after = level(kinds, BASE, protocol), level(kinds, "cartesian", protocol)
        effect, verdict = against(kinds, "cartesian", BASE, protocol)
        rows.append((claim, published, f"{before} → {after}: {effect}", verdict))
    return rows


def preset_losses(kinds: dict, preset: str, protocol: str | None = None) -> dict[int, float]:
    """The test loss of each seed of a preset, or its loss under a protocol of robustness."""
    _, seeds = main_kind(kinds, preset)
    if protocol is None:
        return {seed: run["test"]["loss"] for seed, run in seeds.items()}
    return {seed: run["robustness"][protocol]["loss"] for seed, run in seeds.items()}


def against(kinds: dict, preset: str, other: str, protocol=None, alpha=None) -> tuple[str, str]:
    """The effect of a preset against another on perplexity, and what it says.

    alpha: the level of significance of a declared test; without one the verdict is exploratory.
    """
    ours = preset_losses(kinds, preset, protocol)
    theirs = preset_losses(kinds, other, protocol)
    effect = paired_effect(ours, theirs)
    if effect is None:
        return "not run", "not run"
    text, _, verdict = describe_effect(effect).partition(": ")
    text += f", {effect.n} seeds"
    if alpha is None:
        return text, VERDICTS.get(verdict, verdict)
    if effect.p >= alpha and verdict != "no difference":
        verdict = "cannot be told here"
    return f"{text}, p = {effect.p:.2g}", f"**{DECLARED_VERDICTS.get(verdict, verdict)}**"


def level(kinds: dict, preset: str, protocol: str) -> str:
    """A preset's mean perplexity under a protocol of robustness."""
    losses = preset_losses(kinds, preset, protocol).values()
    return f"{math.exp(sum(losses) / len(losses)):.1f}" if losses else "not run"
