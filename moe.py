"""A mixture-of-experts transformer in one file, to be read from top to bottom: config, MoE layer, block, model.

Configured like OLMoE (arXiv 2409.02060) it computes exactly what OLMoE computes, and so it is by default: RMSNorm
before each sub-layer, rotary positions, QK-norm, SwiGLU experts, and a softmax router that sends every token to its
top k experts. No token is ever dropped, and nothing is random in evaluation.

The letters in the shape comments:
    B batch      T tokens of this call    S tokens in the cache     N = B * T tokens in a flat list     D d_model
    E experts    K top_k    F width of an expert    H heads    G key-value heads    C head_dim    V vocabulary
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # a target without loss


@dataclass
class MoEConfig:
    """The sizes of a model; the texts are the command line's help. Raises ValueError where they do not fit together."""

    vocab_size: Annotated[int, "tokens in the vocabulary"] = 48
    context: Annotated[int, "longest sequence, in tokens"] = 64
    d_model: Annotated[int, "width of the residual stream"] = 64
    n_layers: Annotated[int, "number of blocks"] = 4
    n_heads: Annotated[int, "attention heads"] = 4
    n_kv_heads: Annotated[int | None, "key-value heads, shared among the heads (none: n_heads)"] = None
    head_dim: Annotated[int | None, "width of a head (none: d_model / n_heads)"] = None
    n_experts: Annotated[int, "experts in each MoE layer"] = 16
    top_k: Annotated[int, "experts that each token visits"] = 4
    d_expert: Annotated[int, "hidden width of an expert"] = 64
    norm_topk: Annotated[bool, "divide the k routing weights by their sum"] = False
    d_shared: Annotated[int, "hidden width of an ungated expert that every token visits (0: there is none)"] = 0
    dense_layers: Annotated[tuple[int, ...], "layers that are dense instead of MoE, such as 0,2"] = ()
    d_dense: Annotated[int | None, "hidden width of dense layers (none: what a token visits in others)"] = None
    qk_norm: Annotated[Literal["full", "head", "none"], "RMSNorm of queries and keys: full width or per head"] = "full"
    clip_qkv: Annotated[float | None, "clamp queries, keys and values to plus or minus this"] = None
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10_000.0
    norm_eps: Annotated[float, "epsilon in RMSNorm"] = 1e-5
    dropout: Annotated[float, "dropout on the embedding and on what each sub-layer adds"] = 0.0
    tied: Annotated[bool, "the output layer is the transposed embedding"] = False

    def __post_init__(self):
        self.dense_layers = tuple(self.dense_layers)
        for name, value in vars(self).items():
            zero, number = name in ("d_shared", "dropout"), type(value) in (int, float)
            least = "at least" if zero else "greater than"
            require(not number or value > 0 or (zero and value == 0), f"{name} is {value}; it must be {least} 0")
        d, heads = self.d_model, self.n_heads
        if self.head_dim is None:
            hint = f"try {max(1, round(d / heads)) * heads}, or give head_dim"
            require(d % heads == 0, f"d_model {d} does not divide into {heads} heads: {hint}")
            self.head_dim = d // heads
        self.n_kv_heads = heads if self.n_kv_heads is None else self.n_kv_heads
        if self.d_dense is None:  # three matrices of width E / 3 weigh as much as a router
            self.d_dense = self.top_k * self.d_expert + self.d_shared + round(self.n_experts / 3)
        outside = set(self.dense_layers) - set(range(self.n_layers))
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary positions need pairs, an even width")
        require(heads % self.n_kv_heads == 0, f"n_heads {heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        require(self.top_k <= self.n_experts, f"top_k {self.top_k} is more than the {self.n_experts} experts there are")
        require(not outside, f"dense_layers names {sorted(outside)}; the layers are 0 to {self.n_layers - 1}")
        require(self.qk_norm in ("full", "head", "none"), f"qk_norm is {self.qk_norm!r}; expected full, head or none")
        require(self.dropout < 1, f"dropout is {self.dropout}; it must be below 1")


def require(ok: bool, message: str):
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def wide(x):
    """Router, softmax and loss are never computed below float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Routing(NamedTuple):
    """Where a router sends N tokens. An imposed pathway (see Remix) shows in all fields but logits."""

    probs: torch.Tensor  # (N, E) softmax over all experts
    weights: torch.Tensor  # (N, K) what the output of each chosen expert is multiplied by
    experts: torch.Tensor  # (N, K) the chosen experts, most probable first
    logits: torch.Tensor  # (N, E) before the softmax


class Router(nn.Module):
    """Softmax router: a linear layer scores the experts, the top k win. Another routing rule overrides `select`."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.top_k, self.norm_topk = config.top_k, config.norm_topk
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.index = None  # the place among MoETransformer.routers(), set there

    def forward(self, x, flow=None) -> Routing:
        """x (N, D). The flow, if any, collects the routing, and may impose a pathway: where `at` is true, its `rows`
        replace the softmax, before top-k. That is re-mixing."""
        logits = wide(F.linear(x, self.weight))  # (N, E)
        probs = logits.softmax(-1)
        if flow and self.index in flow.rows:
            probs = torch.where(flow.at[:, None], flow.rows[self.index].to(probs.dtype), probs)
        weights, experts = self.select(probs)
        routing = Routing(probs, weights.to(x.dtype), experts, logits)
        if flow:
            flow.routing.append(routing)
        return routing

    def select(self, probs):
        """probs (N, E) -> weights (N, K), experts (N, K)."""
        weights, experts = probs.topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True) if self.norm_topk else weights, experts


