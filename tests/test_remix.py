"""C3PO: what may change at test time, and what may not; the exact form beside full forwards; each surrogate by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from test_moe import LENGTHS, ROWS, VARIANTS, E, V, close, pathway, prompts, tiny

import remix as c3po
from moe import Cache, Experts, MoE, MoETransformer, Remix, Router
from remix import ReferenceSet, RemixConfig, Tail, critical_layers, find, padded, remix

METHODS = ["mode_finding", "kernel_regression", "ngd", "oracle"]
CASES = "default all 012; norm-topk 0,2 02; grouped-query last:1 2; dense-layers first:1 0; dense-layers all 01; "
CASES += "shared middle:1 1; top-all last:2 12; two-routers 0,2 0145"  # variant, critical layers, their routers


def every(names, *values):
    """A test for every combination."""
    return pytest.mark.parametrize(names, list(itertools.product(*values)))


class TwoRouters(MoETransformer):
    """Two MoE sub-layers in a block, as in a Cartesian model."""

    def make_ffns(self, layer):
        return [MoE(Router(self.config), Experts(self.config)) for _ in range(2)]


def build(name="default", **changes):
    """One of VARIANTS, or a model with two routers in a block."""
    model = TwoRouters(tiny().config).double() if name == "two-routers" else tiny(**VARIANTS[name] | changes)
    for decided in (*model.routers(), model.unembedding):
        torch.nn.init.normal_(decided.weight, std=0.5)
    return model.eval()


def world(name="default", token="last", **changes):
    """A model, twelve references of which it answers nine right, and five other prompts, of one to five tokens."""
    model, size = build(name, **changes), 4 if token == "all" else None
    known = [torch.randint(1, V, (size or 2 + i % 6,)) for i in range(12)]
    asked = [F.pad(torch.randint(V, ((size or i) - 1,)), (1, 0)) for i in range(1, 6)]  # start with 0: new
    tokens, lengths = padded(known, V)
    labels = model(tokens, valid=torch.arange(tokens.shape[1]) < lengths[:, None]).logits.argmax(2)
    labels = (labels[range(12), lengths - 1] + torch.tensor([1, 0, 0, 0] * 3)) % V
    return model, ReferenceSet.build(model, known, labels, token=token), asked


def run(model, references, asked, method="ngd", steps=3, **changes):
    """remix; the oracle is told that the last token of a prompt follows once more."""
    labels = torch.stack([row[-1] for row in asked]) if method == "oracle" else None
    return remix(model, asked, references, method=method, labels=labels, steps=steps, **changes)


def naive(model, row, routers, token="last", w=None):
    """A full forward: logits (V,) after one prompt (T,), and rows (R, E) of routers at a token, where w is imposed."""
    T, at = len(row), torch.arange(len(row))
    at = at == {"last": T - 1, "middle": T // 2, "first": 0, "all": at}[token]
    parts = () if w is None else w.view(1, -1, len(routers), E).expand(1, T, -1, -1).unbind(2)  # (1, T, E) for each
    out = model(row[None], remix=Remix(dict(zip(routers, parts, strict=True)), at[None]) if parts else None)
    return out.logits[0, -1], torch.stack([out.routing[r].probs[at] for r in routers], 1).flatten(0, 1)


@every(("case", "token"), CASES.split("; "), ["last", "middle", "first", "all"])
def test_exact_form(case, token):
    """From the imposed token on, through the layers from the first critical one up: that gives the logits and the
    gradients of full forwards. Without a pathway it is the model's own, and to impose that one changes nothing."""
    name, layers, routers = case.split()
    model, tokens, routers = build(name), prompts()[0], [*map(int, routers)]
    lengths = torch.tensor([7, 7, 7] if token == "all" else [1, 7, 4])
    tail, cut = Tail(model, critical_layers(model, layers), token), [tokens[i, :n] for i, n in enumerate(lengths)]
    own, logits = tail.base(prefix := tail.cut(tokens, lengths))
    close((tail(prefix), tail(prefix, own)), (logits, logits))
    w = torch.randn_like(own).softmax(-1).requires_grad_()
    found, full = tail(prefix, w), torch.stack([naive(model, cut[i], routers, token, w[i])[0] for i in ROWS])
    (found_gradient,), (gradient,) = (torch.autograd.grad(each, w, logits) for each in (found, full))
    close((found, found_gradient), (full, gradient), 1e-9)
    assert token != "last" or (gradient.abs().amax(2) > 1e-6).all()
    for i, row in enumerate(cut):
        close((logits[i], own[i]), naive(model, row, routers, token))


