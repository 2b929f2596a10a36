"""What was measured, as tables and as a figure."""

import numpy as np

from lab.remixing import cost
from lab.tools import cli, figures

LEGEND = (
    "ms: the median; ours / peer: the median of rounds, in each of which all took turns, and its\n"
    "quartiles; limit: what the machine would need for the matrix products, or to read once what\n"
    "has to be read, whichever is longer; reached: limit / ours"
)


def speed_report(result: dict) -> str:
    """All tables of a measurement."""
    machine = result["machine"]
    head = (
        f"one thread, float32; {machine['products'] / 1e9:.0f} GFLOP/s in large matrix products,\n"
        f"{machine['reading'] / 1e9:.1f} GB/s read; torch {machine['torch']}, "
        f"transformers {machine['transformers']}"
    )
    parts = [head, rows_table(result["rows"]), LEGEND]
    for backward in (False, True):
        parts.append(layer_table(result["layers"], backward))
    parts.append(growth_table(result["growth"]))
    parts += [profile_table(name, ms) for name, ms in result["profiles"].items()]
    return "\n\n".join(parts)


def ratio(row: dict, peer: str, ours: str = "ours") -> np.ndarray:
    """Ours / peer of a row, round by round."""
    return np.array(row["seconds"][ours]) / np.array(row["seconds"][peer])


def milliseconds(row: dict, name: str = "ours") -> float:
    return 1000 * float(np.median(row["seconds"][name]))


def rows_table(rows: list[dict]) -> str:
    """A line for ours, and one for each peer."""
    lines = []
    for row in rows:
        for name in row["seconds"]:
            cells = ["", "", "", ""]
            if not name.startswith("ours"):
                low, middle, high = np.quantile(ratio(row, name), [0.25, 0.5, 0.75])
                cells[:2] = f"{middle:.2f}", f"{low:.2f} to {high:.2f}"
            elif row["limit"]:
                limit = 1000 * row["limit"]
                cells[2:] = f"{limit:.1f}", f"{limit / milliseconds(row, name):.0%}"
            what = row["what"] if name == "ours" else ""
            lines.append([what, name, f"{milliseconds(row, name):.1f}", *cells])
    header = ["", "", "ms", "ours / peer", "quartiles", "limit", "reached"]
    return cli.table(lines, header, left=2)


def layer_ratios(rows: list[dict], backward: bool) -> dict[str, np.ndarray]:
    """Ours / peer over the grid, for dense and for the fastest peer of transformers."""
    chosen = [row for row in rows if row["backward"] == backward]
    dense = [np.median(ratio(row, "dense")) for row in chosen]
    theirs = []
    for row in chosen:
        peers = [name for name in row["seconds"] if name.startswith("transformers")]
        theirs.append(max(np.median(ratio(row, peer)) for peer in peers))
    reached = [1000 * row["limit"] / milliseconds(row) for row in chosen]
    return {
        "dense": np.array(dense),
        "transformers": np.array(theirs),
        "reached": np.array(reached),
    }


def layer_table(rows: list[dict], backward: bool) -> str:
    """The grid of layers: a line for each width and number of experts, three columns for each K."""
    ratios = layer_ratios(rows, backward)
    chosen = [row for row in rows if row["backward"] == backward]
    top = sorted({row["K"] for row in chosen})
    lines = {}
    for i, row in enumerate(chosen):
        line = lines.setdefault((row["D"], row["E"]), [f"D {row['D']}, E {row['E']}"])
        line.append(f"{ratios['dense'][i]:.2f}")
        line.append(f"{ratios['transformers'][i]:.2f}")
        line.append(f"{ratios['reached'][i]:.0%}")
    kind = "forward, backward" if backward else "forward"
    header = [f"MoE layer, {kind}"]
    for k in top:
        header += [f"top-{k}: dense", "theirs", "reached"]
    text = cli.table(list(lines.values()), header)
    medians = [f"{np.median(ratios[name]):.2f} of {name}" for name in ("dense", "transformers")]
    return f"{text}\nmedian of the grid: {', '.join(medians)}"


def growth_table(curves: dict) -> str:
    lines = []
    for name, curve in curves.items():
        sizes = f"{curve['sizes'][0]} to {curve['sizes'][-1]}"
        ends = [f"{1000 * curve['seconds'][i]:.1f}" for i in (0, -1)]
        lines.append([name, sizes, *ends, f"{curve['slope']:.2f}"])
    return cli.table(lines, ["where one size grows", "from, to", "ms", "ms", "slope"])


def profile_table(name: str, ms: dict) -> str:
    """Where the time of a call goes."""
    total = sum(ms.values())
    lines = [[row, f"{value:.2f}", f"{value / total:.0%}"] for row, value in ms.items()]
    lines.append(["all", f"{total:.2f}", "100%"])
    return cli.table(lines, [f"where the time of {name} goes (profiled)", "ms", "share"])


