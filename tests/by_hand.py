"""The best place to begin: every idea of this repository, straight from its equations.

There are no batches here, no caches and no tricks: one token at a time, one prompt at a time. Read
it from top to bottom. The fast forms in moe.py, cartesian.py and remix.py are tested against it.

    expert                              a small network
    softmax, sigmoid, route             which experts a token visits
    visit, moe_layer                    a mixture-of-experts layer
    cartesian_block                     two such layers, one after the other
    answer_along                        a full forward pass along an imposed pathway
    neighbour_loss                      how badly the neighbours are answered along it
    share_out                           which entries of a pathway may change
    ngd, kernel_regression,             the three methods of C3PO
    mode_finding
    correction, corrected               what descent changes on a reference, carried over

At the end stand small models that several tests share.

Letters in the shape comments:
    D d_model    F width of an expert    E experts    K experts that a token visits    V vocabulary
    T tokens of a prompt    R routers    m references
"""

import math
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch

from data import SkillsTask
from lab.composing.presets import PRESETS, build_model
from lab.scores.specialisation import specialisation
from moe import Imposed, MoEConfig, MoETransformer, Router
from pathways import ReferenceSet

# ---------------------------------------------------------------------- a mixture-of-experts layer


def expert(gate_up, down, z):
    """One expert, a SwiGLU network, on one token z (D,): gate_up (2F, D), down (D, F) -> (D,)."""
    gate, up = (gate_up @ z).chunk(2)  # (2F,) -> (F,) twice
    silu = gate / (1 + (-gate).exp())
    return down @ (silu * up)


def softmax(logits):
    """Any numbers (E,) -> probabilities (E,)."""
    scores = logits.exp()
    return scores / scores.sum()


def sigmoid(logits):
    """Another way to make probabilities (E,): each expert is scored for itself."""
    scores = 1 / (1 + (-logits).exp())
    return scores / scores.sum()


def route(router, z, scores=softmax):
    """The K experts that one token z (D,) visits: [(weight, expert)], the best first."""
    probs = scores(router.weight @ z)  # (E, D) @ (D,) -> (E,)
    order = sorted(range(len(probs)), key=lambda e: -probs[e])
    chosen = order[: router.top_k]
    total = 1
    if router.norm_topk:  # the weights shall add up to 1
        total = sum(probs[e] for e in chosen)
    return [(probs[e] / total, e) for e in chosen]


def visit(experts, z, visits):
    """What the visited experts say together: the sum of weight * expert(z)."""
    y = torch.zeros_like(z)
    for weight, e in visits:
        y = y + weight * expert(experts.gate_up[e], experts.down[e], z)
    return y


def moe_layer(layer, z, scores=softmax):
    """A MoE layer for one token z (D,): the experts that it visits, and the shared one if any."""
    y = visit(layer.experts, z, route(layer.router, z, scores))
    if layer.shared is not None:
        y = y + expert(layer.shared.gate_up.weight, layer.shared.down.weight, z)
    return y


# ------------------------------------------------------------------------------- a Cartesian block


def rms_norm(norm, x):
    """x (D,) divided by its root mean square, times a learnt gain."""
    return norm.weight * x / (x.square().mean() + norm.eps).sqrt()


def cartesian_block(block, x):
    """A Cartesian block for one token x (D,), behind its attention.

    It visits experts A_i, and then experts B_j: every pair (A_i, B_j) is one composed expert.
    """
    A, B = block.ffns
    norm_A, norm_B = block.ffn_norms
    x = x + moe_layer(A, rms_norm(norm_A, x))
    x = x + moe_layer(B, rms_norm(norm_B, x))
    return x


# ------------------------------------------------------------------ C3PO: re-mixing for one prompt


