# %% [markdown]
# # 5. Look inside a checkpoint, then change it yourself
#
# What you will learn:
#
# - how a trained model becomes a checkpoint in OLMoE's format, and is the same model when it is
#   opened again;
# - how to see which expert fires for which token, and how to impose another pathway on one token,
#   the hook that all of C3PO hangs on;
# - where your own ten lines go: a routing rule, a surrogate for re-mixing, a task, each with a test
#   that tells whether it is right.
#
# Half an hour to read, less than a minute to run, offline. The checkpoint is that of a toy which we
# train here: it has OLMoE's names and OLMoE's arithmetic, and one changed line opens the real one.

# %%
# %matplotlib inline
import pictures

pictures.stacked_experts()

# %% [markdown]
# ## A checkpoint is a folder
#
# OLMoE-1B-7B ([arXiv 2409.02060](https://arxiv.org/abs/2409.02060)) is a decoder of 16 layers, each
# with 64 experts of which a token visits 8. On the hub it is a folder: `config.json`, the weights
# as safetensors, `tokenizer.json`. Every expert has three matrices of its own there, on the left of
# the picture. In memory, ours stand in two stacked tensors a layer, so that one grouped product
# serves all experts (notebook 1).

# %%
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import hf
from data import Kinds, SkillsTask, Task
from lab.checkpoints.untrusted import read_entries
from lab.remixing.figures import pathway_figure
from lab.scores.evaluation import router_names
from lab.scores.specialisation import specialisation
from lab.tools import cli, figures
from lab.tools.settings import TrainConfig
from moe import Imposed, MoEConfig, MoETransformer, Router, wide
from pathways import ReferenceSet
from remix import ngd, remix
from train_toy import update

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False, linewidth=110)

# %% [markdown]
# First a model that knows something: two layers of 16 experts, trained on the skills task of the
# [README](../README.md) in seconds. Then we save it, and forget it.


# %%
def learn(model, task, train):
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, train.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(train.steps):
        update(model, model, optimizer, task, train, step)


task = SkillsTask(0)
torch.manual_seed(0)
trained = MoETransformer(MoEConfig(vocab_size=task.vocab_size, n_layers=2))
learn(trained, task, TrainConfig(steps=300, batch=32, lr=4e-3, warmup=30))
temporary = tempfile.TemporaryDirectory()  # goes when the notebook ends
PATH = Path(temporary.name) / "toy"
hf.save(trained, PATH)
print(*sorted(path.name for path in PATH.iterdir()))

# %% [markdown]
# transformers opens this folder as well (`AutoModelForCausalLM.from_pretrained`). From here on,
# nothing knows that it is a toy. For the real OLMoE it would be
# `PATH = "allenai/OLMoE-1B-7B-0125-Instruct"`: a download, and 13.8 GB of memory in bfloat16.
# (`python hf.py PATH_OR_REPO` tells beforehand whether it fits.) Files are not trusted: all is
# checked before memory is taken.

# %%
model, _ = hf.load(PATH)  # the second is a tokenizer, where the checkpoint has one
print(model.config)
print(f"{model.n_params():,} parameters, {model.n_params(activated=True):,} activated for a token")
asked = task.prompts("dev")
with torch.no_grad():
    gap = model(asked.tokens).logits - trained(asked.tokens).logits
print("opened again, the largest difference of a logit:", float(gap.abs().max()))

# %% [markdown]
# ## Names on disk, names in memory
#
# `hf.NAMES` is the whole translation: our names, and the hub's. Where one of ours has two of
# theirs, they share its rows.

# %%
stored = read_entries(hf.fetch(PATH, [*hf.ABOUT, "model*.safetensors"]))
memory = dict(model.named_parameters())
rows = []
for ours, theirs in hf.NAMES.items():
    name, prefix = ours, ""
    if name not in memory:  # it stands in the blocks; we look at the first one
        name, prefix = f"blocks.0.{ours}", "model.layers.0."
    if name not in memory:  # a layer that this model does not have
        continue
    cells = [name, tuple(memory[name].shape)]
    for their in theirs:
        on_disk = f"{prefix}{their.format(e=0)}.weight"
        rows.append([*cells, on_disk, tuple(stored[on_disk].get_shape())])
        cells = ["", ""]
print(cli.table(rows, ["in memory", "shape", "on disk", "shape"], left=4))
print(f"\n{len(memory)} tensors in memory, {len(stored)} on disk")

