"""Presets x seeds on one text, compared in pairs:

python -m lab.composing.compare train --data-file TEXT --presets cartesian,fine_grained --seeds 0-12
python -m lab.composing.compare table     what the results file says, for one number of --steps

`train` trains the runs that the results file lacks, and adds a line to it for each. It continues
what was cut off. All presets see the same batches.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.comparison, __doc__)

import itertools
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cartesian import TOY
from data import load_task
from lab.composing.declarations import DECLARATIONS
from lab.composing.effects import BASE
from lab.composing.presets import build_model, preset
from lab.composing.robustness import activated_parameters, measure_robustness
from lab.composing.sharing import composed_blocks, measure_sharing
from lab.composing.verdict import comparison_report, draw_comparison
from lab.tools import runs
from lab.tools.configs import PresetsConfig
from lab.tools.files import as_json, digest, parse_json
from lab.tools.race import race
from moe import MoEConfig, require

# Runs are compared only if they agree in these, in these sizes, and in all settings of train_toy.py
# but those that are FREE.
SAME = ("data", "tokenizer", "device", "sizes")
SIZES = ("d_model", "n_layers", "context", "vocab_size")
FREE = {"preset", "seed", "lr", "steps", "eval_every", *SAME}
TOLD = ("steps", "lr", "norm_topk", "dropout", "embedding_scale", "residual_init", "device")
# --sizes -> the sizes that presets start from, where they are not the toy's. Those of the paper:
# MoE in every other layer, 16 experts, as wide as a dense layer, and an output layer of its own.
SIZES_OF = {"toy": {}, "paper": {"n_experts": 16, "dense_layers": (0, 2), "tied": False}}
SIZES_OF["paper"] |= dict.fromkeys(("d_expert", "d_shared", "d_dense"), 4 * TOY["d_model"])

# What the results file says of a run, among others.
RUN_FORM = dict.fromkeys(("preset", *SAME), str)
RUN_FORM |= dict.fromkeys(("seed", "steps", "total"), int)
RUN_FORM |= dict.fromkeys(("lr", "dropout", "embedding_scale", "residual_init"), float)
RUN_FORM |= {"activated": float}
RUN_FORM |= {"norm_topk": bool, "dev": {str: float}, "test": {str: float}}
RUN_FORM |= {"settings": {"model": {}, "train": {}}}


def main(argv=None) -> int:
    """Execute a sub-command -> the exit code."""
    command, plan = flags.comparison(argv, __doc__)
    torch.set_num_threads(1)
    return train_command(plan) if command == "train" else table_command(plan)


# ---- train


def train_command(plan: PresetsConfig) -> int:
    """Train the runs of the plan that the results file lacks, one after the other."""
    if plan.data_file is None:
        raise cli.Usage("train needs --data-file PATH")

    # What all these runs have in common has to fit the results file.
    files = {"data_file": plan.data_file, "valid_file": plan.valid_file}
    text = {"data": "text", "tokenizer": plan.tokenizer} | files
    task = load_task(text | {"seed": 0}, TOY["context"])
    same = (*TOLD, "tokenizer", "sizes")
    settings = {name: getattr(plan, name) for name in same} | {"data": text_digest(task)}
    new = settings | {"settings": {"model": {}, "train": {}}}
    require_comparable([*read_runs(plan.results), new], plan.results)

    declared = DECLARATIONS.get(Path(plan.results).stem)
    with cli.Interrupt() as interrupt:
        # Seed by seed, so that pairs are complete early.
        for seed, name in itertools.product(plan.seed_list, plan.preset_list):
            lines = read_runs(plan.results)  # other processes may have added to them
            if plan.until_told and declared and declared.outcome(lines)[1]:
                break
            run = {"preset": name, "seed": seed} | settings
            if any(run.items() <= line.items() for line in lines):
                continue

            # Train it, from where it was cut off.
            folder = run_folder(plan.out, run)
            train_in(folder, training_flags(run, text), interrupt)
            if interrupt.asked:
                return 130

            # Keep what is said of it.
            line = run | measure_preset_run(folder, task, run["sizes"])
            append_line(plan.results, line)
            (folder / "state.safetensors").unlink()  # it was for resuming only
            perplexity, seconds = line["dev"]["perplexity"], line["seconds"]
            print(f"{folder}: dev {perplexity:.3f}, {seconds:.0f} s", flush=True)
    return 0


def text_digest(task) -> str:
    """A checksum of all tokens that models learn from or are scored on."""
    return digest(*itertools.chain(*task.rows.items()))


def run_folder(out: str, run: dict) -> Path:
    """The folder of a run, named by its settings."""
    marks = [f"{run['preset']}-s{run['seed']}"]
    for name, value in run.items():
        if name not in ("preset", "seed"):
            marks.append(f"{value:g}" if isinstance(value, float) else str(value)[:11])
    return Path(out, "-".join(marks))


def training_flags(run: dict, text: dict) -> dict:
    """What train_toy.py has to be told of a run."""
    settings = {name: run[name] for name in ("preset", "seed", *TOLD)} | text
    settings |= SIZES_OF[run["sizes"]]
    return settings | {"eval_every": max(1, run["steps"] // 5)}


def train_in(folder: Path, settings: dict, interrupt: cli.Interrupt):
    """Train a run by train_toy.py, from where its folder stands. ValueError if that fails."""
    # Continue the run, or start it.
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--resume={folder}"]
    if not (folder / "state.safetensors").exists():
        options = [f"--out={folder}"]
        for name, value in settings.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                options.append(f"--{flag}={','.join(map(str, value))}")
            else:
                options.append(f"--{flag}={value}")

    # What it prints goes to a file, whose last line tells why it failed, if it did.
    with open(folder / "report.txt", "a+", encoding="utf-8") as report:
        command = [sys.executable, "-m", "train_toy", *options]
        code = subprocess.call(command, stdout=report, stderr=report)
        if code == 130:  # Ctrl-C reaches both processes, and train_toy.py has saved
            interrupt.asked = True
        report.seek(0)
        lines = report.read().splitlines() or [""]
        why = lines[-1].strip() if code > 0 else f"ended by signal {-code}"
        require(code == 0 or interrupt.asked, f"{folder}: {why}")


def sizes_and_scores(folder: Path, model, task, score: str) -> dict:
    """What the folder of a finished run says: its sizes, seconds and scores, and the curve of one
    score on dev."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    result = {
        "total": model.n_params(),
        "activated": activated_parameters(model, task),
        "seconds": log[-1]["seconds"],
    }
    result |= json.loads((folder / "scores.json").read_text(encoding="utf-8"))  # dev and test
    return result | {"curve": [[line["step"], line["dev"][score]] for line in log]}


