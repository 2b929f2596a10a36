# %% [markdown]
# # 3. Cartesian experts: a layer that composes
#
# CartesianMoE (Su et al., NAACL 2025, [arXiv 2410.16077](https://arxiv.org/abs/2410.16077)) asks
# how experts can share what they know. What you will learn:
#
# - what the Cartesian product layer computes, tensor by tensor, and what a popular summary of it
#   gets wrong;
# - how to compare it with other mixtures fairly: counted at equal parameters, trained alike;
# - how to see whether a model composes or has learnt by heart, on a task that is made of
#   compositions.
#
# Half an hour to read; about a minute to run, on one CPU core. Everything trained here is a toy on
# one seed: it shows how to look, not who wins.

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
import numpy as np
import torch

from cartesian import PAPER, TOY, CartesianConfig, CartesianTransformer, count_parameters
from data import CompositionTask
from lab.composing.composition import last_visits
from lab.composing.layers import Pairs
from lab.composing.presets import preset
from lab.scores.evaluation import router_names
from lab.tools import cli
from lab.tools.settings import TrainConfig
from moe import MoEConfig
from train_toy import start, update

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
# ## A task that is made of compositions
#
# What is such a layer for? Look for a task on which it must show. A prompt is [f, g, x]; its answer
# is g(f(x)). There are 15 functions f and 15 functions g, permutations of 16 numbers, drawn at
# random. So there are 15 x 15 pairs of functions: a table like that of the composed experts above.
#
# Half of the training examples show one function alone, so that each of them is known. The other
# half show pairs, but not all: 70 % of the pairs are trained, 30 % are **never seen together**. A
# model can learn the trained pairs by heart. It can answer the unseen ones only if it composes.
# (`CompositionTask` of [data.py](../data.py); `python train_toy.py --data composition --preset
# cartesian` trains on it at full length.)

# %%
task = CompositionTask(0)
pairs = np.concatenate(list(task.pairs.values()))  # (225, 2): f and g, each from 1 to 15
tokens, answers = task.all_numbers(pairs)  # (3600, 3) and (3600,): each pair with 16 numbers

f, g = task.pairs["dev"][0]
middle = task.functions[0, f, 7]
print(f"f is function {f} and g is function {g}: a pair that is never trained")
print(f"f(7) = {middle}, and g({middle}) = {task.functions[1, g, middle]}")

# %% [markdown]
# ## Small models, trained alike
#
# A Cartesian and a fine-grained model learn the task. Both have one block, the same base sizes, the
# same batches and the same settings. They make 1,000 steps, less than half of what the task asks
# for. A third model is Cartesian, too, but learns without weight decay.

# %%
names = ("n_layers", "context", "n_experts", "top_k", "d_expert", "d_shared")
base = MoEConfig(**{name: task.settings[name] for name in names})


def learn(name, weight_decay):
    """Train a new model of a preset. All have the same seed, and see the same batches."""
    train = TrainConfig(steps=1000, batch=256, lr=3e-3, weight_decay=weight_decay)
    model, optimizer = start(train, preset(name, base), task)
    for step in range(train.steps):
        update(model, model, optimizer, task, train, step)
    return model


# %%
models = {
    "cartesian": learn("cartesian", weight_decay=4.0),
    "fine_grained": learn("fine_grained", weight_decay=4.0),
    "cartesian, no decay": learn("cartesian", weight_decay=0.0),
}
rows = []
for name, model in models.items():
    scores = task.score(model, "dev")
    shares = [f"{scores[key]:.0%}" for key in ("trained_pairs", "single_steps", "accuracy")]
    sizes = (f"{model.n_params():,}", f"{model.n_params(activated=True):,}")
    rows.append((name, *sizes, *shares))
header = ["", "parameters", "activated", "trained pairs", "one function", "unseen pairs (dev)"]
print(cli.table(rows, header))

# %% [markdown]
# All three know their functions, and all three answer the pairs that they were trained on. Only the
# last column tells them apart. Here is the whole table of pairs, a row for each f and a column for
# each g. Dark: a model answers the pair for all 16 numbers. Framed: the pair was never trained.


# %%
def table_of_pairs(model):
    """The share of the 16 numbers that a model answers right, for each pair: (15, 15)."""
    with torch.no_grad():
        said = model(tokens).logits[:, -1].argmax(-1)  # (3600,)
    table = np.zeros((15, 15))
    table[tuple(pairs.T - 1)] = (said == answers).float().view(len(pairs), 16).mean(1)
    return table


unseen = np.ones((15, 15), dtype=bool)
unseen[tuple(task.pairs["train"].T - 1)] = False
tables = {name: table_of_pairs(model) for name, model in models.items()}
pictures.pair_tables(tables, unseen, "Who composes, and who has learnt by heart?")