# %% [markdown]
# `hf.pieces` pairs them all: a name of theirs, and the view of our weights that it fills. Is expert
# 3 what the file says?

# %%
views = dict(hf.pieces(model, "olmoe"))
print("all used, no other:", views.keys() == stored.keys())
name = "model.layers.0.mlp.experts.3.up_proj.weight"
gate_up = memory["blocks.0.ffns.0.experts.gate_up"]  # (E, 2F, D)
F_rows = gate_up.shape[1] // 2
print("same numbers:", torch.equal(stored[name][:], gate_up[3, F_rows:]))

# %% [markdown]
# ## What the routers say about a prompt
#
# A forward pass returns a `Routing` for every router, bottom to top: the softmax over all experts,
# the chosen ones, their weights. OLMoE does not divide the weights by their sum, so that they add
# up to less than 1.
#
# Many prompts are answered by the cue's other reading. Of these we take the one that NGD helps most
# (notebook 4), a best case.

# %%
with torch.no_grad():
    answers = model(asked.tokens).logits[:, -1].argmax(-1)
misread = ((answers == asked.other) & (asked.other != asked.labels)).nonzero()[:, 0]
solved, corpus = task.prompts("reference"), task.corpus()[0]
references = ReferenceSet.build(model, solved.tokens, solved.labels, corpus=corpus)
print(f"{len(solved.labels):,} references, {int(references.correct.sum()):,} answered right")
found = remix(model, asked.tokens[misread], references, method="ngd")
labels = asked.labels[misread][:, None]
best = int(found.logits.softmax(-1).gather(1, labels).argmax())
place = int(misread[best])
tokens = asked.tokens[place : place + 1]  # (1, T)
label, said = int(asked.labels[place]), int(answers[place])
print(f"{task.words(tokens[0].tolist())}: it says {said}, right is {label}")

with torch.no_grad():
    out = model(tokens)
print("logits", tuple(out.logits.shape), end=" ")
print("  routers", len(out.routing), "  probs", tuple(out.routing[0].probs.shape))
rows = []
for name, routing in zip(router_names(model), out.routing, strict=True):
    weights = routing.weights[-1]  # (K,) of the last token
    pairs = zip(routing.experts[-1].tolist(), weights.tolist(), strict=True)
    cells = [f"{expert}: {weight:.2f}" for expert, weight in pairs]
    rows.append((name, "  ".join(cells), f"{float(weights.sum()):.2f}"))
print(cli.table(rows, ["at the cue", "experts: weights", "sum"], left=2))

# %%
words = ["dialect", "a", "b", "cue"]
panels = {}
for name, routing in zip(router_names(model), out.routing, strict=True):
    panels[name] = routing.probs.numpy()  # (T, E)
title = f'Which expert fires for which token of "{task.words(tokens[0].tolist())}"'
pathway_figure(panels, words, title, top_k=model.config.top_k, changes=False)

# %% [markdown]
# The figure has a row for each token. In the first layer a row depends on little but the token
# itself. In the second the cue's row has seen the numbers, too.
#
# ## Another pathway for the last token
#
# C3PO ([arXiv 2504.07964](https://arxiv.org/abs/2504.07964), section 3; notebook 4) calls the
# softmax rows of all routers at the last prompt token the *pathway*, and imposes other rows there.
# The hook is `Imposed(rows)`: row l replaces the softmax of router l, before top-k. We impose the
# pathway of another prompt, and one that NGD found among the solved prompts.

# %%
with torch.no_grad():
    other = model(asked.tokens[place + 1 : place + 2])

R = len(out.routing)  # routers
own_rows = {i: out.routing[i].probs[-1:] for i in range(R)}  # router -> (1, E)
other_rows = {i: other.routing[i].probs[-1:] for i in range(R)}
ngd_rows = {i: found.pathway[best, i : i + 1] for i in range(R)}
panels = {
    "its own": torch.cat([*own_rows.values()]).numpy(),
    "another prompt's": torch.cat([*other_rows.values()]).numpy(),
    "after NGD": found.pathway[best].numpy(),
}
title = "Pathways at the last token"
pathway_figure(panels, router_names(model), title, top_k=model.config.top_k)

