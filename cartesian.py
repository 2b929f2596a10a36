"""CartesianMoE (Su et al., NAACL 2025, arXiv 2410.16077): two routed sub-layers in a block.

    MoE block                        Cartesian block
    x = x + attention(norm(x))       x = x + attention(norm(x))
    x = x + MoE(norm(x))             x = x + A(norm(x))
                                     x = x + B(norm(x))

That is the whole difference. A and B are MoE layers with a router each, and their experts have half
the size. A token that visits A_i and then B_j has passed through the *composed expert* (A_i, B_j).
With N experts in each there are N * N of them; all those with the same A_i share what A_i knows.

The paper compares it with fine-grained experts and with ordinary ones, at equal parameters: three
presets say which sizes that means. All other variants (hash, top-p, parallel, chain, ...) are in
lab/composing/; `python -m lab.composing.presets` counts the parameters of all.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn

from lab.tools.checks import annotated, require
from moe import MoEConfig, MoETransformer


@dataclass
class CartesianConfig(MoEConfig):
    """The sizes of a Cartesian model; those of experts are the sizes of one sub-layer."""

    n_sublayers: Annotated[int, "MoE sub-layers in a block, one after the other"] = 2


class CartesianTransformer(MoETransformer):
    """The decoder of moe.py with two MoE sub-layers in a block, A and B."""

    def make_ffns(self, layer: int) -> list[nn.Module]:
        """The feed-forward sub-layers of a block: A and B, or one dense layer."""
        if layer in self.config.dense_layers:
            return super().make_ffns(layer)
        ffns = []
        for _ in range(self.config.n_sublayers):
            ffns += super().make_ffns(layer)
        return ffns


# ----------------------------------------------------------------------------------------- presets

# Presets start from the sizes of smoe_share: experts of full width, top-2, and one shared expert.
TOY = {
    "vocab_size": 2048,
    "context": 128,
    "d_model": 128,
    "n_layers": 4,
    "n_heads": 4,
    "tied": True,
    "embedding_scale": 11.3,  # sqrt(d_model): else tokens drown in what the first block adds
    "residual_init": 0.05,
    "n_experts": 8,
    "top_k": 2,
    "d_expert": 64,
    "d_shared": 64,
}
# The paper's base model: 842 million parameters, of which one token activates 247 million.
PAPER = {
    "vocab_size": 32_000,
    "context": 2048,
    "d_model": 768,
    "n_layers": 12,
    "n_heads": 12,
    "qk_norm": "none",
    "n_experts": 16,
    "top_k": 2,
    "d_expert": 3072,
    "d_shared": 3072,
    "dense_layers": (0, 2, 4, 6, 8, 10),
    "d_dense": 3072,
}


@annotated
def smoe_share(base: MoEConfig) -> MoEConfig:
    """The base sizes as they are: ordinary experts, and a shared one."""
    return replace(base)


@annotated
def fine_grained(base: MoEConfig) -> MoEConfig:
    """Twice as many experts, half as wide; a token visits twice as many."""
    return replace(
        base,
        n_experts=2 * base.n_experts,
        top_k=2 * base.top_k,
        d_expert=base.d_expert // 2,
    )


@annotated
def cartesian(base: MoEConfig, n_visits: int | None = None) -> CartesianConfig:
    """Two sub-layers with half of the parameters each.

    n_visits: experts that a token visits in each of A and B; base.top_k unless given. The more
    there are to visit, the more experts there are, and the narrower is each of them.
    """
    visits = base.top_k if n_visits is None else n_visits
    require(visits >= 1, f"n_visits is {visits}; it must be at least 1")
    n_experts = base.n_experts * visits // base.top_k
    d_expert = base.top_k * base.d_expert // (2 * visits)
    # More experts need a larger router, and the shared expert pays for it. Its three matrices of
    # width w weigh as much as the router's rows for 3 w experts.
    router = round((n_experts - base.n_experts) / 3)
    d_shared = max(0, base.d_shared // 2 - router)
    changes = {
        "n_experts": n_experts,
        "top_k": visits,
        "d_expert": d_expert,
        "d_shared": d_shared,
    }
    return CartesianConfig(**vars(base) | changes)


@annotated
def count_parameters(config: MoEConfig, model_class: type | None = None) -> tuple[int, int]:
    """Parameters in all, and those that one token activates. Nothing is allocated.

    model_class: the class of the model; none: the one of this file or of moe.py.

    >>> count_parameters(cartesian(MoEConfig(**PAPER)))
    (842046720, 247504128)
    """
    if model_class is None:
        composed = isinstance(config, CartesianConfig)
        model_class = CartesianTransformer if composed else MoETransformer
    with torch.device("meta"):
        model = model_class(config)
    return model.n_params(), model.n_params(activated=True)
