"""Rivals: other ways to use the same references, and a larger model that has none.

Each is a function (arena, **settings) -> RemixResult, as all methods are. Letters in the shape
comments: see arena.py.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lab.remixing.arena import Arena, Outcome, own_answers
from lab.tools import runs
from lab.tools.checks import progress
from lab.tools.cli import note
from moe import Cache, Router, require
from pathways import Tail, cross_entropy, find_neighbours, frozen, padded, portions
from pathways.checks import as_tuples
from pathways.prompts import trimmed

STEPS = 100  # of training, unless a method was tuned to others


def in_context(arena: Arena, k: int = 3):
    """The k nearest neighbours with their answers before the prompt, the nearest last.

    Neighbours that do not fit into the context are left out, the farthest first."""
    references = arena.references
    near = arena.find(k=k)

    # Every prompt behind its solved neighbours.
    known = as_tuples(references.tokens, references.lengths)
    prompts, n_left_out, n_alone = [], 0, 0
    context = arena.model.config.context
    for i, row in enumerate(as_tuples(arena.tokens, arena.lengths)):
        prompt = list(row)
        neighbours = near.index[i][near.weight[i] > 0].tolist()  # the nearest first
        for n_placed, j in enumerate(neighbours):
            example = [*known[j], int(references.labels[j])]
            if len(example) + len(prompt) > context:
                n_left_out += len(neighbours) - n_placed
                break
            prompt = example + prompt
        n_alone += len(prompt) == len(row)
        prompts.append(prompt)
    if n_left_out:
        text = f"{n_left_out:,} neighbours do not fit into a context of {context} tokens"
        note(f"in-context: {text}, {n_alone:,} of {len(prompts):,} prompts stand alone")

    # What the model answers.
    tokens, lengths = padded(prompts, arena.model.config.vocab_size)
    tail = arena.tail
    with frozen(arena.model), torch.no_grad():
        logits = [tail(tail.cut(*portion)) for portion in portions(tokens, lengths)]
    return own_answers(arena)._replace(logits=torch.cat(logits).cpu())


# -------------------------------------------------- something before each prompt, by descent


@torch.enable_grad()
def descend(loss, start, config, normed=True, project=None):
    """Gradient descent by the steps of NGD, on anything that a prompt may have of its own.

    loss: a function of values (n, ...) -> losses (n,). normed: a step is lr * g / |g|; else lr * g.
    project: what is done to the values after a step. Returns the best values that it met."""
    shape = start.shape
    values = best = start.flatten(1)  # (n, ...) -> (n, X)
    least = start.new_full((len(start),), torch.inf)
    for step in range(config.steps + 1):
        values = values.detach().requires_grad_()
        losses = loss(values.view(shape))  # (n,)

        # Keep what is better than all before.
        better = losses.detach() < least
        best = torch.where(better[:, None], values.detach(), best)
        least = torch.minimum(least, losses.detach())
        if step == config.steps:
            return best.view(shape)

        # Step down the gradient of each prompt's own loss.
        (gradient,) = torch.autograd.grad(losses.sum(), values)
        if normed:
            gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-20)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
        values = values - config.lr * (0.001 + 0.999 * cosine) * gradient
        if project is not None:
            values = project(values.view(shape)).flatten(1)


class Front(NamedTuple):
    """Something that stands before a prompt."""

    start: torch.Tensor  # (1, ...) where descent begins
    answer: Callable  # (fronts (n, ...), tokens, lengths) -> logits (n, V)


def soft_prompt(model, length: int) -> Front:
    """Embeddings before the prompt (Lester et al., arXiv 2104.08691)."""

    def answer(soft, tokens, lengths):
        tokens, valid = on_device(soft.device, tokens, lengths)
        x = torch.cat([soft, model.embed(tokens)], 1)  # (n, length + T, D)
        valid = torch.cat([valid.new_ones(len(soft), length), valid], 1)
        return last_logits(model, model.run_blocks(x, valid), valid)

    return Front(mean_embedding(model, length), answer)


def prefix_tuning(model, length: int) -> Front:
    """Keys and values before the prompt, in every layer (Li and Liang, arXiv 2101.00190)."""

    def answer(prefix, tokens, lengths):
        keys, values = prefix.unbind(1)  # (n, 2, L, G, length, C) -> (n, L, G, length, C) twice
        cache = Cache(
            dict(enumerate(keys.unbind(1))),
            dict(enumerate(values.unbind(1))),
            torch.ones(len(prefix), length, dtype=torch.bool, device=prefix.device),
        )
        tokens, valid = on_device(prefix.device, tokens, lengths)
        x = model.run_blocks(model.embed(tokens), valid, cache, write=False)
        return last_logits(model, x, valid)

    # The start: keys and values of the soft prompt's start.
    cache = Cache()
    with frozen(model), torch.no_grad():
        model.run_blocks(mean_embedding(model, length), cache=cache)
    keys = torch.stack(list(cache.keys.values()), 1)  # (1, L, G, length, C)
    values = torch.stack(list(cache.values.values()), 1)
    return Front(torch.stack([keys, values], 1), answer)


def mean_embedding(model, length: int):
    """Where soft prompts start: the mean of all embeddings, (1, length, D)."""
    mean = model.embedding.weight.detach().mean(0) * model.config.embedding_scale  # (D,)
    return mean.expand(1, length, -1)


def on_device(device, tokens, lengths):
    """Prompts (n, T) on a device, and where they have tokens (n, T)."""
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens.to(device), valid.to(device)


def last_logits(model, x, valid):
    """The logits (n, V) at each prompt's last token, of x (n, T, D)."""
    return model.head(x[torch.arange(len(x), device=x.device), valid.sum(1) - 1])


