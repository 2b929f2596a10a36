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


def variants(*taught):
    """A test for each variant; only those that are taught belong to the short run."""
    others = full(*(name for name in VARIANTS if name not in taught))
    return pytest.mark.parametrize("variant", [*taught, *others])


modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def prompts():
    """tokens (3, 7) and valid (3, 7): prompts, padded on the right with random tokens."""
    tokens = torch.randint(V, (3, 7))
    valid = torch.arange(7) < LENGTHS[:, None]
    return tokens, valid


def pathway(model):
    """Random rows (3, E) for every router."""
    rows = torch.randn(len(model.routers()), 3, E, dtype=torch.float64).softmax(-1)
    return dict(enumerate(rows))


# ---- the MoE layer


@pytest.mark.parametrize(
    ("n", "k", "dtype", "width", "fused"),
    [
        (9, 1, torch.float32, 4, True),
        (9, 3, torch.float32, 4, True),
        (9, E, torch.float32, 4, True),
        (9, 3, torch.float32, 5, False),
        (9, 3, torch.float64, 4, False),
        (1, 3, torch.float32, 4, False),
        (3, 1, torch.float64, 4, False),
    ],
    ids=[
        "one expert",
        "three experts",
        "all experts",
        "odd width",
        "float64",
        "one token",
        "few tokens",
    ],
)
def test_experts_equal_a_loop(n, k, dtype, width, fused):
    """The k experts of n tokens, few or many, in any order of work: same outputs and gradients."""
    config = MoEConfig(d_model=8, d_expert=width, n_experts=E, top_k=k)
    experts = Experts(config).to(dtype)
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
        visits = zip(*routes, strict=True)
        expected.append(by_hand.visit(experts, token, visits))
    expected = torch.stack(expected)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    close(y, expected, tolerance)
    with torch.no_grad():
        assert torch.equal(experts(x, weights, chosen), y)
    upstream = torch.randn_like(y)
    inputs = (x, weights, *experts.parameters())
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


def z_loss(n):
    """The z loss of logits of which n are 0 and all others minus infinity."""
    return torch.tensor(math.log(n) ** 2)


def test_balance_and_z_loss():
    """Balance is 1 when all experts share the work, and E / k when k of them do all of it."""
    n = 2 * E
    share = torch.full((n,), 1 / n)
    for k in (1, 2, E):
        logits = torch.zeros(n, E)
        in_turn = (torch.arange(n)[:, None] + torch.arange(k)) % E  # (n, k)
        uniform = Routing(logits.softmax(-1), torch.rand(n, k), in_turn, logits)
        close(router_losses(uniform, share), (torch.tensor(1.0), z_loss(E)), 1e-5)

        logits[:, k:] = -1e9
        same = torch.arange(k).expand(n, k)
        collapsed = Routing(logits.softmax(-1), torch.rand(n, k), same, logits)
        close(router_losses(collapsed, share), (torch.tensor(E / k), z_loss(k)), 1e-5)


# ---- what a prediction depends on


@modes
def test_causal(training):
    """A prediction never depends on later tokens; it does depend on its own one."""
    model = tiny().train(training)
    tokens = torch.randint(V, (2, 8))
    logits = model(tokens).logits
    for t in range(1, 8):
        changed = tokens.clone()
        changed[:, t:] = (tokens[:, t:] + 1) % V
        moved = (model(changed).logits - logits).abs()
        assert moved[:, :t].max() < 1e-10
        assert moved[:, t].max() > 1e-3


@modes
def test_rows_are_independent(training):
    """A row is predicted alike in any company: no expert is ever full, no token is dropped."""
    model = tiny().train(training)
    tokens = torch.randint(V, (5, 8))
    alone = torch.cat([model(row[None]).logits for row in tokens])
    close(model(tokens).logits, alone)
    crowd = tokens[:1].repeat(5, 1)  # all want the same experts
    close(model(crowd).logits, alone[:1].expand(5, -1, -1))


def test_padding_changes_nothing():
    """Valid tokens do not see it, and the losses of the routers do not count it."""
    model = tiny()
    tokens, valid = prompts()
    logits = model(tokens, valid=valid).logits
    for i, n in enumerate(LENGTHS):
        close(logits[i, :n], model(tokens[i : i + 1, :n]).logits[0])

    whole = model(tokens)
    valid = (torch.arange(14) < 7).expand(3, -1)
    padded = model(torch.cat([tokens, tokens], 1), valid=valid)
    close((padded.balance_loss, padded.z_loss), (whole.balance_loss, whole.z_loss))


@modes
def test_evaluation_is_deterministic(training):
    """Dropout is random in training only; generating evaluates, and leaves no trace."""
    model = tiny(dropout=0.5)
    tokens = torch.randint(V, (2, 8))
    logits = model.eval()(tokens).logits
    text = model.generate(tokens, 4)
    model.train(training)
    assert torch.equal(model.generate(tokens, 4), text)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(model(tokens).logits, model(tokens).logits) != training
    assert torch.equal(model.eval()(tokens).logits, logits)


# ---- the cache, and generating