# %%
for name, rows in {"its own": own_rows, "another's": other_rows, "NGD's": ngd_rows}.items():
    with torch.no_grad():
        after = model(tokens, imposed=Imposed(rows))
    moved = (after.logits - out.logits).abs().amax(-1)[0]  # (T,)
    change = f"logits change by {float(moved[:-1].max()):.2f} before, {float(moved[-1]):.2f} there"
    top = after.logits[0, -1].softmax(-1).topk(3)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    print(f"{name:10} {change}:", "  ".join(f"{answer} {p:.0%}" for answer, p in pairs))
print(f"\nright is {label}\n\n{found.explain(best, task.words)}")

# %% [markdown]
# Imposing what the model says anyway changes nothing. Another pathway changes the last token and no
# earlier one, as attention only looks back. Which experts fire has changed, too, not just how much
# they count. `explain` tells who led NGD there.
#
# On the real model, and a real benchmark, re-mixed as in the paper:
#
#     python eval.py choice --model allenai/OLMoE-1B-7B-0125-Instruct --task arc_challenge \
#         --references openbookqa,sciq --method ngd
#
# ## Now change it yourself
#
# Three places, ten lines each. What matters as much as the lines is the test beside them: something
# that must come out, whatever the weights are.

# %%
pictures.places_to_change()

# %% [markdown]
# ### (a) A routing rule
#
# A router first scores, then selects, the second and the third box above: `scores(x)` gives logits
# and probabilities (N, E), `select(probs)` the weights and the experts (N, K). A rule is a subclass
# that overrides one of them.
#
# With a softmax, an expert that gains takes from all others. DeepSeek-V3
# ([2412.19437](https://arxiv.org/abs/2412.19437), section 2.1.2) scores each expert by itself, with
# a sigmoid. So do we, and divide the scores of a token by their sum: they are then probabilities,
# as the balance loss and re-mixing want them.


# %%
class SigmoidRouter(Router):
    """Each expert is scored by itself; the scores of a token are divided by their sum."""

    def scores(self, x):
        logits = wide(F.linear(x, self.weight))  # (N, D) -> (N, E)
        scores = logits.sigmoid()
        return logits, scores / scores.sum(-1, keepdim=True)


# %% [markdown]
# In a file `my_router.py`, with its imports, it trains without a change to any other file:
#
#     python train_toy.py --router my_router:SigmoidRouter

# %%
torch.manual_seed(0)
config = MoEConfig(vocab_size=50, n_experts=6, top_k=3)
mine = MoETransformer(config, router=SigmoidRouter).double()
for router in mine.routers():
    torch.nn.init.normal_(router.weight, std=0.3)
layer = mine.blocks[0].ffns[0]
x = torch.randn(9, config.d_model).double()
with torch.no_grad():
    routing = layer.router(x)
print("softmax", routing.logits[0].softmax(-1))
print("sigmoid", routing.probs[0])

# %% [markdown]
# The order of the experts is the same, but no score of the sigmoid exceeds 1, so that a token
# listens to its experts more evenly.
#
# **The tests.** Four properties of `tests/test_moe.py`, each in a few lines: the sparse computation
# equals one that sends every token through every expert; no prediction depends on later tokens; nor
# on other rows of the batch; the loss trains every router. A rule that compares tokens with each
# other (an expert takes its best ten tokens) would fail two of them.

# %%
with torch.no_grad():
    sparse = layer.experts(x, routing.weights, routing.experts)  # (N, D)
    gate_up = torch.einsum("nd,efd->nef", x, layer.experts.gate_up)  # (N, E, 2F)
    gate, up = gate_up.chunk(2, dim=-1)
    outputs = torch.einsum("nef,edf->ned", F.silu(gate) * up, layer.experts.down)  # (N, E, D)
weights = torch.zeros(9, 6).double().scatter(1, routing.experts, routing.weights)  # (N, E)
dense = (weights[..., None] * outputs).sum(1)  # 0 where an expert was not chosen
print("sparse equals dense:  ", float((sparse - dense).abs().max()))

# %%
tokens = torch.randint(50, (4, 10))
changed = torch.cat([tokens[:, :5], torch.randint(50, (4, 5))], 1)  # other tokens later
with torch.no_grad():
    logits = mine(tokens).logits
    logits_changed = mine(changed).logits
    logits_alone = torch.cat([mine(row[None]).logits for row in tokens])
print("causal:               ", float((logits_changed - logits)[:, :5].abs().max()))
print("rows are independent: ", float((logits_alone - logits).abs().max()))