def cost_report(result: dict) -> str:
    """What NGD costs: by the formula for OLMoE, and measured on small models."""
    costs = cost.formula(cost.OLMOE, T=100, last=5, k=3, steps=10)
    lines = [[name, f"{value:.2f}"] for name, value in costs.items()]
    head = "NGD on OLMoE, 100 tokens, last 5 of 16 layers, k = 3, 10 steps, in base forwards:"
    formula = f"{head}\n\n{cli.table(lines)}"

    lines = []
    for row in result["rows"]:
        if "operations" not in row:
            continue
        exact, anew, naive = (np.median(times) for times in row["seconds"].values())
        count = row["operations"]
        line = [row["what"].removeprefix("NGD, "), f"{1000 * exact:.1f}", f"{1000 * naive:.0f}"]
        line += [f"{naive / exact:.0f}", f"{naive / anew:.0f}"]
        line.append(f"{count['naive'] / count['exact']:.0f}")
        line.append(f"{count['naive'] / (count['exact'] + count['prefixes']):.0f}")
        lines.append([*line, f"{row['apart']:.0e}"])
    header = ["steps of NGD, one thread", "exact (ms)", "naive (ms)", "ratio", "+ prefixes"]
    header += ["operations", "+ prefixes", "differ"]
    legend = (
        "ms for a prompt; ratio: naive / exact, by the clock and in operations; + prefixes: with\n"
        "all prefixes of neighbours made anew; differ: the largest difference between their losses"
    )
    return f"{formula}\n\n{cli.table(lines, header)}\n\n{legend}"


def speed_figure(result: dict, path=None):
    """The layers of the grid beside dense ones; and how times grow."""
    fig, (left, right) = figures.figure(9, 3.4, ncols=2)
    rows = [row for row in result["layers"] if row["backward"]]
    ratios = layer_ratios(rows, True)["dense"]
    top = sorted({row["K"] for row in rows})
    for k, colour in zip(top, figures.COLOURS, strict=False):
        chosen = [i for i, row in enumerate(rows) if row["K"] == k]
        sizes = [rows[i]["K"] * rows[i]["D"] ** 2 / rows[i]["E"] for i in chosen]
        left.loglog(sizes, ratios[chosen], "o", color=colour, label=f"top-{k}", markersize=4)
    left.axhline(1, color=figures.GREY, linewidth=0.8)
    left.set_yticks([1, 1.5, 2, 3, 4, 5], ["1", "1.5", "2", "3", "4", "5"])
    left.minorticks_off()
    left.set_xlabel("K D² / E: work per expert", fontsize=8)
    left.set_title("Time of a MoE layer / a dense one (with backward)", fontsize=9)
    left.legend(fontsize=7, frameon=False)
    for (name, curve), colour in zip(result["growth"].items(), figures.COLOURS, strict=False):
        ms = [1000 * value for value in curve["seconds"]]
        label = f"{name}, slope {curve['slope']:.2f}"
        right.loglog(curve["sizes"], ms, "o-", color=colour, label=label, markersize=3)
    right.set_ylabel("ms", fontsize=8)
    right.set_title("Where one size grows", fontsize=9)
    right.set_ylim(bottom=0.3)  # room for the legend
    right.legend(fontsize=7, frameon=False, loc="lower left")
    return figures.save_figure(fig, path)


def short_table(result: dict) -> str:
    """A line of markdown for each thing that a user waits for: ours over the fastest peer."""
    rows = {}
    for row in result["rows"]:
        peers = [name for name in row["seconds"] if not name.startswith("ours")]
        if peers:
            rows[row["what"]] = row, min(peers, key=lambda name: milliseconds(row, name))
    lines = []
    for what, (row, peer) in rows.items():
        for name in row["seconds"]:
            if name.startswith("ours"):
                low, middle, high = np.quantile(ratio(row, peer, name), [0.25, 0.5, 0.75])
                ours = f"{what}{name.removeprefix('ours')}"
                lines.append([ours, peer, f"{middle:.3g}", f"{low:.3g} to {high:.3g}"])
    for backward in (False, True):
        ratios = layer_ratios(result["layers"], backward)
        for name in ("dense", "transformers"):
            low, middle, high = np.quantile(ratios[name], [0.25, 0.5, 0.75])
            kind = "forward and backward" if backward else "forward"
            what = f"a MoE layer, {kind}; over the grid"
            lines.append([what, name, f"{middle:.3g}", f"{low:.3g} to {high:.3g}"])
    head = ["ours", "over", "time", "quartiles"]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * 4, *lines])


def shorter_table(result: dict) -> str:
    """The lines of `short_table` that the README has: a training step, generating, NGD."""
    chosen = (
        "| ours",
        "| ---",
        "| training",
        "| 96 new",
        "| NGD, toy, 64 tokens, last 2 of 4 layers |",
    )
    lines = short_table(result).splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith(chosen))
