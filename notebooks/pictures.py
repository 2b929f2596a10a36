"""Pictures of ideas, for the notebooks and the README: boxes, arrows, landscapes; training."""

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from lab.tools.figures import BLUE, COLOURS, GREY, INK, ORANGE, figure

# ---- what pictures are made of


def canvas(width: float, height: float, title: str = ""):
    """A figure in inches with one empty axes, whose units are inches too -> (figure, axes)."""
    fig, ax = figure(width, height)
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    ax.set_title(title, color=INK, fontsize=10)
    return fig, ax


def box(ax, x, y, text: str, width=1.0, height=0.4, colour=GREY, strong=False):
    """A rounded box around the point (x, y), filled if strong."""
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08")
    shape.set(facecolor=colour if strong else "white", edgecolor=colour, linewidth=1.5)
    ax.add_patch(shape)
    write_text(ax, x, y, text, "white" if strong else INK, va="center")


def arrow(ax, start, end, colour=INK, width=1.2):
    """An arrow from a point to another."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": width}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def write_text(ax, x, y, text: str, colour=INK, size=8, ha="center", va="baseline"):
    """A text at the point (x, y)."""
    ax.text(x, y, text, ha=ha, va=va, fontsize=size, color=colour)


# ---- notebook 1: one token


def moe_layer():
    """A token's way through an MoE layer: router, softmax, top-k, chosen experts, weighted sum."""
    fig, ax = canvas(8.6, 3.5)
    write_text(ax, 2.2, 1.1, "a score for\neach expert", va="center")
    write_text(ax, 3.9, 3.25, "softmax", va="center")
    write_text(ax, 5.7, 3.25, "top 2: E(x)", va="center")

    # The middle line: from the token to its output.
    middle = 1.55
    box(ax, 0.6, middle, "token x", 0.95)
    box(ax, 2.2, middle, "router W", 0.95)
    box(ax, 7.25, middle, "sum", 0.5)
    box(ax, 8.2, middle, "y", 0.5)
    for start, end in ((1.08, 1.72), (2.68, 3.2), (7.5, 7.95)):
        arrow(ax, (start, middle), (end, middle))

    # A bar and a box for each expert; two of them are visited.
    for expert, share in enumerate((0.09, 0.38, 0.06, 0.12, 0.28, 0.07)):
        y = 2.8 - 0.5 * expert
        visited = share > 0.2
        colour = ORANGE if visited else GREY
        ax.barh(y, 2 * share, left=3.65, height=0.25, color=colour)
        write_text(ax, 3.58, y, f"{share:.2f}", ha="right", va="center")
        box(ax, 5.7, y, f"expert {expert}", 0.9, 0.36, colour, visited)
        if visited:
            arrow(ax, (3.7 + 2 * share, y), (5.22, y), colour)
            arrow(ax, (6.17, y), (7.0, 1.55 + 0.1 * (2.5 - expert)), colour)
            write_text(ax, 6.7, 0.95 * y + 0.07, f"x {share:.2f}", colour, ha="left", va="center")
    return fig


def dispatch(experts: list[list[int]]):
    """Pairs (token, expert) as tokens chose them, sorted by expert, and summed by token.

    experts: for each token, those that it visits.
    """
    pairs = [(token, expert) for token, row in enumerate(experts) for expert in row]
    order = sorted(range(len(pairs)), key=lambda place: pairs[place][1])
    step = 0.35
    top = step * len(pairs) + 0.3
    fig, ax = canvas(8.6, top + 0.5)
    write_text(ax, 1.0, top + 0.2, "by token")
    write_text(ax, 3.9, top + 0.2, "sorted by expert: one product a group")
    write_text(ax, 7.4, top + 0.2, "summed by token")
    for place, origin in enumerate(order):
        token, expert = pairs[origin]
        colour = COLOURS[token % len(COLOURS)]
        before = top - step * (origin + 0.5)
        here = top - step * (place + 0.5)
        after = top - step * len(experts[0]) * (token + 0.5)
        box(ax, 1.0, before, f"token {token}, expert {expert}", 1.4, 0.27, colour)
        box(ax, 3.9, here, f"expert {expert}   row {place}", 1.4, 0.27, colour, True)
        arrow(ax, (1.72, before), (3.18, here), colour)
        arrow(ax, (4.62, here), (6.88, after), colour)
        box(ax, 7.4, after, f"token {token}", 1.0, 0.4, colour)
    return fig


