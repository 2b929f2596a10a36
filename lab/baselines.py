"""What re-mixing is compared with: every row of the table in `eval.py remix` is a function here, (arena, settings) ->
RemixResult, on the same samples, references and neighbours, with the same weights and steps.

python -m lab.baselines [METHOD ...] RUN [RUN ...]    tries the settings of every method, or of those named, on dev

No row sees a label of the samples, but the oracle and its null, which say so.
"""

import copy
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Prompts, SkillsTask
from lab import checkpoint, cli
from lab.tasks import Question, cloze, load_data
from moe import Cache, Router, require
from remix import (
    Neighbours,
    Prefixes,
    ReferenceSet,
    RemixConfig,
    RemixResult,
    Tail,
    choose,
    core_experts,
    critical_layers,
    descend,
    find,
    frozen,
    nearby,
    ngd,
    padded,
    portions,
    remix,
)

PARTS = ("tokens", "labels", "lengths", "options", "allowed")  # what an Arena has of each sample


@dataclass
class Arena:
    """One model, the samples that it is asked, and what every method is given besides."""

    model: torch.nn.Module
    tokens: torch.Tensor  # (n, T)
    labels: torch.Tensor  # (n,) for accuracy, the oracle and its null
    references: ReferenceSet
    config: RemixConfig = field(default_factory=RemixConfig)
    lengths: torch.Tensor | None = None  # (n,)
    options: torch.Tensor | None = None  # (n, O) the tokens among which to choose; none: the vocabulary
    allowed: torch.Tensor | None = None  # (n, m) bool: who may be a neighbour
    about: Prompts | None = None  # what is known of the samples of the skills task
    tuned: dict[str, dict] = field(default_factory=dict)  # method -> settings
    seed: int = 0

    def __post_init__(self):
        self.lengths = torch.full((len(self.tokens),), self.tokens.shape[1]) if self.lengths is None else self.lengths
        self.tail = Tail(self.model, critical_layers(self.model, self.config.layers), self.config.token)
        self.neighbours = self.find()

    def find(self, **changes) -> Neighbours:
        """The neighbours of all samples, with other settings perhaps."""
        config = replace(self.config, **changes)
        with frozen(self.model), torch.no_grad():
            return find(self.tail, self.references, self.tokens, self.lengths, config, self.allowed)

    @property
    def clusters(self) -> np.ndarray:
        """What the samples of the skills task share: their cue; elsewhere each is its own cluster. (n,)"""
        return np.arange(len(self.labels)) if self.about is None else self.about.cue.numpy()

    def right(self, result: RemixResult) -> torch.Tensor:
        """The share of the samples that are answered right."""
        return (choose(result.logits, self.options) == self.labels).float().mean()

    def first(self, n: int) -> "Arena":
        """The same with its first n samples only."""
        rest = {name: None if getattr(self, name) is None else getattr(self, name)[:n] for name in PARTS}
        return replace(self, **rest, about=None)

    def random(self) -> torch.Generator:
        """The same numbers for every method."""
        return torch.Generator().manual_seed(self.seed)

    def remix(self, labels=None, neighbours=None, references=None, **changes) -> RemixResult:
        """`remix` on this arena: neighbours are only found anew where a change concerns them."""
        if neighbours is None and not changes.keys() & {"k", "embedding", "epsilon", "kernel", "sigma", "correct"}:
            neighbours = self.neighbours
        rows = [row[:n] for row, n in zip(self.tokens, self.lengths.tolist(), strict=True)]
        given = {"options": self.options, "allowed": self.allowed, "neighbours": neighbours, "labels": labels}
        return remix(self.model, rows, references or self.references, self.config, **given, **changes)

    def batches(self, tail: Tail):
        """A few samples at a time: their places (b,), what no pathway changes, their own pathways and logits."""
        for rows in torch.arange(len(self.tokens)).split(self.config.batch):
            prefix = tail.cut(self.tokens[rows, : int(self.lengths[rows].max())], self.lengths[rows])
            yield rows, prefix, *tail.base(prefix)


def gathered(parts) -> RemixResult:
    """Batches of (pathway before, pathway, logits before, logits, losses) as one result."""
    return RemixResult(*map(torch.cat, zip(*parts, strict=True)), None, 0.0)


# ---------------------------------------------------------------------------------------- the surrogates, and controls


def surrogate(method: str):
    """Mode finding, kernel regression or NGD, as they are."""
    return lambda arena, **settings: arena.remix(method=method, **settings)


def oracle(arena: Arena, **settings):
    """NGD towards the true label of each sample: the headroom, not a method."""
    return arena.remix(method="oracle", labels=arena.labels, **settings)


