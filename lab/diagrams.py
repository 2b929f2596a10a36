"""Pictures of ideas, for the notebooks and the README: boxes, arrows and toy landscapes; no results."""

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