def for_each(arena: Arena, kind: Callable, length: int = 1, **settings):
    """A front for each prompt, fitted to its neighbours by the loss and the steps of NGD.

    The paper has no such rival. kind: `soft_prompt` or `prefix_tuning`."""
    model, references, neighbours = arena.model, arena.references, arena.neighbours
    config = replace(arena.config, **settings)
    start, answer = kind(model, length)
    logits = []
    with frozen(model), torch.no_grad():
        for rows in torch.arange(len(arena.tokens)).split(config.batch):
            weight = neighbours.weight[rows].to(start.device)  # (b, k)
            index = neighbours.index[rows].flatten()  # (b*k,)
            labels = references.labels[index]
            solved = trimmed(references.tokens, references.lengths, index)

            def loss(fronts, weight=weight, labels=labels, solved=solved):
                fronts = fronts.repeat_interleave(weight.shape[1], 0)  # (b, ...) -> (b*k, ...)
                nats = cross_entropy(answer(fronts, *solved), labels)
                return (weight * nats.view(weight.shape)).sum(1)  # (b,)

            fronts = descend(loss, start.expand(len(rows), *start.shape[1:]), config)
            logits.append(answer(fronts, *trimmed(arena.tokens, arena.lengths, rows)))
    return own_answers(arena)._replace(logits=torch.cat(logits).cpu())


def for_all(arena: Arena, kind: Callable, length: int = 1, lr=1e-2, steps=STEPS, batch=64):
    """One front for all prompts, fitted to all usable references: the paper's own rival.

    kind: `soft_prompt` or `prefix_tuning`."""
    references = arena.references
    usable = references.correct.nonzero()[:, 0]
    start, answer = kind(arena.model, length)
    front = start.clone().requires_grad_()

    def answers(tokens, lengths):
        return answer(front.expand(len(tokens), *front.shape[1:]), tokens, lengths)

    def loss(pick):
        rows = usable[pick]
        solved = trimmed(references.tokens, references.lengths, rows)
        return cross_entropy(answers(*solved), references.labels[rows]).mean()

    with frozen(arena.model):
        train_weights([front], loss, len(usable), arena.random(), lr, steps, batch)
        with torch.no_grad():
            asked = portions(arena.tokens, arena.lengths)
            logits = [answers(*portion) for portion in asked]
    return own_answers(arena)._replace(logits=torch.cat(logits).cpu())


