"""The claims of both papers, and what came out here: tables of rows, their numbers from results/.

A row is one difference, in one unit, with the direction that the claim asks for.
"""

from typing import NamedTuple

import numpy as np

from lab.composing.effects import (
    BASE,
    describe_effect,
    group_runs,
    main_kind,
    paired_effect,
    test_losses,
    unpaired_effect,
)
from lab.pages.declared import (
    UNTOLD,
    cartesian_test,
    composition_tests,
    p_value,
    remixing_tests,
)
from lab.pages.stored import stored_result, stored_runs
from lab.tools import statistics

# What an effect says that was not declared.
FOR, AGAINST = "as claimed", "the other way"
NOTHING = "can show nothing: all kernels weigh three neighbours alike"
UNITS = {1: "points, higher", -1: "points, lower", 0: "points, no difference"}
PERPLEXITY = "% of perplexity, lower"


class Claim(NamedTuple):
    """A claim and what came out here."""

    claim: str
    published: str
    effect: str  # ours minus theirs, with its 95 % interval
    better: str  # the unit, and what the claim asks for
    p: str  # of a t-test, two-sided
    seeds: str
    verdict: str  # bold where the test was declared


CLAIMS_HEAD = (
    "claim",
    "published",
    "here (95 % interval)",
    "unit, claimed",
    "p",
    "seeds",
    "verdict",
)


