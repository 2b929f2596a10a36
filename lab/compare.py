"""Presets x seeds on one text, compared in pairs:

python -m lab.compare train --data-file TEXT --valid-file TEXT --presets cartesian,fine_grained --seeds 0-12
python -m lab.compare table     what the results file says, for one number of --steps
python -m lab.compare speed     a training step of each of the --presets, in turns

`train` trains what the results file lacks and adds a line to it for every run. What was cut off is continued, and
several processes may share the work. All presets see the same batches: those are a function of seed and step.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from cartesian import PRESETS, TOY, build, preset
from lab import checkpoint, cli
from lab.robust import activated, robustness
from lab.sharing import sharing
from lab.tasks import evaluate, load_data
from lab.verdict import BASE, DECLARED, KIND, draw, show
from moe import MoEConfig, require

SAME = ("data", "tokenizer", "device")  # runs that differ in these, or in other settings, are not compared
SIZES = ("d_model", "n_layers", "context", "vocab_size")  # nor those that differ in these
FREE = {"preset", "seed", "lr", "steps", "eval_every", *SAME}  # settings that may differ, or are said elsewhere
RUN = (*KIND, "seed", "steps", *SAME)  # what tells one run from another


@dataclass
class Plan:
    """What to train, or to show."""

    data_file: Annotated[str | None, "the text, its documents ended by <|endoftext|>"] = None
    valid_file: Annotated[str | None, "held-out text (none: the last tenth of data_file)"] = None
    tokenizer: Annotated[str, "as in train_toy.py"] = "tinystories"
    presets: Annotated[str, "names from cartesian.py, with commas"] = "cartesian,fine_grained"
    seeds: Annotated[str, "such as 0-12, or 0,5"] = "0-2"
    steps: Annotated[int, "optimiser steps"] = 2500
    lr: Annotated[float, "peak learning rate"] = 3e-3
    norm_topk: Annotated[bool, "divide the k routing weights by their sum"] = False
    dropout: Annotated[float, "dropout on the embedding and on what each sub-layer adds"] = 0.0
    device: Annotated[Literal["cpu", "cuda"], "where to train"] = "cpu"
    results: Annotated[str, "the file that gets a line for every run"] = "results/compare.jsonl"
    out: Annotated[str, "where the folders of the runs are"] = "out/compare"

    def __post_init__(self):
        parts = [part.split("-") for part in self.seeds.split(",")]
        whole = all(end.isdigit() for part in parts for end in part)
        self.each_seed = [s for part in parts for s in range(int(part[0]), int(part[-1]) + 1)] if whole else []
        require(self.each_seed, f"seeds are {self.seeds!r}; expected numbers, such as 0-12 or 0,5")
        self.names = self.presets.split(",")
        for name in self.names:
            require(name in PRESETS, f"no preset is called {name!r}{cli.nearest(name, PRESETS)}")


def main(argv=None) -> int:
    """Run a sub-command -> the exit code."""
    commands = {"train": train, "table": table, "speed": speed}
    parser = cli.Parser("lab.compare", usage="%(prog)s {train,table,speed} [flags]", description=__doc__)
    parser.add_argument("command", choices=commands, help="see above")
    cli.add_flags(parser, Plan)
    given = parser.parse(argv)
    torch.set_num_threads(1)
    return commands[given.pop("command")](cli.build(Plan, given))


def train(plan: Plan) -> int:
    """Train the runs of the plan that the results file lacks, one after the other."""
    if plan.data_file is None:
        raise cli.Usage("train needs --data-file PATH")
    text = {"data": "text", **{name: getattr(plan, name) for name in ("data_file", "valid_file", "tokenizer")}}
    data = load_data(text | {"seed": 0}, TOY["context"])
    same = {name: getattr(plan, name) for name in ("steps", *KIND[1:], *SAME[1:])} | {"data": fingerprint(data)}
    marks = "-".join(f"{value:g}" if type(value) is float else str(value)[:11] for value in same.values())
    alike([*read(plan.results), same | {"settings": {"model": {}, "train": {}}}], plan.results)
    with cli.Interrupt() as interrupt:
        for seed, name in itertools.product(plan.each_seed, plan.names):  # pairs are complete early
            run, folder = {"preset": name, "seed": seed, **same}, Path(plan.out, f"{name}-s{seed}-{marks}")
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder / "lock"
            try:
                lock.touch(exist_ok=False)
            except FileExistsError:
                print(f"{folder}: another process is at it; if none is, delete {lock}", flush=True)
                continue
            try:
                if not any(run.items() <= line.items() for line in read(plan.results)):
                    fit(folder, run, text, interrupt)
                    if interrupt.asked:
                        return 130
                    append(plan.results, line := run | score(folder, data))
                    (folder / "state.safetensors").unlink()  # it was for resuming only
                    print(f"{folder}: dev {line['dev']['perplexity']:.3f}, {line['seconds']:.0f} s", flush=True)
            finally:
                lock.unlink()
    return 0


def fit(folder: Path, run: dict, text: dict, interrupt: cli.Interrupt):
    """Train a run by train_toy.py, from where its folder stands. ValueError if that fails."""
    flags = [f"--resume={folder}"]
    if not (folder / "state.safetensors").exists():
        given = {name: run[name] for name in ("preset", "seed", "steps", "lr", "dropout", "device")} | text
        given |= {"out": folder, "eval_every": max(1, run["steps"] // 5)}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        flags += ["--norm-topk"] * run["norm_topk"]
    with open(folder / "report.txt", "a+", encoding="utf-8") as report:
        code = subprocess.call([sys.executable, "-m", "train_toy", *flags], stdout=report, stderr=report)
        interrupt.asked |= code == 130  # Ctrl-C reaches both processes, and train_toy.py has saved
        report.seek(0)
        require(code in (0, 130), f"{folder}: {['', *report][-1].strip()}")


def score(folder: Path, data) -> dict:
    """All that is told of a finished run, so that its weights need not be kept."""
    (model, train), settings = checkpoint.load(folder), checkpoint.read_settings(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    line = {"total": model.n_params(), "activated": activated(model, data), "seconds": log[-1]["seconds"]}
    line |= json.loads((folder / "scores.json").read_text(encoding="utf-8"))  # dev and test
    line |= {"train": evaluate(model, data, "train", most=1024), "curve": [[x["step"], x["dev"]["loss"]] for x in log]}
    if model.routers():
        line["robustness"] = robustness(model, data)
        line |= {"sharing": sharing(model, data)} if model.config.layer == "cartesian" else {}
    seconds = race([BASE, train["preset"]], 11)
    line["step"] = float(np.median(seconds[:, 1] / seconds[:, 0]))
    paths = ("data_file", "valid_file", "out", "resume")  # of one machine only
    return line | {"settings": settings | {"train": {k: v for k, v in train.items() if k not in paths}}}


def fingerprint(data) -> str:
    """A checksum of all tokens that models learn from or are scored on."""
    digest = hashlib.sha256()
    for split, row in data.rows.items():
        digest.update(split.encode() + row.tobytes())
    return digest.hexdigest()


def append(path: str, line: dict):
    """Add a line to a file, whoever else does so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:  # unbuffered: a single write, which lands in one piece
        file.write(json.dumps(line).encode() + b"\n")