def wrong_labels(arena: Arena):
    """A random wrong label for each sample, of those that references have, (n,)."""
    answers = arena.references.labels.unique()
    among = answers.expand(len(arena.labels), -1) if arena.options is None else arena.options
    chance = (among != arena.labels[:, None]).float()
    return among.gather(1, torch.multinomial(chance, 1, generator=arena.random()))[:, 0]


def oracle_null(arena: Arena, **settings):
    """The same optimiser towards a random wrong label: if that is reached as often, the oracle shows only force."""
    return arena.remix(method="oracle", labels=wrong_labels(arena), **settings)


def random_neighbours(arena: Arena, **settings):
    """NGD with neighbours drawn at random, weighted like the true ones."""
    found = arena.neighbours
    index = torch.multinomial(found.allowed.float(), found.index.shape[1], generator=arena.random())
    return arena.remix(method="ngd", neighbours=found._replace(index=index), **settings)


def shuffled_labels(arena: Arena, **settings):
    """NGD with the usable references' labels shuffled among them."""
    references, labels = arena.references, arena.references.labels.clone()
    usable = references.correct.nonzero()[:, 0]
    labels[usable] = labels[usable[torch.randperm(len(usable), generator=arena.random())]]
    return arena.remix(method="ngd", references=replace(references, labels=labels), **settings)


def unfiltered(arena: Arena, **settings):
    """NGD with references whether the model answers them right or not."""
    return arena.remix(method="ngd", correct=False, **settings)


def knn_vote(arena: Arena, k: int = 3):
    """The neighbours' labels, weighed by the kernel; the model is not asked."""
    found = arena.find(k=k)
    base = plain(arena, arena.model)
    labels = arena.references.labels[found.index.clamp(min=0)]  # (n, k)
    return base._replace(logits=torch.zeros(base.logits.shape).scatter_add_(1, labels, found.weight))


def best_route(arena: Arena, noise: float = 1.0, routes: int = 21, **settings):
    """Of `routes` noisy pathways, the one with the least neighbour loss: a search without gradients, of equal compute
    (ten steps forward and back cost about as much as 21 forward)."""
    config = replace(arena.config, **settings)
    tail, generator = Tail(arena.model, critical_layers(arena.model, config.layers), config.token), arena.random()
    prefixes, parts = Prefixes(tail, arena.references, config.max_memory * 1e6), []
    with frozen(arena.model), torch.no_grad():
        for rows, prefix, start, before in arena.batches(tail):
            moved = noise * torch.randn(routes, *start.shape, generator=generator)
            moved[0] = 0
            tried = (start.log() + moved).softmax(-1)  # (routes, b, R, E)
            losses = nearby(tail, prefixes, arena.neighbours, rows, config)(tried)  # (routes, b)
            w = tried[losses.argmin(0), torch.arange(len(rows))]
            parts.append((start, w, before, tail(prefix, w), torch.stack([losses[0], losses.amin(0)], 1)))
    return gathered(parts)


# --------------------------------------------------------------------------------------------- without any references


def entropy(arena: Arena, **settings):
    """NGD on the entropy of the sample's own prediction."""
    config, parts = replace(arena.config, **settings), []
    tail = Tail(arena.model, critical_layers(arena.model, config.layers), config.token)
    with frozen(arena.model), torch.no_grad():
        for _, prefix, start, before in arena.batches(tail):

            def unsure(w, prefix=prefix):
                logs = tail(prefix, w).log_softmax(-1)
                return -(logs.exp() * logs).sum(-1)  # (b,)

            w, losses = ngd(core_experts(start, config.core), unsure, config)
            parts.append((start, w, before, tail(prefix, w), losses))
    return gathered(parts)


def noisy_ensemble(arena: Arena, noise: float = 0.3, routes: int = 21):
    """Router noise (RoE, arXiv 2509.17238): the mean prediction along `routes` noisy pathways."""
    generator, parts, tail = arena.random(), [], arena.tail
    with frozen(arena.model), torch.no_grad():
        for _, prefix, start, before in arena.batches(tail):
            moved = (start.log() + noise * torch.randn(routes, *start.shape, generator=generator)).softmax(-1)
            mean = torch.stack([tail(prefix, w).softmax(-1) for w in moved]).mean(0)  # (b, V)
            parts.append((start, start, before, mean.log(), before.new_zeros(len(before), 0)))
    return gathered(parts)


# ------------------------------------------------------------------------- other ways to use the same neighbours' help