out = mine(tokens, torch.randint(50, tokens.shape))
out.loss.backward()
gradients = [float(router.weight.grad.abs().max()) for router in mine.routers()]
print("the router's gradient:", min(gradients))

# %% [markdown]
# ### (b) A surrogate for re-mixing
#
# A surrogate moves a pathway w without knowing the answer. NGD goes where the *neighbours* are
# answered best (paper, section 3.1). But neighbours of an easy prompt may unsettle it. So let us
# pull w back to where it came from, and let `ngd` minimise
#
# $$L(w) = \underbrace{
# \textstyle\sum_i K(x_i, x)\, \mathrm{CE}(f(x_i; w), y_i) / \sum_i K}_{\text{the loss of NGD}}
# \;+\; \lambda \, \mathrm{KL}(\text{own} \,\|\, w)$$
#
# A surrogate is a function `(core, loss, near, config)` that returns a pathway: `core.start` is the
# model's own one, `loss` the neighbours' loss of any other, `near` who the neighbours are.


# %%
def pulled(strength):
    """NGD with a pull towards the pathway that it starts from."""

    def surrogate(core, loss, near, config):
        own = core.start.clamp(min=1e-20)

        def total(w):  # (n, R, E) -> (n,)
            divergence = own * (own / w.clamp(min=1e-20)).log()
            return loss(w) + strength * divergence.sum((1, 2))

        return ngd(core, total, near, config)

    return surrogate


# %% [markdown]
# It goes into `remix` as it is, `remix(model, prompts, references, method=pulled(0.1))`.
#
# **The test: known identities.** Without a pull it must be NGD, and with an endless one the model
# as it is; in between, w must be a distribution in every row, and the stronger the pull, the nearer
# it stays.

# %%
prompts, labels = asked.tokens[::3], asked.labels[::3]
without_pull = remix(model, prompts, references, method="ngd")
own = without_pull.pathway_before


def share_right(logits):
    return f"{float((logits.argmax(1) == labels).float().mean()):.1%}"


rows = []
for name, strength in {"0": 0.0, "1/10": 0.1, "1": 1.0, "endless": 1e9}.items():
    result = remix(model, prompts, references, method=pulled(strength))
    w = result.pathway  # (n, R, E)
    gaps = [float((w - other).abs().max()) for other in (without_pull.pathway, own)]
    moved = float((w - own).abs().sum(-1).mean() / 2)
    error = float((w.sum(-1) - 1).abs().max())
    numbers = [*(f"{gap:.5f}" for gap in gaps), f"{moved:.3f}", f"{error:.0e}"]
    rows.append([name, *numbers, share_right(result.logits)])
header = ["pull", "gap to NGD", "gap to base", "mass moved", "rows' sum - 1", "right (dev)"]
print(cli.table(rows, header))
print(f"base: {share_right(without_pull.logits_before)} right")
print(f"NGD: {share_right(without_pull.logits)} right")

# %% [markdown]
# The two ends are what they must be. The accuracies are those of 222 dev prompts of one toy: they
# show that it runs, and nothing about whether a pull helps. To find out, tune its strength on dev
# of some seeds and look at test of others, beside the controls:
# [lab/remixing/methods.py](../lab/remixing/methods.py) has the table `METHODS`, in which your
# surrogate would be one more entry.
#
# ### (c) A task
#
# What training and evaluation ask of a task is listed in [data.py](../data.py), as the class
# `Task`: a `vocab_size` and `batch(step, n)`, tokens and targets; for scores also `score`, and for
# the figure `kinds`, the kinds of tokens and their names. Ours: after every digit, say the largest
# one so far. And the model routes by the rule of (a).


# %%
class RunningMaximum(Task):
    """Twelve random digits; after each, the largest so far. No two batches are the same."""

    name = "running maximum"
    vocab_size = 10
    guess = math.log(10)

    def batch(self, step, n):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(10, (n, 12), generator=generator)  # (n, T)
        return tokens, tokens.cummax(1).values

    def held_out(self, split, n):
        steps = {"dev": 10**6, "test": 10**6 + 1}  # training never takes these
        return self.batch(steps[split], n)

    @torch.no_grad()
    def score(self, model, split, most=256):
        tokens, targets = self.held_out(split, most)
        out = model(tokens, targets)
        right = out.logits.argmax(-1) == targets  # (n, T)
        return {"loss": float(out.loss), "accuracy": float(right.float().mean())}

    def kinds(self, split, n_kinds=10, most=256):
        tokens, _ = self.held_out(split, most)
        return Kinds(tokens, tokens, [str(digit) for digit in range(10)])


