"""Speed against peers: a training step of ours and of transformers' OLMoE, and where ours spends its time."""

import argparse
import os
import re
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from moe import MoEConfig, MoETransformer

try:
    from transformers import OlmoeConfig, OlmoeForCausalLM, __version__
except ImportError as error:
    sys.exit(f"The peers need transformers, which is in the extra `dev`: pip install -e .[dev]  ({error})")

B, T, BALANCE = 16, 128, 0.01  # sequences, tokens in each, coefficient of the balance loss
C = MoEConfig(vocab_size=2048, context=T, d_model=128, n_layers=4, n_heads=4, n_experts=16, top_k=4, d_expert=64)
# Not batched_mm: it copies an expert's matrices for every token, and took 30 times as long as grouped_mm (7.7 s a step,
# measured once). transformers' other implementations need a GPU.
PEERS = ("eager", "grouped_mm")
# Time belongs to the first row whose pattern is in the name of its operator, or of one that called it: clearing the
# gradient of the cross-entropy counts as cross-entropy, and `memory` is what no other row caused.
ROWS = {
    "optimiser": "Optimizer",
    "norms (forward; backward is element-wise)": "rms_norm",
    "attention kernel": "_scaled_dot_product",
    "matrix products": r"aten::(mm|addmm|bmm|_grouped_mm)\b",
    "softmax, cross-entropy over the vocabulary": "log_softmax|nll_loss",
    "gathers, sort": r"Gather|index_select|embedding|aten::(sort|topk|searchsorted|\w*scatter)",
    "memory: fill, copy, concatenate": r"aten::(fill_|copy_|cat)\b",
    "element-wise, sums": "aten::_?(mul|add|sub|div|floor|neg|silu|pow|exp|log|amax|sum|softmax|sin|cos|dot|mv)",
    "the rest: Python, autograd, views, profiler": "",
}


def build(experts=None):
    """Our model (None) or a peer, and its training step: () -> (milliseconds, cross-entropy)."""
    sizes = {"vocab_size": C.vocab_size, "hidden_size": C.d_model, "intermediate_size": C.d_expert}
    sizes |= {"num_hidden_layers": C.n_layers, "num_attention_heads": C.n_heads, "max_position_embeddings": T}
    sizes |= {"num_experts": C.n_experts, "num_experts_per_tok": C.top_k, "pad_token_id": None, "eos_token_id": None}
    # use_cache=False: or else the peer would also fill a key-value cache, which training has no use for.
    sizes |= {"use_cache": False, "output_router_logits": True, "router_aux_loss_coef": BALANCE}
    ours = experts is None
    torch.manual_seed(0)
    x, y = torch.randint(C.vocab_size, (2, B, T))
    model = MoETransformer(C) if ours else OlmoeForCausalLM(OlmoeConfig(**sizes, experts_implementation=experts))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        start = time.perf_counter()
        out = model(x, y) if ours else model(input_ids=x, labels=y, shift_labels=y)  # labels alone would be shifted
        balance = BALANCE * (out.balance_loss if ours else out.aux_loss)
        loss = out.loss + balance if ours else out.loss  # the peer's holds it already
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (time.perf_counter() - start) * 1e3, (loss - balance).item()

    return model, step


