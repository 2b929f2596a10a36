"""References: prompts whose answers are known, and the pathways that a model takes for them.

    references = ReferenceSet.build(model, prompts, labels)
    references.save(path)
    references = ReferenceSet.load(path, model)

Letters in the shape comments:  m references    T tokens    E experts    R rows    O options
"""

import inspect
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lab.tools import processes
from lab.tools.checks import (
    annotated,
    as_integers,
    progress,
    require,
    require_shape,
    torch_defaults,
)
from lab.tools.files import digest, read_tensors, write_tensors
from moe import named_tensors, unwrapped
from pathways.checks import as_floats, require_labels, require_one_length, require_references
from pathways.prompts import best_token, by_length, padded, trimmed
from pathways.tail import Prefix, Tail, frozen, joined_prefix

KEEP_SECONDS = 120  # between two copies of what has been read so far
OURS = ("torch", "moe", "cartesian", "lab")  # modules whose classes follow from a model's config


@dataclass
class ReferenceSet:
    """m prompts with labels, whether the model answers them right, and the pathways it takes."""

    tokens: torch.Tensor  # (m, T), padded on the right
    lengths: torch.Tensor  # (m,)
    labels: torch.Tensor  # (m,) the token that should follow
    correct: torch.Tensor  # (m,) bool
    pathways: torch.Tensor  # (m, 1, routers, E); with token "all" (m, T, routers, E)
    model: str  # fingerprint of the model that took them
    token: str = "last"  # the token whose pathways these are
    options: torch.Tensor | None = None  # (m, O) tokens among which to choose; None: all
    corpus: torch.Tensor | None = None  # (c, T) prompts that tell tf-idf how rare a token is
    corpus_lengths: torch.Tensor | None = None  # (c,)
    embeddings: torch.Tensor | None = None  # (m, X) of your own
    kept: "Prefixes | None" = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    @annotated
    @torch_defaults()
    @torch.no_grad()
    def build(
        cls,
        model,
        prompts: Iterable,
        labels,
        options=None,
        corpus: Iterable | None = None,
        embeddings=None,
        token: str = "last",
        keep_in: Path | None = None,
    ) -> "ReferenceSet":
        """Run a model over reference prompts, a tensor (m, T) or lists, with labels (m,).

        keep_in: a file that keeps what has been read so far, so that another call goes on there.
        ValueError: no references, labels outside the vocabulary or the options, a model without
        routers, prompts of several lengths with token "all".
        """
        model = unwrapped(model)
        tail = Tail(model, token=token)
        vocab_size = model.config.vocab_size
        tokens, lengths = padded(prompts, vocab_size)
        labels = as_integers("labels", labels)
        if options is not None:
            options = as_integers("options", options)
        if embeddings is not None:
            embeddings = as_floats("embeddings", embeddings)
            require_shape("embeddings", embeddings, (len(tokens), None))
        require_labels(labels, options, len(tokens), vocab_size)
        require_one_length(token, lengths, int(lengths[0]))
        corpus_tokens, corpus_lengths = None, None
        if corpus is not None:
            corpus_tokens, corpus_lengths = padded(corpus, vocab_size)

        # The model's own pathways and answers.
        with frozen(model):
            pathways, answers = read_all(tail, tokens, lengths, options, keep_in)
        pathways = pathways.unflatten(1, (-1, len(tail.routers)))  # (m, 1 or T, routers, E)
        return cls(
            tokens,
            lengths,
            labels,
            answers == labels,
            pathways,
            fingerprint(model),
            tail.token,
            options,
            corpus_tokens,
            corpus_lengths,
            embeddings,
        )

    def some(self, rows) -> "ReferenceSet":
        """Some of the references, by their places."""
        changes = {}
        for name in ("tokens", "lengths", "labels", "correct", "pathways", "options", "embeddings"):
            value = getattr(self, name)
            changes[name] = None if value is None else value[rows]
        return replace(self, **changes)

    def prefixes(self, tail: Tail, max_memory: float = 512.0) -> "Prefixes":
        """The prefixes of these references for a tail, kept up to so many MB for the next call."""
        kept = self.kept
        if kept is None or not kept.serves(tail):
            kept = Prefixes(tail, self.tokens, self.lengths)
            self.kept = kept
        kept.max_bytes = max_memory * 1e6
        return kept

    @annotated
    def save(self, path: str | Path):
        """Write a safetensors file, whole or not at all. Prefixes are not saved: they are large."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        write_tensors(Path(path), tensors, {"model": self.model, "token": self.token})

    @classmethod
    @annotated
    @torch_defaults()
    def load(cls, path: str | Path, model) -> "ReferenceSet":
        """ValueError for a file that is missing, is no reference set, or is of another model."""
        tensors, about = read_tensors(Path(path), "reference set")
        try:
            references = cls(**tensors, **about)
        except TypeError as error:
            mend = "ReferenceSet.save makes one"
            raise ValueError(f"{path} is not a reference set ({error}); {mend}") from None
        references.require_model(model, path)
        require_references(references, unwrapped(model), path)
        return references

    def require_model(self, model, name="the reference set"):
        """ValueError unless the pathways are this model's."""
        require(
            self.model == fingerprint(model),
            f"{name} was made by another model: the weights differ; build it anew",
        )