def vicious_circle():
    """Why experts collapse: who is visited is trained, who is trained is visited."""
    fig, ax = canvas(7.0, 2.4)
    box(ax, 1.2, 1.8, "visited a little\nmore often", 1.5, 0.6, ORANGE)
    box(ax, 4.0, 1.8, "trained more:\nhelps more", 1.5, 0.6, ORANGE)
    box(ax, 2.6, 0.6, "the router learns\nto score it higher", 1.5, 0.6, ORANGE)
    arrow(ax, (1.97, 1.8), (3.23, 1.8), ORANGE, 1.8)
    arrow(ax, (3.75, 1.47), (3.0, 0.93), ORANGE, 1.8)
    arrow(ax, (2.2, 0.93), (1.45, 1.47), ORANGE, 1.8)
    box(ax, 6.0, 1.2, "the others:\nno visit, no gradient", 1.6, 0.6)
    arrow(ax, (3.38, 0.65), (5.18, 1.05), GREY, 1.5)
    return fig


# ---- notebook 2: an MoE and its dense twin


def twins():
    """An MoE layer beside its dense twin: the same activated width, more width in all."""
    fig, ax = canvas(8.0, 2.2)
    width, height = 0.38, 0.48  # of an expert
    write_text(ax, 1.3, 1.95, "dense twin: one layer, always used")
    box(ax, 1.3, 1.1, "width 4 F", 4 * width, height, BLUE, True)
    write_text(ax, 5.5, 1.95, "MoE: 16 experts of width F, each token visits 4")
    for expert in range(16):
        row, column = divmod(expert, 8)
        visited = expert in (2, 5, 8, 15)
        colour = BLUE if visited else GREY
        box(ax, 3.85 + 0.47 * column, 1.4 - 0.6 * row, "F", width, height, colour, visited)
    write_text(ax, 4.0, 0.2, "filled: what one token uses, the same on both sides", BLUE)
    return fig


# ---- notebook 3: Cartesian experts


def moe_sublayer(ax, x, y, name: str, n: int, visited, colour, router: str, equation: str):
    """A router, and above it n experts around x, those visited filled. Its input comes from y."""
    box(ax, x, y + 0.55, f"router: {router}", 1.6, 0.34, colour)
    arrow(ax, (x, y), (x, y + 0.38))
    for expert in range(n):
        filled = expert in visited
        place = x + 0.44 * (expert - (n - 1) / 2)
        text = f"${name}_{{{expert + 1}}}$"
        box(ax, place, y + 1.1, text, 0.36, 0.36, colour if filled else GREY, filled)
    write_text(ax, x + 1.0, y + 0.55, equation, ha="left", va="center")


def two_blocks():
    """A MoE block, with one feed-forward sub-layer, beside a Cartesian block, with two."""
    fig, ax = canvas(8.4, 4.0)
    write_text(ax, 2.2, 3.85, "MoE block: one sub-layer", size=10)
    box(ax, 2.2, 0.55, "attention", 1.6)
    equation = "y = x + MoE(norm(x))"
    moe_sublayer(ax, 2.2, 0.75, "E", 8, (1, 3, 4, 6), INK, "top 4 of 8", equation)
    arrow(ax, (2.2, 2.05), (2.2, 2.4))

    write_text(ax, 6.2, 3.85, "Cartesian block: two, one behind the other", size=10)
    box(ax, 6.2, 0.55, "attention", 1.6)
    equation = "u = x + A(norm(x))"
    moe_sublayer(ax, 6.2, 0.75, "A", 4, (0, 2), ORANGE, "top 2 of 4", equation)
    equation = "y = u + B(norm(u))"
    moe_sublayer(ax, 6.2, 2.05, "B", 4, (1, 2), BLUE, "top 2 of 4", equation)
    arrow(ax, (6.2, 3.35), (6.2, 3.7))
    return fig


