"""What a mixture-of-experts transformer must be, one property a test: read the docstrings.

The naive forms stand in by_hand.py. Elsewhere it is tested that the model equals transformers'
OLMoE (test_hf.py), and that a pathway of the last token needs that token alone (test_remix.py).
"""

import math
from unittest import mock

import by_hand
import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    VARIANTS,
    E,
    V,
    close,
    full,
    learning_routers,
    reached_by_one_token,
    refused,
    tiny,
)

from moe import (
    IGNORE,
    Cache,
    Experts,
    Imposed,
    MoEConfig,
    MoETransformer,
    Router,
    Routing,
    router_losses,
)

LENGTHS = torch.tensor([1, 7, 5])  # of the prompts in a padded batch
ROWS = torch.arange(3)
LAST = LENGTHS - 1
VALID = torch.arange(7) < LENGTHS[:, None]


def variants(*taught):
    """A test for each variant; only those that are taught belong to the short run."""
    others = full(*(name for name in VARIANTS if name not in taught))
    return pytest.mark.parametrize("variant", [*taught, *others])


modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def tokens():
    """Prompts (3, 7), of which VALID are padded on the right with random tokens."""
    return torch.randint(V, (3, 7))


def pathway(model):
    """Random rows (3, E) for every router."""
    rows = torch.randn(len(model.routers()), 3, E, dtype=torch.float64).softmax(-1)
    return dict(enumerate(rows))


# ---- the MoE layer

LAYERS = {  # tokens, experts of each, numbers, width of an expert, whether one kernel does it all
    "one expert": (9, 1, torch.float32, 4, True),
    "three experts": (9, 3, torch.float32, 4, True),
    "all experts": (9, E, torch.float32, 4, True),
    "odd width": (9, 3, torch.float32, 5, False),
    "float64": (9, 3, torch.float64, 4, False),
    "one token": (1, 3, torch.float32, 4, False),
    "few tokens": (3, 1, torch.float64, 4, False),
}


@pytest.mark.parametrize("layer", [*list(LAYERS)[:3], *full(*list(LAYERS)[3:])])
def test_experts_equal_a_loop(layer):
    """The k experts of n tokens, few or many, in any order of work: same outputs and gradients."""
    n, k, dtype, width, fused = LAYERS[layer]
    experts = Experts(MoEConfig(d_model=8, d_expert=width, n_experts=E, top_k=k)).to(dtype)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.5)

    # Up to k = 3 the first expert, the last one and one in between get no token.
    scores = torch.rand(n, E)
    scores[:, [0, 2, 5]] -= 1
    chosen = scores.topk(k).indices
    x = torch.randn(n, 8, dtype=dtype, requires_grad=True)
    weights = torch.rand(n, k, dtype=dtype, requires_grad=True)
    with mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as kernel:
        y = experts(x, weights, chosen)
    assert kernel.call_count == (2 if fused else 0)

    expected = []
    for token, *routes in zip(x, weights, chosen, strict=True):
        expected.append(by_hand.visit(experts, token, zip(*routes, strict=True)))
    expected = torch.stack(expected)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    close(y, expected, tolerance)
    with torch.no_grad():
        assert torch.equal(experts(x, weights, chosen), y)
    inputs, upstream = (x, weights, *experts.parameters()), torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, upstream)
    close(gradients, torch.autograd.grad(expected, inputs, upstream), tolerance)


@pytest.mark.parametrize(
    ("router", "scores"),
    [(Router, by_hand.softmax), (by_hand.SigmoidRouter, by_hand.sigmoid)],
    ids=["softmax", "sigmoid"],
)
def test_layer_equals_a_loop(router, scores):
    """A MoE layer, with our router, or with a subclass of it that scores experts by a sigmoid."""
    for variant in ("default", "norm-topk", "shared", "top-1", "top-all"):
        layer = tiny(variant, router).blocks[2].ffns[0]
        x = torch.randn(1, 9, 16, dtype=torch.float64)
        expected = [by_hand.moe_layer(layer, z, scores) for z in x[0]]
        close(layer(x)[0], torch.stack(expected))


def test_the_loss_trains_the_router():
    """It learns through its weights; not if there is one, divided by itself, and so always 1."""
    assert learning_routers(tiny()) == learning_routers(tiny(norm_topk=True)) == 3
    assert learning_routers(tiny(top_k=1)) == 3
    assert learning_routers(tiny(top_k=1, norm_topk=True)) == 0


