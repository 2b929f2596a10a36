"""What the models learn from: a synthetic task on which routing matters, and text.

Both kinds of data offer `vocab_size` and `batch(step, n)`, and the batch of a step is a function of (seed, step) alone:
a resumed run sees what the uninterrupted run would have seen.
"""

import difflib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from moe import IGNORE, require

# ------------------------------------------------------------------------------------------------- skills and dialects


# Ten skills: functions of two arrays of numbers from 0 to 15, into the same numbers.
SKILLS = {
    "max(a, b)": np.maximum,
    "min(a, b)": np.minimum,
    "a": lambda a, b: a,
    "b": lambda a, b: b,
    "a + 1": lambda a, b: (a + 1) % 16,
    "b + 1": lambda a, b: (b + 1) % 16,
    "|a - b|": lambda a, b: abs(a - b),
    "(a + b) / 2": lambda a, b: (a + b) // 2,
    "15 - a": lambda a, b: 15 - a,
    "15 - b": lambda a, b: 15 - b,
}


class Prompts(NamedTuple):
    """n zero-shot prompts of the skills task, all with the dialect's marker shown, and what is known about each."""

    tokens: torch.Tensor  # (n, 4) marker, a, b, cue
    labels: torch.Tensor  # (n,) the answer, 0 to 15
    other: torch.Tensor  # (n,) the answer under the cue's other reading; the same as labels where the cue is clear
    cue: torch.Tensor  # (n,) 0 to 25
    skill: torch.Tensor  # (n,) the place in SKILLS
    clear: torch.Tensor  # (n,) bool


