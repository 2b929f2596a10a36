"""Train a small mixture-of-experts model, in about a minute on two CPU cores:

python train_toy.py                        the skills-and-dialects task
python train_toy.py --data-file story.txt  any text, as bytes
python train_toy.py --help                 every flag; each comes from a field of the two dataclasses
"""

import itertools
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch.func import functional_call
from tqdm import tqdm

from cartesian import PRESETS, TOY, CartesianConfig, build, preset
from data import SkillsTask
from lab import checkpoint, cli, plots, stats
from lab.contest import taste
from lab.tasks import evaluate, final_scores, load_data, places, specialisation, stories
from moe import MoEConfig, require


@dataclass
class TrainConfig:
    """What a run learns, and how."""

    data: Annotated[Literal["skills", "tinystories", "text"], "the task, TinyStories (1.9 GB), your text"] = "skills"
    data_file: Annotated[str | None, "a UTF-8 text, its documents ended by <|endoftext|>; implies --data text"] = None
    valid_file: Annotated[str | None, "held-out text (none: the last tenth of data_file)"] = None
    tokenizer: Annotated[str, "for text: tinystories, bytes, or an encoding of tiktoken, such as gpt2"] = "tinystories"
    model: Annotated[Literal["moe", "dense"], "dense: every layer as wide as what a token visits in the MoE"] = "moe"
    preset: Annotated[Literal[tuple(PRESETS)] | None, "of cartesian.py, at the size of these experts"] = None
    steps: Annotated[int, "optimiser steps"] = 500
    batch: Annotated[int, "sequences in a step"] = 64
    lr: Annotated[float, "peak learning rate"] = 3e-3
    warmup: Annotated[int, "steps of linear warm-up, before the cosine"] = 50
    final_lr: Annotated[float, "learning rate at the end, as a share of the peak"] = 0.05
    weight_decay: Annotated[float, "AdamW's weight decay, on matrices only"] = 0.1
    clip: Annotated[float, "largest norm of the gradient"] = 1.0
    balance: Annotated[float, "weight of the balance loss"] = 0.01
    z: Annotated[float, "weight of the router z-loss"] = 0.001
    seed: Annotated[int, "draws the task, the weights and the batches"] = 0
    seeds: Annotated[int, "how many seeds to run, one after the other"] = 1
    twin: Annotated[bool, "train the dense twin of every seed as well, and compare them in pairs"] = False
    eval_every: Annotated[int, "steps between evaluations, each with a checkpoint"] = 100
    threads: Annotated[int, "CPU threads (0: as many as torch would take)"] = 1
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute"] = "auto"
    dtype: Annotated[Literal["float32", "bfloat16"], "of a pass; weights stay float32"] = "float32"
    compile: Annotated[bool, "use torch.compile"] = False
    remix: Annotated[bool, "on the skills task: end with a taste of re-mixing"] = True
    out: Annotated[str | None, "the run's folder (none: a new one in out/)"] = None
    resume: Annotated[str | None, "continue the run in this folder"] = None

    def __post_init__(self):
        for name in ("steps", "batch", "seeds", "eval_every"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "clip"):
            require(0 < getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; it must be greater than 0")
        require(min(self.seed, self.warmup, self.threads) >= 0, "seed, warmup and threads must be at least 0")
        alone = self.preset is None or (self.model == "moe" and not self.twin)
        require(alone, "a preset has no dense twin: compare it with --preset dense")
        require(self.data != "text" or self.data_file is not None, "--data text needs --data-file PATH")


TEXT = {"d_model": 128, "context": 128, "batch": 8, "steps": 2500, "eval_every": 250, "lr": 6e-3, "warmup": 100}
SKILLS = {"n_experts": 15, "top_k": 3, "d_shared": 64}  # for presets: the default size, one of 16 experts is shared
FREE = ("resume", "device", "compile", "remix")  # flags that a resumed run may change
SHOWN = {  # how people read the scores
    "loss": ("cross-entropy (nats)", ".3f"),
    "perplexity": ("perplexity per token", ".2f"),
    "bits_per_byte": ("bits per byte", ".3f"),
    "accuracy": ("accuracy", ".1%"),
    "clear": ("  clear cues", ".1%"),
    "ambiguous": ("  ambiguous cues", ".1%"),
    "cloze": ("last word, one of four", ".1%"),
    "frequent": ("  the most frequent", ".1%"),
    "balance_loss": ("balance loss", ".2f"),
    "seconds": ("training (s)", ".0f"),
}


def main(argv=None) -> int:
    """Train, report, and say what to run next -> the exit code."""
    parser = cli.Parser("train_toy.py", usage="%(prog)s [flags]", description=__doc__)
    cli.add_flags(parser, TrainConfig, MoEConfig, skip=("vocab_size",))  # the data decides
    given = parser.parse(argv)
    train, sizes = resumed(given) if given.get("resume") else fresh(given)
    if sizes.top_k == 1 and sizes.norm_topk and train.model == "moe":
        raise cli.Usage("top_k 1 with norm_topk: the router gets no gradient; use --no-norm-topk")
    train.threads = train.threads or torch.get_num_threads()
    torch.set_num_threads(train.threads)
    names = ("moe", "dense") if train.twin else (train.model,)
    results, several = {name: [] for name in names}, train.seeds > 1
    for seed in range(train.seed, train.seed + train.seeds):
        for name in names:
            one = {**asdict(train), "seed": seed, "seeds": 1, "model": name, "twin": False}
            scores = run(TrainConfig(**one), sizes, several or train.twin)
            if scores is None:
                return 130  # what a shell expects of a program that Ctrl-C has ended
            results[name].append(scores)
    if several:
        print(summary(results, train))
    return 0


def fresh(given: dict):
    """Settings of a new run: the flags over the defaults, which for text are others than for the skills task."""
    if given.get("data_file") and "data" not in given:
        given["data"] = "text"
    text, chosen = given.get("data", "skills") != "skills", given.get("preset")
    values = (TEXT if text else {}) | ((TOY if text else SKILLS) if chosen else {}) | given
    train, sizes = cli.build(TrainConfig, values), cli.build(MoEConfig, values)
    try:
        return train, preset(train.preset, sizes) if train.preset else sizes
    except ValueError as error:
        raise cli.Usage(str(error)) from error


def resumed(given: dict):
    """Settings of the run to continue. Usage names every flag that asks for something else."""
    saved = checkpoint.read_settings(Path(given["resume"]))
    old = {**saved["model"], **saved["train"]}
    other = [f"--{name.replace('_', '-')} {value} (the run has {old.get(name)})" for name, value in given.items()
             if name not in FREE and value != old.get(name)]  # fmt: skip
    if other:
        raise cli.Usage(f"{given['resume']} has other settings: {', '.join(other)}; leave them out, or start a new run")
    kept = {name: given[name] for name in FREE if name in given}
    return cli.build(TrainConfig, {**old, **kept}), cli.build(CartesianConfig if "layer" in old else MoEConfig, old)


def run(train: TrainConfig, sizes: MoEConfig, several: bool):
    """One run of one seed -> its scores, or None if it was interrupted."""
    data = load_data(asdict(train), sizes.context)
    model, optimizer = start(train, sizes, data)
    folder = Path(train.resume) if train.resume else new_folder(train, several)
    print(describe(train, model, data, folder), end="\n\n")
    finished, log = fit(model, optimizer, data, train, folder)
    if not finished:
        print(f"\nstopped and saved; continue with\n    python train_toy.py --resume {folder}")
        return None
    plots.loss_figure(log, uniform(train, data), f"{train.data}, seed {train.seed}", folder / "loss.png")
    load = []
    if model.routers():
        load = (special := specialisation(model, data)).load
        title = f"Which expert does what: {train.data}, seed {train.seed}"
        plots.routing_figure(special.shares, load, special.kinds, places(model), title, folder / "routing.png")
    scores = final_scores(model, data)
    checkpoint.write(folder / "scores.json", json.dumps(scores).encode())
    if train.data != "skills":
        print(f"\nthree samples:\n\n{stories(model, data)}")
    if train.remix and train.data == "skills" and model.routers() and not several:
        print("\n" + taste(folder))
    print(report(train, model, data, scores, log, load, folder))
    return {**scores["test"], "seconds": log[-1]["seconds"]}


def start(train: TrainConfig, sizes: MoEConfig, data):
    """An untrained model of these sizes, or its dense twin, and AdamW with weight decay on matrices only."""
    dense = {"dense_layers": range(sizes.n_layers)} if train.model == "dense" else {}
    torch.manual_seed(train.seed)
    model = build(asdict(replace(sizes, vocab_size=data.vocab_size, **dense))).to(pick_device(train.device))
    groups = [{"params": [w for w in model.parameters() if w.dim() > 1], "weight_decay": train.weight_decay}]
    groups += [{"params": [w for w in model.parameters() if w.dim() == 1], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95), fused=True)


def fit(model, optimizer, data, train: TrainConfig, folder: Path):
    """Train from the start, or from what the run folder holds -> (finished, log). False: stopped by Ctrl-C, and saved.

    Every `eval_every` steps a line joins the log and everything is saved. ValueError where the loss or the gradient is
    no longer finite: the folder then keeps the last good weights.
    """
    settings = {"model": asdict(model.config), "train": asdict(train)}
    settings["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    begin, log, recent = checkpoint.resume(folder, model, optimizer) if train.resume else (0, [], [])
    forward, start = make_forward(model, train), time.perf_counter() - (log[-1]["seconds"] if log else 0.0)
    bar = tqdm(total=train.steps, initial=begin, unit="step", desc=f"seed {train.seed}", leave=False, disable=None)

    def record(step):
        train_loss = sum(recent) / len(recent) if recent else None
        dev = evaluate(model, data, "dev")
        log.append({"step": step, "seconds": time.perf_counter() - start, "train_loss": train_loss, "dev": dev})
        recent.clear()
        bar.write(progress(log))

    if not log:
        record(0)
        checkpoint.save(folder, model, optimizer, 0, settings, log, recent)
    with bar, cli.Interrupt() as interrupt:
        for step in range(begin, train.steps):
            loss = update(forward, model, optimizer, data, train, step)
            if not math.isfinite(loss):
                kept = f"{folder} keeps the last good checkpoint; try a lower --lr than {train.lr:g}"
                raise ValueError(f"the loss or its gradient is no longer finite at step {step + 1}: {kept}")
            recent.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            due = (step + 1) % train.eval_every == 0 or step + 1 == train.steps
            if due:
                record(step + 1)
            if due or interrupt.asked:
                checkpoint.save(folder, model, optimizer, step + 1, settings, log, recent)
            if interrupt.asked and step + 1 < train.steps:
                return False, log
    return True, log


def update(forward, model, optimizer, data, train: TrainConfig, step: int) -> float:
    """One optimiser step on the batch of this step -> the pure cross-entropy. Not finite: nothing was changed."""
    device = next(model.parameters()).device
    tokens, targets = (t.to(device) for t in data.batch(step, train.batch))
    torch.manual_seed(train.seed * 1_000_003 + step)  # dropout, like the batch, is a function of (seed, step)
    out = forward(tokens, targets)
    (out.loss + train.balance * out.balance_loss + train.z * out.z_loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
    for group in optimizer.param_groups:
        group["lr"] = train.lr * schedule(step, train)
    if not norm.isfinite():
        return math.nan
    optimizer.step()
    optimizer.zero_grad()
    return out.loss.item()


def schedule(step: int, train: TrainConfig) -> float:
    """The learning rate as a share of its peak: linear warm-up, then half a cosine down to final_lr."""
    warm = min(1.0, (step + 1) / max(train.warmup, 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / train.steps)
    return warm * (train.final_lr + (1 - train.final_lr) * cosine)


def make_forward(model, train: TrainConfig):
    """model(tokens, targets), in another number format or compiled where that is asked for."""

    def cast(tokens, targets):
        low = {name: weight.to(torch.bfloat16) for name, weight in model.named_parameters()}
        return functional_call(model, low, (tokens, targets))

    forward = cast if train.dtype == "bfloat16" else model
    return torch.compile(forward) if train.compile else forward


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's mps, else the CPU. ValueError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there[name]:
        found = ", ".join(device for device, found in there.items() if found)
        raise ValueError(f"--device {name}: this machine (or this build of torch) has none; found: {found}")
    return torch.device(name)


def new_folder(train: TrainConfig, several: bool) -> Path:
    """out/DATA-sSEED, or the next free name; --out names another, which may not hold a run yet."""
    dense = "-dense" if train.model == "dense" else f"-{train.preset}" if train.preset else ""
    if train.out:
        folder = Path(f"{train.out}{dense}-s{train.seed}" if several else train.out)
        if (folder / "config.json").exists():
            raise cli.Usage(f"{folder} holds a run already; continue it with --resume {folder}, or name another --out")
        return folder
    name = f"{train.data}{dense}-s{train.seed}"
    names = (Path("out") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(folder for folder in names if not folder.exists())


def progress(log: list[dict]) -> str:
    """The last line of the log as a row, below a header if it is the first."""
    line = log[-1]
    cells = {
        "step": f"{line['step']}",
        "train loss": "-" if line["train_loss"] is None else f"{line['train_loss']:.3f}",
    }
    for name, value in line["dev"].items():
        label = {"loss": "dev loss", "balance_loss": "balance"}.get(name, name.replace("_", " "))
        cells[label] = f"{value:{SHOWN[name][1]}}"
    cells["time"] = f"{line['seconds']:.0f} s"
    row = "".join(f"{text:>{max(len(name), 6) + 3}}" for name, text in cells.items())
    return row if len(log) > 1 else "".join(f"{name:>{max(len(name), 6) + 3}}" for name in cells) + "\n" + row


def describe(train: TrainConfig, model, data, folder) -> str:
    """What is about to run."""
    sizes, length, device = model.config, data.batch(0, 1)[0].shape[1], model.embedding.weight.device
    where = f"{device} ({train.threads} thread{'s' if train.threads > 1 else ''})" if device.type == "cpu" else device
    total, active, varies = model.n_params(), model.n_params(activated=True), getattr(sizes, "router", "") == "top_p"
    visits = f"top-p {sizes.top_p}" if varies else f"top {sizes.top_k}"
    layer = f"{sizes.n_experts} experts of width {sizes.d_expert}, {visits}, {train.preset}".removesuffix(", None")
    sparse = any("experts" in name for name, _ in model.named_parameters())
    rows = [
        ("run", f"{folder}: {train.steps} steps of {train.batch} x {length} tokens on {where}, {train.dtype}"),
        ("model", f"{sizes.n_layers} layers of width {sizes.d_model}; {layer if sparse else 'all dense'}"),
        ("parameters", f"{total:,} in all, {active:,} activated for a token{' at most' * varies}"),
    ]
    return cli.table(rows, left=2)


def report(train: TrainConfig, model, data, scores, log, load, folder) -> str:
    """What came out: scores, the load of the experts, speed, what was written, what to run next."""
    E, k = model.config.n_experts, 1 if getattr(model.config, "router", "") == "top_p" else model.config.top_k
    notes = {"loss": f"uniform guess: {uniform(train, data):.2f}", "accuracy": "uniform guess: 6.2%"}
    notes |= {"cloze": "chance: 25.0%", "balance_loss": f"1.00 is even, {E / k:.2f} collapsed"}
    rows = [
        [SHOWN[name][0], *(f"{scores[split][name]:{SHOWN[name][1]}}" for split in scores), notes.get(name, "")]
        for name in scores["dev"]
    ]
    lines = [cli.table(rows, header=["held-out", *scores, ""]), ""]
    for place, share in zip(places(model), load, strict=True):
        even = f"{share.min() / share.mean():.2f} to {share.max() / share.mean():.2f} of an even share"
        lines.append(f"load, {place}  {cli.bar_line(share)}  {even}")
    seconds, tokens = log[-1]["seconds"], train.steps * data.batch(0, train.batch)[0].numel()
    hints = {
        "python eval.py remix": "re-mixing beside all that it is compared with (minutes)",
        "python train_toy.py --seeds 3 --twin": "how much of this is luck? beside it, the dense twin",
        "python train_toy.py --data tinystories": "little stories; --data-file PATH: a text of your own",
    }
    if train.data != "skills":
        hints = {"python eval.py sample": "let it tell a story", "python eval.py routing": "which expert does what"}
    done = [
        ("trained", f"{tokens:,} tokens in {seconds:.0f} s ({tokens / seconds:,.0f} a second)"),
        ("wrote", f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}"),
        ("next", f"look at {folder / ('routing.png' if len(load) else 'loss.png')}; then"),
        *(("", f"{command:40}{what}") for command, what in hints.items()),
    ]
    return "\n".join(["", *lines, "", cli.table(done, left=2)])


def uniform(train: TrainConfig, data) -> float:
    """The cross-entropy of guessing: among the 16 answers, or among all tokens of a text."""
    return math.log(SkillsTask.N if train.data == "skills" else data.vocab_size)


def summary(results: dict[str, list[dict]], train: TrainConfig) -> str:
    """Test scores over several seeds: mean, spread, and the interval of the mean; for twins, too, of the difference."""
    rows, (first, *others) = [], results
    differences = {f"{first} - {other}": (first, other) for other in others}
    for name in (*results, *differences):
        rows.append([name, *[""] * 4])
        a, b = differences.get(name, (name, None))
        for score in (score for score in results[a][0] if b is None or score in results[b][0]):
            values = [x[score] - (y[score] if b else 0) for x, y in zip(results[a], results[b or a], strict=True)]
            (label, form), (mean, half) = SHOWN[score], stats.interval(values)
            shown = [f"{value:{form}}" for value in (mean, np.std(values, ddof=1), mean - half, mean + half)]
            each = "  ".join(f"{value:{form}}" for value in values)
            rows.append([f"  {label}", shown[0], shown[1], f"{shown[2]} to {shown[3]}", each])
    seeds = f"seeds {train.seed} to {train.seed + train.seeds - 1}"
    return "\n" + cli.table(rows, header=["test, over seeds", "mean", "sd", "95 % interval", seeds])


if __name__ == "__main__":
    cli.run(main)