def answer_along(model, prompt, w=None, routers=None, place=-1):
    """A full forward pass of one prompt (T,) -> logits (V,), and the pathway (R, E) that it took.

    w: a pathway (R, E) to impose on some routers, by default on all, at one token, by default the
    last. None: the model takes its own.
    """
    if routers is None:
        routers = range(len(model.routers()))
    imposed = None
    if w is not None:
        at = torch.zeros(1, len(prompt), dtype=torch.bool)
        at[0, place] = True
        rows = {router: row[None] for router, row in zip(routers, w, strict=True)}
        imposed = Imposed(rows, at)
    out = model(prompt[None], imposed=imposed)
    pathway = torch.stack([out.routing[router].probs[place] for router in routers])
    return out.logits[0, -1], pathway


def neighbour_loss(model, w, prompts, labels, weights):
    """sum_i K_i CE(f(x_i; w), y_i): the neighbours x_i, answered along w instead of their own way.

    Their labels y_i are known. Weights K_i of sum 1 say how much each neighbour counts.
    """
    loss = 0.0
    for prompt, label, weight in zip(prompts, labels, weights, strict=True):
        logits, _ = answer_along(model, prompt, w)
        loss = loss - weight * logits.log_softmax(0)[label]
    return loss


def share_out(own, weights, n_core):
    """A pathway (R, E) in which only core experts changed: the n_core most probable of a row.

    They share what they had together in the own pathway (R, E), in proportion to weights (R, E).
    """
    rows = []
    for row, weight in zip(own, weights, strict=True):
        core = row.topk(n_core).indices
        changed = row.clone()
        changed[core] = row[core].sum() * weight[core] / weight[core].sum()
        rows.append(changed)
    return torch.stack(rows)


def ngd(own, loss, steps, lr, n_core):
    """Neighbourhood gradient descent -> the best pathway on the way, and all losses.

    It moves logits z. A step has a given length, whatever that of the gradient; a cosine takes it
    from lr down to a thousandth.
    """
    z = own.log()
    best, losses = own, [loss(own)]
    for step in range(steps):
        # The gradient, by autograd through all of these forward passes.
        z = z.detach().requires_grad_()
        value = loss(share_out(own, z.exp(), n_core))
        (gradient,) = torch.autograd.grad(value, z)

        # A step.
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        rate = lr * (0.001 + 0.999 * cosine)
        z = (z - rate * gradient / gradient.norm()).detach()

        # Is this the best pathway so far?
        w = share_out(own, z.exp(), n_core)
        value = loss(w)
        if value < min(losses):
            best = w
        losses.append(value)
    return best, losses


def kernel_regression(own, mean, loss, n_core):
    """Of eleven mixtures of the own pathway and the neighbours' mean, the one of least loss.

    -> that mixture, and all losses. The first mixture is the own pathway alone.
    """
    mixtures = []
    for tenths in range(11):
        mixture = (1 - tenths / 10) * own + tenths / 10 * mean
        mixtures.append(share_out(own, mixture, n_core))
    losses = [loss(w) for w in mixtures]
    best = losses.index(min(losses))
    return mixtures[best], losses


def mode_finding(own, others, k, steps, alpha, n_core):
    """Walk to where pathways are dense: in a step towards the k of others (m, R, E) nearest to us.

    They are weighed by a Gaussian kernel, whose width is the median of their distances.
    """
    w = own
    for _ in range(steps):
        distance = torch.stack([(w - other).norm() for other in others])  # (m,)
        near = distance.argsort()[:k]
        r = distance[near] / distance[near].median()
        weight = torch.exp(-(r**2) / 2)
        weight = weight / weight.sum()
        mean = sum(share * others[i] for share, i in zip(weight, near, strict=True))
        w = share_out(own, alpha * w + (1 - alpha) * mean, n_core)
    return w


def correction(own, loss, steps, lr, n_core):
    """What NGD changes on a reference's own pathway (R, E), in logits; loss: of its own label."""
    mended, _ = ngd(own, loss, steps, lr, n_core)
    return mended.log() - own.log()


