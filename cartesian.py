"""CartesianMoE (Su et al., NAACL 2025, arXiv 2410.16077), and what it is compared with at equal parameters.

**A MoE block has one feed-forward sub-layer; a Cartesian block has two.** That is the whole difference:

    MoE block    x = x + attention(norm(x))      Cartesian block    x = x + attention(norm(x))
                 x = x + MoE(norm(x))                               x = x + A(norm(x))
                                                                    x = x + B(norm(x))

A and B are MoE layers of N half-size experts, each with a router of its own. A token that visits A_i and then B_j has
passed through the composed expert (A_i, B_j), one of N x N; all those with the same A_i share what A_i knows.
`python cartesian.py` counts the parameters of every preset. The letters in the shape comments are those of moe.py.
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from moe import Experts, Linked, MoE, MoEConfig, MoETransformer, Router, Routing, SwiGLU, require


@dataclass
class CartesianConfig(MoEConfig):
    """MoEConfig, and what stands where it has a MoE layer. Raises ValueError where the values do not fit together."""

    layer: Annotated[Literal["moe", "cartesian", "parallel", "chain", "pairs"], "one sub-layer, or two"] = "cartesian"
    router: Annotated[Literal["softmax", "hash", "top_p", "none"], "none: the shared expert alone"] = "softmax"
    top_p: Annotated[float, "router top_p: the probability that the chosen experts reach together"] = 0.4

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("layer", ("moe", "cartesian", *JOINED)), ("router", ("none", *ROUTERS))):
            found = getattr(self, name)
            require(found in known, f"{name} is {found!r}; expected one of {', '.join(known)}")
        require(self.top_p <= 1, f"top_p is {self.top_p}; it must be at most 1")
        alone = self.d_shared > 0 and self.layer != "pairs"
        require(self.router != "none" or alone, "router none needs a shared expert, d_shared > 0, and has no pairs")


class CartesianTransformer(MoETransformer):
    """The decoder of moe.py, with two sub-layers A and B in a block."""

    def __init__(self, config: CartesianConfig):
        super().__init__(config)
        for block in (block for block in self.blocks if isinstance(block.ffns[0], Chain)):
            block.ffn_norms[0] = nn.Identity()  # a chain has norms of its own

    def make_ffns(self, layer: int) -> list[nn.Module]:
        """The feed-forward sub-layers of a block: here two."""
        if layer in self.config.dense_layers:
            return super().make_ffns(layer)
        if self.config.layer == "moe":
            return [self.sublayer()]
        A, B = self.sublayer(), self.sublayer()
        return [A, B] if self.config.layer == "cartesian" else [JOINED[self.config.layer](self.config, A, B)]

    def sublayer(self) -> nn.Module:
        """A MoE layer under the config's routing rule; router none leaves the shared expert alone, a dense layer."""
        config = self.config
        shared = SwiGLU(config.d_model, config.d_shared) if config.d_shared else None
        if config.router == "none":
            return shared
        router, experts = ROUTERS[config.router]
        return MoE(router(config), experts(config), shared)


def build(sizes: dict) -> MoETransformer:
    """The model of a config as a dict, such as a run's config.json. ValueError or TypeError: it is none of ours."""
    return CartesianTransformer(CartesianConfig(**sizes)) if "layer" in sizes else MoETransformer(MoEConfig(**sizes))


# ----------------------------------------------------------------------------------------- other ways to join A and B


class Parallel(nn.Module):
    """A(z) + B(z): the same sub-experts side by side, so that none is composed with another."""

    def __init__(self, config: CartesianConfig, A: nn.Module, B: nn.Module):
        super().__init__()
        self.A, self.B = A, B

    def forward(self, z, flow=None):
        return self.A(z, flow) + self.B(z, flow)


class Chain(nn.Module):
    """B(norm(x + A(norm(x)))): what A adds is read by B, but does not stay in the residual stream."""

    def __init__(self, config: CartesianConfig, A: nn.Module, B: nn.Module):
        super().__init__()
        self.A, self.B, self.dropout = A, B, nn.Dropout(config.dropout)
        self.norm_A, self.norm_B = (nn.RMSNorm(config.d_model, config.norm_eps) for _ in "AB")

    def forward(self, x, flow=None):
        u = x + self.dropout(self.A(self.norm_A(x), flow))
        return self.B(self.norm_B(u), flow)


