"""CartesianMoE and what it is compared with: the layer from its equations, and the foundation's properties for all."""

import pytest
import test_moe
import torch
from test_moe import ROWS, V, both_modes, close, decided, dense_reference, prompts

import moe
from cartesian import PAPER, PRESETS, TOY, CartesianConfig, CartesianTransformer, UsedExperts, build, counts, preset
from lab import checkpoint
from moe import Cache, MoEConfig, router_losses

N = 4  # experts of full size in a tiny model
ROUTED = [name for name in PRESETS if name != "hash" and not name.startswith("dense")]


def small(name, **changes):
    """A tiny model of a preset, in float64, not as it is initialised."""
    sizes = {"vocab_size": V, "context": 16, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_experts": N, "top_k": 2}
    base = MoEConfig(**sizes | {"d_expert": 8, "d_shared": 8} | changes)
    return decided(CartesianTransformer(PRESETS[name](base))).double()


@pytest.fixture
def instead(monkeypatch):
    """Lets a test of test_moe.py test a preset: instead(name) takes the place of its tiny models."""

    def replace(name):
        monkeypatch.setattr(test_moe, "tiny", lambda **changes: small(name, **changes))
        monkeypatch.setattr(test_moe, "E", small(name).config.n_experts)

    return replace


@pytest.mark.parametrize("name", PRESETS)
@both_modes
def test_causal_and_independent(name, training, instead):
    """No prediction depends on later tokens, or on other rows."""
    instead(name)
    test_moe.test_causal(training)
    test_moe.test_rows_are_independent(training)


@pytest.mark.parametrize("name", PRESETS)
def test_padding_and_cache(name, instead):
    """Padding changes nothing; decoding with a cache, also over padded prompts, equals the full forward pass."""
    instead(name)
    torch.manual_seed(1)  # with 0, a dense one says the same token again and again, which would prove little
    test_moe.test_padding_changes_nothing()
    test_moe.test_cached_decoding_equals_full_forward({})
    test_moe.test_generate_equals_slow_loop({})
    test_moe.test_evaluation_is_deterministic(True)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("name", ROUTED)
def test_remix(name, layer, instead):
    """Both rows of a Cartesian block can be re-mixed, by computing the last token only, and differentiated."""
    instead(name)
    test_moe.test_one_token_step_equals_full_forward(layer, "default")
    test_moe.test_remix("default")


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("hash", "top_p")])
def test_n_params(name, instead):
    """The activated parameters are those that the gradient of one token reaches, in both sub-layers."""
    instead(name)
    test_moe.test_n_params("default")


# The layer once more, slowly: one token at a time, in Python, from the equations.


def slow_ffn(gate_up, down, z):
    gate, up = (gate_up @ z).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


def slow_norm(norm, x):
    return norm.weight * x / (x.square().mean() + norm.eps).sqrt()


def slow_route(layer, z, token):
    """[(weight, expert)] of a token."""
    if hasattr(layer.router, "table"):
        return [(1 / layer.router.top_k, int(e)) for e in layer.router.table[token]]
    scores = (layer.router.weight @ z).exp()
    probs = [float(score / scores.sum()) for score in scores]
    chosen = sorted(range(len(probs)), key=lambda e: -probs[e])
    least = getattr(layer.router, "p", None)
    if least is None:
        chosen = chosen[: layer.router.top_k]
    else:
        chosen = chosen[: next(n for n in range(1, len(probs) + 1) if sum(probs[e] for e in chosen[:n]) >= least)]
    return [(probs[e], e) for e in chosen]


def slow_experts(layer, z):
    return [slow_ffn(gate_up, down, z) for gate_up, down in zip(layer.experts.gate_up, layer.experts.down, strict=True)]


def slow_shared(layer, z):
    shared = layer.shared
    return torch.zeros_like(z) if shared is None else slow_ffn(shared.gate_up.weight, shared.down.weight, z)


def slow_moe(layer, z, token):
    return sum(p * slow_experts(layer, z)[e] for p, e in slow_route(layer, z, token)) + slow_shared(layer, z)


