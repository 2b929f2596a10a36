"""The claims of both papers, and what came out here: one table, its numbers from results/."""

import json
import math
from pathlib import Path

from lab.compare import read
from lab.verdict import BASE, effect, grouped, most, say

RESULTS = Path(__file__).parent.parent / "results"
HEAD = "| claim | published | here, with 95 % interval | verdict | command |\n|---|---|---|---|---|"
NULL = "oracle's null"
WAY = {"lower": "points that way", "higher": "points the other way"}  # of a claim that a perplexity is lower
TOLD = {"lower": "holds here", "higher": "the other way"}  # after a declared test


def stored(name: str):
    """What a command wrote to results/."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def runs(*names: str) -> list[dict]:
    """The runs of some comparisons in results/."""
    return [line for name in names for line in read(f"{RESULTS}/{name}.jsonl")]


def claims() -> str:
    """The table, in markdown."""
    parts = {"eval.py remix": remixing(stored("remix-skills-test"))}
    parts["eval.py remix --ablate"] = settings(stored("remix-skills-dev-ablation"))
    parts["lab.compare"] = cartesian(*(grouped(runs(name), 2500) for name in ("compare", "second")))
    rows = [[*row, f"`{command}`"] for command, part in parts.items() for row in part]
    return "\n".join([HEAD, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def gain(row: dict) -> str:
    """A gain in points, with its interval."""
    return f"{100 * row['gain']:+.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def remixing(found: dict):
    """C3PO's claims (arXiv 2504.07964; OLMoE-1B-7B, means over six benchmarks) on the skills task."""
    rows = found["rows"]
    share = {name: f"{100 * row['accuracy']:.1f}" for name, row in rows.items()}
    p = {name: "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}" for name, value in found["p"].items()}
    first = f"{share['base']} → {share['NGD']}: {gain(rows['NGD'])}, {p['base']}"
    yield "C3PO: NGD beats the model as it is", "69.9 → 79.2", first, "**holds here**"
    both = f"{gain(rows['mode finding'])} and {gain(rows['kernel regression'])}"
    yield "so do mode finding and kernel regression", "72.4 and 76.9", both, "no gain seen"
    best = f"{share['NGD']} against {share['kernel regression']}, {p['kernel regression']}"
    yield "NGD is the best of the three", "79.2 against 76.9", best, "**holds here**"
    yield "it beats in-context learning", "73.7", gain(rows["in-context"]), "points that way"
    tuned = f"{gain(rows['prefix tuning'])} and {gain(rows['soft prompt'])}"
    yield "it beats prefix tuning and soft prompts", "71.3 and 72.2", tuned, "points the other way"
    top = f"{share['oracle']}: {gain(rows['oracle'])}; its null {share[NULL]}"
    yield "there is more to win (the oracle)", "85.2", top, "points that way"
    broken = f"{100 * rows['NGD']['broken']:.1f} % broken, {100 * rows['NGD']['fixed']:.1f} % of the wrong fixed"
    yield "few right answers are broken", "5.1 % (ARC-C)", broken, "much the same"
    dense = f"{share['NGD']} against {share['larger, dense']}, dense with 3.5 times the activated parameters"
    yield "a re-mixed MoE beats larger dense models", "1-3B against 7-9B", dense, "points that way"


def settings(tried: dict):
    """What C3PO says of its settings, with one varied at a time, on dev."""

    def swept(what: str, *names: str) -> str:
        return ", ".join(f"{name} {gain(tried[what][name])}" for name in names)

    layers, published = f"of 4: {swept('critical layers', 'all', 'last:2', 'last:1')}", "last 5 of 16: 79.2, all: 77.7"
    yield "the last layers are the best choice", published, layers, "points the other way"
    core = f"of 16: {swept('core experts', '6', '16')}"
    yield "some core experts are as good as all", "20 of 64: the same", core, "cannot be told here"
    yield "ten steps are enough", "3: 74.2, 10: 79.2, 50: 79.2", swept("steps", "3", "10", "50"), "points that way"
    near = swept("neighbours", "1", "3", "5", "16")
    yield "three neighbours are best", "1: 75.3, 3: 79.2, 5: 77.7", near, "cannot be told here"
    kernels = swept("kernel", "linear", "matern", "gaussian")
    yield "the Gaussian kernel is best", "70.0, 76.3 and 79.2", kernels, "no difference seen"
    tokens, published = swept("token", "last", "middle", "first", "all"), "last 79.2, middle 71.4, first 74.5"
    yield "the last token is the one to re-mix", published, tokens, "points that way"


def cartesian(kinds: dict[str, dict], second: dict[str, dict]):
    """CartesianMoE's claims (arXiv 2410.16077; Pile, 100B tokens, base and large) on TinyStories. second: the runs of
    the second declared test."""

    def against(a: str, b: str, protocol: str | None = None, kinds=kinds, alpha: float = 0.0) -> list[str]:
        """The effect of a preset against another one, in percent of perplexity, and what it allows to say: after a test
        that was declared with a level of significance, or without."""
        loss = (lambda run: run["robustness"][protocol]["loss"]) if protocol else (lambda run: run["test"]["loss"])
        found = effect(most(kinds, a)[1], most(kinds, b)[1], loss)
        if found is None:
            return ["not run", "not run"]
        text, _, verdict = say(found).partition(": ")
        if not alpha:
            return [f"{text}, {found.n} seeds", WAY.get(verdict, verdict)]
        known = found.p < alpha or verdict == "no difference"
        verdict = TOLD.get(verdict, verdict) if known else "cannot be told here"
        return [f"{text}, {found.n} seeds, p = {found.p:.2g}", f"**{verdict}**"]

    def level(name: str, protocol: str) -> str:
        """A preset's mean perplexity under a protocol of robustness."""
        losses = [run["robustness"][protocol]["loss"] for run in most(kinds, name)[1].values()]
        return f"{math.exp(sum(losses) / len(losses)):.1f}" if losses else "not run"

    theirs = {"smoe_share": 7.37, "smoe_top3": 7.40, "hash": 7.47, "top_p": 7.41}
    first = "CartesianMoE: lower perplexity than fine-grained"
    yield first, "7.33 → 7.19: -1.9 %", *against("cartesian", BASE, alpha=0.01)
    yield "the same, at rates chosen after 2,500 steps", "-", *against("cartesian", BASE, kinds=second, alpha=0.005)
    for name, published in theirs.items():
        yield f"and than {name}", f"{published:.2f} → 7.19", *against("cartesian", name)
    yield "a MoE beats dense of its activated size", "8.55 → 7.33", *against(BASE, "dense")
    yield "so does Cartesian", "8.55 → 7.19", *against("cartesian", "dense")
    yield "composing experts is what helps, not having two routers", "-", *against("cartesian", "cartesian_parallel")
    yield "its shared expert helps", "6.15 → 6.08", *against("cartesian", "cartesian_no_shared")
    lost = {"top-1": "first choices disabled: far less is lost"}
    lost |= {part: f"the same, where {part} of a token's experts is lost in both" for part in ("a quarter", "a half")}
    for protocol, told in lost.items():
        share, verdict = against("cartesian", BASE, protocol)
        both = f"{level(BASE, protocol)} → {level('cartesian', protocol)}: {share}"
        yield told, "3095 → 27.7" if protocol == "top-1" else "-", both, verdict
