"""C3PO (arXiv 2504.07964): at test time, re-mix the experts of a frozen model, for each sample anew.

A pathway is what the routers say at a sample's last prompt token: a softmax row for every router. Naive routing takes
it as it is. Here it is mended first, guided by similar reference samples that the model got right: mode finding moves
it towards pathways like it, kernel regression towards those of the sample's neighbours, and neighbourhood gradient
descent (NGD) to where the neighbours are answered best along it. No weight changes; the sample's label is not used.

    references = ReferenceSet.build(model, tokens, labels)
    result = remix(model, prompts, references, method="ngd")        # result.logits, result.pathway, result.neighbours

A pathway is imposed at one token, and attention only looks back: all that lies below the first critical layer, and the
keys and values of earlier tokens in all layers, stay what they were. They are computed once (Prefix); then a candidate
pathway costs one token through the layers above (Tail). That is exact, and far cheaper than full forwards.

The letters in the shape comments, beside those of moe.py:
    n samples    m references    k neighbours    R rows of a pathway: one for each critical router
    M pairs (sample, neighbour)    P tokens from the imposed one on: 1, if that is the last    S tokens before them
"""

import difflib
import hashlib
import math
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy import sparse
from tqdm import tqdm

from moe import Cache, Remix, Router, require

TINY = 1e-20


@dataclass
class RemixConfig:
    """How to re-mix. The defaults suit the toy; the paper's settings for OLMoE are layers last:5, core 20, k 3."""

    method: Annotated[Literal["mode_finding", "kernel_regression", "ngd", "oracle"], "the surrogate"] = "ngd"
    k: Annotated[int, "neighbours of each sample"] = 3
    epsilon: Annotated[float | None, "instead: all references within this distance (0 to 2)"] = None
    embedding: Annotated[str, "tfidf, tfidf-places, tfidf-bigrams, hidden:LAYER, pathway, own"] = "tfidf-places"
    kernel: Annotated[Literal["gaussian", "matern", "polynomial", "linear"], "weighs the neighbours"] = "gaussian"
    sigma: Annotated[float | None, "width of the kernel (none: median distance of a sample's neighbours)"] = None
    duplicate: Annotated[float, "references as similar to a sample as this are dropped"] = 0.95
    correct: Annotated[bool, "only references that the model answers right"] = True
    layers: Annotated[str, "critical layers: all, last:2, first:1, middle:2, or 0,3 (MoE layers, from 0)"] = "all"
    core: Annotated[int | None, "experts of a row that may change, the most probable (none: all)"] = None
    token: Annotated[Literal["last", "middle", "first", "all"], "the token whose pathway is re-mixed"] = "last"
    steps: Annotated[int, "steps of ngd and oracle; at most so many of mode_finding"] = 10
    lr: Annotated[float, "first step of ngd, on a cosine down to a thousandth"] = 0.5
    rule: Annotated[Literal["normed", "plain"], "a step is lr * g / |g|, or lr * g"] = "normed"
    space: Annotated[Literal["logits", "raw"], "ngd moves log-probabilities, or (the paper) raw weights"] = "logits"
    loss: Annotated[Literal["vocabulary", "options"], "cross-entropy over all, or the options"] = "vocabulary"
    alpha: Annotated[float, "what mode_finding keeps of the pathway at each step"] = 0.5
    batch: Annotated[int, "samples at a time"] = 64
    max_memory: Annotated[float, "MB for the references' prefixes that are kept"] = 512.0

    def __post_init__(self):
        require(self.epsilon is None or self.epsilon >= 0, f"epsilon is {self.epsilon}; it must be at least 0, or none")
        for name, least in {"k": 1, "batch": 1, "steps": 0, "lr": 0, "alpha": 0, "max_memory": 0}.items():
            require(getattr(self, name) >= least, f"{name} is {getattr(self, name)}; it must be at least {least}")
        require(self.alpha <= 1, f"alpha is {self.alpha}; it must be at most 1")
        require(self.core is None or self.core >= 1, f"core is {self.core}; it must be at least 1, or none")
        for name in ("method", "kernel", "token", "rule", "space", "loss"):
            known = type(self).__annotations__[name].__origin__.__args__
            one_of(name, getattr(self, name), known)
        one_of("embedding", self.embedding.split(":")[0], (*TFIDF, "hidden", "pathway", "own"))


TOKENS = ("last", "middle", "first", "all")
TFIDF = ("tfidf", "tfidf-places", "tfidf-bigrams")


def one_of(what: str, name: str, known):
    """ValueError, with the nearest name that there is, for one that there is not."""
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0)
    require(name in known, f"unknown {what} {name!r}; did you mean {near[0]}? There are {', '.join(known)}")


# ------------------------------------------------------------------------------------------------------ the exact form


