"""Figures of the comparison: effects, robustness, and what composed experts share."""

from itertools import cycle
from pathlib import Path

import numpy as np

from data import perplexity
from lab.composing.sharing import use_ratios
from lab.tools.figures import BLUE, COLOURS, GREY, INK, ORANGE, figure, panels, save_figure


def effects_figure(
    effects: dict,
    margin: float,
    title: str,
    path: Path | None = None,
    declared: str = "",
):
    """Effects with their intervals: name -> Effect. Grey: within the margin, no difference.

    declared: the name of the one whose test was declared beforehand; it stands out."""
    fig, ax = figure(8.4, 1.4 + 0.28 * len(effects))
    ax.axvspan(-margin, margin, color=GREY, alpha=0.25, linewidth=0)
    ax.axvline(0, color=INK, linewidth=0.8)
    style = {"marker": "o", "markersize": 4, "capsize": 2}

    # A line for each effect, coloured where its interval is on one side of 0.
    for row, (middle, low, high, *_) in enumerate(effects.values()):
        colour = INK
        if high < 0:
            colour = BLUE
        if low > 0:
            colour = ORANGE
        ends = [[middle - low], [high - middle]]
        ax.errorbar(middle, row, xerr=ends, color=colour, **style)
    ax.set_yticks(range(len(effects)), effects)
    for name, label in zip(effects, ax.get_yticklabels(), strict=True):
        label.set_weight("bold" if name == declared else "normal")
    ax.set_xlabel("perplexity, percent more or less, with the 95 % interval; left is better")
    note = f"blue: better, orange: worse, grey: within {margin:g} %, no difference"
    if declared in effects:
        note += "; bold: the declared test"
    fig.suptitle(f"{title}\n{note}", fontsize=10, color=INK)
    ax.invert_yaxis()
    return save_figure(fig, path)


def robustness_figure(
    models: dict[str, dict],
    path: Path | None = None,
    leading: tuple[str, ...] = (),
):
    """Perplexity against the share of the routing mass that is lost, and its null.

    Solid: first choices are disabled, for none to all of the tokens. Dashed, the null: the routing
    is disturbed at random, by more and more noise on the logits.

    models: name -> the rows of `measure_robustness`. Where some of them lead, each of the others
    has a small panel of its own below, with the lines of the leading ones behind it.
    """
    large = {name: rows for name, rows in models.items() if name in leading} or models
    small = {name: rows for name, rows in models.items() if name not in large}
    n_rows = -(-len(small) // 4)
    heights = [4.2] + [1.7] * n_rows
    size = {"nrows": 1 + n_rows, "ncols": 4, "height_ratios": heights, "squeeze": False}
    fig, axes = figure(8.4, sum(heights), sharey="row", **size)

    # The models that lead.
    grid = axes[0, 0].get_gridspec()
    for ax in axes[0]:
        ax.remove()
    ax = fig.add_subplot(grid[0, :])
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=INK)
    for (name, rows), colour in zip(large.items(), cycle(COLOURS)):
        masses, perplexities = mass_line(rows, "q", "top-1")
        ax.plot(masses, perplexities, color=colour, linewidth=2, label=name)
        ax.plot(masses[-1], perplexities[-1], "*", color=colour, markersize=13)
        ax.plot(*mass_line(rows, "noise"), "o--", color=colour, linewidth=1.2, markersize=3)
    ax.plot(
        [], [], color=INK, linewidth=2, label="first choices disabled, for 0 to 100 % of tokens"
    )
    ax.plot([], [], "*", color=INK, markersize=10, label="for all tokens: the paper's protocol")
    ax.plot(
        [],
        [],
        "o--",
        color=INK,
        markersize=3,
        label="the null, a random disturbance: noise on the logits",
    )
    ax.set_xlabel("routing mass that is lost (%)", fontsize=9)
    ax.set_title("What wrong routing costs; lower is better", fontsize=10, color=INK)
    ax.legend(fontsize=9, frameon=False)
    perplexity_axis(ax)

    # Each of the others, before them.
    for ax, (name, rows) in zip(axes[1:].flat, small.items(), strict=False):
        for other, colour in zip(large.values(), cycle(COLOURS)):
            ax.plot(*mass_line(other, "q", "top-1"), color=colour, linewidth=1, alpha=0.7)
        ax.plot(*mass_line(rows, "q", "top-1"), color=INK, linewidth=2)
        ax.set_title(name, fontsize=8, color=INK)
        perplexity_axis(ax)
    for ax in axes[1:].flat[len(small) :]:
        ax.set_visible(False)
    return save_figure(fig, path)


def perplexity_axis(ax):
    """A logarithmic axis of perplexities with plain numbers, over per cent of the mass."""
    ax.set(yscale="log", xlim=(-1, 102))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(which="minor", labelsize=7)
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel("perplexity", fontsize=8)


def mass_line(rows: dict, *protocols: str) -> tuple:
    """From intact over these protocols, named by their beginnings: the lost mass, perplexity."""
    keys = [key for key in rows if key.startswith(("intact", *protocols))]
    points = sorted((100 * rows[key]["mass"], perplexity(rows[key]["loss"])) for key in keys)
    return tuple(zip(*points, strict=True))