# %% [markdown]
# Without weight decay the framed cells stay pale: the model has learnt the trained pairs by heart.
# With it, the very same layer fills most of them. So a layer that *can* compose need not do it. And
# fine-grained experts fill them, too: attention and one sub-layer leave room for two functions.
#
# **Do not read a winner off this page.** It is one seed, and one setting for both. With many seeds,
# each kind with its best settings, two tests were declared before their runs: with 70 % of the
# pairs trained, and with 40 %. Both are inconclusive. In the first, where both kinds are near 100
# %, Cartesian is 0.6 points ahead (95 % interval: -0.9 to +2.1). In the second it is 10.4 points
# ahead (+0.2 to +20.7), with p = 0.047 where less than 0.005 was asked. It all stands in
# [docs/cartesian.md](../docs/cartesian.md#compositions).
#
# ## Which expert serves which function?
#
# If A computes f and B computes g, then A's router should look at f, and B's at g. Each image has a
# row for each function, and a column for each expert. It is dark where the last token of a prompt
# with this function visits this expert. Where all rows are alike, the router does not look at this
# function.

# %%
maps = {}
for name in ("cartesian", "fine_grained"):
    visits = last_visits(models[name], tokens)  # (R, 3600, E)
    for place, visit in zip(router_names(models[name]), visits, strict=True):
        both = []
        for column in tokens[:, :2].T:  # the token of f, then that of g
            rows = [visit[column == function].mean(0) for function in column.unique()]
            both.append(torch.stack(rows).numpy())  # (15, E)
        maps[f"{name}, {place}"] = both
pictures.function_maps(maps, "Which expert serves which function?")

# %% [markdown]
# Compare an upper image with the one below it: where rows differ more, the router looks more at
# that function. B looks at g, and so does the one router of the fine-grained model. A looks at
# both. Over eight seeds, what B visits tells of g and hardly of f. What A visits tells more of f
# than of g in the mean, but not in every seed, and all of it is little. Is f(x) computed elsewhere?
# See exercise 2.
#
# ## Exercises
#
# **1. Side by side.** In `cartesian_parallel` B reads what A reads, and not what A has made of it.
# The experts are the same. Guess: can it answer unseen pairs at all? Where else could f(x) be
# computed?
#
# <details><summary>Solution</summary>
#
# ```python
# model = learn("cartesian_parallel", weight_decay=4.0)
# print(f"unseen pairs: {task.score(model, 'dev')['accuracy']:.0%}")
# ```
#
# When we ran it, about 54 %, where `cartesian` had about 78 %. So B need not read A, though in this
# seed it helps. Attention stands before both: there a prompt's x can already be turned into f(x).
#
# </details>
#
# **2. Where is f(x)?** If A computes f(x), it stands in the stream that B reads. Take what the
# norms before A and before B get as their input at the last token, and fit a linear map from it to
# f(x), on the trained pairs. Does it tell f(x) of the unseen pairs, before A and before B?
#
# <details><summary>Solution</summary>
#
# ```python
# streams = {}
# for name, norm in zip("AB", models["cartesian"].blocks[0].ffn_norms, strict=True):
#
#     def keep(module, inputs, output, name=name):
#         streams[name] = inputs[0][:, -1]  # (3600, D)
#
#     norm.register_forward_hook(keep)
# with torch.no_grad():
#     models["cartesian"](tokens)
#
# middle = task.functions[0, tokens[:, 0] - task.N, tokens[:, 2]]
# middle = torch.from_numpy(middle)  # (3600,) f(x)
# trained = torch.arange(3600) < 16 * len(task.pairs["train"])  # they come first
# for name, stream in streams.items():
#     inputs = torch.cat([stream, torch.ones(3600, 1)], 1)
#     goal = torch.nn.functional.one_hot(middle, 16).float()
#     weights = torch.linalg.lstsq(inputs[trained], goal[trained]).solution  # (D + 1, 16)
#     right = ((inputs @ weights).argmax(1) == middle)[~trained].float().mean()
#     print(f"before {name}: f(x) is told right for {right:.0%} of the unseen pairs")
# ```
#
# When we ran it, about 65 % before A, and 84 % before B. So A has a part in f(x), as it should. But
# attention, which stands before A, has the larger one. That is why the routers tell so little of f,
# and why one sub-layer can do.
#
# </details>
#
# ## Where to go next
#
# [Notebook 6](6_sharing_and_robustness.ipynb) measures what composed experts share, and what a
# model loses where its routing goes wrong. [Notebook 4](4_remixing_at_test_time.ipynb) re-mixes the
# experts of a trained model for each prompt (C3PO).
