"""What a model loses where its routing goes wrong."""

import string
from contextlib import contextmanager

import numpy as np
import torch

from data import passes, perplexity
from lab.composing.layers import TopPRouter
from lab.scores.evaluation import routers_by_layer
from lab.tools import cli
from moe import MoE, Router, require

# ---- routing that goes wrong


@contextmanager
def disturbed(routers: list[Router], change):
    """As long as it lasts, these routers choose by other probabilities.

    change(probs (N, E), k (N, 1)) -> probs (N, E), where k is how many experts a token would visit.
    Yields a list that gets two shares for each pass through one of the routers: of the experts that
    tokens would visit, those that they lose; and the routing mass that these would have.
    """
    lost = []
    for router in routers:
        router.select = disturbed_select(router.select, change, lost)
    try:
        yield lost
    finally:
        for router in routers:
            del router.select  # the method of its class is back


def disturbed_select(select, change, lost: list):
    """The function that takes the place of a router's `select`."""

    def select_disturbed(probs):
        # Choose by the probabilities as they are, then by the changed ones.
        intact = visited(probs, *select(probs))  # (N, E)
        n_visits = intact.sum(1, keepdim=True)  # (N, 1)
        weights, experts = select(change(probs, n_visits))

        # What do tokens lose, in experts and in routing mass?
        gone = intact * (1 - visited(probs, weights, experts))
        experts_lost = gone.sum() / intact.sum()
        mass_lost = (gone * probs).sum() / (intact * probs).sum()
        lost.append([experts_lost.item(), mass_lost.item()])
        return weights, experts

    return select_disturbed


def visited(probs, weights, experts):
    """What a router selected, weights and experts (N, K) -> (N, E), 1 where a token goes.

    A slot of weight 0 is no visit.
    """
    visits = (weights > 0).to(probs)  # (N, K)
    return torch.zeros_like(probs).scatter_add(1, experts, visits).clamp(max=1)


def without_best(n: float = 0.0, share: float = 0.0, rescaled: bool = False):
    """A change for `disturbed`: disable the n + share * k most probable experts of each token.

    A broken number such as 1.25 disables one, and a second one for a quarter of the tokens.
    rescaled: the other probabilities grow to a sum of 1, as if disabled before the softmax.
    """
    generator = torch.Generator().manual_seed(0)

    def change(probs, k):
        # How many experts each token loses: a broken number is rounded up or down at random.
        number = n + share * k.cpu()  # (N, 1)
        one_more = torch.rand(number.shape, generator=generator) < number % 1
        number = number.floor() + one_more

        # Disable so many of the most probable.
        rank = probs.argsort(1, descending=True).argsort(1)  # (N, E), 0: the most probable
        remaining = probs.masked_fill(rank < number.to(probs), 0.0)
        if rescaled:
            remaining = remaining / remaining.sum(1, keepdim=True)
        return remaining

    return change


def with_noise(std: float):
    """A change for `disturbed`: add normal noise to the logits."""
    generator = torch.Generator().manual_seed(0)

    def change(probs, k):
        normal = torch.randn(probs.shape, generator=generator).to(probs)
        return (probs.log() + std * normal).softmax(-1)

    return change


# ---- the protocols


