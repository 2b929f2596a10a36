"""What C3PO costs, by formula, by profiler and by the clock: the exact one-token form against full forwards.

python -m lab.cost    the formula for OLMoE; the clock and the profiler on small models (a minute)
"""

import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab import cli
from moe import MoEConfig, MoETransformer, Remix
from remix import RemixConfig, Tail, core_experts, critical_layers, frozen, neighbour_loss, ngd

OLMOE = MoEConfig(50_304, 4096, 2048, 16, 16, n_experts=64, top_k=8, d_expert=1024)
SMALL = replace(OLMOE, vocab_size=3_144, context=128, d_model=128, head_dim=8, d_expert=64, d_dense=None)  # its shape
TOY = MoEConfig(vocab_size=47, context=64)


def counted(run) -> int:
    """The floating-point operations of a call, as torch counts them, grouped products included."""

    def grouped(x, weight, *args, **kwargs):
        return 2 * x[0] * weight[-2] * weight[-1]  # x (M, I), weight (E, I, O)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter:
        run()
    return counter.get_total_flops()


def formula(sizes: MoEConfig, T: int, last: int, k: int, steps: int) -> dict[str, float]:
    """The cost of NGD for one sample, prompts of T tokens, in base forwards of its own prompt.

    A token costs 2 operations for each weight that it visits; attention to other tokens, norms and softmaxes are left
    out. The gradient costs as much again, but less in the first critical layer: nothing below it is asked for, and so
    only what the experts' down projections pass back. A pair goes forward and back at every step, then forward again.
    """
    width, kv = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    down = 2 * sizes.top_k * sizes.d_model * sizes.d_expert
    layer = 2 * sizes.d_model * (2 * width + 2 * kv + sizes.n_experts) + 3 * down
    head, base = 2 * sizes.d_model * sizes.vocab_size, sizes.n_layers * T * layer
    back = (last - 1) * layer + down
    one = (steps + 1) * last * layer + steps * back  # a pair, one token
    heads = (2 * steps + 1) * head
    naive = T * ((steps + 1) * sizes.n_layers * layer + steps * back) + heads
    costs = {"candidate steps": one, "  with the output layer": one + heads}
    costs |= {"neighbours' prefixes, if none is kept": base, "naive: full forwards": naive}
    return {name: k * cost / (base + head) for name, cost in costs.items()}


def race(sizes: MoEConfig, T: int, layers: str, n: int, few: int, dtype=torch.float32, rounds: int = 3):
    """NGD on n samples with 3 neighbours each, prompts of T random tokens -> for the exact steps, the prefixes that
    they need, and the steps as full forwards (of a few samples, which keep a processor as busy): the least seconds of a
    sample, its operations; and how far the losses are apart."""
    torch.manual_seed(0)
    model, config = MoETransformer(sizes).to(dtype).eval(), RemixConfig(k=3, layers=layers)
    tail, M, m = Tail(model, critical_layers(model, layers)), 3 * n, 3 * few
    tokens, lengths = torch.randint(sizes.vocab_size, (M, T)), torch.full((M,), T)
    owner, weight, labels = torch.arange(M) // 3, torch.full((M,), 1 / 3), torch.randint(sizes.vocab_size, (M,))
    with frozen(model), torch.no_grad():
        start, prefix = tail.base(tail.cut(tokens[:n], lengths[:n]))[0], tail.cut(tokens, lengths)

        def naive(pathway):
            rows = {router: pathway[owner[:m], i] for i, router in enumerate(tail.routers)}
            logits = model.head(model.run(model.embed(tokens[:m]), remix=Remix(rows))[:, -1])  # (m, T, D) -> (m, V)
            each = F.cross_entropy(logits, labels[:m], reduction="none") * weight[:m]
            return each.new_zeros(few).index_add(0, owner[:m], each)

        exact = neighbour_loss(tail, prefix, owner, weight, labels)
        runs = {
            "exact": (n, lambda: ngd(core_experts(start), exact, config)),
            "prefixes": (n, lambda: tail.cut(tokens, lengths)),
            "naive": (few, lambda: ngd(core_experts(start[:few]), naive, config)),
        }
        seconds = dict.fromkeys(runs, torch.inf)
        for _ in range(rounds):
            for name, (count, run) in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], (time.perf_counter() - begin) / count)
        apart = float((runs["exact"][1]()[1][:few] - runs["naive"][1]()[1]).abs().max())
        return seconds, {name: counted(run) / count for name, (count, run) in runs.items()}, apart


def main(argv) -> int:
    """The formula, and both races."""
    torch.set_num_threads(1)
    print("NGD on OLMoE, 100 tokens, last 5 of 16 layers, k = 3, 10 steps, in base forwards:\n")
    print(cli.table([[name, f"{value:.2f}"] for name, value in formula(OLMOE, 100, 5, 3, 10).items()]), end="\n\n")
    lines = []
    cases = {"toy, 64 tokens, last 2 of 4 layers": (TOY, 64, "last:2", 64, 16)}
    cases["OLMoE's shape, 100 tokens, last 5 of 16"] = (SMALL, 100, "last:5", 128, 8)
    for name, case in cases.items():
        seconds, operations, apart = race(*case)
        ratios = []
        for cost in (seconds, operations):
            ratios += [cost["naive"] / cost["exact"], cost["naive"] / (cost["exact"] + cost["prefixes"])]
        shown = [f"{1e3 * seconds['exact']:.1f}", f"{1e3 * seconds['naive']:.0f}", f"{apart:.0e}"]
        lines.append([name, *shown[:2], *(f"{ratio:.0f}" for ratio in ratios), shown[2]])
    head = ["steps of NGD, one thread", "exact (ms)", "naive (ms)", "ratio", "+ prefixes"]
    print(cli.table(lines, header=[*head, "operations", "+ prefixes", "differ"]))
    print("\nms for a sample; ratio: naive / exact, by the clock and in operations; + prefixes: with all prefixes of")
    print("neighbours made anew; differ: the largest difference between their losses")
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__)
