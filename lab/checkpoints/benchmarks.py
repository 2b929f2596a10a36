"""Multiple-choice benchmarks as the hub has them, and the prompts that are made of them.

Rows come from a file, .jsonl or .parquet, or are downloaded as parquet: no code of a data set ever
runs. A function for each benchmark makes an Item of a row, `make_prompts` makes tokens of an Item.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from data import Problems
from lab.checkpoints.untrusted import INSTALL, download
from lab.tools.cli import note
from moe import require
from pathways import padded


class Item(NamedTuple):
    """A question in words."""

    question: str
    choices: list[str]
    answer: int | None  # the place among the choices; None: the row keeps it secret
    pairs: list[tuple[str, str]] | None = None  # for each choice a text and its end, if special


def answer_place(label, labels) -> int | None:
    """Where the answer stands among the choices, which have these labels: letters or numbers.

    None where the row hides it. ValueError for a label that no choice has.
    """
    if label in (None, "", -1, "-1"):
        return None
    labels = [str(name) for name in labels]
    problem = f"the answer is {label!r:.40}; expected one of {labels}"
    require(str(label) in labels, problem)
    return labels.index(str(label))


def arc(row) -> Item:
    """Three to five choices with labels of their own."""
    choices = row["choices"]
    answer = answer_place(row.get("answerKey"), choices["label"])
    return Item(row["question"], [*choices["text"]], answer)


def openbookqa(row) -> Item:
    """Like ARC, but for a name."""
    return arc({**row, "question": row["question_stem"]})


def sciq(row) -> Item:
    """The answer stands first. Its place is drawn here, always the same for the same question."""
    texts = [row["correct_answer"]]
    for key in ("distractor1", "distractor2", "distractor3"):
        if row[key]:
            texts.append(row[key])
    order = random.Random(row["question"]).sample(range(len(texts)), len(texts))
    answer = order.index(0) if texts[0] else None
    return Item(row["question"], [texts[i] for i in order], answer)


def mmlu(row) -> Item:
    """Four choices; the answer is a number from 0."""
    choices = [*row["choices"]]
    return Item(row["question"], choices, answer_place(row.get("answer"), range(len(choices))))


def hellaswag(row) -> Item:
    """How a scene goes on. Marks in brackets are left over from captions of films."""
    start = clean(f"{row['activity_label']}: {row['ctx']}")
    ends = [clean(text) for text in row["endings"]]
    answer = answer_place(row.get("label"), range(len(ends)))
    return Item(start, ends, answer, [(start, f" {end}") for end in ends])


def clean(text: str) -> str:
    """A text without marks in brackets."""
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return re.sub(" +", " ", text).strip()


def piqa(row) -> Item:
    """Two ways to reach a goal."""
    return Item(row["goal"], [row["sol1"], row["sol2"]], answer_place(row.get("label"), (0, 1)))


def winogrande(row) -> Item:
    """Which of two words fills the gap. The text up to it differs; what follows is scored."""
    before, after = row["sentence"].split("_")
    words = [row["option1"], row["option2"]]
    pairs = [(before + word, after) for word in words]
    return Item(row["sentence"], words, answer_place(row.get("answer"), (1, 2)), pairs)


class Benchmark(NamedTuple):
    """Where a benchmark stands on the hub, and how its rows are read."""

    repo: str
    config: str
    split: str  # to be scored: test, or validation where test keeps its answers secret
    read: Callable[[dict], Item]


BENCHMARKS = {
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "openbookqa": Benchmark("allenai/openbookqa", "main", "test", openbookqa),
    "sciq": Benchmark("allenai/sciq", "default", "test", sciq),
    "mmlu": Benchmark("cais/mmlu", "all", "test", mmlu),
    "hellaswag": Benchmark("Rowan/hellaswag", "default", "validation", hellaswag),
    "piqa": Benchmark("ybisk/piqa", "plain_text", "validation", piqa),
    "winogrande": Benchmark("allenai/winogrande", "winogrande_xl", "validation", winogrande),
}


def read_items(name: str, file: str | None = None, split: str | None = None) -> list[Item]:
    """The questions of a benchmark that have an answer, from a file, or downloaded (None).

    ValueError or OSError for a file that cannot be had or read, and for rows of another kind.
    """
    benchmark = BENCHMARKS[name]
    if file is not None:
        paths = [Path(file)]
    else:
        paths = download_split(benchmark, split or benchmark.split)

    items = []
    for path in paths:
        missing = f"no such file: {path}; expected rows of {name} as .jsonl or .parquet"
        require(path.is_file(), missing)
        for number, row in enumerate(read_rows(path), 1):
            try:
                item = benchmark.read(row)
                texts = [item.question, *item.choices]
                valid = 3 <= len(texts) <= 11 and all(isinstance(text, str) for text in texts)
                require(valid, "expected 2 to 10 texts")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                problem = f"{path}, row {number}, is no row of {name}"
                raise ValueError(f"{problem}: {error!r:.200}") from None
            items.append(item)

    solved = [item for item in items if item.answer is not None]
    require(solved, f"{paths[0]} has {len(items)} questions of {name}, but no answers")
    return solved


def without_asked(items: list[Item], asked: list[Item], what: str) -> list[Item]:
    """Items that are not among those asked: their answers would be known. It is told of others."""
    known = {same_words(item) for item in asked}
    others = [item for item in items if same_words(item) not in known]
    if len(others) < len(items):
        note(f"{len(items) - len(others)} of {len(items)} {what} are asked, too: left out")
    return others


def same_words(item: Item) -> tuple:
    """What is the same for the same question, however it is spaced, and its choices are ordered."""
    question, *choices = (" ".join(text.lower().split()) for text in (item.question, *item.choices))
    return question, *sorted(choices)


def read_rows(path: Path) -> list[dict]:
    """The rows of a .parquet file, or else of JSON lines. ValueError for what cannot be read."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        lines = path.read_bytes().splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except ImportError:
        raise ValueError(f"{path} needs the library pyarrow: {INSTALL}") from None
    except (ValueError, OSError) as error:  # pyarrow's are of these kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable {path.suffix}: {reason}") from None