def claims_markdown(rows: list[Claim]) -> str:
    """Rows as a table."""
    lines = [CLAIMS_HEAD, ["---"] * len(CLAIMS_HEAD), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict_of(low: float, high: float, asked: int) -> str:
    """What an interval says of a claim that asks for more (1), for less (-1), or for neither."""
    if low <= 0 <= high:
        return UNTOLD
    return FOR if asked == (1 if low > 0 else -1) else AGAINST


def main_claims() -> str:
    """The claims that matter, for the README."""
    rows = {row.claim: row for row in (*remixing_rows(), *cartesian_rows())}
    rivals = ("base", "random neighbours", "kernel regression", "in-context", "prefix for all")
    wanted = [f"NGD against {METHOD_WORDS[rival]}" for rival in (*rivals, "prefix for each")]
    wanted += [CARTESIAN_TESTS["first"], COMPOSED[0]]
    chosen = [rows[claim] for claim in wanted]
    return claims_markdown([row._replace(published=row.published.split()[0]) for row in chosen])


# ---- C3PO

# The paper's main table: means of OLMoE-1B-7B over six benchmarks.
PUBLISHED = {
    "base": 69.9,
    "mode finding": 72.4,
    "kernel regression": 76.9,
    "NGD": 79.2,
    "in-context": 73.7,
    "prefix for all": 71.3,
    "soft prompt for all": 72.2,
    "oracle": 85.2,
}
METHOD_WORDS = {  # rows of results, as people call them
    "base": "the model as it is",
    "random neighbours": "random neighbours (our control)",
    "kernel regression": "kernel regression",
    "in-context": "in-context learning",
    "prefix for all": "prefix tuning",
    "soft prompt for all": "a soft prompt",
    "prefix for each": "a prefix for each prompt (our rival)",
    "soft prompt for each": "a soft prompt for each prompt (our rival)",
    "larger, dense": "a dense model, 3.5 times as many activated parameters",
}
REMIXING = [("NGD", rival) for rival in METHOD_WORDS]
REMIXING += [(method, "base") for method in ("kernel regression", "mode finding", "oracle")]


def remixing_rows(name: str = "remix-skills-test") -> list[Claim]:
    """C3PO's claims (arXiv 2504.07964) on the skills task: a method minus its rival."""
    result, tests = stored_result(name), remixing_tests(name)
    table = []
    for method, rival in REMIXING:
        ours, theirs = (result["rows"][row]["each"] for row in (method, rival))
        mean, half = statistics.interval(np.subtract(ours, theirs))
        p, says = statistics.paired(ours, theirs), verdict_of(mean - half, mean + half, 1)
        if method == "NGD" and rival in tests:
            p, says = tests[rival].p, tests[rival].verdict
        published = "-"
        if {method, rival} <= PUBLISHED.keys():
            published = published_points(PUBLISHED[method], PUBLISHED[rival])
        claim = f"{method} against {METHOD_WORDS[rival]}"
        here = statistics.in_points(mean, mean - half, mean + half)
        seeds = str(len(result["seeds"]))
        table.append(Claim(claim, published, here, UNITS[1], p_value(p), seeds, says))
    return table


def published_points(ours: float, theirs: float) -> str:
    """A published difference, and what it is one of."""
    return f"{ours - theirs:+.1f} ({ours} against {theirs})"


VARIED_SETTINGS = (  # what is varied, another value, NGD's here, two accuracies in the paper
    ("critical layers", "last:2", "all", 79.2, 77.7),  # there the last 5 of 16
    ("critical layers", "last:1", "all", 79.2, 77.7),
    ("core experts", "6", "16", 79.2, 79.2),  # there 20 of 64
    ("steps", "3", "10", 74.2, 79.2),
    ("steps", "50", "10", 79.2, 79.2),
    ("neighbours", "1", "3", 75.3, 79.2),
    ("neighbours", "5", "3", 77.7, 79.2),
    ("kernel", "linear", "gaussian", 70.0, 79.2),
    ("kernel", "matern", "gaussian", 76.3, 79.2),
    ("token", "middle", "last", 71.4, 79.2),
    ("token", "first", "last", 74.5, 79.2),
)


def setting_rows() -> list[Claim]:
    """What C3PO says of its settings, on dev: NGD with another setting minus NGD."""
    sweeps, table = stored_result("remix-skills-dev-ablation"), []
    for setting, value, own, theirs, best in VARIED_SETTINGS:
        change = sweeps[setting][value]["change"]
        mean, low, high = (change[key] for key in ("gain", "low", "high"))
        asked = int(np.sign(theirs - best))
        says = verdict_of(low, high, asked)
        if setting == "kernel" and abs(mean) < 0.005:
            says = NOTHING
        claim = f"{setting}: {value} against {own}"
        published = published_points(theirs, best)
        here = statistics.in_points(mean, low, high)
        table.append(Claim(claim, published, here, UNITS[asked], "-", "3", says))
    return table


# ---- CartesianMoE

CARTESIAN_TESTS = {  # results/NAME.jsonl -> the claim of its declared test
    "first": "Cartesian against fine-grained experts",
    "second": "Cartesian against fine-grained experts, at lower rates",
    "third": "Cartesian against fine-grained experts, with the better start",
}
COMPOSED = (  # the declared tests on pairs of functions
    "Cartesian against fine-grained experts, unseen pairs of functions",
    "Cartesian against fine-grained experts, unseen pairs, 40 % of all pairs trained",
)
LOWER = (  # the claim, ours, theirs, and the two perplexities in the paper
    ("Cartesian against smoe_share", "cartesian", "smoe_share", 7.19, 7.37),
    ("Cartesian against smoe_top3", "cartesian", "smoe_top3", 7.19, 7.40),
    ("Cartesian against hash routing", "cartesian", "hash", 7.19, 7.47),
    ("Cartesian against top-p routing", "cartesian", "top_p", 7.19, 7.41),
    ("fine-grained against the paper's dense model", BASE, "dense_paper", 7.33, 8.55),
    ("Cartesian against the paper's dense model", "cartesian", "dense_paper", 7.19, 8.55),
    ("fine-grained against dense", BASE, "dense", None, None),
    ("Cartesian against dense", "cartesian", "dense", None, None),
    ("Cartesian against its experts side by side", "cartesian", "cartesian_parallel", None, None),
    ("its shared expert against none", "cartesian", "cartesian_no_shared", 6.08, 6.15),
)
ROBUST = (  # the claim, the protocol of robustness, the two perplexities in the paper
    ("robustness: first choices disabled", "top-1", 27.7, 3095),
    ("robustness: a quarter of a token's experts disabled", "a quarter", None, None),
    ("robustness: a half of a token's experts disabled", "a half", None, None),
)


def cartesian_rows() -> list[Claim]:
    """CartesianMoE's claims (arXiv 2410.16077) on TinyStories: perplexity, ours against theirs.

    Published: Pile, 100B tokens, base and large.
    """
    kinds, table = group_runs(stored_runs("first"), 2500), []
    for name, claim in CARTESIAN_TESTS.items():
        test = cartesian_test(name)
        published = published_percent(7.19, 7.33) if name == "first" else "-"
        seeds = f"{len(test.seeds)} pairs"
        here, p = test.effect.replace(" %", ""), p_value(test.p)
        table.append(Claim(claim, published, here, PERPLEXITY, p, seeds, test.verdict))
    for claim, ours, theirs, low, high in LOWER:
        effect = unpaired_effect(preset_losses(kinds, ours), preset_losses(kinds, theirs))
        table.append(effect_row(claim, published_percent(low, high), effect))
    for claim, protocol, low, high in ROBUST:
        # Where routing goes wrong, runs of one seed are alike, and so make pairs.
        losses = [preset_losses(kinds, preset, protocol) for preset in ("cartesian", BASE)]
        table.append(effect_row(claim, published_percent(low, high), paired_effect(*losses)))
    return table + composition_claims()


def composition_claims() -> list[Claim]:
    """Pairs of functions that were never seen together: the share that is answered right."""
    rows = []
    for claim, test in zip(COMPOSED, composition_tests(), strict=True):
        here, seeds = test.effect.replace(" points", ""), f"{len(test.seeds)} pairs"
        rows.append(Claim(claim, "-", here, UNITS[1], p_value(test.p), seeds, test.verdict))
    return rows


def published_percent(ours: float | None, theirs: float | None) -> str:
    """A published difference of perplexities, in percent."""
    if ours is None:
        return "-"
    return f"{100 * (ours / theirs - 1):+.1f} ({ours} against {theirs})"


def effect_row(claim: str, published: str, effect) -> Claim:
    """An effect that was not declared."""
    if effect is None:
        return Claim(claim, published, "not run", PERPLEXITY, "-", "-", "not run")
    here = describe_effect(effect).partition(": ")[0].replace(" %", "")
    says = verdict_of(effect.low, effect.high, -1)
    seeds = effect.runs.removesuffix(" runs")
    return Claim(claim, published, here, PERPLEXITY, p_value(effect.p), seeds, says)


def preset_losses(kinds: dict, preset: str, protocol: str | None = None) -> dict[int, float]:
    """The test loss of each seed of a preset, or its loss under a protocol of robustness."""
    _, seeds = main_kind(kinds, preset)
    if protocol is None:
        return test_losses(seeds)
    return {seed: run["robustness"][protocol]["loss"] for seed, run in seeds.items()}
