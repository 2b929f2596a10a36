"""C3PO (arXiv 2504.07964): at test time, re-mix the experts of a frozen model for every prompt.

A router sends a token to its experts by a row of probabilities. The rows of all routers at the last
token of a prompt are its *pathway* w, a matrix (R routers, E experts). C3PO changes w until similar
prompts whose answers are known, the *references*, are answered well along it. No weight changes.

    references = ReferenceSet.build(model, solved_prompts, labels)
    result = remix(model, prompts, references)      # result.logits, .pathway, .neighbours
    print(result.explain(0))                        # what became of the first prompt, in words

This file is the algorithm, from top to bottom: what may change (`core_experts`), what is minimised
(`NeighbourLoss`), three ways to do it, and `remix`, which is all of it together. It stands on
pathways/: `Tail` runs a model along a pathway, one token at a time; `critical_layers` says which
rows may change; `ReferenceSet` keeps labelled prompts and their pathways; `find_neighbours` says
which of them are like a prompt, and how much each counts.

Letters in the shape comments, beside those of moe.py:
    n prompts    m references    k neighbours    R rows of a pathway, one for each critical router
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F

from lab.tools.checks import annotated, progress, torch_defaults
from lab.tools.configs import KERNELS, require_remixing
from moe import unwrapped
from pathways import checks
from pathways.explain import RemixResult
from pathways.neighbours import TINY, Neighbours, find_neighbours, kernel
from pathways.prompts import cross_entropy, padded, trimmed
from pathways.references import ReferenceSet
from pathways.tail import Prefix, Tail, critical_layers, frozen


@dataclass
class RemixConfig:
    """How to re-mix. The paper's settings for OLMoE are layers last:5, core 20, k 3."""

    method: Annotated[str | Callable, "ngd, kernel_regression, mode_finding, a function"] = "ngd"
    k: Annotated[int, "neighbours of each prompt"] = 3
    kernel: Annotated[Literal[KERNELS], "how much each of them counts"] = "gaussian"
    embedding: Annotated[str, "what makes prompts alike"] = "tfidf-places"
    layers: Annotated[str, "critical layers: all, last:2, first:1, middle:2, or 0,3"] = "all"
    core: Annotated[int | None, "experts of a row that may change (none: all)"] = None
    steps: Annotated[int, "steps of ngd and of mode_finding"] = 10
    lr: Annotated[float, "ngd: the first step; a cosine takes it down to a thousandth"] = 0.5
    alpha: Annotated[float, "mode_finding: what is kept of the pathway in a step"] = 0.5
    loss: Annotated[Literal["vocabulary", "options"], "cross-entropy over these"] = "vocabulary"
    batch: Annotated[int, "prompts at a time"] = 64
    max_memory: Annotated[float, "MB for the references' prefixes that are kept"] = 512.0

    def __post_init__(self):
        require_remixing(self)


# ------------------------------------------------------------------------------ 1. what may change


class Core(NamedTuple):
    """The entries of a pathway that may change.

    In every row they keep the sum that they had together, and all others stay as they are.
    """

    start: torch.Tensor  # (n, R, E) the model's own pathway
    mask: torch.Tensor  # (n, R, E) bool, true where an expert is core
    mass: torch.Tensor  # (n, R, 1) what the core experts of a row weigh together

    def softmax(self, z):
        """Logits z (n, R, E), any numbers -> a pathway."""
        inside = self.mass * z.masked_fill(~self.mask, -torch.inf).softmax(-1)
        return torch.where(self.mask, inside, self.start)

    def rescale(self, weights):
        """Weights (n, R, E), not negative -> a pathway. A row of core weights 0 stays."""
        inside = weights * self.mask
        total = inside.sum(-1, keepdim=True)  # (n, R, 1)
        inside = self.mass * inside / total.clamp(min=TINY)
        return torch.where(self.mask & (total > 0), inside, self.start)