def corrected(own, corrections, weights, scale, n_core):
    """A prompt's own pathway (R, E), and the weighted sum of its neighbours' corrections."""
    z = own.log()
    for change, weight in zip(corrections, weights, strict=True):
        z = z + scale * weight * change
    return share_out(own, z.exp(), n_core)


# -------------------------------------------------------------------------------- what tests share

E, V = 6, 11  # experts and vocabulary of a small model
SMALL = {"vocab_size": V, "context": 16, "d_model": 16, "n_layers": 3, "n_heads": 4}
SMALL |= {"n_experts": E, "top_k": 2, "d_expert": 8}
VARIANTS = {
    "default": {},
    "grouped-query": {"n_kv_heads": 2},
    "head-dim": {"head_dim": 6},
    "qk-norm-head": {"qk_norm": "head", "n_kv_heads": 1},
    "qk-norm-none": {"qk_norm": "none"},
    "clip-qkv": {"clip_qkv": 0.5},
    "shared": {"d_shared": 5},
    "dense-layers": {"dense_layers": (0,), "d_dense": 7},
    "norm-topk": {"norm_topk": True},
    "tied": {"tied": True, "embedding_scale": 4.0},
    "top-1": {"top_k": 1},
    "top-all": {"top_k": E},
}


class SigmoidRouter(Router):
    """A routing rule of one's own."""

    def scores(self, x):
        logits, _ = super().scores(x)
        probs = logits.sigmoid()
        return logits, probs / probs.sum(-1, keepdim=True)


def full(*cases):
    """Cases that only `pytest --full` runs: names, or tuples of several values."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.full) for case in values]


def close(actual, expected, tolerance=1e-10):
    """Equal to so many decimals."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@contextmanager
def refused(*messages, error=ValueError):
    """What is done inside is refused in one line, with these messages in it."""
    with pytest.raises(error) as raised:
        yield
    line = str(raised.value)
    assert "\n" not in line
    for message in messages:
        assert message in line


def reached_by_one_token(model):
    """How many parameters the gradient of one token's loss reaches."""
    model(torch.tensor([[3]]), torch.tensor([[4]])).loss.backward()
    reached = 0
    for name, weight in model.named_parameters():
        reached += weight.numel()
        if ".experts." in name:
            idle = ~weight.grad.flatten(1).any(1)  # (E,)
            reached -= weight[0].numel() * int(idle.sum())
    return reached


def learning_routers(model):
    """How many routers have a gradient of the loss."""
    tokens, targets = torch.randint(V, (2, 4, 8))
    model(tokens, targets).loss.backward()
    return sum(bool(router.weight.grad.abs().max() > 1e-12) for router in model.routers())


def decided(model):
    """Decided routers and predictions, and uneven norms: what is all alike hides mistakes."""
    for name, weight in model.named_parameters():
        if name.endswith(("router.weight", "embedding.weight")):
            torch.nn.init.normal_(weight, std=0.5)
        elif weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def tiny(variant="default", router=Router, **changes):
    """A small model in float64, where equal can mean equal to ten decimals."""
    sizes = SMALL | VARIANTS[variant] | changes
    return decided(MoETransformer(MoEConfig(**sizes), router)).double()


def small_preset(name, **changes):
    """A small model of a preset in float64, from 4 experts of full size."""
    sizes = SMALL | {"n_experts": 4, "d_shared": 8} | changes
    return decided(build_model(asdict(PRESETS[name](MoEConfig(**sizes))))).double()


def references_of(model):
    """Six references of a small model, all of which may help."""
    solved = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2, 4, 6], [9, 1], [3, 3, 3]]
    references = ReferenceSet.build(model, solved, torch.arange(6, device="cpu"))
    references.correct[:] = True
    return references


def specialisation_of(model):
    """Which expert of a small model does what, on some prompts of the skills task."""
    task = SkillsTask()
    prompts = task.prompts("dev").tokens[:50] % V
    task.kinds = lambda *_: (prompts, prompts, [str(kind) for kind in range(V)])
    return specialisation(model, task)