# %%
largest = RunningMaximum()
torch.manual_seed(0)
sizes = MoEConfig(largest.vocab_size, n_layers=2, n_experts=8, d_expert=32)
counting = MoETransformer(sizes, router=SigmoidRouter)
learn(counting, largest, TrainConfig(steps=150, batch=32, lr=4e-3, warmup=30))
print({name: round(value, 3) for name, value in largest.score(counting, "test").items()})

# %% [markdown]
# **The test: better than what knows less.** Chance is not one number: "always 9" does well, late in
# a row. So we compare with the most frequent answer at each place, the best that one can do without
# reading.

# %%
tokens, targets = largest.held_out("test", 256)
with torch.no_grad():
    answers = counting(tokens).logits.argmax(-1)  # (n, T)
most_frequent = targets.mode(0).values  # (T,)


def percent_right(answers):
    shares = (answers == targets).float().mean(0)  # (T,)
    return "  ".join(f"{100 * share:3.0f}" for share in shares.tolist())


print("place in the row      ", "  ".join(f"{place:3}" for place in range(1, 13)))
print("the model          (%)", percent_right(answers))
print("without reading    (%)", percent_right(most_frequent))

# %% [markdown]
# And the tools of the repository work on it, because they ask for no more than that. Which expert
# serves which digit? (Look at the 9: what came before does not matter there. Does it have experts
# of its own, in one of the layers?)

# %%
special = specialisation(counting, largest)
title = "Which expert takes which digit"
figures.routing_figure(special.shares, special.kinds, router_names(counting), title)

# %% [markdown]
# ## Exercises
#
# **1. One neighbour's pathway.** Write the plainest surrogate of all: impose the pathway of the
# single nearest reference, without any step. Which method of the paper, at which setting, must it
# agree with?
#
# <details><summary>Solution</summary>
#
# ```python
# def copied(core, loss, near, config):
#     nearest = near.index[:, 0]  # (n,)
#     return core.rescale(near.pathways[nearest])
#
#
# copy = remix(model, prompts, references, method=copied, k=1)
# mixed = remix(model, prompts, references, method="kernel_regression", k=1)
# print("base", share_right(copy.logits_before), "copied", share_right(copy.logits))
# same = (mixed.pathway - copy.pathway).abs().amax((1, 2)) < 1e-5
# share = same.float().mean()
# print(f"kernel regression with k = 1 chooses just this pathway for {share:.0%} of the prompts")
# ```
#
# Kernel regression with one neighbour mixes the own pathway with that one, so that wherever it goes
# all the way, it must be this pathway to the last digit: for 43% of the prompts, when we ran it.
# Going all the way for all prompts did not help (59.5% right, 64.0% as the model is): the
# neighbour's pathway carries its operands, too.
#
# </details>
#
# **2. A rule that explores.** Let the last of the k experts be drawn at random, in proportion to
# the probabilities of those that are left. Which property of (a) breaks, and what would you do
# about it?
#
# <details><summary>Solution</summary>
#
# ```python
# class Explore(Router):
#     def select(self, probs):
#         weights, experts = probs.topk(self.top_k)
#         if self.training:
#             best = experts[:, :-1]
#             remaining = probs.detach().scatter(1, best, 0.0)  # without the k - 1 best
#             drawn = torch.multinomial(remaining, 1)
#             experts = torch.cat([best, drawn], 1)
#             weights = probs.gather(1, experts)
#         return weights, experts
#
#
# config = MoEConfig(vocab_size=50, n_experts=6, top_k=3)
# mine, tokens = MoETransformer(config, router=Explore), torch.randint(50, (4, 10))
# for training in (True, False):
#     mine.train(training)
#     print(training, torch.equal(mine(tokens).logits, mine(tokens).logits))
# ```
#
# Evaluation must be deterministic, and no prediction may depend on anything but earlier tokens;
# where numbers are drawn, two passes differ, and the test for causality fails with them. With
# `self.training` the draw is confined to training: `True False`, `False True` is printed. The
# gradient still reaches the router, through the weight of the expert that was drawn.
#
# </details>
#
# ## Where to go next
#
# You have seen all of it. `tests/` states a property a test, and is the best place to learn what
# must not break; the README says what was measured, over many seeds. Then change something that
# nobody has tried.
