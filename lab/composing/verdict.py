"""What the runs of compare.py say: effects, the declared tests, robustness, sharing."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import perplexity
from lab.composing.declarations import Declaration
from lab.composing.effects import (
    BASE,
    MARGIN,
    Effect,
    describe_effect,
    effects_against_base,
    effects_by_steps,
    first_run,
    group_runs,
    main_kind,
    paired_effect,
    settings_in_common,
    test_losses,
    unpaired_effect,
)
from lab.composing.figures import effects_figure, robustness_figure, sharing_figure
from lab.composing.presets import PRESETS
from lab.composing.robustness import loss_at_mass
from lab.composing.sharing import sharing_table
from lab.tools import cli

PRESET_WORDS = {  # presets, as people call them
    "dense": "dense, as many activated",
    "dense_two": "dense, two sub-layers",
    "dense_paper": "dense, the paper's",
    "smoe_share": "top-2 and a shared expert",
    "smoe_top3": "top-3",
    "hash": "hash routing",
    "top_p": "top-p routing",
    "fine_grained": "fine-grained",
    "fine_grained_no_shared": "fine-grained, none shared",
    "cartesian": "Cartesian",
    "cartesian_no_shared": "Cartesian, none shared",
    "cartesian_parallel": "Cartesian, side by side",
    "cartesian_chain": "Cartesian, other residual",
    "cartesian_pairs": "Cartesian, pair by pair",
    "cartesian_k1": "Cartesian, K = 1",
    "cartesian_k4": "Cartesian, K = 4",
}
HEADER = ["runs", "parameters", "activated", "step", "dev", "test", "bits/byte", "gap", "cloze"]
PRESETS_LEGEND = (
    f"step: a training step's time / {BASE}'s; gap: nats, test - training text; effects with the "
    "same dropout, from all runs (95 %\ninterval of Welch's t-test). Robustness: on the first 128 "
    "windows of the test split, in pairs of the same seed"
)
NOT_DECLARED = "Nothing was declared of these runs, and so there is no test:"
CONTRASTS = "Not declared, and so no tests: what a change to a preset does"


# ---- the report


def comparison_report(lines: list[dict], steps: int, declared: Declaration | None = None) -> str:
    """The report on the runs of so many steps; declared: what was declared of them before. Where
    that test has not ended, the report says no more."""
    running = declared.running(lines) if declared else ""
    if running:
        return f"{declared.text}\n  {running}"

    # Perplexities, and the test that was declared.
    kinds = group_runs(lines, steps)
    blocks = [overview_table(lines, steps), PRESETS_LEGEND, ""]
    blocks += [declared.text if declared else NOT_DECLARED]
    blocks += trend_lines(lines, declared.effect if declared else paired_effect)

    # What changes to a preset do, and what models lose where their routing goes wrong.
    contrasts = contrast_lines(kinds)
    if contrasts:
        blocks += [CONTRASTS, *contrasts]
    blocks += ["", rivals_table(kinds), "", robustness_overview(kinds)]

    # What composed experts share.
    for name, runs in kinds.items():
        shared = [run["sharing"] for run in runs.values() if "sharing" in run]
        if shared:
            blocks += [f"\n{name}: mean of {len(shared)} runs", sharing_table(shared)]
    return "\n".join(blocks)


def overview_table(lines: list[dict], steps: int) -> str:
    """A line for each kind: parameters, time of a step, perplexities, effect against BASE."""
    kinds, rows = group_runs(lines, steps), []
    for name, effect in effects_against_base(kinds).items():
        rows.append([name, *overview_cells(kinds[name]), describe_effect(effect)])
    base_name, _ = main_kind(kinds, BASE)
    header = [f"{steps} steps", *HEADER, f"perplexity against {base_name}"]
    common = settings_in_common(lines, steps)
    return cli.table(rows, header=header) + (f"\nall runs: {common}" if common else "")


def overview_cells(runs: dict[int, dict]) -> list:
    """The cells of a kind, below HEADER. Perplexities are geometric means."""
    keys = ("total", "activated", "step", "train", "dev", "test")
    mean = tree_mean([{key: run[key] for key in keys} for run in runs.values()])
    train, dev, test = (mean[split]["loss"] for split in ("train", "dev", "test"))
    cloze = mean["test"].get("cloze")
    return [
        len(runs),
        f"{mean['total']:,.0f}",
        f"{mean['activated']:,.0f}",
        f"{mean['step']:.2f}",
        f"{perplexity(dev):.3f}",
        f"{perplexity(test):.3f}",
        f"{mean['test']['bits_per_byte']:.4f}",
        f"{test - train:.3f}",
        "-" if cloze is None else f"{cloze:.1%}",
    ]


def tree_mean(trees: list):
    """The mean of nested dicts of one form, number by number."""
    if isinstance(trees[0], dict):
        return {key: tree_mean([tree[key] for tree in trees]) for key in trees[0]}
    return float(np.mean(trees))


def trend_lines(lines: list[dict], at_the_end: Callable = paired_effect) -> list[str]:
    """A line for each effect of `effects_by_steps`; only that of a declared test is a test."""
    texts = []
    for name, effect in effects_by_steps(lines, at_the_end).items():
        text = f"  {name}: {describe_effect(effect) or 'no pairs'}"
        if effect and math.isfinite(effect.high):
            text += f" (p = {effect.p:.2g}, {effect.runs})"
        texts.append(text)
    return texts


def contrast_lines(kinds: dict) -> list[str]:
    """A line for each change: X_something against X, and dropout against none."""
    texts = []
    for name, runs in kinds.items():
        # A kind with dropout has the same preset as its parent, others the beginning of its name.
        run = first_run(runs)
        parent = run["preset"]
        if not run["dropout"]:
            parents = [preset for preset in PRESETS if parent.startswith(f"{preset}_")]
            parent = parents[0] if parents else parent
        base_name, base = main_kind(kinds, parent)
        if base_name not in (name, "none"):
            effect = unpaired_effect(test_losses(runs), test_losses(base))
            text = describe_effect(effect)
            texts.append(f"  {name} against {base_name}: {text}")
    return texts


# ---- robustness


def mean_robustness(kinds: dict) -> dict[str, dict]:
    """The rows of `measure_robustness`, means over the runs of each kind that has some."""
    means = {}
    for name, runs in kinds.items():
        if "robustness" in first_run(runs):
            means[name] = tree_mean([run["robustness"] for run in runs.values()])
    return means


def rivals_table(kinds: dict) -> str:
    """Cartesian against BASE: a row for each protocol, and for some equal losses of mass."""
    name, our_runs = main_kind(kinds, "cartesian")
    base_name, their_runs = main_kind(kinds, BASE)
    ours = robustness_rows(our_runs)
    theirs = robustness_rows(their_runs)
    table = []
    for protocol in first_run(ours) if ours else ():
        cells = [protocol, protocol_cell(theirs, protocol), protocol_cell(ours, protocol)]
        effect = None
        if all(cells):  # BASE has no A and B
            a = {seed: rows[protocol]["loss"] for seed, rows in ours.items()}
            b = {seed: rows[protocol]["loss"] for seed, rows in theirs.items()}
            effect = paired_effect(a, b)
        table.append([*cells, describe_effect(effect)])
    header = ["disabled: perplexity (mass lost)", base_name, name, "effect"]
    return cli.table(table, header=header)


def robustness_rows(runs: dict[int, dict]) -> dict[int, dict]:
    """The rows of `measure_robustness` for each seed, and of losing so much of the routing mass."""
    rows_of = {}
    for seed, run in runs.items():
        if "robustness" in run:
            rows = dict(run["robustness"])
            for mass in (0.1, 0.2, 0.4):
                loss = loss_at_mass(run["robustness"], mass)
                rows[f"{mass:.0%} of the mass"] = {"loss": loss, "mass": mass}
            rows_of[seed] = rows
    return rows_of


def protocol_cell(rows_of: dict[int, dict], protocol: str) -> str:
    """Perplexity, and the routing mass that is lost, as means over seeds."""
    if not rows_of or protocol not in first_run(rows_of):
        return ""
    mean = tree_mean([rows[protocol] for rows in rows_of.values()])
    return f"{perplexity(mean['loss']):.2f} ({mean['mass']:.0%})"


def robustness_overview(kinds: dict) -> str:
    """A row for each kind, a column for each of the main protocols."""
    means = mean_robustness(kinds)
    longest = max(means.values(), key=len, default={})
    columns = [name for name in longest if not name.startswith(("q", "noise", "layer"))]
    table = []
    for name, rows in means.items():
        cells = []
        for protocol in columns:
            cells.append(f"{perplexity(rows[protocol]['loss']):.2f}" if protocol in rows else "")
        table.append([name, *cells])
    return cli.table(table, header=["perplexity, disabled:", *columns])


# ---- figures


def draw_comparison(lines: list[dict], steps: int, folder: Path):
    """Draw effects, robustness, and what composed experts of one run share, into a folder."""
    kinds = group_runs(lines, steps)
    words = kinds_in_words(kinds)
    seeds = {}
    for name, runs in kinds.items():
        count = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
        seeds[name] = f"{words[name]} ({count})"
    effects = {seeds[name]: effect for name, effect in effects_against_base(kinds).items()}
    title = f"Perplexity after {steps:,} steps, against fine-grained experts"
    name, ours = main_kind(kinds, "cartesian")
    base_name, _ = main_kind(kinds, BASE)
    draw_effects(effects, title, folder / "effects.png", seeds.get(name, ""))

    means = {seeds[kind]: rows for kind, rows in mean_robustness(kinds).items()}
    leading = (seeds.get(base_name), seeds.get(name))
    robustness_figure(means, folder / "robustness.png", leading)

    shared = [run["sharing"] for run in ours.values() if "sharing" in run]
    if shared:
        title = "Composed experts of one run"
        sharing_figure(shared[0], title, folder / "sharing.png")


def draw_trend(lines: list[dict], path: Path):
    """Draw the effects of cartesian against BASE over the training steps."""
    effects = effects_by_steps(lines)
    short = {}
    for name, effect in effects.items():
        if effect:
            words = name.partition(",")[0].replace(" (dev)", ", on dev")
            short[f"{words} ({len(effect.each)} seeds)"] = effect
    title = "Cartesian against fine-grained experts, at one learning rate"
    declared = next((name for name in short if name.startswith("2500 steps")), "")
    draw_effects(short, title, path, declared)


def kinds_in_words(kinds: dict) -> dict[str, str]:
    """Kinds such as "cartesian lr 0.003" as people call them: without the learning rate, but where
    two kinds differ in nothing else."""
    words = {}
    for name, runs in kinds.items():
        run = first_run(runs)
        words[name] = PRESET_WORDS[run["preset"]] + (" with dropout" if run["dropout"] else "")
    texts = list(words.values())
    return {name: text if texts.count(text) == 1 else name for name, text in words.items()}


def draw_effects(effects: dict[str, Effect | None], title: str, path: Path, declared: str = ""):
    """Draw the effects that have an interval."""
    shown = {}
    for name, effect in effects.items():
        if effect and math.isfinite(effect.high):
            shown[name] = effect
    effects_figure(shown, MARGIN, title, path, declared)
