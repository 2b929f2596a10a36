"""Speed against peers: a training step of ours and of transformers' OLMoE, and where time goes.

python -m lab.speed.training [--rounds 20]    each model takes one step a round
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.speed, __doc__)

import os
import re
import time

import torch
from torch.profiler import ProfilerActivity, profile

from lab.tools.race import race
from moe import MoEConfig, MoETransformer, require

B, T = 16, 128  # sequences, tokens in each
BALANCE = 0.01  # coefficient of the balance loss
CONFIG = MoEConfig(
    vocab_size=2048,
    context=T,
    d_model=128,
    n_layers=4,
    n_heads=4,
    n_experts=16,
    top_k=4,
    d_expert=64,
)
# Not batched_mm: it copies an expert's matrices for every token, and took 30 times as long as
# grouped_mm (7.7 s a step, measured once). transformers' other implementations need a GPU.
PEERS = ("eager", "grouped_mm")
# Time belongs to the first row whose pattern is in the name of its operator, or of one that called
# it. So clearing the gradient of the cross-entropy counts as cross-entropy, and `memory` is what no
# other row caused.
REMAINDER = "the rest: Python, autograd, views, profiler"
ROWS = {
    "optimiser": "Optimizer",
    "norms (forward; backward is element-wise)": "rms_norm",
    "attention kernel": "_scaled_dot_product",
    "matrix products": r"aten::(mm|addmm|bmm|_grouped_mm)\b",
    "softmax, cross-entropy over the vocabulary": "log_softmax|nll_loss",
    "gathers, sort": r"Dispatch|Combine|index_select|embedding|"
    r"aten::(sort|topk|searchsorted|\w*scatter)",
    "memory: fill, copy, concatenate": r"aten::(fill_|copy_|cat)\b",
    "element-wise, sums": "aten::_?"
    "(mul|add|sub|div|floor|neg|silu|pow|exp|log|amax|sum|softmax|sin|cos|dot|mv)",
    REMAINDER: "",
}


def peer_config(experts: str):
    """The same sizes for transformers. experts: the name of its implementation of experts."""
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.d_model,
        intermediate_size=CONFIG.d_expert,
        num_hidden_layers=CONFIG.n_layers,
        num_attention_heads=CONFIG.n_heads,
        max_position_embeddings=T,
        num_experts=CONFIG.n_experts,
        num_experts_per_tok=CONFIG.top_k,
        pad_token_id=None,
        eos_token_id=None,
        use_cache=False,  # or else it would fill a key-value cache, for which training has no use
        output_router_logits=True,
        router_aux_loss_coef=BALANCE,
        experts_implementation=experts,
    )


def training_step(model):
    """A training step on one fixed batch: a function () -> cross-entropy."""
    torch.manual_seed(0)
    x, y = torch.randint(CONFIG.vocab_size, (2, B, T))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        if isinstance(model, MoETransformer):
            out = model(x, y)
            balance = BALANCE * out.balance_loss
            loss = out.loss + balance
        else:
            # `labels` alone would be shifted. The peer's loss holds the balance loss already.
            out = model(input_ids=x, labels=y, shift_labels=y)
            balance = BALANCE * out.aux_loss
            loss = out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss - balance).item()

    return step


def copy_weights(ours, theirs):
    """Equal weights route alike. Norms start at 1 in both; matrices come in the same order."""
    matrices = [[w.data for w in model.parameters() if w.dim() > 1] for model in (ours, theirs)]
    for own, other in zip(*matrices, strict=True):
        other.copy_(own)
    sizes = [sum(w.numel() for w in model.parameters()) for model in (ours, theirs)]
    require(sizes[0] == sizes[1], f"the models differ in size: {sizes}")


def where_time_goes(step, n: int = 5) -> dict[str, float]:
    """Milliseconds of a step for each of ROWS."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would announce itself
    with profile(activities=[ProfilerActivity.CPU]) as record:
        wall = 1000 * race([step], n).mean()
    ms = dict.fromkeys(ROWS, 0.0)
    for event in record.events():
        names, caller = [], event
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        text = " ".join(names)
        row = next(row for row, pattern in ROWS.items() if re.search(pattern, text))
        ms[row] += event.self_cpu_time_total / 1000 / n
    ms[REMAINDER] += wall - sum(ms.values())  # what ran between operators
    return ms


