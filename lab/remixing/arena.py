"""The arena: a model, the prompts that it is asked, and what every method is given besides.

All methods meet here on equal terms: the same prompts, references, neighbours, random numbers.

Where things live: prompts, references, and whatever a method returns are on the CPU. Only what
happens to a batch, between `Arena.batches` and `joined`, is on the model's device; random numbers
are drawn on the CPU, and labels go to wherever the logits are.

Letters in the shape comments, beside those of remix.py:  b prompts of a batch    O options
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Problems, Prompts, load_task
from lab.tools import runs
from lab.tools.cli import note
from moe import require
from pathways import Neighbours, ReferenceSet, Tail, best_token, find_neighbours, frozen
from pathways.checks import as_tuples
from pathways.explain import numbers
from pathways.prompts import trimmed
from remix import RemixConfig, RemixResult, critical_layers, remix

FINDING = {"k", "embedding", "kernel"}  # settings that change the neighbours


@dataclass
class Arena:
    """One model, n prompts, and what every method is given besides."""

    model: torch.nn.Module
    tokens: torch.Tensor  # (n, T)
    labels: torch.Tensor  # (n,) for accuracy, the oracle, and wrong labels
    references: ReferenceSet
    config: RemixConfig = field(default_factory=RemixConfig)
    lengths: torch.Tensor | None = None  # (n,); None: all are T
    options: torch.Tensor | None = None  # (n, O) tokens to choose from; None: all
    allowed: torch.Tensor | None = None  # (n, m) bool: who may be a neighbour
    about: Prompts | None = None  # more about prompts of the skills task
    words: Callable = numbers  # tokens -> text, see Task.words
    task: str | None = None  # what methods were tuned to; None: they take their defaults
    seed: int = 0
    prefixes: dict | None = None  # of the prompts, kept for all methods, by where they are cut
    content: dict = field(default_factory=dict)  # what the task is made of, see Task.content

    def __post_init__(self):
        if self.lengths is None:
            n, T = self.tokens.shape
            self.lengths = torch.full((n,), T)
        self.tail = self.tail_of(self.config)
        self.neighbours = self.find()

    def tail_of(self, config: RemixConfig, model=None) -> Tail:
        """What re-mixing with these settings reaches, of this model or of another one."""
        model = model or self.model
        return Tail(model, critical_layers(model, config.layers), self.references.token)

    def find(self, **changes) -> Neighbours:
        """The neighbours of all prompts, perhaps with other settings."""
        config = replace(self.config, **changes)
        prompts = self.tokens, self.lengths
        with frozen(self.model), torch.no_grad():
            return find_neighbours(self.tail, self.references, *prompts, config, self.allowed)

    @property
    def clusters(self) -> np.ndarray:
        """(n,) What prompts share: the cue of the skills task. Elsewhere each stands alone."""
        if self.about is None:
            return np.arange(len(self.labels))
        return self.about.cue.numpy()

    def accuracy(self, result: RemixResult) -> float:
        """The share of the prompts that are answered right."""
        answer = best_token(result.logits, self.options)
        return float((answer == self.labels).float().mean())

    def only(self, rows, places=None) -> "Arena":
        """An arena of some prompts only: a slice, or a mask (n,) of those that are kept.

        places: of the references that are kept; None: all."""
        changes = {"about": None}
        for name in ("tokens", "labels", "lengths", "options", "allowed"):
            value = getattr(self, name)
            changes[name] = None if value is None else value[rows]
        if places is not None:
            changes["references"] = self.references.some(places)
            if self.allowed is not None:
                changes["allowed"] = changes["allowed"][:, places]
        return replace(self, **changes)

    def cold(self) -> "Arena":
        """The same arena without kept prefixes, so that a method pays for all that it needs."""
        twin = copy.copy(self)
        twin.references = replace(self.references)
        return twin

    def random(self) -> torch.Generator:
        """The same random numbers for every method."""
        return torch.Generator().manual_seed(self.seed)

    def remix(self, neighbours=None, references=None, **changes) -> RemixResult:
        """`remix` on this arena. It finds neighbours anew only where a change concerns them."""
        config = replace(self.config, **changes)
        if neighbours is None and references is None and not FINDING & changes.keys():
            neighbours = self.neighbours
        references = references or self.references
        if neighbours is not None:  # their pathways, in the layers that are critical now
            pathways = self.tail_of(config).pathways(references)
            neighbours = neighbours._replace(pathways=pathways)
        prompts = as_tuples(self.tokens, self.lengths)
        given = {"allowed": self.allowed, "neighbours": neighbours}
        if self.prefixes is not None and config.batch == self.config.batch:
            with frozen(self.model), torch.no_grad():
                given["prefixes"] = list(self.cut(self.tail_of(config)))
        return remix(self.model, prompts, references, config, **given)

    def cut(self, tail: Tail):
        """What no pathway changes of the prompts, a batch at a time."""
        keep = self.prefixes is not None and tail.model is self.tail.model
        kept = self.prefixes.setdefault(tail.first, {}) if keep else {}
        for i, rows in enumerate(torch.arange(len(self.tokens)).split(self.config.batch)):
            prefix = kept.get(i) or tail.cut(*trimmed(self.tokens, self.lengths, rows))
            if keep:
                kept[i] = prefix
            yield prefix

    def batches(self, tail: Tail):
        """A few prompts at a time: their places (b,), what no pathway changes of them, and the
        model's own pathways (b, R, E) and logits (b, V)."""
        batches = torch.arange(len(self.tokens)).split(self.config.batch)
        for rows, prefix in zip(batches, self.cut(tail), strict=True):
            pathway, logits = tail.own(prefix)
            yield rows, prefix, pathway, logits


