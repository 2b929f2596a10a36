# %% [markdown]
# # 1. One token through an MoE layer, and why experts collapse
#
# What you will learn:
#
# - what a mixture-of-experts (MoE) layer computes, number by number, for one token and for many;
# - how experts collapse: without help, a router sends nearly every token to the same few;
# - what the balance loss and the router z-loss do about it, and a cause that you can switch off.
#
# About 25 minutes to read; it runs in less than a minute on one core.

# %%
# %matplotlib inline
import pictures

pictures.moe_layer()

# %% [markdown]
# ## The layer
#
# In a transformer, a feed-forward layer is the same network for every token. An MoE layer has
# several such networks, the *experts*, and a *router* that picks a few of them for each token. The
# output is "the linearly weighted combination of each expert's computation on the token by the gate
# value" (Switch Transformer, [2101.03961](https://arxiv.org/abs/2101.03961), section 2.1):
#
# $$p(x) = \mathrm{softmax}(W x) \quad (1) \qquad\qquad
# y = \sum_{i \in \mathrm{top}\,k} p_i(x)\, E_i(x) \quad (2)$$
#
# In our words: score all experts, keep the best $k$, compute only those, add up what they say, each
# as loud as its probability. The parameters of all experts have to be stored; only those of $k$
# experts are used for a token.
#
# Here is such a layer, from [moe.py](../moe.py): 8 experts, of which a token visits 2. In a new
# model the router starts near zero, so that all experts begin as equals. To have something to look
# at, we give this one larger random weights.

# %%
from dataclasses import replace

import torch
import torch.nn.functional as F

import train_toy
from data import SkillsTask
from lab.scores.evaluation import router_names
from lab.scores.specialisation import specialisation
from lab.tools import cli
from lab.tools.settings import TrainConfig
from moe import Combine, Dispatch, MoEConfig, MoETransformer, Routing, grouped_matmul, router_losses

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False, linewidth=110)

torch.manual_seed(0)
config = MoEConfig(d_model=8, n_layers=1, n_heads=1, n_experts=8, top_k=2, d_expert=16)
layer = MoETransformer(config).blocks[0].ffns[0]
torch.nn.init.normal_(layer.router.weight, std=0.5)
layer.requires_grad_(False)
for name, weight in layer.named_parameters():
    print(f"{name:16} {tuple(weight.shape)}")

# %% [markdown]
# ## One token
#
# A token is a vector. The router is one matrix: a score for each expert, the *logits*, which the
# softmax turns into probabilities.

# %%
x = torch.randn(8)
logits = layer.router.weight @ x  # (8 experts, 8) @ (8,) -> (8,)
probs = logits.softmax(-1)
print("x     ", x)
print("logits", logits)
print("probs ", probs, "sum", round(probs.sum().item(), 3))

# %% [markdown]
# Top-k: the two most probable experts, and their probabilities as weights.

# %%
weights, experts = probs.topk(2)
print("experts", experts.tolist())
print("weights", weights, "sum", round(weights.sum().item(), 3))

# %% [markdown]
# The weights do not sum to one: OLMoE ([2409.02060](https://arxiv.org/abs/2409.02060)), whose layer
# this is, leaves them as they are. Other models divide them by their sum (`norm_topk=True`).
# Remember this small choice, it comes back below.
#
# An expert is a SwiGLU network: two projections up, one of them through a SiLU as a gate, and one
# down. We compute the two that were chosen; the other six cost nothing.

# %%
outputs = []
for expert in experts.tolist():
    gate_up = layer.experts.gate_up[expert]  # (32, 8)
    down = layer.experts.down[expert]  # (8, 16)
    gate, up = (gate_up @ x).chunk(2)  # (32,) -> (16,) twice
    output = down @ (F.silu(gate) * up)  # (8,)
    outputs.append(output)
    print(f"expert {expert}", output)

# %% [markdown]
# The weighted sum is the output. The module gives the same, to rounding: it multiplies by the
# weight one step earlier, so the order of the operations differs.

# %%
y = torch.zeros(8)
for weight, output in zip(weights, outputs, strict=True):
    y += weight * output
y_module = layer(x.view(1, 1, 8)).view(8)
print("by hand   ", y)
print("the module", y_module)
print("largest difference", f"{(y - y_module).abs().max():.0e}")

# %% [markdown]
# ## Many tokens
#
# With many tokens, a loop over tokens would multiply thousands of small matrices. So the (token,
# expert) pairs are sorted by expert: then all rows of an expert stand together and go through it in
# one product. Afterwards every row finds its way back, and each token sums its $k$ rows. Here are
# four tokens, by colour, and the experts that they chose.

