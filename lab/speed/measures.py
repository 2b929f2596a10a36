"""What takes how long, beside peers and beside what the machine could do.

A row is {"what", "limit" and "seconds"}: seconds has the times of ours and of its peers, round by
round, in turn. The limit is the least time that the machine would need: for its matrix products at
the rate of large ones, or for reading once what has to be read, whichever is longer.

Letters in the comments: N tokens, D d_model, E experts, K top_k, F width of an expert.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import hf
from lab.remixing import cost
from lab.speed.peers import BALANCE, EXPERTS, LARGE, SMALL, T, models, olmoe, peer_config
from lab.tools.race import race
from lab.tools.texts import encode, tokenizer
from moe import Experts, MoE, MoEConfig, MoETransformer, Router, SwiGLU, require
from pathways import ReferenceSet
from remix import remix

WIDTHS, NUMBERS, TOP = (128, 256, 512), (8, 16, 64), (1, 2, 8)  # D, E and K of the grid
N = 512  # tokens that a layer is given
BATCH = 16  # sequences in a training step
NGD = {  # name -> the arguments of cost.measure_ngd
    "toy, 64 tokens, last 2 of 4 layers": (cost.SKILLS_SIZES, 64, "last:2", 64, 16),
    "OLMoE's shape, 100 tokens, last 5 of 16": (cost.OLMOE_SHAPE, 100, "last:5", 128, 8),
}


class Machine:
    """How fast this machine multiplies and reads, with as many threads as torch has."""

    def __init__(self):
        a, large = torch.randn(1024, 1024), torch.randn(2**26)
        self.products = 2 * 1024**3 / race([lambda: a @ a], 10).min()  # operations a second
        self.reading = large.nbytes / race([large.sum], 10).min()  # bytes a second

    def least(self, operations: float, read: float = 0.0) -> float:
        """The seconds of so many operations and bytes."""
        return max(operations / self.products, read / self.reading)


def timed(what: str, calls: dict, rounds: int, limit: float | None = None) -> dict:
    """A row. Every call is made once beforehand, untimed."""
    for call in calls.values():
        call()
    seconds = race(list(calls.values()), rounds)
    return {
        "what": what,
        "limit": limit,
        "seconds": dict(zip(calls, seconds.tolist(), strict=True)),
    }


# ---- the expert layer


def layer_rows(machine: Machine, rounds: int) -> list[dict]:
    """Router and experts over the grid, against a dense layer of what a token visits, and peers."""
    rows = []
    for d in WIDTHS:
        for n_experts in NUMBERS:
            for k in TOP:
                for backward in (False, True):
                    row = timed(*layer_calls(machine, d, n_experts, k, N, backward, rounds))
                    rows.append(row | {"D": d, "E": n_experts, "K": k, "backward": backward})
    return rows


def layer_calls(machine, d: int, n_experts: int, k: int, n: int, backward: bool, rounds: int):
    """The arguments of `timed` for one layer, with experts of width d / 2, and n tokens."""
    torch.manual_seed(0)
    sizes = MoEConfig(d_model=d, n_experts=n_experts, top_k=k, d_expert=d // 2, n_heads=1)
    layers = {
        "ours": MoE(Router(sizes), Experts(sizes)),
        "dense": SwiGLU(d, sizes.d_dense),
    }
    for experts in EXPERTS:
        layer = olmoe().OlmoeSparseMoeBlock(peer_config(sizes, experts))
        layers[f"transformers {experts}"] = layer
    x = torch.randn(1, n, d, requires_grad=backward)
    upstream = torch.randn_like(x)
    calls = {}
    for name, layer in layers.items():
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        calls[name] = partial(pass_layer, layer, x, upstream, backward)

    # Three matrices of an expert, two operations for each number in them, thrice with backward.
    expert = 3 * d * sizes.d_expert
    operations = 2 * n * (k * expert + d * n_experts) * (3 if backward else 1)
    limit = machine.least(operations, 4 * n_experts * expert)
    what = f"layer, D {d}, E {n_experts}, K {k}, {n} tokens"
    return what, calls, rounds, limit


def pass_layer(layer, x, upstream, backward: bool):
    """A layer forward, and back to its input and its weights."""
    with torch.set_grad_enabled(backward):
        y = layer(x)
    if backward:
        torch.autograd.grad(y, [x, *layer.parameters()], upstream)


# ---- a training step


def training_row(machine: Machine, rounds: int) -> dict:
    """Forward, backward and fused AdamW on one batch; ours also compiled."""
    named = models(SMALL)
    compiled = MoETransformer(SMALL)
    compiled.load_state_dict(named["ours"].state_dict())
    calls = {
        name: partial(training_step, model, model, adam(model)) for name, model in named.items()
    }
    calls["ours, compiled"] = partial(
        training_step, compiled, torch.compile(compiled), adam(compiled)
    )
    first = [call() for call in calls.values()]
    require(max(first) - min(first) < 1e-4, f"the models differ in their first loss: {first}")

    weights = active_weights(SMALL)
    limit = machine.least(3 * 2 * weights * BATCH * T)
    return timed(f"training step of {BATCH} x {T} tokens", calls, rounds, limit)


def adam(model):
    return torch.optim.AdamW(model.parameters(), fused=True)


def active_weights(sizes: MoEConfig) -> int:
    """The numbers in the matrices that a token is multiplied with."""
    model = MoETransformer(sizes)
    return model.n_params(activated=True) - model.embedding.weight.numel()


def training_step(model, forward, optimizer) -> float:
    """A training step -> the cross-entropy."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(SMALL.vocab_size, (2, BATCH, T))
    if isinstance(model, MoETransformer):
        out = forward(tokens, targets)
        loss = out.loss + BALANCE * out.balance_loss
        nats = out.loss
    else:
        # `labels` alone would be shifted. The peer's loss holds the balance loss already.
        options = {"shift_labels": targets, "use_cache": False}
        out = forward(input_ids=tokens, labels=targets, **options)
        loss = out.loss
        nats = loss - BALANCE * out.aux_loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return nats.item()


