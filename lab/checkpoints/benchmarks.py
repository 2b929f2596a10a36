"""Multiple-choice benchmarks as the hub has them.

Rows come from a file (JSON lines or a JSON array, perhaps .gz, or .parquet), or are downloaded as
parquet: no code of a data set ever runs. A function for each benchmark makes an Item of a row.
"""

import gzip
import json
import random
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lab.checkpoints.untrusted import INSTALL, download
from lab.tools.cli import note
from moe import require

LETTERS = "ABCDEFGHIJ"


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
    """Three to five choices with labels of their own, as the hub has them or as they came out."""
    question, choices = row.get("question_stem", row.get("question")), row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    answer = answer_place(row.get("answerKey"), choices["label"])
    return Item(question, [*choices["text"]], answer)


def sciq(row) -> Item:
    """The answer stands first. Its place is drawn here, always the same for the same question."""
    texts = [row["correct_answer"]]
    for key in ("distractor1", "distractor2", "distractor3"):
        if row.get(key):
            texts.append(row[key])
    order = random.Random(row["question"]).sample(range(len(texts)), len(texts))
    answer = order.index(0) if texts[0] else None
    return Item(row["question"], [texts[i] for i in order], answer)


def mmlu(row) -> Item:
    """Four choices; the answer is a number from 0, or a letter."""
    choices, answer = [*row["choices"]], row.get("answer")
    labels = LETTERS[: len(choices)] if str(answer).isalpha() else range(len(choices))
    return Item(row["question"], choices, answer_place(answer, labels))


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
    keys: str  # what stands in a row
    solved: str = "train"  # the split whose answers may be shown


ARC_KEYS = "question or question_stem, choices, answerKey"
SCIQ_KEYS = "question, correct_answer, distractor1, distractor2, distractor3"
SCENE_KEYS = "activity_label, ctx, endings, label"
GAP_KEYS = "sentence, option1, option2, answer"
CHOICE_KEYS = "question, choices, answer"
BENCHMARKS = {
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", "test", arc, ARC_KEYS),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC-Easy", "test", arc, ARC_KEYS),
    "openbookqa": Benchmark("allenai/openbookqa", "main", "test", arc, ARC_KEYS),
    "sciq": Benchmark("allenai/sciq", "default", "test", sciq, SCIQ_KEYS),
    "mmlu": Benchmark("cais/mmlu", "all", "test", mmlu, CHOICE_KEYS, "validation"),
    "hellaswag": Benchmark("Rowan/hellaswag", "default", "validation", hellaswag, SCENE_KEYS),
    "piqa": Benchmark("ybisk/piqa", "plain_text", "validation", piqa, "goal, sol1, sol2, label"),
    "winogrande": Benchmark(
        "allenai/winogrande", "winogrande_xl", "validation", winogrande, GAP_KEYS
    ),
}


def read_items(name: str, file: str | None = None, solved: bool = False) -> list[Item]:
    """The questions of a benchmark that have an answer, from a file, or downloaded (None).

    solved: of the split whose answers may be shown, not of the one to be scored. ValueError or
    OSError for a file that cannot be had or read, and for rows of another kind.
    """
    benchmark = BENCHMARKS[name]
    if file is not None:
        paths = [Path(file)]
    else:
        paths = download_split(benchmark, benchmark.solved if solved else benchmark.split)

    items = []
    for path in paths:
        missing = f"no such file: {path}; expected rows of {name} as .jsonl or .parquet"
        require(path.is_file(), missing)
        for number, row in enumerate(read_rows(path), 1):
            items.append(read_row(row, name, f"{path}, row {number}"))

    solved = [item for item in items if item.answer is not None]
    require(solved, f"{paths[0]} has {len(items)} questions of {name}, but no answers")
    if len(solved) < len(items):
        hidden = len(items) - len(solved)
        note(f"{hidden} of {len(items)} questions of {name} have no answer: left out")
    return solved


def read_row(row, name: str, place: str) -> Item:
    """The question in a row. place: for messages. ValueError for a row of another kind."""
    problem = f"{place}, is no row of {name}"
    try:
        item = BENCHMARKS[name].read(row)
    except (AttributeError, KeyError, TypeError):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        expected = f"expected {BENCHMARKS[name].keys}; found {has:.200}"
        raise ValueError(f"{problem}: {expected}") from None
    except ValueError as error:
        raise ValueError(f"{problem}: {error!s:.200}") from None
    texts = [item.question, *item.choices]
    valid = 3 <= len(texts) <= 11 and all(isinstance(text, str) for text in texts)
    require(valid, f"{problem}: expected a question and 2 to 10 choices, all of them texts")
    return item


def not_asked(items: list[Item], asked: list[Item], what: str) -> list[int]:
    """The places of items that are not asked: answers would be known. It is told of the others."""
    known = {same_words(item) for item in asked}
    places = [i for i, item in enumerate(items) if same_words(item) not in known]
    if len(places) < len(items):
        note(f"{len(items) - len(places)} of {len(items)} {what} are asked, too: left out")
    return places


def same_words(item: Item) -> tuple:
    """What is the same for the same question, however it is spaced, and its choices are ordered."""
    question, *choices = (" ".join(text.lower().split()) for text in (item.question, *item.choices))
    return question, *sorted(choices)


def read_rows(path: Path) -> list[dict]:
    """The rows of a .parquet file, or of JSON: an array, or lines, perhaps .gz. ValueError."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        content = content.removeprefix(BOM_UTF8)
        if content.lstrip()[:1] == b"[":
            return json.loads(content)
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except ImportError:
        raise ValueError(f"{path} needs the library pyarrow: {INSTALL}") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pyarrow's are of these kinds
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
