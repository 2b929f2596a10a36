"""What the runs of lab/compare.py say: effects in pairs of the same seed, the declared test, robustness, sharing."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cartesian import PRESETS
from lab import cli, plots, stats
from lab.robust import at_mass
from lab.sharing import sharing_table

BASE, MARGIN = "fine_grained", 0.5  # percent of perplexity: an interval inside of +-0.5 is "no difference"
DECLARED = {  # file in results/ -> what was declared before its runs
    "compare": f"""\
Declared before any run: cartesian has a lower test perplexity than {BASE}, each with its best settings on dev; 13 pairs
of 2500 steps, paired t-test, two-sided; "no difference" only where the 95 % interval is inside +-{MARGIN} %.""",
    "second": """\
Declared before any of these runs: the same claim, at settings chosen on dev at 2500 steps; 7 pairs (seeds 1 to 7),
paired t-test, two-sided; as the second test of one claim it asks for p < 0.005.""",
}
KIND = ("preset", "lr", "norm_topk", "dropout")  # runs alike in these differ in their seed alone
SHOWN = ("runs", "parameters", "activated", "step", "dev", "test", "bits/byte", "gap", "cloze")
LEGEND = f"""\
step: a training step's time / {BASE}'s; gap: nats, test - training text; (95 % interval of the pairs); effects in pairs
of the same seed and dropout. Robustness: on the first 128 windows of the test split"""
CONTRASTS = "Not declared, and so no tests: what a change to a preset does"


class Effect(NamedTuple):
    """How much higher one perplexity is than another, in percent, from n pairs of the same seed."""

    middle: float
    low: float  # the ends of its 95 % interval
    high: float
    p: float  # of the paired t-test, two-sided
    n: int


def show(lines: list[dict], steps: int, test: str = "") -> str:
    """The report on the runs of so many steps. test: what was declared of them, if anything."""
    kinds = grouped(lines, steps)
    changes = [*contrasts(kinds)]
    texts = [overview(kinds, steps), LEGEND, "", test or "Nothing was declared of these runs, and so there is no test:"]
    texts += [*trend(lines), *([CONTRASTS, *changes] if changes else []), "", *robust(kinds)]
    for name, runs in kinds.items():
        shared = [run["sharing"] for run in runs.values() if "sharing" in run]
        texts += [f"\n{name}: mean of {len(shared)} runs", sharing_table(shared)] if shared else []
    return "\n".join(texts)


def draw(lines: list[dict], steps: int, folder: Path):
    """The figures of these runs: effects, robustness, and what composed experts of one of them share."""
    kinds = grouped(lines, steps)
    plots.effects_figure(with_interval(effects(kinds)), MARGIN, f"Against {BASE}", folder / "effects.png")
    (a, ours), (b, _) = rivals(kinds)
    found = mean_robustness(kinds)
    points = {n: {p: [row["mass"], math.exp(row["loss"])] for p, row in rows.items()} for n, rows in found.items()}
    plots.robustness_figure(points, folder / "robustness.png", leading=(a, b))
    shared = [run["sharing"] for run in ours.values() if "sharing" in run]
    if shared:
        plots.sharing_figure(shared[0], f"Composed experts: {a}, one run", folder / "sharing.png")


def with_interval(found: dict[str, Effect | None]) -> dict[str, tuple]:
    """Of effects, those whose interval is worth drawing: of two pairs it would dwarf all others."""
    return {name: each[:3] for name, each in found.items() if each and each.n > 2}


def by_steps(lines: list[dict]) -> dict[str, Effect | None]:
    """Cartesian against BASE after each number of steps, and on dev on the way there."""
    found = {}
    for n in sorted({line["steps"] for line in lines}):
        (a, ours), (b, theirs) = rivals(grouped(lines, n))
        way = first(ours).get("curve", [])[1:-1] if ours and theirs else []
        for i, (step, _) in enumerate(way, 1):
            found[f"step {step} of {n} (dev)"] = effect(ours, theirs, lambda run, i=i: run["curve"][i][1])
        found[f"{n} steps, {a} against {b}"] = effect(ours, theirs)
    return found


def trend(lines: list[dict]):
    """A line for each effect of `by_steps`; only that of a declared test is a test."""
    for name, found in by_steps(lines).items():
        p = f" (p = {found.p:.2g}, {found.n} pairs)" if found and found.n > 1 else ""
        yield f"  {name}: {say(found) or 'no pairs'}{p}"


def contrasts(kinds: dict[str, dict]):
    """A line for each kind with dropout, against the same without, and for each X_something, against X."""
    for name, runs in kinds.items():
        own, dropout = (first(runs)[key] for key in ("preset", "dropout"))
        parent = own if dropout else next((p for p in PRESETS if own.startswith(f"{p}_")), own)
        base, theirs = most(kinds, parent)
        if base not in (name, "none"):
            yield f"  {name} against {base}: {say(effect(runs, theirs)) or 'no pairs'}"


def overview(kinds: dict[str, dict], steps: int) -> str:
    """A line for each kind of run."""
    found = effects(kinds)
    rows = [[name, *summary([*runs.values()]), say(found[name])] for name, runs in kinds.items()]
    return cli.table(rows, header=[f"{steps} steps", *SHOWN, f"perplexity against {most(kinds, BASE)[0]}"])


def grouped(lines: list[dict], steps: int) -> dict[str, dict[int, dict]]:
    """The runs of so many steps: kind -> seed -> run, in the order of PRESETS."""
    kinds = {}
    for line in sorted(lines, key=lambda line: (list(PRESETS).index(line["preset"]), *(line[x] for x in KIND[1:]))):
        norm, dropout = " norm" * line["norm_topk"], f" dropout {line['dropout']:g}" if line["dropout"] else ""
        if line["steps"] == steps:
            kinds.setdefault(f"{line['preset']} lr {line['lr']:g}{norm}{dropout}", {})[line["seed"]] = line
    return kinds


def first(runs: dict[int, dict]) -> dict:
    """One of the runs of a kind, for what they have in common."""
    return next(iter(runs.values()))


def most(kinds: dict[str, dict], preset: str, dropout: float = 0.0):
    """The kind of a preset that has the most seeds, then the best dev loss -> (its name, its runs), or ("none", {})."""
    known = [k for k in kinds.items() if (first(k[1])["preset"], first(k[1])["dropout"]) == (preset, dropout)]
    dev = {name: np.mean([run["dev"]["loss"] for run in runs.values()]) for name, runs in known}
    return max(known, key=lambda kind: (len(kind[1]), -dev[kind[0]]), default=("none", {}))


def rivals(kinds: dict[str, dict]) -> list[tuple]:
    """The two kinds that the declared tests compare, as `most` finds them: cartesian, and BASE."""
    return [most(kinds, name) for name in ("cartesian", BASE)]


def effect(runs: dict, base: dict, loss=lambda run: run["test"]["loss"]) -> Effect | None:
    """The effect of one kind against another; None where they have no seed in common, or are one."""
    seeds = [] if runs is base else sorted(runs.keys() & base.keys())
    a, b = ([loss(part[seed]) for seed in seeds] for part in (runs, base))
    if len(seeds) < 2:
        return Effect(100 * math.expm1(a[0] - b[0]), -math.inf, math.inf, 1.0, 1) if seeds else None
    mean, half = stats.interval(np.subtract(a, b))
    return Effect(*(100 * math.expm1(x) for x in (mean, mean - half, mean + half)), stats.paired(a, b), len(seeds))


def effects(kinds: dict[str, dict]) -> dict[str, Effect | None]:
    """The effect of each kind against BASE with the same dropout."""
    return {name: effect(runs, most(kinds, BASE, first(runs)["dropout"])[1]) for name, runs in kinds.items()}


def say(found: Effect | None) -> str:
    """What an effect allows to say."""
    if found is None or found.n < 2:
        return f"{found.middle:+.2f} %, one pair" if found else ""
    small = max(-found.low, found.high) < MARGIN
    verdict = "higher" if found.low > 0 else "lower" if found.high < 0 else ""
    verdict += ", inside the margin" if verdict and small else ""
    verdict = verdict or ("no difference" if small else "cannot be told here")
    return f"{found.middle:+.2f} % ({found.low:+.2f} to {found.high:+.2f}): {verdict}"


def mean(parts: list):
    """The mean of things of one form, number by number."""
    if isinstance(parts[0], dict):
        return {key: mean([part[key] for part in parts]) for key in parts[0]}
    return float(np.mean(parts))


def summary(runs: list[dict]) -> list:
    """The cells below SHOWN, of the runs of a kind. Perplexities are geometric means."""
    found = mean([{key: run[key] for key in ("total", "activated", "step", "train", "dev", "test")} for run in runs])
    loss, cloze = {key: found[key]["loss"] for key in ("train", "dev", "test")}, found["test"].get("cloze")
    cells = [f"{found['total']:,.0f}", f"{found['activated']:,.0f}", f"{found['step']:.2f}"]
    cells += [f"{math.exp(loss['dev']):.3f}", f"{math.exp(loss['test']):.3f}", f"{found['test']['bits_per_byte']:.4f}"]
    return [len(runs), *cells, f"{loss['test'] - loss['train']:.3f}", "-" if cloze is None else f"{cloze:.1%}"]


def mean_robustness(kinds: dict[str, dict]) -> dict[str, dict]:
    """The rows of `lab.robust.robustness`, means over the runs of each kind that has some."""
    kinds = {name: runs for name, runs in kinds.items() if "robustness" in first(runs)}
    return {name: mean([run["robustness"] for run in runs.values()]) for name, runs in kinds.items()}


def robust(kinds: dict[str, dict]) -> list[str]:
    """Two tables: cartesian against BASE with a row for each protocol, and all kinds."""
    found, lines = mean_robustness(kinds), []
    (a, ours), (b, theirs) = rivals(kinds)
    for protocol in found.get(a, {}):
        cells = [found.get(name, {}).get(protocol) for name in (b, a)]
        cells = [f"{math.exp(cell['loss']):.2f} ({cell['mass']:.0%})" if cell else "" for cell in cells]
        gap = effect(ours, theirs, lambda run, p=protocol: run["robustness"][p]["loss"]) if all(cells) else None
        lines.append([protocol, *cells, say(gap)])
    for mass in (0.1, 0.2, 0.4) if lines and theirs else ():
        cells = [np.mean([at_mass(run["robustness"], mass) for run in runs.values()]) for runs in (theirs, ours)]
        gap = say(effect(ours, theirs, lambda run, mass=mass: at_mass(run["robustness"], mass)))
        lines.append([f"{mass:.0%} of the mass", *(f"{math.exp(cell):.2f} ({mass:.0%})" for cell in cells), gap])
    columns = [p for p in max(found.values(), key=len, default={}) if not p.startswith(("q", "noise", "layer"))]
    rows = [[name, *(f"{math.exp(each[p]['loss']):.2f}" if p in each else "" for p in columns)]
            for name, each in found.items()]  # fmt: skip
    heads = ["disabled: perplexity (mass lost)", b, a, "effect"]
    return [cli.table(lines, header=heads), "", cli.table(rows, header=["perplexity, disabled:", *columns])]
