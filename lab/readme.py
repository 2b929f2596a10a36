"""What the pages show, from results/ alone: python -m lab.readme

Fills every `<!-- results: NAME -->` ... `<!-- end -->` of README.md and docs/*.md, and draws their figures, docs/*.png.
"""

import re
from pathlib import Path

import numpy as np

from lab import cli, diagrams, plots, verdict
from lab.claims import RESULTS, claims, runs, stored
from lab.contest import figures, main_table, report, sweep_table
from lab.gain import compared
from lab.verdict import DECLARED, grouped, overview, show, trend
from moe import require

ROOT = RESULTS.parent
PAGE = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def main(argv=None) -> int:
    """Fill the pages and draw the figures -> the exit code."""
    cli.Parser("lab.readme", description=__doc__).parse(argv)
    folder = ROOT / "docs"
    draw(folder)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"filled {path.name}")
    print(f"drew {', '.join(sorted(path.name for path in folder.glob('*.png')))}")
    return 0


def blocks() -> dict:
    """Name -> a function that says what stands in that place."""
    texts = {path.stem: lambda path=path: path.read_text(encoding="utf-8") for path in RESULTS.glob("*.txt")}
    texts |= {
        "train_toy": lambda first=texts["train_toy"]: "\n\n".join(first().split("\n\n")[n] for n in (0, 2, 3)),
        "remix": lambda: report(stored("remix-skills-test")),
        "remix-strict": lambda: main_table(*(stored("remix-skills-test-strict")[key] for key in ("rows", "costs"))),
        "remix-stories": lambda: main_table(*(stored("remix-stories-test")[key] for key in ("rows", "costs"))),
        "ablation": lambda: sweep_table(stored("remix-skills-dev-ablation")),
        "compare": lambda: show(runs("compare"), 2500, DECLARED["compare"]),
        "second": lambda: show(runs("second"), 2500, DECLARED["second"]),
        "gain": lambda: compared(stored("gain-cartesian"), stored("gain-fine_grained")),
        "gain-half": lambda: compared(stored("gain-half-cartesian"), stored("gain-half-fine_grained")),
        "trend": lambda: "\n".join(trend(runs("trend", "second"))),
        "sweep": lambda: "\n\n".join(overview(grouped(runs("sweep"), steps), steps) for steps in (800, 2500)),
    }
    shown = {name: lambda text=text: f"```text\n{text().strip()}\n```\n" for name, text in texts.items()}
    return shown | {"claims": claims}


def pages() -> dict[Path, str]:
    """Every page, filled. ValueError: a place whose name nobody knows."""
    known = blocks()

    def fill(match):
        require(match[2] in known, f"no results are called {match[2]!r}; there are {', '.join(known)}")
        return match[1] + known[match[2]]() + match[3]

    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path: PAGE.sub(fill, path.read_text(encoding="utf-8")) for path in paths}


def draw(folder: Path):
    """Every figure."""
    verdict.draw(runs("compare"), 2500, folder)
    found = verdict.with_interval(verdict.by_steps(runs("trend", "second")))
    found = {name.partition(",")[0]: effect for name, effect in found.items()}
    plots.effects_figure(found, verdict.MARGIN, "Cartesian against fine_grained", folder / "trend.png")
    diagrams.remixing().savefig(folder / "idea.png")
    figures(stored("remix-skills-test"), f"{folder}/remix")
    title = "NGD with one setting varied at a time (3 seeds, dev)"
    plots.sweeps_figure(stored("remix-skills-dev-ablation"), title, folder / "ablation.png")
    for name in ("skills", "stories"):
        special = {key: np.array(value) for key, value in stored(f"routing-{name}").items()}
        shares, load, kinds, places = (special[key] for key in ("shares", "load", "kinds", "places"))
        told = (list(kinds[:12]), list(places), f"Which expert does what: {name}, one seed")
        plots.routing_figure(shares[:, :12], load, *told, folder / f"routing-{name}.png")


if __name__ == "__main__":
    cli.run(main)