# %%
tokens = torch.randn(4, 8)
routing = layer.router(tokens)
pictures.dispatch(routing.experts.tolist())

# %% [markdown]
# The same picture in tensors. `order` says which pair stands at each place after sorting; `ends`
# says where the rows of each expert end (an expert whose end is that of the one before it has no
# visitors); `back` is where each token's pairs went.

# %%
chosen, order = routing.experts.flatten().sort(stable=True)  # (8,) pairs, expert by expert
ends = torch.searchsorted(chosen, torch.arange(8), right=True, out_int32=True)
back = order.argsort().view(4, 2)  # the inverse permutation
print("experts, a row a token", routing.experts.tolist())
print("sorted                ", chosen.tolist())
print("order                 ", order.tolist())
print("ends, expert 0 to 7   ", ends.tolist())
print("back, a row a token   ", back.tolist())

# %% [markdown]
# Now the three steps, with the functions that the module uses: `Dispatch` makes a row for every
# pair, `grouped_matmul` multiplies each group with its expert's matrix, `Combine` sums a token's
# rows. (Two of them bring their own gradients, and PyTorch calls such a function by `apply`.) No
# token is dropped, however crowded an expert is.

# %%
rows = Dispatch.apply(tokens, order, back)  # (4, 8) -> (8 pairs, 8)
weight = routing.weights.flatten()[order, None]  # (8 pairs, 1)

gate_up = grouped_matmul(rows, layer.experts.gate_up, ends)  # (8 pairs, 32)
gate, up = gate_up.chunk(2, dim=-1)  # (8 pairs, 16) twice
hidden = F.silu(gate) * up * weight
outputs = grouped_matmul(hidden, layer.experts.down, ends)  # (8 pairs, 8)

y = Combine.apply(outputs, order, back)  # (8 pairs, 8) -> (4, 8)
y_module = layer(tokens[None])[0]
print("rows", tuple(rows.shape), " gate", tuple(gate.shape), " y", tuple(y.shape))
print("largest difference to the module", f"{(y - y_module).abs().max():.0e}")

# %% [markdown]
# ## Why experts collapse
#
# The first paper on large MoE layers saw it at once: "the gating network tends to converge to a
# state where it always produces large weights for the same few experts. This imbalance is
# self-reinforcing, as the favored experts are trained more rapidly and thus are selected even more
# by the gating network" ([1701.06538](https://arxiv.org/abs/1701.06538), section 4).

# %%
pictures.vicious_circle()

# %% [markdown]
# The usual cure is a *balance loss* (Switch Transformer, equation 4): $E \sum_e f_e P_e$, where
# $f_e$ is the share of all visits that go to expert $e$ and $P_e$ its mean probability. Counting
# visits has no gradient, but $P_e$ has one: it pushes probability away from the experts that are
# crowded. **How to read it, in this repository:** 1.00 is even, for any $k$; if all tokens visit
# the same $k$ experts and these have all of the probability, it is $E / k$, here 8 / 2 = 4. Two
# routings made by hand:

# %%
even = torch.arange(16).view(8, 2) % 8  # 8 tokens, 2 visits each: every expert gets 2
same = torch.tensor([[0, 1]]).expand(8, 2)  # all tokens visit experts 0 and 1
share = torch.full((8,), 1 / 8)  # all tokens count alike
for name, experts in {"even": even, "collapsed": same}.items():
    probs = torch.zeros(8, 8).scatter_(1, experts, 0.5)
    routing = Routing(probs, weights=None, experts=experts, logits=probs)
    balance, _ = router_losses(routing, share)
    print(f"{name:10} balance loss {balance:.2f}")

# %% [markdown]
# The *router z-loss* (ST-MoE, [2202.08906](https://arxiv.org/abs/2202.08906), equation 5)
# "penalizes large logits into the gating network", for the sake of stable training in low
# precision; balance is not its purpose. It is the mean over tokens of
#
# $$\left(\log \sum_e e^{\mathrm{logit}_e}\right)^2$$
#
# Now let us see whether a real, if tiny, model collapses. The task: `[marker, a, b, cue]`, where
# the cue says what to do with the numbers (see *The task* in the [README](../README.md)). The
# model: two layers of 8 experts, top-2, with the default initialisation. `train_toy.update` is one
# step of the optimiser, and adds the two losses by the weights in `train`.

