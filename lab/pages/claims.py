"""The claims of both papers, and what came out here: one table, its numbers from results/.

A row is (claim, what the paper published, what came out here, the verdict).
"""

import numpy as np

from data import perplexity
from lab.composing.effects import (
    BASE,
    describe_effect,
    group_runs,
    main_kind,
    paired_effect,
    unpaired_effect,
)
from lab.pages.declared import UNTOLD, cartesian_test, p_value, remixing_tests, test_losses
from lab.pages.stored import stored_result, stored_runs
from lab.remixing.reach import RIGHT, WRONG
from lab.tools.statistics import interval

CLAIMS_HEAD = (
    "| claim | published | here, with 95 % interval | verdict | command |\n|---|---|---|---|---|\n"
)
# What an effect says that was not declared: on perplexity about a claim that it is lower, or in
# points about a claim of a gain.
FOR, AGAINST = "points that way", "points the other way"
COMPOSING = "composing experts is what helps, not having two routers"
EQUAL_LOSS = "the same, where {} of a token's experts is lost in both"


def claims_table() -> str:
    """The table, in markdown."""
    sweeps = stored_result("remix-skills-dev-ablation")
    parts = {
        "eval.py remix": remixing_rows("remix-skills-test", stored_result("knowledge")),
        "eval.py remix --ablate": setting_rows(sweeps),
        "lab.composing.compare": cartesian_rows(group_runs(stored_runs("compare"), 2500)),
    }
    text = CLAIMS_HEAD
    for command, rows in parts.items():
        for row in rows:
            text += f"| {' | '.join(row)} | `{command}` |\n"
    return text


# ---- C3PO


