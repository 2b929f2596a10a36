"""What the models learn from: a synthetic task on which routing matters, and text.

Both kinds of data offer `vocab_size` and `batch(step, n)`, and the batch of a step is a function of (seed, step) alone:
a resumed run sees what the uninterrupted run would have seen.

python data.py PATH    learns the tokenizer `tinystories` from a text
"""

import base64
import difflib
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from moe import IGNORE, require

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

    >>> {split: len(SkillsTask(0).prompts(split).labels) for split in SkillsTask.splits}
    {'train': 13312, 'reference': 6656, 'dev': 666, 'test': 998}
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

END = "<|endoftext|>"  # alone on a line, it ends a document
RANKS = Path(__file__).parent / "lab" / "tinystories-2048.tiktoken"
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # words, never joined


def tokenizer(name: str = "tinystories") -> tiktoken.Encoding:
    """Our own `tinystories`, `bytes`, or an encoding of tiktoken, which downloads it. ValueError: no such name."""
    if name in ("tinystories", "bytes"):
        ranks = {bytes([i]): i for i in range(256)}
        if name == "tinystories":  # tiktoken's own reader would keep a copy, and miss that the file was made anew
            ranks = {base64.b64decode(line.split()[0]): i for i, line in enumerate(RANKS.read_bytes().splitlines())}
        return tiktoken.Encoding(name, pat_str=GPT2, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    known = ["tinystories", "bytes", *tiktoken.list_encoding_names()]
    near = difflib.get_close_matches(name, known, 1, cutoff=0)
    require(name in known, f"no tokenizer is called {name!r}; did you mean {near[0]}?")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise OSError(f"no network to download {name}, nor is it in TIKTOKEN_CACHE_DIR; try tinystories") from error


def train_tokenizer(path: str, size: int = 2047) -> bytes:
    """A byte-level BPE of `size` ranks, learnt from the documents of a text -> a ranks file: lines "base64 rank"."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("training a tokenizer needs the library tokenizers: pip install tokenizers") from None
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # it writes printable bytes as such, others as chr(256) on
    byte = dict(zip(letters, sorted(range(256), key=lambda byte: chr(byte) not in letters), strict=True))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(documents(path), trainer)
    tokens = [bytes(byte[letter] for letter in bpe.id_to_token(rank)) for rank in range(bpe.get_vocab_size())]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def tinystories() -> list[str]:
    """Paths of TinyStories' training and validation text (1.9 GB, in the hub's cache). OSError if no download works."""
    try:
        from huggingface_hub import hf_hub_download  # here: only this needs it

        files = (f"TinyStories-{part}.txt" for part in ("train", "valid"))
        paths = [hf_hub_download("roneneldan/TinyStories", file, repo_type="dataset") for file in files]
        for path in map(Path, paths):  # links to files that the hub names by their sha256, but compares only in size
            blob = path.parent / path.readlink() if path.is_symlink() else path
            require(len(blob.name) != 64 or sha256(path) == blob.name, f"{path.name} was altered: delete {blob}")
        return paths
    except Exception as error:  # OSError, or of the hub, or of its network library, which differs between its versions
        mend = "check the network, or use --data-file PATH --valid-file PATH"
        raise OSError(f"TinyStories could not be downloaded ({' '.join(str(error).split())}); {mend}") from error


def sha256(path) -> str:
    """The checksum of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def documents(path: str):
    """The documents of a UTF-8 text of any size, stripped, one by one. ValueError: not UTF-8, or no END lines."""
    rest, block, count, mend = "", "-", 0, f"end every document with a line {END}"
    with open(path, encoding="utf-8", newline="") as file:
        while block:
            try:
                block = file.read(2**20)
            except UnicodeDecodeError as error:
                found = f"byte {file.buffer.tell() - len(error.object) + error.start} is {error.object[error.start]:#x}"
                raise ValueError(f"{path} is not UTF-8: {found}; convert it, or give a text file") from None
            *texts, rest = re.split(rf"(?m)^{re.escape(END)}[ \t\r]*\n", rest + (block or f"\n{END}\n"))
            require(len(rest) <= 2**23, f"{path} has a document of over 8 million characters; {mend}")  # flat memory
            texts = list(filter(None, map(str.strip, texts)))
            count += len(texts)
            yield from texts
    require(count > 1, f"{path} ({Path(path).stat().st_size:,} bytes) has {count} documents, expected more; {mend}")


def read_tokens(path: str, encoding: tiktoken.Encoding, cache: str = "out/tokens") -> np.ndarray:
    """The tokens of a text, END behind every document: a memory-mapped row (tokens,) of uint16 or uint32.

    Made once, as a file of raw tokens and one about it, named by the contents of text and tokenizer. ValueError for a
    bad text (see `documents`), or if the files are not what their names say."""
    require(Path(path).is_file(), f"no such text file: {path}; expected the path of a UTF-8 text")
    ranks = hashlib.sha256(repr((encoding._pat_str, encoding._mergeable_ranks)).encode()).hexdigest()
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    known = {"dtype": dtype.name, "tokenizer": f"{encoding.name}-{ranks[:8]}", "text": sha256(path)}
    binary = Path(cache) / f"{known['tokenizer']}-{known['text'][:16]}.bin"
    about = binary.with_suffix(".json")
    if not (binary.exists() and about.exists()):
        write_tokens(path, encoding, binary, about, known)
    found, expected = about.read_text("utf-8", errors="replace"), json.dumps({"size": binary.stat().st_size, **known})
    require(found.startswith(expected[:-1]), f"{about} says {found!r}, expected {expected}; delete it to make it anew")
    return np.memmap(binary, dtype, "r")