def where_time_goes(step, n=5):
    """Milliseconds per step for each of ROWS."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would announce itself
    with profile(activities=[ProfilerActivity.CPU]) as record:
        wall = sum(step()[0] for _ in range(n)) / n
    ms = dict.fromkeys(ROWS, 0.0)
    for event in record.events():
        names, caller = "", event
        while caller is not None:
            names, caller = f"{names} {caller.name}", caller.cpu_parent
        ms[next(row for row in ROWS if re.search(ROWS[row], names))] += event.self_cpu_time_total / 1e3 / n
    ms[list(ROWS)[-1]] += wall - sum(ms.values())  # what ran between operators
    return ms


def bare_products(repeats=10):
    """GFLOP of a step's products with weights, and the milliseconds of a loop that does nothing else."""
    N, D, F, L, E, V = B * T, C.d_model, C.d_expert, C.n_layers, C.n_experts, C.vocab_size
    n, loop, flop = N * C.top_k // E, [], 0  # n: rows of an expert, were the router balanced
    # (how many, rows, in, out): attention's q, k, v and o; router; experts' gate with up, and down; output layer
    sizes = [(4 * L, N, D, D), (L, N, D, E), (L * E, n, D, 2 * F), (L * E, n, F, D), (1, N, D, V)]
    for times, m, i, o in sizes:
        flop += times * 3 * 2 * m * i * o  # three products of 2 m i o each: y = x w^T, dx = dy w, dw = dy^T x
        x, w, y = torch.randn(m, i), torch.randn(o, i), torch.randn(m, o)
        loop += [(x, w.T, torch.empty(m, o)), (y, w, torch.empty(m, i)), (y.T, x, torch.empty(o, i))] * times
    start = time.perf_counter()
    for a, b, out in loop * repeats:
        torch.mm(a, b, out=out)
    return flop / 1e9, (time.perf_counter() - start) * 1e3 / repeats


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="each model takes one step a round (default: 20)")
    rounds = max(1, parser.parse_args().rounds)
    torch.set_num_threads(1)
    models, steps = zip(*map(build, (None, *PEERS)), strict=True)
    params = [sum(p.numel() for p in model.parameters()) for model in models]
    assert len(set(params)) == 1, f"the models differ in size: {params}"
    # With equal weights they route alike. Norms start at 1 in both; the matrices come in the same order.
    for mine, *theirs in zip(*([p.data for p in model.parameters() if p.dim() > 1] for model in models), strict=True):
        for weight in theirs:
            weight.copy_(mine)
    losses = [step()[1] for step in steps]  # not timed: a first step also sets up
    assert max(losses) - min(losses) < 1e-4, f"the models differ in their first loss: {losses}"
    ms, order = torch.empty(len(steps), rounds), list(range(len(steps)))
    for r in range(rounds):
        for i in order:
            ms[i, r] = steps[i]()[0]
        order.reverse()  # so that no model always follows the same one

    print(f"One training step of {B} x {T} tokens, float32, one thread, {rounds} rounds:")
    print(f"d_model {C.d_model}, {C.n_layers} layers, top-{C.top_k} of {C.n_experts} experts of {C.d_expert},")
    print(f"vocabulary {C.vocab_size}; torch {torch.__version__}, transformers {__version__}\n")
    print(f"{'':24}{'parameters':>12}{'median ms':>11}{'min ms':>9}{'ours / peer':>13}{'quartiles':>15}")
    names, medians = ["ours", *(f"transformers {experts}" for experts in PEERS)], ms.quantile(0.5, 1).tolist()
    ratios = (ms[0] / ms).quantile(torch.tensor([0.5, 0.25, 0.75]), 1).T.tolist()
    texts = [f"{middle:13.2f}{f'{low:.2f} to {high:.2f}':>15}" for middle, low, high in ratios]
    for i, name in enumerate(names):
        print(f"{name:24}{params[i]:12,}{medians[i]:11.1f}{ms[i].min():9.1f}{texts[i] if i else ''}")
    i = max(range(1, len(names)), key=lambda i: ratios[i])  # by the ratio: noise that comes and goes cancels in it
    print("\nThe fastest peer is {}: ours / peer = {:.2f} (quartiles {:.2f} to {:.2f}).\n".format(names[i], *ratios[i]))

    where, (gflop, bare) = where_time_goes(steps[0]), bare_products()
    print(f"{'Where the time goes (ours, profiled)':45}{'ms/step':>9}{'%':>9}")
    for row, value in [*where.items(), ("a step", sum(where.values()))]:
        print(f"{row:45}{value:9.1f}{100 * value / sum(where.values()):9.1f}")
    print(f"\n{f'{gflop:.2f} GFLOP of products with weights in':45}{'ms':>9}{'GFLOP/s':>9}")
    times = {"a whole step": medians[0], "its matrix products": where["matrix products"], "a bare loop of them": bare}
    for row, value in times.items():
        print(f"{row:45}{value:9.1f}{gflop / value * 1e3:9.1f}")


if __name__ == "__main__":
    main()
