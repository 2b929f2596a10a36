"""Does re-mixing gain more on one kind of model than on another? On the same seeds, so on the same tasks and prompts:

python train_toy.py --preset cartesian --seed 20 --seeds 5 --out out/gain
python -m lab.baselines NGD out/gain-cartesian-s2[0-4]                    tries settings on dev
python eval.py remix out/gain-cartesian-s2[0-4] --split test --lr ... --layers ... --out out/gain-cartesian

the same with fine_grained, and then

python -m lab.gain out/gain-cartesian/remix-test.json out/gain-fine_grained/remix-test.json
"""

import json
from pathlib import Path

import numpy as np

from lab import cli, stats
from moe import require


def main(argv) -> int:
    """Two reports of eval.py remix, side by side."""
    if len(argv) != 2:
        raise cli.Usage("expected two files that eval.py remix has written: python -m lab.gain A.json B.json")
    found = [json.loads(Path(name).read_text(encoding="utf-8")) for name in argv]
    for name, report in zip(argv, found, strict=True):
        require({"seeds", "prompts", "rows"} <= report.keys(), f"{name} was not written by eval.py remix")
    (first, second), n = ((report["seeds"], report["prompts"]) for report in found), len(found[0]["seeds"])
    require(first == second, f"the seeds and prompts are {first} and {second}: these runs make no pairs")
    require(n > 1, "one run of a kind: an interval needs two seeds or more")
    print(compared(*(report["rows"] for report in found)))
    print(f"\n{n} seeds; intervals of 95 %: of a gain by bootstrap over seeds and cues, of a difference Student's t")
    return 0


def compared(first: dict, second: dict) -> str:
    """A line for each method: its gain on either kind of model, and their difference in pairs; base: accuracy."""
    lines = []
    for name in (name for name in first if name in second and name != "oracle's null"):
        base, signed = (0, "") if name == "base" else (1, "+")
        each = [np.subtract(rows[name]["each"], base * np.array(rows["base"]["each"])) for rows in (first, second)]
        mean, half = stats.interval(each[0] - each[1])
        cells = [f"{gain.mean():{signed}.1%}" for gain in each]
        if base:
            ends = (f" ({rows[name]['low']:+.1%} to {rows[name]['high']:+.1%})" for rows in (first, second))
            cells = [cell + end for cell, end in zip(cells, ends, strict=True)]
        difference = f"{mean:+.1%} ({mean - half:+.1%} to {mean + half:+.1%})"
        lines.append([name, *cells, difference, f"{stats.paired(*each):.2g}"])
    return cli.table(lines, header=["gain over base", "first", "second", "first - second", "p"])


if __name__ == "__main__":
    cli.run(main, __doc__)
