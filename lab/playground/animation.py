"""Ten steps of NGD as a moving picture: python -m lab.playground.animation

Reads docs/playground.html, and writes docs/remix.gif: the first prompt of that page, its pathway,
its answer, and the loss of its neighbours; and results/example.txt, the same prompt in words. The
page itself is put together anew.

Letters in the shape comments:  S steps and the start    R routers    E experts
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.nothing, __doc__)

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data import SkillsTask
from lab.playground.page import assemble, data_of, helpers_of, model_of, unpacked
from lab.tools.figures import BLUE, GREEN, GREY, INK, ORANGE
from lab.tools.files import write
from pathways import Tail
from remix import RemixConfig, ngd, remix

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS.parent / "results" / "example.txt"
BETWEEN = 5  # frames from one step to the next
MOVING, FIRST, LAST = 90, 2000, 4000  # milliseconds that a frame is shown
LIGHT = "#f6c99f"


class Walk(NamedTuple):
    """What NGD does with one prompt."""

    title: str
    words: str  # what became of it
    pathways: np.ndarray  # (S, R, E)
    answers: np.ndarray  # (S, 16) the probability of each number
    losses: np.ndarray  # (S,) of the neighbours, in nats
    label: int
    top_k: int


def walk(data: dict) -> Walk:
    """Re-mix the first prompt of a page of the skills task, and note every step."""
    # The page's model, and its first prompt.
    model, task = model_of(data), SkillsTask(0)
    references = helpers_of(model, task)
    tokens = torch.from_numpy(unpacked(data["prompts"]["tokens"])[None, :4].astype(np.int64))
    steps = []

    def noting(core, loss, near, config):
        """NGD that notes the pathways whose loss it asks for."""

        def noted(pathway):
            steps.append(pathway.detach())
            return loss(pathway)

        return ngd(core, noted, near, config)

    # Every step, and the answers along its pathway.
    result = remix(model, tokens, references, RemixConfig(method=noting))
    pathways = torch.cat(steps)  # (S, R, E)
    tail = Tail(model)
    prefix = tail.cut(tokens.expand(len(pathways), -1), torch.full((len(pathways),), 4))
    with torch.no_grad():
        answers = tail(prefix, pathways).softmax(-1)[:, : task.N]
    marker, a, b, cue = tokens[0].tolist()
    return Walk(
        f"In dialect {marker - task.NONE - 1}, what is cue {cue - task.FIRST_CUE} of {a} and {b}?",
        result.explain(0, task.words),
        pathways.numpy(),
        answers.numpy(),
        result.losses[0].numpy(),
        data["labels"][0],
        model.config.top_k,
    )


# ----------------------------------------------------------------------------------- the picture


def picture(it: Walk, time: float) -> Image.Image:
    """The walk at a time in steps, such as 2.5: between two steps everything slides."""
    fig = Figure(figsize=(8.4, 4.3), dpi=100, facecolor="white")
    grid = fig.add_gridspec(2, 2, width_ratios=(3, 2), left=0.08, right=0.98, top=0.75)
    grid.update(bottom=0.09, hspace=0.55, wspace=0.12)
    pathway, now = sliding(it.pathways, time), sliding(it.answers, time)
    draw_squares(fig.add_subplot(grid[:, 0]), pathway, it.top_k)
    draw_answers(fig.add_subplot(grid[0, 1]), it.answers[0], now, it.label)
    draw_losses(fig.add_subplot(grid[1, 1]), it.losses, time)

    said = int(now.argmax())
    verdict, colour = ("right", GREEN) if said == it.label else (f"right is {it.label}", ORANGE)
    fig.text(0.025, 0.93, it.title, fontsize=15, weight="bold", color=INK)
    step = "The model's own pathway" if time == 0 else f"Step {int(time)} of {len(it.losses) - 1}"
    fig.text(0.025, 0.855, f"{step}: it says {said}, {verdict}", fontsize=12, color=colour)

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def sliding(values, time: float):
    """The values (S, ...) of a step, or between two of them."""
    step = min(int(time), len(values) - 2)
    share = time - step
    return (1 - share) * values[step] + share * values[step + 1]


def draw_squares(ax, pathway, top_k: int):
    """A square for each expert: filled as high as its share, framed where the token goes."""
    R, E = pathway.shape
    for r, row in enumerate(pathway):
        visited = np.argsort(-row)[:top_k]
        places = np.arange(E)
        ax.bar(places, 0.84, 0.84, r, align="center", color="white", edgecolor="#dddddd")
        colours = [ORANGE if e in visited else LIGHT for e in places]
        ax.bar(places, 0.84 * np.sqrt(row), 0.84, r, color=colours)
        ax.bar(visited, 0.84, 0.84, r, color="none", edgecolor=ORANGE, linewidth=2)
    ax.set_yticks(np.arange(R) + 0.42, [f"layer {r}" for r in range(R)], fontsize=9)
    ax.set_xticks([])
    ax.set_title("its pathway: the experts that it visits", fontsize=10, color=INK, loc="left")
    bare(ax)


def draw_answers(ax, own, now, label: int):
    """The probability of each answer, at the start and now."""
    places = np.arange(len(now))
    ax.bar(places, own, 0.9, color="none", edgecolor=BLUE, linestyle=":")
    ax.bar(places, now, 0.6, color=[GREEN if i == label else GREY for i in places])
    ax.set_ylim(0, 1)
    ax.set_yticks([])
    ax.set_xticks(places, places, fontsize=8)
    ax.set_title("its answer (dotted: before)", fontsize=10, color=INK, loc="left")
    bare(ax)


def draw_losses(ax, losses, time: float):
    """The neighbours' loss up to now."""
    steps = np.arange(int(time) + 1)
    times, values = [*steps, time], [*losses[steps], sliding(losses, time)]
    ax.plot(times, values, "-", color=BLUE, linewidth=2)
    ax.plot(time, values[-1], "o", color=BLUE)
    ax.set_xlim(-0.3, len(losses) - 0.7)
    ax.set_ylim(0, 1.1 * losses.max())
    ax.set_xticks([0, len(losses) - 1], ["start", f"step {len(losses) - 1}"], fontsize=8)
    ax.set_yticks([])
    ax.set_title("loss of three similar questions", fontsize=10, color=INK, loc="left")
    bare(ax)


def bare(ax):
    """No frame around axes."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, colors=INK)


def save_animation(it: Walk, path: Path):
    """Write the moving picture, in few colours."""
    times = np.arange(0, (len(it.losses) - 1) * BETWEEN + 1) / BETWEEN
    frames = [picture(it, time) for time in times]
    palette = frames[-1].quantize(48)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FIRST, *[MOVING] * (len(frames) - 2), LAST]
    options = {"append_images": frames[1:], "duration": durations, "loop": 0, "optimize": True}
    frames[0].save_animation(path, save_all=True, **options)


def main(argv) -> int:
    """Put the page of docs/ together anew, and draw its walk -> the exit code."""
    flags.nothing(argv, __doc__)
    page, path = DOCS / "playground.html", DOCS / "remix.gif"
    data = data_of(page.read_text(encoding="utf-8"))
    page.write_text(assemble(data), encoding="utf-8")
    walked = walk(data)
    save_animation(walked, path)
    write(EXAMPLE, f"{walked.words}\n".encode())
    print(f"wrote {page.name}, {EXAMPLE.name}, and {path.name}, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    cli.program(main)
