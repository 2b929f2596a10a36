"""What a mixture-of-experts transformer must be, one property per test. Read the docstrings to
learn the model.

Most models here are in float64, where "equal" can mean equal to ten decimals: a float32 tolerance
hides small bugs."""

import math

import by_hand
import pytest
import torch
import torch.nn.functional as F

import moe
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
ROWS = torch.arange(len(LENGTHS))
E, V = 6, 11  # experts and vocabulary of a tiny model

VARIANTS = {
    "default": {},
    "grouped-query": {"n_kv_heads": 2},
    "head-dim": {"head_dim": 6},
    "qk-norm-head": {"qk_norm": "head", "n_kv_heads": 1},
    "qk-norm-none": {"qk_norm": "none"},
    "clip-qkv": {"clip_qkv": 0.5},
    "shared": {"d_shared": 5},
    "dense-layers": {"dense_layers": (0,), "d_dense": 7},
    "norm-topk": {"norm_topk": True},
    "tied": {"tied": True},
    "top-1": {"top_k": 1},
    "top-all": {"top_k": E},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def tiny(dtype=torch.float64, **changes):
    """A small model, not as it is initialised."""
    sizes = {
        "vocab_size": V,
        "context": 16,
        "d_model": 16,
        "n_layers": 3,
        "n_heads": 4,
        "n_experts": E,
        "top_k": 2,
    }
    return decided(MoETransformer(MoEConfig(**sizes | {"d_expert": 8} | changes))).to(dtype)


def decided(model):
    """Decided routers, decided predictions and uneven norms: at initialisation they are all alike,
    and what is all alike hides mistakes."""
    for name, weight in model.named_parameters():
        if name.endswith(("router.weight", "embedding.weight")):  # the unembedding, too
            torch.nn.init.normal_(weight, std=0.5)
        elif weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def prompts():
    """tokens (3, 7) and valid (3, 7): prompts of LENGTHS, padded with random tokens."""
    T = int(LENGTHS.max())
    return torch.randint(V, (len(LENGTHS), T)), torch.arange(T) < LENGTHS[:, None]


def pathway(model, first=0):
    """Random rows to impose on every router from layer `first` on, to be differentiated."""
    routers = [
        module.index for module in model.blocks[first:].modules() if isinstance(module, Router)
    ]
    return {
        i: torch.randn(len(LENGTHS), E, dtype=torch.float64).softmax(-1).requires_grad_()
        for i in routers
    }


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def dense_reference(experts, x, weights, chosen):
    """Every token through every expert, times a weight that is 0 where it was not chosen."""
    every = x.new_zeros(len(x), len(experts.down)).scatter(1, chosen, weights)  # (N, E)
    gate, up = torch.einsum("nd,efd->nef", x, experts.gate_up).chunk(2, dim=-1)
    return torch.einsum("ne,nef,edf->nd", every, F.silu(gate) * up, experts.down)


@pytest.mark.parametrize("k", range(1, E + 1))
@pytest.mark.parametrize(
    ("dtype", "width", "fused", "tolerance"),
    [
        (torch.float32, 4, True, 1e-4),
        (torch.float32, 5, False, 1e-4),
        (torch.float64, 4, False, 1e-12),
    ],
    ids=["fused", "loop-odd", "loop-float64"],
)
def test_sparse_equals_dense(k, dtype, width, fused, tolerance, monkeypatch):
    """Sorting tokens by expert changes the order of the work, not the result: same outputs, same
    gradients."""
    calls, kernel = [], F.grouped_mm
    monkeypatch.setattr(
        moe.F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
    )
    experts = Experts(MoEConfig(d_model=8, d_expert=width, n_experts=E, top_k=k)).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    scores = torch.rand(9, E)
    scores[:, [0, 2, 5]] -= (
        1  # as long as k <= 3, the first expert, the last and one in between get no token
    )
    chosen = scores.topk(k).indices
    assert k > 3 or len(chosen.unique()) < E
    x, weights = (
        torch.randn(9, 8, dtype=dtype, requires_grad=True),
        torch.rand(9, k, dtype=dtype, requires_grad=True),
    )
    inputs, upstream = (x, weights, *experts.parameters()), torch.randn(9, 8, dtype=dtype)
    found, expected = experts(x, weights, chosen), dense_reference(experts, x, weights, chosen)
    close(found, expected, tolerance)
    close(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        tolerance,
    )
    assert len(calls) == (2 if fused else 0)


@both_modes
def test_causal(training):
    """A prediction never depends on later tokens."""
    model = tiny().train(training)
    tokens = torch.randint(V, (2, 8))
    logits = model(tokens).logits
    for t in range(1, 8):
        changed = torch.cat([tokens[:, :t], (tokens[:, t:] + 1) % V], 1)
        found = model(changed).logits
        close(found[:, :t], logits[:, :t])
        assert (
            found[:, t] - logits[:, t]
        ).abs().amax() > 1e-3  # but it does depend on its own token


@both_modes
def test_rows_are_independent(training):
    """A row is predicted alike in any company: no expert is ever full, so no token is dropped for
    another's sake."""
    model = tiny().train(training)
    tokens = torch.randint(V, (5, 8))
    alone = torch.cat([model(row[None]).logits for row in tokens])
    close(model(tokens).logits, alone)
    close(
        model(tokens[:1].repeat(5, 1)).logits, alone[:1].expand(5, -1, -1)
    )  # all crowd into the same experts


def test_padding_changes_nothing():
    """Padding on the right is neither seen by valid tokens nor counted in the balance loss and the
    z-loss."""
    model, (tokens, valid) = tiny(), prompts()
    for row, n, logits in zip(tokens, LENGTHS, model(tokens, valid=valid).logits, strict=True):
        close(logits[:n], model(row[None, :n]).logits[0])
    whole, more = model(tokens), torch.cat([tokens, tokens], 1)
    padded = model(more, valid=(torch.arange(more.shape[1]) < tokens.shape[1]).expand(more.shape))
    close((padded.balance_loss, padded.z_loss), (whole.balance_loss, whole.z_loss))


@both_modes
def test_evaluation_is_deterministic(training):
    """Dropout is random in training only; generating evaluates, and leaves no trace."""
    model, tokens = tiny(dropout=0.5), torch.randint(V, (2, 8))
    expected, said = model.eval()(tokens).logits, model.generate(tokens, 4)
    model.train(training)
    assert torch.equal(model.generate(tokens, 4), said)
    assert model.training == training and model.blocks[0].training == training
    assert torch.equal(model(tokens).logits, model(tokens).logits) != training
    assert torch.equal(model.eval()(tokens).logits, expected)


@variants
def test_cached_decoding_equals_full_forward(changes):
    """With the keys and values of earlier tokens in a cache, only new tokens are computed, one or
    several at a time."""
    model, (tokens, valid), new, cache = (
        tiny(**changes),
        prompts(),
        torch.randint(V, (3, 4)),
        Cache(),
    )
    found = [model(tokens, valid=valid, cache=cache).logits[ROWS, LENGTHS - 1][:, None]]
    found += [model(piece, cache=cache).logits for piece in new.split([1, 1, 2], 1)]
    for row, continuation, n, logits in zip(tokens, new, LENGTHS, torch.cat(found, 1), strict=True):
        close(logits, model(torch.cat([row[:n], continuation])[None]).logits[0, n - 1 :])


@variants
def test_generate_equals_slow_loop(changes):
    """Greedy decoding appends the most probable token, again and again; the cache only makes it
    fast."""
    model, (tokens, valid) = tiny(**changes), prompts()
    slow = []
    for row, n in zip(tokens, LENGTHS, strict=True):
        row = row[None, :n]
        for _ in range(6):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
        slow.append(row[0, n:])
    assert torch.stack(slow).unique().numel() > 1
    assert torch.equal(model.generate(tokens, 6, valid=valid), torch.stack(slow))


def test_generate_stops():
    """A row that said the stop token repeats it while others go on; when all have said it,
    generating ends."""
    model, (tokens, valid) = tiny(), prompts()
    free = model.generate(tokens, 8, valid=valid)
    stop = int(free[1, 2])
    said = (free == stop).cumsum(1) > 0  # (B, n) true from a row's first stop token on
    end = int((~said.all(0)).sum()) + 1  # one token after the last column in which a row goes on
    assert torch.equal(
        model.generate(tokens, 8, stop=stop, valid=valid), free.masked_fill(said, stop)[:, :end]
    )
    alone = model.generate(tokens[1:2], 8, stop=stop)
    assert alone.shape[1] <= 3 and alone[0, -1] == stop


def test_sampling():
    """Sampling is as random as its generator, and at a temperature near zero it is greedy."""
    model, (tokens, valid) = tiny(), prompts()

    def sample(seed, temperature):
        return model.generate(
            tokens, 9, temperature, valid=valid, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(sample(1, 1.0), sample(1, 1.0))
    assert not torch.equal(sample(1, 1.0), sample(2, 1.0))
    assert torch.equal(sample(1, 1e-4), model.generate(tokens, 9, valid=valid))


def test_write_false_leaves_the_cache_alone():
    """With write=False a token looks into the cache without joining it, so it can be asked again
    and again."""
    model, (tokens, valid), cache = tiny(), prompts(), Cache()
    model(tokens, valid=valid, cache=cache)
    before = [t.clone() for t in (*cache.keys.values(), *cache.values.values(), cache.valid)]
    x = model.embed(tokens[:, :2])
    first, again = (model.run_blocks(x, cache=cache, write=False) for _ in range(2))
    after = (*cache.keys.values(), *cache.values.values(), cache.valid)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) and torch.equal(
        first, again
    )
    close(first, model.run_blocks(x, cache=cache))  # had it joined, the answer would have been this
    assert cache.valid.shape[1] == tokens.shape[1] + 2


@pytest.mark.parametrize("layer", range(4))
def test_run_composes(layer):
    """The blocks below a layer, then those from it on, are all blocks."""
    model, (tokens, valid) = tiny(), prompts()
    x = model.embed(tokens)
    below, expected = model.run_blocks(x, valid, last=layer), model.run_blocks(x, valid)
    close(model.run_blocks(below, valid, first=layer), expected)
    assert torch.equal(below, x) == (layer == 0) and torch.equal(below, expected) == (layer == 3)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize(
    "name", ["default", "grouped-query", "dense-layers", "norm-topk", "top-all"]
)
def test_one_token_step_equals_full_forward(layer, name):
    """To re-mix the last token from a layer on, only that token is recomputed, and only from that
    layer on."""
    model, (tokens, valid), cache = tiny(**VARIANTS[name]), prompts(), Cache()
    imposed = Imposed(pathway(model, layer))
    full = model(tokens, valid=valid, imposed=imposed).logits[ROWS, LENGTHS - 1]
    before_last = (
        torch.arange(tokens.shape[1]) < LENGTHS[:, None] - 1
    )  # of the first prompt, nothing is before the last
    model.run_blocks(model.embed(tokens), before_last, cache)
    state = model.run_blocks(
        model.embed(tokens[ROWS, LENGTHS - 1][:, None]), cache=cache, last=layer, write=False
    )
    step = model.head(
        model.run_blocks(state, cache=cache, first=layer, imposed=imposed, write=False)
    )[:, 0]
    close(step, full)
    upstream, rows = torch.randn_like(full), list(imposed.rows.values())
    found, expected = (
        torch.autograd.grad(step, rows, upstream),
        torch.autograd.grad(full, rows, upstream),
    )
    close(found, expected)
    assert all((gradient.abs().amax(1) > 1e-6).all() for gradient in expected)


@pytest.mark.parametrize("name", ["default", "dense-layers", "norm-topk", "top-all"])
def test_remix(name):
    """Imposing the model's own pathway changes nothing; imposing another one changes the last valid
    token alone."""
    model, (tokens, valid) = tiny(**VARIANTS[name]), prompts()
    last = torch.arange(tokens.shape[1]) == LENGTHS[:, None] - 1
    plain, other = model(tokens, valid=valid), pathway(model)
    own = {
        i: routing.probs.unflatten(0, tokens.shape)[last] for i, routing in enumerate(plain.routing)
    }
    for at in (None, last):
        close(
            model(tokens, valid=valid, imposed=Imposed(own, at)).logits[valid], plain.logits[valid]
        )
        found = model(tokens, valid=valid, imposed=Imposed(other, at))
        close(found.logits[valid & ~last], plain.logits[valid & ~last])
        assert ((found.logits - plain.logits)[last].abs().amax(1) > 1e-3).all()
        for i, routing in enumerate(found.routing):  # what was imposed is what is reported
            close(routing.probs[last.flatten()], other[i])
        close(found.routing[0].probs[~last.flatten()], plain.routing[0].probs[~last.flatten()])


def test_remix_in_the_middle():
    """A pathway imposed at an earlier token reaches the later ones through attention, and no token
    before it."""
    model, tokens = tiny(), torch.randint(V, (3, 7))
    at = (torch.arange(7) == 3).expand(3, -1)
    moved = (
        (model(tokens, imposed=Imposed(pathway(model), at)).logits - model(tokens).logits)
        .abs()
        .amax(-1)
    )  # (B, T)
    assert (moved[:, :3] < 1e-10).all() and (moved[:, 3:] > 1e-6).all()


@pytest.mark.parametrize("vocab_size", [48, 2048])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_first_loss(vocab_size, tied):
    """A model that has learnt nothing expects every token alike: its loss is ln V."""
    model = MoETransformer(MoEConfig(vocab_size=vocab_size, tied=tied))
    tokens, targets = torch.randint(vocab_size, (2, 16, 64))
    assert model(tokens, targets).loss.item() == pytest.approx(math.log(vocab_size), rel=0.05)


@pytest.mark.parametrize("k", range(1, E + 1))
@pytest.mark.parametrize("norm_topk", [False, True], ids=["plain", "norm-topk"])
def test_the_loss_trains_the_router(k, norm_topk):
    """The router learns through the routing weights: all but one expert with weight w / w, which is
    1 whatever w is."""
    model = tiny(top_k=k, norm_topk=norm_topk)
    tokens, targets = torch.randint(V, (2, 4, 8))
    model(tokens, targets).loss.backward()
    for router in model.routers():
        assert (router.weight.grad.abs().max() < 1e-12) == (norm_topk and k == 1)


@pytest.mark.parametrize("k", range(1, E + 1))
def test_balance_and_z_loss(k):
    """The balance loss is 1 when all experts share the work, E / k when k of them do all of it."""
    n, share = torch.arange(2 * E), torch.full((2 * E,), 1 / (2 * E))
    logits = torch.zeros(2 * E, E)
    uniform = Routing(
        logits.softmax(-1), torch.rand(2 * E, k), (n[:, None] + torch.arange(k)) % E, logits
    )
    balance, z = router_losses(uniform, share)
    close((balance, z), (torch.tensor(1.0), torch.tensor(math.log(E) ** 2)), 1e-5)
    logits = logits.masked_fill(torch.arange(E) >= k, -1e9)
    collapsed = uniform._replace(
        probs=logits.softmax(-1), experts=torch.arange(k).expand(2 * E, k), logits=logits
    )
    balance, z = router_losses(collapsed, share)
    close((balance, z), (torch.tensor(E / k), torch.tensor(math.log(k) ** 2)), 1e-5)


def test_loss_is_pure_cross_entropy():
    """`loss` is the language-model loss alone, over the targets that are not IGNOREd."""
    model, (tokens, targets) = tiny(), torch.randint(V, (2, 3, 8))
    targets[0, 2:] = IGNORE
    out, kept = model(tokens, targets), targets != IGNORE
    close(out.loss, F.cross_entropy(out.logits[kept], targets[kept]))
    assert out.balance_loss > 0.5 and model(tokens).loss is None  # what balances is not in the loss
    z = [routing.logits.logsumexp(-1).square().mean() for routing in out.routing]
    close(out.z_loss, sum(z) / len(z))  # router losses are means over tokens and routers


def test_learns_one_batch():
    """From its own initialisation, the model soon knows a small batch by heart: gradients reach
    what they should."""
    model = MoETransformer(MoEConfig(n_layers=2))
    tokens = torch.arange(4)[:, None] + torch.arange(
        8
    )  # no token comes twice: "a" and "a a" look alike to attention
    targets = torch.randint(48, (4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens, targets).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def from_olmoe(theirs, config):
    """Our model with the weights of an OlmoeForCausalLM, which are the same tensors under other
    names."""
    names = {
        "model.": "",
        "layers": "blocks",
        "embed_tokens": "embedding",
        "lm_head": "unembedding",
        "_proj": "",
    }
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norms.0"}
    names |= {
        "self_attn": "attention",
        "mlp.gate.": "ffns.0.router.",
        "mlp.experts": "ffns.0.experts",
    }
    model, weights = MoETransformer(config), {}
    for name, weight in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if not (config.tied and name == "unembedding.weight"):
            weights[name] = weight
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"clip_qkv": 0.3}, {"clip_qkv": 0.3}),
        ({"n_kv_heads": 2}, {"num_key_value_heads": 2}),
        ({"norm_topk": True}, {"norm_topk_prob": True}),
        ({"tied": True}, {"tie_word_embeddings": True}),
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ],
    ids=["default", "clip-qkv", "grouped-query", "norm-topk", "tied", "rope-theta"],
)
def test_equals_olmoe(ours, theirs):
    """Configured like OLMoE, the model computes what transformers' OLMoE computes from the same
    weights."""
    transformers = pytest.importorskip("transformers")
    config = MoEConfig(
        vocab_size=V, d_model=16, n_layers=2, n_heads=4, n_experts=E, top_k=2, d_expert=8, **ours
    )
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": E,
    }
    sizes |= {
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    olmoe = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes | theirs)).eval()
    for weight in olmoe.parameters():
        torch.nn.init.normal_(
            weight, std=0.5
        )  # the norms, too, so that none can stand in for another
    tokens = torch.randint(V, (3, 32))
    found, expected = from_olmoe(olmoe, config)(tokens).logits, olmoe(tokens).logits
    close(found, expected, 1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["default", "shared", "dense-layers", "tied", "top-all"])
