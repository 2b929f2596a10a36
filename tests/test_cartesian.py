"""CartesianMoE and what it is compared with: the layers from their equations, routers, presets."""

from dataclasses import asdict, replace

import pytest
import torch
from by_hand import (
    SigmoidRouter,
    V,
    cartesian_block,
    close,
    expert,
    full,
    learning_routers,
    moe_layer,
    reached_by_one_token,
    refused,
    rms_norm,
    route,
    small_preset,
)

import moe
from cartesian import PAPER, TOY, count_parameters
from lab.composing.layers import ComposedConfig, ComposedTransformer
from lab.composing.presets import PRESETS, build_model, count_both, preset
from lab.tools import runs
from moe import Cache, MoEConfig

N = 4  # experts of full size in a small model
TOY_SIZES = MoEConfig(**TOY)
# Presets that have all other layers and routers among them.
ROUTED = ["top_p", "cartesian_parallel", "cartesian_chain", "cartesian_pairs"]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- layers from their equations


def parallel_block(block, x):
    layer = block.ffns[0]
    z = rms_norm(block.ffn_norms[0], x)
    return x + moe_layer(layer.A, z) + moe_layer(layer.B, z)


def chain_block(block, x):
    layer = block.ffns[0]
    u = x + moe_layer(layer.A, rms_norm(layer.norm_A, x))
    return x + moe_layer(layer.B, rms_norm(layer.norm_B, u))


def pairs_block(block, x):
    layer = block.ffns[0]
    A, B = layer.A, layer.B
    z = rms_norm(layer.norm_A, x)
    u = x + moe_layer(A, z)
    v = rms_norm(layer.norm_B, u)
    y = u + expert(B.shared.gate_up.weight, B.shared.down.weight, v)
    total = sum(p for p, i in route(A.router, z))
    shared = expert(A.shared.gate_up.weight, A.shared.down.weight, z)
    for p, i in route(A.router, z):
        alone = x + total * expert(A.experts.gate_up[i], A.experts.down[i], z) + shared
        for q, j in route(B.router, v):
            share = p / total * q
            said = rms_norm(layer.norm_B, alone)
            y = y + share * expert(B.experts.gate_up[j], B.experts.down[j], said)
    return y


BY_HAND = {
    "cartesian": cartesian_block,
    "cartesian_no_shared": cartesian_block,
    "cartesian_parallel": parallel_block,
    "cartesian_chain": chain_block,
    "cartesian_pairs": pairs_block,
}


@pytest.mark.parametrize("name", ["cartesian", "cartesian_pairs", *full(*list(BY_HAND)[1:4])])
def test_block_equals_its_equations(name):
    """A block computes what its equations say, to ten decimals."""
    model = small_preset(name)
    block = model.blocks[0]
    torch.nn.init.zeros_(block.attention.o.weight)  # leaves the feed-forward sub-layers
    x = random(1, 8, 16)
    with torch.no_grad():
        expected = torch.stack([BY_HAND[name](block, token) for token in x[0]])
        close(model.run_blocks(x, last=1)[0], expected)


@pytest.mark.parametrize("name", ["cartesian", *full("hash", *ROUTED)])
def test_residual_init(name):
    """It scales what sub-layers add, that of attention too, and nothing else."""
    weights = []
    for init in (0.5, 0.05):
        torch.manual_seed(0)
        config = preset(name, replace(TOY_SIZES, residual_init=init))
        weights.append(dict(build_model(asdict(config)).named_parameters()))
    adds = [name for name in weights[0] if name.endswith((".o.weight", ".down", ".down.weight"))]
    for name, weight in weights[0].items():
        close(weights[1][name], 0.1 * weight if name in adds else weight, 1e-6)
    assert len(adds) >= 3 * TOY_SIZES.n_layers  # attention, experts, a shared expert


# ---- what every transformer of ours must be


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense_two", "hash", "cartesian", *ROUTED])
def test_padding_and_cache(name):
    """Decoding with a cache, over padded prompts, equals one pass over each prompt alone.

    So no prediction depends on later tokens, on padding, or on other rows.
    """
    model = small_preset(name)
    tokens = torch.randint(V, (3, 11))
    lengths = torch.tensor([1, 7, 5])
    valid = torch.arange(7) < lengths[:, None]
    cache = Cache()
    model.run_blocks(model.embed(tokens[:, :7]), valid, cache, tokens=tokens[:, :7])
    new = tokens[:, 7:]
    logits = model.head(model.run_blocks(model.embed(new), cache=cache, tokens=new))
    for row, n in enumerate(lengths):
        alone = torch.cat([tokens[row, :n], new[row]])[None]
        close(model(alone).logits[0, n:], logits[row])