def composition_grid(n: int, a: list[int], b: list[int]):
    """The n x n composed experts (A_i, B_j), for a token that chose the experts a of A and b of B.

    A row, all those that share A_i, is tinted where the token chose A_i; the K x K that it visits
    are filled.
    """
    fig, ax = canvas(0.5 * n + 1.5, 0.5 * n + 1.2, f"{n} + {n} experts, {n} x {n} composed")
    for i in range(n):
        # The margins: A on the left, B above.
        colour = COLOURS[a.index(i)] if i in a else GREY
        x = 1.15 + 0.5 * i
        y = 0.5 * (n - i) + 0.05
        box(ax, 0.4, y, f"$A_{{{i}}}$", 0.44, 0.4, colour, i in a)
        box(ax, x, 0.5 * n + 0.65, f"$B_{{{i}}}$", 0.44, 0.4, INK if i in b else GREY, i in b)

        # A row of composed experts.
        for j in range(n):
            x = 1.15 + 0.5 * j
            cell = Rectangle((x - 0.23, y - 0.22), 0.46, 0.44)
            cell.set(linewidth=1.2, edgecolor="white", facecolor=colour, alpha=0.08)
            if i in a:
                cell.set_alpha(1.0 if j in b else 0.3)
            ax.add_patch(cell)
            if i in a and j in b:
                write_text(ax, x, y, f"{i}, {j}", "white", va="center")
    return fig


def two_readings():
    """What passes through which of the chosen experts, in the paper and in a literal product."""
    fig, ax = canvas(8.4, 3.1)

    # In sequence: the outputs of A are summed before B.
    x = 2.1
    write_text(ax, x, 3.0, "in sequence: 2 K evaluations", size=10)
    box(ax, x, 0.3, "token", 1.0)
    box(ax, x, 1.5, "their weighted sum", 1.5)
    for number, side in ((1, -0.7), (2, 0.7)):
        box(ax, x + side, 0.95, f"$A_{number}$", 0.5, 0.36, ORANGE, True)
        arrow(ax, (x, 0.5), (x + side, 0.77))
        arrow(ax, (x + side, 1.13), (x + side / 2, 1.3))
        box(ax, x + side, 2.1, f"$B_{number}$", 0.5, 0.36, BLUE, True)
        arrow(ax, (x + side / 2, 1.7), (x + side, 1.92))
        arrow(ax, (x + side, 2.28), (x + side / 3, 2.5))
    box(ax, x, 2.7, "weighted sum of $K$ outputs", 2.2)

    # Literally: each chosen expert of A goes through each one of B.
    x = 6.3
    write_text(ax, x, 3.0, "literally, each pair alone: K + K x K evaluations", size=10)
    box(ax, x, 0.3, "token", 1.0)
    for number, side in ((1, -0.7), (2, 0.7)):
        box(ax, x + side, 0.95, f"$A_{number}$", 0.5, 0.36, ORANGE, True)
        arrow(ax, (x, 0.5), (x + side, 0.77))
        for second, aside in ((1, -0.35), (2, 0.35)):
            place = side + aside
            box(ax, x + place, 2.1, f"$B_{second}$", 0.5, 0.36, BLUE, True)
            arrow(ax, (x + side, 1.13), (x + place, 1.92))
            arrow(ax, (x + place, 2.28), (x + place / 3, 2.5))
    box(ax, x, 2.7, "weighted sum of $K^2$ outputs", 2.2)
    return fig