def measure_preset_run(folder: Path, task, sizes: str) -> dict:
    """All that is said of a finished run, so that its weights need not be kept."""
    model, train_settings = runs.load_run(folder)
    settings = runs.read_settings(folder)
    result = sizes_and_scores(folder, model, task, "loss")
    result["train"] = task.score(model, "train", most=1024)

    # What its routing does, and what a step costs.
    if model.routers():
        result["robustness"] = measure_robustness(model, task)
        if composed_blocks(model):
            result["sharing"] = measure_sharing(model, task)
    steps = [preset_step(name, sizes) for name in (BASE, train_settings["preset"])]
    base_seconds, own_seconds = race(steps, 11)
    result["step"] = float(np.median(own_seconds / base_seconds))

    # Its settings, without the paths.
    for name in ("data_file", "valid_file", "out", "resume"):  # of this machine only
        settings["train"].pop(name, None)
    return result | {"settings": settings}


def preset_step(name: str, sizes: str):
    """A training step of a preset: a function without arguments."""
    base = MoEConfig(**TOY | SIZES_OF[sizes])
    model = build_model(asdict(preset(name, base)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens, targets = torch.randint(TOY["vocab_size"], (2, 8, TOY["context"]))

    def step():
        out = model(tokens, targets)
        loss = out.loss + 0.01 * out.balance_loss + 0.001 * out.z_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one sets up, and is not timed
    return step


def append_line(path: str, line: dict):
    """Add a line to a file, to which other processes may do so too."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    data = as_json(line).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:  # unbuffered: a single write, in one piece
        file.write(data)


# ---- the results file


def read_runs(path: str, form: dict = RUN_FORM) -> list[dict]:
    """The lines of a results file, none if there is no such file.

    form: what each says, see `parse_json`. ValueError for a line that is no run, such as one that
    was cut off.
    """
    if not Path(path).exists():
        return []
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        lines.append(parse_json(text, form, f"{path}: line {number}"))
    return lines


def require_comparable(lines: list[dict], path: str):
    """ValueError for runs that cannot be compared, with how they differ."""
    # Collect all values of what should not differ.
    values = defaultdict(set)
    for line in lines:
        model, train = line["settings"]["model"], line["settings"]["train"]
        same = {name: str(line[name])[:12] for name in SAME}
        same |= {name: model[name] for name in SIZES if name in model}
        same |= {name: value for name, value in train.items() if name not in FREE}
        for name, value in same.items():
            values[name].add(str(value))

    mixed = [f"{name} {', '.join(sorted(v))}" for name, v in values.items() if len(v) > 1]
    problem = f"{path} would mix runs that cannot be compared: {'; '.join(mixed)}"
    require(not mixed, f"{problem}; name another --results file")


def table_command(plan: PresetsConfig) -> int:
    """Print what the results file says of the runs of so many steps; draw figures beside it."""
    lines = read_runs(plan.results)
    hint = "train some, or name another file by --results, such as results/first.jsonl"
    require(lines, f"{plan.results} has no runs: {hint}")
    require_comparable(lines, plan.results)
    steps = sorted({line["steps"] for line in lines})
    problem = f"{plan.results}: no run has {plan.steps} steps"
    require(plan.steps in steps, f"{problem}; there are runs of {steps}")
    path = Path(plan.results)
    print(comparison_report(lines, plan.steps, DECLARATIONS.get(path.stem)))
    draw_comparison(lines, plan.steps, path.parent)
    return 0


if __name__ == "__main__":
    cli.program(main)