# %%
task = SkillsTask(0)
sizes = MoEConfig(n_layers=2, n_experts=8, top_k=2, d_expert=48)
steps = range(20, 241, 20)  # when we look


def watch(model, optimizer, train):
    """Train. Every 20 steps, note the load of the experts and the scores on dev."""
    history = {"load": [], "balance_loss": [], "loss": [], "accuracy": []}
    for step in range(train.steps):
        train_toy.update(model, model, optimizer, task, train, step)
        if step + 1 in steps:
            scores = task.score(model, "dev")
            scores["load"] = specialisation(model, task, "dev").load
            for key, values in history.items():
                values.append(scores[key])
    return history


# %% [markdown]
# We train it three times, each time with the same initial weights and the same batches.

# %%
ways = {
    "no balance loss": {"balance": 0.0, "z": 0.0},
    "balance": {"balance": 0.01, "z": 0.0},
    "balance + z": {"balance": 0.01, "z": 0.001},
}
models, histories = {}, {}
for name, factors in ways.items():
    train = TrainConfig(steps=240, batch=48, **factors)
    models[name], optimizer = train_toy.start(train, sizes, task)
    histories[name] = watch(models[name], optimizer, train)

# %% [markdown]
# Each panel shows the 8 experts of a layer over training, sorted by their load at the end. Pale: no
# visitor. Black: 4 times an even share, which is all tokens.

# %%
loads = {name: history["load"] for name, history in histories.items()}
title = "The load of the experts over training"
pictures.expert_loads(steps, loads, router_names(models["balance"]), title)

# %%
panels = {
    "balance loss (1 even, 4 collapsed)": "balance_loss",
    "dev loss (nats)": "loss",
    "dev accuracy": "accuracy",
}
curves = {}
for label, key in panels.items():
    curves[label] = {name: history[key] for name, history in histories.items()}
pictures.curves(steps, curves, "Balance, loss and accuracy over training")


# %%
def row(name):
    """The line of a run. An expert is idle if it gets less than a twentieth of an even share."""
    history, out = histories[name], models[name](*task.batch(10_000, 64))
    accuracy = f"{history['accuracy'][-1]:.1%}"
    balance = f"{history['balance_loss'][-1]:.2f}"
    z = f"{out.z_loss.item():.1f}"
    idle = [int((load < 0.05 * load.mean()).sum()) for load in history["load"][-1]]
    sums = [round(routing.weights.sum(1).mean().item(), 2) for routing in out.routing]
    return [name, accuracy, balance, z, idle, sums]


header = ["", "accuracy", "balance loss", "z-loss"]
header += ["idle experts, by layer", "top-2 weights sum to"]
print(cli.table([row(name) for name in histories], header))

# %% [markdown]
# What one sees:
#
# - **Without a balance loss experts collapse**, with the default initialisation and the default
#   learning rate: most visits go to two or three of the 8 experts, and several get next to none
#   (*idle*: less than a twentieth of an even share). It begins in the first steps, before the model
#   has learnt anything: look at the loss beside it.
# - **The balance loss keeps most experts in use.** Its weight is small, so the load is not flat,
#   and in some runs an expert is lost all the same.
# - **The z-loss makes the logits small** (its column), and that is all it is for. Nothing is
#   unstable here, so we see no other use of it.
# - **Accuracy**: the collapsed model is behind, in three of three seeds when we tried, by about 1
#   to 7 points, early in training. It need not stay so: the four-layer model of `python
#   train_toy.py`, trained for 500 steps with `--balance 0 --z 0`, had nearly half of its experts
#   idle and the usual accuracy (one seed). A collapse wastes capacity, and hurts where capacity is
#   short; see notebook 2.
#
# ## A cause that can be switched off
#
# The circle above says: trained more, hence chosen more. The last column of the table hints at one
# more cause. With 8 equal experts a weight is about 1/8 at the start, so that a token hears a
# quarter of what its two experts say. A layer that should speak louder can raise the probability of
# *whichever experts are visited*, for all tokens alike, and so it does: the sum grows. If that
# drives the collapse, it should weaken where the two weights are divided by their sum, as they then
# sum to 1 whatever the router does. Same weights, same batches, no balance loss, `norm_topk=True`:

# %%
name = "the same, renormalised"
train = TrainConfig(steps=240, batch=48, balance=0.0, z=0.0)
models[name], optimizer = train_toy.start(train, replace(sizes, norm_topk=True), task)
histories[name] = watch(models[name], optimizer, train)
compared = ("no balance loss", name)
print(cli.table([row(name) for name in compared], header))