class Experts(nn.Module):
    """E SwiGLU networks in two stacked tensors. A token visits its K experts however many others do."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.n_experts, 2 * config.d_expert, config.d_model))
        self.down = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_expert))

    def forward(self, x, weights, experts):
        """x (N, D), weights (N, K), experts (N, K) -> the sum over K of weight * expert(x), (N, D)."""
        chosen, order = experts.flatten().sort(stable=True)  # (N*K,) the (token, expert) pairs, expert by expert
        place, every = (torch.arange(n, device=x.device) for n in (len(order), len(self.down)))
        back = torch.empty_like(order).scatter_(0, order, place).view(experts.shape)  # (N, K) where each pair went
        ends = torch.searchsorted(chosen, every, right=True, out_int32=True)  # (E,) where each expert's pairs end
        pairs = Linked.apply(x, order, back, dispatch, combine)  # (N, D) -> (N*K, D)
        scale = Linked.apply(weights.reshape(-1, 1), order, back.reshape(-1, 1), dispatch, combine)  # (N*K, 1)
        gate, up = grouped_matmul(pairs, self.gate_up, ends).chunk(2, dim=-1)  # (N*K, F) twice
        # The routing weight multiplies here, where a row is F wide, and not behind `down`, where it is D wide.
        y = grouped_matmul(F.silu(gate) * (up * scale), self.down, ends)  # (N*K, D)
        return Linked.apply(y, order, back, combine, dispatch)  # (N*K, D) -> (N, D)


def dispatch(x, order, back):
    """A row for every (token, expert) pair, sorted by expert: x (N, D), order (N*K,) -> (N*K, D)."""
    return x.index_select(0, order // back.shape[1])


def combine(y, order, back):
    """The sum over the K pairs of each token, which stand at the places back (N, K): y (N*K, D) -> (N, D)."""
    return F.embedding_bag(back, y, mode="sum")


class Linked(torch.autograd.Function):
    """dispatch or combine, with the other one as its gradient: so both directions only gather. The scatter-add that
    autograd would use instead is slower, and may differ from run to run."""

    @staticmethod
    def forward(ctx, x, order, back, function, gradient):
        ctx.save_for_backward(order, back)
        ctx.gradient = gradient
        return function(x, order, back)

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient(grad.contiguous(), *ctx.saved_tensors), None, None, None, None


@torch.compiler.disable  # the sizes of the groups are data, and the fused kernel has no compiled form for float32
def grouped_matmul(x, weight, ends):
    """Rows of x (M, I), sorted by expert, each times its expert's matrix of weight (E, O, I) -> (M, O).

    The fused kernel takes rows of whole 16 bytes, float32 or bfloat16 on a CPU, bfloat16 on CUDA from compute
    capability 8; a loop over the experts serves the rest (float64, odd sizes, mps).
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    fused = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
    if x.is_cuda and x.dtype == torch.bfloat16:
        fused = torch.cuda.get_device_capability(x.device)[0] >= 8
    if fused and aligned:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(sizes), weight, strict=True)])


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense feed-forward layer, or a shared expert."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x, flow=None):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoE(nn.Module):
    """A mixture-of-experts sub-layer: the experts that the router chose, plus the shared expert where there is one."""

    def __init__(self, router: nn.Module, experts: Experts, shared: SwiGLU | None = None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x, flow=None):
        """x (B, T, D) -> (B, T, D)."""
        flat = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (N, D)
        routing = self.router(flat, flow)
        y = self.experts(flat, routing.weights, routing.experts)
        y = y if self.shared is None else y + self.shared(flat)
        return y.view(x.shape)  # (N, D) -> (B, T, D)