def download_split(benchmark: Benchmark, split: str) -> list[Path]:
    """The parquet files of a split, in the hub's cache. OSError where they cannot be had."""
    repo, pattern = benchmark.repo, f"{benchmark.config}/{split}/*.parquet"
    options = {"repo_type": "dataset", "revision": "refs/convert/parquet"}
    try:
        folder = download(repo, allow_patterns=pattern, **options)
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise OSError(f"there is no {pattern}")
    except OSError as error:
        hint = "check the network, or give a file"
        raise OSError(f"{repo} could not be downloaded ({error}); {hint}") from error
    return paths


# ---------------------------------------------------------------------------------------- prompts

LETTERS = "ABCDEFGHIJ"


class Prompt(NamedTuple):
    """What the model reads at once, and what is scored there."""

    tokens: list[int]
    options: list[list[tuple[int, int]]]  # for each: the (place, token) whose nats are summed


def text_pairs(item: Item, form: str) -> list[tuple[str, str]]:
    """For each choice a text, and the end of it that is scored.

    form: "letters" lists the choices and scores a letter; "full" scores the text of a choice.
    """
    if form == "full" and item.pairs:
        return item.pairs
    letters = LETTERS[: len(item.choices)]
    lines = [f"Question: {item.question}"]
    if form == "letters":
        for letter, choice in zip(letters, item.choices, strict=True):
            lines.append(f"{letter}. {choice}")
    lines.append("Answer:")
    text = "\n".join(lines)
    ends = letters if form == "letters" else item.choices
    return [(text, f" {end}") for end in ends]


def make_prompts(item: Item, tokenizer, form: str, shots=(), context: int = 4096) -> list[Prompt]:
    """The prompts of a question: one for all of its letters, or one for the text of each choice.

    shots: solved examples to stand in front. What is longer than the context loses its beginning.
    ValueError where the end does not fit, or where a letter is not one token.
    """
    front = ""
    for shot in shots:
        text, end = text_pairs(shot, form)[shot.answer]
        front += f"{text}{end}\n\n"

    prompts = []
    for text, end in text_pairs(item, form):
        # Scored is what the text with its end does not share with the text alone.
        whole = tokenizer.encode(front + text + end).ids
        alone = tokenizer.encode(front + text).ids
        first = n_shared(whole, alone)
        cut = max(0, len(whole) - 1 - context)
        fits = cut < first < len(whole)
        require(fits, f"{end!r:.80} does not fit into a context of {context} tokens")
        # The token at place i is predicted one place before.
        scored = [(i - 1 - cut, whole[i]) for i in range(first, len(whole))]
        prompts.append(Prompt(whole[cut:-1], [scored]))
    if form == "full":
        return prompts

    # All letters follow the same tokens.
    tokens = prompts[0].tokens
    options = [prompt.options[0] for prompt in prompts]
    single = all(len(option) == 1 for option in options)
    same = all(prompt.tokens == tokens for prompt in prompts)
    hint = "score with --form full"
    problem = f"this tokenizer has no single token for ' A', ' B' and so on; {hint}"
    require(single and same, problem)
    return [Prompt(tokens, options)]


def n_shared(first: list[int], second: list[int]) -> int:
    """How many tokens two texts share at their beginning."""
    shorter = min(len(first), len(second))
    for i in range(shorter):
        if first[i] != second[i]:
            return i
    return shorter


def as_problems(prompts: list[Prompt], items: list[Item], vocab_size: int) -> Problems:
    """Prompts whose options are letters, as tensors: what re-mixing takes.

    Where a question has fewer choices than another, its first letter stands there again.
    """
    tokens, lengths = padded([prompt.tokens for prompt in prompts], vocab_size)
    most = max(len(prompt.options) for prompt in prompts)
    options, labels = [], []
    for prompt, item in zip(prompts, items, strict=True):
        letters = [token for ((_, token),) in prompt.options]
        labels.append(letters[item.answer])
        missing = most - len(letters)
        options.append(letters + letters[:1] * missing)
    return Problems(tokens, lengths, torch.tensor(labels), torch.tensor(options))
