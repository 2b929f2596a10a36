"""What models learn from: a task of skills and dialects, compositions of functions, and text.

Training, evaluation and re-mixing ask a task for what the class `Task` lists, and for nothing else:
a task of your own is one class. `SkillsTask` is the default; `CompositionTask` asks who can
compose; `TextData` is stories or any other text. Tokenizers, files of tokens and the download of
TinyStories are in lab/tools/texts.py.

The batch of a step is a function of (seed, step) alone, so that a resumed run sees what the
uninterrupted run would have seen.

Letters in the shape comments: n sequences or prompts, T tokens, V vocabulary.
"""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from lab.tools.checks import annotated, evaluation, require_shape
from lab.tools.cli import note
from lab.tools.files import digest, require_form
from lab.tools.kinds import one_of
from lab.tools.texts import identify, read_tokens, tinystories, tokenizer
from moe import IGNORE, require

# --------------------------------------------------------------------------------- what a task is


class Kinds(NamedTuple):
    """Held-out tokens sorted into kinds, to see which expert takes which kind."""

    tokens: torch.Tensor  # (n, T)
    kind: torch.Tensor  # (n, T) the place in `names`; -1: of no kind
    names: list[str]


class Problems(NamedTuple):
    """Prompts whose next token is known, for re-mixing and multiple choice."""

    tokens: torch.Tensor  # (n, T) padded with 0 on the right
    lengths: torch.Tensor  # (n,)
    labels: torch.Tensor  # (n,) the right next token
    options: torch.Tensor | None = None  # (n, O) tokens to choose from; None: any
    about: "Prompts | None" = None  # what is known of prompts of the skills task
    frequency: torch.Tensor | None = None  # (V,) how often each token ends a training story