def pair_tables(tables: dict[str, np.ndarray], unseen: np.ndarray, title: str):
    """Which pairs of functions are answered right: name of a model -> shares (F, G).

    unseen (F, G): the pairs that were never trained; they are framed.
    """
    fig, axes = figure(3.0 * len(tables) + 0.6, 3.6, ncols=len(tables), squeeze=False)
    for ax, (name, shares) in zip(axes[0], tables.items(), strict=True):
        image = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(unseen):
            corner = (column - 0.4, row - 0.4)
            ax.add_patch(Rectangle(corner, 0.8, 0.8, fill=False, edgecolor=ORANGE, linewidth=1.2))
        ax.set(xticks=[], yticks=[], xlabel="second function, g")
        ax.set_title(f"{name}\n{shares[unseen].mean():.0%} of the unseen", fontsize=9, color=INK)
    axes[0, 0].set_ylabel("first function, f")
    fig.colorbar(image, ax=axes, label="numbers answered right (%)", pad=0.01)
    fig.suptitle(f"{title} Framed: pairs never trained", fontsize=10, color=INK)
    return fig


def function_maps(maps: dict[str, tuple], title: str):
    """Which expert serves which function: name of a router -> shares of visits (F, E) and (G, E).

    Experts stand in the order of the function that they serve most.
    """
    fig, axes = figure(2.9 * len(maps) + 0.6, 4.4, nrows=2, ncols=len(maps), squeeze=False)
    for column, (name, both) in zip(axes.T, maps.items(), strict=True):
        for ax, letter, shares in zip(column, "fg", both, strict=True):
            order = shares.argmax(0).argsort(kind="stable")
            image = ax.imshow(
                100 * shares[:, order], cmap="magma_r", vmin=0, vmax=50, aspect="auto"
            )
            ax.set(xticks=[], yticks=[], xlabel="experts", ylabel=f"function {letter}")
        column[0].set_title(name, fontsize=9, color=INK)
    fig.colorbar(image, ax=axes, label="visits (%)", pad=0.01)
    fig.suptitle(title, fontsize=10, color=INK)
    return fig


# ---- notebook 4: re-mixing at test time


def stack(ax, x: float, visited: list[tuple], colour: str):
    """Four layers of six experts around x, those visited filled and joined: a pathway."""
    for layer, experts in enumerate(visited):
        y = 1.35 + 0.5 * layer
        for expert in range(6):
            here = x + 0.27 * (expert - 2.5)
            filled = expert in experts
            box(ax, here, y, "", 0.2, 0.2, colour if filled else "#d5d5d5", filled)
            if filled and layer < 3:
                for above in visited[layer + 1]:
                    there = x + 0.27 * (above - 2.5)
                    ax.plot((here, there), (y + 0.12, y + 0.38), color=colour, linewidth=1)
    arrow(ax, (x, 0.75), (x, 1.15), colour)
    arrow(ax, (x, 3.05), (x, 3.4), colour)


def remixing():
    """C3PO in one picture.

    A prompt along its own pathway, its neighbours along a candidate, the prompt along that.
    """
    fig, ax = canvas(9.4, 4.2)
    candidate = [(0, 2), (2, 5), (1, 5), (3, 4)]
    stack(ax, 1.3, [(0, 3), (1, 2), (1, 4), (0, 4)], BLUE)
    stack(ax, 4.7, candidate, ORANGE)
    stack(ax, 8.1, candidate, ORANGE)

    # What goes in and what comes out; of the neighbours there are three.
    box(ax, 1.3, 0.55, "the prompt", 1.5, 0.4, INK)
    box(ax, 1.3, 3.6, "its answer", 1.5, 0.4, BLUE, True)
    box(ax, 8.1, 0.55, "the prompt", 1.5, 0.4, INK)
    box(ax, 8.1, 3.6, "a better answer?", 1.5, 0.4, ORANGE, True)
    for i in (2, 1, 0):
        x, y = 4.7 + 0.09 * i, 0.07 * i
        box(ax, x, 0.55 + y, "" if i else "its neighbours", 1.5, 0.4, INK)
        box(ax, x, 3.6 + y, "" if i else "their known labels?", 1.5, 0.4, ORANGE)

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
        write_text(ax, x, y, text, size=8.5)
    return fig


