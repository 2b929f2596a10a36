# %% [markdown]
# # 3. Cartesian product experts: composition, the literal reading, sharing, robustness
#
# CartesianMoE (Su et al., NAACL 2025, [arXiv 2410.16077](https://arxiv.org/abs/2410.16077)) asks
# how experts can share what they know. What you will learn:
#
# - what the Cartesian product layer computes, tensor by tensor, and what a popular summary of it
#   gets wrong;
# - how to compare it with other mixtures fairly: counted at equal parameters, trained alike;
# - how to measure sharing and robustness, and why the protocol of a robustness test sets its
#   answer.
#
# Half an hour to read; less than a minute to run, on one CPU core. Everything trained here is a toy
# on one seed: it shows how to look, not who wins.

# %%
# %matplotlib inline
import pictures

pictures.two_blocks()

# %% [markdown]
# ## One sub-layer, or two
#
# Left, the MoE layer of notebook 1, fine-grained: many small experts, each token visits a few.
# Experts learn apart from each other. A shared expert (not drawn), which every token visits, is the
# usual remedy: what all need is *added* to what each one knows. The paper wants sharing "in more
# like a 'multiplication' manner" (abstract): experts made of two parts.
#
# Right, the paper's layer (its Figure 1, c): the same experts, dealt into two sub-layers A and B of
# N each. Both are plain MoE layers, with a router, a top-k and half of the shared expert each, and
# B reads what A has written:
#
# $$u = x + A(\mathrm{norm}(x)), \qquad y = u + B(\mathrm{norm}(u)), \qquad
# A(z) = \sum_{i \in \mathrm{top}\,k} p_i(z)\, A_i(z) + \mathrm{shared}_A(z)$$
#
# A token that visits $A_i$ and then $B_j$ has passed through the **composed expert** $(A_i, B_j)$,
# one of N x N. That is the Cartesian product: not of outputs, but of choices. In code, a MoE block
# has one feed-forward sub-layer, a Cartesian block has two: `CartesianTransformer.make_ffns`
# returns `[A, B]`, and all the rest is moe.py.

# %%
import copy
from dataclasses import asdict

import numpy as np
import torch

from cartesian import PAPER, TOY, CartesianConfig, CartesianTransformer, count_parameters
from data import SkillsTask
from lab.composing.figures import robustness_figure, sharing_figure
from lab.composing.layers import Pairs
from lab.composing.presets import build_model, preset
from lab.composing.robustness import loss_at_mass, measure_robustness, robustness_table
from lab.composing.sharing import measure_sharing, sharing_table
from lab.tools import cli
from lab.tools.settings import TrainConfig
from moe import MoEConfig
from train_toy import update

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False, linewidth=110)

# %% [markdown]
# ## One token through A and then B
#
# Random weights, six experts in each sub-layer, two visited in each. We make the routers decided;
# fresh ones are not.

# %%
torch.manual_seed(1)
config = CartesianConfig(
    d_model=16, n_layers=1, n_heads=2, n_experts=6, top_k=2, d_expert=8, d_shared=8
)
model = CartesianTransformer(config).eval().requires_grad_(False)
for router in model.routers():
    torch.nn.init.normal_(router.weight, std=0.5)
block = model.blocks[0]
A, B = block.ffns
norm_A, norm_B = block.ffn_norms
x = 0.5 * torch.randn(1, 16)  # (N, D): one token in the residual stream

# %%
z = norm_A(x)  # (1, D)
p = A.router(z)
u = x + A.experts(z, p.weights, p.experts) + A.shared(z)  # (1, D)
print("A's probabilities", p.probs)
print("A's choice       ", p.experts, "with weights", p.weights)
print("u - x            ", (u - x)[0, :8], "... D =", u.shape[1])

# %% [markdown]
# B's router reads u, so it already knows what the chosen experts of A said:

# %%
v = norm_B(u)
q = B.router(v)
y = u + B.experts(v, q.weights, q.experts) + B.shared(v)
print("B's probabilities", q.probs)
print("B's choice       ", q.experts, "with weights", q.weights)
torch.nn.init.zeros_(block.attention.o.weight)  # without attention, the block is what we did here:
y_block = model.run_blocks(x[None])[0]
print("difference from the block:", float((y_block - y).abs().max()))

# %% [markdown]
# With K = 2 choices in each sub-layer, the token has visited K x K of the N x N composed experts.
# The colours: all composed experts in a row share $A_i$, all in a column share $B_j$. What one
# token teaches $A_i$, all N composed experts of its row have learnt.

# %%
pictures.composition_grid(config.n_experts, p.experts[0].tolist(), q.experts[0].tolist())

