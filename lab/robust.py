"""What a model loses where its routing goes wrong."""

import math
from contextlib import contextmanager

import numpy as np
import torch

from cartesian import TopPRouter
from lab import cli
from lab.tasks import evaluate, passes
from moe import MoE, Router, require


@contextmanager
def disturbed(routers: list[Router], change):
    """As long as it lasts, these routers choose by change(probs, k) instead of probs (N, E); k (N, 1): how many experts
    a token would visit. Yields a list that gets, for each pass through one of them, two shares that are lost: of the
    experts that it would choose, and of their mass."""
    lost = []

    def disturb(select):
        def choose(probs):
            true = chosen(probs, *select(probs))  # (N, E)
            found = select(change(probs, true.sum(1, keepdim=True)))
            gone = true * (1 - chosen(probs, *found))
            lost.append([(gone.sum() / true.sum()).item(), ((gone * probs).sum() / (true * probs).sum()).item()])
            return found

        return choose

    for router in routers:
        router.select = disturb(router.select)
    try:
        yield lost
    finally:
        for router in routers:
            del router.select  # the method of its class is back


def chosen(probs, weights, experts):
    """What a router selected, weights and experts (N, K) -> (N, E): 1 where a token goes, at a weight above 0."""
    return torch.zeros_like(probs).scatter_add(1, experts, (weights > 0).to(probs)).clamp(max=1)


def without(n: float = 0.0, share: float = 0.0, rescaled=False):
    """Disables each token's n + share * k most probable experts; 1.25: one, and for a quarter of the tokens two.
    rescaled: the probabilities of the others grow to a sum of 1, as if disabled before the softmax."""
    generator = torch.Generator().manual_seed(0)

    def change(probs, k):
        number = n + share * k.cpu()  # (N, 1)
        number = number.floor() + (torch.rand(number.shape, generator=generator) < number % 1)
        rank = probs.argsort(1, descending=True).argsort(1)  # (N, E)
        left = probs.masked_fill(rank < number.to(probs), 0.0)
        return left / left.sum(1, keepdim=True) if rescaled else left

    return change


def noise(std: float):
    """Adds normal noise to the logits of a router."""
    generator = torch.Generator().manual_seed(0)
    return lambda probs, k: (probs.log() + std * torch.randn(probs.shape, generator=generator).to(probs)).softmax(-1)


def protocols(model) -> dict:
    """Name -> (routers, change). ValueError for a model without routers, or whose routers choose all experts.

    top-1 is the paper's (Table 4): each token's first choice is disabled at every router, and the next k are taken. We
    leave the others their probabilities; "rescaled" is the other reading. A, B: only at that router of each block.
    A quarter, a half: so many of the experts that a token visits, whatever k is. q: top-1 with this probability.
    """
    layers = [[module for module in block.modules() if isinstance(module, Router)] for block in model.blocks]
    layers = {i: routers for i, routers in enumerate(layers) if routers}
    every, E = model.routers(), model.config.n_experts
    require(len(every) > 0, "no router can go wrong here: the model is dense, or its routing is fixed (hash)")
    k, first = every[0].top_k, min(layers)
    varies = isinstance(every[0], TopPRouter)
    require(k < E or varies, f"each token visits all {E} experts: none is left to take the place of a disabled one")
    found = {"intact": ([], None), "top-1": (every, without(1)), "rescaled": (every, without(1, rescaled=True))}
    if len(every) > len(layers):
        found |= {name: ([routers[i] for routers in layers.values()], without(1)) for i, name in enumerate("AB")}
    if k + k / 2 <= E or varies:
        found |= {"a quarter": (every, without(share=1 / 4)), "a half": (every, without(share=1 / 2))}
    found |= {f"layer {i}": (routers, without(1)) for i, routers in layers.items()}
    found |= {f"not {first}": ([router for router in every if router not in layers[first]], without(1))}
    found |= {f"q = {q}": (every, without(q)) for q in (0.25, 0.5, 0.75)}
    return found | {f"noise {std}": (every, noise(std)) for std in (0.25, 0.5, 1.0, 2.0)}


def robustness(model, data, split: str = "test", most: int | None = 128) -> dict[str, dict]:
    """Loss and perplexity under each protocol, and the shares of chosen experts, and of their mass, that it takes."""
    rows = {}
    for name, (routers, change) in protocols(model).items():
        with disturbed(routers, change) as lost:
            loss = evaluate(model, data, split, most)["loss"]
        part = len(routers) / len(model.routers())
        experts, mass = part * np.mean(lost, axis=0) if lost else (0.0, 0.0)
        rows[name] = {"loss": loss, "perplexity": math.exp(loss), "experts": float(experts), "mass": float(mass)}
    return rows


def at_mass(rows: dict[str, dict], mass: float) -> float:
    """The loss where so much of the routing mass is lost, between the points of q from 0 (intact) to 1 (top-1)."""
    points = [row for name, row in rows.items() if name in ("intact", "top-1") or name[0] == "q"]
    return float(np.interp(mass, *zip(*sorted((row["mass"], row["loss"]) for row in points), strict=True)))


def robustness_table(rows: dict[str, dict]) -> str:
    """A line for each protocol."""
    shares = ("experts", "mass")
    lines = [(name, f"{row['perplexity']:.2f}", *(f"{row[x]:.1%}" for x in shares)) for name, row in rows.items()]
    return cli.table(lines, header=["disabled", "perplexity", "experts lost", "routing mass lost"])


def activated(model, data) -> float:
    """The parameters that a token uses, in the mean: with a top-p router a matter of data, here of the dev split."""
    if not any(isinstance(router, TopPRouter) for router in model.routers()):
        return model.n_params(activated=True)
    used = []  # a row for each pass: the experts that a token visits, in the mean, at each router
    for *_, out in passes(model, data.held_out("dev")[0]):
        used.append([(routing.weights > 0).sum(1).double().mean().item() for routing in out.routing])
    size = [sum(p[0].numel() for p in m.experts.parameters()) for m in model.modules() if isinstance(m, MoE)]
    return model.n_params() - float((model.config.n_experts - np.mean(used, axis=0)) @ size)
