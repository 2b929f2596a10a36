"""Controls: NGD without what is said to make it work, and what labels alone would do.

Each is a function (arena, **settings) -> RemixResult, as all methods are. None sees a label of the
prompts, but the oracle and
`random_wrong_label`, which say so. Letters in the shape comments: see arena.py.
"""

from dataclasses import replace

import torch

from lab.remixing.arena import Arena, joined, own_answers
from pathways import cross_entropy, frozen
from remix import NeighbourLoss, core_experts, ngd

# ---------------------------------------------------------------- NGD on a prompt's own logits


def own_loss_ngd(arena: Arena, loss_of, settings: dict):
    """NGD on a loss of the prompt's own logits, instead of its neighbours'.

    loss_of: a function of logits (b, V) and the places (b,) of their prompts -> losses (b,)."""
    config = replace(arena.config, **settings)
    tail = arena.tail_of(config)
    batches = []
    with frozen(arena.model), torch.no_grad():
        for rows, prefix, start, before in arena.batches(tail):

            def loss(pathway, prefix=prefix, rows=rows):
                return loss_of(tail(prefix, pathway), rows)

            core = core_experts(start, config.core)
            with torch.enable_grad():
                pathway = ngd(core, loss, None, config)
            batches.append((start, pathway, before, tail(prefix, pathway)))
    return joined(batches)


def towards(arena: Arena, labels, settings: dict):
    """NGD towards a label (n,) of each prompt."""
    within_options = replace(arena.config, **settings).loss == "options"

    def loss_of(logits, rows):
        options = arena.options[rows] if within_options else None  # (b, O)
        return cross_entropy(logits, labels[rows], options)

    return own_loss_ngd(arena, loss_of, settings)


def oracle(arena: Arena, **settings):
    """NGD towards the true label of each prompt: the headroom, not a method."""
    return towards(arena, arena.labels, settings)


def random_wrong_label(arena: Arena, **settings):
    """NGD towards a random wrong label: can steps force just any answer?

    It is no null of the oracle, since such a label is improbable beforehand; see reach.py."""
    return towards(arena, wrong_labels(arena), settings)


def wrong_labels(arena: Arena):
    """A random wrong label (n,) for each prompt, of its options or of all that references have."""
    labels = arena.labels
    choices = arena.options  # (n, O)
    if choices is None:
        choices = arena.references.labels.unique().expand(len(labels), -1)
    chance = (choices != labels[:, None]).float()
    drawn = torch.multinomial(chance, 1, generator=arena.random())  # (n, 1)
    return choices.gather(1, drawn)[:, 0]


def entropy(arena: Arena, **settings):
    """NGD on the entropy of the prompt's own prediction, without any references."""

    def loss_of(logits, rows):
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)  # (b, V) -> (b,)

    return own_loss_ngd(arena, loss_of, settings)


# -------------------------------------------------------------------------- other neighbours


def random_neighbours(arena: Arena, **settings):
    """NGD with neighbours drawn at random, weighted as the true ones are."""
    near = arena.neighbours
    k = near.index.shape[1]
    index = torch.multinomial(near.usable.float(), k, generator=arena.random())  # (n, k)
    return arena.remix(near._replace(index=index), **settings)


def shuffled_labels(arena: Arena, **settings):
    """NGD with the labels of the usable references shuffled among them, with their options."""
    references = arena.references
    usable = references.correct.nonzero()[:, 0]
    order = torch.arange(len(references.labels))
    order[usable] = usable[torch.randperm(len(usable), generator=arena.random())]
    options = references.options
    changes = {"labels": references.labels[order]}
    changes["options"] = None if options is None else options[order]
    return arena.remix(arena.neighbours, replace(references, **changes), **settings)


def unfiltered(arena: Arena, **settings):
    """NGD with references whether or not the model answers them right."""
    everyone = torch.ones_like(arena.references.correct)
    references = replace(arena.references, correct=everyone)
    return arena.remix(references=references, **settings)


def knn_vote(arena: Arena, k: int = 3):
    """The neighbours' labels, weighed by the kernel. The model is not asked."""
    near = arena.find(k=k)
    base = own_answers(arena)
    labels = arena.references.labels[near.index]  # (n, k)
    votes = torch.zeros(base.logits.shape).scatter_add_(1, labels, near.weight)
    return base._replace(logits=votes)


# ----------------------------------------------------------------------------- random routes


def best_route(arena: Arena, noise: float = 1.0, routes: int = 21, **settings):
    """Of `routes` noisy pathways, the first without noise, the one with the least neighbour loss.

    A search without gradients, of equal compute: ten steps forward and back cost about as much as
    21 forward."""
    config = replace(arena.config, **settings)
    tail = arena.tail_of(config)
    generator = arena.random()
    batches = []
    with frozen(arena.model), torch.no_grad():
        for rows, prefix, start, before in arena.batches(tail):
            # Draw pathways; the first is the model's own.
            moved = noise * torch.randn(routes, *start.shape, generator=generator)
            moved[0] = 0
            tried = (start.log() + moved.to(start.device)).softmax(-1)  # (routes, b, R, E)

            # Keep the best of them.
            near = arena.neighbours.of(rows, tail.device)
            loss = NeighbourLoss(tail, near, arena.references, config)
            losses = torch.stack([loss(pathway) for pathway in tried])  # (routes, b)
            pathway = tried[losses.argmin(0), torch.arange(len(rows), device=start.device)]
            batches.append((start, pathway, before, tail(prefix, pathway)))
    return joined(batches)


def noisy_ensemble(arena: Arena, noise: float = 0.3, routes: int = 21):
    """The mean prediction along `routes` noisy pathways (RoE, arXiv 2509.17238); no references."""
    generator = arena.random()
    batches = []
    with frozen(arena.model), torch.no_grad():
        for _, prefix, start, before in arena.batches(arena.tail):
            moved = noise * torch.randn(routes, *start.shape, generator=generator)
            tried = (start.log() + moved.to(start.device)).softmax(-1)  # (routes, b, R, E)
            probs = [arena.tail(prefix, pathway).softmax(-1) for pathway in tried]
            mean = torch.stack(probs).mean(0)  # (b, V)
            batches.append((start, start, before, mean.log()))
    return joined(batches)
