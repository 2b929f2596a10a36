"""Train a small mixture-of-experts model, on one thread in about a minute:

python train_toy.py                        the skills-and-dialects task
python train_toy.py --data-file story.txt  a text of your own, in the tokens of our tokenizer
python train_toy.py --router FILE:CLASS    a routing rule of your own, a subclass of moe.Router
python train_toy.py --help                 every flag: the fields of TrainConfig and MoEConfig
torchrun --nproc_per_node=2 train_toy.py   two processes, each with a half of every batch
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.training, __doc__)  # before torch is imported, which takes seconds

import math
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.func import functional_call
from tqdm import tqdm

from data import Task, load_task
from lab.composing.presets import build_model
from lab.remixing.contest import taste_of_remixing
from lab.scores.evaluation import final_scores, router_names
from lab.scores.specialisation import specialisation
from lab.tools import figures, processes, report, runs
from lab.tools.checks import require_inputs, require_tokens, undisturbed
from lab.tools.configs import TrainConfig
from lab.tools.files import as_json, owned_folder, write
from lab.tools.memory import require_memory
from lab.tools.settings import (
    commands_left,
    folder_of,
    new_settings,
    require_no_run,
    resumed_settings,
)
from lab.tools.statistics import scipy_stats
from moe import IGNORE, MoEConfig, Router, expert_load, require, router_losses

# ------------------------------------------------------------------------------------------- runs


@undisturbed()
def main(argv=None) -> int:
    """Train, report, and say what to run next -> the exit code."""
    # The settings, from flags or from the run that goes on.
    given = flags.training(argv, __doc__)
    if given.get("resume"):
        train, sizes = resumed_settings(given)
    else:
        train, sizes = new_settings(given)
    if sizes.top_k == 1 and sizes.norm_topk and train.model == "moe":
        raise cli.Usage("top_k 1 with norm_topk: the router gets no gradient; use --no-norm-topk")
    if train.seeds > 1:
        scipy_stats()  # for the intervals at the end: better missed now than then

    # Threads and processes.
    train.threads = train.threads or torch.get_num_threads()
    torch.set_num_threads(train.threads)
    processes.join()
    fault = f"{processes.count()} processes, but {train.batch} sequences in a step"
    require(processes.count() <= train.batch, f"{fault}: each needs one at least")

    # Train every seed, and its twin.
    models = ("moe", "dense") if train.twin else (train.model,)
    single = len(models) == train.seeds == 1
    results = {model: [] for model in models}
    for seed in range(train.seed, train.seed + train.seeds):
        for model in models:
            own = replace(train, seed=seed, seeds=1, model=model, twin=False)
            scores = train_run(own, sizes, single)
            if scores is None:
                for command in commands_left(argv or sys.argv[1:], train, seed, model):
                    print(f"and the runs behind it with\n    {command}")
                return 130  # what a shell expects of a program that Ctrl-C has ended
            results[model].append(scores)
    if train.seeds > 1:
        print(report.seed_table(results, train.seed))
    return 0


def train_run(train: TrainConfig, sizes: MoEConfig, single: bool) -> dict | None:
    """One run of one seed -> its scores, or None if it was interrupted.

    single: it is the only run, and so its folder has the name that --out gives.
    Of several processes the first one writes, scores and reports.
    """
    # Make the task, and the model, if it fits into memory.
    first = processes.rank() == 0
    settings = asdict(train)
    if train.resume:
        saved = runs.read_settings(Path(train.resume))["train"]
        settings["content"] = saved.get("content", {})
    with processes.first_one_first():
        task = load_task(settings, sizes.context)
    length = task.batch(0, 1)[0].shape[1]
    sizes = replace(sizes, vocab_size=task.vocab_size)
    require_memory(sizes, pick_device(train.device), train.batch, length)
    model, optimizer = start(train, sizes, task)

    # Own the folder, and train; where all steps are done, score and report.
    folder = processes.gathered(folder_of(train, single) if first else None)[0]
    with owned_folder(folder) if first else nullcontext():
        if not train.resume and first:
            require_no_run(folder)
        print(report.describe_run(train, model, task, folder), end="\n\n")
        try:
            finished, log = train_loop(model, optimizer, task, train, folder)
            if finished:
                arguments = model, task, train, folder, log, single
                return processes.gathered(finish(*arguments) if first else None)[0]
        except KeyboardInterrupt:
            print("\ninterrupted")

        # Say how to go on.
        if (folder / "state.safetensors").exists():
            words = ["python", "train_toy.py", "--resume", folder]
            words += ["--router", train.router] if train.router else []
            print(f"\nstopped and saved; continue with\n    {cli.command(*words)}")
        return None


def finish(model, task: Task, train: TrainConfig, folder: Path, log, single: bool) -> dict:
    """Draw, score and report a trained model -> its scores on test."""
    # Draw what happened, and which expert does what.
    what = f"{train.data}, seed {train.seed}"
    figures.loss_figure(log, task.guess, what, folder / "loss.png")
    loads = {}
    if model.routers():
        special = specialisation(model, task)
        names = router_names(model)
        loads = dict(zip(names, special.load, strict=True))
        title = f"Which expert does what: {what}"
        path = folder / "routing.png"
        figures.routing_figure(special.shares, special.kinds, names, title, path)

    # Score it, and let it show what it can do.
    scores = final_scores(model, task)
    write(folder / "scores.json", as_json(scores).encode())
    samples = task.sample(model)
    if samples:
        print(f"\nthree samples:\n\n{samples}")
    if train.taste and single and model.routers() and processes.count() == 1:
        router = type(model.routers()[0]) if train.router else None
        print("\n" + taste_of_remixing(folder, router=router))
    seconds = log[-1]["seconds"]
    print(report.run_report(train, model, task, scores, seconds, loads, folder))
    return {**scores["test"], "seconds": seconds}


# --------------------------------------------------------------------------------------- training


def start(train: TrainConfig, sizes: MoEConfig, task: Task):
    """An untrained model and AdamW. The task decides the vocabulary; train.model may be dense."""
    torch.manual_seed(train.seed)
    sizes = replace(sizes, vocab_size=task.vocab_size)
    if train.model == "dense":
        sizes = replace(sizes, dense_layers=range(sizes.n_layers))
    router = runs.router_class(train.router) if train.router else Router
    model = build_model(asdict(sizes), router).to(pick_device(train.device))

    # Weight decay is for matrices only, not for the gains of norms.
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95), fused=True)


def train_loop(model, optimizer, task: Task, train: TrainConfig, folder: Path):
    """Train from the start, or from what the run folder holds -> (finished, log).

    Every `eval_every` steps a line joins the log and everything is saved. Ctrl-C saves and stops:
    finished is then False. ValueError where the loss or the gradient is no longer finite; the
    folder then keeps the last good weights.
    """
    # What is saved with the weights.
    content = dict(task.content)
    if train.router:
        content["router"] = runs.code_of(type(model.routers()[0]))
    settings = {"model": asdict(model.config), "train": asdict(train) | {"content": content}}
    settings["versions"] = {"torch": torch.__version__, "python": platform.python_version()}

    # Start, or go on where the last save was.
    first, log, losses = 0, [], []  # losses: those since the last line of the log
    if train.resume:
        first, log, losses = runs.resume(folder, model, optimizer)
    forward = make_forward(model, train)
    begun = time.perf_counter() - (log[-1]["seconds"] if log else 0.0)
    options = {"unit": "step", "desc": f"seed {train.seed}", "leave": False}
    options["disable"] = None if processes.rank() == 0 else True  # None: unless on a terminal
    bar = tqdm(total=train.steps, initial=first, **options)

    def evaluate(step):
        line = {"step": step, "seconds": 0.0, "train_loss": None}
        if losses:
            line["train_loss"] = sum(losses) / len(losses)
            losses.clear()
        line["dev"] = task.score(model, "dev")
        line["seconds"] = time.perf_counter() - begun
        log.append(line)
        bar.write(report.log_row(log))

    def save(step):
        if processes.rank() == 0:
            runs.save_run(folder, model, optimizer, step, settings, log, losses)

    if not log:
        evaluate(0)
        save(0)
    with bar, cli.Interrupt() as interrupt:
        for step in range(first, train.steps):
            # One step of the optimiser.
            loss = update(forward, model, optimizer, task, train, step)
            if not math.isfinite(loss):
                fault = f"the loss or its gradient is no longer finite at step {step + 1}"
                hint = f"try a lower --lr than {train.lr:g}"
                raise ValueError(f"{fault}: {folder} keeps the last good checkpoint; {hint}")
            losses.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

            # Evaluate and save, when it is due or somebody asks to stop.
            done = step + 1
            due = done % train.eval_every == 0 or done == train.steps
            if due:
                evaluate(done)
            asked = any(processes.gathered(interrupt.asked))
            if due or asked:
                save(done)
            if asked and done < train.steps:
                return False, log
    return True, log


def update(forward, model, optimizer, task: Task, train: TrainConfig, step: int) -> float:
    """One optimiser step on the batch of this step -> the pure cross-entropy.

    forward(tokens, targets) -> Output: the model, or what `make_forward` made of it. If the result
    is not finite, no weight was changed. Of several processes each passes a part of the batch.
    """
    device = next(model.parameters()).device
    tokens, targets = task.batch(step, train.batch)
    number = train.seed * 1_000_003 + step  # dropout is a function of (seed, step), too
    torch.manual_seed((number + 7919 * processes.rank()) % 2**63)
    passed = pass_batch if processes.count() == 1 else pass_part
    loss, balance, z = passed(forward, tokens.to(device), targets.to(device))
    total = loss + train.balance * balance + train.z * z
    total.backward()

    # From here on all processes do the same.
    loss = loss.detach()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    processes.add_up([loss, *gradients])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
    if not norm.isfinite():
        return math.nan
    for group in optimizer.param_groups:
        group["lr"] = train.lr * schedule(step, train)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def pass_batch(forward, tokens, targets) -> tuple:
    """The losses of a batch: cross-entropy, balance and z."""
    out = forward(tokens, targets)
    return out.loss, out.balance_loss, out.z_loss


def pass_part(forward, tokens, targets) -> tuple:
    """What `pass_batch` returns, as a sum over processes: the addends of this one.

    They pass every n-th sequence each.
    """
    part = slice(processes.rank(), None, processes.count())
    out = forward(tokens[part], targets[part])
    counted = targets != IGNORE
    loss = out.loss * (counted[part].sum() / counted.sum())
    if not out.routing:
        return loss, 0.0, 0.0

    # The balance loss is a product of two means over the batch. One of them, the load, has no
    # gradient, and is added up beforehand.
    share = torch.full((tokens[part].numel(),), 1 / tokens.numel(), device=tokens.device)
    loads = [expert_load(routing, share) for routing in out.routing]
    processes.add_up(loads)
    pairs = zip(out.routing, loads, strict=True)
    losses = [router_losses(routing, share, load) for routing, load in pairs]
    balance, z = (sum(each) / len(losses) for each in zip(*losses, strict=True))
    return loss, balance, z


def schedule(step: int, train: TrainConfig) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine down to final_lr."""
    warm = min(1.0, (step + 1) / max(train.warmup, 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / train.steps)
    return warm * (train.final_lr + (1 - train.final_lr) * cosine)


def make_forward(model, train: TrainConfig):
    """model(tokens, targets), in bfloat16 or compiled if the settings say so.

    Checks look at numbers, which would cut a compiled graph in two: they come before it.
    """

    def forward_in_bfloat16(tokens, targets):
        weights = {name: weight.bfloat16() for name, weight in model.named_parameters()}
        return functional_call(model, weights, (tokens, targets))

    forward = forward_in_bfloat16 if train.dtype == "bfloat16" else model
    if not train.compile:
        return forward
    compiled = torch.compile(forward)

    def checked(tokens, targets):
        require_tokens(tokens, model.config.vocab_size)
        require_inputs(tokens, targets, None, model.config.vocab_size)
        return compiled(tokens, targets)

    return checked


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's mps, else the CPU. ValueError for a device that is not there."""
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        name = available[0]
    fault = f"--device {name}: this machine (or this build of torch) has none"
    require(name in available, f"{fault}; found: {', '.join(available)}")
    return torch.device(processes.device_of(name))


if __name__ == "__main__":
    cli.program(main)