def read(path: str) -> list[dict]:
    """The lines of a results file, none if there is no such file. ValueError for a line that is no result of ours."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            lines[number - 1] = found = json.loads(line)
            missing = {*RUN, "total", "activated", "step", "train", "dev", "test", "settings"} - found.keys()
            missing = missing or {"model", "train"} - found["settings"].keys() or {found["preset"]} - PRESETS.keys()
        except (ValueError, AttributeError):
            missing = {"an object of JSON"}
        told = f"{path}: line {number} is no run of lab.compare (missing or unknown: {', '.join(missing)}); take it out"
        require(not missing, told)
        twice = any(all(line[x] == found[x] for x in RUN) for line in lines[: number - 1])
        require(not twice, f"{path}: line {number} is a run that another line has; take one of them out")
    return lines


def alike(lines: list[dict], path: str):
    """ValueError for runs that cannot be compared, with how they differ."""
    kinds = {}
    for line in lines:
        given = {name: value for name, value in line["settings"]["train"].items() if name not in FREE}
        given |= {name: value for name, value in line["settings"]["model"].items() if name in SIZES}
        for name, value in (given | {name: line[name] for name in SAME}).items():
            kinds.setdefault(name, Counter())[str(value)[:12]] += 1
    mixed = {name: kind for name, kind in kinds.items() if len(kind) > 1}
    told = "; ".join(f"{name} {', '.join(f'{x} ({n} runs)' for x, n in kind.items())}" for name, kind in mixed.items())
    require(not mixed, f"{path} would mix runs that cannot be compared: {told}; name another --results file")


def table(plan: Plan) -> int:
    """What the results file says of the runs of so many steps, with figures beside it."""
    lines = read(plan.results)
    alike(lines, plan.results)
    steps = sorted({line["steps"] for line in lines})
    require(plan.steps in steps, f"{plan.results}: no run has {plan.steps} steps; there are runs of {steps or 'none'}")
    path = Path(plan.results)
    print(show(lines, plan.steps, DECLARED.get(path.stem, "")))
    draw(lines, plan.steps, path.parent)
    return 0


def race(names: list[str], turns: int):
    """A training step of each preset, in turns, so that what slows the machine slows them all -> seconds (turns, n)."""
    models = [build(asdict(preset(name, MoEConfig(**TOY)))) for name in names]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    tokens, targets = torch.randint(TOY["vocab_size"], (2, 8, TOY["context"]))
    seconds = np.zeros((turns + 1, len(names)))
    for turn, row in enumerate(seconds):
        for i in range(len(names))[:: 1 if turn % 2 else -1]:  # so that none always follows the same one
            start = time.perf_counter()
            out = models[i](tokens, targets)
            (out.loss + 0.01 * out.balance_loss + 0.001 * out.z_loss).backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            row[i] = time.perf_counter() - start
    return seconds[1:]  # the first turn sets up


def speed(plan: Plan) -> int:
    """Time a training step of each preset against fine_grained."""
    names = [BASE, *(name for name in plan.names if name != BASE)]
    seconds = race(names, 30)
    ratio = np.quantile(seconds / seconds[:, :1], [0.5, 0.25, 0.75], axis=0).T.round(3)
    times = (f"{ms:.1f}" for ms in 1e3 * np.median(seconds, 0))
    rows = [(name, ms, *each) for name, ms, each in zip(names, times, ratio, strict=True)]
    print(cli.table(rows, header=["a training step", "median ms", f"/ {BASE}", "quartiles:", ""]))
    return 0


if __name__ == "__main__":
    cli.run(main)