@every(("case", "method"), ["default last 0,2 02", "two-routers last last:2 2345", "default all 1 1"], METHODS)
def test_result(case, method):
    """Full forwards along the pathway that comes back say what comes back. No steps, no change. The oracle gains."""
    name, token, layers, routers = case.split()
    (model, references, asked), routers = world(name, token), [*map(int, routers)]
    result = run(model, references, asked, method, token=token, layers=layers)
    for w, logits in ((result.pathway, result.logits), (result.pathway_before, result.logits_before)):
        close(logits, torch.stack([naive(model, row, routers, token, w[i])[0] for i, row in enumerate(asked)]))
    assert (result.pathway - result.pathway_before).abs().amax() > 1e-3
    if method == "oracle":
        before, after = (each.log_softmax(1)[range(5), [row[-1] for row in asked]] for each in result[2:4])
        close((-before, -after), (result.losses[:, 0], result.losses.amin(1)))
        assert (after > before + 0.01).all() and result.neighbours is None
    still = run(model, references, asked, method, 0, token=token, layers=layers)
    assert method == "kernel_regression" or torch.equal(still.pathway, result.pathway_before)


@every(("how", "among"), ["ngd", "kernel_regression", "kernel_regression one-expert"], ["vocabulary", "options"])
def test_neighbours_are_answered_better(how, among):
    """The best pathway tried comes back, never worse than the model's own: full forwards over the neighbours agree."""
    model, r, asked = world(**{"top_k": 1, "norm_topk": True} if "one" in how else {})
    r.options = (r.labels[:, None] + torch.arange(V if among == "vocabulary" else 2)) % V  # the label comes first
    result = run(model, r, asked, how.split()[0], k=2, loss=among)
    before, after = result.losses[:, 0], result.losses.amin(1)
    for i, (index, weight) in enumerate(zip(*result.neighbours[:2], strict=True)):
        for w, loss in ((result.pathway_before[i], before[i]), (result.pathway[i], after[i])):
            logits = [naive(model, r.tokens[j, : r.lengths[j]], range(3), w=w)[0][r.options[j]] for j in index]
            close((weight * -torch.stack(logits).log_softmax(1)[:, 0]).sum(), loss, 1e-9)
    assert (after <= before).all() and (after < 0.9 * before).any()


@every(("how", "core"), [*METHODS, "ngd raw", "ngd plain", "ngd raw plain"], [None, 1, 3])
def test_rows_are_distributions(how, core):
    """Every imposed row is a distribution. Core experts share out what they had together; all others keep theirs."""
    changes = ({"space": "raw"} if "raw" in how else {}) | ({"rule": "plain", "lr": 50.0} if "plain" in how else {})
    before, after = run(*world(), how.split()[0], core=core, layers="last:2", **changes)[:2]
    inside = before >= before.topk(core or E).values[..., -1:]  # (n, R, E)
    close((after.sum(2), (after * inside).sum(2)), (before.sum(2) * 0 + 1, (before * inside).sum(2)))
    assert (after >= 0).all() and torch.equal(after[~inside], before[~inside])
    assert ((after - before).abs().amax() > 1e-3) == (core != 1)  # one expert alone has nobody to share with


def test_kernels():
    """Each kernel at distances 1, 2, 4 by its formula: the width is the median of those who are there, the sum is 1."""
    distance, cosine = torch.tensor([[1.0, 2.0, 4.0, torch.inf]]), torch.tensor([[0.5, 0.0, -1.0, 0.9]])
    gaussian = [math.exp(-(r**2) / 2) for r in (0.5, 1, 2)]
    matern = [(1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r) for r in (0.5, 1, 2)]
    expected = {"gaussian": gaussian, "matern": matern, "polynomial": [2.25, 1, 0], "linear": [1, 0, 0]}
    for name, weights in expected.items():
        close(c3po.kernel(name, distance, cosine), torch.tensor([[*weights, 0]]) / sum(weights), 1e-6)
    close(c3po.kernel("gaussian", distance, cosine, 4.0)[0, :2].log().diff().item(), -3 / 32, 1e-6)
    for edge, weight in ((0.0, 0.5), (torch.inf, 0.0)):  # all at the sample's place; nobody
        assert c3po.kernel("gaussian", torch.full((1, 2), edge), cosine[:, :2]).tolist() == [[weight, weight]]


