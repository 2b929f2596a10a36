"""Pictures of ideas, for the notebooks and the README: boxes, arrows and toy landscapes; no results."""

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

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


def arrow(ax, start, end, colour: str = INK, width: float = 1.2):
    """An arrow from a point to another."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=width))


# The pictures, in the order of the notebooks.


def moe_layer():
    """A token's way through an MoE layer: router, softmax, top-k, the chosen experts, the weighted sum."""
    fig, ax = canvas(8.6, 3.5)
    for x, y, text in ((2.2, 1.1, "a score for\neach expert"), (3.9, 3.25, "softmax"), (5.7, 3.25, "top 2: E(x)")):
        ax.text(x, y, text, ha="center", va="center", fontsize=8, color=INK)
    for x, text in ((0.6, "token x"), (2.2, "router W"), (7.25, "sum"), (8.2, "y")):
        box(ax, x, 1.55, text, 0.95 if len(text) > 3 else 0.5)
    for start, end in ((1.08, 1.72), (2.68, 3.2), (7.5, 7.95)):
        arrow(ax, (start, 1.55), (end, 1.55))
    for expert, share in enumerate((0.09, 0.38, 0.06, 0.12, 0.28, 0.07)):
        y, visited = 2.8 - 0.5 * expert, share > 0.2
        colour = ORANGE if visited else GREY
        ax.barh(y, 2 * share, left=3.65, height=0.25, color=colour)
        ax.text(3.58, y, f"{share:.2f}", ha="right", va="center", fontsize=8, color=INK)
        box(ax, 5.7, y, f"expert {expert}", 0.9, 0.36, colour, visited)
        if visited:
            arrow(ax, (3.7 + 2 * share, y), (5.22, y), colour)
            arrow(ax, (6.17, y), (7.0, 1.55 + 0.1 * (2.5 - expert)), colour)
            ax.text(6.7, 0.95 * y + 0.07, f"x {share:.2f}", va="center", fontsize=8, color=colour)
    return fig


def dispatch(experts):
    """(token, expert) pairs as tokens chose them, sorted by expert, and summed again; experts: a row a token."""
    pairs = [(token, expert) for token, row in enumerate(experts) for expert in row]
    order = sorted(range(len(pairs)), key=lambda place: pairs[place][1])
    top = 0.35 * len(pairs) + 0.3
    fig, ax = canvas(8.6, top + 0.5)
    for x, text in ((1.0, "by token"), (3.9, "sorted by expert: one product a group"), (7.4, "summed by token")):
        ax.text(x, top + 0.2, text, ha="center", fontsize=8, color=INK)
    for place, origin in enumerate(order):
        (token, expert), y, old = pairs[origin], top - 0.35 * (place + 0.5), top - 0.35 * (origin + 0.5)
        end = top - 0.35 * len(experts[0]) * (token + 0.5)
        colour = COLOURS[token % len(COLOURS)]
        box(ax, 1.0, old, f"token {token}, expert {expert}", 1.4, 0.27, colour)
        box(ax, 3.9, y, f"expert {expert}   row {place}", 1.4, 0.27, colour, True)
        arrow(ax, (1.72, old), (3.18, y), colour)
        arrow(ax, (4.62, y), (6.88, end), colour)
        box(ax, 7.4, end, f"token {token}", 1.0, 0.4, colour)
    return fig


def vicious_circle():
    """Why experts collapse: who is visited is trained, who is trained is visited."""
    fig, ax = canvas(7.0, 2.4)
    steps = ("visited a little\nmore often", "trained more:\nhelps more", "the router learns\nto score it higher")
    places = ((1.2, 1.8), (4.0, 1.8), (2.6, 0.6))
    for (x, y), text in zip(places, steps, strict=True):
        box(ax, x, y, text, 1.5, 0.6, ORANGE)
    for start, end in (((1.97, 1.8), (3.23, 1.8)), ((3.75, 1.47), (3.0, 0.93)), ((2.2, 0.93), (1.45, 1.47))):
        arrow(ax, start, end, ORANGE, 1.8)
    box(ax, 6.0, 1.2, "the others:\nno visit, no gradient", 1.6, 0.6)
    arrow(ax, (3.38, 0.65), (5.18, 1.05), GREY, 1.5)
    return fig


