# %% [markdown]
# # 5. Load OLMoE and look inside, then change it yourself
#
# What you will learn:
#
# - how a checkpoint of the hub becomes a model that you can read, and how to see which expert fires for which token;
# - how to impose another pathway on one token, the hook that all of C3PO hangs on;
# - where your own ten lines go: a routing rule, a surrogate for re-mixing, a task, each with a test that tells whether
#   it is right.
#
# Half an hour to read, less than a minute to run. It runs offline, on a tiny random checkpoint with OLMoE's names and
# OLMoE's arithmetic; one changed line opens the real one. **Random weights show the mechanism and nothing else**: no
# expert in the first half of this notebook has learnt anything.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import hf
from cartesian import ROUTERS, CartesianConfig, CartesianTransformer, UsedExperts
from data import SkillsTask
from lab import choice, cli, diagrams, plots
from lab.benchmarks import Item
from lab.robust import chosen
from lab.tasks import evaluate, places, specialisation
from moe import MoEConfig, MoETransformer, Remix, Router
from remix import (
    Prefixes,
    ReferenceSet,
    RemixConfig,
    Tail,
    core_experts,
    critical_layers,
    descend,
    find,
    frozen,
    nearby,
    padded,
    remix,
)
from train_toy import TrainConfig, update

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False, linewidth=110)
diagrams.stacked_experts()

# %% [markdown]
# ## A checkpoint is a folder
#
# OLMoE-1B-7B ([arXiv 2409.02060](https://arxiv.org/abs/2409.02060)) is a decoder of 16 layers, each with 64 experts of
# which a token visits 8. On the hub it is a folder: `config.json`, the weights as safetensors, `tokenizer.json`. Every
# expert has three matrices of its own there. In memory, ours stand in two stacked tensors a layer, so that one grouped
# product serves all experts (notebook 1).
#
# We make a tiny one: a tokenizer learnt from four lines of text, which knows no letter that is not in them; and random
# weights, larger than fresh ones, so that routers are decided and experts differ.

# %%
TEXT = """The bank of the river is steep. The bank lends money to the farmer by the river.
A farmer sells milk and bread. The river carries water to the sea, and the sea carries ships.
Question: What carries ships?\nA. the sea\nB. the bread\nC. the bank\nD. the milk\nAnswer: A
Question: Who sells milk?\nA. the river\nB. the farmer\nC. the sea\nD. the ship\nAnswer: B Answer: C Answer: D"""
temporary = tempfile.TemporaryDirectory()  # goes when the notebook ends
folder = Path(temporary.name)
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
bpe.train_from_iterator([TEXT], trainers.BpeTrainer(min_frequency=1, vocab_size=200, show_progress=False))

# %%
torch.manual_seed(0)
made = MoETransformer(MoEConfig(vocab_size=bpe.get_vocab_size(), context=128, n_experts=16, top_k=4, d_expert=32))
for name, weight in made.named_parameters():
    if "ffns" in name or "unembedding" in name:  # routers, experts, output
        torch.nn.init.normal_(weight, std=0.3)
hf.save(made.bfloat16(), folder / "tiny")
bpe.save(str(folder / "tiny" / "tokenizer.json"))
print(*sorted(path.name for path in (folder / "tiny").iterdir()))

# %% [markdown]
# From here on, nothing knows that it is a tiny one. For the real OLMoE change the first line to
# `PATH = "allenai/OLMoE-1B-7B-0125-Instruct"`: it takes a download, and 13.8 GB of memory in bfloat16.
# (`python hf.py PATH_OR_REPO` tells beforehand whether it fits.) Files are not trusted: all is checked before memory is
# taken.

# %%
PATH = folder / "tiny"
model, tokenizer = hf.load(PATH, dtype="bfloat16")
print(model.config)
print(f"{model.n_params():,} parameters, {model.n_params(activated=True):,} activated for a token")