@variants("default", "grouped-query")
def test_cached_decoding_equals_full_forward(variant):
    """With a cache only new tokens are computed, one or several at a time."""
    model = tiny(variant)
    tokens, valid = prompts()
    new = torch.randint(V, (3, 4))
    cache = Cache()
    logits = [model(tokens, valid=valid, cache=cache).logits[ROWS, LAST][:, None]]
    for piece in new.split([1, 1, 2], 1):
        logits.append(model(piece, cache=cache).logits)
    logits = torch.cat(logits, 1)
    for i, n in enumerate(LENGTHS):
        whole = torch.cat([tokens[i, :n], new[i]])
        close(logits[i], model(whole[None]).logits[0, n - 1 :])


@pytest.mark.parametrize("learning", [True, False], ids=["gradients", "no gradients"])
def test_a_cache_goes_on_from_anywhere(learning):
    """From a copy, an earlier state, tensors put in: what it grows by disturbs no other one."""
    model = tiny()
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
def test_generate_equals_slow_loop(variant):
    """Greedy decoding appends the most probable token again and again; `show` sees them come."""
    model = tiny(variant)
    tokens, valid = prompts()
    shown = []
    new = model.generate(tokens, 6, valid=valid, show=shown.append)
    assert torch.equal(torch.stack(shown, 1), new)
    assert new.unique().numel() > 1
    for i, n in enumerate(LENGTHS):
        row = tokens[i, :n]
        for _ in range(6):
            best = model(row[None]).logits[0, -1].argmax()
            row = torch.cat([row, best[None]])
        assert torch.equal(new[i], row[n:])


def test_generate_stops():
    """A row that ended repeats the stop token; when all have ended, generating does."""
    model = tiny()
    tokens, valid = prompts()
    free = model.generate(tokens, 8, valid=valid)
    stop = int(free[1, 2])
    ended = (free == stop).cumsum(1) > 0  # (B, n) true from a row's first stop token on
    n = int((~ended.all(0)).sum()) + 1  # up to the first column in which all have ended
    expected = free.masked_fill(ended, stop)[:, :n]
    assert torch.equal(model.generate(tokens, 8, stop=stop, valid=valid), expected)
    alone = model.generate(tokens[1:2], 8, stop=stop)
    assert alone.shape[1] <= 3
    assert alone[0, -1] == stop


def test_sampling():
    """Sampling is as random as its generator; at a temperature near zero it is greedy."""
    model = tiny()
    tokens, valid = prompts()

    def sample(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens, 9, temperature, valid=valid, generator=generator)

    assert torch.equal(sample(1, 1.0), sample(1, 1.0))
    assert not torch.equal(sample(1, 1.0), sample(2, 1.0))
    assert torch.equal(sample(1, 1e-4), model.generate(tokens, 9, valid=valid))


def test_write_false_leaves_the_cache_alone():
    """A token that looks into the cache without joining it can be asked again and again."""
    model = tiny()
    tokens, valid = prompts()
    cache = Cache()
    model(tokens, valid=valid, cache=cache)

    def contents():
        return [*cache.keys.values(), *cache.values.values(), cache.valid]

    before = [tensor.clone() for tensor in contents()]
    x = model.embed(tokens[:, :2])
    first = model.run_blocks(x, cache=cache, write=False)
    assert torch.equal(model.run_blocks(x, cache=cache, write=False), first)
    assert all(map(torch.equal, contents(), before))
    close(model.run_blocks(x, cache=cache), first)  # it joins only now
    assert cache.valid.shape == (3, 9)


# ---- imposed pathways, learnt prefixes


@variants("default", "norm-topk")
def test_imposing_a_pathway(variant):
    """The model's own pathway changes nothing; another one changes the last valid token alone."""
    model = tiny(variant)
    tokens, valid = prompts()
    plain = model(tokens, valid=valid)
    last = torch.arange(7) == LAST[:, None]
    before = valid & ~last
    own = [routing.probs.unflatten(0, tokens.shape)[last] for routing in plain.routing]
    other = pathway(model)
    for at in (None, last):
        same = model(tokens, valid=valid, imposed=Imposed(dict(enumerate(own)), at))
        close(same.logits[valid], plain.logits[valid])
        changed = model(tokens, valid=valid, imposed=Imposed(other, at))
        close(changed.logits[before], plain.logits[before])
        moved = (changed.logits - plain.logits)[last].abs().amax(1)
        assert (moved > 1e-3).all()

        # What was imposed is what is reported.
        for i, routing in enumerate(changed.routing):
            close(routing.probs[last.flatten()], other[i])
        elsewhere = ~last.flatten()
        close(changed.routing[0].probs[elsewhere], plain.routing[0].probs[elsewhere])


def test_imposing_a_pathway_in_the_middle():
    """It reaches later tokens through attention, and no token before it."""
    model = tiny()
    tokens = torch.randint(V, (3, 7))
    at = (torch.arange(7) == 3).expand(3, -1)
    changed = model(tokens, imposed=Imposed(pathway(model), at)).logits
    moved = (changed - model(tokens).logits).abs().amax(-1)  # (B, T)
    assert (moved[:, :3] < 1e-10).all()
    assert (moved[:, 3:] > 1e-6).all()


