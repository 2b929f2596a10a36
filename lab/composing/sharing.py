"""What sharing means in a Cartesian model: which composed experts are visited, how alike they are.

A block has E x E composed experts (A_i, B_j), made of 2 E experts. Two questions:

1. Does a token's choice in A tell anything of its choice in B? If not, (A_i, B_j) is used as often
   as the product of the margins says. Mutual information measures how far it is from that.
2. Do composed experts that share one answer more alike? They do so even if nothing depends on
   anything: the cosine is then 0.5 where one is shared, and 0 where none is. What tells is how much
   B_j's output depends on the A_i before it.

The letters in the shape comments are those of moe.py; E experts in each of A and B.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from data import passes
from lab.composing.robustness import visited
from lab.tools import cli
from moe import MoE, require

# Which outputs of composed experts are compared; the last: only what B_j adds.
RELATIONS = ("share A", "share B", "share neither", "B's part, share B")


# ---- which are visited


def pair_use(a, b):
    """How often each composed expert is visited, of all visits: (E, E) of sum 1.

    a, b (N, E): 1 where a token goes. Each of a token's K choices in A comes with all K in B.
    """
    return a.T @ b / (a.sum(1) @ b.sum(1))


def mutual_information(a, b) -> float:
    """The mutual information of the choices in A and in B, in nats; at most ln(E / K)."""
    joint = pair_use(a, b)  # (E, E)
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    return float(torch.xlogy(joint, joint / independent.clamp(min=1e-12)).sum())


def shuffled_information(a, b) -> float:
    """The information that so few tokens show where there is none.

    It is a mean over 20 draws in which B's choices are dealt out among the tokens at random.
    """
    generator = torch.Generator().manual_seed(0)
    draws = 20
    total = 0.0
    for _ in range(draws):
        order = torch.randperm(len(b), generator=generator)
        total += mutual_information(a, b[order])
    return total / draws


def visits_and_mass(router, x):
    """Where a router sends tokens x (N, D): visits (N, E), and the sum of their weights (N, 1)."""
    routing = router(x)
    visits = visited(routing.probs, routing.weights, routing.experts)
    return visits, routing.weights.sum(1, keepdim=True)


# ---- how alike they are


def every_output(experts, x):
    """What every expert says to every token: x (N, D) -> (N, E, D)."""
    N, E = len(x), len(experts.down)
    expert = torch.arange(E, device=x.device).repeat(N)[:, None]  # (N*E, 1)
    weight = torch.ones_like(expert, dtype=x.dtype)
    return experts(x.repeat_interleave(E, 0), weight, expert).view(N, E, -1)


def composed_outputs(block, x, mass_a, mass_b):
    """What composed experts add to x (N, D): A's part (N, E, D), and B's part (N, E, E, D).

    B's part [:, i, j] is what B_j adds behind A_i. Each expert gets all the weight, mass_a and
    mass_b (N, 1), that the token gives to its choices; the outputs of shared experts are left out.
    """
    A, B = block.ffns
    norm_a, norm_b = block.ffn_norms
    z = norm_a(x)
    a = mass_a[..., None] * every_output(A.experts, z)  # (N, E, D)
    u = x[:, None] + a  # (N, E, D) what B reads
    if A.shared is not None:
        u = u + A.shared(z)[:, None]
    b = every_output(B.experts, norm_b(u).flatten(0, 1))  # (N*E, E, D)
    b = b.unflatten(0, a.shape[:2])  # (N, E, E, D)
    return a, mass_b[..., None, None] * b


def mean_cosines(a, b, used) -> dict[str, list]:
    """The mean cosine of the outputs of composed experts, by what they share.

    a (N, E, D) and b (N, E, E, D): what A and B add; used (N, E, E): 1 where a token goes.
    Returns relation -> [among the visited, among all], None where there is no such pair.
    """
    # Number the composed experts from 0 to E * E, and say which of them share A, or B.
    E = a.shape[1]
    pair = torch.arange(E * E, device=a.device)
    i, j = pair // E, pair % E
    same_a = i[:, None] == i  # (E*E, E*E)
    same_b = j[:, None] == j
    relations = (same_a & ~same_b, ~same_a & same_b, ~same_a & ~same_b, ~same_a & same_b)

    # The cosines of their outputs, and of B's part of them.
    whole = F.normalize((a[:, :, None] + b).flatten(1, 2), dim=-1)  # (N, E*E, D)
    only_b = F.normalize(b.flatten(1, 2), dim=-1)
    whole = whole @ whole.mT  # (N, E*E, E*E) cosines
    only_b = only_b @ only_b.mT
    compared = (whole, whole, whole, only_b)

    # The mean cosine of each relation, among the visited and among all.
    used = used.flatten(1)  # (N, E*E)
    together = used[:, :, None] * used[:, None]  # (N, E*E, E*E)
    means = {}
    for name, relation, cosine in zip(RELATIONS, relations, compared, strict=True):
        among_visited = weighted_mean(cosine, together * relation)
        among_all = weighted_mean(cosine, relation.expand_as(cosine))
        means[name] = [among_visited, among_all]
    return means


def weighted_mean(values, weights) -> float | None:
    """The weighted mean; None where all weights are 0."""
    if not weights.any():
        return None
    return float((values * weights).sum() / weights.sum())


# ---- of a whole model


def composed_blocks(model) -> list[int]:
    """The blocks that compose experts: those with two routed sub-layers."""
    blocks = []
    for i, block in enumerate(model.blocks):
        routed = [ffn for ffn in block.ffns if isinstance(ffn, MoE)]
        if len(routed) == 2:
            blocks.append(i)
    return blocks


@torch.no_grad()
def measure_sharing(model, task, split: str = "test") -> list[dict]:
    """A row for each Cartesian block, measured on 64 windows of a split.

    layer; information (nats) and what shuffled tokens show; most: its bound; use (E, E): how often
    tokens visit each composed expert, of all visits; alike: cosines on 256 of the tokens.
    ValueError for a model of another kind.
    """
    blocks = composed_blocks(model)
    need = "two routed sub-layers, as in preset cartesian"
    require(len(blocks) > 0, f"this model composes no experts: sharing asks for {need}")

    # Listen to what enters the norms of A and B.
    inputs = {i: ([], []) for i in blocks}
    hooks = []
    for i in blocks:
        for norm, pieces in zip(model.blocks[i].ffn_norms, inputs[i], strict=True):
            hooks.append(norm.register_forward_pre_hook(keep_input(pieces)))
    try:
        for _ in passes(model, task.kinds(split, most=64).tokens):
            pass
    finally:
        for hook in hooks:
            hook.remove()

    # Measure each block on what it has read.
    rows = []
    for i in blocks:
        x, u = (torch.cat(pieces) for pieces in inputs[i])  # (N, D) each
        rows.append(sharing_row(model, i, x, u))
    return rows


def keep_input(pieces: list):
    """A hook that adds a module's input, (B, T, D), to a list as (N, D)."""

    def hook(module, inputs):
        pieces.append(inputs[0].flatten(0, 1))

    return hook