def slow_block(block, kind, x, token):
    """The feed-forward part of a block for one token, x (D,)."""
    if kind == "moe":
        return x + slow_moe(block.ffns[0], slow_norm(block.ffn_norms[0], x), token)
    if kind == "cartesian":
        u = x + slow_moe(block.ffns[0], slow_norm(block.ffn_norms[0], x), token)
        return u + slow_moe(block.ffns[1], slow_norm(block.ffn_norms[1], u), token)
    two = block.ffns[0]
    if kind == "parallel":
        z = slow_norm(block.ffn_norms[0], x)
        return x + slow_moe(two.A, z, token) + slow_moe(two.B, z, token)
    z = slow_norm(two.norm_A, x)
    u = x + slow_moe(two.A, z, token)
    v = slow_norm(two.norm_B, u)
    if kind == "chain":
        return x + slow_moe(two.B, v, token)
    route, y = slow_route(two.A, z, token), u + slow_shared(two.B, v)
    total = sum(p for p, _ in route)
    for p, i in route:
        alone = slow_norm(two.norm_B, x + total * slow_experts(two.A, z)[i] + slow_shared(two.A, z))
        y = y + sum(p / total * q * slow_experts(two.B, alone)[j] for q, j in slow_route(two.B, v, token))
    return y


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("dense")])
def test_the_layer_equals_its_equations(name):
    """Every block computes what its equations say, to ten decimals."""
    model, tokens = small(name), torch.randint(V, (1, 8))
    torch.nn.init.zeros_(model.blocks[0].attention.o.weight)  # leaves the feed-forward part
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        slow = [slow_block(model.blocks[0], model.config.layer, *each) for each in zip(x[0], tokens[0], strict=True)]
        close(model.run(x, last=1, tokens=tokens)[0], torch.stack(slow))


class Linear(torch.nn.Module):
    """Experts that are matrices."""

    def __init__(self, n):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(n, 16, 16, dtype=torch.float64) / 4)

    def forward(self, x, weights, experts):
        return torch.einsum("nk,nkij,nj->ni", weights, self.matrix[experts], x)


def two_sublayers(linear):
    """A and B of a Cartesian block, without shared experts."""
    A, B = small("cartesian_no_shared").blocks[0].ffns
    if linear:
        A.experts, B.experts = Linear(N + 1), Linear(N + 1)
    return A, B


def every_pair(A, B, z, join):
    """sum_ij p_i q_j join(A_i, B_j) over the chosen pairs of each token, where z (n, D) reaches A."""
    p = A.router(z)
    u = A.experts(z, p.weights, p.experts)
    q, y = B.router(u), torch.zeros_like(z)
    one = torch.ones(len(z), 1, dtype=z.dtype)
    for i in range(p.experts.shape[1]):
        for j in range(q.experts.shape[1]):
            weight = p.weights[:, i : i + 1] * q.weights[:, j : j + 1]
            y = y + weight * join(
                lambda x, i=i: A.experts(x, one, p.experts[:, i : i + 1]),
                lambda x, j=j: B.experts(x, one, q.experts[:, j : j + 1]),
            )
    return y


@pytest.mark.parametrize("linear", [True, False])
def test_in_sequence_is_over_pairs_if_linear(linear):
    """Two sub-layers in sequence are the weighted sum over all chosen pairs B_j(A_i(z)), if the experts are linear."""
    (A, B), z = two_sublayers(linear), torch.randn(9, 16, dtype=torch.float64)
    gap = (B(A(z)) - every_pair(A, B, z, lambda a, b: b(a(z)))).abs().max()
    assert gap < 1e-10 if linear else gap > 1e-3


def test_elementwise_product_over_pairs_factorises():
    """Were the product elementwise, the sum over pairs would be a product of two sums: nothing would be composed."""
    (A, B), z = two_sublayers(linear=False), torch.randn(9, 16, dtype=torch.float64)
    u = A(z)
    q = B.router(u)
    close(every_pair(A, B, z, lambda a, b: a(z) * b(z)), u * B.experts(z, q.weights, q.experts))