def test_mode_finding_by_hand():
    """From (0.5, 0.5), the two nearest of four are (0.7, 0.3) and (0.2, 0.8), at squared distances 0.08 and 0.18. With
    2 sigma^2 = 0.1 / ln 3 they weigh 3 to 1, so their mean is 0.75 * 0.7 + 0.25 * 0.2 = 0.575; half of it is taken."""
    others = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.0, 1.0]], dtype=torch.float64)[:, None]  # (4, 1, 2)
    core, everyone = c3po.core_experts(torch.full((1, 1, 2), 0.5).double()), torch.ones(1, 4, dtype=torch.bool)
    config = RemixConfig(k=2, steps=1, sigma=math.sqrt(0.05 / math.log(3)))
    close(c3po.mode_finding(core, others, everyone, config)[0, 0, 0].item(), 0.5375)
    for allowed, goal in ((everyone, 0.7), (torch.tensor([[True, False, False, False]]), 0.9)):  # the nearest alone:
        found = c3po.mode_finding(core, others, allowed, replace(config, k=1, steps=3))  # half the way, half the rest
        close(found[0, 0].tolist(), [goal - (goal - 0.5) / 8, 1 - goal + (goal - 0.5) / 8])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kernel_regression_by_hand(alpha):
    """If the neighbours are answered best with 3 tenths of the sample's own row and 7 of theirs, that it is."""
    own, mean = torch.rand(2, 3, 2, 4, dtype=torch.float64).softmax(-1)
    target = alpha * own + (1 - alpha) * mean
    w, losses = c3po.kernel_regression(c3po.core_experts(own), mean, lambda w: (w - target).square().sum((-1, -2)))
    close((w, losses), (target, torch.stack([(own - target).square().sum((1, 2)), torch.zeros(3)], 1)))


@every(("rule", "space", "core"), ["normed", "plain"], ["logits", "raw"], [None, 2])
def test_ngd_by_hand(rule, space, core):
    """Descent on |w - target|^2 equals a loop with the softmax's gradient written out, one sample at a time."""
    start, target = torch.rand(2, 3, 2, 4, dtype=torch.float64).mul(3).softmax(-1)
    config = RemixConfig(rule=rule, space=space, lr=0.4, steps=7)
    best, losses = c3po.ngd(c3po.core_experts(start, core), lambda w: (w - target).square().sum((1, 2)), config)
    for i, (w, goal) in enumerate(zip(start.numpy(), target.numpy(), strict=True)):
        free, passed = w >= np.sort(w, 1)[:, [-(core or 4)]], []  # (R, E) the core experts
        mass = (w * free).sum(1, keepdims=True)
        for rate in [0.4 * (0.001 + 0.999 * (1 + math.cos(math.pi * step / 7)) / 2) for step in range(8)]:
            passed.append((((w - goal) ** 2).sum(), w))
            g = 2 * (w - goal)
            g = free * w * (g - (free * w * g).sum(1, keepdims=True) / mass) if space == "logits" else g
            g = rate * g / (np.linalg.norm(g) if rule == "normed" else 1)
            moved = free * (w * np.exp(-g) if space == "logits" else np.maximum(w - g, 0))
            w = np.where(free, mass * moved / moved.sum(1, keepdims=True), w)
        np.testing.assert_allclose(losses[i], [loss for loss, _ in passed], atol=1e-12)
        np.testing.assert_allclose(best[i], min(passed, key=lambda pair: pair[0])[1], atol=1e-12)
    assert (losses.amin(1) < losses[:, 0]).all()


def test_tfidf_by_hand():
    """Prompts 1 3 1, and 2 1, and 3. Two of three hold 1, two hold 3, one holds 2; two end with 1; no pair is in two.
    So as tokens they are (2a, 0, a), and (a, b, 0), and (0, 0, a), before each is scaled to length 1."""
    (tokens, lengths), a, b = padded([[1, 3, 1], [2, 1], [3]], V), 1 + math.log(4 / 3), 1 + math.log(4 / 2)
    norm, whole, parts = math.hypot, (tokens, lengths), [(tokens[i], lengths[i]) for i in (slice(1), slice(1, 3))]
    for kind, expected in (
        ("tfidf", [2 * a * a / (norm(2 * a, a) * norm(a, b)), a / norm(2 * a, a)]),
        ("tfidf-places", [a * a / (norm(b, b, a) * norm(b, a)), 0]),
        ("tfidf-bigrams", [2 * a * a / (norm(2 * a, a, b, b) * norm(a, b, b)), a / norm(2 * a, a, b, b)]),
    ):
        np.testing.assert_allclose(c3po.product(*c3po.tfidf(kind, *parts, whole)), [expected], atol=1e-12)


