"""What the pages show, from results/ alone: python -m lab.pages

Fills every `<!-- results: NAME -->` ... `<!-- end -->` of README.md and docs/*.md, and draws their
figures, docs/*.png.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.nothing, __doc__)

import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np

from data import SkillsTask, perplexity
from lab.composing import composition_rows, verdict
from lab.composing.declarations import DECLARATIONS
from lab.composing.effects import BASE, group_runs, main_kind, percent, test_losses
from lab.pages import claims
from lab.pages.declared import declared_table
from lab.pages.stored import RESULTS, stored_compositions, stored_result, stored_runs
from lab.remixing.figures import contest_figures, knowledge_figure, reach_figure, sweeps_figure
from lab.remixing.knowledge import pathway_tables
from lab.remixing.reach import RIGHT, WRONG, reach_table
from lab.remixing.tables import contest_report, gain_table, main_table, sweep_table
from lab.speed.report import (
    cost_report,
    short_table,
    shorter_table,
    speed_figure,
    speed_report,
)
from lab.tools import figures
from moe import MoEConfig, require
from notebooks import pictures

ROOT = RESULTS.parent
MARKDOWN = {  # name of a place -> the function that makes its table of markdown
    "claims": claims.main_claims,
    "claims-remixing": lambda: claims.claims_markdown(claims.remixing_rows()),
    "claims-settings": lambda: claims.claims_markdown(claims.setting_rows()),
    "claims-cartesian": lambda: claims.claims_markdown(claims.cartesian_rows()),
    "declared": declared_table,
    "speed-short": lambda: short_table(stored_result("speed")),
    "speed-shorter": lambda: shorter_table(stored_result("speed")),
}
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def main(argv=None) -> int:
    """Fill the pages and draw the figures -> the exit code."""
    flags.nothing(argv, __doc__)
    folder = ROOT / "docs"
    draw_all(folder)
    for path, text in filled_pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"filled {path.name}")
    names = sorted(path.name for path in folder.glob("*.png"))
    print(f"drew {', '.join(names)}")
    return 0


# ---- pages


def filled_pages() -> dict[Path, str]:
    """Every page, filled. ValueError: a place whose name nobody knows."""
    blocks = text_blocks()

    def fill(match):
        start, name, end = match.groups()
        if name in MARKDOWN:
            return start + MARKDOWN[name]() + end
        require(name in blocks, f"no results are called {name!r}; there are {', '.join(blocks)}")
        text = blocks[name]().strip("\n")
        return f"{start}```text\n{text}\n```\n{end}"

    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path: PLACE.sub(fill, path.read_text(encoding="utf-8")) for path in paths}


def text_blocks() -> dict:
    """Name of a place -> the function that makes its text."""
    blocks = {path.stem: partial(path.read_text, "utf-8") for path in RESULTS.glob("*.txt")}
    return blocks | {
        "train_toy": partial(train_toy_paragraphs, 0, 1),
        "taste": partial(train_toy_paragraphs, 3),
        "remix": lambda: contest_report(stored_result("remix-skills-test")),
        "remix-strict": partial(stored_table, "remix-skills-test-strict"),
        "remix-stories": partial(stored_table, "remix-stories-test"),
        "reach": lambda: reach_table(stored_result("knowledge")["reach"]),
        "pathways": lambda: pathway_tables(stored_result("knowledge")),
        "ablation": lambda: sweep_table(stored_result("remix-skills-dev-ablation")),
        "first": partial(declared_report, "first"),
        "second": partial(declared_report, "second"),
        "third": partial(declared_report, "third"),
        "composition": lambda: composition_rows.composition_table(stored_compositions()),
        "gain": partial(stored_gain, "gain"),
        "gain-half": partial(stored_gain, "gain-half"),
        "gain-pairs": partial(stored_gain, "gain-pairs"),
        "gain-pairs-train": partial(stored_gain, "gain-pairs-train"),
        "trend": lambda: "\n".join(verdict.trend_lines(stored_runs("trend", "second"))),
        "sweep": partial(tries, "sweep"),
        "start": partial(tries, "start"),
        "better-start": better_start,
        "paper": partial(tries, "paper"),
        "scatter": scatter,
        "speed": lambda: speed_report(stored_result("speed")),
        "cost": lambda: cost_report(stored_result("speed")),
    }


def train_toy_paragraphs(*places: int) -> str:
    """Parts of what train_toy.py prints: what it trains and how that goes, a taste of re-mixing."""
    paragraphs = (RESULTS / "train_toy.txt").read_text(encoding="utf-8").split("\n\n")
    return "\n\n".join(paragraphs[place] for place in places)


def stored_table(name: str) -> str:
    """The main table of a contest of re-mixing."""
    result = stored_result(name)
    return main_table(result["rows"], result["costs"])


def stored_gain(name: str) -> str:
    """What re-mixing gains on Cartesian and on fine-grained models."""
    return gain_table(stored_result(f"{name}-cartesian"), stored_result(f"{name}-fine_grained"))


def declared_report(name: str) -> str:
    """The report on the runs of a declared test."""
    return verdict.comparison_report(stored_runs(name), 2500, DECLARATIONS[name])


def tries(name: str) -> str:
    """The runs at which settings were chosen, by their number of steps."""
    lines, tables = stored_runs(name), []
    for steps in sorted({line["steps"] for line in lines}):
        tables.append(verdict.overview_table(lines, steps))
    return "\n\n".join(tables)


def better_start() -> str:
    """Perplexity on dev with either option of the better start, and with both (seed 100)."""
    lines, rows = stored_runs("sweep", "alone", "start"), []
    same = {"seed": 100, "steps": 2500, "lr": 6e-3, "norm_topk": True}
    for preset in (BASE, "cartesian"):
        cells = [preset]
        for scale, init in itertools.product((1.0, 11.3), (0.5, 0.05)):
            own = {"preset": preset, "embedding_scale": scale, "residual_init": init}
            (run,) = [line for line in lines if (same | own).items() <= line.items()]
            cells.append(f"{perplexity(run['dev']['loss']):.2f}")
        rows.append(cells)
    return cli.table(rows, ["dev, seed 100", "neither", "init alone", "scale alone", "both"])


def scatter() -> str:
    """How far apart runs are that differ in their seed alone, after 2500 steps."""
    rows = []
    for name, preset in itertools.product(("first", "second", "start"), (BASE, "cartesian")):
        kind, runs = main_kind(group_runs(stored_runs(name), 2500), preset)
        losses = list(test_losses(runs).values())
        sd = f"{percent(np.std(losses, ddof=1)):.2f} %" if len(losses) > 2 else "-"
        rows.append([f"{name}.jsonl", kind, len(losses), f"{perplexity(np.mean(losses)):.3f}", sd])
    header = ["results", "after 2500 steps", "runs", "test", "sd over seeds"]
    return cli.table(rows, header, left=2)


# ---- figures


def draw_all(folder: Path):
    """Draw every figure of the pages."""
    pictures.remixing().savefig(folder / "idea.png")
    speed_figure(stored_result("speed"), folder / "speed.png")

    # CartesianMoE
    verdict.draw_comparison(stored_runs("first"), 2500, folder)
    composition_rows.draw_figure(stored_compositions(), folder / "composition.png")
    verdict.draw_trend(stored_runs("trend", "second"), folder / "trend.png")

    # C3PO
    contest = stored_result("remix-skills-test") | {"title": "Skills task, 8 seeds"}
    words = SkillsTask().words(contest["example"]["tokens"])
    contest["example"] |= {"words": words, "top_k": MoEConfig().top_k}
    contest_figures(contest, str(folder / "remix"))
    knowledge = stored_result("knowledge")
    seeds = f"{len(knowledge['runs'])} seeds"
    right, wrong = (knowledge["reach"]["matched"][label]["mean"] for label in (RIGHT, WRONG))
    title = f"Ten steps reach {right:.1%} of the right labels, and {wrong:.1%} of wrong ones\n"
    title += (
        f"that were as probable beforehand: a gap of {100 * (right - wrong):.1f} points ({seeds})"
    )
    reach_figure(knowledge["reach"], title, folder / "remix-reach.png")
    title = f"What does a pathway know? Not the reading, until it is mended ({seeds})"
    knowledge_figure(knowledge, title, folder / "remix-knowledge.png")
    title = "NGD with one setting varied at a time (3 seeds, dev)"
    sweeps_figure(stored_result("remix-skills-dev-ablation"), title, folder / "ablation.png")

    # Routing
    for name in ("skills", "stories"):
        special = stored_result(f"routing-{name}")
        figures.routing_figure(
            np.array(special["shares"])[:, :12],
            special["kinds"][:12],
            special["places"],
            f"Which expert does what: {name}, one seed",
            folder / f"routing-{name}.png",
        )


if __name__ == "__main__":
    cli.program(main)