@pytest.mark.parametrize("name", ["cartesian", *full("dense_two", *ROUTED[1:])])
def test_activated_parameters(name):
    """The activated parameters are those that the gradient of one token reaches."""
    model = small_preset(name)
    assert model.n_params(activated=True) == reached_by_one_token(model)


@pytest.mark.parametrize("name", ["cartesian", *full("cartesian_chain", "cartesian_pairs")])
def test_gradients_reach_both_routers(name):
    """The loss trains the routers of A and B, in three blocks; not if one weight is always 1."""
    for k in (1, 2):
        assert learning_routers(small_preset(name, top_k=k)) == 6
    assert learning_routers(small_preset(name, norm_topk=True)) == 6
    assert learning_routers(small_preset(name, norm_topk=True, top_k=1)) == 0


def test_router_of_your_own():
    """Every model takes another class of router."""
    for name in ("smoe_share", "cartesian", "cartesian_chain"):
        config = PRESETS[name](MoEConfig(d_shared=8))
        model = build_model(asdict(config), router=SigmoidRouter)
        for routing in model(torch.randint(48, (2, 5))).routing:
            scores = routing.logits.sigmoid()
            close(routing.probs, scores / scores.sum(-1, keepdim=True), 1e-6)


# ---- what a product of experts might mean


class LinearExperts(torch.nn.Module):
    """Experts that are matrices."""

    def __init__(self, n):
        super().__init__()
        self.matrix = torch.nn.Parameter(random(n, 16, 16) / 4)

    def forward(self, x, weights, experts):
        return torch.einsum("nk,nkij,nj->ni", weights, self.matrix[experts], x)


def sum_over_pairs(A, B, z, join):
    """sum_ij p_i q_j join(A_i(z), B_j) over the chosen pairs of each token; z (n, D) reaches A."""
    a = A.router(z)
    b = B.router(A(z))
    one = torch.ones(len(z), 1, dtype=z.dtype)
    total = torch.zeros_like(z)
    for i in range(a.experts.shape[1]):
        said = A.experts(z, one, a.experts[:, [i]])
        for j in range(b.experts.shape[1]):
            weight = a.weights[:, [i]] * b.weights[:, [j]]
            total = total + weight * join(said, lambda x, j=j: B.experts(x, one, b.experts[:, [j]]))
    return total


def test_sums_over_pairs():
    """B(A(z)) = sum_ij p_i q_j B_j(A_i(z)) for linear experts, and for no others.

    Were the product elementwise, the sum over pairs would be a product of two sums.
    """
    A, B = small_preset("cartesian_no_shared").blocks[0].ffns
    z = random(9, 16)
    b = B.router(A(z))
    factors = A(z) * B.experts(z, b.weights, b.experts)
    close(sum_over_pairs(A, B, z, lambda said, expert_b: said * expert_b(z)), factors)

    def compose(said, expert_b):
        return expert_b(said)

    assert (B(A(z)) - sum_over_pairs(A, B, z, compose)).abs().max() > 1e-3
    A.experts = LinearExperts(N + 1)
    B.experts = LinearExperts(N + 1)
    close(B(A(z)), sum_over_pairs(A, B, z, compose))


def test_literal_product():
    """The literal product is the sequence if all is linear, or of one pair; else it is not."""
    for case, k in {"linear": 2, "one pair": 1, "otherwise": 2}.items():
        literal = small_preset("cartesian_pairs", top_k=k)
        sequence = small_preset("cartesian", top_k=k)
        for pairs, block in zip(literal.blocks, sequence.blocks, strict=True):
            if case == "linear":
                block.ffns[0].experts = LinearExperts(N)
                block.ffns[1].experts = LinearExperts(N)
                block.ffn_norms[1] = torch.nn.Identity()
            pairs.attention, pairs.attention_norm = block.attention, block.attention_norm
            pairs.ffns[0].A, pairs.ffns[0].B = block.ffns
            pairs.ffns[0].norm_A, pairs.ffns[0].norm_B = block.ffn_norms
        x = random(2, 8, 16)
        gap = (literal.run_blocks(x) - sequence.run_blocks(x)).abs().max()
        assert (gap < 1e-10) == (case != "otherwise"), case


# ---- other routers


def test_top_p_takes_the_smallest_set():
    """The chosen experts reach p together, without the least of them they do not."""
    router = small_preset("top_p").routers()[0]
    for p in (0.1, 0.4, 0.9, 1.0):
        router.p = p
        probs = (2 * random(50, N)).softmax(-1)
        weights, experts = router.select(probs)
        for row, weight, chosen in zip(probs, weights, experts, strict=True):
            used = weight > 0
            best = row.topk(int(used.sum())).indices
            assert set(chosen.tolist()) == set(best.tolist())
            assert weight.sum() > p - 1e-12
            assert weight.sum() - weight[used].min() < p

        # The balance loss counts the chosen experts only: the others name the first one again.
        visits = torch.zeros_like(probs).scatter(1, experts, 1.0)
        assert torch.equal(visits.sum(1), (weights > 0).sum(1))