def one_token():
    """What a candidate pathway costs: one token, from the first critical layer up."""
    fig, ax = canvas(7.8, 3.4)
    tokens = ("marker", "a", "b", "cue")
    for column, token in enumerate(tokens):
        x = 1.4 + 1.3 * column
        write_text(ax, x, 0.15, token, size=9)
        for layer in range(4):
            y = 0.65 + 0.7 * layer
            if layer < 3:
                arrow(ax, (x, y + 0.21), (x, y + 0.49), GREY)
            if layer == 0:
                box(ax, x, y, "", 1.0, 0.4, GREY)
            elif column < 3:
                box(ax, x, y, "keys, values", 1.0, 0.4, GREY)
            else:  # the last token
                box(ax, x, y, "one token", 1.0, 0.4, ORANGE, True)
                arrow(ax, (4.52, y), (4.79, y), INK)
    for layer in range(4):
        write_text(ax, 0.75, 0.65 + 0.7 * layer, f"layer {layer}", size=9, ha="right", va="center")
    arrow(ax, (5.3, 2.96), (5.3, 3.3), ORANGE)

    text = "anew for every\ncandidate pathway"
    write_text(ax, 5.95, 2.05, text, ORANGE, size=9, ha="left", va="center")
    text = "grey: computed once\n(here layer 1 is the first\nthat the pathway covers)"
    write_text(ax, 5.95, 0.65, text, "black", size=9, ha="left", va="center")
    return fig


WAYS = {  # the marks of methods on the triangle, their colours, where a text beside them stands
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
CORNERS = ((0, 0), (1, 0), (0.5, 0.75**0.5))


def triangle_figure(panels: dict, grid, tracks: dict, points: dict, ends: dict):
    """Rows over three experts as points of a triangle, a panel for each loss, bright where low.

    panels: name of a loss -> (G,) its values on the grid (G, 3) of rows.
    tracks: name of a method -> the rows (steps, 3) that it went through, and where it ended (3,).
    points: name in DOTS -> pathways (m, 3) of references; they stand on the first panel.
    ends: name of a method -> what became of its end; they stand on the other panels.
    """
    fig, axes = figure(4.5 * len(panels), 5.3, ncols=len(panels), squeeze=False)
    levels = np.linspace(0, np.max([*panels.values()]), 13)
    shades = colormaps["YlGnBu"](np.linspace(0, 0.72, 12))
    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    corners = np.array(CORNERS)
    for ax, (name, losses) in zip(axes[0], panels.items(), strict=True):
        first = ax is axes[0, 0]

        # The landscape and its frame.
        x, y = (grid @ corners).T
        ax.tricontourf(x, y, losses, levels=levels, colors=shades)
        ax.tricontour(x, y, losses, levels=levels, colors="white", linewidths=0.6)
        ax.plot(*corners[[0, 1, 2, 0]].T, color=INK, linewidth=1.2)
        for expert, (x, y) in enumerate(corners):
            write_text(ax, x, y + (0.03 if y else -0.06), f"expert {expert}")

        if first:
            for kind, (face, edge, size, width) in DOTS.items():
                x, y = (points[kind] @ corners).T
                (line,) = ax.plot(x, y, "o", label=f"references: {kind}")
                line.set(markerfacecolor=face, markeredgecolor=edge)
                line.set(markersize=size, markeredgewidth=width)

        # Where each method went.
        for way, (mark, colour, aside) in WAYS.items():
            rows, last = tracks[way]
            x, y = (rows @ corners).T
            end = last @ corners
            style = {"color": colour, "linewidth": 1.6, "markersize": 5}
            ax.plot(x, y, ".-", **style, path_effects=halo)
            style = {"color": colour, "markeredgecolor": "white", "markersize": 9}
            ax.plot(*end, mark, **style, label=way)
            if not first:
                style = {"color": colour, "fontsize": 8, "path_effects": halo}
                ax.annotate(ends[way], end, aside, textcoords="offset points", **style)
        style = {"color": INK, "markeredgecolor": "white", "markersize": 15}
        ax.plot(x[0], y[0], "*", **style, label="the sample's own pathway")

        ax.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.08, 0.93))
        ax.set_title(name, fontsize=10, color=INK)
        ax.axis("off")
    below = {"loc": "outside lower center", "ncols": 4}
    fig.legend(*axes[0, 0].get_legend_handles_labels(), **below, fontsize=8, frameon=False)
    return fig