# ---- generation


def generation_rows(machine: Machine, rounds: int) -> list[dict]:
    """Greedy text of ours and of transformers, behind prompts of 16 tokens."""
    rows = []
    for sizes, n_new, turns in ((SMALL, 96, rounds), (LARGE, 24, min(rounds, 3))):
        named = {name: model.eval() for name, model in models(sizes).items()}
        n_params = named["ours"].n_params() / 1e6
        for n_prompts in (1, 8):
            prompts = torch.randint(sizes.vocab_size, (n_prompts, 16))
            calls = {name: partial(continued, each, prompts, n_new) for name, each in named.items()}
            texts = [call() for call in calls.values()]
            require(all(text.equal(texts[0]) for text in texts), "the models' texts differ")

            # Every new token reads what it visits; several prompts share some experts.
            expert = 3 * sizes.d_model * sizes.d_expert
            visited = sizes.n_experts * (1 - (1 - sizes.top_k / sizes.n_experts) ** n_prompts)
            rest = active_weights(sizes) - sizes.n_layers * sizes.top_k * expert
            read = 4 * (rest + sizes.n_layers * visited * expert)
            operations = 2 * n_prompts * active_weights(sizes)
            limit = n_new * machine.least(operations, read)
            what = f"{n_new} new tokens, {n_params:.1f} M parameters, prompts: {n_prompts}"
            rows.append(timed(what, calls, turns, limit))
    return rows


def continued(model, prompts, n_new: int):
    """The new tokens (B, n_new) behind prompts (B, S)."""
    if isinstance(model, MoETransformer):
        return model.generate(prompts, n_new)
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    mask = torch.ones_like(prompts)
    out = model.generate(input_ids=prompts, attention_mask=mask, **options)
    return out[:, prompts.shape[1] :]


# ---- re-mixing, loading, tokenizing


def ngd_rows(machine: Machine, rounds: int) -> list[dict]:
    """NGD for a prompt, exact against full forwards; see lab/remixing/cost.py."""
    rows = []
    for name, arguments in NGD.items():
        seconds, operations, apart = cost.measure_ngd(*arguments, rounds=rounds)
        prefixes = seconds["exact"] + seconds["prefixes"]
        times = {
            "ours": seconds["exact"].tolist(),
            "ours, prefixes made anew": prefixes.tolist(),
            "full forwards": seconds["naive"].tolist(),
        }
        limit = machine.least(operations["exact"])
        row = {"what": f"NGD, {name}", "limit": limit, "seconds": times}
        rows.append(row | {"operations": operations, "apart": apart})
    return rows


def loading_row(machine: Machine, rounds: int) -> dict:
    """A checkpoint of the large model, read and made a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        hf.save(MoETransformer(LARGE), path)
        load = olmoe().OlmoeForCausalLM.from_pretrained
        calls = {"ours": partial(hf.load, path), "transformers eager": partial(load, path)}
        size = (path / "model.safetensors").stat().st_size
        return timed(f"loading {size / 1e6:.0f} MB", calls, rounds, machine.least(0, size))


def tokenizing_row(rounds: int) -> dict:
    """Text to tokens: this repository's own pages, again and again."""
    pages = Path(__file__).parents[2]
    text = "".join(path.read_text("utf-8") for path in sorted(pages.glob("*.py"))) * 10
    encoding = tokenizer()
    what = f"tokenizing {len(text) / 1e6:.1f} MB of text"
    return timed(what, {"ours": partial(encode, encoding, text)}, rounds)


# ---- growth


def growth(machine: Machine, rounds: int) -> dict:
    """Seconds of ours, where one size grows -> name -> {"sizes", "seconds", "slope"}.

    The slope of a line in log-log: 1 where twice as much takes twice as long.
    """
    curves = {}

    def curve(name, sizes, calls):
        for call in calls:
            call()
        seconds = np.median(race(calls, rounds), 1)
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        curves[name] = {"sizes": sizes, "seconds": seconds.tolist(), "slope": float(slope)}

    def layer(n_experts, n):
        return layer_calls(machine, 128, n_experts, 4, n, True, rounds)[1]["ours"]

    counts = [256, 512, 1024, 2048, 4096]
    curve("layer: tokens (16 experts)", counts, [layer(16, n) for n in counts])
    counts = [8, 16, 32, 64, 128]
    curve("layer: experts (top-4, 512 tokens)", counts, [layer(n, N) for n in counts])

    model = MoETransformer(SMALL).eval()
    prompt = torch.randint(SMALL.vocab_size, (1, 8))
    counts = [8, 16, 32, 64, 120]
    curve("generation: new tokens", counts, [partial(model.generate, prompt, n) for n in counts])
    counts = [256, 512, 1024, 2048, 4096]
    curve("NGD, 16 prompts: references", counts, [remixing_call(n) for n in counts])
    return curves


def remixing_call(n_references: int):
    """A function that re-mixes 16 random prompts, among so many references."""
    torch.manual_seed(0)
    model = MoETransformer(cost.SKILLS_SIZES).eval()
    tokens = torch.randint(model.config.vocab_size, (n_references + 16, 8))
    solved, prompts = tokens[16:], tokens[:16]
    references = ReferenceSet.build(model, solved, solved[:, 0])
    references.correct[:] = True
    return partial(remix, model, prompts, references)
