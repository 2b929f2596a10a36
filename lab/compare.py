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
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from cartesian import PRESETS, TOY, build, preset
from lab import checkpoint, cli, plots, stats
from lab.robust import activated, robustness
from lab.tasks import evaluate, load_data
from moe import MoEConfig, require

MARGIN = 0.5  # percent of perplexity; "no difference" is an interval inside of it (said before any run was seen)
SAME = ("steps", "data", "tokenizer")  # runs that differ in these are not compared
SUMMARY = ("parameters", "activated", "dev", "test", "bits/byte", "gap", "cloze")  # gap: nats, test - training text
KIND = ("preset", "lr", "norm_topk", "dropout")  # runs alike in these differ in their seed alone


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
    results: Annotated[str, "the file that gets a line for every run"] = "results/compare.jsonl"
    out: Annotated[str, "where the folders of the runs are"] = "out/compare"

    def __post_init__(self):
        parts = [part.split("-") for part in self.seeds.split(",")]
        whole = all(end.isdigit() for part in parts for end in part)
        require(whole, f"seeds are {self.seeds!r}; expected numbers, such as 0-12 or 0,5")
        self.each_seed = [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]
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
    data, alike = load_data(text | {"seed": 0}, TOY["context"]), ("steps", "lr", "norm_topk", "dropout", "tokenizer")
    same = {"data": fingerprint(data), **{name: getattr(plan, name) for name in alike}}
    marks = (
        f"{plan.steps}-lr{plan.lr:g}{'-norm' * plan.norm_topk}-d{plan.dropout:g}-{plan.tokenizer}-{same['data'][:6]}"
    )
    with cli.Interrupt() as interrupt:
        for seed, name in itertools.product(plan.each_seed, plan.names):  # pairs are complete early
            run, folder = {"preset": name, "seed": seed, **same}, Path(plan.out, f"{name}-s{seed}-{marks}")
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder / "lock"
            try:
                lock.touch(exist_ok=False)
            except FileExistsError:
                print(f"{folder}: another process is at it; if none is, delete {lock}")
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
        given = {name: run[name] for name in ("preset", "seed", "steps", "lr", "dropout")} | text
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
    line |= {"robustness": robustness(model, data)} if model.routers() else {}
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
            missing = {*SAME, *KIND, "seed", "test"} - found.keys()
        except (ValueError, AttributeError):
            missing = "all of JSON"
        require(not missing, f"{path}: line {number} is no run of lab.compare (it lacks {missing}); take it out")
    return lines


def table(plan: Plan) -> int:
    """Effects against fine_grained in pairs of the same seed, robustness, and figures, from the results file."""
    lines, kinds, others = read(plan.results), {}, Counter()
    keys = [tuple(line[name] for name in SAME) for line in lines]
    main = Counter(key for key in keys if key[0] == plan.steps).most_common(1)
    require(len(main) > 0, f"{plan.results}: no run has {plan.steps} steps; there are {sorted({k[0] for k in keys})}")
    for line, key in zip(lines, keys, strict=True):
        if key == main[0][0]:
            kinds.setdefault(tuple(line[name] for name in KIND), {})[line["seed"]] = line
        else:
            others[" ".join(f"{n} {str(x)[:12]}" for n, x, y in zip(SAME, key, main[0][0], strict=True) if x != y)] += 1
    scores, effects, points = [], {}, {}
    for kind, runs in sorted(kinds.items(), key=lambda item: (list(PRESETS).index(item[0][0]), item[0][1:])):
        name = f"{kind[0]} lr {kind[1]:g}{' norm' * kind[2]}{f' dropout {kind[3]:g}' if kind[3] else ''}"
        base = max((r for k, r in kinds.items() if k[0] == "fine_grained" and k[3] == kind[3]), key=len, default={})
        gaps = [line["test"]["loss"] - base[seed]["test"]["loss"] for seed, line in runs.items() if seed in base]
        verdict = ""
        if runs is not base and len(gaps) > 1:
            mean, half = stats.interval(gaps)
            effects[name] = [100 * math.expm1(gap) for gap in (mean, mean - half, mean + half)]
            verdict = "{:+.2f}% ({:+.2f} to {:+.2f}): ".format(*effects[name]) + judge(*effects[name][1:])
        scores.append([name, len(runs), *summary(list(runs.values())), verdict])
        each = [line["robustness"] for line in runs.values() if "robustness" in line]
        if each:
            points[name] = {p: [np.mean([x[p][key] for x in each]) for key in ("mass", "loss")] for p in each[0]}
    print(cli.table(scores, header=["", "runs", *SUMMARY, "perplexity against fine_grained"]), end="\n\n")
    shown = [p for p in next(iter(points.values()), {}) if p[0] not in "qn"]
    rows = [
        [name, *(f"{math.exp(found[p][1]):.2f}" if p in found else "" for p in shown)] for name, found in points.items()
    ]
    print(cli.table(rows, header=["perplexity, disabled:", *shown]))
    for text, n in others.items():
        print(f"left out, since they differ: {n} runs with {text}")
    plots.effects_figure(effects, MARGIN, Path(plan.results).with_name("effects.png"))
    plots.robustness_figure(points, Path(plan.results).with_name("robustness.png"))
    return 0


def summary(runs: list[dict]) -> list[str]:
    """The cells below SUMMARY, of runs that differ in their seed alone."""
    mean = {key: np.mean([run[key]["loss"] for run in runs]) for key in ("train", "dev", "test")}
    bits, cloze = (np.mean([run["test"].get(key, math.nan) for run in runs]) for key in ("bits_per_byte", "cloze"))
    cells = [f"{np.mean([run[key] for run in runs]):,.0f}" for key in ("total", "activated")]
    cells += [f"{math.exp(mean[key]):.3f}" for key in ("dev", "test")]
    return [*cells, f"{bits:.4f}", f"{mean['test'] - mean['train']:.3f}", f"{cloze:.1%}"]


def judge(low: float, high: float) -> str:
    """What an interval of the effect, in percent of perplexity, allows to say."""
    if low > 0 or high < 0:
        return "higher" if low > 0 else "lower"
    return "no difference" if max(-low, high) < MARGIN else "cannot be told here"


def speed(plan: Plan) -> int:
    """Time a training step of each preset, in turns, so that what slows the machine slows them all."""
    names = ["fine_grained", *(name for name in plan.names if name != "fine_grained")]
    models = [build(asdict(preset(name, MoEConfig(**TOY)))) for name in names]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    tokens, targets = torch.randint(TOY["vocab_size"], (2, 8, TOY["context"]))
    seconds = np.zeros((31, len(names)))
    for turn, row in enumerate(seconds):
        for i in range(len(names))[:: 1 if turn % 2 else -1]:  # so that none always follows the same one
            start = time.perf_counter()
            out = models[i](tokens, targets)
            (out.loss + 0.01 * out.balance_loss + 0.001 * out.z_loss).backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            row[i] = time.perf_counter() - start
    ratio = np.quantile(seconds[1:] / seconds[1:, :1], [0.5, 0.25, 0.75], axis=0).T.round(3)  # the first one sets up
    rows = [
        (name, f"{ms:.1f}", *each) for name, ms, each in zip(names, 1e3 * np.median(seconds, 0), ratio, strict=True)
    ]
    print(cli.table(rows, header=["a training step", "median ms", "/ fine_grained", "quartiles:", ""]))
    return 0


if __name__ == "__main__":
    cli.run(main)
