"""Figures: one function each, no computation but layout; each returns its figure, and writes it to a path if given."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lab.sharing import ratios

INK, BLUE, ORANGE, GREY = "#222222", "#0072B2", "#D55E00", "#9a9a9a"  # told apart by colour-blind readers as well
COLOURS = (ORANGE, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, GREY)


def figure(width, height, **grid):
    """A figure without pyplot (and so without global state), and its axes."""
    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = fig.subplots(**grid)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=INK)
    return fig, axes


def keep(fig, path: Path | None):
    """The figure, written to a file where a path is given."""
    if path:
        fig.savefig(path)
    return fig


def loss_figure(log: list[dict], floor: float, name: str, path: Path | None = None):
    """Training loss, held-out loss and held-out accuracy over the steps; `floor` is the loss of a uniform guess."""
    steps, dev = [line["step"] for line in log], [line["dev"] for line in log]
    scored = "accuracy" in dev[0]
    fig, axes = figure(8.5 if scored else 5.5, 3.2, ncols=2 if scored else 1, squeeze=False)
    ax = axes[0, 0]
    means = [line["train_loss"] for line in log[1:]]
    ax.plot(steps[1:], means, color=BLUE, label="training, mean since the last point")
    ax.plot(steps, [d["loss"] for d in dev], color=ORANGE, marker="o", markersize=3, label="held-out (dev)")
    ax.axhline(floor, color=GREY, linestyle=":", label="uniform guess")
    ax.set(title=f"Cross-entropy, {name}", xlabel="step", ylabel="nats per token", ylim=(0, None))
    ax.legend(fontsize=7, frameon=False)
    if scored:
        ax = axes[0, 1]
        for key, colour in (("clear", BLUE), ("accuracy", INK), ("ambiguous", ORANGE)):
            label = {"accuracy": "all prompts"}.get(key, f"{key} cues")
            ax.plot(steps, [100 * d[key] for d in dev], color=colour, marker="o", markersize=3, label=label)
        ax.set(title="Accuracy on held-out prompts (dev)", xlabel="step", ylabel="accuracy (%)", ylim=(0, 100))
        ax.legend(fontsize=7, frameon=False)
    return keep(fig, path)


def preference(shares: np.ndarray) -> np.ndarray:
    """The order (E,) of experts by the kind of token, a row of shares (R, E), that they prefer."""
    return np.lexsort((-shares.max(0), shares.argmax(0)))


def panels(n: int, width: float, heights: list[float], beside: int = 2, **grid):
    """n panels, some beside each other, each of parts one above the other -> the figure, axes (n, parts)."""
    columns, rows = min(n, beside), -(-n // beside)
    size = (width * columns + 0.8, rows * sum(heights))
    fig, axes = figure(*size, nrows=rows * len(heights), ncols=columns, height_ratios=heights * rows, squeeze=False)
    axes = axes.reshape(rows, len(heights), columns).swapaxes(1, 2).reshape(-1, len(heights))  # a row a panel
    for ax in axes[n:].flat:
        ax.set_visible(False)
    return fig, axes[:n]


def routing_figure(
    shares: np.ndarray, load: np.ndarray, kinds: list[str], places: list[str], title: str, path: Path | None = None
):
    """Which expert does what: shares (L, R, E), the share of the tokens of each kind that visit each expert, and above
    it load (L, E), the share of all tokens that do. Experts stand in the order of the kind they prefer."""
    L, R, E = shares.shape  # L routers
    fig, axes = panels(L, 2.9, [1.1, 0.5 + 0.22 * R])
    for router, (top, ax) in enumerate(axes):
        order, first = preference(shares[router]), router % 2 == 0
        top.bar(range(E), 100 * load[router, order], color=BLUE, width=0.8)
        top.axhline(100 * load[router].mean(), color=ORANGE, linewidth=1, linestyle="--")
        top.set(title=places[router], xticks=[], xlim=(-0.5, E - 0.5), ylim=(0, 115 * load.max()))
        image = ax.imshow(100 * shares[router][:, order], cmap="magma_r", vmin=0, vmax=100, aspect="auto")
        ax.set(xticks=range(E), yticks=range(R), xlabel="expert (sorted by what it prefers)")
        ax.set_xticklabels(order, fontsize=6 if E <= 24 else 4)
        ax.set_yticklabels(kinds if first else [])
        top.set_ylabel("all tokens\n(%)" if first else "", fontsize=8)
    fig.colorbar(image, ax=list(axes[:, 1]), label="tokens that visit it (%)", pad=0.01)
    fig.suptitle(title + "   (dashed: even load)", color=INK)
    return keep(fig, path)


def together_figure(together: np.ndarray, shares: np.ndarray, places: list[str], title: str, path: Path | None = None):
    """Co-activation: together (L, E, E), the share of the tokens of expert i that also visit expert j."""
    L, E, _ = together.shape  # L routers
    fig, axes = panels(L, 2.6, [3.1])
    for router, (ax,) in enumerate(axes):
        order = preference(shares[router])
        part = 100 * together[router][np.ix_(order, order)]
        np.fill_diagonal(part, np.nan)  # an expert is always together with itself
        image = ax.imshow(part, cmap="magma_r", vmin=0, vmax=100 * np.nanmax(together - np.eye(E)))
        ax.set(title=places[router], xticks=range(E), yticks=range(E), xlabel="also visit expert")
        ax.set_xticklabels(order, fontsize=5 if E <= 24 else 3)
        ax.set_yticklabels(order, fontsize=5 if E <= 24 else 3)
        ax.set_ylabel("tokens of expert" if router % 2 == 0 else "")
    fig.colorbar(image, ax=list(axes[:, 0]), label="share (%)", pad=0.01)
    fig.suptitle(title, color=INK)
    return keep(fig, path)


def methods_figure(rows: dict[str, dict], title: str, path: Path | None = None):
    """Accuracy by method as points with the interval of their gain, base as a line; the null stands apart."""
    names = [name for name in rows if name != "oracle's null"]
    fig, ax = figure(7.5, 1.2 + 0.27 * len(names))
    base, places = 100 * rows["base"]["accuracy"], range(len(names))[::-1]
    for place, name in zip(places, names, strict=True):
        row = {key: 100 * rows[name][key] for key in ("accuracy", "low", "high")}
        colour = ORANGE if name in ("NGD", "kernel regression", "mode finding") else GREY if name == "oracle" else BLUE
        ax.plot([base + row["low"], min(base + row["high"], 100)], [place, place], color=colour, linewidth=2)
        ax.plot(row["accuracy"], place, "o", color=colour, markersize=5)
        frame = ("axes fraction", "data")
        ax.annotate(f"{row['accuracy']:.1f}", (1.01, place), xycoords=frame, va="center", fontsize=8)
    ax.axvline(base, color=INK, linewidth=1, linestyle=":", label="the model as it is")
    for colour, label in ((ORANGE, "C3PO"), (BLUE, "controls and rivals"), (GREY, "the oracle: sees the label")):
        ax.plot([], [], "o", color=colour, markersize=5, label=label)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1.04), "ncols": 4}
    ax.legend(fontsize=8, frameon=False, borderpad=0, handletextpad=0, **above)
    ax.set(yticks=list(places), yticklabels=names, xlabel="accuracy (%), with the 95 % interval of the gain over base")
    fig.suptitle(title, color=INK, fontsize=10)
    return keep(fig, path)


def oracle_figure(steps: list[int], reach: dict[str, list[float]], title: str, path: Path | None = None):
    """How many samples an optimiser leads to its target, the right label or a wrong one, by its number of steps."""
    fig, ax = figure(5.5, 3.2)
    for (name, shares), colour in zip(reach.items(), (ORANGE, BLUE), strict=True):
        target = "the right label (oracle)" if name == "oracle" else "a random wrong label (its null)"
        ax.plot(steps, [100 * share for share in shares], "o-", color=colour, markersize=3, label=f"towards {target}")
    ax.set(xlabel="steps of gradient descent", ylabel="prompts that get there (%)", ylim=(0, 102), xticks=steps)
    ax.set_title(title, color=INK, fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="center right")
    return keep(fig, path)


def pathway_figure(panels: dict[str, np.ndarray], rows: list[str], title: str, path: Path | None = None):
    """Pathways (R, E), routers by experts, side by side; of several tokens, one below the other."""
    R, E = next(iter(panels.values())).shape
    fig, axes = figure(1.0 + 2.3 * len(panels), 1.5 + 0.22 * R, ncols=len(panels), squeeze=False)
    for ax, (name, pathway) in zip(axes[0], panels.items(), strict=True):
        top = 100 * max(w.max() for w in panels.values())
        image = ax.imshow(100 * pathway, cmap="magma_r", vmin=0, vmax=top, aspect="auto")
        ax.set(title=name, xlabel="expert", xticks=range(0, E, -(-E // 8)), yticks=range(R))
        ax.title.set_fontsize(9)
        ax.set_yticklabels(rows * (R // len(rows)) if ax is axes[0, 0] else [])
    fig.colorbar(image, ax=axes[0, :], label="weight (%)", pad=0.01)
    fig.suptitle(title, color=INK, fontsize=10)
    return keep(fig, path)


def example_figure(losses: dict[str, np.ndarray], answers: dict[str, np.ndarray], marks: dict[int, str], title: str,
                   path: Path | None = None):  # fmt: skip
    """Losses by the steps of an optimiser, and the probabilities of all answers along two pathways; marks: answer -> a
    word on it."""
    fig, (ax, right) = figure(9, 3.2, ncols=2, width_ratios=[1, 1.5])
    for (name, values), colour in zip(losses.items(), (ORANGE, GREY), strict=True):
        ax.plot(values, color=colour, marker="o", markersize=3, label=name)
    ax.set(xlabel="step", ylabel="neighbours' loss (nats)", ylim=(0, None))
    ax.legend(fontsize=8, frameon=False)
    for side, (name, shares), colour in zip((-0.2, 0.2), answers.items(), (BLUE, ORANGE), strict=True):
        right.bar(np.arange(len(shares)) + side, 100 * shares, color=colour, width=0.4, label=name)
    for answer, text in marks.items():
        top = 100 * max(shares[answer] for shares in answers.values())
        right.annotate(text, (answer, top), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=INK,
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    right.set(xlabel="answer", ylabel="probability (%)", xticks=range(len(shares)))
    right.margins(y=0.2)
    right.legend(fontsize=8, frameon=False)
    fig.suptitle(title, color=INK, fontsize=10)
    return keep(fig, path)


def sweeps_figure(found: dict[str, dict], title: str, path: Path | None = None):
    """The gain of NGD with one setting varied at a time, a panel each, with 95 % intervals."""
    n = -(-len(found) // 3)  # rows of panels
    fig, axes = figure(9.5, 2.7 * n, nrows=n, ncols=3, sharey=True)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, (what, rows) in zip(axes.flat, found.items(), strict=False):
        places = range(len(rows))
        for place, row in zip(places, rows.values(), strict=True):
            ax.plot([place, place], [100 * row["low"], 100 * row["high"]], color=BLUE, linewidth=2)
        ax.plot(places, [100 * row["gain"] for row in rows.values()], "o", color=BLUE, markersize=4)
        ax.axhline(0, color=INK, linewidth=1, linestyle=":")
        tilt = {"rotation": 25, "ha": "right"} if max(map(len, rows)) > 4 else {}
        ax.set_xticks(list(places), list(rows), fontsize=7, **tilt)
        ax.set_title(what, fontsize=9, color=INK)
    for ax in axes[:, 0]:
        ax.set_ylabel("gain over base (points)", fontsize=8)
    fig.suptitle(title, color=INK)
    return keep(fig, path)


def effects_figure(effects: dict[str, list[float]], margin: float, title: str, path: Path | None = None):
    """Effects in percent, with their intervals: name -> [mean, low, high]; grey: within the margin, no difference."""
    fig, ax = figure(6.5, 1.2 + 0.28 * len(effects))
    ax.axvspan(-margin, margin, color=GREY, alpha=0.25, linewidth=0)
    ax.axvline(0, color=INK, linewidth=0.8)
    for row, (mean, low, high) in enumerate(effects.values()):
        colour = BLUE if high < 0 else ORANGE if low > 0 else INK
        ax.errorbar(mean, row, xerr=[[mean - low], [high - mean]], color=colour, marker="o", markersize=4, capsize=2)
    ax.set(yticks=range(len(effects)), xlabel="perplexity, percent more or less (95 %)")
    ax.set_title(f"{title} (grey: no difference, {margin:g} %)", fontsize=10, color=INK)
    ax.set_yticklabels(effects)
    ax.invert_yaxis()
    return keep(fig, path)


def robustness_figure(points: dict[str, dict], path: Path | None = None, leading: tuple[str, ...] = ()):
    """Perplexity against the share of the routing mass that is lost: model -> protocol -> [mass, perplexity]. The
    leading models, if any, are drawn wider than the others."""
    fig, ax = figure(9, 5.5)
    marks = {"top-1": "*", "rescaled": "P", "A": "<", "B": ">", "a quarter": "s", "a half": "D", "layer": "."}
    marks |= {"not": "v", "noise": "x"}
    for index, (name, found) in enumerate(points.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index < len(COLOURS) else "--"}
        style |= {"alpha": 0.6 if leading and name not in leading else 1.0, "linewidth": 2 if name in leading else 1}
        line = sorted(found[p] for p in found if p[0] == "q" or p in ("intact", "top-1"))
        ax.plot(*zip(*line, strict=True), **style, label=name)
        for protocol, (mass, perplexity) in found.items():
            mark = marks.get(protocol, marks.get(protocol.split()[0], ""))
            size = {"*": 12, ".": 5}.get(mark, 4)
            fill = "none" if mark in "*D" else "full"  # so that what coincides is seen
            ax.plot(mass, perplexity, mark, color=style["color"], alpha=style["alpha"], markersize=size, fillstyle=fill)
    for protocol, mark in marks.items():
        told = {"not": "all but the first layer", "top-1": "top-1 everywhere (the paper)", "layer": "one layer"}
        told |= {"A": "A only", "B": "B only", "a quarter": "a quarter of a token's experts", "a half": "a half"}
        told |= {"rescaled": "top-1, the others rescaled", "noise": "noise on the logits"}
        ax.plot([], [], mark, color=INK, markersize=5, label=told[protocol])
    ax.set(yscale="log", xlabel="share of the routing mass that is lost", ylabel="perplexity", xlim=(-0.01, None))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(which="minor", labelsize=6)
    ax.set_title("Lines: each token's first choice is disabled with probability 0 to 1", fontsize=9, color=INK)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    return keep(fig, path)


def sharing_figure(rows: list[dict], title: str, path: Path | None = None):
    """Which composed experts are visited, how that differs from the product of the margins, and how alike they are; a
    row of `lab.sharing.sharing` for each layer."""
    fig, axes = panels(len(rows), max(2.0, 6 / len(rows)), [2.0, 2.0, 1.9], beside=4)
    top = max(np.max(row["use"]) for row in rows)
    for (first, second, third), row in zip(axes, rows, strict=True):
        use = np.array(row["use"])  # (E, E)
        with np.errstate(divide="ignore"):
            ratio = np.log2(ratios(use)).clip(-3, 3)
        ticks = {axis: range(0, len(use), 1 + len(use) // 8) for axis in ("xticks", "yticks")}
        shade = first.imshow(100 * use, cmap="magma_r", vmin=0, vmax=100 * top)
        image = second.imshow(ratio, cmap="PuOr_r", vmin=-3, vmax=3)
        more = row["information"] - row["shuffled"]
        first.set(title=f"layer {row['layer']}", xlabel="expert of B", ylabel="expert of A", **ticks)
        second.set(xlabel="expert of B", ylabel="expert of A", **ticks)
        second.set_title(f"information {more:.2f} of {row['most']:.2f} nats", fontsize=8, color=INK)
        for place, (name, (visited, every)) in enumerate(row["alike"].items()):
            third.bar(place, visited or 0, color=GREY if name == "share neither" else BLUE, width=0.7)
            third.plot(place, every, "o", color=ORANGE, markersize=4)
        third.set(xticks=range(len(row["alike"])), ylim=(min(0, third.get_ylim()[0]), 1.05), ylabel="mean cosine")
        names = [name.replace(", ", ",\n").replace("share ", "share\n") for name in row["alike"]]
        third.set_xticklabels(names, fontsize=6)
    fig.colorbar(shade, ax=list(axes[:4, 0]), label="visits (%)", pad=0.01)
    fig.colorbar(image, ax=list(axes[:4, 1]), label="log2 of use /\nproduct of margins", pad=0.01)
    note = "bars: outputs of composed experts that the token visits; dots: of all"
    fig.suptitle(f"{title}\n{note}", color=INK, fontsize=10)
    return keep(fig, path)


def curves_figure(steps: list[int], panels: dict[str, dict[str, list[float]]], title: str, path: Path | None = None):
    """Lines over the training steps, a panel for each quantity: its label -> name of the run -> values."""
    fig, axes = figure(0.4 + 3.2 * len(panels), 2.9, ncols=len(panels), squeeze=False)
    for ax, (label, lines) in zip(axes[0], panels.items(), strict=True):
        for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
            ax.plot(steps, values, color=colour, label=name)
        ax.set(xlabel="step", ylabel=label)
    axes[0, 0].legend(fontsize=7, frameon=False)
    fig.suptitle(title, color=INK, fontsize=10)
    return keep(fig, path)


def load_figure(steps: list[int], loads: dict, places: list[str], title: str, path: Path | None = None):
    """Load over the training steps: name of a run -> shares of visits (L, E) at each; experts by their final load."""
    L, E = next(iter(loads.values()))[0].shape
    fig, axes = figure(1.2 + 2.6 * len(loads), 0.7 + 1.7 * L, nrows=L, ncols=len(loads), squeeze=False)
    for column, (name, load) in zip(axes.T, loads.items(), strict=True):
        for place, ax in enumerate(column):
            part = np.stack(load)[:, place] / load[0][place].mean()  # (S, E) in even shares
            edges = (1.5 * steps[0] - 0.5 * steps[1], 0.5 * steps[-1] - 0.5 * steps[-2] + steps[-1], -0.5, E - 0.5)
            part = part[:, part[-1].argsort()].T
            image = ax.imshow(part, cmap="magma_r", vmin=0, vmax=4, aspect="auto", origin="lower", extent=edges)
            ax.set(title="" if place else name, xlabel="step" if place == L - 1 else "", yticks=[])
            ax.set_ylabel(f"{places[place]}\nexperts" if ax is axes[place, 0] else "", fontsize=8)
            ax.title.set_fontsize(9)
    fig.colorbar(image, ax=axes, label="visits, in even shares", pad=0.01)
    fig.suptitle(title, color=INK, fontsize=10)
    return keep(fig, path)