@pytest.mark.parametrize(("linear", "k"), [(True, 2), (False, 2), (False, 1)])
def test_cartesian_pairs(linear, k):
    """The literal product is the sequence if norm and experts are linear, or if there is one pair; else it is not."""
    found, expected = small("cartesian_pairs", top_k=k), small("cartesian", top_k=k)
    for pairs, block in zip(found.blocks, expected.blocks, strict=True):
        pairs.attention, pairs.attention_norm = block.attention, block.attention_norm
        pairs.ffns[0].A, pairs.ffns[0].B = block.ffns
        pairs.ffns[0].norm_A, pairs.ffns[0].norm_B = block.ffn_norms
        if linear:
            block.ffns[0].experts, block.ffns[1].experts = Linear(N), Linear(N)
            block.ffn_norms[1] = pairs.ffns[0].norm_B = torch.nn.Identity()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    gap = (found.run(x) - expected.run(x)).abs().max()
    assert gap < 1e-10 if linear or k == 1 else gap > 1e-3


@pytest.mark.parametrize("norm_topk", [False, True], ids=["plain", "norm-topk"])
@pytest.mark.parametrize("k", range(1, N + 1))
@pytest.mark.parametrize("name", ["cartesian", "cartesian_parallel", "cartesian_chain", "cartesian_pairs"])
def test_gradients_reach_both_routers(name, k, norm_topk):
    """The loss trains the router of A and that of B, for every k (but for k = 1 where the one weight is always 1)."""
    model = small(name, top_k=k, norm_topk=norm_topk)
    tokens, targets = torch.randint(V, (2, 4, 8))
    model(tokens, targets).loss.backward()
    assert len(model.routers()) == 6
    for router in model.routers():
        assert (router.weight.grad.abs().max() < 1e-12) == (norm_topk and k == 1)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.9, 1.0])
def test_top_p_takes_the_smallest_set(p):
    """The chosen experts reach p together, without the least of them they do not; the balance loss counts just them."""
    router = small("top_p").routers()[0]
    router.p = p
    probs = (2 * torch.randn(50, N, dtype=torch.float64)).softmax(-1)
    weights, experts = router.select(probs)
    for row, weight, chosen in zip(probs, weights, experts, strict=True):
        used = weight > 0
        assert sorted(chosen[used].tolist()) == row.topk(int(used.sum())).indices.sort().values.tolist()
        assert row[chosen[used]].sum() > p - 1e-12 and row[chosen[used]].sum() - weight[used].min() < p
    visits = torch.stack([(experts.eq(e) & (weights > 0)).any(1) for e in range(N)], 1).double()
    load = (visits / visits.sum(1, keepdim=True)).mean(0)
    routing = moe.Routing(probs, weights, experts, probs.log())
    close(router_losses(routing, torch.full((50,), 0.02, dtype=torch.float64))[0], N * (load * probs.mean(0)).sum())


def test_unused_slots_are_cut_off(monkeypatch):
    """Slots of weight 0 reach no matrix product; results and gradients are those of all experts with such weights."""
    rows, product = [], moe.grouped_matmul
    monkeypatch.setattr(moe, "grouped_matmul", lambda x, *rest: rows.append(len(x)) or product(x, *rest))
    experts = small("top_p").blocks[0].ffns[0].experts
    chosen = torch.rand(9, N).argsort(1)
    used = (torch.rand(9, N) < 0.5) | (torch.arange(N) == 0)
    weights = (torch.rand(9, N).double() * used).requires_grad_()
    x, upstream = torch.randn(9, 16, dtype=torch.float64, requires_grad=True), torch.randn(9, 16, dtype=torch.float64)
    found, expected = experts(x, weights, chosen), dense_reference(experts, x, weights * used, chosen)
    close(found, expected)
    inputs = (x, weights, *experts.parameters())
    close(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))
    assert isinstance(experts, UsedExperts) and rows == [used.sum()] * 2