def gain(row: dict) -> str:
    """A gain in points, with its interval."""
    mean, low, high = (100 * row[key] for key in ("gain", "low", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


def direction(*rows: dict) -> str:
    """Which way effects point by their intervals, if all point the same way."""
    if all(row["low"] > 0 for row in rows):
        return FOR
    return AGAINST if all(row["high"] < 0 for row in rows) else UNTOLD


def ngd_minus(rows: dict, *rivals: str) -> tuple[str, str]:
    """NGD minus each rival, in points with Student's interval over seeds, and a verdict."""
    texts, effects = [], []
    for rival in rivals:
        mean, half = interval(np.subtract(rows["NGD"]["each"], rows[rival]["each"]))
        low, high = mean - half, mean + half
        texts.append(f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        effects.append({"low": low, "high": high})
    return "NGD minus it: " + " and ".join(texts), direction(*effects)


def remixing_rows(name: str, knowledge: dict) -> list[tuple]:
    """C3PO's claims (arXiv 2504.07964) on the skills task: results/NAME.json.

    Published: OLMoE-1B-7B, means over six benchmarks. Effects are NGD minus the rival, in points.
    """
    rows, tests = stored_result(name)["rows"], remixing_tests(name)
    share = {method: f"{100 * row['accuracy']:.1f}" for method, row in rows.items()}
    gains = {method: gain(row) for method, row in rows.items()}
    p = {rival: p_value(test.p) for rival, test in tests.items()}
    broken, fixed = (100 * rows["NGD"][key] for key in ("broken", "fixed"))
    null = knowledge["reach"]["matched"]
    reached = {label: f"{100 * null[label]['mean']:.0f} %" for label in (RIGHT, WRONG)}
    return [
        (
            "C3PO: NGD beats the model as it is",
            "69.9 → 79.2",
            f"{share['base']} → {share['NGD']}: {gains['NGD']}, {p['base']}",
            tests["base"].verdict,
        ),
        (
            "so do mode finding and kernel regression",
            "72.4 and 76.9",
            f"{gains['mode finding']} and {gains['kernel regression']}",
            direction(rows["mode finding"], rows["kernel regression"]),
        ),
        (
            "NGD is the best of the three",
            "79.2 against 76.9",
            f"NGD minus kernel regression: {tests['kernel regression'].effect}, "
            f"{p['kernel regression']}",
            tests["kernel regression"].verdict,
        ),
        ("it beats in-context learning", "73.7", *ngd_minus(rows, "in-context")),
        (
            "it beats prefix tuning and soft prompts, trained once on all references",
            "71.3 and 72.2",
            *ngd_minus(rows, "prefix for all", "soft prompt for all"),
        ),
        (
            "and those fitted to each prompt's neighbours, a rival of our own",
            "-",
            *ngd_minus(rows, "prefix for each", "soft prompt for each"),
        ),
        (
            "there is more to win: the oracle",
            "85.2",
            f"{share['oracle']}: {gains['oracle']}; where the model is wrong, its steps lead to "
            f"the right label in {reached[RIGHT]}, to wrong ones as probable in {reached[WRONG]}",
            direction(rows["oracle"]),
        ),
        (
            "few right answers are broken",
            "5.1 % (ARC-C)",
            f"{broken:.1f} % broken, {fixed:.1f} % of the wrong fixed",
            "much the same" if abs(broken - 5.1) < 1 else f"{broken - 5.1:+.1f} points",
        ),
        (
            "it beats a dense model (3.5 times the activated parameters, 1.1 times all) "
            "that sees no references",
            "1-3B against 7-9B",
            *ngd_minus(rows, "larger, dense"),
        ),
    ]


def setting_rows(sweeps: dict) -> list[tuple]:
    """What C3PO says of its settings, on dev: other settings minus those of NGD here."""

    def minus(setting: str, *values: str) -> tuple[list[dict], str]:
        rows = [sweeps[setting][value]["change"] for value in values]
        texts = [f"{value} {gain(row)}" for value, row in zip(values, rows, strict=True)]
        return rows, ", ".join(texts)

    last, last_text = minus("critical layers", "last:2", "last:1")
    core, core_text = minus("core experts", "6")
    few_steps, few_text = minus("steps", "3")
    more_steps, more_text = minus("steps", "50")
    others, others_text = minus("neighbours", "1", "5", "16")
    kernels, kernels_text = minus("kernel", "linear", "matern")
    tokens, tokens_text = minus("token", "middle", "first", "all")
    return [
        (
            "the last layers are the best choice",
            "last 5 of 16: 79.2, all: 77.7",
            f"minus all four: {last_text}",
            direction(*last),
        ),
        (
            "some core experts are as good as all",
            "20 of 64: the same",
            f"minus all 16: {core_text}",
            AGAINST if core[0]["high"] < 0 else UNTOLD,
        ),
        (
            "ten steps are enough",
            "3: 74.2, 10: 79.2, 50: 79.2",
            f"minus 10: {few_text}, {more_text}",
            enough(few_steps[0], more_steps[0]),
        ),
        (
            "three neighbours are best",
            "1: 75.3, 3: 79.2, 5: 77.7",
            f"minus 3: {others_text}",
            best(others),
        ),
        (
            "the Gaussian kernel is best",
            "70.0, 76.3 and 79.2",
            f"minus it: {kernels_text}",
            best(kernels) if any(abs(row["gain"]) > 0.005 for row in kernels) else NOTHING,
        ),
        (
            "the last token is the one to re-mix",
            "last 79.2, middle 71.4, first 74.5",
            f"minus last: {tokens_text}",
            best(tokens),
        ),
    ]


NOTHING = "can show nothing: here they weigh three neighbours alike"


def best(others: list[dict]) -> str:
    """What changes to other settings say of a claim that the present one is the best."""
    if all(row["high"] < 0 for row in others):
        return FOR
    return AGAINST if any(row["low"] > 0 for row in others) else UNTOLD


def enough(fewer: dict, more: dict) -> str:
    """What fewer and more of something say of a claim that so much is needed, and enough."""
    if more["low"] > 0:
        return AGAINST
    return FOR if fewer["high"] < 0 else UNTOLD


# ---- CartesianMoE

PAPER_DENSE = "dense_paper"  # the paper's: 162 million parameters, where its MoEs activate 247


def cartesian_rows(kinds: dict) -> list[tuple]:
    """CartesianMoE's claims (arXiv 2410.16077) on TinyStories.

    Published: Pile, 100B tokens, base and large.
    """
    rows = []
    for name, claim, published in (
        ("compare", "CartesianMoE: lower perplexity than fine-grained", "7.33 → 7.19: -1.9 %"),
        ("second", "the same, at rates chosen after 2,500 steps", "-"),
    ):
        test = cartesian_test(name)
        text = f"{test.effect}, {len(test.seeds)} pairs, {p_value(test.p)}"
        rows.append((claim, published, text, test.verdict))
    theirs = {"smoe_share": 7.37, "smoe_top3": 7.40, "hash": 7.47, "top_p": 7.41}
    for name, published in theirs.items():
        here = against(kinds, "cartesian", name)
        rows.append((f"and than {name}", f"{published:.2f} → 7.19", *here))
    for claim, published, ours, other in (
        (
            "a MoE beats dense of 0.66 (here 0.75) times its activated size",
            "8.55 → 7.33",
            BASE,
            PAPER_DENSE,
        ),
        ("so does Cartesian", "8.55 → 7.19", "cartesian", PAPER_DENSE),
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
        return test_losses(seeds)
    return {seed: run["robustness"][protocol]["loss"] for seed, run in seeds.items()}


def against(kinds: dict, preset: str, other: str, protocol=None) -> tuple[str, str]:
    """The effect of a preset against another on perplexity, and what it says. Not declared.

    Under a protocol of robustness runs of one seed are alike, and so make pairs.
    """
    ours = preset_losses(kinds, preset, protocol)
    theirs = preset_losses(kinds, other, protocol)
    effect = (paired_effect if protocol else unpaired_effect)(ours, theirs)
    if effect is None:
        return "not run", "not run"
    text, _, verdict = describe_effect(effect).partition(": ")
    verdict = {"lower": FOR, "higher": AGAINST}.get(verdict, verdict)
    return f"{text}, {effect.runs}", verdict


def level(kinds: dict, preset: str, protocol: str) -> str:
    """A preset's mean perplexity under a protocol of robustness."""
    losses = preset_losses(kinds, preset, protocol).values()
    return f"{perplexity(sum(losses) / len(losses)):.1f}" if losses else "not run"
