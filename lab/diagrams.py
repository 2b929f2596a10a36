"""Pictures of ideas, for the notebooks and the README: boxes, arrows and toy landscapes; no results."""

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lab.plots import GREY, INK, figure


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
