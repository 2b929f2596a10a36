"""What sharing means in a Cartesian model: which composed experts (A_i, B_j) tokens visit, and how alike they are.

A block has E x E composed experts, made of 2 E parts. Were a token's two choices independent, the use of (A_i, B_j)
would be the product of its margins: their mutual information says how far it is from that. Composed experts that share
a part answer more alike than those that share none, whatever the parts: where these have nothing to do with each other
and weigh the same, the cosines are 0.5 and 0. What tells is the last of them, how much B_j's part depends on the A_i
before it.

The letters in the shape comments are those of moe.py; here N tokens, and E experts in each of A and B.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from data import SkillsTask
from lab import cli
from lab.robust import chosen
from lab.tasks import passes
from moe import require

ALIKE = ("share A", "share B", "share neither", "B's part, share B")  # which outputs of composed experts are compared


def information(a, b):
    """The mutual information, in nats, of the two parts of a visited composed expert; a, b (N, E) are 1 where a token
    goes. It is at most ln(E / K), since each of a token's K choices in A comes with all K in B."""
    joint = a.T @ b / (a.sum(1) @ b.sum(1))  # (E, E) how often each composed expert is visited, of all visits
    product = joint.sum(1, keepdim=True) * joint.sum(0)
    return float(torch.xlogy(joint, joint / product.clamp(min=1e-12)).sum())


def shuffled(a, b, draws: int = 20):
    """What `information` finds where there is none, since the tokens are not infinitely many: its mean with B's choices
    dealt out among the tokens at random."""
    generator = torch.Generator().manual_seed(0)
    return sum(information(a, b[torch.randperm(len(b), generator=generator)]) for _ in range(draws)) / draws


def visits(router, x):
    """Where a router sends tokens x (N, D): 1 for the experts that they visit (N, E), and the total weight (N, 1)."""
    routing = router(x)
    return chosen(*routing[:3]), routing.weights.sum(1, keepdim=True)


def each(experts, x):
    """What every expert says to every token: x (N, D) -> (N, E, D)."""
    N, E = len(x), len(experts.down)
    which = torch.arange(E, device=x.device).repeat(N)[:, None]  # (N*E, 1)
    return experts(x.repeat_interleave(E, 0), torch.ones_like(which, dtype=x.dtype), which).view(N, E, -1)


def composed(block, x, total_a, total_b):
    """What every composed expert adds to the stream x (N, D), had it got all the weight (N, 1) that A and B give to
    their choices, without the shared experts -> A's parts (N, E, D), B's parts (N, E, E, D), [:, i, j] behind A_i."""
    (A, B), (norm_a, norm_b) = block.ffns, block.ffn_norms
    z = norm_a(x)
    a = total_a[..., None] * each(A.experts, z)  # (N, E, D)
    u = x[:, None] + a + (0 if A.shared is None else A.shared(z)[:, None])  # (N, E, D) what B reads
    b = each(B.experts, norm_b(u).flatten(0, 1)).unflatten(0, a.shape[:2])  # (N*E, E, D) -> (N, E, E, D)
    return a, total_b[..., None, None] * b


def alike(a, b, used):
    """The mean cosine of the outputs of composed experts, by what they share: a (N, E, D), b (N, E, E, D), and which of
    them a token visits, used (N, E, E) -> {what: [among the visited, among all]}, None where there is no pair."""
    E = a.shape[1]
    i, j = torch.arange(E * E, device=a.device) // E, torch.arange(E * E, device=a.device) % E
    same_a, same_b = i[:, None] == i, j[:, None] == j  # (E*E, E*E)
    relations = (same_a & ~same_b, ~same_a & same_b, ~same_a & ~same_b, ~same_a & same_b)
    whole, part = (F.normalize(y.flatten(1, 2), dim=-1) for y in (a[:, :, None] + b, b))  # (N, E*E, D)
    whole, part = whole @ whole.mT, part @ part.mT  # (N, E*E, E*E)
    used, found = used.flatten(1), {}  # (N, E*E)
    for name, relation, cosine in zip(ALIKE, relations, (whole, whole, whole, part), strict=True):
        weights = (used[:, :, None] * used[:, None] * relation, relation.expand_as(cosine))  # (N, E*E, E*E) twice
        found[name] = [float((cosine * w).sum() / w.sum()) if w.any() else None for w in weights]
    return found


@torch.no_grad()
def sharing(model, data, split: str = "test", most: int = 64, compared: int = 256) -> list[dict]:
    """A row for each Cartesian block: how often tokens visit each composed expert, of all visits ("use"), the mutual
    information of its parts and what shuffled tokens show, its bound, and the cosines of `alike` on some tokens.
    ValueError for a model of another kind."""
    composes = getattr(model.config, "layer", "moe") == "cartesian" and len(model.routers()) > 0
    require(composes, "this model composes no experts: sharing asks for two routed sub-layers, as in preset cartesian")
    blocks = [i for i, block in enumerate(model.blocks) if len(block.ffns) == 2]
    streams = {i: ([], []) for i in blocks}  # what enters A, and what enters B
    hooks = [
        norm.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1)))  # (N, D)
        for i in blocks
        for norm, kept in zip(model.blocks[i].ffn_norms, streams[i], strict=True)
    ]
    tokens = data.prompts(split).tokens if isinstance(data, SkillsTask) else data.held_out(split, most)[0]
    try:
        for _ in passes(model, tokens):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for i in blocks:
        block, ends = model.blocks[i], [torch.cat(kept) for kept in streams[i]]
        pairs = zip(block.ffns, block.ffn_norms, ends, strict=True)
        (a, total_a), (b, total_b) = (visits(ffn.router, norm(x)) for ffn, norm, x in pairs)
        some = torch.linspace(0, len(a) - 1, min(compared, len(a)), device=a.device).long()
        parts = composed(block, ends[0][some], total_a[some], total_b[some])
        row = {"layer": i, "information": information(a, b), "shuffled": shuffled(a, b)}
        row["most"] = math.log(a.shape[1] ** 2 / float(a.sum(1).mean() * b.sum(1).mean())) / 2
        row["use"] = (a.T @ b / (a.sum(1) @ b.sum(1))).double().round(decimals=5).tolist()  # (E, E)
        rows.append(row | {"alike": alike(*parts, a[some, :, None] * b[some, None])})
    return rows


def ratios(use):
    """How often each composed expert is visited, use (E, E), over the product of its margins (E, E)."""
    use = np.array(use)
    return use / np.maximum(use.sum(1, keepdims=True) * use.sum(0), 1e-12)


def sharing_table(runs: list[list[dict]]) -> str:
    """A line for each block, means over runs. Use: what the middle 90 % of the composed experts have of `ratios`."""
    lines = []
    for each in zip(*runs, strict=True):
        found, null, most = (np.mean([row[key] for row in each]) for key in ("information", "shuffled", "most"))
        low, high = np.mean([np.quantile(ratios(row["use"]), [0.05, 0.95]) for row in each], axis=0)
        cells = [f"{found:.4f}", f"{null:.4f}", f"{(found - null) / most:.1%}" if most else "-"]
        for name in ALIKE:
            pair = zip(*(row["alike"][name] for row in each), strict=True)  # among the visited, among all
            cells.append(" / ".join("-" if None in cosines else f"{np.mean(cosines):.2f}" for cosines in pair))
        lines.append([f"layer {each[0]['layer']}", *cells[:3], f"{low:.2f} to {high:.2f}", *cells[3:]])
    return cli.table(lines, header=["", "information", "shuffled", "more, of ln(N/K)", "use / product", *ALIKE])