def test_balance_and_z_loss():
    """Balance is 1 when all experts share the work, and E / k when k of them do all of it.

    The z loss of logits of which n are 0, and all others minus infinity, is (ln n)^2.
    """
    n = 2 * E
    share = torch.full((n,), 1 / n)
    for k in (1, 2, E):
        in_turn = (torch.arange(n)[:, None] + torch.arange(k)) % E  # (n, k)
        same = torch.arange(k).expand(n, k)
        for experts, balance, n_likely in ((in_turn, 1.0, E), (same, E / k, k)):
            logits = torch.zeros(n, E)
            logits[:, n_likely:] = -1e9
            routing = Routing(logits.softmax(-1), torch.rand(n, k), experts, logits)
            expected = torch.tensor([balance, math.log(n_likely) ** 2])
            close(torch.stack(router_losses(routing, share)), expected, 1e-5)


# ---- what a prediction depends on


@modes
def test_causal(training, model):
    """A prediction never depends on later tokens; it does depend on its own one."""
    tokens = torch.randint(V, (2, 8))
    logits = model.train(training)(tokens).logits
    for t in range(1, 8):
        changed = tokens.clone()
        changed[:, t:] = (tokens[:, t:] + 1) % V
        moved = (model(changed).logits - logits).abs()
        assert moved[:, :t].max() < 1e-10
        assert moved[:, t].max() > 1e-3


@modes
def test_rows_are_independent(training, model):
    """A row is predicted alike in any company: no expert is ever full, no token is dropped."""
    model.train(training)
    tokens = torch.randint(V, (5, 8))
    alone = torch.cat([model(row[None]).logits for row in tokens])
    close(model(tokens).logits, alone)
    crowd = tokens[:1].repeat(5, 1)  # all want the same experts
    close(model(crowd).logits, alone[:1].expand(5, -1, -1))


def test_padding_changes_nothing(model, tokens):
    """Valid tokens do not see it, and the losses of the routers do not count it."""
    logits = model(tokens, valid=VALID).logits
    for i, n in enumerate(LENGTHS):
        close(logits[i, :n], model(tokens[i : i + 1, :n]).logits[0])
    whole = model(tokens)
    valid = (torch.arange(14) < 7).expand(3, -1)
    padded = model(torch.cat([tokens, tokens], 1), valid=valid)
    close((padded.balance_loss, padded.z_loss), (whole.balance_loss, whole.z_loss))


@modes
def test_evaluation_is_deterministic(training, tokens):
    """Dropout is random in training only; generating evaluates, and leaves no trace."""
    model = tiny(dropout=0.5).eval()
    logits, text = model(tokens).logits, model.generate(tokens, 4)
    model.train(training)
    assert torch.equal(model.generate(tokens, 4), text)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(model(tokens).logits, model(tokens).logits) != training
    assert torch.equal(model.eval()(tokens).logits, logits)


# ---- the cache, and generating


@variants("default", "grouped-query")
def test_cached_decoding_equals_full_forward(variant, tokens):
    """With a cache only new tokens are computed, one or several at a time.

    Tokens that look into it without joining it leave it as it was.
    """
    model, cache = tiny(variant), Cache()
    new = torch.randint(V, (3, 4))
    logits = [model(tokens, valid=VALID, cache=cache).logits[ROWS, LAST][:, None]]
    for piece in new.split([1, 1, 2], 1):
        looks = [model.run_blocks(model.embed(piece), cache=cache, write=False) for _ in range(2)]
        logits.append(model(piece, cache=cache).logits)
        close(looks, [looks[0], looks[0]], 0)
        close(model.head(looks[0]), logits[-1])
    logits = torch.cat(logits, 1)
    for i, n in enumerate(LENGTHS):
        whole = torch.cat([tokens[i, :n], new[i]])
        close(logits[i], model(whole[None]).logits[0, n - 1 :])


@pytest.mark.parametrize("learning", [True, False], ids=["gradients", "no gradients"])
def test_a_cache_goes_on_from_anywhere(learning, model):
    """From a copy, an earlier state, tensors put in: what it grows by disturbs no other one."""
    tokens = torch.randint(V, (2, 14))
    other = (tokens + 1) % V
    cache = Cache()
    with torch.set_grad_enabled(learning), mock.patch("moe.ROOM", 3):
        model(tokens[:, :3], cache=cache)
        model(tokens[:, 3:5], cache=cache)
        copy = Cache(dict(cache.keys), dict(cache.values), cache.valid)
        earlier = Cache(dict(cache.keys), dict(cache.values), cache.valid)
        model(tokens[:, 5:6], cache=cache)
        model(other[:, 5:6], cache=copy)
        for t in range(6, 14):  # more than there is room for
            logits = model(tokens[:, t : t + 1], cache=cache).logits
        close(logits, model(tokens).logits[:, -1:])
        whole = torch.cat([tokens[:, :5], other[:, 5:7]], 1)
        close(model(other[:, 6:7], cache=copy).logits, model(whole).logits[:, -1:])

        # Back to an earlier state; and to the same one with other values.
        for factor in (1, 0):
            cache.keys, cache.valid = dict(earlier.keys), earlier.valid
            cache.values = {layer: factor * value for layer, value in earlier.values.items()}
            mixed = Cache(dict(cache.keys), dict(cache.values), cache.valid)
            x = model.embed(other[:, 5:6])
            close(model.run_blocks(x, cache=cache), model.run_blocks(x, cache=mixed, write=False))


