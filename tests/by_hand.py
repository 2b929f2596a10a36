"""The plain form of what the repository computes fast: one token at a time, from the equations.

The tests compare both. At the end stands what several of them share.
"""

from dataclasses import asdict

import torch

from lab.composing.presets import PRESETS, build_model
from moe import MoEConfig


def expert(gate_up, down, z):
    """A SwiGLU network for one token z (D,)."""
    gate, up = (gate_up @ z).chunk(2)
    silu = gate / (1 + (-gate).exp())
    return down @ (silu * up)


def rms_norm(norm, x):
    """x (D,) divided by its root mean square."""
    return norm.weight * x / (x.square().mean() + norm.eps).sqrt()


def route(router, z):
    """The experts that one token z (D,) visits: [(weight, expert)], best first."""
    scores = (router.weight @ z).exp()
    probs = scores / scores.sum()
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