def test_n_params(name):
    """All parameters, or the activated ones: those that one token's gradient reaches, expert by
    expert."""
    model = tiny(**VARIANTS[name])
    assert model.n_params() == sum(tensor.numel() for tensor in model.state_dict().values())
    model(torch.tensor([[3]]), torch.tensor([[4]])).loss.backward()
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    idle = sum(p[0].numel() * int((p.grad.flatten(1) == 0).all(1).sum()) for p in stacks)
    assert model.n_params(activated=True) == model.n_params() - idle


def test_n_params_of_olmoe():
    """On the device "meta", where tensors have no numbers, OLMoE-1B-7B is counted: 6.9 billion, 1.3
    per token."""
    olmoe = MoEConfig(
        50304, 4096, d_model=2048, n_layers=16, n_heads=16, n_experts=64, top_k=8, d_expert=1024
    )
    with torch.device("meta"):
        model = MoETransformer(olmoe)
    assert (model.n_params(), model.n_params(activated=True)) == (6_919_161_856, 1_282_017_280)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 64, "n_heads": 3}, "d_model 64 does not divide into 3 heads: try 63"),
        ({"head_dim": 5}, "head_dim is 5; .* pairs"),
        ({"n_experts": 8, "top_k": 9}, "top_k 9 is more than the 8 experts"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        (
            {"n_layers": 4, "dense_layers": (0, 4)},
            r"dense_layers names \[4\]; the layers are 0 to 3",
        ),
        ({"dropout": 1.0}, "dropout is 1.0; .* below 1"),
        ({"n_layers": 0}, "n_layers is 0; it must be greater than 0"),
        ({"top_k": 0}, "top_k is 0; it must be greater than 0"),
        ({"qk_norm": "half"}, "qk_norm is 'half'; expected full, head or none"),
        ({"clip_qkv": 0.0}, "clip_qkv is 0.0; it must be greater than 0"),
        ({"d_shared": -1}, "d_shared is -1; it must be at least 0"),
    ],
)
def test_bad_config(changes, message):
    """Sizes that do not fit together are refused, with what was found and what would do."""
    with pytest.raises(ValueError, match=message):
        MoEConfig(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, t: m(t + V),
            f"tokens go from {V} to {V}; the vocabulary goes from 0 to {V - 1}",
        ),
        (lambda m, t: m(t - 1), "tokens go from -1 to -1; the vocabulary"),
        (lambda m, t: m(t[0]), r"tokens have shape \(9,\); expected \(B, T\)"),
        (lambda m, t: m(t[:, :0]), r"tokens have shape \(2, 0\); expected \(B, T\), not empty"),
        (lambda m, t: m(t.repeat(1, 2)), "a sequence of 18 tokens is longer than the context, 16"),
        (
            lambda m, t: m(t, t[:, 1:]),
            r"targets have shape \(2, 8\); expected that of tokens, \(2, 9\)",
        ),
        (lambda m, t: m(t, valid=t[:, 1:] == 0), r"valid has shape \(2, 8\); expected \(2, 9\)"),
        (lambda m, t: m(t, valid=t.cumsum(1) + torch.arange(9) > 2), "padding stands on the right"),
        (
            lambda m, t: m(t, imposed=Imposed({3: torch.ones(2, E)})),
            "for router 3; .* one of 3 routers",
        ),
        (
            lambda m, t: m(t, imposed=Imposed({0: torch.ones(2, 5)})),
            rf"\(2, 5\) for router 0; expected \(2, {E}\)",
        ),
        (
            lambda m, t: m(t, imposed=Imposed({}, t[0] == 0)),
            r"imposed.at has shape \(9,\); expected \(2, 9\)",
        ),
        (lambda m, t: m.generate(t, 8), "prompt and 8 new tokens are 17 tokens; the context is 16"),
        (lambda m, t: m.generate(t, 0), "n_tokens is 0; it must be at least 1"),
    ],
    ids=[
        "high",
        "low",
        "shape",
        "empty",
        "long",
        "targets",
        "valid",
        "left",
        "router",
        "row",
        "at",
        "generate",
        "nothing",
    ],
)
def test_bad_input(call, message):
    """Tokens and pathways that the model cannot take are refused, with what was found and what was
    expected."""
    with pytest.raises(ValueError, match=message):
        call(tiny(), torch.zeros(2, 9, dtype=torch.long))