@pytest.mark.parametrize("layer", [0, 2, None])
@torch.no_grad()
def test_embeddings(layer):
    """Near can mean alike in the state of the last token as it enters a layer, or alike in the critical pathway."""
    (model, r, asked), name = world(), "pathway" if layer is None else f"hidden:{layer}"
    vectors = torch.from_numpy(np.concatenate(c3po.embed(Tail(model, [1, 2]), name, r, *padded(asked, V))))
    for i, row in enumerate([*asked, *(r.tokens[i, :n] for i, n in enumerate(r.lengths))]):
        state = naive(model, row, [1, 2])[1] if layer is None else model.run(model.embed(row[None]), last=layer)[0, -1]
        close(vectors[i], F.normalize(state.flatten(), dim=0))


def test_find_by_hand():
    """A sample at 0 degrees of a circle, references at 10 (answered wrong), 20 (the same prompt), 30, 40, 50, ..."""
    model, r, _ = world()
    angle, question = torch.arange(10, 130, 10).deg2rad(), (r.tokens[1:2, : r.lengths[1]], r.lengths[1:2])
    r = replace(r, correct=torch.arange(12) > 0, embeddings=torch.stack([angle.cos(), angle.sin()], 1))

    def found(some=range(12), **changes):
        config, allowed = RemixConfig(embedding="own", k=2, sigma=1.0), torch.tensor([[i in some for i in range(12)]])
        return find(Tail(model, [0]), r, *question, replace(config, **changes), allowed, torch.tensor([[3.0, 0.0]]))

    near, (a, b) = found(), (math.exp(math.cos(math.radians(d))) for d in (30, 40))  # squared distance: 2 - 2 cos
    assert near.index.tolist() == [[2, 3]] and near.duplicates == 1 and near.allowed[0].nonzero()[0] == 2
    close(near.weight[0].tolist(), [a / (a + b), b / (a + b)], 1e-6)
    assert found(correct=False, duplicate=1.1).index.tolist() == [[0, 1]]
    assert found((0, 1, 2, 5)).index.tolist() == [[2, 5]] and found((0, 1, 5)).index.tolist() == [[5, -1]]
    for degrees, index in ((55, [2, 3, 4]), (35, [2]), (25, [-1])):
        near = found(epsilon=2 * math.sin(math.radians(degrees) / 2))
        assert near.index.tolist() == [index] and near.weight.sum().item() == pytest.approx(float(degrees > 25))


@pytest.mark.parametrize("method", ["ngd", "kernel_regression", "mode_finding"])
def test_nobody_near(method):
    """A sample in whose ball nobody is keeps the model's pathway exactly, beside others that do not."""
    model, references, asked = world()
    references.embeddings, own = torch.eye(13)[:12], torch.eye(13)[[12, 1, 12, 12, 12]]
    result = run(model, references, asked, method, embedding="own", epsilon=1.0, embeddings=own, batch=2)
    assert result.neighbours.index.tolist() == [[-1], [1], [-1], [-1], [-1]]
    same = (result.pathway == result.pathway_before).flatten(1).all(1)
    assert same[[0, 2, 3, 4]].all() and (method == "kernel_regression" or not same[1])
    close(result.logits[same], result.logits_before[same])


@pytest.mark.parametrize("method", METHODS)
def test_batches_do_not_matter(method):
    """Each sample is re-mixed for itself: alone or among others, in any order, however many prefixes are kept."""
    (model, r, asked), may, steps = world(), torch.rand(5, 12) < 0.8, 30 if method == "mode_finding" else 3
    whole = run(model, r, asked, method, steps, k=2, allowed=may)  # in 30 steps, some come to rest before others
    for batch, megabytes, order in ((1, 512.0, [0, 1, 2, 3, 4]), (2, 0.01, [3, 0, 4, 2, 1]), (1, 0.0, [0, 1, 2, 3, 4])):
        changes = {"batch": batch, "max_memory": megabytes, "allowed": may[order]}
        again = run(model, r, [asked[i] for i in order], method, steps, k=2, **changes)
        close((again.pathway, again.logits), (whole.pathway[order], whole.logits[order]), 1e-9)
        if method == "ngd" and batch == 1:  # of five times two, the first of each has to be made, or all
            assert again.hits * 10 == pytest.approx(10 - len(whole.neighbours.index.unique()) if megabytes else 0)


