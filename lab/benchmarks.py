"""Multiple-choice benchmarks as the hub has them: those of the C3PO paper, and those that it takes references from.

Rows come from a file, .jsonl or .parquet, or are downloaded as parquet, so that no code of a data set ever runs.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe import require


class Item(NamedTuple):
    """A question in words."""

    question: str
    choices: list[str]
    answer: int | None  # the place among the choices; None: the row keeps it secret, as hidden test sets do
    pairs: list[tuple[str, str]] | None = None  # for each choice a text and its end, where these are special


def place(label, labels) -> int | None:
    """Where the answer stands. ValueError for a label, a letter or a number, that is not among those of the choices."""
    labels = [str(each) for each in labels]
    hidden = label in (None, "", -1, "-1")
    require(hidden or str(label) in labels, f"the answer is {label!r:.40}; expected one of {labels}")
    return None if hidden else labels.index(str(label))


def labelled(row, question="question") -> Item:
    """ARC, OpenBookQA: three to five choices with labels of their own."""
    choices = row["choices"]
    return Item(row[question], [*choices["text"]], place(row.get("answerKey"), choices["label"]))


def sciq(row) -> Item:
    """SciQ lists the answer first; its place is drawn here, always the same for the same question."""
    texts = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3) if row[f"distractor{i}"])]
    order = random.Random(row["question"]).sample(range(len(texts)), len(texts))
    return Item(row["question"], [texts[i] for i in order], order.index(0) if texts[0] else None)


def mmlu(row) -> Item:
    return Item(row["question"], [*row["choices"]], place(row.get("answer"), range(len(row["choices"]))))


def hellaswag(row) -> Item:
    """How a scene goes on. Marks in brackets are left from the captions that the texts were made of."""
    texts = (f"{row['activity_label']}: {row['ctx']}", *row["endings"])
    texts = (re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")) for text in texts)
    start, *ends = (re.sub(" +", " ", text).strip() for text in texts)
    return Item(start, ends, place(row.get("label"), range(len(ends))), [(start, f" {end}") for end in ends])


def piqa(row) -> Item:
    return Item(row["goal"], [row["sol1"], row["sol2"]], place(row.get("label"), (0, 1)))


def winogrande(row) -> Item:
    """Which of two words fills the gap: the text up to the gap differs, and what follows it is scored."""
    (before, after), options = row["sentence"].split("_"), [row["option1"], row["option2"]]
    return Item(row["sentence"], options, place(row.get("answer"), (1, 2)), [(before + o, after) for o in options])


class Task(NamedTuple):
    """Where a benchmark stands on the hub."""

    repo: str
    config: str
    split: str  # to be scored: the test split, or, where that keeps its answers secret, the validation split
    read: Callable[[dict], Item]


TASKS = {
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", labelled),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", labelled),
    "openbookqa": Task("allenai/openbookqa", "main", "test", lambda row: labelled(row, "question_stem")),
    "sciq": Task("allenai/sciq", "default", "test", sciq),
    "mmlu": Task("cais/mmlu", "all", "test", mmlu),
    "hellaswag": Task("Rowan/hellaswag", "default", "validation", hellaswag),
    "piqa": Task("ybisk/piqa", "plain_text", "validation", piqa),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", winogrande),
}


def read_items(task: str, file: str | None = None, split: str | None = None) -> list[Item]:
    """The questions of a task that have an answer: from a file, or (None) downloaded. ValueError or OSError if bad."""
    items, paths = [], [Path(file)] if file else download(TASKS[task], split or TASKS[task].split)
    for path in paths:
        require(path.is_file(), f"no such file: {path}; expected rows of {task} as .jsonl or .parquet")
        for number, row in enumerate(read_rows(path), 1):
            try:
                items.append(TASKS[task].read(row))
                texts = [items[-1].question, *items[-1].choices]
                require(2 < len(texts) < 12 and all(isinstance(t, str) for t in texts), "expected 2 to 10 texts")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, row {number}, is no row of {task}: {error!r:.200}") from None
    known = [item for item in items if item.answer is not None]
    require(known, f"{paths[0]} has {len(items)} questions of {task}, but no answers")
    return known


def read_rows(path: Path) -> list[dict]:
    """The rows of a .parquet file, or else of JSON lines. ValueError for what cannot be read."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet  # an extra

            return parquet.read_table(path).to_pylist()
        return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except ImportError:
        raise ValueError(f"{path} needs the library pyarrow: pip install pyarrow") from None
    except (ValueError, OSError) as error:  # pyarrow's are of these kinds
        raise ValueError(f"{path} is no readable {path.suffix}: {' '.join(str(error).split())}") from None


def download(task: Task, split: str) -> list[Path]:
    """The hub's parquet files of a split, in its cache. OSError where they cannot be had."""
    try:
        from huggingface_hub import snapshot_download  # here: a file does not need it

        pattern, options = f"{task.config}/{split}/*.parquet", {"repo_type": "dataset"}
        folder = snapshot_download(task.repo, revision="refs/convert/parquet", allow_patterns=pattern, **options)
        paths = sorted(Path(folder).glob(pattern))
        require(paths, f"there is no {pattern}")
        return paths
    except Exception as error:  # OSError, or of the hub, or of its network library, which differs between its versions
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{task.repo} could not be downloaded ({reason}); check the network, or give a file") from error