# %%
pair_weights = p.weights[0][:, None] * q.weights[0]  # (K, K)
print("weights p_i q_j of the composed experts visited:\n", pair_weights)

# %% [markdown]
# **Where the idea comes from.** *Collective matrix factorisation* learns several tables at once:
# users by films, $X\approx{U}V^\top$, and films by genres, $Y\approx{V}W^\top$. The films' factor
# $V$ stands in both, so what the genres tell about a film helps to guess who will like it: two
# matrices that share a factor share what they know. Look at the grid again: it is a table of N x N
# experts with a factor for each row and one for each column. Each composed expert is seen by few
# tokens, but its two factors are trained by all tokens that visit its row or its column.
#
# ## Counted at equal totals
#
# A comparison is fair at the same number of parameters, in all and activated for a token. `preset`
# derives every rival from the sizes of one base (N experts of full width, top-2, a shared expert)
# and refuses sizes that cannot be matched. `count_parameters` builds the model on PyTorch's device
# `meta`, which has shapes but no numbers, so that the paper's size is free.

# %%
rows = []
for size, place in ((TOY, "toy"), (PAPER, "paper's base")):
    for name in ("smoe_share", "fine_grained", "cartesian"):
        config = preset(name, MoEConfig(**size))
        total, activated = count_parameters(config)
        experts, visited, composed = config.n_experts, config.top_k, "-"
        if name == "cartesian":
            composed = experts * experts
            experts, visited = f"{experts} + {experts}", f"{visited} + {visited}"
        counts = (f"{total:,}", f"{activated:,}")
        rows.append((place, name, experts, visited, config.d_expert, composed, *counts))
header = ["", "preset", "experts", "visited", "width", "composed", "parameters", "activated"]
print(cli.table(rows, header, left=2))

# %% [markdown]
# The paper's Table 1 says 842 M parameters in all and 247 M activated, and so do we. `python -m
# lab.composing.presets` counts all presets, among them controls that the paper lacks: the same
# experts side by side (`cartesian_parallel`), a dense model of two sub-layers (`dense_two`), so
# that mere depth is not taken for composition.
#
# ## The literal reading, and why it is another layer
#
# A popular summary says that "the Cartesian product of the selected experts' *outputs* is computed
# and fed to later layers". Taken literally, each chosen pair would be computed by itself, as on the
# right:

# %%
pictures.two_readings()

# %% [markdown]
# On the left is the paper's mechanism (the authors' page writes
# $\mathrm{FFN}_{ab}=\mathrm{FFN}^1_a\cdot\mathrm{FFN}^2_b$, and means one after the other). How far
# apart are the two readings? Two identities tell.
#
# **1. Were experts linear, both would be the same**, as a matrix goes through a sum:
#
# $$\textstyle\sum_j q_j B_j \big(\sum_i p_i A_i z\big) = \sum_{ij} p_i q_j\, B_j A_i z$$

# %%
K, D = 2, 16
p, q = torch.rand(2, K)  # the weights
A_matrix, B_matrix = torch.randn(2, K, D, D)  # experts that are matrices
z = torch.randn(D)
sum_of_A = torch.einsum("i,ide,e->d", p, A_matrix, z)
in_sequence = torch.einsum("j,jde,e->d", q, B_matrix, sum_of_A)
over_pairs = torch.einsum("i,j,jdf,ife,e->d", p, q, B_matrix, A_matrix, z)
print("largest output", float(in_sequence.abs().max()))
print("largest gap   ", float((in_sequence - over_pairs).abs().max()))

# %% [markdown]
# **2. An elementwise product over pairs composes nothing.** If "multiplication" meant $A_i(z) \odot
# B_j(z)$, the sum over all pairs would fall apart into a product of two ordinary mixtures:
#
# $$\textstyle\sum_{ij} p_i q_j\, a_i \odot b_j =
# \big(\sum_i p_i a_i\big) \odot \big(\sum_j q_j b_j\big)$$

# %%
a, b = torch.randn(2, K, D)  # the outputs of K experts of A, and of B
over_pairs = torch.zeros(D)
for i in range(K):
    for j in range(K):
        over_pairs += p[i] * q[j] * a[i] * b[j]
two_mixtures = (p @ a) * (q @ b)
print("largest gap", float((over_pairs - two_mixtures).abs().max()))

# %% [markdown]
# Real experts are not linear, so the literal reading is a layer of its own: `cartesian_pairs`.
# Given the same weights as the block above, it says something else, at K + K x K expert evaluations
# instead of 2 K.