# %%
loads = {name: histories[name]["load"] for name in compared}
title = "Without balance loss: raw weights, renormalised weights"
pictures.expert_loads(steps, loads, router_names(models[name]), title)

# %% [markdown]
# Fewer experts are lost, without any balance loss; in three seeds the balance loss ended at 2.1 to
# 2.5 with raw weights and at 1.1 to 1.3 with renormalised ones. Renormalising does two things: what
# a layer adds is larger from the start, and its size is no longer the router's to change. We tried
# each alone, by other versions of `Router.select`: raw weights times 4, and raw weights whose sum
# gets no gradient. Either weakened the collapse (1.2 to 1.6), but not as much as the two together.
# So in this toy much of the collapse comes from the size of the weights; nothing here says how much
# of it does in a large model, trained for much longer. And the load is not even: renormalising does
# not replace balancing.
#
# ## Exercise 1: balance without a loss
#
# A balance loss pulls the router's weights away from what is best for the task. DeepSeek-V3
# balances without it (*Loss-Free Balancing*, [2408.15664](https://arxiv.org/abs/2408.15664),
# equation 3 and algorithm 1): each expert has a bias that is added to its score **for the choice
# only**; the weights stay the original scores. After each batch the bias of an expert moves by a
# fixed $u$: down if it was crowded, up if not. No gradient is involved. Write it as a subclass of
# `Router` that overrides `select(probs) -> weights, experts`, give it to a new model,
# `MoETransformer(config, router=Biased)`, and train with `balance=0`.
#
# <details><summary>Solution</summary>
#
# ```python
# from moe import Router
#
#
# class Biased(Router):
#     def __init__(self, config, u=0.003):
#         super().__init__(config)
#         self.u = u
#         self.register_buffer("bias", torch.zeros(config.n_experts))
#
#     def select(self, probs):
#         experts = (probs + self.bias).topk(self.top_k).indices  # the bias counts for the choice,
#         weights = probs.gather(1, experts)  # and not for the weights
#         if self.training:
#             load = experts.flatten().bincount(minlength=len(self.bias)).float()
#             self.bias += self.u * (load.mean() - load).sign()
#         return weights, experts
#
#
# train = TrainConfig(steps=240, batch=48, balance=0.0, z=0.0)
# torch.manual_seed(0)  # the same initial weights
# model = MoETransformer(replace(sizes, vocab_size=task.vocab_size), router=Biased)
# optimizer = torch.optim.AdamW(
#     model.parameters(), train.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
# )
# models["biased"] = model
# histories["biased"] = watch(model, optimizer, train)
# print(cli.table([row(name) for name in histories], header))
# ```
#
# In our run no expert is idle in either layer, and the accuracy lies between the collapsed run and
# the others. The balance loss may read a little below 1: with the bias, the experts that are
# visited most are no longer the most probable ones. The paper's $u$ is 0.001 for its sigmoid
# scores; 0.003 and 0.01 balance faster here.
#
# </details>
#
# ## Exercise 2: the router that cannot learn
#
# Take $k = 1$ and `norm_topk=True`. Which gradient does the router get from the task? Find out with
# autograd: make such a layer, sum its output times something random, call `backward()`, and look at
# `layer.router.weight.grad`. Compare $k = 1$ and $k = 2$, with and without renormalisation.
# (Shazeer et al. conjectured that $k > 1$ was needed for the router to get a gradient at all;
# Switch trains with $k = 1$.)
#
# <details><summary>Solution</summary>
#
# ```python
# for k in (1, 2):
#     for norm in (False, True):
#         torch.manual_seed(0)
#         layer = MoETransformer(replace(config, top_k=k, norm_topk=norm)).blocks[0].ffns[0]
#         y = layer(torch.randn(1, 100, 8))
#         (y * torch.randn(1, 100, 8)).sum().backward()
#         size = layer.router.weight.grad.norm()
#         print(f"k {k}, renormalised {norm!s:5}: norm of the gradient {size:.1e}")
# ```
#
# For $k = 1$ with renormalisation the gradient is zero up to rounding: the only weight is $p / p =
# 1$, whatever the router says. All other cases have one. In training, the balance loss would then
# be all that the router listens to: even load, chosen for no reason. `train_toy.py` therefore
# refuses `--top-k 1 --norm-topk`. With $k = 2$, renormalised, the router still learns which of its
# two choices should count more.
#
# </details>
#
# ## Where to go next
#
# [Notebook 2](2_moe_and_its_dense_twin.ipynb): what are all those experts good for? An MoE beside a
# dense model that computes as much for each token.