def joined(batches) -> RemixResult:
    """Batches of (pathway before, pathway, logits before, logits) as one result, on the CPU."""
    columns = [torch.cat(column).cpu() for column in zip(*batches, strict=True)]
    no_losses = torch.zeros(len(columns[0]), 0)
    return RemixResult(*columns, no_losses, None)


def own_answers(arena: Arena, model=None) -> RemixResult:
    """What the arena's model, or another one, answers by itself; nothing is re-mixed."""
    model = model or arena.model
    tail = arena.tail_of(arena.config, model)
    batches = []
    with frozen(model), torch.no_grad():
        for _, _, pathway, logits in arena.batches(tail):
            batches.append((pathway, pathway, logits, logits))
    return joined(batches)


class Outcome(NamedTuple):
    """How a method did on the n prompts of one run."""

    answer: np.ndarray  # (n,) the token that it chose
    right: np.ndarray  # (n,) bool
    changed: np.ndarray  # (n,) bool: some layer chose other experts than before
    seconds: float  # of processor time for all prompts, with all that no earlier method has kept


def judged(arena: Arena, method: Callable, target=None) -> Outcome:
    """Let a method (arena) -> RemixResult answer. target (n,): what is right, if not the labels.

    It shares no work with others, unless the arena keeps the prompts' prefixes for all."""
    if arena.prefixes is None:
        arena = arena.cold()
    start = time.process_time()
    result = method(arena)
    seconds = time.process_time() - start

    answer = best_token(result.logits, arena.options)
    right = answer == (arena.labels if target is None else target)

    # The k experts that each row chooses, before and after: (n, R, K).
    k = arena.model.config.top_k
    before = result.pathway_before.topk(k).indices.sort().values
    after = result.pathway.topk(k).indices.sort().values
    changed = (before != after).flatten(1).any(1)  # (n, R, K) -> (n,)
    return Outcome(answer.numpy(), right.numpy(), changed.numpy(), seconds)


# -------------------------------------------------------------------------- an arena from a run


def arena_of(
    folder: Path,
    split: str,
    most=None,
    given=None,
    strict=False,
    router=None,
    references="reference",
) -> Arena:
    """The arena of a run: prompts of a split, and all problems of another one as references.

    most: so many prompts, drawn at random. given: fields of RemixConfig. strict: no reference
    shares an operand with the prompt that it is to help (skills task only). router: the class of
    the run's routers, where it is your own. ValueError: fewer than 20 prompts, or no operands."""
    # Open the run, and the problems of its task.
    model, train = runs.load_run(folder, router)
    task = load_task(train, model.config.context)
    asked, solved = task.problems(split), task.problems(references)
    n = len(asked.labels)
    require(n >= 20, f"{folder}: only {n} stories of {split} end with a word of one token")
    require(
        not strict or asked.about is not None,
        f"{folder}: only prompts of the skills task have operands",
    )

    # Draw the prompts.
    generator = torch.Generator().manual_seed(train["seed"])
    rows = torch.randperm(n, generator=generator)[:most].sort().values
    asked = selected(asked, rows)

    # Take all references that are not asked.
    keys = set(as_tuples(asked.tokens, asked.lengths))
    new = [prompt not in keys for prompt in as_tuples(solved.tokens, solved.lengths)]
    if not all(new):
        note(f"{new.count(False)} of {len(new)} references of {folder} are asked, too: left out")
        solved = selected(solved, torch.tensor(new).nonzero()[:, 0])
    return Arena(
        model,
        asked.tokens,
        asked.labels,
        references_of(model, task, solved),
        RemixConfig(**task.remix_settings | (given or {})),
        asked.lengths,
        asked.options,
        allowed=~share_operands(asked, solved) if strict else None,
        about=asked.about,
        words=task.words,
        task=task.name,
        seed=train["seed"],
        content=task.content,
    )


def selected(problems: Problems, rows) -> Problems:
    """Some of a task's problems."""
    options, about = problems.options, problems.about
    tokens, lengths = trimmed(problems.tokens, problems.lengths, rows)
    if options is not None:
        options = options[rows]
    if about is not None:
        about = Prompts(*(column[rows] for column in about))
    return Problems(tokens, lengths, problems.labels[rows], options, about)


def references_of(model, task, solved: Problems) -> ReferenceSet:
    """Solved problems of a task as references of a model."""
    corpus = task.corpus()
    if corpus is not None:
        corpus = as_tuples(*corpus)
    prompts = as_tuples(solved.tokens, solved.lengths)
    return ReferenceSet.build(model, prompts, solved.labels, solved.options, corpus)


def share_operands(asked: Problems, solved: Problems):
    """Which prompts and references (n, m) of the skills task have a number at the same place."""
    ours = asked.about.tokens[:, None, 1:3]  # (n, 1, 2): a and b
    theirs = solved.about.tokens[:, 1:3]  # (m, 2)
    return (ours == theirs).any(-1)