def protocols(model) -> dict:
    """Name of a protocol -> (routers, change) for `disturbed`.

    intact      no change
    top-1       the paper's Table 4, as we read it: at every router each token's first choice is
                disabled, and the next k are taken; the others keep their probabilities
    rescaled    the other reading of it: the others grow to a sum of 1
    A, B        top-1 at that router of each block only
    a quarter   of the experts that a token visits, whatever k is, the best; likewise a half
    layer 2     top-1 in that layer only; not 0: in all but that layer
    q = 0.5     top-1 with this probability
    noise 0.5   normal noise of that deviation on all logits

    ValueError for a model without routers, or whose routers choose all experts.
    """
    every = model.routers()
    require_replaceable(model, every)
    layers = routers_by_layer(model)
    first = min(layers)

    # The first choice is lost: at every router, and at one router of each block.
    changes = {"intact": ([], None)}
    changes["top-1"] = (every, without_best(1))
    changes["rescaled"] = (every, without_best(1, rescaled=True))
    n_sublayers = len(layers[first])
    if n_sublayers > 1:
        for place in range(n_sublayers):
            own = [routers[place] for routers in layers.values()]
            changes[string.ascii_uppercase[place]] = (own, without_best(1))

    # Equal shares are lost, if there are experts to take their place.
    if 1.5 * every[0].top_k <= model.config.n_experts or isinstance(every[0], TopPRouter):
        changes["a quarter"] = (every, without_best(share=1 / 4))
        changes["a half"] = (every, without_best(share=1 / 2))

    # Single layers, some tokens only, and noise.
    for layer, routers in layers.items():
        changes[f"layer {layer}"] = (routers, without_best(1))
    above = [router for router in every if router not in layers[first]]
    changes[f"not {first}"] = (above, without_best(1))
    for q in (0.25, 0.5, 0.75):
        changes[f"q = {q}"] = (every, without_best(q))
    for std in (0.25, 0.5, 1.0, 2.0):
        changes[f"noise {std}"] = (every, with_noise(std))
    return changes


def require_replaceable(model, routers: list[Router]):
    """ValueError unless other experts can take the place of disabled ones."""
    nothing = "the model is dense, or its routing is fixed (hash)"
    require(len(routers) > 0, f"no router can go wrong here: {nothing}")
    n_experts = model.config.n_experts
    spare = routers[0].top_k < n_experts or isinstance(routers[0], TopPRouter)
    problem = f"each token visits all {n_experts} experts"
    require(spare, f"{problem}: none is left to take the place of a disabled one")


# ---- what is measured


def measure_robustness(model, task, split: str = "test") -> dict[str, dict]:
    """A row for each protocol: the loss on 128 windows, and the shares that it takes from tokens.

    experts: of those that they would visit; mass: of the routing mass of these.
    """
    rows = {}
    for name, (routers, change) in protocols(model).items():
        with disturbed(routers, change) as lost:
            loss = task.score(model, split, most=128)["loss"]
        # Routers that were left alone lost nothing.
        experts, mass = 0.0, 0.0
        if lost:
            share = len(routers) / len(model.routers())
            experts, mass = share * np.mean(lost, axis=0)
        rows[name] = {"loss": loss, "experts": float(experts), "mass": float(mass)}
    return rows


def loss_at_mass(rows: dict[str, dict], mass: float) -> float:
    """The loss where so much of the routing mass is lost.

    It is read off the line from intact over q = 0.25, 0.5, 0.75 to top-1.
    """
    points = []
    for name, row in rows.items():
        if name in ("intact", "top-1") or name.startswith("q"):
            points.append((row["mass"], row["loss"]))
    masses, losses = zip(*sorted(points), strict=True)
    return float(np.interp(mass, masses, losses))


def robustness_table(rows: dict[str, dict]) -> str:
    """The rows of `measure_robustness` as text."""
    lines = []
    for name, row in rows.items():
        score = f"{perplexity(row['loss']):.2f}"
        lines.append((name, score, f"{row['experts']:.1%}", f"{row['mass']:.1%}"))
    header = ["disabled", "perplexity", "experts lost", "routing mass lost"]
    return cli.table(lines, header=header)


def activated_parameters(model, task) -> float:
    """The parameters that a token uses: with a top-p router the mean over tokens of dev."""
    if not any(isinstance(router, TopPRouter) for router in model.routers()):
        return model.n_params(activated=True)

    # The experts that a token visits, in the mean: a row for each pass, a column for each router.
    visits = []
    for *_, out in passes(model, task.kinds("dev").tokens):
        used = [(routing.weights > 0).sum(1) for routing in out.routing]  # (N,) each
        visits.append([count.double().mean().item() for count in used])
    mean_visits = np.mean(visits, axis=0)

    # The parameters of an expert at each router, of which those that are not visited are idle.
    sizes = []
    for module in model.modules():
        if isinstance(module, MoE):
            sizes.append(sum(weight[0].numel() for weight in module.experts.parameters()))
    idle = (model.config.n_experts - mean_visits) @ sizes
    return model.n_params() - float(idle)
