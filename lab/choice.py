"""Multiple choice by log-likelihood. Every arm of a comparison gets the same prompts:

python eval.py choice --model allenai/OLMoE-1B-7B-0125-Instruct --task arc_challenge
python eval.py choice ...     the same, and --references openbookqa,sciq --method ngd: C3PO, with the paper's settings

A letter is one token, so that a prompt is read once for all choices (and C3PO can re-mix its last token); `full` reads
the text of every choice, and also compares the log-likelihoods per byte of it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import hf
from lab import checkpoint, cli
from lab.baselines import Arena, posed
from lab.benchmarks import TASKS, Item, read_items
from lab.contest import LEGEND, Outcome, compete, main_table, summary
from lab.stats import share_interval
from lab.tasks import CHUNK, Question
from moe import require
from remix import ReferenceSet, RemixConfig, one_of, padded

LETTERS = "ABCDEFGHIJ"
SURROGATES = {
    "mode_finding": "mode finding",
    "kernel_regression": "kernel regression",
    "ngd": "NGD",
    "oracle": "oracle",
}
BLOCK = 64  # questions that are re-mixed between two lines of the answers' file


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
    references: Annotated[str | None, "re-mix, by questions of these benchmarks, such as openbookqa,sciq"] = None
    reference_files: Annotated[str | None, "their rows, a file for each (none: download the train split)"] = None
    reference_limit: Annotated[int | None, "take only so many of each (none: all)"] = None
    method: Annotated[str, "ngd, kernel_regression, mode_finding, oracle, or several: ngd,oracle"] = "ngd"
    out: Annotated[str | None, "the file of answers, which a rerun continues (none: one in out/choice/)"] = None

    def __post_init__(self):
        require(self.model is not None, "--model is missing: the folder of a checkpoint, or owner/name on the hub")
        fine = self.shots >= 0 and self.threads > 0 and (self.limit is None or self.limit > 0)
        require(fine, "--shots must be at least 0, --threads and --limit at least 1")
        full = "a later token of the text looks back at the re-mixed one, so that one token is not exact there"
        require(self.form == "letters" or not self.references, f"C3PO re-mixes the token before a letter; {full}")
        for name in self.method.split(","):
            one_of("method", name, [*SURROGATES])
        for name in (self.references or "arc_easy").split(","):
            one_of("benchmark", name, [*TASKS])
        files = (self.reference_files or self.references or "").split(",")
        require(len(files) == len((self.references or "").split(",")), "--reference-files needs one for each benchmark")


def main(argv) -> int:
    """Score a benchmark, keep every answer, report -> the exit code."""
    parser = cli.Parser("eval.py choice", usage="%(prog)s --model PATH_OR_REPO [flags]", description=__doc__)
    cli.add_flags(parser, ChoiceConfig)
    cli.add_flags(parser, RemixConfig, skip=("method",))
    given = parser.parse(argv)
    c = cli.build(ChoiceConfig, given)
    changes = {name: given[name] for name in vars(RemixConfig()) if name in given and name != "method"}
    cli.build(RemixConfig, changes)
    torch.set_num_threads(c.threads)
    items = read_items(c.task, c.data_file)[: c.limit]
    shots = read_items(c.task, c.shots_file, "train")[: c.shots] if c.shots else []
    require(len(shots) == c.shots, f"--shots {c.shots}, but {c.shots_file or c.task} has only {len(shots)} examples")
    model, tokenizer = hf.load(c.model, None if c.dtype == "stored" else c.dtype, c.device)
    require(tokenizer is not None, f"{c.model} has no tokenizer.json, so that it cannot read words")
    if c.references:
        return remixed(model, tokenizer, items, shots, c, changes)
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
        both = zip(whole, head, strict=False)
        first = next((i for i, (a, b) in enumerate(both) if a != b), min(len(whole), len(head)))
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


def remixed(model, tokenizer, items: list[Item], shots, c: ChoiceConfig, changes: dict) -> int:
    """C3PO on a benchmark, on the prompts that are scored without it: the table of `eval.py remix`, block by block."""
    files = c.reference_files.split(",") if c.reference_files else [None] * len(c.references.split(","))
    both = zip(c.references.split(","), files, strict=True)
    known = [item for task, file in both for item in read_items(task, file, "train")[: c.reference_limit]]
    layers = sum(layer not in model.config.dense_layers for layer in range(model.config.n_layers))
    paper = {"layers": "last:5"} if layers >= 5 else {}
    paper |= {"core": 20} if model.config.n_experts >= 20 else {}
    given = {"embedding": "tfidf", "batch": 8, **paper, **changes}
    asked, solved = (questions(part, tokenizer, shots, model.config.context) for part in (items, known))
    about = {"model": c.model, "task": c.task, "dtype": c.dtype, "references": c.references, "settings": given}
    about |= {"prompts": hashlib.sha256(repr((asked, solved)).encode()).hexdigest()[:16], "methods": c.method}
    stem, which = f"{Path(c.model).name}-{c.task}", hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    path = Path(c.out or f"out/choice/{stem}-remixed-{which}.jsonl")
    made = Path(f"out/choice/{stem}-references-{about['prompts']}-{given.get('token', 'last')}.safetensors")
    answers, config = resume(path, about), RemixConfig(**given)
    made.parent.mkdir(parents=True, exist_ok=True)
    if made.exists():
        references = ReferenceSet.load(made, model)
    else:
        references = ReferenceSet.build(model, *posed(solved), token=config.token)
        references.save(made)
    names = [SURROGATES[name] for name in c.method.split(",")]
    for start in tqdm(range(0, len(asked), BLOCK), unit_scale=BLOCK, unit="question", desc="re-mixing", disable=None):
        part = asked[start : start + BLOCK]
        if start not in answers:
            prompts, labels, options = posed(part)
            tokens, lengths = padded(prompts, model.config.vocab_size)
            arena = Arena(model, tokens, labels, references, config, lengths, options)
            rows = compete(arena, names, {"layers": config.layers})
            answers[start] = {name: [*(part.tolist() for part in row[:3]), row.seconds] for name, row in rows.items()}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"item": start, "nats": answers[start]}) + "\n")
    blocks = [answers[start] for start in range(0, len(asked), BLOCK)]
    rows = {}
    for name in blocks[0]:
        *parts, seconds = zip(*(block[name] for block in blocks), strict=True)
        rows[name] = Outcome(*(np.concatenate(part) for part in parts), sum(seconds))
    correct = int(references.correct.sum())
    print(f"{c.task}, {len(asked)} questions; {len(known):,} references, {correct:,} answered right; {given}\n")
    print(main_table(summary([rows], [np.arange(len(asked))]), {}), LEGEND, f"wrote {path} and {made}", sep="\n\n")
    return 0