def train_weights(weights, loss: Callable, m: int, generator, lr: float, steps: int, batch: int):
    """Train weights by AdamW on some of m references at a time, drawn at random.

    loss: the mean loss of those at some places (batch,)."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step in progress(range(steps), "training"):
        pick = torch.randint(m, (batch,), generator=generator)
        loss(pick).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)  # shorter every time
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- other weights, for all prompts


def router_tuning(arena: Arena, **settings):
    """The routers' weights fitted to the references."""
    return answers_of(arena, tuned_model(arena, only_routers=True, **settings))


def full_fine_tuning(arena: Arena, **settings):
    """All weights fitted to the references."""
    return answers_of(arena, tuned_model(arena, only_routers=False, **settings))


def answers_of(arena: Arena, model):
    """What another model answers, beside the arena's own."""
    before, after = own_answers(arena), own_answers(arena, model)
    return after._replace(pathway_before=before.pathway, logits_before=before.logits)


def tuned_model(arena: Arena, only_routers, lr=1e-3, steps=STEPS, batch=64, pull=0.0):
    """A copy of the model, fitted to all usable references at once.

    pull: the weight of RoMA's regulariser (arXiv 2511.07419), the squared distance between a
    reference's pathway and those of its neighbours, as they were, weighed by the kernel."""
    references = arena.references
    usable = references.correct.nonzero()[:, 0]
    near = neighbours_of_references(arena, usable) if pull else None

    # What is trained.
    model = copy.deepcopy(arena.model).requires_grad_(not only_routers)
    for module in model.modules():
        if isinstance(module, Router):
            module.requires_grad_(True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    tail = Tail(model, token=references.token)

    def loss(pick):
        # How badly these references are answered.
        rows = usable[pick]
        prompts = trimmed(references.tokens, references.lengths, rows)
        pathway, logits = tail.own(tail.cut(*prompts))
        nats = cross_entropy(logits, references.labels[rows]).mean()
        if not pull:
            return nats

        # How far their pathways are from those of their neighbours.
        pathways = references.pathways[near.index[pick]].to(pathway.device)  # (b, k, 1, R, E)
        difference = pathway[:, None] - pathways.flatten(2, 3)  # (b, k, R, E)
        distance = difference.square().sum((2, 3))  # (b, k)
        weight = near.weight[pick].to(pathway.device)
        return nats + pull * (weight * distance).sum(1).mean()

    train_weights(weights, loss, len(usable), arena.random(), lr, steps, batch)
    return model


def neighbours_of_references(arena: Arena, usable):
    """The neighbours of the usable references among all of them, none its own."""
    references, n = arena.references, len(usable)
    allowed = torch.ones(n, len(references.labels), dtype=torch.bool)
    allowed[torch.arange(n), usable] = False
    prompts = references.tokens[usable], references.lengths[usable]
    with frozen(arena.model), torch.no_grad():
        return find_neighbours(arena.tail, references, *prompts, arena.config, allowed)


def larger_model(arena: Arena, folder: Path) -> Outcome:
    """How another run's model does by itself. ValueError: a run of another seed."""
    model, train = runs.load_run(folder)
    seed = train["seed"]
    require(
        seed == arena.seed and train["content"] in ({}, arena.content),
        f"{folder} has seed {seed}, the run beside it {arena.seed}: they learnt different tasks",
    )
    start = time.process_time()
    with torch.no_grad():
        answer = model(arena.tokens).logits[:, -1].argmax(-1)  # (n, T, V) -> (n,)
    seconds = time.process_time() - start
    unchanged = np.zeros(len(answer), bool)
    return Outcome(answer.numpy(), (answer == arena.labels).numpy(), unchanged, seconds)
