"""Pictures of ideas, for the notebooks and the README: boxes, arrows and toy landscapes; no results."""

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lab.plots import BLUE, COLOURS, GREY, INK, ORANGE, figure


def canvas(width: float, height: float, title: str = ""):
    """A figure in inches with one empty axes, whose units are inches too -> (figure, axes)."""
    fig, ax = figure(width, height)
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    ax.set_title(title, color=INK, fontsize=10)
    return fig, ax


def box(ax, x: float, y: float, text: str, width: float = 1.0, height: float = 0.4, colour: str = GREY, strong=False):
    """A rounded box around the point (x, y), filled if strong."""
    style = {"facecolor": colour if strong else "white", "edgecolor": colour, "linewidth": 1.5}
    shape = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08")
    shape.set(**style)
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if strong else INK)


def arrow(ax, start, end, colour: str = INK, width: float = 1.2, text: str = ""):
    """An arrow from a point to another, with a label at its middle."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=width))
    if text:
        ax.text(
            (start[0] + end[0]) / 2, (start[1] + end[1]) / 2, text, fontsize=8, color=colour, ha="left", va="bottom"
        )


# The pictures, in the order of the notebooks.


def stack(ax, x: float, visited: list[tuple], colour: str):
    """Four layers of six experts around x, those visited filled and joined: a pathway. Its ends are for arrows."""
    for layer, chosen in enumerate(visited):
        for expert in range(6):
            on = expert in chosen
            box(ax, x + 0.27 * (expert - 2.5), 1.35 + 0.5 * layer, "", 0.2, 0.2, colour if on else "#d5d5d5", on)
            for after in visited[layer + 1] if on and layer < 3 else ():
                ends = (x + 0.27 * (expert - 2.5), x + 0.27 * (after - 2.5)), (1.47 + 0.5 * layer, 1.73 + 0.5 * layer)
                ax.plot(*ends, color=colour, linewidth=1)
    arrow(ax, (x, 0.75), (x, 1.15), colour)
    arrow(ax, (x, 3.05), (x, 3.4), colour)


def remixing():
    """C3PO in one picture: a prompt along its own pathway, its neighbours along a candidate, the prompt along that."""
    fig, ax = canvas(9.4, 4.2)
    stack(ax, 1.3, [(0, 3), (1, 2), (1, 4), (0, 4)], BLUE)
    stack(ax, 4.7, [(0, 2), (2, 5), (1, 5), (3, 4)], ORANGE)
    stack(ax, 8.1, [(0, 2), (2, 5), (1, 5), (3, 4)], ORANGE)
    for x, says, colour in ((1.3, "its answer", BLUE), (8.1, "a better answer?", ORANGE)):
        box(ax, x, 0.55, "the prompt", 1.5, 0.4, INK)
        box(ax, x, 3.6, says, 1.5, 0.4, colour, True)
    for i in (2, 1, 0):
        box(ax, 4.7 + 0.09 * i, 0.55 + 0.07 * i, "" if i else "its neighbours", 1.5, 0.4, INK)
        box(ax, 4.7 + 0.09 * i, 3.6 + 0.07 * i, "" if i else "their known labels?", 1.5, 0.4, ORANGE)
    arrow(ax, (2.15, 0.55), (3.85, 0.55))
    arrow(ax, (2.2, 2.1), (3.75, 2.1), ORANGE)
    arrow(ax, (5.65, 2.1), (7.2, 2.1), ORANGE)
    for x, y, text in (
        (3.0, 0.75, "look up similar\nreferences"),
        (2.97, 2.3, "start here"),
        (6.42, 2.3, "impose it"),
        (4.7, 0.1, "move it to where the neighbours are answered best"),
        (1.3, 0.1, "as the routers choose"),
        (8.1, 0.1, "along the new pathway"),
    ):
        ax.text(x, y, text, ha="center", fontsize=8.5, color=INK)
    return fig


def one_token():
    """What a candidate pathway costs: the last token, from the first critical layer up; all else is computed once."""
    fig, ax = canvas(7.8, 3.4)
    for column, token in enumerate(("marker", "a", "b", "cue")):
        ax.text(1.4 + 1.3 * column, 0.15, token, ha="center", fontsize=9, color=INK)
        for layer in range(4):
            new = column == 3 and layer > 0
            text = "one token" if new else "keys, values" if layer and column < 3 else ""
            box(ax, 1.4 + 1.3 * column, 0.65 + 0.7 * layer, text, 1.0, 0.4, ORANGE if new else GREY, new)
            if layer < 3:
                arrow(ax, (1.4 + 1.3 * column, 0.86 + 0.7 * layer), (1.4 + 1.3 * column, 1.14 + 0.7 * layer), GREY)
            if new and layer:
                arrow(ax, (4.52, 0.65 + 0.7 * layer), (4.79, 0.65 + 0.7 * layer), INK)
    for layer in range(4):
        ax.text(0.75, 0.65 + 0.7 * layer, f"layer {layer}", ha="right", va="center", fontsize=9, color=INK)
    arrow(ax, (5.3, 2.96), (5.3, 3.3), ORANGE)
    ax.text(5.95, 2.05, "anew for every\ncandidate pathway", va="center", fontsize=9, color=ORANGE)
    ax.text(
        5.95, 0.65, "grey: computed once\n(here layer 1 is the first\nthat the pathway covers)", va="center", fontsize=9
    )
    return fig


WAYS = {  # the marks of methods on the triangle, their colours, and where a text beside them stands
    "mode finding": ("s", COLOURS[3], (-6, -17)),
    "kernel regression": ("D", COLOURS[2], (9, -10)),
    "NGD": ("o", ORANGE, (9, 4)),
    "oracle": ("P", INK, (9, 2)),
}
DOTS = {  # references: face, edge, size, width of the edge
    "answered wrong": ("white", INK, 5, 1),
    "answered right": (INK, "white", 6, 1),
    "neighbours": ("none", COLOURS[4], 12, 2.2),
}


def triangle_figure(panels: dict, grid, tracks: dict, points: dict, ends: dict):
    """Rows over three experts as points of a triangle: a panel for each loss (G,) on the grid (G, 3), bright where low,
    and where each method went and ended, tracks: name -> (steps, 3), (3,). On the first panel also the pathways (m, 3)
    of references, by the names in DOTS; on the others what became of the ends, name -> text."""
    fig, axes = figure(4.5 * len(panels), 5.3, ncols=len(panels), squeeze=False)
    corners, halo = (
        np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]]),
        patheffects.withStroke(linewidth=3, foreground="white"),
    )
    levels, shades = np.linspace(0, np.max([*panels.values()]), 13), colormaps["YlGnBu"](np.linspace(0, 0.72, 12))
    for ax, (name, losses) in zip(axes[0], panels.items(), strict=True):
        ax.tricontourf(*(grid @ corners).T, losses, levels=levels, colors=shades)
        ax.tricontour(*(grid @ corners).T, losses, levels=levels, colors="white", linewidths=0.6)
        ax.plot(*corners[[0, 1, 2, 0]].T, color=INK, linewidth=1.2)
        for corner, (x, y) in enumerate(corners):
            ax.text(x, y + (0.03 if y else -0.06), f"expert {corner}", ha="center", fontsize=8, color=INK)
        for kind, (face, edge, size, width) in DOTS.items() if ax is axes[0, 0] else ():
            style = {"markerfacecolor": face, "markeredgecolor": edge, "markersize": size, "markeredgewidth": width}
            ax.plot(*(points[kind] @ corners).T, "o", **style, label=f"references: {kind}")
        for way, (mark, colour, aside) in WAYS.items():
            (x, y), end = (tracks[way][0] @ corners).T, tracks[way][1] @ corners
            ax.plot(x, y, ".-", color=colour, linewidth=1.6, markersize=5, path_effects=[halo])
            ax.plot(*end, mark, color=colour, markersize=9, markeredgecolor="white", label=way)
            text = "" if ax is axes[0, 0] else ends[way]
            ax.annotate(text, end, aside, textcoords="offset points", color=colour, fontsize=8, path_effects=[halo])
        ax.plot(x[0], y[0], "*", color=INK, markersize=15, markeredgecolor="white", label="the sample's own pathway")
        ax.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.08, 0.93))
        ax.set_title(name, fontsize=10, color=INK)
        ax.axis("off")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig
