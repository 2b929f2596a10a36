"""A mixture-of-experts transformer in one file, to be read from top to bottom.

The idea. An ordinary transformer sends every token through the same feed-forward network. Here each
layer has many small networks, the *experts*, and a *router* that scores them for each token:

    scores   = softmax(W x)                   one number for each expert; W is the router
    experts  = the k highest scores           the token visits these, and no others
    y        = sum of score * expert(x)       over the k experts that it visits

So a model can hold many parameters, of which one token uses few. Three classes say this in code:
`Router` chooses, `Experts` computes, `MoE` puts them together.

Two files stand apart: input is checked in lab/tools/checks.py, and torch.compile asks for a few
lines, lab/tools/compiled.py.

By default the model computes exactly what OLMoE (arXiv 2409.02060) computes: RMSNorm before each
sub-layer, rotary positions, QK-norm, SwiGLU experts, a softmax router. No token is ever dropped,
and nothing is random in evaluation.

Letters in the shape comments:
    B batch    T tokens of this call    S tokens in the cache    N = B * T tokens in a flat list
    D d_model    E experts    K top_k    F width of an expert
    H heads    G key-value heads    C head_dim    V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.tools import compiled
from lab.tools.checks import (
    IGNORE,
    annotated,
    as_integers,
    evaluation,
    require,
    require_context,
    require_generation,
    require_in_vocabulary,
    require_inputs,
    require_logits,
    require_pathway,
    require_span,
    require_stream,
    require_tokens,
)
from lab.tools.configs import require_sizes

# ------------------------------------------------------------------------------------------ config


@dataclass
class MoEConfig:
    """The sizes of a model; the texts are the command line's help.

    Raises ValueError where the sizes do not fit together.
    """

    vocab_size: Annotated[int, "tokens in the vocabulary"] = 48
    context: Annotated[int, "longest sequence, in tokens"] = 64
    d_model: Annotated[int, "width of the residual stream"] = 64
    n_layers: Annotated[int, "number of blocks"] = 4
    n_heads: Annotated[int, "attention heads"] = 4
    n_kv_heads: Annotated[int | None, "key-value heads, shared among heads (none: n_heads)"] = None
    head_dim: Annotated[int | None, "width of a head (none: d_model / n_heads)"] = None
    n_experts: Annotated[int, "experts in each MoE layer"] = 16
    top_k: Annotated[int, "experts that each token visits"] = 4
    d_expert: Annotated[int, "hidden width of an expert"] = 64
    norm_topk: Annotated[bool, "divide the k routing weights by their sum"] = False
    d_shared: Annotated[int, "hidden width of an expert that every token visits (0: none)"] = 0
    dense_layers: Annotated[tuple[int, ...], "layers that are dense, not MoE, such as 0,2"] = ()
    d_dense: Annotated[int | None, "width of dense layers (none: what a token visits)"] = None
    qk_norm: Annotated[Literal["full", "head", "none"], "RMSNorm of queries and keys"] = "full"
    clip_qkv: Annotated[float | None, "clamp queries, keys, values to plus or minus this"] = None
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10_000.0
    norm_eps: Annotated[float, "epsilon in RMSNorm"] = 1e-5
    dropout: Annotated[float, "dropout on the embedding and on what sub-layers add"] = 0.0
    tied: Annotated[bool, "the output layer is the transposed embedding"] = False
    embedding_scale: Annotated[float, "embeddings enter the stream times this"] = 1.0
    residual_init: Annotated[float, "what sub-layers add starts at this / sqrt(fan-in)"] = 0.5

    def __post_init__(self):
        require_sizes(self)
        self.dense_layers = tuple(self.dense_layers)
        if self.head_dim is None:
            self.head_dim = self.d_model // self.n_heads
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.d_dense is None:
            # As many weights as a token visits elsewhere: three matrices of width E / 3 weigh as
            # much as a router.
            router = round(self.n_experts / 3)
            self.d_dense = self.top_k * self.d_expert + self.d_shared + router


def wide(x):
    """At least float32, in which router, softmax and loss are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------------- MoE layer


class Routing(NamedTuple):
    """Where a router sends N tokens. An imposed pathway shows in all fields but logits."""

    probs: torch.Tensor  # (N, E) softmax over all experts
    weights: torch.Tensor  # (N, K) what the output of each chosen expert is multiplied by
    experts: torch.Tensor  # (N, K) the chosen experts, most probable first
    logits: torch.Tensor  # (N, E) before the softmax


class Router(nn.Module):
    """A linear layer scores the experts, and the k best are chosen.

    A routing rule of your own is a subclass that overrides `scores` (sigmoid instead of softmax,
    noise in training) or `select` (a bias): MoETransformer(config, router=MyRouter).
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.top_k = config.top_k
        self.norm_topk = config.norm_topk
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.index = None  # its place among MoETransformer.routers(), which is set there

    def forward(self, x, flow=None) -> Routing:
        """x (N, D). The flow, if any, may impose a pathway, and collects the routing."""
        logits, probs = self.scores(x)
        if flow is not None:
            probs = self.impose(probs, flow)
        weights, experts = self.select(probs)
        routing = Routing(probs, weights.to(x.dtype), experts, logits)
        if flow is not None:
            flow.routing.append(routing)
        return routing

    def scores(self, x):
        """x (N, D) -> logits (N, E), and the probabilities of the experts (N, E)."""
        logits = wide(F.linear(x, self.weight))
        return logits, logits.softmax(-1)

    def impose(self, probs, flow):
        """Replace probs (N, E) by the flow's rows where it says so: re-mixing (remix.py)."""
        if self.index not in flow.rows:
            return probs
        row = flow.rows[self.index].to(probs.dtype)
        return torch.where(flow.at[:, None], row, probs)

    def select(self, probs):
        """probs (N, E) -> weights (N, K) and experts (N, K) of the k most probable."""
        weights, experts = probs.topk(self.top_k)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts


class Experts(nn.Module):
    """E SwiGLU networks in two stacked tensors. This loop says what they compute:

        for n in range(N):                                     # every token
            for k in range(K):                                 # every expert that it visits
                e = experts[n, k]
                gate, up = (gate_up[e] @ x[n]).chunk(2)        # (2F,) -> (F,) twice
                y[n] += weights[n, k] * down[e] @ (silu(gate) * up)

    `forward` does the same with few and large matrix products: it sorts the N * K pairs (token,
    expert) by expert, so that each expert works once, on all of its tokens together. For few
    tokens, as in generating, that does not pay: `visit` reads the chosen experts, and no others.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        E, D, F = config.n_experts, config.d_model, config.d_expert
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x, weights, experts):
        """x (N, D), weights (N, K), experts (N, K) -> the weighted sum (N, D)."""
        if experts.numel() <= len(self.down) // 2:
            return self.visit(x, weights, experts)

        # 1. Sort the pairs by expert.
        expert, order = experts.flatten().sort(stable=True)  # (N*K,): expert of a pair, its origin
        every = torch.arange(len(self.down), device=x.device)
        ends = torch.searchsorted(expert, every, right=True, out_int32=True)  # (E,) ends of groups

        # 2. Remember where each pair went: back[n, k] is the place of token n's k-th pair.
        place = torch.arange(len(order), device=x.device)
        back = torch.empty_like(order).scatter_(0, order, place)
        back = back.view(experts.shape)  # (N*K,) -> (N, K)

        # 3. A row for every pair: its token, and its routing weight.
        gradients = torch.is_grad_enabled()
        dispatch = Dispatch.apply if gradients else Dispatch.forward
        rows = dispatch(x, order, back)  # (N, D) -> (N*K, D)
        weight = dispatch(weights.reshape(-1, 1), order, back.reshape(-1, 1))  # (N*K, 1)

        # 4. Each expert on its own group of rows. The weight multiplies where a row is F wide, and
        #    not behind `down`, where it is D wide: fewer numbers, the same result.
        gate, up = grouped_matmul(rows, self.gate_up, ends).chunk(2, dim=-1)  # (N*K, F) twice
        hidden = F.silu(gate) * (up * weight)  # (N*K, F)
        y = grouped_matmul(hidden, self.down, ends)  # (N*K, D)

        # 5. The sum over the K pairs of each token.
        combine = Combine.apply if gradients else Combine.forward
        return combine(y, order, back)  # (N*K, D) -> (N, D)

    def visit(self, x, weights, experts):
        """What `forward` computes, one visit after the other."""
        N, K = experts.shape
        gate_up, down = self.gate_up, self.down
        pairs = [(x[n], e) for n, row in enumerate(experts.tolist()) for e in row]  # N*K pairs
        products = [gate_up[e].mv(token) for token, e in pairs]
        gate, up = torch.stack(products).chunk(2, dim=-1)  # (N*K, F) twice
        hidden = F.silu(gate) * (up * weights.reshape(-1, 1))  # (N*K, F)
        products = [down[e].mv(h) for h, (_, e) in zip(hidden, pairs, strict=True)]
        return torch.stack(products).view(N, K, -1).sum(1)  # (N*K, D) -> (N, D)


class Dispatch(torch.autograd.Function):
    """A row for every pair: x (N, D), order (N*K,), back (N, K) -> (N*K, D), sorted by expert.

    Its gradient sums over the pairs of a token, as Combine does. Autograd would use a scatter-add,
    which is slower, and on a GPU may differ from run to run.
    """

    @staticmethod
    def forward(x, order, back):
        token = order // back.shape[1]  # (N*K,) the token of each pair
        return x.index_select(0, token)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        _, back = ctx.saved_tensors
        return F.embedding_bag(back, grad.contiguous(), mode="sum"), None, None


class Combine(torch.autograd.Function):
    """The sum over the pairs of each token: y (N*K, D), order (N*K,), back (N, K) -> (N, D).

    Its gradient gives each pair that of its token, as Dispatch does.
    """

    @staticmethod
    def forward(y, order, back):
        return F.embedding_bag(back, y, mode="sum")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        token = order // back.shape[1]  # (N*K,)
        return grad.index_select(0, token), None, None


def grouped_matmul(x, weight, ends):
    """Rows x (M, I), sorted by expert, each times its expert's matrix: weight (E, O, I) -> (M, O).

    ends (E,): where the rows of each expert end. A loop over the experts says what is computed;
    torch has a fused kernel for it, which takes rows of whole 16 bytes.
    """
    if has_fused_kernel(x, weight):
        compiling = x.is_cpu and torch.compiler.is_compiling()
        multiply = compiled.grouped_mm if compiling else F.grouped_mm
        return multiply(x, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = zip(x.split(sizes), weight, strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in groups])


def has_fused_kernel(x, weight) -> bool:
    """float32 and bfloat16 on a CPU, bfloat16 on CUDA from compute capability 8."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.is_cuda and x.dtype == torch.bfloat16:
        return aligned and torch.cuda.get_device_capability(x.device)[0] >= 8
    return aligned and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)


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
    """A mixture-of-experts sub-layer: the experts that the router chose, and the shared expert."""

    def __init__(self, router: nn.Module, experts: Experts, shared: SwiGLU | None = None):
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x, flow=None):
        """x (B, T, D) -> (B, T, D)."""
        flat = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (N, D)
        routing = self.router(flat, flow)
        y = self.experts(flat, routing.weights, routing.experts)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view(x.shape)  # (N, D) -> (B, T, D)


def expert_load(routing: Routing, share):
    """The share of the visits of N tokens that goes to each expert (E,); share: see below."""
    visits = torch.zeros_like(routing.probs).scatter_(1, routing.experts, 1.0)  # (N, E), 0 or 1
    return share @ (visits / visits.sum(1, keepdim=True))  # (E,)


def router_losses(routing: Routing, share, load=None):
    """Balance loss and z-loss of one router.

    share (N,): each token's share in the means, 0 at padding, of sum 1.
    load (E,): f_e, where it is known from more tokens than these.
    Balance (Switch Transformer, arXiv 2101.03961, eq. 4): E * sum_e f_e * P_e, where f_e is the
    mean share of a token's visits that go to expert e, and P_e its mean probability. In our
    convention 1.0 is balanced, for any k.
    z (ST-MoE, arXiv 2202.08906, eq. 5): the mean of logsumexp(logits)^2; it keeps logits small.
    """
    n_experts = routing.probs.shape[1]
    if load is None:
        load = expert_load(routing, share)  # (E,)
    mean_probs = share @ routing.probs  # (E,)
    balance = n_experts * (load * mean_probs).sum()
    z = share @ routing.logits.logsumexp(-1).square()
    return balance, z


# --------------------------------------------------------------------------------------- one pass

ROOM = 64  # tokens: a cache grows by so many at a time


class Imposed(NamedTuple):
    """A pathway to impose: `rows` replace the probabilities of those routers where `at` is true.

    This is all that re-mixing (C3PO, arXiv 2504.07964) needs of a model.
    """

    rows: dict[int, torch.Tensor]  # router index -> (B, E), or (B, T, E): a row for every token
    at: torch.Tensor | None = None  # (B, T) bool; None: at the last valid token of each sequence


@dataclass
class Cache:
    """What attention remembers of earlier tokens. A tensor in it is replaced, and never changes."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (B, G, S, C), rotated
    values: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (B, G, S, C)
    valid: torch.Tensor | None = None  # (B, S) bool, false at padding
    room: dict[int, tuple] = field(default_factory=dict, init=False)  # see `appended`

    def extended(self, layer, k, v, write):
        """A layer's keys and values, those of new tokens k, v (B, G, T, C) behind them.

        They are kept if `write`.
        """
        if layer in self.keys:
            if write and not torch.is_grad_enabled():
                k, v = self.appended(layer, k, v)
            else:
                k = torch.cat([self.keys[layer], k], 2)  # (B, G, S+T, C)
                v = torch.cat([self.values[layer], v], 2)
        if write:
            self.keys[layer] = k
            self.values[layer] = v
        return k, v

    def appended(self, layer, k, v):
        """What `extended` returns, as views of a buffer with room for tokens to come.

        So a token is written behind the earlier ones, which are copied only where room ends, or
        where someone has put other tensors into the cache than those views.
        """
        S, T = self.keys[layer].shape[2], k.shape[2]
        buffer, *views = self.room.get(layer, (None, None, None))
        ours = views[0] is self.keys[layer] and views[1] is self.values[layer]
        if not ours or buffer.shape[3] < S + T:
            buffer = torch.stack([self.keys[layer], self.values[layer]])  # (2, B, G, S, C)
            buffer = F.pad(buffer, (0, 0, 0, T + ROOM))
        buffer[0, :, :, S : S + T] = k
        buffer[1, :, :, S : S + T] = v
        k, v = buffer[:, :, :, : S + T]  # (B, G, S+T, C) twice
        self.room[layer] = buffer, k, v
        return k, v


class Flow(NamedTuple):
    """What all blocks share in one pass."""

    cos: torch.Tensor  # (B or 1, 1, T, C)
    sin: torch.Tensor  # (B or 1, 1, T, C), negative in the first half
    mask: torch.Tensor | None  # (B, 1, T, S+T) true where a query may look; None: all before it
    cache: Cache | None
    write: bool  # whether the new tokens join the cache
    rows: dict[int, torch.Tensor]  # the imposed pathway: router index -> (N, E)
    at: torch.Tensor | None  # (N,) bool: where it is imposed
    routing: list[Routing]  # what the routers report
    tokens: torch.Tensor | None  # (B, T) ids, for routing by token


# ------------------------------------------------------------------------------------------ block


class Attention(nn.Module):
    """Causal attention with rotary positions, QK-norm, and key-value heads that heads may share."""

    def __init__(self, config: MoEConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.clip = config.clip_qkv
        width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.q = nn.Linear(config.d_model, width, bias=False)
        self.k = nn.Linear(config.d_model, kv_width, bias=False)
        self.v = nn.Linear(config.d_model, kv_width, bias=False)
        self.o = nn.Linear(width, config.d_model, bias=False)
        if self.qk_norm == "full":
            self.q_norm = nn.RMSNorm(width, config.norm_eps)
            self.k_norm = nn.RMSNorm(kv_width, config.norm_eps)
        if self.qk_norm == "head":
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, flow: Flow):
        """x (B, T, D) -> (B, T, D)."""
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, T, H*C), and (B, T, G*C) twice
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (each.clamp(-self.clip, self.clip) for each in (q, k, v))

        # Heads become a dimension of their own: (B, T, H*C) -> (B, T, H, C).
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, H, T, C)

        # Positions turn queries and keys; earlier tokens come from the cache.
        q, k = rotate(q, flow), rotate(k, flow)
        if not self.training:  # of a key that is infinite, this makes NaN, which `head` refuses
            v = torch.add(v, k, alpha=0)
        past = None if flow.cache is None or flow.write else flow.cache.keys.get(self.layer)
        if past is not None and q.shape[2] == 1 and flow.mask is not None:
            y = look_back(q, k, v, past, flow.cache.values[self.layer], flow.mask)
            return self.o(y.flatten(1)[:, None])  # (B, H, 1, C) -> (B, 1, D)
        if flow.cache is not None:
            k, v = flow.cache.extended(self.layer, k, v, flow.write)  # (B, G, S+T, C)

        causal = flow.mask is None
        if q.shape[2] == 1:  # a single token looks at all before it
            causal = False
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=flow.mask,
            is_causal=causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (B, H, T, C)
        if not self.training:  # torch's kernel gives 0 for a query of NaN
            y = torch.add(y, q, alpha=0)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, H*C) -> (B, T, D)


def look_back(q, k, v, past_k, past_v, mask):
    """The attention of one new token to itself and to a past (B, G, S, C), as in a step of C3PO.

    q (B, H, 1, C), k and v (B, G, 1, C) -> (B, H, 1, C). It is what scaled_dot_product_attention
    computes of past and token together. But that one copies the past, and takes most of its time
    for the gradient of all keys and values, which nobody asks for.
    """
    heads = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, G, H/G, C), which share keys
    scores = torch.cat([heads @ past_k.mT, heads @ k.mT], 3)  # (B, G, H/G, S+1)
    scores = wide(scores) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    y = weights[..., :-1] @ past_v + weights[..., -1:] @ v
    return y.reshape(q.shape)


def rotate(x, flow):
    """Rotary positions (arXiv 2104.09864): turn each pair (x[c], x[c + C/2]) of x (B, H, T, C).

    The angle grows with the position, so that scores depend on distances between tokens.
    """
    half = x.shape[-1] // 2
    return x * flow.cos + x.roll(half, -1) * flow.sin


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)) for each feed-forward sub-layer.

    A MoE block has one such sub-layer, a Cartesian block two (cartesian.py).
    """

    def __init__(self, config: MoEConfig, attention: Attention, ffns: list[nn.Module]):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = attention
        norms = [nn.RMSNorm(config.d_model, config.norm_eps) for _ in ffns]
        self.ffn_norms = nn.ModuleList(norms)
        self.ffns = nn.ModuleList(ffns)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, flow: Flow):
        """x (B, T, D) -> (B, T, D)."""
        x = self.attend(x, flow)
        for norm, ffn in zip(self.ffn_norms, self.ffns, strict=True):
            x = x + self.dropout(ffn(norm(x), flow))
        return x

    def attend(self, x, flow: Flow):
        """The first sub-layer alone. It leaves the block's keys and values in the cache."""
        return x + self.dropout(self.attention(self.attention_norm(x), flow))