# %% [markdown]
# ## Names on disk, names in memory
#
# `hf.NAMES` is the whole translation: our names, and the hub's. Where one of ours has two of theirs, they share its
# rows.

# %%
stored = hf.read_entries(hf.fetch(PATH, [*hf.ABOUT, "model*.safetensors"]))
memory, rows = dict(model.named_parameters()), []
for ours, theirs in hf.NAMES.items():
    place = ours if ours in memory else f"blocks.0.{ours}"
    if place in memory:
        disk = [("" if place == ours else "model.layers.0.") + name.format(e=0) + ".weight" for name in theirs]
        shapes = [tuple(stored[name].get_shape()) for name in disk]
        rows += [(place, tuple(memory[place].shape), disk[0], shapes[0])]
        rows += [("", "", *more) for more in zip(disk[1:], shapes[1:], strict=True)]
print(cli.table(rows, ["in memory", "shape", "on disk", "shape"], left=4))
print(f"\n{len(memory)} tensors in memory, {len(stored)} on disk")

# %% [markdown]
# `hf.pieces` pairs them all: a name of theirs, and the view of our weights that it fills. Is expert 3 what the file
# says?

# %%
parts, name = dict(hf.pieces(model, "olmoe")), "model.layers.0.mlp.experts.3.up_proj.weight"
print("all used, no other:", parts.keys() == stored.keys())
half = memory["blocks.0.ffns.0.experts.gate_up"].shape[1] // 2
print("same numbers:", torch.equal(stored[name][:], memory["blocks.0.ffns.0.experts.gate_up"][3, half:]))

# %% [markdown]
# ## What the routers say about a prompt
#
# A forward pass returns a `Routing` for every router, bottom to top: the softmax over all experts, the chosen ones,
# their weights. OLMoE does not divide the weights by their sum, so that they add up to less than 1.

# %%
prompt = "The farmer sells milk by the river, and the river carries the farmer"
ids = tokenizer.encode(prompt).ids
words, tokens = [tokenizer.decode([i]) for i in ids], torch.tensor([ids])  # (1, T)
with torch.no_grad():
    out = model(tokens)
print("logits", tuple(out.logits.shape), "  routers", len(out.routing), "  probs", tuple(out.routing[0].probs.shape))
rows = []
for place, routing in zip(places(model), out.routing, strict=True):
    best = zip(routing.experts[-1].tolist(), routing.weights[-1].tolist(), strict=True)
    rows.append((place, "  ".join(f"{e}: {w:.2f}" for e, w in best), f"{float(routing.weights[-1].sum()):.2f}"))
print(cli.table(rows, [f"last token, {words[-1]!r}", "experts: weights", "sum"], left=2))