def write_tokens(path: str, encoding: tiktoken.Encoding, binary: Path, about: Path, known: dict):
    """Tokenise a text in flat memory, into two files that appear whole or not at all."""
    about.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=Path(path).stat().st_size, unit="B", unit_scale=True, desc="tokens", leave=False, disable=None)
    with bar, tempfile.TemporaryDirectory(dir=about.parent) as folder:
        counts, part = np.zeros(3, int), Path(folder, "part")
        with open(part, "wb") as file:
            for text in documents(path):
                row = np.array([*encoding.encode_ordinary(text), encoding.eot_token], known["dtype"])
                file.write(row.tobytes())
                counts += (len(row), 1, len(text.encode()))
                bar.update(len(text) + len(f"\n{END}\n"))  # nearly: a letter can be several bytes
        part.replace(binary)
        counts = dict(zip(("tokens", "documents", "bytes"), counts.tolist(), strict=True))
        part.write_text(json.dumps({"size": binary.stat().st_size, **known, **counts}), encoding="utf-8")
        part.replace(about)  # last: where it stands, the tokens are complete


class TextData:
    """A text as a long row of tokens for each split, from which batches are windows drawn at random.

    The validation text is held back, or else the last tenth of the documents: its first 500 (the first fifth of fewer
    than 2,500) are `dev`, for every choice, the rest `test`. rows: {split: (tokens,)}, memory-mapped; no window crosses
    from one to another. token_bytes: (V,) the bytes of every token, 0 for END, so that bits per byte =
    summed loss (nats) / ln 2 / token_bytes[targets].sum(). ValueError for a bad or too short text."""

    def __init__(self, path, valid_path=None, name="tinystories", context=128, seed=0, cache="out/tokens"):
        self.encoding, self.context, self.seed = tokenizer(name), context, seed
        self.vocab_size = self.encoding.n_vocab
        lengths = {self.encoding.encode_single_token(token): len(token) for token in self.encoding.token_byte_values()}
        self.token_bytes = torch.tensor([lengths.get(token, 0) for token in range(self.vocab_size)])
        rows = [read_tokens(file, self.encoding, cache) for file in (path, valid_path) if file]
        if not valid_path:
            starts = self.starts(rows[0])
            rows = np.split(rows[0], [starts[min(len(starts) * 9 // 10, len(starts) - 3)]])  # two documents, or more
        starts = self.starts(rows[1])
        dev, test = np.split(rows[1], [starts[min(500, (len(starts) + 3) // 5)]])
        self.rows = {"train": rows[0], "dev": dev, "test": test}
        for split, row in self.rows.items():
            found = f"{split}, from {path if split == 'train' else valid_path or path}, has {len(row)} tokens"
            require(len(row) > context, f"{found}; a context of {context} needs {context + 1}: give a longer text")

    def starts(self, row):
        """tokens (many,) -> (documents + 1,) where every document starts, and where the last one ends."""
        step, end = 2**24, self.encoding.eot_token  # in steps: the whole row at once would fill the memory
        ends = (i + 1 + np.flatnonzero(row[i : i + step] == end) for i in range(0, len(row), step))
        return np.concatenate([[0], *ends])

    def documents(self, split: str) -> list[np.ndarray]:
        """The documents of a split, in order: arrays (tokens,) whose last token is END."""
        return np.split(np.asarray(self.rows[split]), self.starts(self.rows[split])[1:-1])

    def batch(self, step: int, n: int):
        """n windows of the training text: tokens (n, T) and targets (n, T), the tokens that follow."""
        rng = np.random.default_rng([self.seed, 1, step])
        return self.windows("train", rng.integers(len(self.rows["train"]) - self.context, size=n))

    def held_out(self, split: str, most: int | None = 256):
        """Windows that do not overlap, evenly spread over a split; None: all that fit. tokens and targets (n, T)."""
        room = len(self.rows[split]) - self.context - 1
        n = min(most or room + 1, room // self.context + 1)
        return self.windows(split, np.arange(n) * room // max(n - 1, 1))

    def windows(self, split: str, starts):
        """starts (n,) -> the windows of a split that start there (n, T), and what follows each of their tokens."""
        places = starts[:, None] + np.arange(self.context + 1)  # (n, T + 1)
        rows = torch.from_numpy(self.rows[split][places].astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def show(self, token: int) -> str:
        """A token as people can read it: 'e', ' the', '\\n'."""
        return repr(self.encoding.decode([token]))


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        require(len(sys.argv) == 2, "usage: python data.py PATH, a text to train the tokenizer tinystories on")
        print(f"wrote {RANKS.write_bytes(train_tokenizer(sys.argv[1])):,} bytes to {RANKS}")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(1 if len(sys.argv) == 2 else 2)