def test_hash_routing_knows_only_the_token():
    """A token visits the same experts in any context, nothing can be re-mixed, and one token can be decoded by itself,
    from any layer on, if its id comes along."""
    model, (tokens, valid), cache = small("hash"), prompts(), Cache()
    out = model(tokens, valid=valid)
    assert out.routing == model.routers() == [] and out.balance_loss == 0
    tables = [block.ffns[0].router.table for block in model.blocks]
    assert all(len(set(row)) == 2 for table in tables for row in table.tolist()) and not tables[0].equal(tables[1])
    last = tokens[ROWS, test_moe.LENGTHS - 1][:, None]
    before = torch.arange(tokens.shape[1]) < test_moe.LENGTHS[:, None] - 1
    model.run(model.embed(tokens), before, cache, tokens=tokens)
    state = model.run(model.embed(last), cache=cache, last=1, write=False, tokens=last)
    step = model.head(model.run(state, cache=cache, first=1, write=False, tokens=last))[:, 0]
    close(step, out.logits[ROWS, test_moe.LENGTHS - 1])
    with pytest.raises(ValueError, match="a hash router goes by token ids: call run"):
        model.run(model.embed(tokens))


@pytest.mark.parametrize("name", PRESETS)
def test_checkpoint(name, tmp_path):
    """A saved model comes back as the class that it was, with the table of a hash router, and trains on."""
    model, (tokens, targets) = small(name).float(), torch.randint(V, (2, 3, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, targets).loss.backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, 1, {"model": vars(model.config), "train": {}}, [], [])
    loaded, _ = checkpoint.load(tmp_path)
    assert type(loaded) is CartesianTransformer and torch.equal(loaded(tokens).logits, model(tokens).logits)
    fresh = build(vars(model.config))
    assert not torch.equal(fresh(tokens).logits, model(tokens).logits)
    assert checkpoint.resume(tmp_path, fresh, torch.optim.AdamW(fresh.parameters()))[0] == 1
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)


def test_presets_match():
    """At the paper's base sizes: 842 million parameters in all, 247 activated. At the toy's, too, all are matched."""
    found = {name: counts(preset(name, MoEConfig(**PAPER))) for name in PRESETS}
    assert {name: round(total / 1e6) for name, (total, _) in found.items() if "dense" not in name} == {
        name: 842 for name in PRESETS if "dense" not in name
    }
    unequal = {"dense_paper": 162, "smoe_top3": 255, "top_p": 842}
    assert {n: a for n, (_, a) in found.items() if round(a / 1e6) not in (247, 248)}.keys() == unequal.keys()
    assert {name: round(found[name][1] / 1e6) for name in unequal} == unequal
    toy = {name: counts(preset(name, MoEConfig(**TOY))) for name in PRESETS}
    assert toy["cartesian"] == (1_419_904, 830_080) and toy["fine_grained"] == (1_419_392, 829_568)
    sweep = [PRESETS[name](MoEConfig(**TOY)) for name in ("cartesian_k1", "cartesian", "cartesian_k4")]
    assert [(c.n_experts, c.top_k, c.d_expert) for c in sweep] == [(4, 1, 64), (8, 2, 32), (16, 4, 16)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("cartesain", MoEConfig(**TOY)), "no preset is called 'cartesain'; there are dense, dense_two"),
        (lambda: preset("cartesian_k1", MoEConfig(**TOY | {"n_experts": 7})), "fine_grained's .* try n_experts 6"),
        (
            lambda: preset("fine_grained_no_shared", MoEConfig(**TOY | {"d_shared": 0})),
            "try d_expert 64 and d_shared 64",
        ),
        (lambda: preset("cartesian", MoEConfig(**TOY | {"d_expert": 1, "d_shared": 1})), "d_shared 1; try d_expert "),
        (lambda: preset("smoe_top3", MoEConfig(**TOY | {"d_expert": 68, "d_shared": 68})), "d_expert 68, .* try "),
        (lambda: CartesianConfig(layer="product"), "layer is 'product'; expected one of moe, cartesian, parallel"),
        (lambda: CartesianConfig(router="random"), "router is 'random'; expected one of none, softmax"),
        (lambda: CartesianConfig(top_p=1.5), "top_p is 1.5; it must be at most 1"),
        (lambda: CartesianConfig(router="none"), "router none needs a shared expert"),
    ],
)
def test_bad_sizes(call, message):
    """What cannot be compared fairly is refused, with the nearest that can."""
    with pytest.raises(ValueError, match=message):
        call()