def router_losses(routing: Routing, share):
    """Balance loss and z-loss of one router; share (N,) is each token's part in the means, 0 at padding.

    Balance (Switch Transformer, arXiv 2101.03961, eq. 4): E * sum_e f_e * P_e, where f_e is the mean share of a token's
    visits that go to expert e, and P_e its mean probability. Our convention: 1.0 is balanced, for any k.
    z (ST-MoE, arXiv 2202.08906, eq. 5): the mean of logsumexp(logits)^2, which keeps the logits small.
    """
    visits = torch.zeros_like(routing.probs).scatter_(1, routing.experts, 1.0)  # (N, E) 1 where a token goes
    load = share @ (visits / visits.sum(1, keepdim=True))  # (E,)
    return visits.shape[1] * (load * (share @ routing.probs)).sum(), share @ routing.logits.logsumexp(-1).square()


class Remix(NamedTuple):
    """A pathway to impose: `rows` replace the softmax of those routers where `at` is true (C3PO, arXiv 2504.07964)."""

    rows: dict[int, torch.Tensor]  # router index -> (B, E), or (B, T, E) for a row of its own at every token
    at: torch.Tensor | None = None  # (B, T) bool; None: at each row's last valid token


@dataclass
class Cache:
    """What attention remembers of earlier tokens. Tensors are replaced by longer ones, never written in place."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (B, G, S, C), rotated
    values: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (B, G, S, C)
    valid: torch.Tensor | None = None  # (B, S) bool, false at padding

    def extended(self, layer, k, v, write):
        """A layer's keys and values with those of new tokens, k and v (B, G, T, C), behind them; kept if write."""
        if layer in self.keys:
            k, v = torch.cat([self.keys[layer], k], 2), torch.cat([self.values[layer], v], 2)  # (B, G, S+T, C)
        if write:
            self.keys[layer], self.values[layer] = k, v
        return k, v


class Flow(NamedTuple):
    """What all blocks share in one pass: positions, mask, cache, the imposed pathway, and the routing they report."""

    cos: torch.Tensor  # (B or 1, 1, T, C)
    sin: torch.Tensor  # (B or 1, 1, T, C), negative in the first half
    mask: torch.Tensor | None  # (B, 1, T, S+T) true where a query may look; None: plain causal
    cache: Cache | None
    write: bool
    rows: dict[int, torch.Tensor]  # router index -> (N, E)
    at: torch.Tensor | None  # (N,) bool
    routing: list[Routing]
    tokens: torch.Tensor | None  # (B, T) ids, for routing by token


