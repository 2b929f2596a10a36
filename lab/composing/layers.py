"""The rivals of a Cartesian block: other ways to join A and B, and other ways to choose experts.

The letters in the shape comments are those of moe.py; M: slots in use.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn

from moe import Experts, MoEConfig, MoETransformer, Router, Routing, require

JOINTS = ("moe", "cartesian", "parallel", "chain", "pairs")
ROUTER_KINDS = ("softmax", "hash", "top_p", "none")


@dataclass
class ComposedConfig(MoEConfig):
    """MoEConfig, and what stands where it has a MoE layer.

    Raises ValueError where the values do not fit together.
    """

    layer: Annotated[Literal[JOINTS], "one sub-layer (moe), or how two are joined"] = "cartesian"
    router: Annotated[Literal[ROUTER_KINDS], "none: the shared expert alone"] = "softmax"
    top_p: Annotated[float, "router top_p: the probability that chosen experts reach"] = 0.4

    def __post_init__(self):
        super().__post_init__()
        layers, routers = ", ".join(JOINTS), ", ".join(ROUTER_KINDS)
        require(self.layer in JOINTS, f"layer is {self.layer!r}; expected one of {layers}")
        require(
            self.router in ROUTER_KINDS, f"router is {self.router!r}; expected one of {routers}"
        )
        require(self.top_p <= 1, f"top_p is {self.top_p}; it must be at most 1")
        if self.router == "none":
            require(self.d_shared > 0, "router none needs a shared expert, d_shared > 0")
            require(self.layer != "pairs", "router none has no pairs of experts")


class ComposedTransformer(MoETransformer):
    """The decoder of moe.py with the layers and routers of a ComposedConfig.

    router: the class that config.router "softmax" stands for. ValueError where it says otherwise.
    """

    def __init__(self, config: ComposedConfig, router: type[Router] = Router):
        replaced = router is Router or config.router == "softmax"
        require(replaced, f"{router.__name__} cannot take the place of router {config.router!r}")
        super().__init__(config, router)
        for block in self.blocks:
            if isinstance(block.ffns[0], Chain):
                block.ffn_norms[0] = nn.Identity()  # a chain has norms of its own

    def make_ffns(self, layer: int) -> list[nn.Module]:
        """The feed-forward sub-layers of a block."""
        config = self.config
        if layer in config.dense_layers:
            return super().make_ffns(layer)
        A = self.make_sublayer(layer)
        if config.layer == "moe":
            return [A]
        B = self.make_sublayer(layer)
        if config.layer == "cartesian":
            return [A, B]
        joined = {"parallel": Parallel, "chain": Chain, "pairs": Pairs}
        return [joined[config.layer](config, A, B)]

    def make_sublayer(self, layer: int) -> nn.Module:
        """A MoE layer with the router of the config; router none leaves a dense layer."""
        config = self.config
        [moe] = super().make_ffns(layer)
        if config.router == "none":
            return moe.shared
        if config.router == "hash":
            moe.router = HashRouter(config)
        if config.router == "top_p":
            moe.router = TopPRouter(config)
            moe.experts = UsedExperts(config)
        return moe


# ---- ways to join A and B


class Parallel(nn.Module):
    """A(z) + B(z): the same sub-experts side by side, so that none is composed with another."""

    def __init__(self, config: MoEConfig, A: nn.Module, B: nn.Module):
        super().__init__()
        self.A = A
        self.B = B

    def forward(self, z, flow=None):
        """z (B, T, D) -> (B, T, D)."""
        return self.A(z, flow) + self.B(z, flow)


class Chain(nn.Module):
    """B(norm(x + A(norm(x)))): B reads what A adds, but it does not stay in the residual stream."""

    def __init__(self, config: MoEConfig, A: nn.Module, B: nn.Module):
        super().__init__()
        self.A = A
        self.B = B
        self.dropout = nn.Dropout(config.dropout)
        self.norm_A = nn.RMSNorm(config.d_model, config.norm_eps)
        self.norm_B = nn.RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x, flow=None):
        """x (B, T, D) -> (B, T, D)."""
        u = x + self.dropout(self.A(self.norm_A(x), flow))
        return self.B(self.norm_B(u), flow)


class Pairs(Chain):
    """The product taken literally: each chosen A_i passes alone through each chosen B_j.

    That takes K + K^2 evaluations of experts instead of 2 K. Were norm and B linear, it would
    change nothing, as then sum_i s_i B(u_i) = B(sum_i s_i u_i), where sum_i s_i = 1.
    """

    def forward(self, x, flow=None):
        """x (B, T, D) -> (B, T, D)."""
        A, B, shape = self.A, self.B, x.shape
        x = x.flatten(0, 1)  # (B, T, D) -> (N, D)

        # What each chosen A_i says alone, at weight 1.
        z = self.norm_A(x)
        chosen = A.router(z, flow)
        N, K = chosen.experts.shape
        weight = z.new_ones(N * K, 1)
        expert = chosen.experts.view(-1, 1)  # (N*K, 1)
        alone = A.experts(z.repeat_interleave(K, 0), weight, expert)  # (N*K, D)
        alone = alone.view(N, K, -1)

        # The stream u that B would read, had A_i got all the weight; and their mean, x + A(z).
        total = chosen.weights.sum(1)[:, None, None]  # (N, 1, 1)
        share = chosen.weights[..., None] / total  # (N, K, 1) of sum 1
        base = x
        if A.shared is not None:
            base = x + self.dropout(A.shared(z))
        u_alone = base[:, None] + self.dropout(total * alone)  # (N, K, D)
        u = (share * u_alone).sum(1)  # (N, D)

        # B's router sees the mean; its experts see every u_i.
        joined = B.router(self.norm_B(u), flow)
        weights = (share * joined.weights[:, None]).flatten(0, 1)  # (N, K, K) -> (N*K, K)
        experts = joined.experts.repeat_interleave(K, 0)  # (N*K, K)
        y = B.experts(self.norm_B(u_alone).flatten(0, 1), weights, experts)  # (N*K, D)
        y = u - x + y.view(N, K, -1).sum(1)  # (N, D)
        if B.shared is not None:
            y = y + B.shared(self.norm_B(u))
        return y.view(shape)  # (N, D) -> (B, T, D)


# ---- ways to choose experts


class HashRouter(nn.Module):
    """Routing by token id (Hash Layers, arXiv 2106.04426): a random table of experts.

    The table is saved with the weights. There is nothing to learn or to re-mix: it is not among
    `routers()`.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.top_k = config.top_k
        scores = torch.rand(config.vocab_size, config.n_experts)
        self.register_buffer("table", scores.topk(self.top_k).indices)  # (V, K)

    def forward(self, x, flow=None) -> Routing:
        """x (N, D), of which only the number counts. ValueError where the flow has no token ids."""
        ids = None if flow is None else flow.tokens  # (B, T)
        fits = ids is not None and ids.numel() == len(x)
        problem = f"a hash router goes by token ids, here of {len(x)} tokens"
        require(fits, f"{problem}: call run_blocks(x, ..., tokens=tokens)")
        experts = self.table[ids.flatten()]  # (B, T) -> (N, K)
        weights = torch.full_like(experts, 1 / self.top_k, dtype=x.dtype)
        return Routing(None, weights, experts, None)


