"""Figures of re-mixing: one function each, no computation but layout.

Each returns its figure, and writes it to a path where one is given.
"""

from pathlib import Path

import numpy as np

from lab.remixing.reach import RIGHT, WRONG
from lab.remixing.tables import WRONG_LABEL
from lab.tools.figures import BLUE, GREEN, GREY, INK, ORANGE, VIOLET, figure, save_figure
from lab.tools.statistics import with_interval

METHOD_GROUPS = {  # what methods are -> colour, methods; all others are rivals
    "C3PO": (ORANGE, ("NGD", "kernel regression", "mode finding")),
    "our own: with references answered wrong, corrections": (
        GREEN,
        ("unfiltered tuned", "unfiltered", "corrections", "mended pathways"),
    ),
    "rivals": (BLUE, ()),
    "controls: random or shuffled": (
        VIOLET,
        ("random neighbours", "shuffled labels", "shuffled corrections"),
    ),
    "sees the label": (GREY, ("oracle",)),
}
PAPER_SETTINGS = {  # settings of the paper, where the sweep has them
    "steps": "10",
    "neighbours": "3",
    "kernel": "gaussian",
    "token": "last",
    "what is moved, by which step": "raw plain 0.01",
}
FEWEST_TARGETS = 10  # a point of the matched null stands for so many targets at least
TICKS = (0.0002, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def contest_figures(result: dict, stem: str) -> list[Path]:
    """The figures of a contest: accuracy by method; a pathway before and after. stem: the paths
    begin with it."""
    paths = [Path(f"{stem}{end}.png") for end in ("", "-pathway")]
    methods_figure(result["rows"], result["title"], paths[0])

    example = result["example"]
    before, after = example["right"]
    text = f"A prompt that NGD helps: {example.get('words') or example['tokens']}\n"
    text += f"The right answer's probability goes from {before:.0%} to {after:.0%}"
    shown = list(example["panels"].items())[:3]  # of the neighbours only the nearest
    pathways = {name: np.array(rows) for name, rows in shown}
    pathway_figure(pathways, example["rows"], text, paths[1], example.get("top_k"))
    return paths


def grouped(names) -> list[tuple[str, str, list[str]]]:
    """The methods in the order of METHOD_GROUPS -> group, colour, its methods."""
    known = [name for _, methods in METHOD_GROUPS.values() for name in methods]
    groups = []
    for group, (colour, methods) in METHOD_GROUPS.items():
        if group == "rivals":
            methods = [name for name in names if name not in known]
        groups.append((group, colour, [name for name in methods if name in names]))
    return [group for group in groups if group[2]]


def methods_figure(rows: dict[str, dict], title: str, path: Path | None = None):
    """Accuracy by method, in groups, the best of each on top, with the interval of the gain.
    WRONG_LABEL is left out."""
    names = [name for name in rows if name not in ("base", WRONG_LABEL)]
    groups = grouped(names)
    fig, ax = figure(8.4, 1.5 + 0.24 * (len(names) + len(groups)))
    base = 100 * rows["base"]["accuracy"]
    ax.axvline(base, color=INK, linewidth=1, linestyle=":")
    height, ticks = 0, {}
    for group, colour, methods in groups:
        # The name of a group.
        ax.text(
            0,
            height,
            group,
            color=colour,
            fontsize=9,
            weight="bold",
            va="center",
            transform=ax.get_yaxis_transform(),
        )
        height += 1

        # Its methods, the best one first: accuracy, and the interval of the gain around it.
        for name in sorted(methods, key=lambda name: -rows[name]["accuracy"]):
            row, accuracy = rows[name], 100 * rows[name]["accuracy"]
            ends = [base + 100 * row["low"], min(base + 100 * row["high"], 100)]
            ax.plot(ends, [height, height], color=colour, linewidth=2)
            ax.plot(accuracy, height, "o", color=colour, markersize=5)
            beside = (1.01, height)
            place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
            ax.annotate(f"{accuracy:.1f}", beside, **place)
            ticks[height] = name
            height += 1

    # Axes and title.
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.set(ylim=(height - 0.4, -0.7))
    ax.set_xlabel("right answers (%), with the 95 % interval of the gain; right is better")
    message = f"the model as it is (dotted) answers {base:.1f} % right"
    if "NGD" in rows:
        message += f", with NGD {100 * rows['NGD']['accuracy']:.1f} %"
    fig.suptitle(f"{title}: {message}", color=INK, fontsize=11)
    return save_figure(fig, path)


def reach_figure(reach: dict, title: str, path: Path | None = None):
    """How often the oracle's steps reach a label, against the label's probability beforehand.

    reach: of reach.py; the right label beside wrong ones."""
    fig, ax = figure(7, 3.8)
    styles = {
        RIGHT: ("the right label of prompts answered wrong", ORANGE, "o"),
        WRONG: ("wrong labels of the same prompts", BLUE, "s"),
    }
    for name, (label, colour, marker) in styles.items():
        # A point for each bin of the prior, with its interval, and a line through them.
        rows = [row for row in reach[name] if row["targets"] >= FEWEST_TARGETS]
        prior = [row["prior"] for row in rows]
        for row in rows:
            ends = [100 * row["low"], 100 * row["high"]]
            ax.plot([row["prior"]] * 2, ends, color=colour, linewidth=2, alpha=0.6)
        share = [100 * row["mean"] for row in rows]
        ax.plot(prior, share, color=colour, marker=marker, markersize=5, label=label)

    # Axes and legend.
    ax.set_xscale("log")
    ax.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    ax.minorticks_off()
    ax.set(xlabel="the label's probability along the model's own pathway", ylim=(0, 102))
    ax.set_ylabel("led to that label by ten steps (%)")
    ax.set_title(title, color=INK, fontsize=11)
    ax.legend(fontsize=9, frameon=False, loc="upper left")
    return save_figure(fig, path)


def knowledge_figure(result: dict, title: str, path: Path | None = None):
    """Left: what explains the variance of pathways. Right: what is answered along them.

    result: of knowledge.py. Beside each bar stands its orange share, with its interval."""
    fig, (left, right) = figure(9.5, 3.5, ncols=2)
    explained = {
        "natural pathways": result["variance"]["natural"],
        "mended pathways": result["variance"]["mended"],
        "corrections": result["variance"]["corrections"],
    }
    stacked(left, explained, ("#9a9a9a", "#d0d0d0", ORANGE, "#56B4E9"))
    left.set(xlabel="what explains their variance (%)")

    answered = {
        "along its own\npathway": result["exchange"]["natural"],
        "along the other\nreading's, natural": result["exchange"]["natural, other reading"],
        "along the other\nreading's, mended": result["exchange"]["mended, other reading"],
    }
    stacked(right, answered, (BLUE, ORANGE, "#d0d0d0"))
    right.set(xlabel="what a prompt of an ambiguous cue answers (%)")
    fig.suptitle(title, color=INK, fontsize=11)
    return save_figure(fig, path)


def stacked(ax, bars: dict[str, dict], colours: tuple):
    """Horizontal bars of shares that sum to 1, the first bar on top, with a legend above."""
    for height, shares in enumerate(bars.values()):
        start = 0.0
        for row, colour in zip(shares.values(), colours, strict=True):
            # A piece of the bar, with its number if there is room.
            width = 100 * row["mean"]
            ax.barh(height, width, left=start, color=colour, height=0.62)
            if width > 6:
                ink = "white" if colour in (BLUE, ORANGE) else INK
                place = (start + width / 2, height)
                ax.text(*place, f"{width:.0f}", ha="center", va="center", color=ink, fontsize=10)

            # The interval of the orange one stands beside the bar.
            if colour == ORANGE:
                text = with_interval(row).replace(" (", "\n(").replace("-0.0%", "0.0%")
                ax.text(102, height, text, va="center", color=ORANGE, fontsize=9)
            start += width

    # The legend: bars without a width.
    names = next(iter(bars.values()))
    for name, colour in zip(names, colours, strict=True):
        ax.barh(0, 0, color=colour, label=name)
    ax.legend(fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    ax.set(xlim=(0, 100))
    ax.set_yticks(range(len(bars)), list(bars), fontsize=9)
    ax.invert_yaxis()


def pathway_figure(
    pathways: dict[str, np.ndarray],
    rows: list[str],
    title: str,
    path: Path | None = None,
    top_k: int | None = None,
    changes: bool = True,
):
    """Pathways (R, E), routers by experts, side by side, the first layer at the bottom; of several
    tokens, one above the other.

    rows: the names of the routers. top_k: frame what is visited. changes: in blue where the first
    pathway does not visit it."""
    from matplotlib.patches import Rectangle  # as late as in lab/tools/figures.py

    R, E = next(iter(pathways.values())).shape
    n = len(pathways)
    fig, axes = figure(1.0 + 2.4 * n, 1.8 + 0.26 * R, ncols=n, squeeze=False)
    largest = 100 * max(pathway.max() for pathway in pathways.values())
    step = -(-E // 8)  # at most eight ticks
    first = visited_experts(next(iter(pathways.values())), top_k or 0)
    for ax, (name, pathway) in zip(axes[0], pathways.items(), strict=True):
        # The weights as shades.
        look = {"cmap": "Greys", "vmin": 0, "vmax": largest, "aspect": "auto", "origin": "lower"}
        image = ax.imshow(100 * pathway, **look)

        # A frame around each visited expert.
        for r, e in sorted(visited_experts(pathway, top_k or 0)):
            colour = BLUE if changes and (r, e) not in first else ORANGE
            box = {"fill": False, "edgecolor": colour, "linewidth": 1.8}
            ax.add_patch(Rectangle((e - 0.42, r - 0.42), 0.84, 0.84, **box))
        ax.set(xlabel="expert", xticks=range(0, E, step), yticks=range(R), yticklabels=[])
        ax.set_title(name, fontsize=10)
    axes[0, 0].set_yticklabels(rows * (R // len(rows)))
    fig.colorbar(image, ax=axes[0, :], label="weight (%)", pad=0.01)
    if top_k:
        title += "\nframed: the experts that are visited"
        title += "; blue: those that the first pathway does not visit" if changes else ""
    fig.suptitle(title, color=INK, fontsize=10)
    return save_figure(fig, path)


def visited_experts(pathway: np.ndarray, top_k: int) -> set[tuple[int, int]]:
    """The experts that a pathway (R, E) visits: pairs of row and expert."""
    best = np.argsort(-pathway, axis=1)[:, :top_k]
    return {(r, int(e)) for r, row in enumerate(best) for e in row}


def sweeps_figure(sweeps: dict[str, dict], title: str, path: Path | None = None):
    """The gain of NGD with one setting varied at a time, a panel each, with 95 % intervals.

    Orange: the setting that NGD has here, which changes nothing; ringed: the paper's."""
    n_rows = -(-len(sweeps) // 3)
    fig, axes = figure(9.5, 2.7 * n_rows, nrows=n_rows, ncols=3, sharey=True)
    for ax in axes.flat[len(sweeps) :]:
        ax.set_visible(False)
    for ax, (what, rows) in zip(axes.flat, sweeps.items(), strict=False):
        # The intervals.
        places = list(range(len(rows)))
        for place, row in zip(places, rows.values(), strict=True):
            interval = [100 * row["low"], 100 * row["high"]]
            ax.plot([place, place], interval, color=BLUE, linewidth=2)

        # The gains, those of our setting and of the paper's marked.
        for place, (value, row) in zip(places, rows.items(), strict=True):
            own = row["change"]["low"] == row["change"]["high"] == 0
            ax.plot(place, 100 * row["gain"], "o", color=ORANGE if own else BLUE, markersize=5)
            if value == PAPER_SETTINGS.get(what):
                ring = {"color": INK, "fillstyle": "none", "markersize": 11}
                ax.plot(place, 100 * row["gain"], "o", **ring)

        # The values of the setting below them.
        ax.axhline(0, color=INK, linewidth=1, linestyle=":")
        ax.set_xticks(places, list(rows), fontsize=7)
        if max(len(value) for value in rows) > 4:  # long labels
            ax.set_xticks(places, list(rows), fontsize=7, rotation=25, ha="right")
        ax.set_title(what, fontsize=9, color=INK)
    for ax in axes[:, 0]:
        ax.set_ylabel("gain over base (points)", fontsize=8)
    legend = "orange: NGD as it is here; ringed: the paper's setting"
    fig.suptitle(f"{title}\n{legend}", color=INK)
    return save_figure(fig, path)