def twins():
    """An MoE layer beside its dense twin: the same activated width, more width in all."""
    fig, ax = canvas(8.0, 2.2)
    ax.text(1.3, 1.95, "dense twin: one layer, always used", ha="center", fontsize=8, color=INK)
    box(ax, 1.3, 1.1, "width 4 F", 4 * 0.38, 0.48, BLUE, True)
    ax.text(5.5, 1.95, "MoE: 16 experts of width F, each token visits 4", ha="center", fontsize=8, color=INK)
    for expert in range(16):
        x, y, visited = 3.85 + 0.47 * (expert % 8), 1.4 - 0.6 * (expert // 8), expert in (2, 5, 8, 15)
        box(ax, x, y, "F", 0.38, 0.48, BLUE if visited else GREY, visited)
    ax.text(4.0, 0.2, "filled: what one token uses, the same on both sides", ha="center", fontsize=8, color=BLUE)
    return fig


def experts_row(ax, x, y, name, n, visited, colour):
    """n experts side by side around the point (x, y), those that a token visits filled."""
    for i in range(n):
        on = i in visited
        box(ax, x + 0.44 * (i - (n - 1) / 2), y, f"${name}_{{{i + 1}}}$", 0.36, 0.36, colour if on else GREY, on)


def two_blocks():
    """A fine-grained MoE block, with one feed-forward sub-layer, beside a Cartesian block, with two."""
    fig, ax = canvas(8.4, 4.0)
    columns = {2.2: [("E", 8, (1, 3, 4, 6), INK, "top 4 of 8", "y = x + MoE(norm(x))")]}
    columns[6.2] = [("A", 4, (0, 2), ORANGE, "top 2 of 4", "u = x + A(norm(x))")]
    columns[6.2] += [("B", 4, (1, 2), BLUE, "top 2 of 4", "y = u + B(norm(u))")]
    for x, layers in columns.items():
        box(ax, x, 0.55, "attention", 1.6)
        y = 0.75
        for name, n, visited, colour, says, equation in layers:
            box(ax, x, y + 0.55, f"router: {says}", 1.6, 0.34, colour)
            arrow(ax, (x, y), (x, y + 0.38))
            experts_row(ax, x, y + 1.1, name, n, visited, colour)
            ax.text(x + 1.0, y + 0.55, equation, fontsize=8, color=INK, va="center")
            y += 1.3
        arrow(ax, (x, y), (x, y + 0.35))
    ax.text(2.2, 3.85, "MoE block: one sub-layer", ha="center", fontsize=10, color=INK)
    ax.text(6.2, 3.85, "Cartesian block: two, one behind the other", ha="center", fontsize=10, color=INK)
    return fig


def composition_grid(n: int, a: list[int], b: list[int]):
    """The n x n composed experts (A_i, B_j). A row, all those that share A_i, is tinted where the token chose A_i; the
    K x K that it visits are filled."""
    fig, ax = canvas(0.5 * n + 1.5, 0.5 * n + 1.2, f"{n} + {n} experts, {n} x {n} composed")
    for i in range(n):
        colour, y = COLOURS[a.index(i)] if i in a else GREY, 0.5 * (n - i) + 0.05
        box(ax, 0.4, y, f"$A_{{{i}}}$", 0.44, 0.4, colour, i in a)
        box(ax, 1.15 + 0.5 * i, 0.5 * n + 0.65, f"$B_{{{i}}}$", 0.44, 0.4, INK if i in b else GREY, i in b)
        for j in range(n):
            here = Rectangle((0.92 + 0.5 * j, y - 0.22), 0.46, 0.44, linewidth=1.2, edgecolor="white", facecolor=colour)
            here.set_alpha(0.08 if i not in a else 1.0 if j in b else 0.3)
            ax.add_patch(here)
            if i in a and j in b:
                ax.text(1.15 + 0.5 * j, y, f"{i}, {j}", ha="center", va="center", fontsize=8, color="white")
    return fig


def two_readings():
    """The product layer of the paper beside the literal product: what passes through which of the chosen experts."""
    fig, ax = canvas(8.4, 3.1)
    for x, pairs in ((2.1, False), (6.3, True)):
        box(ax, x, 0.3, "token", 1.0)
        if not pairs:
            box(ax, x, 1.5, "their weighted sum", 1.5)
        for side in (-0.7, 0.7):
            box(ax, x + side, 0.95, "$A_1$" if side < 0 else "$A_2$", 0.5, 0.36, ORANGE, True)
            arrow(ax, (x, 0.5), (x + side, 0.77))
            arrow(ax, (x + side, 1.13), (x + side / 2, 1.3)) if not pairs else None
            for other in (-0.35, 0.35) if pairs else (0,):
                at, name = x + side + other, "$B_1$" if (other or side) < 0 else "$B_2$"
                box(ax, at, 2.1, name, 0.5, 0.36, BLUE, True)
                arrow(ax, (x + side, 1.13) if pairs else (x + side / 2, 1.7), (at, 1.92))
                arrow(ax, (at, 2.28), (x + (at - x) / 3, 2.5))
        box(ax, x, 2.7, "weighted sum of " + ("$K^2$ outputs" if pairs else "$K$ outputs"), 2.2)
    ax.text(2.1, 3.0, "in sequence: 2 K evaluations", ha="center", fontsize=10, color=INK)
    ax.text(6.3, 3.0, "literally, each pair alone: K + K x K evaluations", ha="center", fontsize=10, color=INK)
    return fig


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
    text = "grey: computed once\n(here layer 1 is the first\nthat the pathway covers)"
    ax.text(5.95, 0.65, text, va="center", fontsize=9)
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
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    halo = patheffects.withStroke(linewidth=3, foreground="white")
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


def stacked_experts():
    """The experts of a layer as a checkpoint of the hub has them, and as they stand in memory."""
    fig, ax = canvas(7.6, 2.8)
    for row, e in enumerate(("0", "1", "E-1")):
        for column, (name, colour) in enumerate((("gate", ORANGE), ("up", ORANGE), ("down", BLUE))):
            size = (0.45, 0.6) if name == "down" else (0.6, 0.45)
            box(ax, 0.7 + 0.9 * column, 2.0 - 0.75 * row, f"{name}\n{e}", *size, colour)
    for x, text, shape, height, width, colour in (
        (4.4, "gate_up", "(E, 2 F, D)", 1.5, 1.0, ORANGE),
        (6.3, "down", "(E, D, F)", 1.0, 0.75, BLUE),
    ):
        for depth in (2, 1, 0):
            at = (x + 0.12 * depth, 1.15 + 0.12 * depth)
            box(ax, *at, f"{text}\n{shape}" if depth == 0 else "", width, height, colour)
    arrow(ax, (3.0, 1.25), (3.6, 1.25))
    ax.text(1.6, 2.5, "on disk: 3 E matrices", ha="center", fontsize=10, color=INK)
    ax.text(5.4, 2.5, "in memory: two tensors", ha="center", fontsize=10, color=INK)
    return fig


def places_to_change():
    """A forward pass and, below it, re-mixing, with the three places where ten lines of one's own go."""
    fig, ax = canvas(8.4, 2.5)
    steps = {
        "batch": "(c) your task",
        "routers\nprobabilities": "",
        "select\nweights, experts": "(a) your routing rule",
    }
    steps |= {"experts\nweighted sum": "", "logits, loss": ""}
    for i, (text, change) in enumerate(steps.items()):
        x = 0.85 + 1.68 * i
        box(ax, x, 1.7, text, 1.3, 0.55, ORANGE if change else GREY, bool(change))
        ax.text(x, 2.12, change, ha="center", fontsize=9, color=ORANGE)
        if i < len(steps) - 1:
            arrow(ax, (x + 0.65, 1.7), (x + 1.03, 1.7))
    box(ax, 2.53, 0.45, "surrogate", 1.3, 0.55, ORANGE, True)
    ax.text(3.3, 0.4, "(b) your surrogate", fontsize=9, color=ORANGE)
    arrow(ax, (2.3, 1.42), (2.3, 0.73))
    arrow(ax, (2.76, 0.73), (2.76, 1.42))
    ax.text(2.2, 1.05, "the model's pathway,\nneighbours", ha="right", va="center", fontsize=8, color=INK)
    ax.text(2.86, 1.05, "another pathway, imposed at one token", va="center", fontsize=8, color=INK)
    return fig