def sharing_row(model, layer: int, x, u) -> dict:
    """The row of one block, where x (N, D) enters A and u (N, D) enters B."""
    # Where tokens go, in A and in B.
    block = model.blocks[layer]
    A, B = block.ffns
    norm_a, norm_b = block.ffn_norms
    a, mass_a = visits_and_mass(A.router, norm_a(x))
    b, mass_b = visits_and_mass(B.router, norm_b(u))
    visits_of_a_token = float(a.sum(1).mean() * b.sum(1).mean())

    # What composed experts answer to a sample of the tokens.
    n = min(256, len(a))
    sample = torch.linspace(0, len(a) - 1, n, device=a.device).long()  # (n,) tokens
    outputs = composed_outputs(block, x[sample], mass_a[sample], mass_b[sample])
    used = a[sample, :, None] * b[sample, None]  # (n, E, E)
    return {
        "layer": layer,
        "information": mutual_information(a, b),
        "shuffled": shuffled_information(a, b),
        "most": math.log(a.shape[1] ** 2 / visits_of_a_token) / 2,
        "use": pair_use(a, b).double().round(decimals=5).tolist(),
        "alike": mean_cosines(*outputs, used),
    }


# ---- as a table


def use_ratios(use):
    """How often composed experts are visited, use (E, E), over the product of its margins."""
    use = np.array(use)
    independent = use.sum(1, keepdims=True) * use.sum(0)
    return use / np.maximum(independent, 1e-12)


def sharing_table(runs: list[list[dict]]) -> str:
    """A line for each block, means over runs.

    use / product: the range of the middle 90 % of the composed experts, see `use_ratios`.
    """
    header = ["", "information", "shuffled", "more, of ln(N/K)", "use / product", *RELATIONS]
    lines = [sharing_line(rows) for rows in zip(*runs, strict=True)]
    return cli.table(lines, header=header)


def sharing_line(rows: list[dict]) -> list[str]:
    """The cells of one block, from its row in each run."""
    information = np.mean([row["information"] for row in rows])
    shuffled = np.mean([row["shuffled"] for row in rows])
    most = np.mean([row["most"] for row in rows])
    share = f"{(information - shuffled) / most:.1%}" if most else "-"

    ranges = [np.quantile(use_ratios(row["use"]), [0.05, 0.95]) for row in rows]
    low, high = np.mean(ranges, axis=0)
    cells = [
        f"layer {rows[0]['layer']}",
        f"{information:.4f}",
        f"{shuffled:.4f}",
        share,
        f"{low:.2f} to {high:.2f}",
    ]
    for name in RELATIONS:
        among_visited, among_all = zip(*(row["alike"][name] for row in rows), strict=True)
        cells.append(f"{mean_cell(among_visited)} / {mean_cell(among_all)}")
    return cells


def mean_cell(cosines) -> str:
    """The mean of cosines as text; "-" where one of them is None."""
    if None in cosines:
        return "-"
    return f"{np.mean(cosines):.2f}"