def in_context(arena: Arena, k: int = 3):
    """The k nearest neighbours with their answers before the prompt, the nearest last."""
    references, found = arena.references, arena.find(k=k)
    prompts, examples = [], zip(references.tokens, references.lengths, references.labels[:, None], strict=True)
    solved = [torch.cat([row[:n], label]) for row, n, label in examples]
    for row, n, index in zip(arena.tokens, arena.lengths, found.index.tolist(), strict=True):
        prompts.append(torch.cat([*(solved[i] for i in reversed(index) if i >= 0), row[:n]]))
    base, tail, logits = plain(arena, arena.model), arena.tail, []
    with frozen(arena.model), torch.no_grad():
        for part in portions(*padded(prompts, arena.model.config.vocab_size)):
            logits.append(tail.base(tail.cut(*part))[1])
    return base._replace(logits=torch.cat(logits))


def soft_prompt(arena: Arena, length: int = 1, **settings):
    """Embeddings before the prompt, fitted for each sample to its neighbours (Lester et al., arXiv 2104.08691)."""

    def start(model, n):
        return neutral(model).expand(n, length, -1)  # (n, length, D)

    def logits(model, soft, tokens, lengths):
        x = torch.cat([soft, model.embed(tokens)], 1)  # (n, length + T, D)
        valid = torch.arange(x.shape[1]) < lengths[:, None] + length
        return last(model, model.run(x, valid), valid)

    return fitted(arena, start, logits, settings)


def prefix_tuning(arena: Arena, length: int = 1, **settings):
    """Keys and values before the prompt, in every layer, fitted likewise (Li and Liang, arXiv 2101.00190)."""

    def start(model, n):
        cache = Cache()
        model.run(neutral(model).expand(1, length, -1), cache=cache)
        both = [torch.stack([*part.values()], 1) for part in (cache.keys, cache.values)]  # (1, L, G, length, C) twice
        return torch.stack(both, 1).expand(n, -1, -1, -1, -1, -1)  # (n, 2, L, G, length, C)

    def logits(model, fit, tokens, lengths):
        keys, values = (dict(enumerate(part.unbind(1))) for part in fit.unbind(1))
        cache = Cache(keys, values, torch.ones(len(fit), length, dtype=torch.bool))
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        return last(model, model.run(model.embed(tokens), valid, cache, write=False), valid)

    return fitted(arena, start, logits, settings)


def neutral(model):
    """Where soft prompts start: the mean of all embeddings, (D,)."""
    return model.embedding.weight.mean(0)


def last(model, x, valid):
    """The logits (n, V) at each prompt's last token, of x (n, T, D)."""
    return model.head(x[torch.arange(len(x)), valid.sum(1) - 1])


def fitted(arena: Arena, start, logits, settings):
    """Fit something of each sample's own, start(model, n), on its neighbours by the steps of NGD, then answer."""
    config, model, references, parts = replace(arena.config, **settings), arena.model, arena.references, []
    base = plain(arena, model)
    with frozen(model), torch.no_grad():
        for rows in torch.arange(len(arena.tokens)).split(config.batch):
            index = arena.neighbours.index[rows]  # (b, k)
            there = index >= 0
            owner, chosen, weight = there.nonzero()[:, 0], index[there], arena.neighbours.weight[rows][there]  # (M,)
            lengths = references.lengths[chosen]
            tokens = references.tokens[chosen, : int(lengths.max())]

            def loss(fit, owner=owner, chosen=chosen, weight=weight, tokens=tokens, lengths=lengths):
                found = logits(model, fit.index_select(0, owner), tokens, lengths)
                each = F.cross_entropy(found, references.labels[chosen], reduction="none") * weight
                return each.new_zeros(len(fit)).index_add(0, owner, each)  # (M,) -> (b,)

            fit, losses = descend(loss, start(model, len(rows)), config)
            tokens = arena.tokens[rows, : int(arena.lengths[rows].max())]
            parts.append((logits(model, fit, tokens, arena.lengths[rows]), losses))
    found, losses = map(torch.cat, zip(*parts, strict=True))
    return base._replace(logits=found, losses=losses)


# ------------------------------------------------------------------------------------- one change of weights for all


def plain(arena: Arena, model) -> RemixResult:
    """A model's own answers; before and after are the same."""
    tail = Tail(model, critical_layers(model, arena.config.layers), arena.config.token)
    with frozen(model), torch.no_grad():
        parts = [(w, w, logits, logits, logits.new_zeros(len(w), 0)) for *_, w, logits in arena.batches(tail)]
    return gathered(parts)