def bare_products(repeats: int = 10):
    """GFLOP of a step's products with weights, and the milliseconds of a loop of nothing else."""
    N, D, F = B * T, CONFIG.d_model, CONFIG.d_expert
    L, E, V = CONFIG.n_layers, CONFIG.n_experts, CONFIG.vocab_size
    n = N * CONFIG.top_k // E  # rows of an expert, were the router balanced
    sizes = [  # how many, rows, in, out
        (4 * L, N, D, D),  # attention's q, k, v and o
        (L, N, D, E),  # router
        (L * E, n, D, 2 * F),  # experts' gate and up
        (L * E, n, F, D),  # experts' down
        (1, N, D, V),  # output layer
    ]
    products, flop = [], 0
    for count, m, i, o in sizes:
        flop += count * 3 * 2 * m * i * o  # three products of 2 m i o each
        x, w, y = torch.randn(m, i), torch.randn(o, i), torch.randn(m, o)
        forward = (x, w.T, torch.empty(m, o))  # y = x w^T
        to_input = (y, w, torch.empty(m, i))  # dx = dy w
        to_weight = (y.T, x, torch.empty(o, i))  # dw = dy^T x
        products += [forward, to_input, to_weight] * count
    start = time.perf_counter()
    for a, b, out in products * repeats:
        torch.mm(a, b, out=out)
    return flop / 1e9, 1000 * (time.perf_counter() - start) / repeats


def main(argv) -> int:
    """Race, profile, report."""
    rounds = flags.speed(argv, __doc__)
    try:
        from transformers import OlmoeForCausalLM, __version__
    except ImportError:
        raise ValueError('the peers need transformers: pip install -e ".[dev]"') from None
    torch.set_num_threads(1)

    # Make all models, with the same weights. A first step, which also sets up, is not timed.
    torch.manual_seed(0)
    ours = MoETransformer(CONFIG)
    names, steps = ["ours"], [training_step(ours)]
    for experts in PEERS:
        peer = OlmoeForCausalLM(peer_config(experts))
        copy_weights(ours, peer)
        names.append(f"transformers {experts}")
        steps.append(training_step(peer))
    first = [step() for step in steps]
    require(max(first) - min(first) < 1e-4, f"the models differ in their first loss: {first}")
    ms = torch.tensor(1000 * race(steps, rounds))

    print(f"One training step of {B} x {T} tokens, float32, one thread, {rounds} rounds:")
    sizes = f"d_model {CONFIG.d_model}, {CONFIG.n_layers} layers, "
    print(f"{sizes}top-{CONFIG.top_k} of {CONFIG.n_experts} experts of {CONFIG.d_expert},")
    versions = f"torch {torch.__version__}, transformers {__version__}"
    print(f"vocabulary {CONFIG.vocab_size}; {versions}\n")

    # Ratios in pairs: noise that comes and goes cancels in them.
    quartiles = ms.new_tensor([0.5, 0.25, 0.75])
    ratios = (ms[0] / ms).quantile(quartiles, 1).T.tolist()
    medians = ms.quantile(0.5, 1).tolist()
    rows = []
    for i, name in enumerate(names):
        middle, low, high = ratios[i]
        cells = [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"] if i else ["", ""]
        row = [name, f"{ours.n_params():,}", f"{medians[i]:.1f}", f"{ms[i].min():.1f}", *cells]
        rows.append(row)
    header = ["", "parameters", "median ms", "min ms", "ours / peer", "quartiles"]
    print(cli.table(rows, header))
    fastest = max(range(1, len(names)), key=lambda i: ratios[i])
    middle, low, high = ratios[fastest]
    text = f"ours / peer = {middle:.2f} (quartiles {low:.2f} to {high:.2f})"
    print(f"\nThe fastest peer is {names[fastest]}: {text}.\n")

    where = where_time_goes(steps[0])
    total = sum(where.values())
    rows = [[row, f"{value:.1f}", f"{value / total:.1%}"] for row, value in where.items()]
    rows.append(["a step", f"{total:.1f}", f"{1:.1%}"])
    print(cli.table(rows, ["where the time goes (ours, profiled)", "ms/step", "share"]))

    gflop, bare = bare_products()
    times = {
        "a whole step": medians[0],
        "its matrix products": where["matrix products"],
        "a bare loop of them": bare,
    }
    rows = [[row, f"{t:.1f}", f"{1000 * gflop / t:.1f}"] for row, t in times.items()]
    title = f"{gflop:.2f} GFLOP of products with weights in"
    print(f"\n{cli.table(rows, [title, 'ms', 'GFLOP/s'])}")
    return 0


if __name__ == "__main__":
    cli.program(main)