# %%
literal = Pairs(model.config, A, B)
literal.norm_A, literal.norm_B = norm_A, norm_B
y_literal = x + literal(x[None])[0]
print("in sequence", y[0, :6])
print("literal    ", y_literal[0, :6])
gap = (y_literal - y).norm() / (y - x).norm()
print("relative difference of what they add:", float(gap))
for k in (1, 2, 4):
    print(f"K = {k}: {2 * k} evaluations in sequence, {k + k * k} literally")

# %% [markdown]
# For K = 1 there is one pair, and the two are the same once more. In the paper's layer, then, a
# "composed expert" is a way to count and to see: B never runs on the output of one $A_i$ alone, but
# on the sum of all that were chosen.
#
# ## Two small models, trained alike
#
# Now a Cartesian and a fine-grained model learn the skills task (notebook 2; `python train_toy.py
# --preset cartesian` does it at full length). Same base sizes, same batches, same steps, two layers
# each.

# %%
task = SkillsTask(0)
train = TrainConfig(steps=400, batch=32, lr=4e-3, warmup=30)
base = MoEConfig(vocab_size=task.vocab_size, n_layers=2, **task.preset_sizes)


def new_model(name):
    """An untrained model of a preset. All have the same seed."""
    torch.manual_seed(train.seed)
    return build_model(asdict(preset(name, base)))


def learn(model):
    """Train a model -> the loss of each step."""
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, train.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
    return [update(model, model, optimizer, task, train, step) for step in range(train.steps)]


# %%
models, rows = {}, []
for name in ("cartesian", "fine_grained"):
    model = models[name] = new_model(name)
    losses = learn(model)
    scores = task.score(model, "dev")
    sizes = (model.n_params(), model.n_params(activated=True))
    loss = (f"{np.mean(losses[-50:]):.3f}", f"{scores['loss']:.3f}")
    rows.append((name, *sizes, *loss, f"{scores['accuracy']:.1%}", f"{scores['balance_loss']:.2f}"))
header = ["", "parameters", "activated", "train loss", "dev loss", "dev accuracy", "balance"]
print(cli.table(rows, header))

# %% [markdown]
# **Do not read a winner off this table.** It is one seed, one learning rate, seconds of training
# and a task of 47 tokens; another seed may turn it round. The comparison that counts is `python -m
# lab.composing.compare`: several seeds of every preset, each with its best settings on dev, in
# pairs, against a declared test. What it found stands in the README.
#
# ## Sharing: who is composed with whom?
#
# Were a token's choices in A and in B independent, the use of $(A_i, B_j)$ would be the product of
# the margins, that of $A_i$ times that of $B_j$. Mutual information says how far it is from that;
# at most it is ln(N / K), as each choice in A comes with all K in B. "Shuffled" is what finitely
# many tokens show by chance, with B's choices dealt out anew.

# %%
shared = measure_sharing(models["cartesian"], task, "dev")
sharing_figure(shared, "Composed experts of the skills task (dev), one toy")

# %%
print(sharing_table([shared]))

# %% [markdown]
# Top: how often each composed expert is visited. Middle: more (orange) or less (violet) than the
# margins foretell (in the table, "use / product": what the middle 90 % have); pale would mean that
# A's choice says nothing about B's. Bottom: cosines of what composed experts say to the same token
# (in the table: of those it visits / of all).
#
# Composed experts that share a part answer more alike than those that share none. But take care:
# what $(A_i, B_j)$ adds is a sum, $A_i$'s part plus $B_j$'s part behind it, and two sums with a
# term in common are alike by arithmetic. The last column is the sharper question: how alike is *B's
# part alone*, of the same $B_j$ behind different $A_i$? Near 1, it hardly matters to $B_j$ who
# spoke before, and the product is close to a sum; lower, and B really composes.
#
# The same question from another side: put the trained weights into the literal layer. Were the
# experts linear, nothing would change.

# %%
literal = copy.deepcopy(models["cartesian"])
for block in literal.blocks:
    pairs = Pairs(literal.config, *block.ffns)
    pairs.norm_A, pairs.norm_B = block.ffn_norms
    block.ffns = torch.nn.ModuleList([pairs])
    block.ffn_norms = torch.nn.ModuleList([torch.nn.Identity()])
for name, model in {"in sequence": models["cartesian"], "literally": literal}.items():
    print(f"{name:12} dev loss {task.score(model, 'dev')['loss']:.3f}")

# %% [markdown]
# Close numbers mean that B is nearly linear over what the experts of A may add, so that the two
# readings, far apart on paper, nearly compute the same here. Whether that holds for a large model
# nobody has measured, as far as we know; now you could.
#
# ## Robustness: the protocol sets the answer
#
# The paper's Table 4 disables each token's most probable expert at every router, and lets it take
# the next k. Perplexity then goes to 3095 for fine-grained and to 27.7 for CartesianMoE.
# `measure_robustness` of [lab/composing](../lab/composing/robustness.py) does that, and more:

