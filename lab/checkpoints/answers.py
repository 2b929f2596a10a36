"""Answers that are kept while a benchmark is scored, so that a rerun continues."""

import json
from contextlib import contextmanager
from pathlib import Path

from lab.tools import processes
from lab.tools.checks import require
from lab.tools.files import as_json, digest, owned


@contextmanager
def kept_answers(path: Path, about: dict):
    """The answers in a file, which only the first of several processes owns; all know them."""
    if processes.rank() > 0:
        yield Answers(None, about, processes.gathered(None)[0])
        return
    with owned(path) as file:
        answers = Answers(file, about)
        processes.gathered(answers.kept)
        yield answers


class Answers:
    """A file with a line for each answer; its first line says what they are answers to.

    Every line ends with a checksum. A last line that was cut off is dropped.
    """

    def __init__(self, file, about: dict, kept: dict | None = None):
        """Begin or continue a file that is `owned`. ValueError for one about something else.

        file None: another process writes it, and these are `kept` in it.
        """
        self.file, self.kept = file, kept
        if file is None:
            return
        first = with_checksum(about)
        file.seek(0)
        content = file.read()
        if first.startswith(content):  # nothing yet
            content = first
            file.truncate(0)
            self.append(first)
        complete = content[: content.rfind(b"\n") + 1]
        try:
            self.kept = read_answers(complete, about)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            problem = f"{file.name} cannot be continued ({error})"
            raise ValueError(f"{problem}; name another --out, or delete it") from None
        file.truncate(len(complete))

    def add(self, answers: dict, labels: dict | None = None):
        """Keep answers: item -> what was found. labels: item -> the right answer, beside it."""
        lines = b""
        for item, answer in answers.items():
            line = {"item": item, "nats": answer}
            if labels is not None:
                line["answer"] = labels[item]
            lines += with_checksum(line)
        self.append(lines)
        self.kept |= answers

    def append(self, data: bytes):
        """Write behind what is there."""
        if self.file is None:
            return
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            raise OSError(f"could not write {self.file.name}: {error.strerror}") from error


def with_checksum(line: dict) -> bytes:
    """A line of JSON that ends with the checksum of the others of its entries."""
    checksum = digest(as_json(line))[:16]
    return as_json(line | {"checksum": checksum}).encode() + b"\n"


def read_answers(content: bytes, about: dict) -> dict:
    """Item -> answer, of a file that is about the same."""
    require(content, "its first line is not ours")
    lines = []
    for number, text in enumerate(content.splitlines(keepends=True), 1):
        line = json.loads(text)
        line.pop("checksum", None)
        lines.append(line)
        if number == 1:
            other = sorted(key for key in about if line.get(key) != about[key])
            require(not other, f"it is about another {', '.join(other)}")
        require(text == with_checksum(line), f"line {number} was altered")
    return {line["item"]: line["nats"] for line in lines[1:]}