def read_all(tail: Tail, tokens, lengths, options=None, keep_in: Path | None = None):
    """What a model does with prompts (n, T): its pathways (n, R, E) and answers (n,), on the CPU.

    keep_in: a file that keeps what has been read, every few minutes. With the same model and
    prompts another call goes on from there.
    """
    # What has been read before stands first in the order of reading.
    about = {}
    pathways, answers = [], []
    if keep_in is not None:
        shape = f"{tail.token} {tuple(tokens.shape)}"
        values = [tokens, lengths] if options is None else [tokens, lengths, options]
        about = {"of": digest(fingerprint(tail.model), shape, *values)}
        if keep_in.exists():
            pathways, answers = kept_part(keep_in, about)
    order = list(by_length(lengths))
    n_done = sum(map(len, answers))
    done = int(lengths[torch.cat(order)[:n_done]].sum())

    # Read the others, a portion at a time.
    ends = torch.tensor([len(rows) for rows in order]).cumsum(0)
    left = [rows for rows, end in zip(order, ends, strict=True) if end > n_done]
    sizes = {"total": int(lengths.sum()), "initial": done, "unit": "token", "unit_scale": True}
    saved = time.monotonic()
    with progress(None, "references", **sizes) as bar:
        for pieces, rows in processes.rounds(left):
            found = ([], [])
            if rows is not None:
                own, logits = tail.read(*trimmed(tokens, lengths, rows))
                chosen = best_token(logits, None if options is None else options[rows])
                found = ([own.cpu()], [chosen.cpu()])
            for theirs in processes.gathered(found):
                pathways += theirs[0]
                answers += theirs[1]
            bar.update(sum(int(lengths[piece].sum()) for piece in pieces))
            due = time.monotonic() - saved > KEEP_SECONDS and processes.rank() == 0
            if keep_in is not None and due:
                kept = {"pathways": torch.cat(pathways), "answers": torch.cat(answers)}
                write_tensors(keep_in, kept, about)
                saved = time.monotonic()

    # Back to the order in which they were given.
    back = torch.cat(order).argsort()
    return torch.cat(pathways)[back], torch.cat(answers)[back]


def kept_part(path: Path, about: dict):
    """The pathways and answers that a file keeps; none where it is damaged, or about others."""
    try:
        tensors, of = read_tensors(path)
    except ValueError:
        return [], []
    fits = of == about and tensors.keys() == {"pathways", "answers"}
    return ([tensors["pathways"]], [tensors["answers"]]) if fits else ([], [])


class Prefixes:
    """The prefixes of references: made on demand, and kept up to max_bytes.

    Where the room is not enough, the least recently used are given up first.
    """

    def __init__(self, tail: Tail, tokens, lengths, max_bytes: float = 512e6):
        self.tail = tail
        self.tokens = tokens
        self.lengths = lengths
        self.max_bytes = max_bytes
        self.kept = OrderedDict()  # index of a reference -> its five tensors, without padding
        self.size = 0  # bytes

    def serves(self, tail: Tail) -> bool:
        """Whether these are the prefixes that a tail needs."""
        ours = self.tail
        same_cut = (ours.first, ours.token) == (tail.first, tail.token)
        return ours.model is tail.model and same_cut

    def __call__(self, index) -> Prefix:
        """The prefixes of some references (M,), as a batch."""
        index = index.tolist()
        needed = {i: self.kept[i] for i in index if i in self.kept}
        needed |= self.make(sorted(set(index) - needed.keys()))

        # The newest stand last; the oldest go where the room is not enough.
        for i, prefix in needed.items():
            self.keep(i, prefix)
        while self.size > self.max_bytes:
            _, oldest = self.kept.popitem(last=False)
            self.size -= n_bytes(oldest)

        return joined_prefix([needed[i] for i in index])

    def make(self, missing: list[int]) -> dict:
        """The prefixes of references that are not kept."""
        if not missing:
            return {}
        rows = self.tail.cut_each(*trimmed(self.tokens, self.lengths, missing))
        return {missing[place]: without_padding(row) for place, row in rows}

    def keep(self, i: int, prefix):
        """Keep a reference's prefix as the newest."""
        if i not in self.kept:
            self.size += n_bytes(prefix)
        self.kept[i] = prefix
        self.kept.move_to_end(i)


def without_padding(row) -> list[torch.Tensor]:
    """One row of a Prefix without its padding, copied: a view would keep its whole batch alive."""
    x, valid, keys, values, past = row
    P, S = int(valid.sum()), int(past.sum())
    tensors = (x[:P], valid[:P], keys[:S], values[:S], past[:S])
    return [tensor.clone() for tensor in tensors]


def n_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def fingerprint(model) -> str:
    """What tells a model from all others: a hash of its sizes, its weights, and classes of others.

    It is the same whether the model is compiled, in training, or on another device. All weights are
    read for it, and again only where they have changed.
    """
    model = unwrapped(model)
    values = [repr(model.config)]
    for module in model.modules():
        kind = type(module)
        if kind.__module__.partition(".")[0] not in OURS:
            values.append(f"{kind.__qualname__} {source_of(kind)} ")
    weights = named_tensors(model)

    # The last fingerprint, with the state that it is of, stands at the model.
    state = values + [state_of(name, weight) for name, weight in weights.items()]
    last, mark = vars(model).get("last_fingerprint", (None, None))
    if state != last:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            digests = pool.map(digest, weights.values())
        for (name, weight), content in zip(weights.items(), digests, strict=True):
            values.append(f"{name} {tuple(weight.shape)} {weight.dtype} {content} ")
        mark = digest(*values)
        model.last_fingerprint = (state, mark)
    return mark


def state_of(name: str, weight):
    """What changes with a weight: where it is, how often it was written to, some of its numbers."""
    if weight.is_inference():
        return object()  # its writes are not counted; this is like nothing else
    flat = weight.detach().flatten()
    some = flat[:: len(flat) // 16 + 1].tolist()
    return name, weight.shape, weight.dtype, weight.data_ptr(), weight._version, some


def source_of(kind: type) -> str:
    """The code of a class; nothing where it cannot be had, as from a prompt of Python."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