class TopPRouter(Router):
    """As many experts as reach probability p together (arXiv 2403.07652, no entropy loss)."""

    def __init__(self, config: ComposedConfig):
        super().__init__(config)
        self.top_k = config.n_experts
        self.p = config.top_p

    def select(self, probs):
        """probs (N, E) -> weights (N, E), experts (N, E).

        A slot that is not used names the first choice again, at weight 0.
        """
        weights, experts = probs.sort(-1, descending=True)
        before = weights.cumsum(-1) - weights  # (N, E) what better experts reach
        used = before < self.p
        weights = weights * used
        experts = torch.where(used, experts, experts[:, :1])
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts


class UsedExperts(Experts):
    """Experts where tokens visit different numbers of them: slots of weight 0 cost nothing."""

    def forward(self, x, weights, experts):
        """x (N, D), weights (N, K), experts (N, K) -> the weighted sum (N, D)."""
        token, slot = weights.nonzero(as_tuple=True)  # (M,) the slots in use
        rows = x.index_select(0, token)  # (N, D) -> (M, D)
        weight = weights[token, slot][:, None]  # (M, 1)
        expert = experts[token, slot][:, None]  # (M, 1)
        y = super().forward(rows, weight, expert)  # (M, D)
        return y.new_zeros(x.shape).index_add(0, token, y)  # (M, D) -> (N, D)
