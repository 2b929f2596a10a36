"""Figures of training and routing, and what all figures of the project are made with.

A figure is one function without computation but layout. It returns the figure, and writes it to a
path where one is given.
"""

import ast
from pathlib import Path

import numpy as np

from lab.tools.files import whole

# Colours that colour-blind readers can tell apart.
INK, BLUE, ORANGE, GREY = "#222222", "#0072B2", "#D55E00", "#9a9a9a"
GREEN, VIOLET = "#009E73", "#CC79A7"
COLOURS = (ORANGE, BLUE, GREEN, VIOLET, "#E69F00", "#56B4E9", INK, GREY)

# Scores that the loss figure shows as accuracies, where a task has them: label and colour.
ACCURACIES = {
    "clear": ("clear cues", BLUE),
    "accuracy": ("all prompts", INK),
    "ambiguous": ("ambiguous cues", ORANGE),
}


def figure(width: float, height: float, **grid):
    """A figure of so many inches, and its axes, without pyplot and so without global state."""
    from matplotlib.figure import Figure  # takes a second, which most commands do not need

    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = fig.subplots(**grid)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=INK)
    return fig, axes


def save_figure(fig, path: Path | None):
    """The figure, written to a file where a path is given."""
    if path:
        with whole(Path(path)) as file:
            fig.savefig(file, format=Path(path).suffix[1:])
    return fig


def panels(n: int, width: float, heights: list[float], beside: int = 2):
    """n panels, up to `beside` of them in a row, each made of axes one above the other.

    width: of a panel; heights: of its axes, in inches. Returns the figure and axes (n, heights).
    """
    columns = min(n, beside)
    rows = -(-n // beside)  # rounded up
    fig, axes = figure(
        width * columns + 0.8,
        rows * sum(heights),
        nrows=rows * len(heights),
        ncols=columns,
        height_ratios=heights * rows,
        squeeze=False,
    )
    # One row for each panel: (rows * heights, columns) -> (panels, heights).
    axes = axes.reshape(rows, len(heights), columns)
    axes = axes.swapaxes(1, 2).reshape(-1, len(heights))
    for ax in axes[n:].flat:
        ax.set_visible(False)
    return fig, axes[:n]


# ---- training


def loss_figure(log: list[dict], floor: float, name: str, path: Path | None = None):
    """Training loss, held-out loss and accuracies over the steps.

    floor: the loss of a uniform guess.
    """
    # The accuracies stand in a second panel, where there are some.
    steps = [line["step"] for line in log]
    dev = [line["dev"] for line in log]
    shown = [key for key in ACCURACIES if key in dev[0]]
    if shown:
        fig, (left, right) = figure(8.5, 3.2, ncols=2)
    else:
        fig, left = figure(5.5, 3.2)

    # Losses.
    means = [line["train_loss"] for line in log[1:]]
    left.plot(steps[1:], means, color=BLUE, label="training, mean since the last point")
    held_out = [scores["loss"] for scores in dev]
    points = {"marker": "o", "markersize": 3}
    left.plot(steps, held_out, color=ORANGE, label="held-out (dev)", **points)
    left.axhline(floor, color=GREY, linestyle=":", label="uniform guess")
    left.set(title=f"Cross-entropy, {name}", xlabel="step", ylabel="nats per token", ylim=(0, None))
    left.legend(fontsize=7, frameon=False)

    # Accuracies.
    if shown:
        for key in shown:
            label, colour = ACCURACIES[key]
            percent = [100 * scores[key] for scores in dev]
            right.plot(steps, percent, color=colour, label=label, **points)
        right.set(title="Accuracy on held-out prompts (dev)", xlabel="step")
        right.set(ylabel="accuracy (%)", ylim=(0, 100))
        right.legend(fontsize=7, frameon=False)
    return save_figure(fig, path)


# ---- routing


def preference(shares: np.ndarray) -> np.ndarray:
    """shares (R, E) -> the order (E,) of the experts, by the kind of token that each prefers."""
    favourite = shares.argmax(0)
    return np.lexsort((-shares.max(0), favourite))


def readable(kind: str) -> str:
    """A kind of token as people read it. Tokens of a text are named by their `repr`.

    >>> [readable(kind) for kind in ("max(a, b)", "' the'", "'ing'", "'.'", "'\\\\n'")]
    ['max(a, b)', 'the', '…ing', '.', 'line end']
    """
    if kind[0] not in "'\"":
        return kind
    text = ast.literal_eval(kind)
    if text == "\n":
        return "line end"
    if text[0] == " " and text[1:].isalpha():  # a word begins
        return text[1:]
    if kind[1].isalpha():  # a word goes on
        return f"…{text}"
    return text.replace(" ", "␣")


def routing_figure(
    shares: np.ndarray,
    kinds: list[str],
    places: list[str],
    title: str,
    path: Path | None = None,
):
    """Which expert does what; experts stand in the order of the kind that they prefer.

    shares (L, R, E): the share of the tokens of each kind that visit each expert. The bars above
    are the means over these kinds.
    """
    L, R, E = shares.shape  # L routers
    step = 1 if E <= 16 else -(-E // 10)  # of more, ten are named
    fig, axes = panels(L, 2.9, [1.0, 0.5 + 0.22 * R])
    means = 100 * shares.mean(1)  # (L, E)
    for router, (top, ax) in enumerate(axes):
        # Above: all kinds together.
        order = preference(shares[router])
        top.bar(range(E), means[router, order], color=BLUE, width=0.8)
        top.axhline(means[router].mean(), color=ORANGE, linewidth=1, linestyle="--")
        top.set(xticks=[], xlim=(-0.5, E - 0.5), ylim=(0, 1.15 * means.max()))
        top.set_title(places[router], fontsize=10)

        # Below: each kind.
        look = {"cmap": "magma_r", "vmin": 0, "vmax": 100, "aspect": "auto"}
        image = ax.imshow(100 * shares[router][:, order], **look)
        ax.set(xticks=range(0, E, step), yticks=range(R))
        ax.set_xticklabels(order[::step], fontsize=7)
        ax.set_xlabel("expert, sorted by what it prefers", fontsize=8)
        if router % 2 == 0:  # on the left
            top.set_ylabel("mean (%)", fontsize=8)
            ax.set_yticklabels([readable(kind) for kind in kinds])
        else:
            ax.set_yticklabels([])
    fig.colorbar(image, ax=list(axes[:, 1]), label="tokens that visit it (%)", pad=0.01, aspect=40)
    fig.suptitle(f"{title}\nbars: the mean of the rows below; dashed: an even share", fontsize=11)
    return save_figure(fig, path)