# %%
L = len(out.routing)
fires = {f"layer {i}": (r.probs * chosen(*r[:3])).numpy() for i, r in enumerate(out.routing) if i in (0, L // 2, L - 1)}
plots.pathway_figure(fires, [repr(word) for word in words], "Which expert fires for which token (palest: not visited)")

# %% [markdown]
# In the first layer, equal tokens (`' the'`, `' river'`) look alike, as little but the token itself has been mixed in
# yet. With the real weights this is where you would look for specialists; section 5 of the OLMoE paper does, by domain
# and by vocabulary. Here you see dice, thrown once.
#
# ## Another pathway for the last token
#
# C3PO ([arXiv 2504.07964](https://arxiv.org/abs/2504.07964), section 3; notebook 4) calls the softmax rows of all
# routers at the last prompt token the *pathway*, and imposes other rows there. The hook is `Remix(rows)`: row l
# replaces the softmax of router l, before top-k. We take the rows of another prompt. The figure has one row a layer.

# %%
with torch.no_grad():
    other = model(torch.tensor([tokenizer.encode("The bank lends money to the").ids])).routing
own = {i: routing.probs[-1:] for i, routing in enumerate(out.routing)}  # router -> (1, E)
rows = {i: routing.probs[-1:] for i, routing in enumerate(other)}
both = {"its own": torch.cat([*own.values()]).numpy(), "another prompt's": torch.cat([*rows.values()]).numpy()}
plots.pathway_figure(both, places(model), "Pathways at the last token")

# %%
with torch.no_grad():
    same, after = model(tokens, remix=Remix(own)), model(tokens, remix=Remix(rows))
print("its own, imposed:     largest change of a logit", float((same.logits - out.logits).abs().max()))
moved = (after.logits - out.logits).abs().amax(-1)[0]  # (T,)
print("another's: the change at earlier tokens", float(moved[:-1].max()), f"  at the last one {float(moved[-1]):.2f}")
for name, logits in (("before", out.logits), ("after", after.logits)):
    top = logits[0, -1].softmax(-1).topk(5)
    said = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    print(f"{name:7}", "  ".join(f"{tokenizer.decode([i])!r} {p:.1%}" for i, p in said))

# %% [markdown]
# Imposing what the model says anyway changes nothing; another pathway changes the last token and no earlier one, as
# attention only looks back. Which experts fire has changed, too, not just how much they count.
#
# ## Let it talk, ask it a question
#
# Greedy generation keeps the keys and values of earlier tokens. Random weights babble; and a multiple-choice question
# is scored by the log-probabilities of its letters, all of them from one pass (`lab.choice`).

# %%
print(prompt, "|", tokenizer.decode(model.generate(tokens, 16)[0].tolist()))

# %%
item = Item("Who sells milk?", ["the river", "the farmer", "the sea", "the ship"], answer=1)
print(choice.pairs(item, "letters")[item.answer][0])
nats = choice.log_likelihoods(model, choice.rows(item, tokenizer, "letters"))[0]
print("log-probabilities of ' A' to ' D':", *(f"{value:.2f}" for value in nats))

# %% [markdown]
# On the real model, and a real benchmark, re-mixed as in the paper:
#
#     python eval.py choice --model allenai/OLMoE-1B-7B-0125-Instruct --task arc_challenge \
#         --references openbookqa,sciq --method ngd
#
# ## Now change it yourself
#
# Three places, ten lines each. What matters as much as the lines is the test beside them: something that must come out,
# whatever the weights are.

# %%
diagrams.places_to_change()

# %% [markdown]
# ### (a) A routing rule
#
# A rule is a `Router` with another `select`: probabilities (N, E) in, weights and experts (N, K) out. Ours: the top k,
# *without those less than half as probable as the best*. A token whose router is sure visits one expert, another one up
# to k. A slot that is not used names the first choice again, at weight 0, and `UsedExperts` never computes it; with an
# entry in `ROUTERS` the configuration knows the rule by name.


# %%
class AtLeast(Router):
    """Top-k, without the experts that are less than half as probable as the best."""

    def select(self, probs):
        weights, experts = probs.topk(self.top_k)  # (N, K) twice
        kept = weights >= 0.5 * weights[:, :1]
        weights, experts = weights * kept, torch.where(kept, experts, experts[:, :1])
        return weights / weights.sum(-1, keepdim=True) if self.norm_topk else weights, experts


ROUTERS["at_least"] = AtLeast, UsedExperts

# %% [markdown]
# **The tests.** Four properties of `tests/test_moe.py`, each in a few lines: the sparse computation equals one that
# sends every token through every expert; no prediction depends on later tokens; nor on other rows of the batch; the
# loss trains every router. (With `norm_topk`, a token that visits one expert would teach its router nothing, as its
# weight is always 1.) A rule that compares tokens with each other (an expert takes its best ten tokens) would fail two
# of them.

# %%
torch.manual_seed(0)
config = CartesianConfig(vocab_size=50, n_experts=6, top_k=3, layer="moe", router="at_least")
mine, tokens = CartesianTransformer(config).double(), torch.randint(50, (4, 10))
for router in mine.routers():
    torch.nn.init.normal_(router.weight, std=0.3)
layer, x = mine.blocks[0].ffns[0], torch.randn(9, config.d_model).double()
with torch.no_grad():
    routing = layer.router(x)
    found = layer.experts(x, routing.weights, routing.experts)
    gate, up = torch.einsum("nd,efd->nef", x, layer.experts.gate_up).chunk(2, dim=-1)
every = torch.zeros(9, 6).double().scatter_add(1, routing.experts, routing.weights)  # (N, E) 0 where not chosen
dense = torch.einsum("ne,nef,edf->nd", every, F.silu(gate) * up, layer.experts.down.detach())
print("sparse equals dense:  ", float((found - dense).abs().max()))

# %%
later = torch.cat([tokens[:, :5], torch.randint(50, (4, 5))], 1)
with torch.no_grad():
    logits, changed = mine(tokens).logits, mine(later).logits
    alone = torch.cat([mine(row[None]).logits for row in tokens])
print("causal:               ", float((changed - logits)[:, :5].abs().max()))
print("rows are independent: ", float((alone - logits).abs().max()))
out = mine(tokens, torch.randint(50, tokens.shape))
out.loss.backward()
print("the router's gradient:", min(float(router.weight.grad.abs().max()) for router in mine.routers()))
used = torch.stack([(routing.weights > 0).sum(1) for routing in out.routing]).double()
print("experts that a token visits: 1 to 3, here in the mean", f"{float(used.mean()):.2f}")

# %% [markdown]
# ### (b) A surrogate for re-mixing
#
# A surrogate moves a pathway w without knowing the answer. NGD goes where the *neighbours* are answered best (paper,
# section 3.3). But neighbours of an easy prompt may unsettle it. So let us pull w back to where it came from:
#
# $$L(w) = \underbrace{\textstyle\sum_i K(x_i, x)\, \mathrm{CE}(f(x_i; w), y_i) / \sum_i K}_{\text{the loss of NGD}}
# \;+\; \lambda \, \mathrm{KL}(\text{own} \,\|\, w)$$
#
# It needs a model that knows something: a small one, trained on the skills task in seconds, and all of its references.

# %%
task, train = SkillsTask(0), TrainConfig(steps=300, batch=32, lr=4e-3, warmup=30)
torch.manual_seed(0)
model = MoETransformer(MoEConfig(vocab_size=task.vocab_size, n_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), train.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
for step in range(train.steps):
    update(model, model, optimizer, task, train, step)
known, asked = task.prompts("reference"), task.prompts("dev")
references = ReferenceSet.build(model, known.tokens, known.labels)
print(f"{len(known.labels):,} references, {int(references.correct.sum()):,} answered right")


# %%
def pulled(strength):
    """NGD with a pull towards the pathway that it starts from."""

    def surrogate(core, loss, config):
        own = core.start.clamp(min=1e-20)

        def total(z):  # (n, R, E) -> (n,)
            w = core.softmax(z)
            return loss(w) + strength * (own * (own / w.clamp(min=1e-20)).log()).sum((1, 2))

        return core.softmax(descend(total, own.log(), config)[0])

    return surrogate


# %% [markdown]
# What calls it is made of the public pieces of remix.py: `Tail` is the part of the model that a pathway reaches, `cut`
# keeps what no pathway changes, `find` looks up the neighbours, `nearby` makes their loss a function of w.


# %%
def remixed(surrogate, prompts, config):
    """The pathways (n, R, E) that a surrogate chooses for prompts, and the answers along them (n, V)."""
    with frozen(model), torch.no_grad():
        tail, (tokens, lengths) = Tail(model, critical_layers(model, config.layers)), padded(prompts, task.vocab_size)
        near = find(tail, references, tokens, lengths, config)
        prefix, every = tail.cut(tokens, lengths), torch.arange(len(tokens))
        core = core_experts(tail.base(prefix)[0], config.core)
        loss = nearby(tail, Prefixes(tail, references, 1e9), near, every, config)
        w = surrogate(core, loss, config)
        return w, tail(prefix, w)


# %% [markdown]
# **The test: known identities.** Without a pull it must be NGD, and with an endless one the model as it is; in between,
# w must be a distribution in every row, and the stronger the pull, the nearer it stays.

# %%
config, prompts, labels = RemixConfig(), asked.tokens[::3], asked.labels[::3]
ngd, rows = remix(model, prompts, references, config), []
for name, strength in (("0", 0.0), ("1/10", 0.1), ("1", 1.0), ("endless", 1e9)):
    w, logits = remixed(pulled(strength), prompts, config)
    gaps = [float((w - known).abs().max()) for known in (ngd.pathway, ngd.pathway_before)]
    moved = float((w - ngd.pathway_before).abs().sum(-1).mean() / 2)
    right = float((logits.argmax(1) == labels).float().mean())
    rows.append((name, *(f"{gap:.5f}" for gap in gaps), f"{moved:.3f}", f"{float((w.sum(-1) - 1).abs().max()):.0e}"))
    rows[-1] += (f"{right:.1%}",)
heads = ["pull", "gap to NGD", "gap to base", "mass moved", "rows' sum - 1", "right (dev)"]
print(cli.table(rows, heads))
for name, logits in (("base", ngd.logits_before), ("NGD", ngd.logits)):
    print(f"{name}: {float((logits.argmax(1) == labels).float().mean()):.1%} right")

# %% [markdown]
# The two ends are what they must be. The accuracies are those of 222 dev prompts of one toy: they show that it runs,
# and nothing about whether a pull helps. To find out, tune its strength on dev of some seeds and look at test of
# others, beside the controls: `lab/baselines.py` has the table `METHODS`, in which your surrogate would be one more
# row.
#
# ### (c) A task
#
# What `train_toy.update` and `lab.tasks` ask of a task is a class with `vocab_size` and `batch(step, n)`, tokens and
# targets; for scores also `held_out`, and for the figure names of its tokens. Ours: after every digit, say the largest
# one so far. And the model routes by the rule of (a).


# %%
class RunningMaximum:
    """Twelve random digits; after each, the largest so far. Batches are all different: nothing to learn by heart."""

    vocab_size, token_bytes = 10, torch.ones(10)  # the second for bits per byte: call a token a byte

    def batch(self, step, n):
        tokens = torch.randint(10, (n, 12), generator=torch.Generator().manual_seed(step))  # (n, T)
        return tokens, tokens.cummax(1).values

    def held_out(self, split, most=256):
        return self.batch({"dev": 10**6, "test": 10**6 + 1}[split], most or 1000)  # steps that training never takes

    def show(self, token):
        return str(token)


# %%
largest, train = RunningMaximum(), TrainConfig(steps=150, batch=32, lr=4e-3, warmup=30)
torch.manual_seed(0)
config = CartesianConfig(vocab_size=10, n_layers=2, n_experts=8, d_expert=32, layer="moe", router="at_least")
counting = CartesianTransformer(config)
optimizer = torch.optim.AdamW(counting.parameters(), train.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
for step in range(train.steps):
    update(counting, counting, optimizer, largest, train, step)

# %% [markdown]
# **The test: better than what knows less.** Chance is not one number: "always 9" does well, late in a row. So we
# compare with the most frequent answer at each place, the best that one can do without reading.

# %%
tokens, targets = largest.held_out("test")
with torch.no_grad():
    out = counting(tokens)
right, blind = (guess == targets for guess in (out.logits.argmax(-1), targets.mode(0).values))
print("place in the row     ", *(f"{place:4}" for place in range(1, 13)))
print("the model          (%)", *(f"{100 * share:4.0f}" for share in right.float().mean(0).tolist()))
print("without reading    (%)", *(f"{100 * share:4.0f}" for share in blind.float().mean(0).tolist()))
print({name: round(value, 3) for name, value in evaluate(counting, largest, "test").items()})
used = torch.cat([(routing.weights > 0).sum(1) for routing in out.routing]).float()
print(f"experts that a token visits, in the mean: {float(used.mean()):.2f} of at most {config.top_k}")

# %% [markdown]
# And the tools of the repository work on it, because they ask for no more than that. Which expert serves which digit?
# (Look at the 9: what came before does not matter there. Does it have experts of its own, in one of the layers?)

# %%
found = specialisation(counting, largest, n_kinds=10)
plots.routing_figure(found.shares, found.load, found.kinds, places(counting), "Which expert takes which digit")

# %% [markdown]
# ## Exercises
#
# **1. One neighbour's pathway.** Write the plainest surrogate of all: impose the pathway of the single nearest
# reference, without any step. Which method of the paper, at which setting, must it agree with?
#
# <details><summary>Solution</summary>
#
# ```python
# tail = Tail(model, critical_layers(model, "all"))
# with frozen(model), torch.no_grad():
#     tokens, lengths = padded(prompts, task.vocab_size)
#     near = find(tail, references, tokens, lengths, RemixConfig(k=1))
#     prefix = tail.cut(tokens, lengths)
#     own, before = tail.base(prefix)
#     w = core_experts(own).rescale(tail.pathways(references)[near.index[:, 0]])
#     logits = tail(prefix, w)
# print(*((answer.argmax(1) == labels).float().mean().item() for answer in (before, logits)))
#
# kr = remix(model, prompts, references, method="kernel_regression", k=1)
# same = (kr.pathway - w).abs().amax((1, 2)) < 1e-5
# print(f"kernel regression with k = 1 chooses just this pathway for {same.float().mean():.0%} of the prompts")
# ```
#
# Kernel regression with one neighbour mixes the own pathway with that one, so that wherever it goes all the way, it
# must be this pathway to the last digit: for 43% of the prompts, when we ran it. Going all the way for all prompts did
# not help (60.8% right, 64.4% as the model is): the neighbour's pathway carries its operands, too.
#
# </details>
#
# **2. A rule that explores.** Let the last of the k experts be drawn at random, in proportion to the probabilities of
# those that are left. Which property of (a) breaks, and what would you do about it?
#
# <details><summary>Solution</summary>
#
# ```python
# class Explore(Router):
#     def select(self, probs):
#         weights, experts = probs.topk(self.top_k)
#         if self.training:
#             left = probs.detach().scatter(1, experts[:, :-1], 0.0)  # without the k - 1 best
#             experts = torch.cat([experts[:, :-1], torch.multinomial(left, 1)], 1)
#             weights = probs.gather(1, experts)
#         return weights / weights.sum(-1, keepdim=True) if self.norm_topk else weights, experts
#
#
# ROUTERS["explore"] = Explore, ROUTERS["softmax"][1]
# config = CartesianConfig(vocab_size=50, n_experts=6, top_k=3, layer="moe", router="explore")
# mine, tokens = CartesianTransformer(config), torch.randint(50, (4, 10))
# for training in (True, False):
#     mine.train(training)
#     print(training, torch.equal(mine(tokens).logits, mine(tokens).logits))
# ```
#
# Evaluation must be deterministic, and no prediction may depend on anything but earlier tokens; where numbers are
# drawn, two passes differ, and the test for causality fails with them. With `self.training` the draw is confined to
# training: `True False`, `False True` is printed. The gradient still reaches the router, through the weight of the
# expert that was drawn.
#
# </details>
#
# ## Where to go next
#
# You have seen all of it. `tests/` states a property a test, and is the best place to learn what must not break; the
# README says what was measured, over many seeds. Then change something that nobody has tried.