@variants("default", "tied")
def test_generate_equals_slow_loop(variant, tokens):
    """Greedy decoding appends the most probable token again and again; `show` sees them come.

    The context can be used to its last token.
    """
    model, shown = tiny(variant), []
    new = model.generate(tokens, 9, valid=VALID, show=shown.append)
    assert torch.equal(torch.stack(shown, 1), new)
    assert new.unique().numel() > 1
    for i, n in enumerate(LENGTHS):
        row = tokens[i, :n]
        for _ in range(9):
            best = model(row[None]).logits[0, -1].argmax()
            row = torch.cat([row, best[None]])
        assert torch.equal(new[i], row[n:])
    assert row.shape == (14,) and model(torch.randint(V, (1, 16))).logits.shape == (1, 16, V)


def test_generate_stops(model, tokens):
    """A row that ended repeats the stop token; when all have ended, generating does."""
    free = model.generate(tokens, 8, valid=VALID)
    stop = int(free[1, 2])
    ended = (free == stop).cumsum(1) > 0  # (B, n) true from a row's first stop token on
    n = int((~ended.all(0)).sum()) + 1  # up to the first column in which all have ended
    expected = free.masked_fill(ended, stop)[:, :n]
    assert torch.equal(model.generate(tokens, 8, stop=stop, valid=VALID), expected)
    alone = model.generate(tokens[1:2], 8, stop=stop)
    assert alone.shape[1] <= 3 and alone[0, -1] == stop


def test_sampling(model, tokens):
    """Sampling is as random as its generator; at a temperature near zero it is greedy."""

    def sample(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens, 9, temperature, valid=VALID, generator=generator)

    assert torch.equal(sample(1, 1.0), sample(1, 1.0))
    assert not torch.equal(sample(1, 1.0), sample(2, 1.0))
    assert torch.equal(sample(1, 1e-4), model.generate(tokens, 9, valid=VALID))


# ---- imposed pathways, learnt prefixes


@variants("default", "norm-topk")
def test_imposing_a_pathway(variant, tokens):
    """The model's own pathway changes nothing; another one changes no token before its own.

    It reaches later tokens through attention.
    """
    model = tiny(variant)
    plain = model(tokens, valid=VALID)
    other = pathway(model)
    middle = LAST.clamp(max=3)
    for place, given in ((LAST, False), (LAST, True), (middle, True)):
        steps = torch.arange(7) - place[:, None]  # (3, 7) from the token that is imposed on
        at = steps == 0
        own = [routing.probs.unflatten(0, tokens.shape)[at] for routing in plain.routing]
        same, changed = (
            model(tokens, valid=VALID, imposed=Imposed(rows, at if given else None))
            for rows in (dict(enumerate(own)), other)
        )
        close(same.logits[VALID], plain.logits[VALID])
        close(changed.logits[steps < 0], plain.logits[steps < 0])
        moved = (changed.logits - plain.logits).abs().amax(-1)
        assert (moved[at] > 1e-3).all()
        assert (moved[VALID & (steps > 0)] > 1e-6).all()

        # What was imposed is what is reported.
        for i, routing in enumerate(changed.routing):
            close(routing.probs[at.flatten()], other[i])
        elsewhere = ~at.flatten()
        close(changed.routing[0].probs[elsewhere], plain.routing[0].probs[elsewhere])


def test_prefix_tuning(tokens):
    """Prefix tuning is a cache of learnt keys and values: gradients reach every layer, and help."""
    model = tiny("grouped-query")

    def loss(learnt):
        """learnt (2, L, G, S, C): keys and values of the layers, the same for all prompts."""
        keys, values = learnt[:, :, None].expand(-1, -1, 3, -1, -1, -1)
        seen = torch.ones(3, 4, dtype=torch.bool)
        cache = Cache(dict(enumerate(keys)), dict(enumerate(values)), seen)
        x = model.run_blocks(model.embed(tokens), VALID, cache)
        return F.cross_entropy(model.head(x[ROWS, LAST]), ROWS)

    learnt = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(learnt), learnt)
    assert (gradient.abs().amax(-1) > 1e-9).all()
    assert loss(learnt - 0.1 * gradient) < loss(learnt) - 1e-3