def test_kept_prefixes():
    """With room for two prefixes, the one not asked for longest goes: 0 and 1 come, 0 is there, 2 takes the place of 1,
    0 is there, 1 takes the place of 2, both are there. What was kept is what would be made."""
    model, references, _ = world(token="all")
    new = (tail := Tail(model, [1])).cut(references.tokens, references.lengths)
    size = sum(part[0].nbytes for part in new)
    for room, hits in ((2.5, [0, 0, 1, 1, 2, 2, 4]), (0, [0] * 7), (99, [0, 0, 1, 1, 2, 3, 5])):
        prefixes = c3po.Prefixes(tail, references, room * size)
        for index, hit in zip(([0], [1], [0], [2], [0], [1], [1, 0]), hits, strict=True):
            close(tuple(prefixes(index)), tuple(part[index] for part in new))
            assert prefixes.hits == hit and prefixes.size == size * len(prefixes.kept) <= room * size


@pytest.mark.parametrize("method", METHODS)
def test_no_trace(method):
    """The model stays as it was, and answers the same again: in evaluation or in training, with dropout or not."""
    (model, references, asked), results = world(dropout=0.5), []
    before = [(p.detach().clone(), p.requires_grad_(i != 1).requires_grad) for i, p in enumerate(model.parameters())]
    for training in (True, False, True):
        results.append(run(model.train(training), references, asked, method).logits)
        assert torch.equal(results[-1], results[0]) and all(part.training == training for part in model.modules())
        for parameter, (weight, learns) in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, weight) and parameter.requires_grad == learns and parameter.grad is None