def test_longest_input():
    """The context can be used to its last token, by a forward pass and by generating."""
    model, tokens = tiny(), torch.randint(V, (2, 16))
    assert model(tokens).logits.shape == (2, 16, V) and model.generate(tokens[:, :9], 7).shape == (
        2,
        7,
    )


def test_gradients_are_reproducible():
    """The same batch gives the same gradients to the last bit, on several threads: nothing adds up
    in random order."""
    torch.set_num_threads(2)
    model = MoETransformer(MoEConfig(n_layers=1, top_k=8))
    tokens, targets = torch.randint(48, (2, 16, 64))
    first, *others = (
        torch.autograd.grad(model(tokens, targets).loss, model.parameters()) for _ in range(4)
    )
    for again in others:  # several, since a race may end alike by luck
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("k", [2, E])
def test_bfloat16(k):
    """The model runs in bfloat16, at half the memory; router and logits are in float32, and near
    float32's."""
    model, tokens = tiny(torch.float32, top_k=k), torch.randint(V, (4, 16))
    expected = model(tokens).logits
    found = model.to(torch.bfloat16)(tokens)
    assert found.logits.dtype == found.routing[0].probs.dtype == torch.float32
    assert 0 < (found.logits - expected).norm() / expected.norm() < 0.05


def test_a_router_of_your_own_is_trained_and_remixed():
    """A subclass of Router is all that another routing rule needs: here sigmoid scores."""

    class SigmoidRouter(Router):
        def scores(self, x):
            logits, _ = super().scores(x)
            probs = logits.sigmoid()
            return logits, probs / probs.sum(-1, keepdim=True)

    model = MoETransformer(tiny().config, router=SigmoidRouter).double()
    decided(model)
    tokens, _ = prompts()
    routing = model(tokens).routing[0]
    x = model.embed(tokens)
    x = x + model.blocks[0].attention(model.blocks[0].attention_norm(x), flow_of(model, x))
    z = model.blocks[0].ffn_norms[0](x).flatten(0, 1)
    for n in range(len(z)):
        visits = by_hand.route(model.routers()[0], z[n], by_hand.sigmoid)
        assert routing.experts[n].tolist() == [expert for _, expert in visits]
        close(routing.weights[n], torch.stack([weight for weight, _ in visits]))


def flow_of(model, x):
    """What a block needs to know of a plain pass."""
    position = torch.arange(x.shape[1])[None]
    cos, sin = moe.rotary_angles(position, model.config)
    return moe.Flow(cos.to(x), sin.to(x), None, None, False, {}, None, [], None)


def test_generate_shows_tokens_as_they_come():
    """`show` gets the tokens (B,) of each step; together they are what comes back."""
    model, (tokens, valid) = tiny(), prompts()
    shown = []
    new = model.generate(tokens, 4, valid=valid, show=shown.append)
    assert torch.equal(torch.stack(shown, 1), new) and new.shape == (3, 4)
