"""What C3PO costs, by formula, by profiler and by the clock: the exact form against full forwards.

`python -m lab.speed` measures it, beside everything else.
"""

import io
from contextlib import redirect_stderr

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lab.tools.race import race
from moe import Imposed, MoEConfig, MoETransformer
from pathways import Neighbours, ReferenceSet, Tail, critical_layers, frozen
from remix import NeighbourLoss, RemixConfig, core_experts, ngd

OLMOE = MoEConfig(50_304, 4096, 2048, 16, 16, n_experts=64, top_k=8, d_expert=1024)
OLMOE_SHAPE = MoEConfig(3_144, 128, 128, 16, 16, n_experts=64, top_k=8, d_expert=64)  # its shape
SKILLS_SIZES = MoEConfig(vocab_size=47, context=64)
K = 3  # neighbours of a prompt


class Counter(TorchDispatchMode):
    """While it is entered, it counts the floating-point operations by torch's formulas.

    torch's own FlopCounterMode, which also counts for each module, takes several times as long.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        packet = operator.overloadpacket
        if packet == torch.ops.aten._grouped_mm:
            x, weight = args[:2]  # (M, I), (E, I, O); for gradients of weights (I, M), (M, O)
            self.total += 2 * x.shape[0] * weight.shape[-2] * weight.shape[-1]
        elif packet in flop_registry and packet != torch.ops.aten.bmm:  # of a token's attention
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count_operations(call) -> int:
    """The floating-point operations of a call, grouped products included.

    Attention to other tokens is left out: torch does not count its own kernel for that, either.
    """
    counter = Counter()
    with counter, redirect_stderr(io.StringIO()):  # what it notes, it notes where it is scored
        call()
    return counter.total


# ---- formula


def formula(sizes: MoEConfig, T: int, last: int, k: int, steps: int) -> dict[str, float]:
    """The cost of NGD for one prompt, in base forwards of that prompt.

    T: tokens of every prompt. last: so many layers are critical. A token costs 2 operations for
    each weight that it visits; attention to other tokens, norms and softmaxes are left out."""
    # One token through one layer, and through the output layer.
    queries = sizes.n_heads * sizes.head_dim
    keys = sizes.n_kv_heads * sizes.head_dim
    attention = 2 * sizes.d_model * (2 * queries + 2 * keys)
    router = 2 * sizes.d_model * sizes.n_experts
    down = 2 * sizes.top_k * sizes.d_model * sizes.d_expert  # one of an expert's three matrices
    layer = attention + router + 3 * down
    head = 2 * sizes.d_model * sizes.vocab_size

    # The gradient costs as much again, but less in the first critical layer: nothing below it is
    # asked for, and so only what the experts' down projections pass back.
    backward = (last - 1) * layer + down

    # A neighbour goes forward and back at every step, then forward again.
    exact = (steps + 1) * last * layer + steps * backward
    heads = (2 * steps + 1) * head
    prompt = sizes.n_layers * T * layer
    prefix = prompt - T * (router + 3 * down)  # the last layer leaves its keys and values only
    full = T * ((steps + 1) * sizes.n_layers * layer + steps * backward)
    costs = {
        "candidate steps": exact,
        "  with the output layer": exact + heads,
        "neighbours' prefixes, if none is kept": prefix,
        "naive: full forwards": full + heads,
    }
    base = prompt + head
    return {name: k * cost / base for name, cost in costs.items()}


# ---- measured


def measure_ngd(
    sizes: MoEConfig, T: int, layers: str, n: int, few: int, dtype=torch.float32, rounds=3
):
    """NGD on n prompts of T random tokens: the exact steps, the prefixes that they need, and the
    steps as full forwards (of a few prompts, which keep a processor as busy).

    Returns the seconds of a prompt in each round, its operations, and how far the losses are apart.
    """
    # A random model, and random prompts. Each has K references of its own as neighbours.
    torch.manual_seed(0)
    model = MoETransformer(sizes).to(dtype).eval()
    config = RemixConfig(k=K, layers=layers)
    tail = Tail(model, critical_layers(model, layers))
    m = K * n  # references
    tokens = torch.randint(sizes.vocab_size, (m, T))
    lengths = torch.full((m,), T)
    labels = torch.randint(sizes.vocab_size, (m,))
    references = ReferenceSet.build(model, tokens, labels)
    index, weight = torch.arange(m).view(n, K), torch.full((n, K), 1 / K, dtype=dtype)
    usable = torch.ones(n, m, dtype=torch.bool)
    near = Neighbours(index, weight, usable, tail.pathways(references))

    with frozen(model), torch.no_grad():
        # The loss as remix.py computes it, and the same by full forwards.
        start, _ = tail.own(tail.cut(tokens[:n], lengths[:n]))
        exact_loss = NeighbourLoss(tail, near, references, config)
        exact_loss(start)  # makes the prefixes
        naive_losses = []

        def naive_loss(pathway):
            """pathway (few, L, E) -> (few,)."""
            rows = pathway.repeat_interleave(K, 0).unbind(1)  # (few*K, E) for each router
            imposed = Imposed(dict(zip(tail.routers, rows, strict=True)))
            x = model.run_blocks(model.embed(tokens[: K * few]), imposed=imposed)
            logits = model.head(x[:, -1])  # (few*K, T, D) -> (few*K, V)
            nats = F.cross_entropy(logits, labels[: K * few], reduction="none")
            loss = nats.view(few, K).mean(1)
            naive_losses.append(loss.detach())
            return loss

        def descent(loss, count):
            with torch.enable_grad():
                ngd(core_experts(start[:count]), loss, near, config)

        calls = {
            "exact": (n, lambda: descent(exact_loss, n)),
            "prefixes": (n, lambda: tail.cut(tokens, lengths)),
            "naive": (few, lambda: descent(naive_loss, few)),
        }

        # The clock: all take turns.
        rows = race([call for _, call in calls.values()], rounds)  # (3, rounds)
        counts = [count for count, _ in calls.values()]
        seconds = dict(zip(calls, (rows.T / counts).T, strict=True))

        # The profiler.
        operations = {name: count_operations(call) / count for name, (count, call) in calls.items()}

        # The losses of the last descents, side by side.
        n_calls = config.steps + 1
        exact = torch.stack(exact_loss.values[-n_calls:])[:, :few]
        naive = torch.stack(naive_losses[-n_calls:])
        apart = float((exact - naive).abs().max())
    return seconds, operations, apart
