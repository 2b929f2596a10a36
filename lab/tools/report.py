"""What train_toy.py writes on the screen: the settings, the progress, the scores."""

import math
from pathlib import Path

import numpy as np

from lab.tools import cli, statistics
from moe import MoE

SCORES = {  # how people read a score: what it is called, and its format
    "loss": ("cross-entropy (nats)", ".3f"),
    "perplexity": ("perplexity per token", ".2f"),
    "bits_per_byte": ("bits per byte", ".3f"),
    "accuracy": ("accuracy", ".1%"),
    "clear": ("  clear cues", ".1%"),
    "ambiguous": ("  ambiguous cues", ".1%"),
    "trained_pairs": ("  trained pairs", ".1%"),
    "single_steps": ("  single steps", ".1%"),
    "cloze": ("last word, one of four", ".1%"),
    "frequent": ("  the most frequent", ".1%"),
    "balance_loss": ("balance loss", ".2f"),
    "seconds": ("training (s)", ".0f"),
}


def written(name: str, value: float) -> str:
    """A score as people read it."""
    _, form = SCORES.get(name, (name, ".3f"))
    return format(value, form)


def label(name: str) -> str:
    """What people call a score."""
    return SCORES.get(name, (name.replace("_", " "), ""))[0]


def describe_run(train, model, task, folder: Path) -> str:
    """What is about to run: its settings, and the parameters of the model."""
    # Where it runs.
    device = model.embedding.weight.device
    where = str(device)
    if device.type == "cpu":
        where += " (1 thread)" if train.threads == 1 else f" ({train.threads} threads)"

    # What the model is made of.
    sizes = model.config
    top_p = chooses_by_top_p(sizes)
    layers = "all dense"
    if any(isinstance(module, MoE) for module in model.modules()):
        visits = f"top-p {sizes.top_p}" if top_p else f"top {sizes.top_k}"
        layers = f"{sizes.n_experts} experts of width {sizes.d_expert}, {visits}"
        for choice in (train.preset, train.router):
            if choice:
                layers += f", {choice}"
    activated = f"{model.n_params(activated=True):,} activated for a token"
    if top_p:
        activated += " at most"

    length = task.batch(0, 1)[0].shape[1]
    work = f"{train.steps} steps of {train.batch} x {length} tokens on {where}, {train.dtype}"
    rows = [
        ("run", f"{folder}: {work}"),
        ("model", f"{sizes.n_layers} layers of width {sizes.d_model}; {layers}"),
        ("parameters", f"{model.n_params():,} in all, {activated}"),
    ]
    return cli.table(rows, left=2)


def chooses_by_top_p(sizes) -> bool:
    """Whether a token visits as many experts as reach a probability together."""
    return getattr(sizes, "router", "") == "top_p"


def log_row(log: list[dict]) -> str:
    """The last line of the log as a row, below a header if it is the first."""
    # Name and text of each column.
    line = log[-1]
    loss = line["train_loss"]
    cells = {"step": str(line["step"]), "train loss": "-" if loss is None else f"{loss:.3f}"}
    short = {"loss": "dev loss", "balance_loss": "balance"}
    for name, value in line["dev"].items():
        cells[short.get(name, name.replace("_", " "))] = written(name, value)
    cells["time"] = f"{line['seconds']:.0f} s"

    # As wide as the name, with some room.
    header = row = ""
    for name, text in cells.items():
        width = max(len(name), 6) + 3
        header += name.rjust(width)
        row += text.rjust(width)
    return row if len(log) > 1 else f"{header}\n{row}"


def run_report(train, model, task, scores: dict, seconds: float, loads: dict, folder: Path) -> str:
    """What came out: scores, speed, what was written, what to run next.

    scores: split -> name -> value. loads: place of a router -> the share of the tokens (E,) that
    visit each expert.
    """
    # The scores, with what they would be without learning.
    sizes = model.config
    visits = 1 if chooses_by_top_p(sizes) else sizes.top_k
    notes = {
        "loss": f"uniform guess: {task.guess:.2f}",
        "accuracy": f"uniform guess: {math.exp(-task.guess):.1%}",
        "cloze": "chance: 25.0%",
        "balance_loss": f"1.00 is even, {sizes.n_experts / visits:.2f} collapsed",
    }
    rows = []
    for name in scores["dev"]:
        values = [written(name, scores[split][name]) for split in scores]
        rows.append([label(name), *values, notes.get(name, "")])
    lines = ["", cli.table(rows, header=["held-out", *scores, ""]), ""]

    # How evenly each router uses its experts.
    for place, load in loads.items():
        even = load.mean()
        spread = f"{load.min() / even:.2f} to {load.max() / even:.2f} of an even share"
        lines.append(f"load, {place}  {cli.bar_line(load)}  {spread}")

    # Speed, files, and what to do next.
    n_tokens = train.steps * task.batch(0, train.batch)[0].numel()
    speed = f"{n_tokens / seconds:,.0f} a second"
    files = sorted(path.name for path in folder.glob("[!.]*"))
    figure = folder / ("routing.png" if loads else "loss.png")
    rows = [
        ("trained", f"{n_tokens:,} tokens in {seconds:.0f} s ({speed})"),
        ("wrote", f"{folder}: {', '.join(files)}"),
        ("next", f"look at {figure}; then"),
    ]
    rows += [("", f"{command:46}{what}") for command, what in task.next_commands.items()]
    return "\n".join([*lines, "", cli.table(rows, left=2)])


def seed_table(results: dict[str, list[dict]], first_seed: int) -> str:
    """Test scores over several seeds: mean, spread, and the interval of the mean.

    results: model -> the scores of each seed. A second model is the twin of the first: the
    differences between the two come last, in pairs.
    """
    # The scores of each model, and their differences in pairs.
    groups = {model: columns(runs) for model, runs in results.items()}
    if len(groups) == 2:
        (model, scores), (twin, twin_scores) = groups.items()
        common = [name for name in scores if name in twin_scores]
        groups[f"{model} - {twin}"] = {name: scores[name] - twin_scores[name] for name in common}

    rows = []
    for title, scores in groups.items():
        rows.append([title, "", "", "", ""])
        for name, values in scores.items():
            mean, half = statistics.interval(values)
            low, high = written(name, mean - half), written(name, mean + half)
            spread = written(name, np.std(values, ddof=1))
            every = "  ".join(written(name, value) for value in values)
            cells = [written(name, mean), spread, f"{low} to {high}", every]
            rows.append([f"  {label(name)}", *cells])
    n_seeds = len(next(iter(results.values())))
    seeds = f"seeds {first_seed} to {first_seed + n_seeds - 1}"
    header = ["test, over seeds", "mean", "sd", "95 % interval", seeds]
    return "\n" + cli.table(rows, header=header)


def columns(runs: list[dict]) -> dict[str, np.ndarray]:
    """The scores of several runs: name -> an array (runs,)."""
    return {name: np.array([scores[name] for scores in runs]) for name in runs[0]}
