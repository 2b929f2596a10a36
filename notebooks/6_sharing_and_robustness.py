# %% [markdown]
# # 6. Sharing and robustness: what composed experts have in common, and what wrong routing costs
#
# CartesianMoE ([arXiv 2410.16077](https://arxiv.org/abs/2410.16077), notebook 3) makes two claims
# about its experts: they share what they know, and the model is robust where routing goes wrong.
# What you will learn:
#
# - how to measure whether two sub-layers compose, or whether their product is close to a sum;
# - why the protocol of a robustness test sets its answer;
# - which null belongs to such a test: what the loss of *any* expert would cost.
#
# Half an hour to read; less than a minute to run, on one CPU core. Everything trained here is a toy
# on one seed: it shows how to look, not who wins.

# %%
# %matplotlib inline
import pictures

pictures.first_choice_lost()

# %% [markdown]
# ## The idea
#
# A router gives each expert a probability, and a token visits the best few (above, two of six).
# Disable the first choice, and the next expert takes its place. The token has lost a part of its
# *routing mass*, the probability of the experts that it wanted. How much worse does the model
# answer? That is **robustness**.
#
# **Sharing** asks about the N x N composed experts $(A_i, B_j)$ of notebook 3. Those in one row
# share $A_i$, those in one column share $B_j$. Do they answer alike, and is there more to it than a
# sum of two parts?
#
# ## Two small models
#
# A Cartesian and a fine-grained model learn the skills task (notebook 2): the same base sizes, the
# same batches, the same steps, two layers each.

# %%
import copy
from dataclasses import asdict

import numpy as np
import torch

from data import SkillsTask
from lab.composing.figures import robustness_figure, sharing_figure
from lab.composing.layers import Pairs
from lab.composing.presets import build_model, preset
from lab.composing.robustness import (
    disturbed,
    loss_at_mass,
    measure_robustness,
    robustness_table,
)
from lab.composing.sharing import measure_sharing, sharing_table
from lab.tools import cli
from lab.tools.settings import TrainConfig
from moe import MoEConfig
from train_toy import update

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False, linewidth=110)

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
# **Do not read a winner off this table.** It is one seed, one learning rate and seconds of
# training. What many seeds say stands in [docs/cartesian.md](../docs/cartesian.md).
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
# routing mass that is lost. Along each solid line, the first choice is disabled with a probability
# that grows from 0 to 1; the star is the paper's protocol.

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
# only as good as its protocol: say which one, and how much each model lost.
#
# ## The null: is it the first choice that matters?
#
# The dashed lines of the figure are a first null: noise on the logits of all routers, a disturbance
# that aims at no expert. Here is a sharper one. It disables one of the experts that a token visits,
# *any* of them, drawn at random. `disturbed` takes any change of the probabilities, so the null is
# a function of three lines. Beside it stands what first choices cost where as much of the mass is
# lost.


# %%
def without_any(probs, k):
    """A change for `disturbed`: each token loses one of the experts that it visits, at random."""
    n = int(k[0])  # all tokens visit as many
    drawn = torch.randint(n, (len(probs), 1), generator=generator)
    lost = probs.topk(n).indices.gather(1, drawn)  # (N, 1)
    return probs.scatter(1, lost, 0.0)


generator = torch.Generator().manual_seed(0)
lines = []
for name, model in models.items():
    with disturbed(model.routers(), without_any) as shares:
        loss = task.score(model, "dev", most=128)["loss"]
    _, mass = np.mean(shares, axis=0)  # of the experts that are lost, and of the mass
    intact = protocols[name]["intact"]["loss"]
    first = loss_at_mass(protocols[name], mass)
    lines.append((name, f"{mass:.0%}", f"{loss - intact:+.3f}", f"{first - intact:+.3f}"))
header = ["rise of the loss, nats", "mass lost", "any expert", "first choices"]
print(cli.table(lines, header))

# %% [markdown]
# At equal mass first choices cost more than other experts do, in both models. So the mass is not
# all that counts: a first choice is worth more than its probability says. Without a null, a test of
# robustness shows only that a disturbed model is worse.
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
# `python train_toy.py --preset cartesian` trains a Cartesian model at full length. `python eval.py
# sharing` and `python eval.py robustness` open it up as this page did. What many seeds say stands
# in [docs/cartesian.md](../docs/cartesian.md).