class Pairs(Chain):
    """The product taken literally: each chosen A_i passes alone through each chosen B_j, K + K^2 evaluations, not 2 K.
    Were norm and B linear, that would change nothing: sum_i s_i B(u_i) = B(sum_i s_i u_i)."""

    def forward(self, x, flow=None):
        A, B, shape, x = self.A, self.B, x.shape, x.flatten(0, 1)  # (B, T, D) -> (N, D)
        z = self.norm_A(x)
        p = A.router(z, flow)
        N, K = p.experts.shape
        each = A.experts(z.repeat_interleave(K, 0), z.new_ones(N * K, 1), p.experts.view(-1, 1)).view(N, K, -1)
        total = p.weights.sum(1)[:, None, None]  # (N, 1, 1)
        s = p.weights[..., None] / total  # (N, K, 1), the sum over K is 1
        base = x if A.shared is None else x + self.dropout(A.shared(z))
        u_each = base[:, None] + self.dropout(total * each)  # (N, K, D) x + A(z), had each A_i got all of the weight
        u = (s * u_each).sum(1)  # (N, D) x + A(z)
        q = B.router(self.norm_B(u), flow)
        weights = (s * q.weights[:, None]).flatten(0, 1)  # (N, K, K) -> (N*K, K)
        y = B.experts(self.norm_B(u_each).flatten(0, 1), weights, q.experts.repeat_interleave(K, 0))  # (N*K, D)
        y = u - x + y.view(N, K, -1).sum(1) + (0 if B.shared is None else B.shared(self.norm_B(u)))
        return y.view(shape)  # (N, D) -> (B, T, D)


JOINED = {"parallel": Parallel, "chain": Chain, "pairs": Pairs}


class HashRouter(nn.Module):
    """Routing by token id (Hash Layers, arXiv 2106.04426): a random table, saved with the weights. It has nothing to
    learn or to re-mix, and so is not among `routers()`."""

    def __init__(self, config: CartesianConfig):
        super().__init__()
        self.top_k = config.top_k
        scores = torch.rand(config.vocab_size, config.n_experts)
        self.register_buffer("table", scores.topk(self.top_k).indices)  # (V, K)

    def forward(self, x, flow=None) -> Routing:
        """x (N, D), of which only the number counts. ValueError where `run` did not get the ids of its tokens."""
        known = flow is not None and flow.tokens is not None and flow.tokens.numel() == len(x)
        require(known, f"a hash router goes by token ids: call run(x, ..., tokens=tokens) with those of x ({len(x)})")
        experts = self.table[flow.tokens.flatten()]  # (B, T) -> (N, K)
        return Routing(None, torch.full_like(experts, 1 / self.top_k, dtype=x.dtype), experts, None)


class TopPRouter(Router):
    """As many experts as it takes to reach a probability of p together (arXiv 2403.07652, without its entropy loss)."""

    def __init__(self, config: CartesianConfig):
        super().__init__(config)
        self.top_k, self.p = config.n_experts, config.top_p

    def select(self, probs):
        """probs (N, E) -> weights (N, E), experts (N, E). An unused slot names the first choice again, at weight 0."""
        weights, experts = probs.sort(-1, descending=True)
        used = weights.cumsum(-1) - weights < self.p  # (N, E) what comes before does not reach p
        weights, experts = weights * used, torch.where(used, experts, experts[:, :1])
        return weights / weights.sum(-1, keepdim=True) if self.norm_topk else weights, experts


class UsedExperts(Experts):
    """Experts where tokens visit more or fewer of them: slots of weight 0 never reach a matrix product."""

    def forward(self, x, weights, experts):
        token, slot = weights.nonzero(as_tuple=True)  # (M,) the slots in use, token by token
        starts = torch.searchsorted(token, torch.arange(len(x), device=x.device))  # (N,) where those of a token begin
        y = Linked.apply(x, token, starts, spread, collect)  # (N, D) -> (M, D)
        y = super().forward(y, weights[token, slot][:, None], experts[token, slot][:, None])  # (M, D)
        return Linked.apply(y, token, starts, collect, spread)  # (M, D) -> (N, D)


def spread(x, token, starts):
    """A row for every slot in use: x (N, D), token (M,) -> (M, D). Its gradient is `collect`; see moe.Linked."""
    return x.index_select(0, token)


def collect(y, token, starts):
    """The sum over the slots of each token: y (M, D), starts (N,) -> (N, D). Its gradient is `spread`."""
    return F.embedding_bag(torch.arange(len(y), device=y.device), y, starts, mode="sum")


ROUTERS = {"softmax": (Router, Experts), "hash": (HashRouter, Experts), "top_p": (TopPRouter, UsedExperts)}


# ------------------------------------------------------------------------------------------ what is compared with what

# The sizes that presets start from are those of smoe_share: N experts of width D, top-2, and a shared one of width D.
TOY = {"vocab_size": 2048, "context": 128, "d_model": 128, "n_layers": 4, "n_heads": 4, "tied": True}
TOY |= {"n_experts": 8, "top_k": 2, "d_expert": 64, "d_shared": 64}
PAPER = {"vocab_size": 32_000, "context": 2048, "d_model": 768, "n_layers": 12, "n_heads": 12, "qk_norm": "none"}
PAPER |= {"n_experts": 16, "top_k": 2, "d_expert": 3072, "d_shared": 3072}
PAPER |= {"dense_layers": (0, 2, 4, 6, 8, 10), "d_dense": 3072}


def variant(b: MoEConfig, layer="moe", **changes) -> CartesianConfig:
    """The base sizes with some of them changed."""
    return CartesianConfig(**asdict(b) | {"layer": layer} | changes)


