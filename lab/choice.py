"""Multiple choice by log-likelihood. Every arm of a comparison gets the same prompts:

python eval.py choice --model allenai/OLMoE-1B-7B-0125-Instruct --task arc_challenge

A letter is one token, so that a prompt is read once for all choices (and C3PO can re-mix its last token); `full` reads
the text of every choice, and also compares the log-likelihoods per byte of it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from tqdm import tqdm

import hf
from lab import checkpoint, cli
from lab.benchmarks import TASKS, Item, read_items
from lab.stats import share_interval
from lab.tasks import CHUNK, Question
from moe import require

LETTERS = "ABCDEFGHIJ"


@dataclass
class ChoiceConfig:
    """A benchmark, and how it is scored."""

    model: Annotated[str | None, "a checkpoint's folder, or owner/name or owner/name@revision on the hub"] = None
    task: Annotated[Literal[tuple(TASKS)], "the benchmark"] = "arc_challenge"
    data_file: Annotated[str | None, "its rows as on the hub, .jsonl or .parquet (none: download)"] = None
    form: Annotated[Literal["letters", "full"], "score the letters of the choices, or their texts"] = "letters"
    shots: Annotated[int, "solved examples in front of every question"] = 0
    shots_file: Annotated[str | None, "rows whose first ones these are (none: download the train split)"] = None
    limit: Annotated[int | None, "take only so many questions (none: all)"] = None
    dtype: Annotated[Literal["stored", "float32", "bfloat16"], "number format of the model"] = "stored"
    device: Annotated[Literal["cpu", "cuda", "mps"], "where to compute"] = "cpu"
    threads: Annotated[int, "CPU threads"] = 1
    out: Annotated[str | None, "the file of answers, which a rerun continues (none: one in out/choice/)"] = None

    def __post_init__(self):
        require(self.model is not None, "--model is missing: the folder of a checkpoint, or owner/name on the hub")
        fine = self.shots >= 0 and self.threads > 0 and (self.limit is None or self.limit > 0)
        require(fine, "--shots must be at least 0, --threads and --limit at least 1")


def main(argv) -> int:
    """Score a benchmark, keep every answer, report -> the exit code."""
    parser = cli.Parser("eval.py choice", usage="%(prog)s --model PATH_OR_REPO [flags]", description=__doc__)
    cli.add_flags(parser, ChoiceConfig)
    c = cli.build(ChoiceConfig, parser.parse(argv))
    torch.set_num_threads(c.threads)
    items = read_items(c.task, c.data_file)[: c.limit]
    shots = read_items(c.task, c.shots_file, "train")[: c.shots] if c.shots else []
    require(len(shots) == c.shots, f"--shots {c.shots}, but {c.shots_file or c.task} has only {len(shots)} examples")
    model, tokenizer = hf.load(c.model, None if c.dtype == "stored" else c.dtype, c.device)
    require(tokenizer is not None, f"{c.model} has no tokenizer.json, so that it cannot read words")
    name = f"{Path(c.model).name}-{c.task}-{c.form}-{c.shots}.jsonl"
    path = Path(c.out or Path("out/choice", name))
    every = [rows(item, tokenizer, c.form, shots, model.config.context) for item in items]
    prompts = hashlib.sha256(repr((every, [item.answer for item in items])).encode()).hexdigest()[:16]
    nats = score(model, every, items, path, {"model": c.model, "task": c.task, "dtype": c.dtype, "prompts": prompts})
    print(report(items, nats, c.form, f"{c.task}, {c.shots} shots, {len(items)} questions"))
    print(f"\nwrote {path}")
    return 0


def pairs(item: Item, form: str) -> list[tuple[str, str]]:
    """For each choice a text, and the end of it that is scored."""
    if form == "full" and item.pairs:
        return item.pairs
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
    text = "\n".join([f"Question: {item.question}", *(lines if form == "letters" else []), "Answer:"])
    return [(text, f" {end}") for end in (LETTERS[: len(lines)] if form == "letters" else item.choices)]


class Row(NamedTuple):
    """What the model reads at once; for each option the (place, token) whose log-probabilities are summed."""

    tokens: list[int]
    options: list[list[tuple[int, int]]]


def rows(item: Item, tokenizer, form: str, shots=(), context: int = 4096) -> list[Row]:
    """The rows of a question, behind the solved examples `shots`; one for all of its letters, or one for each text.

    Scored is what a text with its end does not share with the text alone. What is longer than the context loses its
    beginning. ValueError where the end does not fit, or a letter is not one token."""
    found, front = [], "".join("".join(pairs(shot, form)[shot.answer]) + "\n\n" for shot in shots)
    for text, end in pairs(item, form):
        whole, head = (tokenizer.encode(front + each).ids for each in (text + end, text))
        first = next(
            (i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), min(map(len, (whole, head)))
        )
        cut = max(0, len(whole) - 1 - context)
        require(cut < first < len(whole), f"{end!r:.80} does not fit into a context of {context} tokens")
        found.append(Row(whole[cut:-1], [[(i - 1 - cut, whole[i]) for i in range(first, len(whole))]]))
    if form == "full":
        return found
    whole = [len(row.options[0]) == 1 and row.tokens == found[0].tokens for row in found]
    require(all(whole), "this tokenizer has no single token for ' A', ' B' and so on; score with --form full")
    return [Row(found[0].tokens, [row.options[0] for row in found])]


def questions(items: list[Item], tokenizer, shots=(), context: int = 4096) -> list[Question]:
    """The same prompts, their letters as tokens: what a re-mixer takes."""
    single = [rows(item, tokenizer, "letters", shots, context)[0] for item in items]
    tokens = [[token for ((_, token),) in row.options] for row in single]
    return [Question(r.tokens, t, item.answer) for r, t, item in zip(single, tokens, items, strict=True)]


@torch.no_grad()
def log_likelihoods(model, batch: list[Row]) -> list[list[float]]:
    """The summed log-probabilities (nats) of each option of each row, by a model in evaluation mode."""
    device, T = next(model.parameters()).device, max(len(row.tokens) for row in batch)
    tokens = torch.tensor([row.tokens + [0] * (T - len(row.tokens)) for row in batch], device=device)  # (B, T)
    length = torch.tensor([len(row.tokens) for row in batch], device=device)
    x = model.run(model.embed(tokens), torch.arange(T, device=device) < length[:, None])  # (B, T, D)
    spots = [(b, *spot) for b, row in enumerate(batch) for option in row.options for spot in option]
    b, at, token = torch.tensor(spots, device=device).T  # (many, 3) -> (many,) three times
    parts = zip(x[b, at].split(256), token.split(256), strict=True)  # not at once: the vocabulary may be large
    nats = torch.cat([model.head(part).log_softmax(-1).gather(1, t[:, None])[:, 0] for part, t in parts]).cpu()
    sums = iter([part.sum().item() for part in nats.split([len(o) for row in batch for o in row.options])])
    return [[next(sums) for _ in row.options] for row in batch]


def score(model, every: list[list[Row]], items: list[Item], path: Path, about: dict) -> list[list[float]]:
    """The log-likelihood of every choice of every item. They join a file, batch by batch; what it has is not redone."""
    nats = resume(path, about)
    lengths = [max(len(row.tokens) for row in group) for group in every]
    todo = sorted((i for i in range(len(items)) if i not in nats), key=lambda i: -lengths[i])  # little padding
    right = sum(best(nats[i]) == items[i].answer for i in nats)
    bar = tqdm(total=len(items), initial=len(nats), unit="question", desc="choice", leave=False, disable=None)
    with bar, open(path, "a", encoding="utf-8") as file:
        while todo:
            n = max(1, CHUNK // (lengths[todo[0]] * max(len(every[i]) for i in todo)))
            batch, todo = todo[:n], todo[n:]
            found = iter(log_likelihoods(model, [row for i in batch for row in every[i]]))
            for i in batch:
                nats[i] = [value for _ in every[i] for value in next(found)]
                right += best(nats[i]) == items[i].answer
                file.write(json.dumps({"item": i, "answer": items[i].answer, "nats": nats[i]}) + "\n")
            file.flush()
            bar.update(len(batch))
            bar.set_postfix(accuracy=f"{right / len(nats):.1%}", refresh=False)
    return [nats[i] for i in range(len(items))]


def resume(path: Path, about: dict) -> dict[int, list[float]]:
    """The answers that a file holds, by item; a new one begins with what they are answers to. A last line that was cut
    off goes. ValueError for a file about something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else json.dumps(about).encode() + b"\n"
    kept = whole[: whole.rfind(b"\n") + 1]
    try:
        first, *lines = map(json.loads, kept.splitlines())
        other = sorted(key for key in about if first.get(key) != about[key])
        require(not other, f"it is about another {', '.join(other)}")
        nats = {line["item"]: line["nats"] for line in lines}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be continued ({error}); name another --out, or delete it") from None
    checkpoint.write(path, kept)
    return nats


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def report(items: list[Item], nats: list[list[float]], form: str, title: str) -> str:
    """A table of accuracies, with 95 % intervals, and chance beside them."""
    arms = {"letters" if form == "letters" else "log-likelihood": [best(values) for values in nats]}
    if form == "full":
        sizes = [[max(1, len(end.strip().encode())) for _, end in pairs(item, form)] for item in items]
        each = zip(nats, sizes, strict=True)
        arms["log-likelihood per byte"] = [best([v / n for v, n in zip(*both, strict=True)]) for both in each]
    table = []
    for name, picked in arms.items():
        right, n = sum(p == item.answer for p, item in zip(picked, items, strict=True)), len(items)
        low, high = share_interval(right, n)
        table.append((name, f"{right / n:.1%}", f"{low:.1%} to {high:.1%}"))
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return cli.table([*table, ("chance", f"{chance:.1%}", "")], header=[title, "right", "95 % interval"])