class Attention(nn.Module):
    """Causal attention with rotary positions, QK-norm, and key-value heads that several heads may share."""

    def __init__(self, config: MoEConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm, self.clip = layer, config.head_dim, config.qk_norm, config.clip_qkv
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.d_model, w, bias=False) for w in (width, kv_width, kv_width))
        self.o = nn.Linear(width, config.d_model, bias=False)
        if self.qk_norm != "none":
            widths = (width, kv_width) if self.qk_norm == "full" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (nn.RMSNorm(w, config.norm_eps) for w in widths)

    def forward(self, x, flow: Flow):
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, T, H*C), (B, T, G*C) twice
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (B, T, H*C) -> (B, T, H, C)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, T, H, C) -> (B, H, T, C)
        q, k = rotate(q, flow), rotate(k, flow)
        if flow.cache is not None:
            k, v = flow.cache.extended(self.layer, k, v, flow.write)  # (B, G, S+T, C)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, flow.mask, is_causal=flow.mask is None, enable_gqa=grouped)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, H, T, C) -> (B, T, H*C) -> (B, T, D)


def rotate(x, flow):
    """Rotary positions (arXiv 2104.09864): turn each pair (x[c], x[c + C/2]) by an angle that grows with position."""
    return x * flow.cos + x.roll(x.shape[-1] // 2, -1) * flow.sin  # (B, H, T, C)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)) for each feed-forward sub-layer: one in a MoE block."""

    def __init__(self, config: MoEConfig, attention: Attention, ffns: list[nn.Module]):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.d_model, config.norm_eps), attention
        self.ffn_norms = nn.ModuleList(nn.RMSNorm(config.d_model, config.norm_eps) for _ in ffns)
        self.ffns = nn.ModuleList(ffns)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, flow: Flow):
        x = x + self.dropout(self.attention(self.attention_norm(x), flow))
        for norm, ffn in zip(self.ffn_norms, self.ffns, strict=True):
            x = x + self.dropout(ffn(norm(x), flow))
        return x


class Output(NamedTuple):
    """What a forward pass tells. The trainer weighs and adds the two router losses (means over routers; 0 without)."""

    logits: torch.Tensor  # (B, T, V)
    loss: torch.Tensor | None  # the pure cross-entropy, in nats per target; None without targets
    balance_loss: torch.Tensor | float
    z_loss: torch.Tensor | float
    routing: list[Routing]  # one per router, bottom to top