# ------------------------------------------------------------------------------------------ model


class Output(NamedTuple):
    """What a forward pass gives. The trainer weighs the router losses and adds them to `loss`."""

    logits: torch.Tensor  # (B, T, V)
    loss: torch.Tensor | None  # the pure cross-entropy, nats per target; None without targets
    balance_loss: torch.Tensor | float  # the mean over routers; 0 without routers
    z_loss: torch.Tensor | float  # likewise
    routing: list[Routing]  # one for each router, bottom to top


class MoETransformer(nn.Module):
    """The decoder: forward = head(run_blocks(embed(tokens))).

    >>> model = MoETransformer(MoEConfig(vocab_size=50, n_experts=8, top_k=2))
    >>> out = model(torch.randint(50, (3, 7)))
    >>> out.logits.shape, out.routing[0].experts.shape  # (B, T, V); (B*T, K) of the first router
    (torch.Size([3, 7, 50]), torch.Size([21, 2]))
    """

    @annotated
    def __init__(self, config: MoEConfig, router: type[Router] = Router):
        super().__init__()
        self.config = config
        self.router_class = router
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        blocks = []
        for layer in range(config.n_layers):
            attention = Attention(config, layer)
            blocks.append(Block(config, attention, self.make_ffns(layer)))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = None
        if not config.tied:
            self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for index, each in enumerate(self.routers()):
            each.index = index
        self.init_weights()

    def make_ffns(self, layer: int) -> list[nn.Module]:
        """The feed-forward sub-layers of a block: here one MoE layer, or one dense layer."""
        config = self.config
        if layer in config.dense_layers:
            return [SwiGLU(config.d_model, config.d_dense)]
        shared = None
        if config.d_shared > 0:
            shared = SwiGLU(config.d_model, config.d_shared)
        return [MoE(self.router_class(config), Experts(config), shared)]

    def init_weights(self):
        """Normal, std 1/sqrt(fan-in); residual_init of it where a sub-layer adds to the stream.

        Router and output layer start near zero, so that experts start as equals and the first loss
        is close to ln V.
        """
        for name, weight in self.named_parameters():
            std = weight.shape[-1] ** -0.5
            if weight.dim() == 1:  # the gain of a norm
                nn.init.ones_(weight)
                continue
            if name == "embedding.weight":
                std = 0.02 if self.config.tied else 0.5
            elif name.endswith(("unembedding.weight", "router.weight")):
                std = 0.02
            elif name.endswith((".o.weight", ".down", ".down.weight")):
                std = self.config.residual_init * std
            nn.init.normal_(weight, std=std)

    def forward(self, tokens, targets=None, valid=None, cache=None, imposed=None) -> Output:
        """tokens (B, T); targets (B, T): the token that should follow each, or IGNORE.

        For the other arguments see `run_blocks`. ValueError for tensors that do not fit.
        """
        routing = []
        x = self.embed(tokens)  # (B, T, D)
        require_inputs(tokens, targets, valid, self.config.vocab_size)
        x = self.run_blocks(x, valid, cache, imposed=imposed, routing=routing, tokens=tokens)
        logits = self.head(x)  # (B, T, V)

        loss = None
        if targets is not None:
            flat = logits.flatten(0, 1)  # (B, T, V) -> (N, V)
            loss = F.cross_entropy(flat, targets.flatten().long(), ignore_index=IGNORE)

        balance, z = 0.0, 0.0
        if routing:
            counted = torch.ones_like(tokens) if valid is None else valid  # (B, T)
            share = counted.flatten().to(logits.dtype)  # (N,)
            share = share / share.sum()
            losses = [router_losses(each, share) for each in routing]
            balance = sum(each[0] for each in losses) / len(losses)
            z = sum(each[1] for each in losses) / len(losses)
        return Output(logits, loss, balance, z, routing)

    def embed(self, tokens):
        """tokens (B, T) -> (B, T, D). ValueError for tokens outside the vocabulary."""
        require_tokens(tokens, self.config.vocab_size)
        return self.dropout(self.embedding(tokens.long()) * self.config.embedding_scale)

    @annotated
    def run_blocks(
        self,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        cache: Cache | None = None,
        first: int = 0,
        last: int | None = None,
        imposed: Imposed | None = None,
        write=True,
        only_cache=False,
        routing=None,
        tokens=None,
    ):
        """The residual stream x (B, T, D) through blocks first..last-1 (default: all) -> (B, T, D).

        valid: (B, T) bool, false at padding, which stands on the right.
        cache: earlier tokens, of the same blocks. New tokens join them, unless write=False.
        imposed: a pathway to impose. On one token, with first=l, a cache and write=False, this is
            one step of C3PO (remix.py).
        only_cache: keys and values are all that is wanted, so that no expert of the model's last
            block is asked.
        routing: a list that collects a Routing from every router on the way.
        tokens: the ids (B, T) behind x, for which only routing by token asks.
        Raises ValueError for more tokens than the context, padding on the left, a pathway that
        does not fit, blocks that are not there. The result is not yet normalised; `head` does that.
        """
        n_blocks = len(self.blocks)
        require_span(first, n_blocks if last is None else last, n_blocks)
        require_stream(x, valid, cache, self.config.d_model)
        B, T, _ = x.shape
        new = torch.ones(B, T, device=x.device) if valid is None else valid  # (B, T)
        new = new.bool()

        # Where each token stands: padding does not count.
        past = new[:, :0] if cache is None or cache.valid is None else cache.valid  # (B, S)
        S = past.shape[1]
        seen = torch.cat([past, new], 1)  # (B, S+T)
        position = (seen.cumsum(1)[:, S:] - 1).clamp(min=0)  # (B, S+T) -> (B, T)
        require_context(position, self.config.context)

        # What all blocks share.
        mask = None
        if valid is not None or S > 0:
            mask = causal_mask(seen, T)  # (B, 1, T, S+T)
        else:
            position = position[:1]  # (1, T): all sequences have the same positions
        cos, sin = rotary_angles(position, self.config)
        rows, at = self.imposed_rows(imposed, new, position)
        flow = Flow(
            cos=cos.to(x.dtype),
            sin=sin.to(x.dtype),
            mask=mask,
            cache=cache,
            write=write,
            rows=rows,
            at=at,
            routing=[] if routing is None else routing,
            tokens=tokens,
        )
        for block in self.blocks[first:last]:
            half = only_cache and block is self.blocks[-1]
            x = block.attend(x, flow) if half else block(x, flow)
        if cache is not None and write:
            cache.valid = seen
        return x

    def imposed_rows(self, imposed: Imposed | None, new, position):
        """A pathway for a flat list of tokens -> rows {router: (N, E)}, at (N,)."""
        if imposed is None:
            return {}, None
        B, T = new.shape
        at = imposed.at
        if at is None:
            at = new & (position == position[:, -1:])  # (B, T) the last valid token
        require_pathway(imposed.rows, at, (B, T), self.config.n_experts, len(self.routers()))
        rows = {}
        for index, row in imposed.rows.items():
            if row.dim() == 2:
                row = row[:, None].expand(-1, T, -1)  # (B, E) -> (B, T, E)
            rows[index] = row.flatten(0, 1)  # (B, T, E) -> (N, E)
        return rows, at.bool().flatten()  # (B, T) -> (N,)

    def head(self, x):
        """The residual stream (..., D) -> logits (..., V)."""
        output = self.embedding if self.unembedding is None else self.unembedding
        logits = wide(F.linear(self.norm(x), output.weight))
        if not self.training:  # a trainer sees it in the loss
            require_logits(logits, self)
        return logits

    @annotated
    def generate(
        self,
        tokens: torch.Tensor,
        n_tokens: int,
        temperature: float = 0.0,
        stop=None,
        valid: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        show: Callable | None = None,
    ):
        """Continue prompts (B, T) by up to n_tokens -> the new tokens (B, up to n_tokens).

        temperature: 0 always takes the most probable token; above 0, tokens are drawn.
        stop: a token that ends a sequence, or several. A sequence that has ended repeats its own.
        valid: (B, T) bool, false at padding on the right.
        show: a function that is called with the new tokens (B,) of each step as they come.
        """
        require_generation(tokens, valid, n_tokens, temperature, self.config)
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.bool()
        ends = as_integers("stop", [] if stop is None else stop, tokens.device)
        require_in_vocabulary("stop", ends, self.config.vocab_size)
        with evaluation(self), torch.inference_mode():
            # All of the prompt at once; the last token of each sequence predicts the next one.
            cache = Cache()
            x = self.run_blocks(self.embed(tokens), valid, cache, tokens=tokens)  # (B, T, D)
            row = torch.arange(len(x), device=x.device)
            x = x[row, valid.sum(1) - 1]  # (B, T, D) -> (B, D)

            # Then one token at a time.
            flows = self.coming(valid, n_tokens, cache, x.dtype)
            new = []
            ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            while True:
                token = next_token(self.head(x), temperature, generator)  # (B,)
                if new:
                    token = torch.where(ended, new[-1], token)
                ended = torch.isin(token, ends)
                new.append(token)
                if show is not None:
                    show(token)
                if len(new) == n_tokens or ended.all():
                    break
                column = token[:, None]  # (B, 1)
                x = self.embedding(column) * self.config.embedding_scale  # (B, 1, D)
                flow = next(flows)._replace(tokens=column)
                for block in self.blocks:
                    x = block(x, flow)
                x = x[:, 0]  # (B, 1, D) -> (B, D)
        return torch.stack(new, 1)  # (B, n)

    def coming(self, valid, n_tokens, cache, dtype):
        """A Flow for each of n_tokens tokens behind prompts, valid (B, S): what `run_blocks` would
        find for one after the other, made at once."""
        S = valid.shape[1]
        seen = F.pad(valid, (0, n_tokens), value=True)  # (B, S+n)
        position = seen.cumsum(1)[:, S:] - 1  # (B, n)
        cos, sin = (each.to(dtype) for each in rotary_angles(position, self.config))  # (B, 1, n, C)
        padded = not bool(valid.all())
        for i in range(n_tokens):
            yield Flow(
                cos=cos[:, :, i : i + 1],
                sin=sin[:, :, i : i + 1],
                mask=seen[:, None, None, : S + i + 1] if padded else None,
                cache=cache,
                write=True,
                rows={},
                at=None,
                routing=[],
                tokens=None,
            )

    def routers(self) -> list[Router]:
        """The routers, bottom to top; Imposed.rows and Output.routing count them so."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def n_params(self, activated=False) -> int:
        """The number of parameters; activated: only of those that one token uses."""
        total = sum(weight.numel() for weight in self.parameters())
        if not activated:
            return total
        idle = 0  # in experts that a token does not visit
        for module in self.modules():
            if isinstance(module, MoE):
                size = sum(weight.numel() for weight in module.experts.parameters())
                n_experts = len(module.experts.down)
                idle += size * (n_experts - module.router.top_k) // n_experts
        return total - idle


def next_token(logits, temperature, generator):
    """logits (B, V) -> the most probable token (B,), or one drawn at a temperature above 0."""
    if temperature == 0:
        return logits.argmax(-1)
    below = logits - logits.amax(-1, keepdim=True)  # 0 for the best token: no overflow near 0
    probs = (below / max(float(temperature), 1e-30)).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def causal_mask(seen, T: int):
    """seen (B, S+T) bool: what is no padding -> (B, 1, T, S+T) bool: where a query may look."""
    S = seen.shape[1] - T
    look = torch.ones(T, S + T, dtype=torch.bool, device=seen.device)
    look = look.tril(S)  # token t sees the places 0..S+t,
    itself = look.triu(S)
    mask = seen[:, None] & look | itself  # not padding, but always itself
    return mask[:, None]


def rotary_angles(position, config: MoEConfig):
    """position (B or 1, T) -> cos and sin (B or 1, 1, T, C) of the angles; see `rotate`."""
    half = config.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position.device) / -half
    frequency = config.rope_theta**exponent  # (C/2,)
    angle = (position[..., None] * frequency)[:, None]  # (B or 1, 1, T, C/2)
    cos = torch.cat([angle.cos(), angle.cos()], -1)
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    return cos, sin


def unwrapped(model) -> MoETransformer:
    """The model inside of what torch.compile or data-parallel training wraps around it."""
    inside = []
    if isinstance(model, nn.Module):
        inside = [module for module in model.modules() if isinstance(module, MoETransformer)]
    found = type(model).__name__
    require(len(inside) == 1, f"expected a MoETransformer, or a wrapper of one; found {found}")
    return inside[0]


def named_tensors(model) -> dict[str, torch.Tensor]:
    """Weights and buffers by the names that they have without wrappers, also of single blocks."""
    tensors = unwrapped(model).state_dict(keep_vars=True)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