def test_soft_prompt(model, tokens):
    """A soft prompt is embeddings put in front; those of tokens do what the tokens would."""
    valid = F.pad(VALID, (2, 0), value=True)
    hard = torch.randint(V, (3, 2))
    imposed = Imposed(pathway(model))
    soft = model.embed(hard).detach().requires_grad_()
    x = torch.cat([soft, model.embed(tokens)], 1)
    logits = model.head(model.run_blocks(x, valid, imposed=imposed))
    close(logits, model(torch.cat([hard, tokens], 1), valid=valid, imposed=imposed).logits)
    (gradient,) = torch.autograd.grad(logits[ROWS, LAST + 2].square().sum(), soft)
    assert (gradient.abs().amax(2) > 1e-9).all()


# ---- loss and training


def test_first_loss():
    """A model that has learnt nothing expects every token alike: its loss is ln V."""
    for vocab_size, tied in ((48, False), (48, True), (2048, True)):
        model = MoETransformer(MoEConfig(vocab_size=vocab_size, tied=tied))
        loss = model(*torch.randint(vocab_size, (2, 8, 64))).loss.item()
        assert loss == pytest.approx(math.log(vocab_size), rel=0.05)


def test_loss_is_pure_cross_entropy(model):
    """`loss` is over the targets that count, and without what balances the routers."""
    tokens, targets = torch.randint(V, (2, 3, 8))
    targets[0, 2:] = IGNORE
    counted = targets != IGNORE
    out = model(tokens, targets)
    close(out.loss, F.cross_entropy(out.logits[counted], targets[counted]))
    assert out.balance_loss > 0.5
    assert model(tokens).loss is None
    z = [routing.logits.logsumexp(-1).square().mean() for routing in out.routing]
    close(out.z_loss, torch.stack(z).mean())  # over tokens and routers


def test_learns_one_batch():
    """The model soon knows a small batch by heart: gradients reach what they should."""
    model = MoETransformer(MoEConfig(n_layers=2))
    tokens = torch.arange(4)[:, None] + torch.arange(8)  # attention takes a a for a
    targets = torch.randint(48, (4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens, targets).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def test_gradients_are_reproducible():
    """To the last bit, on several threads: nothing adds up in random order."""
    torch.set_num_threads(2)
    model = MoETransformer(MoEConfig(n_layers=1, top_k=8))
    tokens, targets = torch.randint(48, (2, 16, 64))

    def gradients():
        return torch.autograd.grad(model(tokens, targets).loss, model.parameters())

    first = gradients()
    for _ in range(3):  # several times, since a race may end alike by luck
        assert all(map(torch.equal, gradients(), first))


def test_bfloat16():
    """Half the memory; router and logits are in float32, and near float32's."""
    for k in (2, E):
        model = tiny(top_k=k).float()
        tokens = torch.randint(V, (4, 16))
        expected = model(tokens).logits
        out = model.to(torch.bfloat16)(tokens)
        assert out.logits.dtype == out.routing[0].probs.dtype == torch.float32
        assert 0 < (out.logits - expected).norm() / expected.norm() < 0.05


@variants("default", "shared", "dense-layers")
def test_n_params(variant):
    """All parameters, and the activated ones: those that the gradient of one token reaches."""
    model = tiny(variant)
    assert model.n_params() == sum(tensor.numel() for tensor in model.state_dict().values())
    assert model.n_params(activated=True) == reached_by_one_token(model)


# ---- what is refused

SIZES = {
    "d_model 64 does not divide into 3 heads: try 63": {"n_heads": 3},
    "head_dim is 5; rotary positions need pairs": {"head_dim": 5},
    "top_k 9 is more than the 8 experts": {"n_experts": 8, "top_k": 9},
    "n_heads 4 is not a multiple of n_kv_heads 3": {"n_kv_heads": 3},
    "dense_layers names [4]; the layers are 0 to 3": {"dense_layers": (0, 4)},
    "dropout is 1.0; it must be below 1": {"dropout": 1.0},
    "unknown qk_norm 'half' (there are: full, head, none)": {"qk_norm": "half"},
}
INPUTS = {  # message -> what is asked of a model m with tokens t (2, 9)
    "18 tokens is longer than the context, 16": lambda m, t: m(t.repeat(1, 2)),
    "padding stands on the right": lambda m, t: m(t, valid=t + torch.arange(9) > 2),
    "for router 3; expected (2, 6)": lambda m, t: impose(m, t, router=3),
    "prompt and 8 new tokens are 17 tokens; the context is 16": lambda m, t: m.generate(t, 8),
}


def impose(model, tokens, router):
    model(tokens, imposed=Imposed({router: torch.ones(2, E)}))


@pytest.mark.parametrize("message", full(*SIZES, *INPUTS))
def test_what_does_not_fit(message, model):
    """Sizes, tokens and pathways are refused with what was wrong, and what would do."""
    with refused(message):
        if message in SIZES:
            MoEConfig(**SIZES[message])
        else:
            INPUTS[message](model, torch.zeros(2, 9, dtype=torch.long))