class MoETransformer(nn.Module):
    """The decoder: forward = head(run(embed(tokens))).

    >>> model = MoETransformer(MoEConfig(vocab_size=50, n_experts=8, top_k=2))
    >>> out = model(torch.randint(50, (3, 7)))
    >>> out.logits.shape, out.routing[0].experts.shape  # (B, T, V); (B*T, K) of the first router
    (torch.Size([3, 7, 50]), torch.Size([21, 2]))
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        attentions = (Attention(config, layer) for layer in range(config.n_layers))
        self.blocks = nn.ModuleList(Block(config, a, self.make_ffns(a.layer)) for a in attentions)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for index, router in enumerate(self.routers()):
            router.index = index
        self.init_weights()

    def make_ffns(self, layer: int) -> list[nn.Module]:
        """The feed-forward sub-layers of a block: here one MoE layer, or one dense layer."""
        config = self.config
        if layer in config.dense_layers:
            return [SwiGLU(config.d_model, config.d_dense)]
        shared = SwiGLU(config.d_model, config.d_shared) if config.d_shared else None
        return [MoE(Router(config), Experts(config), shared)]

    def init_weights(self):
        """Normal, std 1/sqrt(fan-in); half of it where a sub-layer adds to the residual stream. Router and output layer
        start near zero, so that experts start as equals and the first loss is close to ln V."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:  # the gain of a norm
                nn.init.ones_(weight)
            elif name == "embedding.weight":
                nn.init.normal_(weight, std=0.02 if self.config.tied else 0.5)
            elif name.endswith(("unembedding.weight", "router.weight")):
                nn.init.normal_(weight, std=0.02)
            else:
                half = name.endswith((".o.weight", ".down", ".down.weight"))
                nn.init.normal_(weight, std=(0.5 if half else 1.0) * weight.shape[-1] ** -0.5)

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, D). ValueError for another shape, or for tokens outside the vocabulary."""
        shape, V = tuple(tokens.shape), self.config.vocab_size
        require(len(shape) == 2 and tokens.numel() > 0, f"tokens have shape {shape}; expected (B, T), not empty")
        low, high = (int(t) for t in tokens.aminmax())
        require(0 <= low <= high < V, f"tokens go from {low} to {high}; the vocabulary goes from 0 to {V - 1}")
        return self.dropout(self.embedding(tokens))

    def run(self, x, valid=None, cache=None, first=0, last=None, remix=None, write=True, routing=None, tokens=None):
        """The residual stream x (B, T, D) through blocks first..last-1 (default: all); not yet normalised.

        valid (B, T) bool: false at padding, on the right. cache: earlier tokens; the new ones join them unless
        write=False (a cache belongs to one choice of layers). remix: a pathway to impose; on one token, with first=l, a
        cache and write=False, it is a step of C3PO. routing: a list that collects a Routing from every router passed.
        tokens: the ids (B, T) behind x, which only routing by token asks for.
        Raises ValueError for more tokens than the context, padding on the left, a pathway that does not fit.
        """
        (B, T, _), config, device = x.shape, self.config, x.device
        new = torch.ones(B, T, dtype=torch.bool, device=device) if valid is None else valid.bool()
        require(new.shape == (B, T), f"valid has shape {tuple(new.shape)}; expected {(B, T)}")
        falling = bool((new[:, 1:] <= new[:, :-1]).all())
        require(falling, "valid is false before it is true; padding stands on the right")
        past = new[:, :0] if cache is None or cache.valid is None else cache.valid  # (B, S)
        seen, S = torch.cat([past, new], 1), past.shape[1]  # (B, S+T)
        position = (seen.cumsum(1)[:, S:] - 1).clamp(min=0)  # (B, S+T) -> (B, T)
        longest, limit = int(position.max()) + 1, config.context
        require(longest <= limit, f"a sequence of {longest} tokens is longer than the context, {limit}")
        rows, at, mask = {}, None, None
        if remix is not None:
            at = new & (position == position[:, -1:]) if remix.at is None else remix.at.bool()  # (B, T)
            require(at.shape == (B, T), f"remix.at has shape {tuple(at.shape)}; expected {(B, T)}")
            at = at.flatten()  # (B, T) -> (N,)
            for index, row in remix.rows.items():
                E, n = config.n_experts, len(self.routers())
                fits = index in range(n) and row.shape in ((B, E), (B, T, E))
                found = f"a pathway of shape {tuple(row.shape)} for router {index!r}"
                require(fits, f"{found}; expected {(B, E)} or {(B, T, E)} for one of {n} routers")
                rows[index] = (row if row.dim() == 3 else row[:, None].expand(-1, T, -1)).flatten(0, 1)  # (N, E)
        if valid is None and S == 0:
            position = position[:1]  # (1, T)
        else:
            look = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(S)  # (T, S+T) token t sees 0..S+t,
            mask = (seen[:, None] & look | look.triu(S))[:, None]  # (B, 1, T, S+T) not padding, but always itself
        half = config.head_dim // 2
        frequency = config.rope_theta ** (torch.arange(half, device=device) / -half)  # (C/2,)
        angle = (position[..., None] * frequency)[:, None]  # (B or 1, 1, T, C/2)
        cos, sin = torch.cat([angle.cos()] * 2, -1).to(x.dtype), torch.cat([-angle.sin(), angle.sin()], -1).to(x.dtype)
        flow = Flow(cos, sin, mask, cache, write, rows, at, [] if routing is None else routing, tokens)
        for block in self.blocks[first:last]:
            x = block(x, flow)
        if cache is not None and write:
            cache.valid = seen
        return x

    def head(self, x):
        """The residual stream (..., D) -> logits (..., V)."""
        output = self.embedding if self.unembedding is None else self.unembedding
        return wide(F.linear(self.norm(x), output.weight))

    def forward(self, tokens, targets=None, valid=None, cache=None, remix=None) -> Output:
        """tokens (B, T); targets (B, T): the token that should follow each, or IGNORE. For the others see `run`."""
        routing = []
        logits = self.head(self.run(self.embed(tokens), valid, cache, remix=remix, routing=routing, tokens=tokens))
        loss, balance, z = None, 0.0, 0.0
        if targets is not None:
            same = targets.shape == tokens.shape
            require(same, f"targets have shape {tuple(targets.shape)}; expected that of tokens, {tuple(tokens.shape)}")
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        share = (torch.ones_like(tokens) if valid is None else valid).flatten().to(logits.dtype)  # (B, T) -> (N,)
        if routing:
            losses = [router_losses(r, share / share.sum()) for r in routing]
            balance, z = (sum(each) / len(routing) for each in zip(*losses, strict=True))
        return Output(logits, loss, balance, z, routing)

    def generate(self, tokens, n_tokens, temperature=0.0, stop=None, valid=None, generator=None):
        """Continue prompts (B, T), greedily or sampled at a temperature; valid (B, T) is false at padding on the right.

        Returns the new tokens (B, up to n_tokens). A row that has said `stop` repeats it; when all have, it ends.
        """
        return torch.stack([*self.stream(tokens, n_tokens, temperature, stop, valid, generator)], 1)  # (B, n)

    @torch.no_grad()
    def stream(self, tokens, n_tokens, temperature=0.0, stop=None, valid=None, generator=None):
        """The same, token by token: yields (B,)."""
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.bool()
        need, limit = int(valid.sum(-1).max()) + n_tokens, self.config.context
        require(n_tokens > 0, f"n_tokens is {n_tokens}; it must be at least 1")
        require(need <= limit, f"prompt and {n_tokens} new tokens are {need} tokens; the context is {limit}")
        training, cache = self.training, Cache()
        self.eval()
        try:
            x = self.run(self.embed(tokens), valid, cache, tokens=tokens)  # (B, T, D)
            x = x[torch.arange(len(x)), valid.sum(1) - 1]  # (B, T, D) -> (B, D) the last token of each prompt
            done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for left in reversed(range(n_tokens)):
                logits = self.head(x)  # (B, V)
                token = logits.argmax(-1)  # (B,)
                if temperature > 0:
                    token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]  # (B,)
                if stop is not None:
                    token = token.masked_fill(done, stop)
                    done = token == stop
                yield token
                if left == 0 or done.all():
                    return
                x = self.run(self.embed(new := token[:, None]), cache=cache, tokens=new)[:, 0]  # (B, 1, D) -> (B, D)
        finally:
            self.train(training)

    def routers(self) -> list[Router]:
        """The routers, bottom to top; Remix.rows and Output.routing count them so."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def n_params(self, activated=False) -> int:
        """Parameters in all, or those that one token uses: without the experts that it does not visit."""
        idle = 0
        for moe in (module for module in self.modules() if activated and isinstance(module, MoE)):
            E = len(moe.experts.down)
            idle += sum(p.numel() for p in moe.experts.parameters()) * (E - moe.router.top_k) // E
        return sum(p.numel() for p in self.parameters()) - idle
