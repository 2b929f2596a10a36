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
        require({"runs", "seeds", "prompts", "rows"} <= report.keys(), f"{name} was not written by eval.py remix")
    first, second = ((report["seeds"], report["prompts"]) for report in found)
    require(first == second, f"the seeds and prompts are {first} and {second}: these runs make no pairs")
    print(compared(*found))
    return 0


def compared(first: dict, second: dict) -> str:
    """A line for each method: its gain on either kind of model, and their difference in pairs. Of the model as it is,
    and of the null, which no gain is wanted from, it is the share itself."""
    lines = []
    for name in (name for name in first["rows"] if name in second["rows"]):
        rows = [found["rows"] for found in (first, second)]
        gains = name not in ("base", "oracle's null")
        each = [np.subtract(row[name]["each"], gains * np.array(row["base"]["each"])) for row in rows]
        mean, half = stats.interval(each[0] - each[1])
        ends = (f" ({row[name]['low']:+.1%} to {row[name]['high']:+.1%})" if gains else "" for row in rows)
        cells = [f"{x.mean():{'+' * gains}.1%}{end}" for x, end in zip(each, ends, strict=True)]
        difference = f"{mean:+.1%} ({mean - half:+.1%} to {mean + half:+.1%})"
        lines.append([name, *cells, difference, f"{stats.paired(*each):.2g}"])
    heads = [found["runs"][0].rpartition("-s")[0] for found in (first, second)]
    return f"""{cli.table(lines, header=["gain over base", *heads, "difference", "p"])}

{len(first["seeds"])} seeds; intervals of 95 %: of a gain by bootstrap over seeds and cues, of a difference Student's t;
base and the null: the share of the prompts that they lead to their label, right or wrong"""


if __name__ == "__main__":
    cli.run(main, __doc__)