def test_reference_set(tmp_path):
    """It knows what full forwards know, and comes back from its file whole, where labels were a column of a table."""
    (model, r, asked), path = world(), tmp_path / "references"
    known, labels = [r.tokens[i, :n] for i, n in enumerate(r.lengths)], r.labels
    said, own = map(torch.stack, zip(*(naive(model, row, range(3)) for row in known), strict=True))
    assert torch.equal(r.correct, said.argmax(1) == labels) and r.correct.sum() == 9
    close(r.pathways[:, 0], own)
    table = torch.stack([labels, torch.cat([said[:1].argmax(1), said[1:].argmin(1)])], 1)  # all but the first: easy
    made = ReferenceSet.build(model, known, table[:, 0], table.flip(1), asked, torch.randn(3, 12).T)
    assert made.correct.tolist() == [False] + [True] * 11
    made.save(path)
    again = ReferenceSet.load(path, model)
    assert [*tmp_path.iterdir()] == [path] and vars(again).keys() == vars(made).keys()
    for a, b in zip(vars(made).values(), vars(again).values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    model.blocks[1].ffns[0].experts.down.data[0, 0, 0] += 1e-9
    with pytest.raises(ValueError, match="references was made by another model"):
        ReferenceSet.load(path, model)
    safetensors.torch.save_file({"tokens": torch.zeros(2), "weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="references is not a reference set"):
        ReferenceSet.load(path, model)


SETTINGS = {
    "k is 10, but there are 9 usable": {"k": 10}, "k is 0; .* at least 1": {"k": 0}, "core is 7, .* 6": {"core": 7},
    "mean kernel_regression[?]": {"method": "kernel_regresion"}, "mean gaussian[?]": {"kernel": "gauss"},
    "mean tfidf[?]": {"embedding": "tfdif"}, "mean last[?]": {"token": "lsat"}, "ask for first": {"token": "first"},
    "'hidden:3'; .* hidden:2": {"embedding": "hidden:3"}, "needs arrays": {"embedding": "own"}, "alpha": {"alpha": 1.5},
    "'top:2'; .* last:2": {"layers": "top:2"}, "'last:4'": {"layers": "last:4"}, "0 to 2": {"layers": "0,3"},
    "needs the options": {"loss": "options"}, "oracle .*options": {"method": "oracle", "loss": "options"},
}  # fmt: skip
BAD = [  # a call with a model m, its references r and prompts p, and what is said of it
    (lambda m, r, p: ReferenceSet.build(m, [], []), "the reference set is empty"),
    (lambda m, r, p: ReferenceSet.build(m, p, [0, 1, 2, 3, V]), f"labels go from 0 to {V}; .* 0 to {V - 1}"),
    (lambda m, r, p: ReferenceSet.build(m, p, [1] * 5, [[1, 2]] * 4 + [[2, 3]]), "not among its options"),
    (lambda m, r, p: ReferenceSet.build(m, p, [1] * 5, token="all"), "prompts of one length; .* 1 to 5"),
    (lambda m, r, p: ReferenceSet.build(m, p, [1] * 5, token="lats"), "'lats'; did you mean last"),
    (lambda m, r, p: ReferenceSet.load("nowhere", m), "no such reference set: nowhere"),
    (lambda m, r, p: ReferenceSet.load(__file__, m), "test_remix.py is not a reference set"),
    (lambda m, r, p: run(tiny(dense_layers=(0, 1, 2)), r, p), "no routers .*nothing to re-mix"),
    (lambda m, r, p: run(tiny(), r, p), "made by another model"),
    (lambda m, r, p: run(m, replace(r, correct=r.correct & False), p), "none of the 12 references right"),
    (lambda m, r, p: run(m, r, [*p, r.tokens[1, :3]]), "1 of 6 prompts are references too.* prompt .5"),
    (lambda m, r, p: run(m, r, [[1], []]), "none empty"),
    (lambda m, r, p: run(m, r, [[1, V]]), f"tokens go from 1 to {V}; .* 0 to {V - 1}"),
    (lambda m, r, p: run(*world(token="all")[:2], p[2:3], token="all"), "length"),
    (lambda m, r, p: remix(m, p, method="oracle"), "the oracle needs the labels of the samples"),
    *((lambda m, r, p, y=y: remix(m, p, method="oracle", labels=y), "labels") for y in (torch.tensor([V] * 5), ROWS)),
    *((lambda m, r, p, x=x: remix(m, p, r, method=x, labels=[1] * 5), f"{x} may not see") for x in METHODS[:3]),
    *((lambda *_, x=x: run(*world(top_k=1, norm_topk=True), x), f"{x}: .* gradient zero") for x in METHODS[2:]),
    *((lambda *world, changes=changes: run(*world, **changes), message) for message, changes in SETTINGS.items()),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(call, message):
    """What cannot be re-mixed is refused in one line, with what was found and what would do."""
    with pytest.raises(ValueError, match=message) as error:
        call(*world())
    assert "\n" not in str(error.value)


def test_prefix_tuning():
    """Prefix tuning is a Cache whose keys and values are learnt: in every layer they get gradients, and they steer."""
    model, (tokens, valid) = tiny(n_kv_heads=2), prompts()

    def loss(learnt):  # keys and values of three layers, (G, S, C) each, the same for all prompts
        keys, values = (dict(enumerate(part[:, None].expand(-1, 3, -1, -1, -1))) for part in learnt)
        x = model.run(model.embed(tokens), valid, Cache(keys, values, torch.ones(3, 4, dtype=torch.bool)))
        return F.cross_entropy(model.head(x[ROWS, LENGTHS - 1]), ROWS)

    learnt = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(learnt), learnt)
    assert (gradient.abs().amax(-1) > 1e-9).all() and loss(learnt - 0.1 * gradient) < loss(learnt) - 1e-3


def test_soft_prompt():
    """A soft prompt is embeddings put in front. Where they are those of tokens, the tokens might as well be there."""
    model, (tokens, valid), hard = tiny(), prompts(), torch.randint(V, (3, 2))
    soft, valid, remixed = model.embed(hard).detach(), F.pad(valid, (2, 0), value=True), Remix(pathway(model, 1))
    found = model.head(model.run(torch.cat([soft.requires_grad_(), model.embed(tokens)], 1), valid, remix=remixed))
    close(found, model(torch.cat([hard, tokens], 1), valid=valid, remix=remixed).logits)
    assert (torch.autograd.grad(found[ROWS, LENGTHS + 1].square().sum(), soft)[0].abs().amax(2) > 1e-9).all()
