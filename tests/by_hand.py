"""Every idea of this repository in its plainest form: one token at a time, from the equations.

Read it like a text. The fast forms in moe.py, cartesian.py and remix.py are tested against it.

    expert, route, moe_layer       a mixture-of-experts layer
    cartesian_block                two of them, one after the other
    answer_along                   a full forward pass along an imposed pathway
    neighbour_loss                 how badly the neighbours are answered along it
    ngd, kernel_regression,        the three methods of C3PO, for one prompt
    mode_finding
"""

import math
from dataclasses import asdict

import torch

from lab.composing.presets import PRESETS, build_model
from moe import Imposed, MoEConfig


def expert(gate_up, down, z):
    """A SwiGLU network for one token z (D,)."""
    gate, up = (gate_up @ z).chunk(2)
    silu = gate / (1 + (-gate).exp())
    return down @ (silu * up)


def rms_norm(norm, x):
    """x (D,) divided by its root mean square."""
    return norm.weight * x / (x.square().mean() + norm.eps).sqrt()


def softmax(logits):
    """Numbers -> probabilities."""
    scores = logits.exp()
    return scores / scores.sum()


def sigmoid(logits):
    """Numbers -> probabilities, as DeepSeek-V3 scores its experts."""
    scores = 1 / (1 + (-logits).exp())
    return scores / scores.sum()


def route(router, z, scores=softmax):
    """The experts that one token z (D,) visits: [(weight, expert)], best first."""
    probs = scores(router.weight @ z)
    order = sorted(range(len(probs)), key=lambda e: -probs[e])
    return [(probs[e], e) for e in order[: router.top_k]]


def moe_layer(layer, z):
    """A MoE layer for one token z (D,): the experts that it visits, and the shared one."""
    y = torch.zeros_like(z)
    for weight, e in route(layer.router, z):
        y = y + weight * expert(layer.experts.gate_up[e], layer.experts.down[e], z)
    if layer.shared is not None:
        y = y + expert(layer.shared.gate_up.weight, layer.shared.down.weight, z)
    return y


def cartesian_block(block, x):
    """The sub-layers of a Cartesian block for one token x (D,), behind its attention."""
    A, B = block.ffns
    norm_A, norm_B = block.ffn_norms
    x = x + moe_layer(A, rms_norm(norm_A, x))
    x = x + moe_layer(B, rms_norm(norm_B, x))
    return x


# ---- C3PO, for one prompt. Pathways w are (R, E): a row for each router.


def answer_along(model, prompt, w=None):
    """A full forward pass of one prompt (T,) -> logits (V,), and the pathway (R, E) it took.

    w: a pathway to impose at the last token; None: the model's own.
    """
    imposed = None
    if w is not None:
        rows = {router: row[None] for router, row in enumerate(w)}
        imposed = Imposed(rows)
    out = model(prompt[None], imposed=imposed)
    pathway = torch.stack([routing.probs[-1] for routing in out.routing])
    return out.logits[0, -1], pathway


def neighbour_loss(model, w, prompts, labels, weights):
    """sum_i K_i CE(f(x_i; w), y_i): full forward passes of the neighbours along w."""
    loss = 0.0
    for prompt, label, weight in zip(prompts, labels, weights, strict=True):
        logits, _ = answer_along(model, prompt, w)
        loss = loss - weight * logits.log_softmax(0)[label]
    return loss


def ngd(w, loss, steps, lr):
    """Neighbourhood gradient descent on logits z, w = softmax(z); the best pathway comes back."""
    z = w.log()
    best, least = w, math.inf
    for step in range(steps + 1):
        z = z.detach().requires_grad_()
        value = loss(z.softmax(-1))
        if value < least:
            best, least = z.softmax(-1).detach(), value.item()
        (gradient,) = torch.autograd.grad(value, z)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        rate = lr * (0.001 + 0.999 * cosine)
        z = z - rate * gradient / gradient.norm()
    return best


def kernel_regression(w, mean, loss):
    """Of eleven mixtures of the own pathway and the neighbours' mean, the one of least loss."""
    mixtures = [(1 - share / 10) * w + share / 10 * mean for share in range(11)]
    return min(mixtures, key=loss)


def mode_finding(w, others, k, steps, alpha):
    """Walk towards the pathways (m, R, E) that are near, by a Gaussian kernel."""
    for _ in range(steps):
        distance = torch.stack([(w - other).norm() for other in others])
        near = distance.argsort()[:k]
        sigma = distance[near].median()
        weight = torch.exp(-((distance[near] / sigma) ** 2) / 2)
        weight = weight / weight.sum()
        mean = sum(share * others[i] for share, i in zip(weight, near, strict=True))
        w = alpha * w + (1 - alpha) * mean
    return w


# ---- what tests share


def close(found, expected, tolerance=1e-10):
    """Equal to so many decimals."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def decided(model):
    """Decided routers and predictions, and uneven norms: what is all alike hides mistakes."""
    for name, weight in model.named_parameters():
        if name.endswith(("router.weight", "embedding.weight")):
            torch.nn.init.normal_(weight, std=0.5)
        elif weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def small_preset(name, **changes):
    """A small model of a preset in float64, of 11 tokens, from 4 experts of full size."""
    sizes = {"vocab_size": 11, "context": 16, "d_model": 16, "n_layers": 3, "n_heads": 4}
    sizes |= {"n_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 8} | changes
    model = build_model(asdict(PRESETS[name](MoEConfig(**sizes))))
    return decided(model).double()