@annotated
def core_experts(pathway: torch.Tensor, n_core: int | None = None) -> Core:
    """The most probable experts of every row of a pathway (n, R, E), or all (section 3.5).

    >>> core = core_experts(torch.tensor([[[0.5, 0.1, 0.4]]]), 2)
    >>> core.rescale(torch.tensor([[[0.2, 0.6, 0.1]]]))
    tensor([[[0.6000, 0.1000, 0.3000]]])
    """
    n_core = pathway.shape[-1] if n_core is None else n_core
    checks.require_core(pathway, n_core)
    top = pathway.topk(n_core).indices  # (n, R, n_core)
    mask = torch.zeros_like(pathway, dtype=torch.bool).scatter(-1, top, True)
    mass = (pathway * mask).sum(-1, keepdim=True)
    return Core(pathway, mask, mass)


# ---------------------------------------------------------------------------- 2. what is minimised


class NeighbourLoss:
    """L(w) = sum_i K(x_i, x) CE(f(x_i; w), y_i) / sum_i K(x_i, x): each prompt's pathway w, imposed
    on its k neighbours x_i, whose answers y_i are known (section 3.1).

    A function of pathways (n, R, E), with losses (n,), in nats. It remembers its values.
    """

    def __init__(self, tail: Tail, near: Neighbours, references: ReferenceSet, config: RemixConfig):
        self.tail = tail
        self.weight = near.weight  # (n, k)
        self.index = near.index.flatten().cpu()  # (n*k,)
        self.labels = references.labels[self.index].to(tail.device)
        self.options = None  # all of the vocabulary
        if config.loss == "options":
            self.options = references.options[self.index].to(tail.device)  # (n*k, O)
        self.prefixes = references.prefixes(tail, config.max_memory)
        self.prefix = None  # of the n*k neighbours, made when it is first needed
        self.values = []  # every loss (n,) so far

    def __call__(self, w):
        if self.prefix is None:
            self.prefix = self.prefixes(self.index)
        n, k = self.weight.shape
        w = w.repeat_interleave(k, 0)  # (n, R, E) -> (n*k, R, E)
        logits = self.tail(self.prefix, w)  # (n*k, V)
        nats = cross_entropy(logits, self.labels, self.options)  # (n*k,)
        loss = (self.weight * nats.view(n, k)).sum(1)
        self.values.append(loss.detach())
        return loss

    def history(self):
        """All losses so far, (n, calls)."""
        columns = [value[:, None] for value in self.values]  # (n, 1) each
        return torch.cat([self.weight[:, :0], *columns], 1)


# ----------------------------------------------------------------------------- 3. three surrogates
# Each is a function (core, loss, near, config) -> pathway (n, R, E); so is one of your own.


def log(pathway):
    """The logits of a pathway."""
    return pathway.clamp(min=TINY).log()


def ngd(core: Core, loss, near: Neighbours, config: RemixConfig):
    """Neighbourhood gradient descent (section 3.1): follow the gradient of the neighbour loss.

    It moves logits z, with w = softmax(z), so that every row stays a distribution. The best pathway
    on the way is returned (the paper: the last one).
    """
    z = log(core.start).requires_grad_()
    best, value = core.start, loss(core.softmax(z))
    least = value.detach()  # (n,)
    for step in range(config.steps):
        # Prompts do not depend on each other: the gradient of the sum holds that of each.
        (gradient,) = torch.autograd.grad(value.sum(), z)
        length = gradient.flatten(1).norm(dim=1).clamp(min=TINY)  # (n,)
        gradient = gradient / length[:, None, None]

        # A step of a given length along it, shorter every time.
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
        rate = config.lr * (0.001 + 0.999 * cosine)
        z = (z - rate * gradient).detach().requires_grad_()

        # Keep the best pathway so far.
        w = core.softmax(z)
        value = loss(w)
        best = torch.where((value < least)[:, None, None], w, best).detach()
        least = torch.minimum(value, least).detach()
    return best