def bare(b: MoEConfig) -> MoEConfig:
    """No shared expert: instead of it one more expert, and one more visit."""
    return replace(b, n_experts=b.n_experts + 1, top_k=b.top_k + 1, d_shared=0)


def fine(b: MoEConfig) -> CartesianConfig:
    """Twice as many experts, half as wide, twice as many visits."""
    return variant(b, n_experts=2 * b.n_experts, top_k=2 * b.top_k, d_expert=b.d_expert // 2)


def product(b: MoEConfig, layer="cartesian", k=None) -> CartesianConfig:
    """Two sub-layers of half of the parameters each. A token visits k experts in each; the larger k, the narrower."""
    k = k or b.top_k
    d, N = b.top_k * b.d_expert // (2 * k), b.n_experts * k // b.top_k
    shared = max(0, b.d_shared // 2 - round((N - b.n_experts) / 3))  # three of width N / 3 weigh as much as a router
    return variant(b, layer, n_experts=N, top_k=k, d_expert=d, d_shared=shared)


PRESETS = {  # name -> the config of these base sizes; see `preset`
    "dense": lambda b: variant(b, router="none", d_shared=b.top_k * b.d_expert + b.d_shared),
    "dense_two": lambda b: variant(b, "cartesian", router="none", d_shared=(b.top_k * b.d_expert + b.d_shared) // 2),
    "dense_paper": lambda b: variant(b, router="none", d_shared=b.d_expert),
    "smoe_share": variant,
    "smoe_top3": lambda b: variant(
        b, top_k=b.top_k + 1, d_expert=8 * round((b.d_expert + b.d_shared / b.n_experts) / 8), d_shared=0
    ),
    "hash": lambda b: variant(b, router="hash"),
    "top_p": lambda b: variant(b, router="top_p"),
    "fine_grained": fine,
    "fine_grained_no_shared": lambda b: fine(bare(b)),
    "cartesian": product,
    "cartesian_no_shared": lambda b: product(bare(b)),
    "cartesian_parallel": lambda b: product(b, "parallel"),
    "cartesian_chain": lambda b: product(b, "chain"),
    "cartesian_pairs": lambda b: product(b, "pairs"),
    "cartesian_k1": lambda b: product(b, k=1),
    "cartesian_k4": lambda b: product(b, k=4),
}
# Which parameters are to be those of fine_grained, within 1 %: all of them (0), the activated ones (1). Others: both.
MEANT = {"dense": (1,), "dense_two": (1,), "dense_paper": (), "smoe_top3": (0,), "top_p": (0,)}


def preset(name: str, base: MoEConfig) -> CartesianConfig:
    """A preset's config. ValueError: there is none, or these base sizes cannot match; it says which near ones can.

    >>> counts(preset("cartesian", MoEConfig(**PAPER)))  # the paper: 842M, 247M activated
    (842046720, 247504128)
    """
    require(name in PRESETS, f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    if matches(name, base):
        return PRESETS[name](base)
    moved = ((f, getattr(base, f) + s * n) for n in range(1, 17) for s in (-1, 1) for f in ("d_expert", "n_experts"))
    tries = [{f: n} for f, n in moved if n > 2 * base.top_k]
    tries += [dict.fromkeys(("d_expert", "d_shared"), max(base.d_expert, base.d_shared) * n // 4) for n in range(4, 64)]
    near = next((sizes for sizes in tries if matches(name, base, **sizes)), None)
    hint = f"try {' and '.join(f'{f} {n}' for f, n in near.items())}" if near else "nor does it at sizes near these"
    found = f"n_experts {base.n_experts}, d_expert {base.d_expert}, d_shared {base.d_shared}"
    raise ValueError(f"{name} cannot match fine_grained's size at {found}; {hint}")


def matches(name: str, base: MoEConfig, **sizes) -> bool:
    """Whether a preset has the parameters that it is meant to have, at other sizes perhaps."""
    try:
        base = replace(base, **sizes)
        ours, theirs = counts(PRESETS[name](base)), counts(fine(base))
    except ValueError:
        return False  # of experts without width, or fewer than a token visits
    return all(abs(ours[i] / theirs[i] - 1) < 0.01 for i in MEANT.get(name, (0, 1)))


def counts(config: CartesianConfig) -> tuple[int, int]:
    """Parameters in all, and those activated for a token (with the router top_p at most); nothing is allocated."""
    with torch.device("meta"):
        model = CartesianTransformer(config)
    return model.n_params(), model.n_params(activated=True)


if __name__ == "__main__":
    for sizes in (TOY, PAPER):
        print(f"\n{sizes['n_layers']} layers of width {sizes['d_model']:<11}  parameters     activated")
        base = MoEConfig(**sizes)
        matched = counts(fine(base))[1]
        for name in PRESETS:
            total, active = counts(preset(name, base))
            more = f"  {active / matched - 1:+.1%} against fine_grained" * (abs(active / matched - 1) > 0.01)
            print(f"{name:24}{total:14,}{active:14,}{'  at most: it depends on the data' if name == 'top_p' else more}")