class Task(Protocol):
    """What training, evaluation and re-mixing ask of a task.

    A class that inherits from Task has the defaults below. Training needs `vocab_size`, `batch` and
    `score`; `kinds` is for figures of routing, `problems` for re-mixing.
    """

    name: str
    vocab_size: int
    guess: float  # cross-entropy of a uniform guess, in nats
    splits: tuple[str, ...] = ("train", "reference", "dev", "test")
    settings: ClassVar = {}  # fields of TrainConfig and MoEConfig that it wants otherwise
    remix_settings: ClassVar = {}  # fields of RemixConfig, likewise
    preset_sizes: ClassVar = {}  # fields of MoEConfig that presets start from
    preset_hint = ""  # flags with which every preset has the parameters that it should have
    next_commands: ClassVar = {}  # what to run after training -> what it does
    content: ClassVar = {}  # what it is made of -> its checksum, which a run remembers
    encoding = None  # where the task is text: the tokenizer

    def batch(self, step: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Training tokens (n, T) and targets (n, T): what should follow, or IGNORE."""

    @annotated
    def random(self, step: int, n: int) -> np.random.Generator:
        """The random numbers of a step's batch of n sequences."""
        require(step >= 0 and n >= 1, f"step is {step}, n {n}; expected at least 0, and 1")
        return np.random.default_rng([self.seed, 1, step])

    def score(self, model, split: str, most: int | None = 256) -> dict[str, float]:
        """Scores on up to `most` sequences of a split (None: all). One of them is "loss"."""

    def kinds(self, split: str, n_kinds: int = 12, most: int | None = 256) -> Kinds:
        """Tokens of a split, and what kinds of token they are."""

    def problems(self, split: str) -> Problems:
        """The problems of a split; those of "reference" help to solve those of dev and test."""

    def corpus(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Tokens (n, T) and lengths (n,) that show how rare a token is; None: the references."""
        return None

    def words(self, tokens) -> str:
        """A prompt or an answer, a list of tokens, as people read it; here their numbers."""
        return " ".join(str(int(token)) for token in tokens)

    def sample(self, model) -> str:
        """A text by the model; nothing where the task is no text."""
        return ""


@annotated
def perplexity(nats: float) -> float:
    """exp(nats). Of more than 700 it is exp(700), with a note: hardly a larger one can be held."""
    if nats > 700:
        note(f"the loss is {nats:.4g} nats: exp(700) stands for its perplexity, which is larger")
    return math.exp(min(nats, 700.0))


@annotated
@torch.no_grad()
def passes(model, *tensors: torch.Tensor) -> Iterator[tuple]:
    """Pass tokens (n, T) through the model in evaluation, so many rows at a time as fit.

    tensors: the tokens, and others of length n. Yields these rows of each, and the Output.
    """
    require_shape("tokens", tensors[0], (None, None))
    n_rows = max(1, 8192 // tensors[0].shape[1])
    device = next(model.parameters()).device
    for start in range(0, len(tensors[0]), n_rows):
        rows = [tensor[start : start + n_rows].to(device) for tensor in tensors]
        with evaluation(model):  # not while the caller has the rows: he may never come back
            out = model(rows[0])
        yield *rows, out


# ---------------------------------------------------------------------------- skills and dialects

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
    """n prompts of the skills task that show their dialect, and what is known of each."""

    tokens: torch.Tensor  # (n, 4) marker, a, b, cue
    labels: torch.Tensor  # (n,) the answer, 0 to 15
    other: torch.Tensor  # (n,) the answer by the cue's other skill; of a clear cue, the answer
    cue: torch.Tensor  # (n,) 0 to 25
    skill: torch.Tensor  # (n,) the place in SKILLS
    clear: torch.Tensor  # (n,) bool


class SkillsTask(Task):
    """Skills and dialects: a cue says what to do with two numbers, but many cues mean two things.

    A prompt is [marker, a, b, cue] and its answer y = skill(a, b), with a, b and y from 0 to 15.
    Ten cues are clear: one skill each. Sixteen are ambiguous: two skills each, one in two of the
    four dialects, the other in the other two. Training mostly hides the dialect (the marker shows
    it in 5 % of the examples, else it is NONE); dev, test and reference prompts always show it, so
    that their label is a function of the prompt. A model thus knows every skill and both readings
    of every cue, but is unsure which to use. The cells (cue, a, b) are split, whatever the dialect:
    no operands of a cue stand in two splits.

    >>> {split: len(SkillsTask(0).prompts(split).labels) for split in SkillsTask.splits}
    {'train': 13312, 'reference': 6656, 'dev': 666, 'test': 998}
    """

    N = 16  # numbers
    CUES = 26
    CLEAR = 10  # cues 0 to 9 are clear
    DIALECTS = 4
    FIRST_CUE = 16  # tokens: 0..15 numbers, 16..41 cues, 42 the marker NONE, 43..46 dialects
    NONE = 42
    vocab_size = 47

    EXAMPLES = 4  # in a training sequence
    SHOWN = 0.05  # probability that the marker shows the dialect
    SAME = 0.25  # probability that all examples share cue and dialect

    name = "skills"
    guess = math.log(16)
    preset_sizes: ClassVar = {"n_experts": 15, "top_k": 3, "d_shared": 64}  # the default, 1 shared
    preset_hint = "--n-experts 6 --top-k 2 --d-expert 144 --d-shared 144"
    next_commands: ClassVar = {
        "python eval.py remix": "re-mixing beside all that it is compared with (minutes)",
        "python train_toy.py --seeds 3 --twin": "how much is luck? beside it, the dense twin",
        "python train_toy.py --data tinystories": "stories; --data-file PATH: a text of your own",
    }

    @annotated
    def __init__(self, seed: int = 0):
        self.seed = seed
        rng = np.random.default_rng([seed, 0])

        # Draw the skills: one for each clear cue, two for each ambiguous cue, and which of the two
        # (0 or 1) each dialect means.
        ambiguous = range(self.CLEAR, self.CUES)
        clear_skill = rng.permutation(len(SKILLS))  # (10,)
        two_skills = {cue: rng.permutation(len(SKILLS))[:2] for cue in ambiguous}
        meant = {cue: rng.permutation([0, 0, 1, 1]) for cue in ambiguous}

        # Apply each skill to all operands.
        a, b = np.meshgrid(np.arange(self.N), np.arange(self.N), indexing="ij")
        results = [skill(a, b) for skill in SKILLS.values()]  # (16, 16) each

        # Note for each cue and dialect the skill, its answers, and those of the cue's other skill.
        self.meaning = np.zeros((self.CUES, self.DIALECTS), dtype=int)
        self.answer = np.zeros((self.CUES, self.DIALECTS, self.N, self.N), dtype=int)
        self.other = np.zeros_like(self.answer)
        for cue in range(self.CUES):
            for dialect in range(self.DIALECTS):
                if cue < self.CLEAR:
                    skill = other = clear_skill[cue]
                else:
                    which = meant[cue][dialect]
                    skill = two_skills[cue][which]
                    other = two_skills[cue][1 - which]
                self.meaning[cue, dialect] = skill
                self.answer[cue, dialect] = results[skill]
                self.other[cue, dialect] = results[other]

        # Deal the cells out: 50, 25, 10 and 15 %. Sorted, they stand cue by cue.
        n_cells = self.CUES * self.N**2
        bounds = np.cumsum([n_cells // 2, n_cells // 4, round(0.1 * n_cells)])
        dealt = np.split(rng.permutation(n_cells), bounds)
        self.cells = {}
        for split, cells in zip(self.splits, dealt, strict=True):
            self.cells[split] = np.sort(cells)

        # Draw the one dialect in which dev and test ask a cell.
        self.dialect = rng.integers(self.DIALECTS, size=n_cells)

        # Find where the training cells of each cue start, and where the last ones end.
        first_cells = self.N**2 * np.arange(self.CUES + 1)
        self.start = np.searchsorted(self.cells["train"], first_cells)  # (27,)
        self.content = {"task": digest(*dealt, self.answer, self.dialect)[:16]}

    def batch(self, step: int, n: int):
        """n training sequences of four solved examples: tokens and targets (n, 20)."""
        rng = self.random(step, n)
        shape = (n, self.EXAMPLES)

        # Draw cues and dialects; in some sequences all are those of the first example.
        cue = rng.integers(self.CUES, size=shape)
        dialect = rng.integers(self.DIALECTS, size=shape)
        same = rng.random(n) < self.SAME
        cue[same] = cue[same, :1]
        dialect[same] = dialect[same, :1]

        # Draw one of the cue's training cells.
        start = self.start[cue]
        count = self.start[cue + 1] - start
        place = start + (rng.random(shape) * count).astype(int)
        _, a, b = self.unravel(self.cells["train"][place])

        # Show the dialect in some examples.
        shown = rng.random(shape) < self.SHOWN
        marker = np.where(shown, self.NONE + 1 + dialect, self.NONE)

        # Only the answer is a target: it follows the cue.
        y = self.answer[cue, dialect, a, b]
        tokens = np.stack([marker, a, b, self.FIRST_CUE + cue, y], axis=-1)  # (n, 4, 5)
        targets = np.full_like(tokens, IGNORE)
        targets[..., 3] = y
        tokens = torch.from_numpy(tokens.reshape(n, -1))  # (n, 4, 5) -> (n, 20)
        targets = torch.from_numpy(targets.reshape(n, -1))
        return tokens, targets

    def prompts(self, split: str) -> Prompts:
        """A split's prompts: dev and test ask a cell in one dialect, the others in all four."""
        split = one_of("split", split, self.splits)
        cells = self.cells[split]
        dialect = self.dialect[cells]
        if split in ("train", "reference"):
            dialect = np.tile(np.arange(self.DIALECTS), len(cells))
            cells = np.repeat(cells, self.DIALECTS)
        cue, a, b = self.unravel(cells)
        columns = (
            np.stack([self.NONE + 1 + dialect, a, b, self.FIRST_CUE + cue], axis=1),  # (n, 4)
            self.answer[cue, dialect, a, b],
            self.other[cue, dialect, a, b],
            cue,
            self.meaning[cue, dialect],
            cue < self.CLEAR,
        )
        return Prompts(*map(torch.from_numpy, columns))

    def unravel(self, cells):
        """Cell numbers -> cue, a, b."""
        return np.unravel_index(cells, (self.CUES, self.N, self.N))

    def score(self, model, split: str, most: int | None = 256) -> dict[str, float]:
        """Nats per answer, and the share of right answers, on all prompts of a split."""
        prompts = self.prompts(split)
        nats = balance = 0.0
        right = []
        for _, labels, out in passes(model, prompts.tokens, prompts.labels):
            logits = out.logits[:, -1]  # (n, 4, V) -> (n, V)
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            balance += len(labels) * float(out.balance_loss)
            right.append((logits.argmax(-1) == labels).cpu())
        right = torch.cat(right).float()  # (n,)
        scores = {
            "loss": nats / len(right),
            "accuracy": right.mean().item(),
            "clear": right[prompts.clear].mean().item(),
            "ambiguous": right[~prompts.clear].mean().item(),
        }
        if model.routers():
            scores["balance_loss"] = balance / len(right)
        return scores

    def kinds(self, split: str, n_kinds: int = 12, most: int | None = 256) -> Kinds:
        """The skills, at the cue, where the work is done; other tokens are of no kind."""
        prompts = self.prompts(split)
        kind = torch.full_like(prompts.tokens, -1)
        kind[:, -1] = prompts.skill
        return Kinds(prompts.tokens, kind, list(SKILLS))

    def problems(self, split: str) -> Problems:
        """The prompts of a split."""
        prompts = self.prompts(split)
        lengths = torch.full_like(prompts.labels, 4)
        return Problems(prompts.tokens, lengths, prompts.labels, about=prompts)

    def words(self, tokens) -> str:
        """Such as "dialect 2, cue 24 of 3 and 12"; of other lengths the numbers of the tokens."""
        if len(tokens) != 4:
            return super().words(tokens)
        marker, a, b, cue = map(int, tokens)
        dialect = "no dialect" if marker == self.NONE else f"dialect {marker - self.NONE - 1}"
        return f"{dialect}, cue {cue - self.FIRST_CUE} of {a} and {b}"

    def corpus(self):
        """The examples of 40 training batches, without their answers."""
        sequences = torch.cat([self.batch(step, 64)[0] for step in range(40)])
        examples = sequences.view(-1, 5)[:, :4]  # (n, 20) -> (4n, 4)
        return examples, torch.full_like(examples[:, 0], 4)


# ------------------------------------------------------------------------------------ compositions


class CompositionTask(Task):
    """Compositions: a prompt [f, g, x] has the answer y = g(f(x)), with x and y from 0 to 15.

    There are 16 functions f and 16 functions g, permutations of the numbers, drawn by the seed; the
    first of each is the identity. Half of the training examples are single steps, (f, identity) or
    (identity, g), so that every function is known alone. The other half are pairs of two real
    functions. Of these pairs 70 % are trained. The others are never seen together: reference, dev
    and test share them. Who answers unseen pairs composes; pairs learnt by heart do not help there.

    n_functions: on each side. n_in_a_row: 3 for h(g(f(x))), and so on; a "pair" is then a triple.
    trained: the share of the pairs that is trained. ValueError where no pair would be left unseen.

    >>> {split: len(CompositionTask(0).problems(split).labels) for split in CompositionTask.splits}
    {'train': 2528, 'reference': 256, 'dev': 256, 'test': 560}
    """

    N = 16  # numbers, tokens 0 to 15; behind them the first functions, then the second ones

    name = "composition"
    guess = math.log(N)
    settings: ClassVar = {"n_layers": 1, "context": 16, "n_experts": 16, "top_k": 2}
    settings |= {"d_expert": 32, "d_shared": 32, "batch": 256, "steps": 2500, "eval_every": 250}
    settings |= {"weight_decay": 1.0, "taste": False}
    next_commands: ClassVar = {
        "python eval.py routing": "which expert serves which function",
        "python -m lab.composing.composition table": "what was found with many seeds",
    }

    @annotated
    def __init__(
        self,
        seed: int = 0,
        n_functions: int = 16,
        n_in_a_row: int = 2,
        trained: float = 0.7,
    ):
        self.seed, self.n_functions, self.n_in_a_row = seed, n_functions, n_in_a_row
        require(n_functions >= 2, f"n_functions is {n_functions}; at least 2, one is the identity")
        require(n_in_a_row >= 1, f"n_in_a_row is {n_in_a_row}; expected 1 or more")
        self.vocab_size = self.N + n_in_a_row * n_functions
        rng = np.random.default_rng([seed, 3])

        # Draw the functions of each step, as tables of what becomes of x.
        shape = (n_in_a_row, n_functions, self.N)
        self.functions = rng.permuted(np.broadcast_to(np.arange(self.N), shape), axis=-1)
        self.functions[:, 0] = np.arange(self.N)  # the identity

        # Deal out the pairs of real functions: the trained ones, then a half of the rest is test.
        real = np.indices((n_functions - 1,) * n_in_a_row) + 1
        pairs = rng.permutation(real.reshape(n_in_a_row, -1).T)  # (pairs, n_in_a_row)
        n_trained = round(trained * len(pairs))
        quarter = (len(pairs) - n_trained) // 4
        fault = f"trained is {trained}: of {len(pairs)} pairs it leaves {len(pairs) - n_trained}"
        require(n_trained >= 1 and quarter >= 1, f"{fault} unseen, and trains {n_trained}")
        bounds = np.cumsum([n_trained, quarter, quarter])
        self.pairs = dict(zip(self.splits, np.split(pairs, bounds), strict=True))
        self.content = {"task": digest(self.functions, pairs, str(bounds))[:16]}

    def solved(self, functions, x):
        """Prompts (n, T) of functions (n, n_in_a_row) and numbers x (n,), and answers (n,)."""
        y = x
        for step in range(self.n_in_a_row):
            y = self.functions[step, functions[:, step], y]
        first_token = self.N + self.n_functions * np.arange(self.n_in_a_row)
        tokens = np.concatenate([first_token + functions, x[:, None]], axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(y)

    def batch(self, step: int, n: int):
        """n training examples: tokens and targets (n, T). Only the answer is a target."""
        rng = self.random(step, n)
        pairs = self.pairs["train"]
        functions = pairs[rng.integers(len(pairs), size=n)]  # (n, n_in_a_row)

        # In half of the examples all functions but one are the identity.
        place = rng.integers(self.n_in_a_row, size=n)
        alone = np.zeros_like(functions)
        alone[np.arange(n), place] = rng.integers(1, self.n_functions, size=n)
        single = rng.random(n) < 0.5
        functions = np.where(single[:, None], alone, functions)

        tokens, answers = self.solved(functions, rng.integers(self.N, size=n))
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = answers
        return tokens, targets

    def all_numbers(self, functions):
        """The prompts and answers of functions (n, n_in_a_row) with each of the 16 numbers."""
        return self.solved(
            np.repeat(functions, self.N, axis=0),
            np.tile(np.arange(self.N), len(functions)),
        )

    def score(self, model, split: str, most: int | None = 256) -> dict[str, float]:
        """Nats per answer and the share of right answers on a split's pairs, all numbers; beside
        them the share on trained pairs (at most 256 of them) and on single steps."""
        single = []
        for step in range(self.n_in_a_row):
            alone = np.zeros((self.n_functions - 1, self.n_in_a_row), dtype=int)
            alone[:, step] = np.arange(1, self.n_functions)
            single.append(alone)
        nats, right, balance = self.answered(model, self.pairs[one_of("split", split, self.pairs)])
        scores = {"loss": nats, "accuracy": right}
        scores["trained_pairs"] = self.answered(model, self.pairs["train"][:256])[1]
        scores["single_steps"] = self.answered(model, np.concatenate(single))[1]
        if model.routers():
            scores["balance_loss"] = balance
        return scores

    def answered(self, model, functions):
        """Mean nats, the share of right answers, the balance loss; functions (n, n_in_a_row)."""
        tokens, labels = self.all_numbers(functions)
        nats = right = balance = 0.0
        for _, answers, out in passes(model, tokens, labels):
            logits = out.logits[:, -1]  # (n, T, V) -> (n, V)
            nats += F.cross_entropy(logits, answers, reduction="sum").item()
            right += int((logits.argmax(-1) == answers).sum())
            balance += len(answers) * float(out.balance_loss)
        return nats / len(labels), right / len(labels), balance / len(labels)

    def kinds(self, split: str, n_kinds: int = 12, most: int | None = 256) -> Kinds:
        """The first functions, at the number, where the work is done; other tokens: of no kind."""
        tokens, _ = self.all_numbers(self.pairs[one_of("split", split, self.pairs)])
        kind = torch.full_like(tokens, -1)
        kind[:, -1] = tokens[:, 0] - self.N - 1
        return Kinds(tokens, kind, [f"f{i}" for i in range(1, self.n_functions)])

    def problems(self, split: str) -> Problems:
        """The pairs of a split with all numbers."""
        tokens, labels = self.all_numbers(self.pairs[one_of("split", split, self.pairs)])
        return Problems(tokens, torch.full_like(labels, tokens.shape[1]), labels)


# ------------------------------------------------------------------------------------------- text


class TextData(Task):
    """A text as a long row of tokens for each split, from which batches are windows.

    path, valid_path: UTF-8 texts, each document ended by a line END. The second is held back, or
    else the last tenth of the documents. Of these the first 500 (the first fifth of fewer than
    2,500) are dev, for every choice, the others test. Where documents are too few or too short for
    that, such as in a book, it is done by place. What stands in the training text as well, or in
    dev, is held out no more. ValueError for a bad or too short text.
    """

    name = "text"
    settings: ClassVar = {"d_model": 128, "context": 128, "batch": 8, "steps": 2500, "lr": 6e-3}
    settings |= {"warmup": 100, "eval_every": 250, "taste": False}
    # What was best on dev, see docs/cartesian.md.
    settings |= {"tied": True, "embedding_scale": 11.3, "residual_init": 0.05, "norm_topk": True}
    remix_settings: ClassVar = {"embedding": "tfidf", "loss": "options"}
    preset_sizes: ClassVar = {"vocab_size": 2048, "n_experts": 8, "top_k": 2}
    preset_sizes |= {"d_expert": 64, "d_shared": 64}
    next_commands: ClassVar = {
        "python eval.py sample": "let it tell a story",
        "python eval.py routing": "which expert does what",
    }

    @annotated
    def __init__(
        self,
        path: str | Path,
        valid_path: str | Path | None = None,
        tokenizer_name: str = "tinystories",
        context: int = 128,
        seed: int = 0,
        cache: str | Path = "out/tokens",
    ):
        self.encoding = tokenizer(tokenizer_name)
        self.vocab_size = self.encoding.n_vocab
        self.guess = math.log(self.vocab_size)
        require(context >= 1, f"context is {context}; it must be at least 1")
        require(seed >= 0, f"seed is {seed}; it must be at least 0")
        self.context = context
        self.seed = seed

        # The bytes of each token, 0 for END. Bits per byte are the summed loss in nats / ln 2 / the
        # bytes of the targets.
        self.token_bytes = torch.zeros(self.vocab_size, dtype=torch.long)  # (V,)
        for text in self.encoding.token_byte_values():
            self.token_bytes[self.encoding.encode_single_token(text)] = len(text)

        # Tokenise; hold something back, and divide that.
        self.by_place = set()  # texts whose documents are too few, or too short, to be dealt out
        train, checksum = read_tokens(path, self.encoding, cache)
        held_out = valid_path or path
        if valid_path:
            held_back, valid_checksum = read_tokens(valid_path, self.encoding, cache)
            checksum += valid_checksum
        else:
            n = len(self.starts(train))
            train, held_back = self.cut(train, min(n * 9 // 10, n - 3), 0.9, path)
        n = len(self.starts(held_back))
        dev, test = self.cut(held_back, min(500, (n + 3) // 5), 0.2, held_out)

        # What stands in another split as well is not held out.
        dev = self.without_repeated(dev, "dev", [train])
        test = self.without_repeated(test, "test", [train, dev])
        self.rows = {"train": train, "dev": dev, "test": test}  # (tokens,) each, memory-mapped
        for split, row in self.rows.items():
            source = path if split == "train" else held_out
            hint = f"a context of {context} needs {context + 1}: give a longer text"
            require(len(row) > context, f"{split}, from {source}, has {len(row)} tokens; {hint}")
        sizes = [len(row) for row in self.rows.values()]
        text = digest(f"{checksum} {sizes}")[:16]
        self.content = {"tokenizer": identify(self.encoding), "text": text}

    def cut(self, row, n_documents: int, share: float, source: str):
        """A row in two: behind so many documents, or else, of a book, behind a share of the tokens.

        A half is always longer than the context. The second of the first cut has room for two.
        """
        place = self.starts(row)[max(0, n_documents)]
        least = 2 * self.context + 1 if share > 0.5 else self.context
        if place <= self.context or len(row) - place <= least:
            place = int(share * len(row))
            if source not in self.by_place:
                note(f"{source} is split by place: its documents are too few, or too short")
            self.by_place.add(source)
        return np.split(row, [place])

    def starts(self, row):
        """Where each document of tokens (many,) starts, and where the last one ends."""
        starts = [np.array([0])]
        step = 2**24  # the whole row at once would fill the memory
        for i in range(0, len(row), step):
            ends = np.flatnonzero(row[i : i + step] == self.encoding.eot_token)
            starts.append(i + 1 + ends)
        return np.concatenate(starts)

    def documents(self, split: str) -> list[np.ndarray]:
        """The documents of a split in order, tokens (many,) that end with END."""
        row = self.rows[one_of("split", split, self.rows)]
        return np.split(np.asarray(row), self.starts(row)[1:])[:-1]  # nothing, or no whole one

    def without_repeated(self, row, split: str, others: list):
        """A row without those of its documents that also stand in other rows."""
        starts = self.starts(row)
        keys = document_keys(row, starts)
        repeated = np.zeros(len(keys), bool)
        for other in others:
            other_starts = self.starts(other)
            alike = np.flatnonzero(np.isin(document_keys(other, other_starts), keys))
            texts = {other[other_starts[i] : other_starts[i + 1]].tobytes() for i in alike}
            for i, start in enumerate(starts[:-1]):
                repeated[i] |= row[start : starts[i + 1]].tobytes() in texts
        if not repeated.any():
            return row
        note(f"{repeated.sum()} of {len(keys)} documents of {split} are not held out: left out")
        documents = np.split(row, starts[1:])
        kept = [document for document, skip in zip(documents, repeated, strict=False) if not skip]
        return np.concatenate([row[:0], *kept, documents[-1]])

    def batch(self, step: int, n: int):
        """n windows of the training text: tokens (n, T), and the tokens that follow (n, T)."""
        rng = self.random(step, n)
        starts = rng.integers(len(self.rows["train"]) - self.context, size=n)
        return self.windows("train", starts)

    def held_out(self, split: str, most: int | None = 256):
        """Windows that do not overlap, evenly spread over a split; None: all that fit."""
        split = one_of("split", split, self.rows)
        last = len(self.rows[split]) - self.context - 1  # the last place where a window may start
        n = last // self.context + 1
        if most:
            n = min(n, most)
        return self.windows(split, np.arange(n) * last // max(n - 1, 1))

    def windows(self, split: str, starts):
        """The windows at starts (n,): tokens (n, T), and the tokens that follow (n, T)."""
        places = starts[:, None] + np.arange(self.context + 1)  # (n, T + 1)
        rows = torch.from_numpy(self.rows[split][places].astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def score(self, model, split: str, most: int | None = 256) -> dict[str, float]:
        """Nats and perplexity per token, and bits per byte, on windows of a split."""
        nats = balance = 0.0
        n_tokens = n_bytes = 0
        for _, targets, out in passes(model, *self.held_out(split, most)):
            logits = out.logits.flatten(0, 1)  # (n, T, V) -> (n*T, V)
            nats += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
            balance += targets.numel() * float(out.balance_loss)
            n_tokens += targets.numel()
            n_bytes += int(self.token_bytes[targets.cpu()].sum())
        loss = nats / n_tokens
        bits = nats / math.log(2)
        scores = {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits / n_bytes}
        if model.routers():
            scores["balance_loss"] = balance / n_tokens
        return scores

    def kinds(self, split: str, n_kinds: int = 12, most: int | None = 256) -> Kinds:
        """The most frequent tokens; others are of no kind."""
        tokens, _ = self.held_out(split, most)
        frequent = tokens.flatten().bincount().argsort(descending=True)[:n_kinds]
        kind = torch.full_like(tokens, -1)
        for place, token in enumerate(frequent):
            kind[tokens == token] = place
        names = [repr(self.encoding.decode([token])) for token in frequent.tolist()]
        return Kinds(tokens, kind, names)

    def problems(self, split: str) -> Problems:
        """Cloze questions: which of four words ends the story? Each is one token; chance is 25 %.

        The wrong words end other stories of the split, drawn at random: what ends stories often is
        often wrong, too, so that frequency does not tell the answer. "reference" has the stories
        of the training text. Where not four words end stories, there are no questions. A story
        longer than the context loses its beginning, and it is said of how many.
        """
        starting, continuing = self.word_tokens()
        prompts, words, n_cut = [], [], 0
        for story in self.documents("train" if split == "reference" else split):
            place = last_word(story, starting, continuing)
            if place > 0:
                prompt = [self.encoding.eot_token, *story[:place].tolist()]
                prompts.append(torch.tensor(prompt[-self.context :]))
                words.append(int(story[place]))
                n_cut += len(prompt) > self.context
        if n_cut:
            what = f"{n_cut:,} of {len(words):,} stories of {split} are longer than the context"
            note(f"{what}, {self.context}: their beginning is cut")
        if len(set(words)) < 4:
            none = torch.zeros(0, dtype=torch.long)
            return Problems(none[:, None], none, none, none[:, None])

        # Draw three other words for each story, and shuffle the four.
        rng = np.random.default_rng([0, 2])
        options = []
        for word in words:
            choices = [word]
            while len(choices) < 4:
                other = words[rng.integers(len(words))]
                if other not in choices:
                    choices.append(other)
            options.append([choices[i] for i in rng.permutation(4)])

        # Count the last three tokens of training stories: among them is the last word.
        row = self.rows["train"]
        ends = self.starts(row)[1:] - 1  # where END stands
        places = np.maximum(ends[:, None] - [1, 2, 3], 0)
        frequency = np.bincount(row[places].flatten(), minlength=self.vocab_size)
        return Problems(
            torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
            torch.tensor([len(prompt) for prompt in prompts]),
            torch.tensor(words),
            torch.tensor(options),
            frequency=torch.from_numpy(frequency),
        )

    def word_tokens(self) -> tuple[set[int], set[int]]:
        """The tokens that are a blank and a word, and those that continue a word."""
        starting, continuing = set(), set()
        for token in self.token_bytes.nonzero()[:, 0].tolist():
            text = self.encoding.decode_single_token_bytes(token)
            if text[:1] == b" " and text[1:].isalpha():
                starting.add(token)
            elif text[:1].isalpha() or text[:1] > b"\x7f":
                continuing.add(token)
        return starting, continuing

    def words(self, tokens) -> str:
        """The text of tokens, in one line; END is nothing."""
        text = self.encoding.decode([int(t) for t in tokens if t != self.encoding.eot_token])
        return " ".join(text.split())

    def sample(self, model) -> str:
        """Three texts from nothing but the end of another text, at temperature 0.6."""
        end = self.encoding.eot_token
        device = next(model.parameters()).device
        start = torch.full((3, 1), end, device=device)
        generator = torch.Generator(device).manual_seed(0)
        room = model.config.context - 1
        rows = model.generate(start, room, 0.6, end, generator=generator).tolist()
        texts = []
        for row in rows:
            text = self.encoding.decode([token for token in row if token != end])
            texts.append(textwrap.fill(" ".join(text.split()), 110))
        return "\n\n".join(texts)


def document_keys(row, starts):
    """A number for each document, the same for equal ones: of its length and of 16 tokens."""
    lengths = np.diff(starts)
    keys = lengths.astype(np.uint64)
    for i in range(16):
        tokens = row[starts[:-1] + lengths * i // 16].astype(np.uint64)
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + tokens
    return keys


def last_word(story, starting: set[int], continuing: set[int]) -> int:
    """The place of a story's last word; 0 where it is not a single token."""
    for place in range(len(story) - 2, 0, -1):  # the last token is END
        token = int(story[place])
        if token in starting:
            return place
        if token in continuing:
            break
    return 0


TASKS = {
    "skills": SkillsTask,
    "composition": CompositionTask,
    "tinystories": TextData,
    "text": TextData,
}


def load_task(train: dict, context: int) -> Task:
    """The task that a run with these settings (fields of TrainConfig) learns.

    ValueError where it is not what the run was made of, by `content`.
    """
    require_form(train, {"data": str, "seed": int}, "the settings of this run")
    if train["data"] == "skills":
        task = SkillsTask(train["seed"])
    elif train["data"] == "composition":
        names = ("n_functions", "n_in_a_row", "trained")
        task = CompositionTask(train["seed"], *(train[name] for name in names))
    else:
        paths = at_hand(train["data_file"]), at_hand(train["valid_file"])
        if train["data"] == "tinystories":
            paths = tinystories()
        task = TextData(*paths, at_hand(train["tokenizer"]), context, train["seed"])
    if "content" in train:
        require_same(task, train["content"])
    return task


def at_hand(path: str | None) -> str | None:
    """A file where a run says that it is, or else its namesake in the current folder, if any."""
    if path and not Path(path).exists() and Path(Path(path).name).is_file():
        return Path(path).name
    return path


def require_same(task: Task, content: dict):
    """ValueError unless a task is made of what a run remembers."""
    if not content:
        note("this run is of an earlier version, which kept no checksum: its text may have changed")
    for name, checksum in task.content.items():
        before = content.get(name, checksum)
        fault = f"the {name} is not the one of this run: {checksum} now, {before} then"
        require(before == checksum, f"{fault}; give back what was changed, or train anew")
