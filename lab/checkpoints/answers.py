"""Answers that are kept while a benchmark is scored, so that a rerun continues."""

import hashlib
import json
from pathlib import Path

from lab.tools.runs import write
from moe import require


def digest(value) -> str:
    """What tells prompts, or settings, from all others."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


class Answers:
    """A file with a line for each answer; its first line says what they are answers to."""

    def __init__(self, path: Path, about: dict):
        """Open or begin the file. ValueError for one that is about something else."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(about).encode() + b"\n"
        if path.exists():
            content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]  # without a last line that was cut off
        try:
            self.kept = read_answers(complete, about)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{path} cannot be continued ({error})"
            raise ValueError(f"{problem}; name another --out, or delete it") from None
        write(path, complete)

    def add(self, answers: dict, labels: dict | None = None):
        """Keep answers: item -> what was found. labels: item -> the right answer, beside it."""
        lines = []
        for item, answer in answers.items():
            line = {"item": item, "nats": answer}
            if labels is not None:
                line["answer"] = labels[item]
            lines.append(json.dumps(line) + "\n")
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)
        self.kept |= answers


def read_answers(content: bytes, about: dict) -> dict:
    """Item -> answer, of a file that is about the same."""
    first, *lines = [json.loads(line) for line in content.splitlines()]
    other = sorted(key for key in about if first.get(key) != about[key])
    require(not other, f"it is about another {', '.join(other)}")
    return {line["item"]: line["nats"] for line in lines}