def test_prefix_tuning():
    """Prefix tuning is a cache of learnt keys and values: gradients reach every layer, and help."""
    model = tiny("grouped-query")
    tokens, valid = prompts()

    def loss(learnt):
        """learnt (2, L, G, S, C): keys and values of the layers, the same for all prompts."""
        keys, values = learnt[:, :, None].expand(-1, -1, 3, -1, -1, -1)
        seen = torch.ones(3, 4, dtype=torch.bool)
        cache = Cache(dict(enumerate(keys)), dict(enumerate(values)), seen)
        x = model.run_blocks(model.embed(tokens), valid, cache)
        return F.cross_entropy(model.head(x[ROWS, LAST]), ROWS)

    learnt = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(learnt), learnt)
    assert (gradient.abs().amax(-1) > 1e-9).all()
    assert loss(learnt - 0.1 * gradient) < loss(learnt) - 1e-3


def test_soft_prompt():
    """A soft prompt is embeddings put in front; those of tokens do what the tokens would."""
    model = tiny()
    tokens, valid = prompts()
    valid = F.pad(valid, (2, 0), value=True)
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
        tokens, targets = torch.randint(vocab_size, (2, 8, 64))
        loss = model(tokens, targets).loss.item()
        assert loss == pytest.approx(math.log(vocab_size), rel=0.05)


def test_loss_is_pure_cross_entropy():
    """`loss` is over the targets that count, and without what balances the routers."""
    model = tiny()
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


# ---- sizes


@variants("default", "shared", "dense-layers")
def test_n_params(variant):
    """All parameters, and the activated ones: those that the gradient of one token reaches."""
    model = tiny(variant)
    tensors = model.state_dict().values()
    assert model.n_params() == sum(tensor.numel() for tensor in tensors)
    assert model.n_params(activated=True) == reached_by_one_token(model)


def test_longest_input():
    """The context can be used to its last token, by a forward pass and by generating."""
    model = tiny()
    tokens = torch.randint(V, (2, 16))
    assert model(tokens).logits.shape == (2, 16, V)
    assert model.generate(tokens[:, :9], 7).shape == (2, 7)


# ---- what is refused

SIZES = {
    "d_model 64 does not divide into 3 heads: try 63": {"n_heads": 3},
    "head_dim is 5; rotary positions need pairs": {"head_dim": 5},
    "top_k 9 is more than the 8 experts": {"n_experts": 8, "top_k": 9},
    "n_heads 4 is not a multiple of n_kv_heads 3": {"n_kv_heads": 3},
    "dense_layers names [4]; the layers are 0 to 3": {"dense_layers": (0, 4)},
    "dropout is 1.0; it must be below 1": {"dropout": 1.0},
    "top_k is 0; it must be greater than 0": {"top_k": 0},
    "qk_norm is 'half'; expected one of full, head, none": {"qk_norm": "half"},
    "d_shared is -1; it must be at least 0": {"d_shared": -1},
}
INPUTS = {  # message -> what is asked of a model m with tokens t (2, 9)
    "tokens go from 11 to 11; the vocabulary goes from 0 to 10": lambda m, t: m(t + V),
    "tokens have shape (2, 0); expected (B, T), not empty": lambda m, t: m(t[:, :0]),
    "18 tokens is longer than the context, 16": lambda m, t: m(t.repeat(1, 2)),
    "the shape of targets is (2, 8); expected (2, 9)": lambda m, t: m(t, t[:, 1:]),
    "the shape of valid is (2, 8); expected (2, 9)": lambda m, t: m(t, valid=t[:, 1:] == 0),
    "padding stands on the right": lambda m, t: m(t, valid=t + torch.arange(9) > 2),
    "for router 3; expected (2, 6)": lambda m, t: impose(m, t, router=3),
    "a pathway of shape (2, 5) for router 0": lambda m, t: impose(m, t, width=5),
    "the shape of imposed.at is (9,); expected (2, 9)": lambda m, t: impose(m, t, at=t[0] == 0),
    "prompt and 8 new tokens are 17 tokens; the context is 16": lambda m, t: m.generate(t, 8),
    "n_tokens is 0; it must be at least 1": lambda m, t: m.generate(t, 0),
}


def impose(model, tokens, router=0, width=E, at=None):
    row = torch.ones(2, width)
    model(tokens, imposed=Imposed({router: row}, at))


@pytest.mark.full
@pytest.mark.parametrize("message", SIZES)
def test_sizes_that_do_not_fit(message):
    """They are refused with what was wrong, and what would do."""
    with refused(message):
        MoEConfig(**SIZES[message])


@pytest.mark.full
@pytest.mark.parametrize("message", INPUTS)
def test_input_that_does_not_fit(message):
    """Tokens and pathways that the model cannot take are refused likewise."""
    with refused(message):
        INPUTS[message](tiny(), torch.zeros(2, 9, dtype=torch.long))
