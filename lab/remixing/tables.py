"""The tables of a comparison, from the numbers that `contest.py` and `sweeps.py` return."""

import numpy as np

from lab.tools import statistics
from lab.tools.cli import table

# On subsets of the prompts:
SHOWN = ("kernel regression", "NGD", "unfiltered", "unfiltered tuned", "corrections")
SHOWN += ("soft prompt for each", "oracle")
# Named beforehand: a rival, and the method that is tested against it.
DECLARED_AGAINST = {
    "base": "NGD",
    "random neighbours": "NGD",
    "kernel regression": "NGD",
    "unfiltered": "corrections",
}
WRONG_LABEL = "random wrong label"  # the row whose accuracy is how often that is reached
NO_GAIN = ("base", WRONG_LABEL)  # a gain over base says nothing about these
CONTEST_LEGEND = """\
gain: over base; fixed of the wrong, broken of the right; gap closed: gain / the oracle's; rerouted:
prompts that visit other experts; ms: of processor time for a prompt; cost: in forward passes of
base; both share what is paid once; accuracy of a random wrong label: that label is reached"""


def gain_cells(row: dict) -> list[str]:
    """The cells of a gain and of its interval."""
    low, high = row["low"], row["high"]
    return [f"{row['gain']:+.1%}", f"{low:+.1%} to {high:+.1%}"]


def main_table(rows: dict[str, dict], costs: dict[str, float]) -> str:
    """The methods beside each other. costs: in forward passes of base; empty: no such column."""
    header = ["", "accuracy", "gain", "95 % interval", "fixed", "broken", "gap closed"]
    header += ["rerouted", "ms", "cost"] if costs else ["rerouted", "ms"]
    headroom = rows["oracle"]["gain"] if "oracle" in rows else 0

    lines = []
    for name, row in rows.items():
        closed = f"{row['gain'] / headroom:.0%}" if headroom else ""
        cells = [*gain_cells(row), f"{row['fixed']:.1%}", f"{row['broken']:.1%}"]
        cells += [closed, f"{row['changed']:.0%}"]
        if name in NO_GAIN:
            cells = [""] * len(cells)
        line = [name, f"{row['accuracy']:.1%}", *cells, f"{row['ms']:.1f}"]
        if costs:
            line.append(f"{costs[name]:.1f}" if name in costs else "")
        lines.append(line)
    return table(lines, header)


def subset_table(subsets: dict[str, dict], sizes: dict[str, float]) -> str:
    """Gains on subsets of the prompts: subset -> method -> row; sizes: their shares."""
    lines = []
    for subset, rows in subsets.items():
        base = f"{rows['base']['accuracy']:.1%}"
        lines.append([f"{subset} ({sizes[subset]:.0%})", "base", base, "", ""])
        for name in SHOWN:
            if name in rows:
                accuracy = f"{rows[name]['accuracy']:.1%}"
                lines.append(["", name, accuracy, *gain_cells(rows[name])])
    header = ["on a part of the prompts", "", "accuracy", "gain", "95 % interval"]
    return table(lines, header, left=2)


def mistakes_table(mistakes: dict[str, list[float]]) -> str:
    """Where the two readings of a prompt differ: method -> shares of right, other and neither."""
    lines = []
    for name, shares in mistakes.items():
        lines.append([name, *(f"{share:.1%}" for share in shares)])
    header = ["where the two readings differ", "right", "the other", "neither"]
    return table(lines, header)


def contest_report(result: dict) -> str:
    """All that a contest found, as text."""
    copies, alone = result["duplicates"], result["alone"]
    texts = [
        main_table(result["rows"], result["costs"]),
        CONTEST_LEGEND,
        f"neighbours: {copies:,} near-duplicates dropped, "
        f"{alone:,} prompts with nobody (base is kept)",
        subset_table(result["subsets"], result["sizes"]),
    ]
    if "errors" in result:
        texts.append(mistakes_table(result["errors"]))
    if result.get("cases"):
        header = ["with NGD", "prompt", "answer before", "after", "right"]
        texts.append(table(result["cases"], header, left=2))
    if result.get("once"):
        texts.append(once_table(result))
    if result.get("ahead"):
        texts.append(tests_table(result))
    return "\n\n".join(texts)


def tests_table(result: dict) -> str:
    """The tests named beforehand: by how much a method is ahead of a rival, in pairs."""
    lines = []
    for rival, row in result["ahead"].items():
        p = f"{result['p'][rival]:.2g}"
        lines.append([f"{DECLARED_AGAINST[rival]} against {rival}", *gain_cells(row), p])
    n = len(result["runs"])
    return table(lines, [f"tests in pairs, {n} seeds", "ahead by", "95 % interval", "p"])


def once_table(result: dict) -> str:
    """What is paid once, for all prompts, and what each of them costs then."""
    lines = []
    for name, once in result["once"].items():
        later = result["costs"][name] - once / result["prompts"]
        lines.append([name, f"{once:,.0f}", f"{later:.1f}"])
    header = ["in forward passes of base", "once, for all prompts", "then, for each"]
    return table(lines, header)


def sweep_table(sweeps: dict[str, dict]) -> str:
    """NGD with one setting varied at a time: a line for every value of a setting."""
    lines = []
    for setting, rows in sweeps.items():
        title = setting
        for value, row in rows.items():
            accuracy = f"{row['accuracy']:.1%}"
            lines.append([title, value, accuracy, *gain_cells(row)])
            title = ""
    header = ["NGD with other", "", "accuracy", "gain", "95 % interval"]
    return table(lines, header, left=2)


# ----------------------------------------------------------------------- two kinds of models


def gain_table(first: dict, second: dict) -> str:
    """Two contests on the same seeds: the gain of each method on either kind of model, and their
    difference in pairs. Of the rows in NO_GAIN it is the share of the prompts itself."""
    lines = []
    for name in first["rows"]:
        if name in second["rows"]:
            ours, our_cell = gain_on_each_seed(first["rows"], name)
            theirs, their_cell = gain_on_each_seed(second["rows"], name)
            mean, half = statistics.interval(ours - theirs)
            difference = f"{mean:+.1%} ({mean - half:+.1%} to {mean + half:+.1%})"
            p = f"{statistics.paired(ours, theirs):.2g}"
            lines.append([name, our_cell, their_cell, difference, p])
    kinds = [result["runs"][0].rpartition("-s")[0] for result in (first, second)]
    text = table(lines, ["gain over base", *kinds, "difference", "p"])
    return (
        f"{text}\n\n{len(first['seeds'])} seeds; intervals of 95 %: of a gain by bootstrap over "
        "seeds and cues, of a difference Student's t;\nbase, random wrong label: the share of the "
        "prompts that are led to their label, right or wrong"
    )


def gain_on_each_seed(rows: dict[str, dict], name: str):
    """A method's gain on each seed, and the cell that tells their mean."""
    row = rows[name]
    accuracy = np.array(row["each"])  # one number a seed
    if name in NO_GAIN:
        return accuracy, f"{accuracy.mean():.1%}"
    gain = accuracy - np.array(rows["base"]["each"])
    low, high = row["low"], row["high"]
    return gain, f"{gain.mean():+.1%} ({low:+.1%} to {high:+.1%})"