def critical_layers(model, spec: str) -> list[int]:
    """The blocks that a pathway covers, counted among those with a router: "all", "last:2", "first:1", "middle:2" or
    "0,3" (paper, section 3.5). ValueError for a spec that names no such layer, and for a model without routers.

    >>> from moe import MoEConfig, MoETransformer
    >>> critical_layers(MoETransformer(MoEConfig(n_layers=6, dense_layers=(0, 2, 4))), "last:2")  # MoE: 1, 3, 5
    [3, 5]
    """
    blocks = [i for i, block in enumerate(model.blocks) if any(isinstance(m, Router) for m in block.modules())]
    require(len(blocks) > 0, "this model has no routers (it is dense, or routes by hash): there is nothing to re-mix")
    kind, _, count = spec.partition(":")
    n, size = len(blocks), int(count) if count.isdigit() else 0
    if spec == "all":
        return blocks
    if kind in ("first", "middle", "last") and 1 <= size <= n:
        start = {"first": 0, "middle": (n - size) // 2, "last": n - size}[kind]
        return blocks[start : start + size]
    chosen = [int(part) if part.isdigit() else n for part in spec.split(",")]
    known = f"expected all, last:{min(2, n)}, first:1, middle:1, or numbers from 0 to {n - 1}, such as 0,{n - 1}"
    require(max(chosen) < n, f"unknown critical layers {spec!r}; {known}")
    return [blocks[i] for i in sorted(set(chosen))]


class Prefix(NamedTuple):
    """What no pathway changes, of n prompts: their tokens from the imposed one on, as they enter the first critical
    layer, and the keys and values of all tokens before them, from that layer up."""

    x: torch.Tensor  # (n, P, D)
    new: torch.Tensor  # (n, P) bool, false at padding
    keys: torch.Tensor  # (n, S, L, G, C)
    values: torch.Tensor  # (n, S, L, G, C)
    old: torch.Tensor  # (n, S) bool, false at padding


class Tail:
    """The part of a model that a pathway reaches: from the first critical layer up, from the imposed token on."""

    def __init__(self, model, layers: list[int], token: str = "last"):
        one_of("token", token, TOKENS)
        self.model, self.first, self.token = model, min(layers), token
        self.device = model.embedding.weight.device
        self.routers = [m.index for layer in layers for m in model.blocks[layer].modules() if isinstance(m, Router)]
        self.above = [m.index for m in model.blocks[self.first :].modules() if isinstance(m, Router)]

    def cut(self, tokens, lengths) -> Prefix:
        """Prompts tokens (n, T), padded on the right, of lengths (n,) -> what no pathway changes."""
        tokens, lengths, model, cache = tokens.to(self.device), lengths.to(self.device), self.model, Cache()
        place = {"last": lengths - 1, "middle": lengths // 2}.get(self.token, 0 * lengths)  # (n,) of the imposed token
        P, S = int((lengths - place).max()), int(place.max())
        if S:
            before = torch.arange(S, device=self.device) < place[:, None]  # (n, S)
            model.run(model.embed(tokens[:, :S]), before, cache)
        after = place[:, None] + torch.arange(P, device=self.device)  # (n, P) the places of the tokens from there on
        new = after < lengths[:, None]
        kept = tokens.gather(1, after.clamp(max=tokens.shape[1] - 1))  # (n, T) -> (n, P)
        x = model.run(model.embed(kept), new, cache, last=self.first, write=False)
        none = x.new_zeros(len(x), model.config.n_kv_heads, 0, model.config.head_dim)  # where nothing stands before
        above = range(self.first, len(model.blocks))
        keys, values = (  # (n, G, S, C) for each layer -> (n, L, G, S, C) -> (n, S, L, G, C)
            torch.stack([part.get(i, none) for i in above], 1).movedim(3, 1) for part in (cache.keys, cache.values)
        )
        return Prefix(x, new, keys, values, new[:, :0] if cache.valid is None else cache.valid)

    def __call__(self, prefix: Prefix, pathway=None, routing=None):
        """Logits (n, V) that follow the prompts, along a pathway (n, R, E), or else along the model's own."""
        x, new, keys, values, old = prefix
        (n, P), imposed, every = new.shape, None, self.token == "all"
        keys, values = (part.movedim(1, 3).unbind(1) for part in (keys, values))  # (n, S, L, G, C) -> L x (n, G, S, C)
        cache = Cache(dict(enumerate(keys, self.first)), dict(enumerate(values, self.first)), old)
        if pathway is not None:
            rows = pathway.unflatten(1, (-1, len(self.routers)))  # (n, R, E) -> (n, 1 or P, routers, E)
            at = new if every else torch.arange(P, device=new.device).expand(n, P) == 0  # (n, P)
            imposed = Remix({r: rows[:, :, i] if every else rows[:, 0, i] for i, r in enumerate(self.routers)}, at)
        x = self.model.run(x, new, cache, self.first, remix=imposed, write=False, routing=routing)
        return self.model.head(x[torch.arange(n), new.sum(1) - 1])  # (n, P, D) -> (n, D) -> (n, V)

    def base(self, prefix: Prefix):
        """The model's own pathway (n, R, E) and logits (n, V)."""
        routing = []
        logits = self(prefix, routing=routing)
        probs = [routing[self.above.index(r)].probs.unflatten(0, prefix.new.shape) for r in self.routers]  # (n, P, E)
        rows = torch.stack(probs, 2)  # (n, P, routers, E)
        return (rows if self.token == "all" else rows[:, :1]).flatten(1, 2), logits  # (n, R, E), (n, V)

    def pathways(self, references) -> torch.Tensor:
        """The references' pathways in the critical layers, (m, R, E)."""
        return references.pathways[:, :, self.routers].flatten(1, 2)  # (m, 1 or P, all routers, E) -> (m, R, E)


@contextmanager
def frozen(model):
    """In evaluation, and without gradients of the weights: only pathways have any."""
    training, learns = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, learn in zip(model.parameters(), learns, strict=True):
            parameter.requires_grad_(learn)


# --------------------------------------------------------------------------------------------------------- references


@dataclass
class ReferenceSet:
    """m samples with their labels, whether the model answers them right, and the pathways that it takes for them."""

    tokens: torch.Tensor  # (m, T), padded on the right
    lengths: torch.Tensor  # (m,)
    labels: torch.Tensor  # (m,) the token that should follow
    correct: torch.Tensor  # (m,) bool
    pathways: torch.Tensor  # (m, 1, routers, E); with token "all" (m, T, routers, E)
    model: str  # fingerprint
    token: str = "last"  # whose pathways these are
    options: torch.Tensor | None = None  # (m, O) the tokens among which to choose; none: the vocabulary
    corpus: torch.Tensor | None = None  # (c, T) padded prompts that tell tf-idf how rare a token is; none: tokens
    corpus_lengths: torch.Tensor | None = None  # (c,)
    embeddings: torch.Tensor | None = None  # (m, X) of your own

    @classmethod
    @torch.no_grad()
    def build(cls, model, prompts, labels, options=None, corpus=None, embeddings=None, token="last") -> "ReferenceSet":
        """Run the model over reference prompts (a tensor (m, T), or lists) with labels (m,), and keep its pathways.

        ValueError: no references, labels outside the vocabulary or the options, several lengths with token "all"."""
        V, labels = model.config.vocab_size, torch.as_tensor(labels, dtype=torch.int64)
        require(len(prompts) > 0, "the reference set is empty; re-mixing needs labelled samples, hundreds or more")
        tokens, lengths = padded(prompts, V)
        require(len(labels) == len(tokens), f"{len(tokens)} references have {len(labels)} labels; expected one each")
        inside("labels", labels, V)
        options = None if options is None else among("of a reference", torch.as_tensor(options), labels, V)
        same = token != "all" or bool((lengths == lengths[0]).all())
        require(same, f"token all needs prompts of one length; these have {int(lengths.min())} to {int(lengths.max())}")
        tail = Tail(model, critical_layers(model, "all"), token)
        with frozen(model):
            found = [tail.base(tail.cut(*part)) for part in portions(tokens, lengths)]
        pathways, logits = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        pathways = pathways.unflatten(1, (-1, len(tail.routers)))  # (m, R, E) -> (m, 1 or T, routers, E)
        correct, rare = choose(logits, options) == labels, (None, None) if corpus is None else padded(corpus, V)
        own = None if embeddings is None else torch.as_tensor(embeddings)
        return cls(tokens, lengths, labels, correct, pathways, fingerprint(model), token, options, *rare, own)

    def save(self, path):
        """A safetensors file, whole or not at all; never the prefixes, which take megabytes each in a real model."""
        form = torch.contiguous_format
        tensors = {n: part.clone(memory_format=form) for n, part in vars(self).items() if torch.is_tensor(part)}
        temporary = Path(f"{path}.tmp")
        safetensors.torch.save_file(tensors, temporary, {"model": self.model, "token": self.token})
        temporary.replace(path)

    @classmethod
    def load(cls, path, model) -> "ReferenceSet":
        """ValueError for a file that is missing, is no reference set, or was made by another model."""
        require(Path(path).is_file(), f"no such reference set: {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                made = cls(**{name: file.get_tensor(name) for name in file.keys()}, **(file.metadata() or {}))  # noqa: SIM118
        except (safetensors.SafetensorError, TypeError) as error:
            raise ValueError(f"{path} is not a reference set ({error}); ReferenceSet.save makes one") from None
        made.require_model(model, path)
        return made

    def require_model(self, model, name="the reference set"):
        """ValueError unless the pathways are this model's."""
        require(
            self.model == fingerprint(model), f"{name} was made by another model: the weights differ; build it anew"
        )


def padded(prompts, V: int):
    """Prompts, a tensor (n, T) or lists -> tokens (n, T), padded on the right, and lengths (n,). ValueError if one is
    empty, or a token is outside the vocabulary."""
    rows = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    require(min(map(len, rows), default=0) > 0, f"expected one prompt or more, none empty; found {len(rows)} prompts")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    inside("tokens", tokens, V)
    return tokens, torch.tensor([len(row) for row in rows])


def inside(what: str, tokens, V: int):
    """ValueError unless all tokens are of the vocabulary."""
    low, high = (int(token) for token in tokens.aminmax())
    require(0 <= low <= high < V, f"{what} go from {low} to {high}; the vocabulary goes from 0 to {V - 1}")


def among(whose: str, options, labels, V: int):
    """options (n, O) again. ValueError for another shape, tokens outside the vocabulary, or a label (n,) not there."""
    shape = tuple(options.shape)
    require(options.dim() == 2 and shape[0] == len(labels), f"options have shape {shape}; expected ({len(labels)}, O)")
    inside("options", options, V)
    require(bool((options == labels[:, None]).any(1).all()), f"the label {whose} is not among its options")
    return options


def portions(tokens, lengths, most: int = 8_192):
    """Prompts, so many that they hold at most 8,192 tokens, with no more padding than they need."""
    size = max(1, most // tokens.shape[1])
    for part, length in zip(tokens.split(size), lengths.split(size), strict=True):
        yield part[:, : int(length.max())], length


def choose(logits, options=None):
    """logits (n, V) -> the most probable token (n,), of all or of the options (n, O)."""
    if options is None:
        return logits.argmax(-1)
    best = logits.gather(1, options).argmax(1, keepdim=True)  # (n, 1) its place among the options
    return options.gather(1, best)[:, 0]  # (n, O) -> (n,)


def fingerprint(model) -> str:
    """What tells a model from all others: a hash of its sizes and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Prefixes:
    """The references' prefixes: made on demand, and kept up to `most` bytes, the least recently used given up first."""

    def __init__(self, tail: Tail, references: ReferenceSet, most: float):
        self.tail, self.references, self.most = tail, references, most
        self.kept, self.size, self.hits, self.asked = OrderedDict(), 0, 0, 0

    def __call__(self, index: list[int]) -> Prefix:
        """The prefixes of these references, as a batch."""
        found = {i: self.kept[i] for i in index if i in self.kept}
        missing = sorted(set(index) - found.keys())
        self.asked, self.hits = self.asked + len(index), self.hits + len(index) - len(missing)
        made = portions(self.references.tokens[missing], self.references.lengths[missing]) if missing else ()
        cuts = (row for part in made for row in zip(*self.tail.cut(*part), strict=True))
        for i, row in zip(missing, cuts, strict=True):
            x, new, keys, values, old = row
            p, s = int(new.sum()), int(old.sum())  # a clone without padding: a view would keep its whole batch alive
            found[i] = [part.clone() for part in (x[:p], new[:p], keys[:s], values[:s], old[:s])]
            self.size += sum(part.nbytes for part in found[i])
        self.kept.update(found)
        for i in index:
            self.kept.move_to_end(i)
        while self.size > self.most:
            self.size -= sum(part.nbytes for part in self.kept.popitem(last=False)[1])
        parts = zip(*(found[i] for i in index), strict=True)
        return Prefix(*(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in parts))


# --------------------------------------------------------------------------------------------------------- neighbours


class Neighbours(NamedTuple):
    """The references near n samples, and how much each counts."""

    index: torch.Tensor  # (n, k) places in the reference set; -1: nobody
    weight: torch.Tensor  # (n, k) the kernel's, of sum 1; 0 for nobody
    allowed: torch.Tensor  # (n, m) bool: the references that might have been chosen
    duplicates: int  # pairs (sample, reference) that were too alike


@torch.no_grad()
def find(tail: Tail, references, tokens, lengths, config: RemixConfig, allowed=None, own=None) -> Neighbours:
    """The neighbourhood of each prompt (paper, section 3.2): its k nearest references, or all in an epsilon ball.

    allowed (n, m) bool: who may be chosen; own (n, X): embeddings to go with references.embeddings."""
    n, m = len(tokens), len(references.labels)
    usable = references.correct if config.correct else torch.ones_like(references.correct)
    require(bool(usable.any()), f"the model answers none of the {m} references right: there is nothing to learn from")
    most, fits = int(usable.sum()), allowed is None or allowed.shape == (n, m)
    few = f"k is {config.k}, but there are {most} usable references; take a smaller k"
    require(config.k <= most or config.epsilon is not None, few)
    require(fits, f"allowed has shape {tuple(allowed.shape) if not fits else ''}; expected {(n, m)}")
    known = (references.tokens, references.lengths)
    alike = torch.from_numpy(product(*tfidf("tfidf-bigrams", (tokens, lengths), known, known))) > config.duplicate
    allowed = usable.expand(n, m) if allowed is None else usable & allowed
    duplicates, allowed = int((alike & allowed).sum()), allowed & ~alike
    cosine = torch.from_numpy(product(*embed(tail, config.embedding, references, tokens, lengths, own))).clamp(-1, 1)
    distance = (2 - 2 * cosine).sqrt().masked_fill(~allowed, torch.inf)  # (n, m), on the unit sphere
    k = config.k
    if config.epsilon is not None:
        allowed = allowed & (distance <= config.epsilon)
        distance, k = distance.masked_fill(~allowed, torch.inf), max(1, int(allowed.sum(1).max()))
    near, index = distance.topk(k, largest=False)  # (n, k) twice
    weight = kernel(config.kernel, near, cosine.gather(1, index), config.sigma)
    return Neighbours(index.masked_fill(near.isinf(), -1), weight.float(), allowed, duplicates)


def embed(tail: Tail, name: str, references, tokens, lengths, own=None):
    """Prompts and references as unit vectors (n, X) and (m, X), dense or sparse. ValueError: no such embedding."""
    kind, _, layer = name.partition(":")
    known = (references.tokens, references.lengths)
    if kind in TFIDF:
        rare = known if references.corpus is None else (references.corpus, references.corpus_lengths)
        return tfidf(kind, (tokens, lengths), known, rare)
    if kind == "own":
        there = own is not None and references.embeddings is not None
        require(there, "embedding own needs arrays: ReferenceSet.build(embeddings=...) and remix(embeddings=...)")
        vectors = torch.as_tensor(own), references.embeddings
        (n, width), (_, other) = vectors[0].shape, vectors[1].shape
        require(
            n == len(tokens) and width == other, f"own embeddings are ({n}, {width}); expected ({len(tokens)}, {other})"
        )
    elif kind == "hidden":
        top = len(tail.model.blocks) - 1
        require(layer.isdigit() and int(layer) <= top, f"unknown embedding {name!r}; expected hidden:0 to hidden:{top}")
        below = Tail(tail.model, [int(layer)])  # the state of the last token as it enters this layer
        vectors = [torch.cat([below.cut(*part).x[:, 0] for part in portions(*p)]) for p in ((tokens, lengths), known)]
    else:
        taken = [tail.base(tail.cut(*part))[0] for part in portions(tokens, lengths)]
        vectors = torch.cat(taken).flatten(1), tail.pathways(references).flatten(1)  # (n, R, E) -> (n, R*E)
    return [F.normalize(part.double().cpu(), dim=1).numpy() for part in vectors]


def tfidf(kind: str, *prompts):
    """Term frequency times inverse document frequency, as sparse unit vectors (n, X) and (m, X).

    prompts: (tokens, lengths) of samples, references, and a corpus that tells how rare terms are. Terms are tokens;
    with tfidf-places, tokens at their distance from the end; with tfidf-bigrams, tokens and pairs of them."""
    counts, V = [], 2**20
    for tokens, lengths in prompts:
        tokens, left = tokens.numpy(), lengths.numpy()[:, None] - np.arange(tokens.shape[1])  # (n, T) tokens to come
        terms = [tokens + V * left if kind == "tfidf-places" else tokens]
        if kind == "tfidf-bigrams":
            terms += [(tokens[:, :-1] + 1) * V + tokens[:, 1:]]
        inside = np.concatenate([left > 0, left[:, 1:] > 0][: len(terms)], 1)
        counts.append((np.nonzero(inside)[0], np.concatenate(terms, 1)[inside], len(tokens)))
    rows, terms, sizes = zip(*counts, strict=True)
    names, columns = np.unique(np.concatenate(terms), return_inverse=True)
    columns = np.split(columns, np.cumsum([len(part) for part in terms])[:-1])
    samples, references, corpus = (
        sparse.csr_array((np.ones(len(row)), (row, column)), shape=(size, len(names)))  # (n, X) how often a term is in
        for row, column, size in zip(rows, columns, sizes, strict=True)
    )
    idf = 1 + np.log((1 + sizes[2]) / (1 + (corpus > 0).sum(0)))  # (X,)
    scaled = (part.multiply(idf).tocsr() for part in (samples, references))
    return [sparse.diags_array(part.multiply(part).sum(1) ** -0.5) @ part for part in scaled]


def product(a, b):
    """All scalar products of rows (n, X) and (m, X), dense or sparse -> (n, m)."""
    found = a @ b.T
    return found.toarray() if sparse.issparse(found) else found


def kernel(name: str, distance, cosine, sigma: float | None = None):
    """Distances (n, k), infinite for nobody, and cosines (n, k) -> weights (n, k) of sum 1, or 0 where nobody is.

    Paper, section 3.2: gaussian exp(-r^2 / 2) and matern (nu = 3/2) (1 + sqrt(3) r) exp(-sqrt(3) r), r = d / sigma,
    where sigma is the median distance of the sample's neighbours, at least 1e-6; polynomial (1 + u.v)^2, linear u.v."""
    there = distance.isfinite()
    middle = distance.where(there, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(1.0)  # (n, 1)
    r = distance.where(there, 0.0) / (middle.clamp(min=1e-6) if sigma is None else max(sigma, 1e-6))
    weight = {
        "gaussian": torch.exp(-(r**2) / 2),
        "matern": (1 + 3**0.5 * r) * torch.exp(-(3**0.5) * r),
        "polynomial": (1 + cosine) ** 2,
        "linear": cosine.clamp(min=0.0),
    }[name]
    weight = (weight + TINY) * there  # TINY: where all are 0, all are alike
    return weight / weight.sum(1, keepdim=True).clamp(min=TINY)


# --------------------------------------------------------------------------------------------------------- surrogates


class Core(NamedTuple):
    """The experts of each row that may change. Their joint weight stays, and all others keep theirs each."""

    start: torch.Tensor  # (n, R, E)
    mask: torch.Tensor  # (n, R, E) bool
    mass: torch.Tensor  # (n, R, 1)

    def softmax(self, z):
        """Logits (n, R, E) -> a pathway."""
        return torch.where(self.mask, self.mass * z.masked_fill(~self.mask, -torch.inf).softmax(-1), self.start)

    def rescale(self, weights):
        """Weights (n, R, E), not negative -> a pathway."""
        inside = weights * self.mask
        total = inside.sum(-1, keepdim=True)  # (n, R, 1)
        return torch.where(self.mask & (total > 0), self.mass * inside / total.clamp(min=TINY), self.start)


def core_experts(pathway, n: int | None = None) -> Core:
    """The n most probable experts of each row of a pathway (n, R, E), or all of them (paper, section 3.5).

    >>> core_experts(torch.tensor([[[0.5, 0.1, 0.4]]]), 2).rescale(torch.tensor([[[0.2, 0.6, 0.1]]]))
    tensor([[[0.6000, 0.1000, 0.3000]]])
    """
    E = pathway.shape[-1]
    require(n is None or n <= E, f"core is {n}, but there are {E} experts")
    mask = torch.zeros_like(pathway, dtype=torch.bool).scatter(-1, pathway.topk(n or E).indices, True)
    return Core(pathway, mask, (pathway * mask).sum(-1, keepdim=True))


def neighbour_loss(tail: Tail, prefix: Prefix, owner, weight, labels, options=None):
    """L(w) = sum_i K(x_i, x) CE(f(x_i; w), y_i) / sum_i K (paper, section 3.3): a function of pathways (n, R, E), or of
    c candidates for each of the n samples (c, n, R, E), that returns losses (n,) or (c, n).

    prefix: M neighbours; owner (M,): the sample that each stands by; weight (M,), labels (M,); options (M, O): the
    tokens that the cross-entropy is over, if not all."""
    target = labels if options is None else (options == labels[:, None]).int().argmax(1)  # (M,)

    def loss(pathway):
        candidates = pathway.view(-1, *pathway.shape[-3:])  # (c, n, R, E)
        c, n, M = *candidates.shape[:2], len(owner)
        imposed = candidates.index_select(1, owner).flatten(0, 1)  # (c, M, R, E) -> (c*M, R, E)
        copies = prefix if c == 1 else Prefix(*(part.repeat(c, *[1] * (part.dim() - 1)) for part in prefix))
        logits = tail(copies, imposed)  # (c*M, V)
        logits = logits if options is None else logits.gather(1, options.repeat(c, 1))  # (c*M, O)
        each = F.cross_entropy(logits, target.repeat(c), reduction="none").view(c, M) * weight
        return each.new_zeros(c, n).index_add(1, owner, each).view(pathway.shape[:-2])

    return loss


def mode_finding(core: Core, pathways, allowed, config: RemixConfig):
    """Mean shift among the pathways (m, R, E) of the references (paper, section 3.1), allowed (n, m) -> w (n, R, E).

    w <- alpha w + (1 - alpha) sum_i K(w_i, w) w_i / sum K, over the k pathways nearest to w, step by step."""
    w, others = core.start, pathways.flatten(1)  # (m, R, E) -> (m, R*E)
    for _ in range(config.steps):
        now = w.flatten(1)  # (n, R*E)
        apart = torch.cdist(now, others, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~allowed, torch.inf)
        near, index = apart.topk(min(config.k, len(others)), largest=False)  # (n, m) -> (n, k) twice
        cosine = F.cosine_similarity(others[index], now[:, None], dim=2)  # (n, k)
        mean = torch.einsum("nk,nkre->nre", kernel(config.kernel, near, cosine, config.sigma), pathways[index])
        w = core.rescale(config.alpha * w + (1 - config.alpha) * mean)
    return w


def kernel_regression(core: Core, mean, loss, grid: int = 11):
    """Between a sample's own pathway and its neighbours' mean (n, R, E): w = a own + (1 - a) mean, at the a of a grid
    from 1 to 0 with the least neighbour loss (paper, section 3.2) -> w (n, R, E), losses before and after (n, 2)."""
    a = torch.linspace(1, 0, grid, dtype=mean.dtype, device=mean.device)[:, None, None, None]
    mixed = a[1:] * core.start + (1 - a[1:]) * mean  # (grid - 1, n, R, E)
    tried = torch.stack([core.start, *map(core.rescale, mixed)])  # (grid, n, R, E)
    losses = loss(tried)  # (grid, n), in one batch
    least, best = losses.min(0)
    return tried[best, torch.arange(len(mean))], torch.stack([losses[0], least], 1)


def ngd(core: Core, loss, config: RemixConfig):
    """Neighbourhood gradient descent (paper, section 3.3) -> the best pathway (n, R, E), losses (n, steps + 1).

    Logits keep every row a distribution; raw weights, as in the paper, are clipped at 0 and rescaled after a step."""
    if config.space == "raw":
        return descend(loss, core.start, config, then=lambda w: core.rescale(w.clamp(min=0)))
    w, losses = descend(lambda z: loss(core.softmax(z)), core.start.clamp(min=TINY).log(), config)
    return torch.where((losses[:, 1:] < losses[:, :1]).any(1)[:, None, None], core.softmax(w), core.start), losses


@torch.enable_grad()
def descend(loss, z, config: RemixConfig, then=lambda z: z):
    """Gradient descent on losses (n,) of z (n, ...), each sample on its own -> the best z, losses (n, steps + 1)."""
    best, losses, column = z, [], (-1, *[1] * (z.dim() - 1))
    for step in range(config.steps + 1):
        z = z.detach().requires_grad_()
        value = loss(z)  # (n,)
        better = value < torch.stack(losses).amin(0) if losses else torch.ones_like(value, dtype=torch.bool)
        best = torch.where(better.view(column), z.detach(), best)
        losses.append(value.detach())
        if step < config.steps:
            (g,) = torch.autograd.grad(value.sum(), z)  # samples do not depend on each other: each gets its own
            if config.rule == "normed":
                g = g / g.flatten(1).norm(dim=1).clamp(min=TINY).view(column)
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
            z = then(z - config.lr * (0.001 + 0.999 * cosine) * g)
    return best, torch.stack(losses, 1)


class RemixResult(NamedTuple):
    """What became of n samples."""

    pathway_before: torch.Tensor  # (n, R, E) the model's own
    pathway: torch.Tensor  # (n, R, E)
    logits_before: torch.Tensor  # (n, V)
    logits: torch.Tensor  # (n, V)
    losses: torch.Tensor  # (n, steps + 1), of kernel_regression (n, 2): what was minimised; of mode_finding (n, 0)
    neighbours: Neighbours | None  # none for the oracle
    hits: float  # share of the neighbours' prefixes that had been kept


def remix(model, prompts, references=None, config=None, labels=None, options=None, allowed=None, embeddings=None,
          neighbours=None, **changes) -> RemixResult:  # fmt: skip
    """Re-mix the experts of a frozen model for each of n prompts (a tensor (n, T), or lists), and let it answer.

    changes: to the config, such as method="ngd", k=3; see RemixConfig. labels (n,): for the oracle, and for it alone.
    options (n, O): for the oracle with loss "options". allowed (n, m) bool: the references that may be neighbours.
    embeddings (n, X): with embedding "own". neighbours: what `find` returned, if you have it.
    ValueError for whatever does not fit together: see `check`."""
    config = replace(config or RemixConfig(), **changes)
    tail, method = Tail(model, critical_layers(model, config.layers), config.token), config.method
    tokens, lengths = padded(prompts, model.config.vocab_size)
    check(model, references, tokens, lengths, labels, options, config)
    parts, device = [], tail.device
    with frozen(model), torch.no_grad():
        if method != "oracle":
            neighbours = neighbours or find(tail, references, tokens, lengths, config, allowed, embeddings)
            pathways, prefixes = tail.pathways(references), Prefixes(tail, references, config.max_memory * 1e6)
        for rows in tqdm(torch.arange(len(tokens)).split(config.batch), desc=method, leave=False, disable=None):
            prefix = tail.cut(tokens[rows, : int(lengths[rows].max())], lengths[rows])
            start, before = tail.base(prefix)
            core, losses = core_experts(start, config.core), start.new_zeros(len(rows), 0)
            if method == "oracle":
                chosen = torch.as_tensor(options)[rows].to(device) if config.loss == "options" else None
                each, one = torch.arange(len(rows), device=device), torch.ones(len(rows), device=device)
                loss = neighbour_loss(tail, prefix, each, one, torch.as_tensor(labels)[rows].to(device), chosen)
                w, losses = ngd(core, loss, config)
            elif method == "ngd":
                w, losses = ngd(core, nearby(tail, prefixes, neighbours, rows, config), config)
            elif method == "kernel_regression":
                near = pathways[neighbours.index[rows].clamp(min=0)]  # (n, k, R, E)
                mean = torch.einsum("nk,nkre->nre", neighbours.weight[rows].to(near), near).to(device)
                w, losses = kernel_regression(core, mean, nearby(tail, prefixes, neighbours, rows, config))
            else:
                w = mode_finding(core, pathways.to(device), neighbours.allowed[rows].to(device), config)
            parts.append([part.cpu() for part in (start, w, before, tail(prefix, w), losses)])
    hits = 0.0 if method == "oracle" else prefixes.hits / max(prefixes.asked, 1)
    return RemixResult(*map(torch.cat, zip(*parts, strict=True)), neighbours, hits)


def nearby(tail: Tail, prefixes: Prefixes, neighbours: Neighbours, rows, config: RemixConfig):
    """The neighbour loss of some of the samples."""
    index = neighbours.index[rows]  # (n, k)
    kept = (index >= 0) | (torch.arange(index.shape[1]) == 0)  # a sample with nobody keeps one of weight 0
    owner, references = kept.nonzero()[:, 0], prefixes.references
    chosen, device = index[kept].clamp(min=0), tail.device  # (M,)
    options = references.options[chosen].to(device) if config.loss == "options" else None
    parts = (owner, neighbours.weight[rows][kept], references.labels[chosen])
    return neighbour_loss(tail, prefixes(chosen.tolist()), *(part.to(device) for part in parts), options)


def check(model, references, tokens, lengths, labels, options, config: RemixConfig):
    """ValueError for labels shown to a method that may not see them, for a method without what it needs, for references
    of another model or another token, and for prompts that are references."""
    method, sizes, oracle = config.method, model.config, config.method == "oracle"
    require(oracle or labels is None, f"{method} may not see the samples' labels; only the oracle does: leave them out")
    require(labels is not None or not oracle, "the oracle needs the labels of the samples: labels, of shape (n,)")
    stuck = sizes.top_k == 1 and sizes.norm_topk and method in ("ngd", "oracle")
    mend = "take kernel_regression or mode_finding"
    require(
        not stuck, f"{method}: with top_k 1 and norm_topk the one weight is always 1, and the gradient zero; {mend}"
    )
    if oracle:
        require(len(labels) == len(tokens), f"{len(labels)} labels for {len(tokens)} prompts; expected one each")
        inside("labels", torch.as_tensor(labels), sizes.vocab_size)
        require(config.loss == "vocabulary" or options is not None, "the oracle with loss options needs options (n, O)")
        if config.loss == "options":
            among("of a prompt", torch.as_tensor(options), torch.as_tensor(labels), sizes.vocab_size)
        return
    require(references is not None, f"{method} needs references: ReferenceSet.build makes them")
    references.require_model(model)
    kind = f"the references hold pathways of the {references.token} token, the settings ask for {config.token}"
    require(references.token == config.token, f"{kind}: build them with token={config.token!r}")
    lone = config.token != "all" or bool((lengths == references.pathways.shape[1]).all())
    require(lone, f"token all needs prompts of one length, as the references', {references.pathways.shape[1]} tokens")
    there = config.loss == "vocabulary" or references.options is not None
    require(there, "loss options needs the options of the references: ReferenceSet.build(..., options=(m, O))")
    known, asked = (
        [tuple(row[:n]) for row, n in zip(rows.tolist(), sizes.tolist(), strict=True)]
        for rows, sizes in ((references.tokens, references.lengths), (tokens, lengths))
    )
    both = [i for i, overlap in enumerate(map(set(known).__contains__, asked)) if overlap]
    found = f"{len(both)} of {len(asked)} prompts are references too, such as prompt {both[:1]}"
    require(not both, f"{found}: the labels would be known; take them out of one of the two")