# ---- notebook 5: look inside OLMoE


def stacked_experts():
    """The experts of a layer as a checkpoint of the hub has them, and as they stand in memory."""
    fig, ax = canvas(7.6, 2.8)
    write_text(ax, 1.6, 2.5, "on disk: 3 E matrices", size=10)
    for row, expert in enumerate(("0", "1", "E-1")):
        y = 2.0 - 0.75 * row
        box(ax, 0.7, y, f"gate\n{expert}", 0.6, 0.45, ORANGE)
        box(ax, 1.6, y, f"up\n{expert}", 0.6, 0.45, ORANGE)
        box(ax, 2.5, y, f"down\n{expert}", 0.45, 0.6, BLUE)

    arrow(ax, (3.0, 1.25), (3.6, 1.25))
    write_text(ax, 5.4, 2.5, "in memory: two tensors", size=10)
    for depth in (2, 1, 0):
        aside = 0.12 * depth
        y = 1.15 + aside
        box(ax, 4.4 + aside, y, "" if depth else "gate_up\n(E, 2 F, D)", 1.0, 1.5, ORANGE)
        box(ax, 6.3 + aside, y, "" if depth else "down\n(E, D, F)", 0.75, 1.0, BLUE)
    return fig


def places_to_change():
    """A forward pass and, below it, re-mixing: three places where ten lines of one's own go."""
    fig, ax = canvas(8.4, 2.5)
    steps = {
        "batch": "(c) your task",
        "routers\nprobabilities": "",
        "select\nweights, experts": "(a) your routing rule",
        "experts\nweighted sum": "",
        "logits, loss": "",
    }
    for i, (text, change) in enumerate(steps.items()):
        x = 0.85 + 1.68 * i
        box(ax, x, 1.7, text, 1.3, 0.55, ORANGE if change else GREY, bool(change))
        write_text(ax, x, 2.12, change, ORANGE, size=9)
        if i < len(steps) - 1:
            arrow(ax, (x + 0.65, 1.7), (x + 1.03, 1.7))

    box(ax, 2.53, 0.45, "surrogate", 1.3, 0.55, ORANGE, True)
    write_text(ax, 3.3, 0.4, "(b) your surrogate", ORANGE, size=9, ha="left")
    arrow(ax, (2.3, 1.42), (2.3, 0.73))
    arrow(ax, (2.76, 0.73), (2.76, 1.42))
    write_text(ax, 2.2, 1.05, "the model's pathway,\nneighbours", ha="right", va="center")
    text = "another pathway, imposed at one token"
    write_text(ax, 2.86, 1.05, text, ha="left", va="center")
    return fig