def fine_tuning(arena: Arena, routers: bool, lr: float = 1e-3, steps: int = 100, batch: int = 64, pull: float = 0.0):
    """The weights, or only the routers', fitted to all usable references at once; then no sample is treated apart.

    pull: RoMA's regulariser (arXiv 2511.07419): the squared distance between a reference's pathway and those of its
    neighbours among the references, as they were, weighed by the kernel."""
    model, references, generator = copy.deepcopy(arena.model), arena.references, arena.random()
    usable = references.correct.nonzero()[:, 0]
    model.requires_grad_(not routers)
    for module in model.modules():
        if isinstance(module, Router):
            module.requires_grad_(True)
    near = among(arena, usable) if pull else None
    tail, own = Tail(model, critical_layers(model, "all"), references.token), references.pathways
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        pick = torch.randint(len(usable), (batch,), generator=generator)
        chosen = usable[pick]
        lengths = references.lengths[chosen]
        pathway, logits = tail.base(tail.cut(references.tokens[chosen, : int(lengths.max())], lengths))
        loss = F.cross_entropy(logits, references.labels[chosen])
        if pull:
            others = own[near.index[pick].clamp(min=0)].flatten(2, 3)  # (b, k, 1, R, E) -> (b, k, R, E)
            apart = (pathway[:, None] - others).square().sum((2, 3))  # (b, k)
            loss = loss + pull * (near.weight[pick] * apart).sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after, before = plain(arena, model), plain(arena, arena.model)
    return after._replace(pathway_before=before.pathway, logits_before=before.logits)


def among(arena: Arena, usable) -> Neighbours:
    """The neighbours of the usable references among the references, none its own."""
    references, n = arena.references, len(usable)
    allowed = torch.ones(n, len(references.labels), dtype=torch.bool)
    allowed[torch.arange(n), usable] = False
    with frozen(arena.model), torch.no_grad():
        rest = (references.tokens[usable], references.lengths[usable], arena.config, allowed)
        return find(arena.tail, references, *rest)


METHODS = {
    "mode finding": surrogate("mode_finding"),
    "kernel regression": surrogate("kernel_regression"),
    "NGD": surrogate("ngd"),
    "in-context": in_context,
    "prefix tuning": prefix_tuning,
    "soft prompt": soft_prompt,
    "router tuning": lambda arena, **settings: fine_tuning(arena, True, **settings),
    "router tuning, RoMA": lambda arena, **settings: fine_tuning(arena, True, **settings),
    "full fine-tuning": lambda arena, **settings: fine_tuning(arena, False, **settings),
    "noisy ensemble": noisy_ensemble,
    "entropy": entropy,
    "random neighbours": random_neighbours,
    "shuffled labels": shuffled_labels,
    "unfiltered": unfiltered,
    "kNN vote": knn_vote,
    "best of 21 routes": best_route,
    "oracle": oracle,
    "oracle's null": oracle_null,
}