class SkillsTask:
    """Skills and dialects: a cue says what to do with two numbers, but many cues mean two things.

    A prompt is [marker, a, b, cue] and its answer y = skill(a, b), with a, b and y from 0 to 15. Ten cues are clear:
    one skill each. Sixteen are ambiguous: two skills each, one in two of the four dialects, the other in the other
    two. Training mostly hides the dialect (the marker shows it in 5 % of the examples, else it is NONE); dev, test and
    reference prompts always show it, so that their label is a function of the prompt. A model thus knows every skill
    and both readings of every cue, but is unsure which to use. The cells (cue, a, b) are split, whatever the dialect:
    no operands of a cue stand in two splits.
    """

    N, CUES, CLEAR, DIALECTS = 16, 26, 10, 4  # numbers, cues, how many of them are clear, dialects
    EXAMPLES, SHOWN, SAME = 4, 0.05, 0.25  # in a training sequence; P(marker shown); P(all share cue and dialect)
    FIRST_CUE, NONE = 16, 42  # tokens: 0..15 numbers, 16..41 cues, 42 the marker NONE, 43..46 the dialects' markers
    vocab_size = 47
    splits = ("train", "reference", "dev", "test")  # 50, 25, 10 and 15 % of the cells

    def __init__(self, seed: int = 0):
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        first = rng.permutation(len(SKILLS))  # the clear cues share out the ten skills
        pairs = np.stack([rng.permutation(len(SKILLS))[:2] for _ in range(self.CUES - self.CLEAR)])  # (16, 2)
        halves = np.stack([rng.permutation([0, 0, 1, 1]) for _ in pairs])  # (16, 4) which of the two a dialect means
        clear = np.repeat(first[:, None], self.DIALECTS, 1)  # (10, 4)
        self.meaning = np.concatenate([clear, np.take_along_axis(pairs, halves, 1)])  # (26, 4) the skill
        swapped = np.concatenate([clear, np.take_along_axis(pairs, 1 - halves, 1)])  # (26, 4) the other reading
        a, b = np.meshgrid(np.arange(self.N), np.arange(self.N), indexing="ij")  # (16, 16) twice
        answers = np.stack([skill(a, b) for skill in SKILLS.values()])  # (10, 16, 16)
        self.answer, self.other = answers[self.meaning], answers[swapped]  # (26, 4, 16, 16) each
        n = self.CUES * self.N**2
        cells = np.split(rng.permutation(n), np.cumsum([n // 2, n // 4, round(0.1 * n)]))
        self.cells = dict(zip(self.splits, map(np.sort, cells), strict=True))  # sorted: cue by cue
        self.dialect = rng.integers(self.DIALECTS, size=n)  # the one dialect in which dev and test ask a cell
        self.start = np.searchsorted(self.cells["train"], self.N**2 * np.arange(self.CUES + 1))  # (27,)

    def batch(self, step: int, n: int):
        """n training sequences of four solved examples: tokens and targets (n, 20); only answers have a target."""
        rng = np.random.default_rng([self.seed, 1, step])
        shape = (n, self.EXAMPLES)
        cue, dialect = rng.integers(self.CUES, size=shape), rng.integers(self.DIALECTS, size=shape)
        same = rng.random(n) < self.SAME
        cue[same], dialect[same] = cue[same, :1], dialect[same, :1]
        size = (self.start[1:] - self.start[:-1])[cue]  # (n, 4) training cells of the cue
        _, a, b = self.unravel(self.cells["train"][self.start[cue] + (rng.random(shape) * size).astype(int)])
        marker = np.where(rng.random(shape) < self.SHOWN, self.NONE + 1 + dialect, self.NONE)
        y = self.answer[cue, dialect, a, b]
        tokens = np.stack([marker, a, b, self.FIRST_CUE + cue, y], -1)  # (n, 4, 5)
        targets = np.full_like(tokens, IGNORE)
        targets[..., 3] = y  # what should follow the cue
        return torch.from_numpy(tokens.reshape(n, -1)), torch.from_numpy(targets.reshape(n, -1))  # (n, 4, 5) -> (n, 20)

    def prompts(self, split: str) -> Prompts:
        """A split's prompts: each dev and test cell in one dialect, each reference (and train) cell in all four."""
        require(split in self.splits, f"the skills task has no split {split!r}; it has {', '.join(self.splits)}")
        cells, d = self.cells[split], self.dialect[self.cells[split]]
        if split in ("train", "reference"):
            cells, d = np.repeat(cells, self.DIALECTS), np.tile(np.arange(self.DIALECTS), len(cells))
        cue, a, b = self.unravel(cells)
        known = (self.answer[cue, d, a, b], self.other[cue, d, a, b], cue, self.meaning[cue, d], cue < self.CLEAR)
        tokens = np.stack([self.NONE + 1 + d, a, b, self.FIRST_CUE + cue], 1)  # (n, 4)
        return Prompts(*map(torch.from_numpy, (tokens, *known)))

    def unravel(self, cells):
        """Cell numbers -> cue, a, b."""
        return np.unravel_index(cells, (self.CUES, self.N, self.N))


# ---------------------------------------------------------------------------------------------------------------- text

END = "<|endoftext|>"  # the line that ends a document


def tokenizer(name: str = "bytes") -> tiktoken.Encoding:
    """`bytes` (a token a byte, and one for end of text), or an encoding that tiktoken knows, such as gpt2."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={END: 256})
    known = ["bytes", *tiktoken.list_encoding_names()]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    require(name in known, f"no tokenizer is called {name!r}; {hint}")
    return tiktoken.get_encoding(name)


def read_tokens(path: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """The tokens of a UTF-8 text file, an end-of-text token behind every document (documents end with END lines).

    Raises ValueError for a file that is missing, empty or not UTF-8.
    """
    require(Path(path).is_file(), f"no such text file: {path}")
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; convert it first"
        ) from None
    documents = [document.strip() for document in text.split(END)]
    tokens = [[*encoding.encode_ordinary(document), encoding.eot_token] for document in documents if document]
    require(len(tokens) > 0, f"{path} holds no text ({len(raw)} bytes)")
    return np.concatenate([np.array(document, dtype=np.uint32) for document in tokens])


class TextData:
    """A text as one long row of tokens, from which batches are windows drawn at random.

    The first fifth of the validation text is `dev`, for every choice, and the rest `test`. Without a validation file,
    the last tenth of the text is held back. ValueError for a text shorter than a context.
    """

    def __init__(self, path: str, valid_path: str | None = None, name="bytes", context=128, seed=0):
        self.encoding, self.context, self.seed = tokenizer(name), context, seed
        self.vocab_size = self.encoding.n_vocab
        tokens, held = read_tokens(path, self.encoding), f"the last tenth of {path}"
        train, valid = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
        if valid_path:
            train, valid, held = tokens, read_tokens(valid_path, self.encoding), valid_path
        cut = len(valid) // 5
        self.rows = {"train": train, "dev": valid[:cut], "test": valid[cut:]}
        for split, row in self.rows.items():
            what = f"{split} ({path if split == 'train' else f'a part of {held}'})"
            require(len(row) > context, f"{what} has {len(row)} tokens; a context of {context} needs {context + 1}")

    def batch(self, step: int, n: int):
        """n windows of the training text: tokens (n, T) and targets (n, T), the tokens that follow."""
        row = self.rows["train"]
        starts = np.random.default_rng([self.seed, 1, step]).integers(len(row) - self.context, size=n)
        return windows(row, starts, self.context)

    def held_out(self, split: str, most: int = 256):
        """Up to `most` windows, evenly spread over dev or test: tokens and targets (n, T)."""
        row = self.rows[split]
        n = min(most, (len(row) - 1) // self.context)
        return windows(row, np.linspace(0, len(row) - self.context - 1, n).astype(int), self.context)

    def show(self, token: int) -> str:
        """A token as people can read it: 'e', ' the', '\\n'."""
        return repr(self.encoding.decode([token]))


def windows(tokens, starts, length):
    """tokens (many,), starts (n,) -> the windows (n, length) and what follows each of their tokens (n, length)."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))  # (n, length + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