# %%
protocols = {name: measure_robustness(model, task, "dev") for name, model in models.items()}
for name, rows in protocols.items():
    print(f"{name}\n{robustness_table(rows)}\n")

# %% [markdown]
# Look at the line `top-1` in both tables: the same protocol does not take the same from both. A
# Cartesian token visits 3 + 3 experts and loses one at *each* router, a third of them; a
# fine-grained one visits 6 and loses one, a sixth. So we draw perplexity against the share of the
# routing mass that is lost. Along each line, the first choice is disabled with a probability that
# grows from 0 to 1; the star is the paper's protocol.

# %%
robustness_figure(protocols)

# %% [markdown]
# The same models, asked three ways. *Unmatched*: the paper's protocol. *Matched in experts*: half
# of those that a token visits. *Matched in mass*: each loses the routing mass that `top-1` takes
# from fine-grained; Cartesian's loss there is read off its line. Each number is the rise of the
# loss over that of the intact model.

# %%
mass = protocols["fine_grained"]["top-1"]["mass"]
lines = []
for name, rows in protocols.items():
    intact = rows["intact"]["loss"]
    line = [name]
    for protocol in ("top-1", "a half"):
        row = rows[protocol]
        line.append(f"{row['loss'] - intact:+.3f} ({row['mass']:.0%})")
    matched = loss_at_mass(rows, mass)
    line.append(f"{matched - intact:+.3f} ({mass:.0%})")
    lines.append(line)
header = ["rise of the loss, nats (mass lost)"]
header += ["top-1, unmatched", "half of the experts", "equal mass"]
print(cli.table(lines, header))

# %% [markdown]
# How far apart the two models stand depends on the column, and who is ahead may, too. The collapse
# of Table 4 does not show at this size. So a sentence such as "more robust to routing errors" is
# only as good as its protocol: say which one, and how much each model lost. Over several seeds and
# on text, `python -m lab.composing.compare` reports every protocol.
#
# ## Exercises
#
# **1. Share more.** Let both blocks use the *same* experts in B, each with a router and norm of its
# own. How many parameters are saved, and what does it cost on dev?
#
# <details><summary>Solution</summary>
#
# ```python
# model = new_model("cartesian")
# model.blocks[1].ffns[1].experts = model.blocks[0].ffns[1].experts
# learn(model)
# print(model.n_params(), models["cartesian"].n_params(), task.score(model, "dev"))
# ```
#
# A fifth of the parameters go (344,384 are left of 436,544), and when we ran it, the loss on dev
# was 1.018 instead of 1.026: no cost to be seen in this toy, which does not need its parameters.
# `n_params(activated=True)` would count the idle experts of B twice here, so leave it.
#
# </details>
#
# **2. One router for both.** Send every token to the experts of B with the numbers that it got in
# A. What is left of the N x N composed experts, and what does the `mutual_information` of the two
# choices read?
#
# <details><summary>Solution</summary>
#
# ```python
# from lab.composing.robustness import visited
# from lab.composing.sharing import mutual_information
# from moe import Router
#
#
# class Follow(Router):
#     def __init__(self, config):
#         super().__init__(config)
#         self.weight = None  # nothing to learn
#
#     def forward(self, x, flow=None):
#         routing = flow.routing[-1]  # A's routing of the same tokens
#         flow.routing.append(routing)
#         return routing
#
#
# model = new_model("cartesian")
# for block in model.blocks:
#     block.ffns[1].router = Follow(model.config)
# learn(model)
# with torch.no_grad():
#     routing = model(task.prompts("dev").tokens).routing
# a, b = (visited(r.probs, r.weights, r.experts) for r in routing[:2])
# print(task.score(model, "dev"))
# print(mutual_information(a, b), shared[0]["information"], shared[0]["most"])
# ```
#
# A token visits (A_i, B_j) with i and j from one set of three, so that of a token's 455 x 455
# possible choices of two sets 455 are left. Information rises from 0.19 to 0.46 nats; it would
# reach ln(N / K) = 1.61 only if the sets that tokens choose never overlapped. The loss on dev
# stayed where it was (1.025): on this task and at this size, a second router is not what matters.
# Would you have guessed? On text, over several seeds, it may be otherwise.
#
# </details>
#
# ## Where to go next
#
# Notebook 4 re-mixes the experts of a trained model for each prompt (C3PO). `python train_toy.py
# --preset cartesian` trains a Cartesian model, `python eval.py sharing` and `python eval.py
# robustness` open it up.