def ten_steps(
    losses: dict[str, np.ndarray],
    answers: dict[str, np.ndarray],
    marks: dict[int, str],
    title: str,
):
    """Losses by the steps of an optimiser, and the probabilities of all answers along two pathways.

    marks: answer -> a word on it."""
    fig, (left, right) = figure(9, 3.2, ncols=2, width_ratios=[1, 1.5])
    for (name, values), colour in zip(losses.items(), (ORANGE, GREY), strict=True):
        left.plot(values, color=colour, label=name, marker="o", markersize=3)
    left.set(xlabel="step", ylabel="neighbours' loss (nats)", ylim=(0, None))
    left.legend(fontsize=8, frameon=False)

    styles = ((-0.2, BLUE), (0.2, ORANGE))
    for (name, shares), (side, colour) in zip(answers.items(), styles, strict=True):
        places = np.arange(len(shares)) + side
        right.bar(places, 100 * shares, color=colour, width=0.4, label=name)
    for answer, text in marks.items():
        top = 100 * max(shares[answer] for shares in answers.values())
        right.annotate(
            text,
            (answer, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    right.set(xlabel="answer", ylabel="probability (%)", xticks=range(len(shares)))
    right.margins(y=0.2)
    right.legend(fontsize=8, frameon=False)
    fig.suptitle(title, color=INK, fontsize=10)
    return fig


# ---- notebook 6: sharing and robustness


def first_choice_lost():
    """A router's probabilities, and what a token visits once its first choice is disabled."""
    fig, ax = canvas(8.4, 2.5)
    shares = (0.09, 0.38, 0.06, 0.12, 0.28, 0.07)
    cases = {"as it is: the two best of six": (1, 4), "first choice disabled": (4, 3)}
    for place, (title, visited) in enumerate(cases.items()):
        left = 0.7 + 4.2 * place
        write_text(ax, left + 1.45, 2.25, title, size=10)
        for expert, share in enumerate(shares):
            x = left + 0.58 * expert
            colour = ORANGE if expert in visited else GREY
            disabled = place == 1 and expert == 1
            ax.bar(
                x,
                3.2 * share,
                bottom=0.65,
                width=0.36,
                color=colour,
                alpha=0.3 + 0.7 * (not disabled),
            )
            write_text(ax, x, 0.72 + 3.2 * share, f"{share:.0%}")
            box(ax, x, 0.38, f"$E_{expert + 1}$", 0.44, 0.36, colour, expert in visited)
            if disabled:
                ax.plot((x - 0.2, x + 0.2), (0.2, 0.56), color=INK, linewidth=2)
    write_text(ax, 7.0, 1.92, "lost: 38 of the 66 % that it wanted", ORANGE)
    return fig


# ---- training


def curves(steps: list[int], panels: dict[str, dict[str, list[float]]], title: str):
    """Lines over the training steps: label of a panel -> name of a run -> values."""
    n = len(panels)
    fig, axes = figure(0.4 + 3.2 * n, 2.9, ncols=n, squeeze=False)
    for ax, (label, lines) in zip(axes[0], panels.items(), strict=True):
        for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
            ax.plot(steps, values, color=colour, label=name)
        ax.set(xlabel="step", ylabel=label)
    axes[0, 0].legend(fontsize=7, frameon=False)
    fig.suptitle(title, color=INK, fontsize=10)
    return fig


def expert_loads(
    steps: list[int], loads: dict[str, list[np.ndarray]], places: list[str], title: str
):
    """The load of the experts over the training steps, experts in the order of their final load.

    loads: name of a run -> at each step the shares of visits (L, E).
    """
    L, E = next(iter(loads.values()))[0].shape  # L routers
    fig, axes = figure(
        1.2 + 2.6 * len(loads),
        0.7 + 1.7 * L,
        nrows=L,
        ncols=len(loads),
        squeeze=False,
    )

    # The edges of each image: half a step before the first step and behind the last one.
    left = 1.5 * steps[0] - 0.5 * steps[1]
    right = 1.5 * steps[-1] - 0.5 * steps[-2]
    extent = (left, right, -0.5, E - 0.5)
    for column, (name, load) in enumerate(loads.items()):
        for router in range(L):
            ax = axes[router, column]
            share = np.stack(load)[:, router] / load[0][router].mean()  # (S, E) in even shares
            order = share[-1].argsort()
            image = ax.imshow(
                share[:, order].T,
                cmap="magma_r",
                vmin=0,
                vmax=4,
                aspect="auto",
                origin="lower",
                extent=extent,
            )
            ax.set_yticks([])
            if column == 0:
                ax.set_ylabel(f"{places[router]}\nexperts", fontsize=8)
            if router == 0:
                ax.set_title(name, fontsize=9)
            if router == L - 1:
                ax.set_xlabel("step")
    fig.colorbar(image, ax=axes, label="visits, in even shares", pad=0.01)
    fig.suptitle(title, color=INK, fontsize=10)
    return fig