def test_unused_slots_cost_nothing(monkeypatch):
    """Slots of weight 0 reach no matrix product, and the result is that of all slots."""
    experts = small_preset("top_p").blocks[0].ffns[0].experts
    chosen = torch.rand(9, N).argsort(1)
    used = torch.rand(9, N) < 0.5
    weights = torch.rand(9, N).double() * used
    x = random(9, 16)
    expected = moe.Experts.forward(experts, x, weights, chosen)

    rows = []
    product = moe.grouped_matmul

    def counted(x, weight, ends):
        rows.append(len(x))
        return product(x, weight, ends)

    monkeypatch.setattr(moe, "grouped_matmul", counted)
    close(experts(x, weights, chosen), expected)
    assert rows == [used.sum(), used.sum()]


def test_hash_routing_knows_only_the_token():
    """A token visits the same experts in any context, other ones in each layer."""
    model = small_preset("hash")
    tokens = torch.randint(V, (2, 8))
    out = model(tokens)
    assert out.routing == model.routers() == []
    assert out.balance_loss == 0
    tables = [block.ffns[0].router.table for block in model.blocks]
    assert not tables[0].equal(tables[1])
    for row in torch.cat(tables).tolist():
        assert len(set(row)) == 2
    with refused("a hash router goes by token ids"):
        model.run_blocks(model.embed(tokens))


# ---- presets and old runs


@pytest.mark.full
def test_presets_match():
    """842 million parameters in all and 247 activated, as in the paper, where it is meant."""
    others = {"dense_paper": 162, "smoe_top3": 255, "top_p": 842}
    for name in PRESETS:
        total, activated = count_both(preset(name, MoEConfig(**PAPER)))
        assert round(total / 1e6) == 842 or name.startswith("dense")
        assert activated / 1e6 == pytest.approx(others.get(name, 247.4), abs=0.5)
    toy = TOY_SIZES
    assert count_parameters(preset("cartesian", toy)) == (1_419_904, 830_080)
    assert count_parameters(preset("fine_grained", toy)) == (1_419_392, 829_568)
    sizes = {"cartesian_k1": (4, 1, 64), "cartesian": (8, 2, 32), "cartesian_k4": (16, 4, 16)}
    for name, expected in sizes.items():
        config = preset(name, toy)
        assert (config.n_experts, config.top_k, config.d_expert) == expected


@pytest.mark.parametrize("name", ["cartesian", *full("hash", "cartesian_pairs", "fine_grained")])
def test_saved_run(name, tmp_path):
    """A saved model comes back as the class that it was, with the table of a hash router.

    A config.json with "layer" in it, as of old, describes the same model.
    """
    model = small_preset(name).float()
    tokens = torch.randint(V, (2, 8))
    settings = {"model": asdict(model.config), "train": {}}
    runs.save_run(tmp_path, model, torch.optim.AdamW(model.parameters()), 0, settings, [], [])
    models = [runs.load_run(tmp_path)[0]]
    assert type(models[0]) is type(model)
    old = {"fine_grained": "moe", "cartesian": "cartesian"}
    if name in old:
        sizes = settings["model"] | {"layer": old[name], "router": "softmax", "top_p": 0.4}
        sizes.pop("n_sublayers", None)
        models.append(build_model(sizes))
        models[1].load_state_dict(model.state_dict())
        assert type(models[1]) is ComposedTransformer
    for loaded in models:
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


REFUSED = {  # message -> what is refused
    "no preset is called 'cartesain'; there are dense": lambda: preset("cartesain", TOY_SIZES),
    "k1 has -7.5% parameters": lambda: preset("cartesian_k1", replace(TOY_SIZES, n_experts=7)),
    "is impossible at n_experts 8": lambda: preset("cartesian", replace(TOY_SIZES, d_expert=1)),
    "unknown layer 'product'": lambda: ComposedConfig(layer="product"),
    "unknown router 'random'": lambda: ComposedConfig(router="random"),
    "top_p is 1.5; it must be at most 1": lambda: ComposedConfig(top_p=1.5),
    "router none needs a shared expert": lambda: ComposedConfig(router="none"),
    "SigmoidRouter cannot take the place of router 'hash'": lambda: build_model(
        {"layer": "moe", "router": "hash"}, SigmoidRouter
    ),
}


@pytest.mark.parametrize("message", full(*REFUSED))
def test_refused(message):
    """What cannot be compared fairly, or is no model, is refused."""
    with refused(message):
        REFUSED[message]()