def sharing_figure(rows: list[dict], title: str, path: Path | None = None):
    """What composed experts share; rows of `measure_sharing`, a panel for each layer.

    From top to bottom: which are visited, how that differs from the product of the margins, and
    how alike they are.
    """
    fig, axes = panels(len(rows), max(2.0, 6 / len(rows)), [2.0, 2.0, 1.9], beside=4)
    top = 100 * max(np.max(row["use"]) for row in rows)
    for (first, second, third), row in zip(axes, rows, strict=True):
        # How often composed experts are visited.
        use = np.array(row["use"])  # (E, E)
        places = range(0, len(use), 1 + len(use) // 8)
        grid = {"xticks": places, "yticks": places}
        grid |= {"xlabel": "expert of B", "ylabel": "expert of A"}
        shade = first.imshow(100 * use, cmap="magma_r", vmin=0, vmax=top)
        first.set(title=f"layer {row['layer']}", **grid)

        # How that differs from the product of the margins; none at all is minus infinity.
        with np.errstate(divide="ignore"):
            ratio = np.log2(use_ratios(use)).clip(-3, 3)
        image = second.imshow(ratio, cmap="PuOr_r", vmin=-3, vmax=3)
        second.set(**grid)
        more = row["information"] - row["shuffled"]
        label = f"information {more:.2f} of {row['most']:.2f} nats"
        second.set_title(label, fontsize=8, color=INK)

        # How alike they are.
        for place, (name, (among_visited, among_all)) in enumerate(row["alike"].items()):
            colour = GREY if name == "share neither" else BLUE
            third.bar(place, among_visited or 0, color=colour, width=0.7)
            third.plot(place, among_all, "o", color=ORANGE, markersize=4)
        low = min(0, third.get_ylim()[0])
        third.set(xticks=range(len(row["alike"])), ylim=(low, 1.05), ylabel="mean cosine")
        names = [name.replace(", ", ",\n").replace("share ", "share\n") for name in row["alike"]]
        third.set_xticklabels(names, fontsize=6)
    fig.colorbar(shade, ax=list(axes[:4, 0]), label="visits (%)", pad=0.01)
    label = "log2 of use /\nproduct of margins"
    fig.colorbar(image, ax=list(axes[:4, 1]), label=label, pad=0.01)
    notes = (
        "top: how often tokens visit each composed expert (A_i, B_j)",
        "middle: more often (orange) or less (violet) than if B's choice ignored A's",
        "bottom: how alike composed experts answer (bars: those that a token visits; dots: all)",
    )
    fig.suptitle("\n".join((title, *notes)), color=INK, fontsize=10)
    return save_figure(fig, path)


# ---- compositions


def composition_figure(
    steps: list[int],
    curves: dict[str, list],
    decays: dict[str, dict[float, list[float]]],
    shares: dict[str, list[float]],
    information: dict[str, list[list[float]]],
    path: Path | None = None,
):
    """Unseen pairs over the steps, by weight decay, at the end, and what a visit tells.

    curves: name -> a share at each of the steps (seeds, S), on dev. decays: name -> weight decay ->
    a share of each dev seed. shares: name -> one of each seed, on test. information: router ->
    bits on f, and on g, of each seed.
    """
    grid = {"nrows": 2, "ncols": 2, "height_ratios": [1, 1.3]}
    fig, ((first, second), (third, last)) = figure(10, 8.5, **grid)
    colours = {"cartesian": BLUE, "fine_grained": ORANGE}

    # Over the steps: a line for each seed, and their mean.
    for name, seeds in curves.items():
        preset, changed, _ = name.partition(",")
        style = {"color": colours[preset], "linestyle": "--" if changed else "-"}
        first.plot(steps, 100 * np.transpose(seeds), alpha=0.25, linewidth=0.6, **style)
        first.plot(steps, 100 * np.mean(seeds, 0), linewidth=2, label=name, **style)
    first.set(xlabel="steps", ylabel="unseen pairs answered right (%)", ylim=(0, 102))
    first.set_title("Pairs of known functions, never seen together (dev)", fontsize=9)
    first.legend(fontsize=7)

    # By weight decay: a point for each dev seed, a line through their means.
    for name, by_decay in decays.items():
        means = [100 * np.mean(values) for values in by_decay.values()]
        second.plot(by_decay.keys(), means, color=colours[name], linewidth=2, label=name)
        for decay, values in by_decay.items():
            points = np.multiply(100, values)
            second.plot([decay] * len(values), points, "o", color=colours[name], markersize=3)
    second.set_xscale("log", base=2)
    second.xaxis.set_major_formatter("{x:g}")
    second.set(xlabel="weight decay", ylabel="unseen pairs answered right (%)", ylim=(0, 102))
    second.set_title("What weight decay does (dev seeds)", fontsize=9)
    second.legend(frameon=False, fontsize=8)

    # At the end: a point for each seed, a bar for their mean.
    for row, (name, values) in enumerate(shares.items()):
        colour = colours.get(name.partition(",")[0], GREY)
        third.barh(row, 100 * np.mean(values), color=colour, alpha=0.45)
        third.plot(np.multiply(100, values), [row] * len(values), "o", color=INK, markersize=3)
    third.set_yticks(range(len(shares)), shares)
    third.invert_yaxis()
    third.set(xlabel="unseen pairs answered right (%)", xlim=(0, 102))
    third.set_title("At the end (test pairs)", fontsize=9)

    # What a visit tells: for each router and function a bar, and a point for each seed.
    for row, both in enumerate(information.values()):
        for place, (colour, bits) in enumerate(zip((BLUE, ORANGE), both, strict=True)):
            label = ("first function, f", "second, g")[place] if row == 0 else None
            height = row + 0.4 * place - 0.2
            last.barh(height, np.mean(bits), 0.38, color=colour, alpha=0.6, label=label)
            last.plot(bits, [height] * len(bits), "o", color=INK, markersize=2)
    last.set_yticks(range(len(information)), information)
    last.invert_yaxis()
    last.set(xlabel="bits that a visited expert tells")
    last.set_title("Which function does a router look at? (trained 0.4)", fontsize=9)
    if information:
        last.legend(frameon=False, fontsize=8)
    return save_figure(fig, path)