def grid(**axes):
    """All combinations of some settings."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


LAYERS, FIRST_STEP, STEPS = ["all", "last:2"], [0.25, 0.5, 1.0, 2.0], [100, 300]
TRIES = {  # what is tried on dev: as often for each method
    "mode finding": grid(alpha=[0.5, 0.8], k=[3, 16], layers=LAYERS),
    "kernel regression": grid(kernel=["gaussian", "matern", "polynomial", "linear"], layers=LAYERS),
    "NGD": grid(lr=FIRST_STEP, layers=LAYERS),
    "in-context": grid(k=[1, 2, 3, 4, 6, 8, 10, 12]),
    "prefix tuning": grid(lr=FIRST_STEP, length=[1, 4]),
    "soft prompt": grid(lr=FIRST_STEP, length=[1, 4]),
    "router tuning": grid(lr=[1e-3, 3e-3, 1e-2, 3e-2], steps=STEPS),
    "router tuning, RoMA": grid(lr=[3e-3, 1e-2], steps=STEPS, pull=[0.03, 0.3]),
    "full fine-tuning": grid(lr=[1e-4, 3e-4, 1e-3, 3e-3], steps=STEPS),
    "noisy ensemble": grid(noise=[0.1, 0.3, 1.0, 3.0], routes=[10, 21]),
    "entropy": grid(lr=FIRST_STEP, layers=LAYERS),
    "kNN vote": grid(k=[1, 3, 5, 8, 12, 16, 32, 64]),
    "best of 21 routes": grid(noise=[0.3, 1.0, 2.0, 3.0], layers=LAYERS),
}


CHOSEN = {  # on the dev split of seeds 10 to 12, of eight tries each: python -m lab.baselines
    "mode finding": {"alpha": 0.8, "k": 3, "layers": "last:2"},
    "kernel regression": {"kernel": "matern", "layers": "last:2"},
    "NGD": {"lr": 0.5, "layers": "all"},
    "in-context": {"k": 2},
    "prefix tuning": {"lr": 2.0, "length": 4},
    "soft prompt": {"lr": 0.5, "length": 4},
    "router tuning": {"lr": 1e-2, "steps": 300},
    "router tuning, RoMA": {"lr": 3e-3, "steps": 100, "pull": 0.03},
    "full fine-tuning": {"lr": 3e-3, "steps": 300},
    "noisy ensemble": {"noise": 0.3, "routes": 10},
    "entropy": {"lr": 0.25, "layers": "last:2"},
    "kNN vote": {"k": 8},
    "best of 21 routes": {"noise": 0.3, "layers": "all"},
}
STORIES = {"NGD": {"lr": 0.1}}  # for cloze questions: of four tries on the dev split of one run


def arena_of(folder: Path, split: str, most: int | None = None, given: dict | None = None, strict=False) -> Arena:
    """A run, prompts of a split (`most`: so many, drawn at random), and all its references. strict: no reference shares
    an operand with the prompt that it is to help. On stories the prompts are the cloze questions, and the references
    those of the training stories."""
    model, train = checkpoint.load(folder)
    data, given = load_data(train, model.config.context), given or {}
    seed, draw = train["seed"], torch.Generator().manual_seed(train["seed"])
    if isinstance(data, SkillsTask):
        prompts, known = data.prompts(split), data.prompts("reference")
        seen = torch.cat([data.batch(step, 64)[0] for step in range(40)]).view(-1, 5)[:, :4]  # (n, 20) -> (4n, 4)
        which = {"corpus": seen, "token": given.get("token", "last")}
        references = ReferenceSet.build(model, known.tokens, known.labels, **which)
        kept = torch.randperm(len(prompts.labels), generator=draw)[:most].sort().values
        about = Prompts(*(tensor[kept] for tensor in prompts))
        shared = (about.tokens[:, None, 1:3] == known.tokens[:, 1:3]).any(-1) if strict else None  # (n, m)
        rest = {"allowed": None if shared is None else ~shared, "about": about, "tuned": CHOSEN, "seed": seed}
        return Arena(model, about.tokens, about.labels, references, RemixConfig(**given), **rest)
    require(not strict, f"{folder}: only prompts of the skills task have operands")
    prompts, known = (cloze(data, part) for part in (split, "train"))
    require(len(prompts) > 19, f"{folder}: only {len(prompts)} stories of {split} end with a word of one token")
    kept = torch.randperm(len(prompts), generator=draw)[:most].sort().values
    prompts = [prompts[i] for i in kept]
    references = ReferenceSet.build(model, *posed(known))
    config = RemixConfig(**{"embedding": "tfidf", "loss": "options"} | given)
    asked, labels, options = posed(prompts)
    tokens, lengths = padded(asked, data.vocab_size)
    return Arena(model, tokens, labels, references, config, lengths, options, tuned=STORIES, seed=seed)


def posed(questions: list[Question]):
    """Questions as what a reference set and an arena take: the prompts, the labels (n,), the options (n, O); where one
    has fewer choices than another, its first is there again."""
    most = max(len(question.choices) for question in questions)
    options = torch.tensor([q.choices + q.choices[:1] * (most - len(q.choices)) for q in questions])
    labels = torch.tensor([question.choices[question.answer] for question in questions])
    return [question.prompt for question in questions], labels, options


def main(argv) -> int:
    """Try the settings of every method, or of those named, on the dev split of some runs."""
    if not set(argv) - TRIES.keys():
        raise cli.Usage("expected the folders of some runs: python -m lab.baselines [METHOD ...] RUN [RUN ...]")
    arenas, rows = [arena_of(Path(name), "dev") for name in argv if name not in TRIES], []
    asked = {name: tries for name, tries in TRIES.items() if name in argv} or TRIES
    for name, tries in tqdm(asked.items(), desc="methods", leave=False, disable=None):
        shares = [np.mean([float(arena.right(METHODS[name](arena, **one))) for arena in arenas]) for one in tries]
        best = int(np.argmax(shares))
        told = "  ".join(f"{100 * share:.1f}" for share in shares)
        rows.append([name, f"{shares[best]:.1%}", str(tries[best]), told])
    base = np.mean([float(arena.right(plain(arena, arena.model))) for arena in arenas])
    rows.insert(0, ["base", f"{base:.1%}", "", ""])
    print(cli.table(rows, header=["on dev", "best", "with", "all tries (%), in the order of TRIES"], left=3))
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__)