def kernel_regression(core: Core, loss, near: Neighbours, config: RemixConfig):
    """The neighbours' mean pathway, mixed with the own one (section 3.2).

    Of eleven mixtures, w = (1 - share) own + share mean, the one with the least neighbour loss.
    """
    mean = torch.einsum("nk,nkre->nre", near.weight, near.pathways[near.index])
    best, least = core.start, loss(core.start)
    for share in [tenths / 10 for tenths in range(1, 11)]:
        w = core.rescale((1 - share) * core.start + share * mean)
        value = loss(w)  # (n,)
        best = torch.where((value < least)[:, None, None], w, best)
        least = torch.minimum(value, least)
    return best


def mode_finding(core: Core, loss, near: Neighbours, config: RemixConfig):
    """Mean shift (section 3.3): walk to where the references' pathways are dense. No loss is asked.

    w <- alpha w + (1 - alpha) sum_i K(w_i, w) w_i / sum_i K, over the k pathways nearest to w.
    """
    w = core.start
    others = near.pathways.flatten(1)  # (m, R, E) -> (m, R*E)
    for _ in range(config.steps):
        # The k pathways nearest to where we stand now.
        here = w.flatten(1)  # (n, R*E)
        distance = torch.cdist(here, others, compute_mode="donot_use_mm_for_euclid_dist")  # (n, m)
        distance = distance.masked_fill(~near.usable, torch.inf)
        distance, index = distance.topk(config.k, largest=False)  # (n, k)

        # Their mean, the near ones counting more, and a step towards it.
        cosine = F.cosine_similarity(others[index], here[:, None], dim=2)  # (n, k)
        weight = kernel(config.kernel, distance, cosine)
        mean = torch.einsum("nk,nkre->nre", weight, near.pathways[index])
        w = core.rescale(config.alpha * w + (1 - config.alpha) * mean)
    return w


SURROGATES = {"ngd": ngd, "kernel_regression": kernel_regression, "mode_finding": mode_finding}


# ---------------------------------------------------------------------------------------- 4. remix


@annotated
@torch_defaults()
def remix(
    model,
    prompts: Iterable,
    references: ReferenceSet,
    config: RemixConfig | None = None,
    allowed: torch.Tensor | None = None,
    embeddings=None,
    neighbours: Neighbours | None = None,
    prefixes: list[Prefix] | None = None,
    **changes,
) -> RemixResult:
    """Re-mix the experts for each of n prompts, a tensor (n, T) or lists, and let the model answer.

    changes: to the config, such as k=5, or method=my_surrogate. allowed, embeddings: see
    `find_neighbours`. neighbours, and a prefix for each batch: if you have them already.
    ValueError for what does not fit together.
    """
    model = unwrapped(model)
    config = replace(config or RemixConfig(), **changes)
    surrogate = SURROGATES.get(config.method, config.method)
    tokens, lengths = padded(prompts, model.config.vocab_size)
    checks.require_remixable(model, references, tokens, lengths, config.loss)
    if surrogate is ngd:
        checks.require_gradient(model)
    tail = Tail(model, critical_layers(model, config.layers), references.token)
    results = []
    with frozen(model), torch.no_grad():
        if neighbours is None:
            about = references, tokens, lengths, config, allowed, embeddings
            neighbours = find_neighbours(tail, *about)
        else:
            checks.require_neighbours(neighbours, tail, references, tokens, lengths)
        batches = torch.arange(len(tokens)).split(config.batch)
        for i, rows in enumerate(progress(batches, "re-mixing")):
            # The model's own pathways and answers.
            prefix = prefixes[i] if prefixes else tail.cut(*trimmed(tokens, lengths, rows))
            own, logits_before = tail.own(prefix)
            # Another pathway, and the answers along it.
            core = core_experts(own, config.core)
            near = neighbours.of(rows, tail.device)
            loss = NeighbourLoss(tail, near, references, config)
            with torch.enable_grad():
                w = surrogate(core, loss, near, config)
            checks.require_moved(w, own, config)
            logits = tail(prefix, w)
            results.append((own, w.detach(), logits_before, logits, loss.history()))
    columns = [torch.cat(column).cpu() for column in zip(*results, strict=True)]
    return RemixResult(*columns, neighbours, references)
