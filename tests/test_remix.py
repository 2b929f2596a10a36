"""C3PO: what may change at test time, and what may not; every method beside its plain form."""

import math
from dataclasses import replace

import by_hand
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from by_hand import answer_along, close
from test_moe import VARIANTS, E, V, tiny

from moe import Experts, Imposed, MoE, MoETransformer, Router
from pathways import (
    Prefixes,
    ReferenceSet,
    Tail,
    critical_layers,
    find_neighbours,
    frozen,
    kernel,
    near_copies,
    padded,
    similarity,
)
from remix import RemixConfig, core_experts, kernel_regression, mode_finding, ngd, remix

METHODS = ["ngd", "kernel_regression", "mode_finding"]
methods = pytest.mark.parametrize("method", METHODS)
N_ROUTERS = 3


class TwoRouters(MoETransformer):
    """Two MoE sub-layers in a block, as in a Cartesian model."""

    def make_ffns(self, layer):
        return [MoE(Router(self.config), Experts(self.config)) for _ in range(2)]


def make_model(variant="default", **changes):
    """A small model of a variant, or with two routers in a block, with decided routers."""
    if variant == "two-routers":
        model = TwoRouters(tiny().config).double()
    else:
        model = tiny(**VARIANTS[variant] | changes)
    for module in (*model.routers(), model.unembedding):
        torch.nn.init.normal_(module.weight, std=0.5)
    return model.eval()


def world(token="last", **changes):
    """A model, twelve references of which it answers nine right, five other prompts of 1 to 5."""
    model = make_model(**changes)
    solved, asked = [], []
    for i in range(12):
        length = 4 if token == "all" else 2 + i % 6
        solved.append(torch.randint(1, V, (length,)))
    for i in range(1, 6):
        length = 4 if token == "all" else i
        prompt = torch.randint(V, (length,))
        prompt[0] = 0  # no reference starts so
        asked.append(prompt)
    labels = torch.stack([answer_along(model, prompt)[0].argmax() for prompt in solved])
    labels[::4] = (labels[::4] + 1) % V  # three are answered wrong
    return model, ReferenceSet.build(model, solved, labels, token=token), asked


def prompts_of(references):
    """The prompts of a reference set without padding."""
    rows = zip(references.tokens, references.lengths, strict=True)
    return [row[:length] for row, length in rows]


def full_forward(model, prompt, routers, at, w=None):
    """A forward pass of one prompt (T,): logits (V,), and rows of routers at some tokens."""
    T = len(prompt)
    imposed = None
    if w is not None:
        rows = w.view(1, -1, len(routers), E).expand(1, T, -1, -1).unbind(2)
        imposed = Imposed(dict(zip(routers, rows, strict=True)), at[None])
    out = model(prompt[None], imposed=imposed)
    pathway = torch.stack([out.routing[router].probs[at] for router in routers], 1)
    return out.logits[0, -1], pathway.flatten(0, 1)


# ---- the exact form


@pytest.mark.parametrize("token", ["last", "middle", "first", "all"])
@pytest.mark.parametrize(
    ("variant", "layers", "routers"),
    [
        ("default", "all", [0, 1, 2]),
        ("norm-topk", "0,2", [0, 2]),
        ("grouped-query", "last:1", [2]),
        ("dense-layers", "first:1", [0]),
        ("shared", "middle:1", [1]),
        ("top-all", "last:2", [1, 2]),
        ("two-routers", "0,2", [0, 1, 4, 5]),
    ],
)
def test_tail_is_exact(variant, layers, routers, token):
    """One token through the layers above gives the logits and gradients of full forwards."""
    model = make_model(variant)
    lengths = torch.tensor([7, 7, 7] if token == "all" else [1, 7, 4])
    tokens = torch.randint(V, (3, 7))
    tail = Tail(model, critical_layers(model, layers), token)
    prefix = tail.cut(tokens, lengths)
    own, logits = tail.own(prefix)
    # To impose nothing, or the model's own pathway, changes nothing.
    close((tail(prefix), tail(prefix, own)), (logits, logits))
    # Another pathway: the same logits, the same gradients.
    w = torch.randn_like(own).softmax(-1).requires_grad_()
    full = []
    for i, length in enumerate(lengths):
        prompt = tokens[i, :length]
        place = {"last": length - 1, "middle": length // 2, "first": 0}.get(token)
        at = torch.ones(length, dtype=torch.bool)
        if place is not None:
            at = torch.arange(length) == place
        full.append(full_forward(model, prompt, routers, at, w[i])[0])
        close((logits[i], own[i]), full_forward(model, prompt, routers, at))
    full, short = torch.stack(full), tail(prefix, w)
    (expected,) = torch.autograd.grad(full, w, logits)
    (gradient,) = torch.autograd.grad(short, w, logits)
    close((short, gradient), (full, expected), 1e-9)


@methods
def test_result_is_what_full_forwards_say(method):
    """Full forwards along the pathways that come back give the logits that come back."""
    model, references, asked = world()
    result = remix(model, asked, references, method=method, steps=3)
    for i, prompt in enumerate(asked):
        close(result.logits[i], answer_along(model, prompt, result.pathway[i])[0])
        own = answer_along(model, prompt)
        close((result.logits_before[i], result.pathway_before[i]), own)
    assert (result.pathway - result.pathway_before).abs().amax() > 1e-3


# ---- each method beside its plain form


def setting():
    """One prompt, its neighbours and the pathways of all references, by full forwards."""
    model, references, asked = world()
    result = remix(model, asked[2:3], references, method="mode_finding", steps=0, k=2)
    near = result.neighbours
    prompts = [prompts_of(references)[i] for i in near.index[0]]
    labels = references.labels[near.index[0]]

    def loss(w):
        return by_hand.neighbour_loss(model, w, prompts, labels, near.weight[0])

    return model, references, asked[2:3], near, loss


def test_ngd_by_hand():
    """NGD equals gradient descent through full forwards of the neighbours."""
    model, references, asked, _, loss = setting()
    result = remix(model, asked, references, method="ngd", steps=4, lr=0.3, k=2)
    expected = by_hand.ngd(result.pathway_before[0], loss, steps=4, lr=0.3)
    close(result.pathway[0], expected, 1e-8)
    assert result.losses.shape == (1, 5)
    close(result.losses.amin(), loss(expected), 1e-8)
    assert result.losses.amin() < result.losses[0, 0]


def test_kernel_regression_by_hand():
    """Kernel regression equals the search over eleven mixtures by full forwards."""
    model, references, asked, near, loss = setting()
    result = remix(model, asked, references, method="kernel_regression", k=2)
    own = result.pathway_before[0]
    neighbours = references.pathways[near.index[0], 0]  # (k, R, E)
    mean = (near.weight[0, :, None, None] * neighbours).sum(0)
    close(result.pathway[0], by_hand.kernel_regression(own, mean, loss), 1e-8)
    assert result.losses.shape == (1, 11)


def test_mode_finding_by_hand():
    """Mode finding equals the walk among the usable pathways, one prompt at a time."""
    model, references, asked, near, _ = setting()
    result = remix(model, asked, references, method="mode_finding", k=2, steps=3, alpha=0.4)
    others = references.pathways[near.usable[0], 0]
    expected = by_hand.mode_finding(result.pathway_before[0], others, k=2, steps=3, alpha=0.4)
    close(result.pathway[0], expected, 1e-8)
    assert result.losses.shape == (1, 0)


def test_a_surrogate_of_your_own():
    """`method` also takes a function; gradients are on inside of it."""
    model, references, asked = world()

    def one_step(core, loss, near, config):
        z = core.start.log().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(core.softmax(z)).sum(), z)
        return core.softmax(z - 0.1 * gradient.sign())

    result = remix(model, asked, references, method=one_step)
    close(result.pathway.sum(-1), torch.ones(5, N_ROUTERS).double())
    assert result.losses.shape == (5, 1)
    assert (result.pathway != result.pathway_before).any()


@pytest.mark.parametrize("method", ["ngd", "kernel_regression"])
def test_neighbours_are_answered_better(method):
    """The best pathway tried comes back, never worse than the own one."""
    model, references, asked = world()
    result = remix(model, asked, references, method=method, k=2)
    before, least = result.losses[:, 0], result.losses.amin(1)
    assert (least <= before).all() and (least < 0.9 * before).any()


def test_loss_over_options():
    """With loss options, cross-entropy is over the options of each reference."""
    model, references, asked = world()
    references.options = (references.labels[:, None] + torch.arange(2)) % V
    result = remix(model, asked, references, loss="options", k=2, steps=0)
    prompts, near = prompts_of(references), result.neighbours
    for i in range(len(asked)):
        expected = 0.0
        for j, weight in zip(near.index[i], near.weight[i], strict=True):
            logits, _ = answer_along(model, prompts[j], result.pathway[i])
            expected -= weight * logits[references.options[j]].log_softmax(0)[0]
        close(result.losses[i, 0], expected, 1e-9)


# ---- what may change


@methods
@pytest.mark.parametrize("core", [None, 1, 3])
def test_rows_are_distributions(method, core):
    """Core experts share what they had together; all others keep theirs."""
    model, references, asked = world()
    result = remix(model, asked, references, method=method, core=core, layers="last:2")
    before, after = result.pathway_before, result.pathway
    inside = before >= before.topk(core or E).values[..., -1:]  # (n, R, E)
    close(after.sum(2), torch.ones_like(after.sum(2)))
    close((after * inside).sum(2), (before * inside).sum(2))
    assert (after >= 0).all() and torch.equal(after[~inside], before[~inside])
    changed = (after - before).abs().amax() > 1e-3
    assert changed == (core != 1)  # one expert alone has nobody to share with


def test_rescaling_keeps_a_row_without_weight():
    """Where all core weights are 0, the row stays."""
    core = core_experts(torch.tensor([[[0.5, 0.2, 0.3]]]), 2)
    assert torch.equal(core.rescale(torch.zeros(1, 1, 3)), core.start)


@methods
def test_no_steps_no_change(method):
    """Without steps, or with nobody near, the pathway stays the model's own."""
    model, references, asked = world()
    if method != "kernel_regression":
        still = remix(model, asked, references, method=method, steps=0)
        assert torch.equal(still.pathway, still.pathway_before)
    nobody = torch.zeros(5, 12, dtype=torch.bool)
    alone = remix(model, asked, references, method=method, allowed=nobody)
    assert (alone.neighbours.weight == 0).all()
    if method != "mode_finding":
        close(alone.pathway, alone.pathway_before)


@methods
def test_batches_do_not_matter(method):
    """Each prompt is re-mixed for itself, however many stand beside it or prefixes are kept."""
    model, references, asked = world()
    allowed = torch.rand(5, 12) < 0.8
    whole = remix(model, asked, references, method=method, k=2, allowed=allowed)
    for batch, max_memory in ((1, 512.0), (2, 0.01), (1, 0.0)):
        order = [3, 0, 4, 2, 1]
        again = remix(
            model,
            [asked[i] for i in order],
            references,
            method=method,
            k=2,
            allowed=allowed[order],
            batch=batch,
            max_memory=max_memory,
        )
        close(again.pathway, whole.pathway[order], 1e-9)
        close(again.logits, whole.logits[order], 1e-9)


@methods
def test_the_model_is_left_as_it_was(method):
    """Weights, gradients, training mode: in training and evaluation, with dropout."""
    model, references, asked = world(dropout=0.5)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.norm.weight.requires_grad_(False)
    logits = []
    for training in (True, False):
        model.train(training)
        logits.append(remix(model, asked, references, method=method).logits)
        assert all(module.training == training for module in model.modules())
    assert torch.equal(*logits)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.grad is None
        assert weight.requires_grad == (name != "norm.weight")


def test_frozen_is_undone_after_an_error():
    """Whatever happens inside, weights learn again afterwards."""
    model = make_model().train()
    with pytest.raises(RuntimeError), frozen(model):
        assert not model.training
        raise RuntimeError
    assert model.training and all(weight.requires_grad for weight in model.parameters())


# ---- who helps


def test_kernels_by_their_formulas():
    """At distances 1, 2, 4: the unit is the median of those who are there, the sum is 1."""
    distance = torch.tensor([[1.0, 2.0, 4.0, torch.inf]])
    cosine = torch.tensor([[0.5, 0.0, -1.0, 0.9]])
    root = math.sqrt(3)
    expected = {
        "gaussian": [math.exp(-(r**2) / 2) for r in (0.5, 1, 2)],
        "matern": [(1 + root * r) * math.exp(-root * r) for r in (0.5, 1, 2)],
        "polynomial": [2.25, 1, 0],
        "linear": [1, 0, 0],
    }
    for name, weights in expected.items():
        total = sum(weights)
        row = torch.tensor([[*(weight / total for weight in weights), 0]])
        close(kernel(name, distance, cosine), row, 1e-6)
    same_place = kernel("gaussian", torch.zeros(1, 2), cosine[:, :2])
    assert same_place.tolist() == [[0.5, 0.5]]
    nobody = kernel("gaussian", torch.full((1, 2), torch.inf), cosine[:, :2])
    assert nobody.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["tfidf", "tfidf-places", "tfidf-bigrams"])
def test_tfidf_by_hand(kind):
    """Prompt 1 3 1 against references 2 1 and 3; all three are the corpus."""
    a, b = 1 + math.log(4 / 3), 1 + math.log(4 / 2)  # terms of two prompts, and of one
    expected = {
        # Vectors over the tokens 1, 2, 3: (2a, 0, a), (a, b, 0), (0, 0, a).
        "tfidf": [2 * a * a / (math.hypot(2 * a, a) * math.hypot(a, b)), a / math.hypot(2 * a, a)],
        # Two end with 1, which is common to them; 3 stands at other places.
        "tfidf-places": [a * a / (math.hypot(b, b, a) * math.hypot(b, a)), 0],
        # No pair of tokens is in two prompts.
        "tfidf-bigrams": [
            2 * a * a / (math.hypot(2 * a, a, b, b) * math.hypot(a, b, b)),
            a / math.hypot(2 * a, a, b, b),
        ],
    }
    tokens, lengths = padded([[2, 1], [3]], V)
    _, references, _ = world()
    corpus = padded([[1, 3, 1], [2, 1], [3]], V)
    references = replace(references, tokens=tokens, lengths=lengths)
    references.corpus, references.corpus_lengths = corpus
    cosine = similarity(kind, None, references, torch.tensor([[1, 3, 1]]), torch.tensor([3]))
    close(cosine, torch.tensor([expected[kind]], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("name", ["hidden:0", "hidden:2", "pathway"])
def test_embeddings_from_the_model(name):
    """The state of the last token as it enters a layer, or the critical pathway."""
    model, references, asked = world()
    tail = Tail(model, [1, 2])
    cosine = similarity(name, tail, references, *padded(asked, V))
    vectors = []
    for prompt in [*asked, *prompts_of(references)]:
        if name == "pathway":
            vector = answer_along(model, prompt)[1][1:].flatten()
        else:
            layer = int(name[-1])
            vector = model.run_blocks(model.embed(prompt[None]), last=layer)[0, -1]
        vectors.append(F.normalize(vector, dim=0))
    vectors = torch.stack(vectors).detach()
    close(cosine, vectors[:5] @ vectors[5:].T)


def test_neighbours_by_hand():
    """A prompt at 0 degrees of a circle, references at 10 (wrong), 20 (a copy), 30, 40, ..."""
    model, references, _ = world()
    angle = torch.arange(10, 130, 10).deg2rad()
    references = replace(
        references,
        correct=torch.arange(12) > 0,
        embeddings=torch.stack([angle.cos(), angle.sin()], 1),
    )
    question = prompts_of(references)[1][None], references.lengths[1:2]
    assert near_copies(references, *question)[0].nonzero().flatten().tolist() == [1]
    config = RemixConfig(embedding="own", k=2)

    def found(allowed=None):
        own = torch.tensor([[3.0, 0.0]])
        return find_neighbours(Tail(model), references, *question, config, allowed, embeddings=own)

    near = found()
    assert near.index.tolist() == [[2, 3]]
    assert near.usable[0].tolist() == [False, False, *[True] * 10]
    # The distance of angles d is 2 sin(d / 2); the lower median of two is the nearer one.
    ratio = math.sin(math.radians(20)) / math.sin(math.radians(15))
    a, b = math.exp(-1 / 2), math.exp(-(ratio**2) / 2)
    close(near.weight[0].tolist(), [a / (a + b), b / (a + b)], 1e-6)
    # Fewer than k may help: the second weighs nothing.
    few = torch.zeros(1, 12, dtype=torch.bool)
    few[0, [0, 1, 5]] = True
    near = found(few)
    assert near.index[0, 0] == 5 and near.weight[0].tolist() == [1.0, 0.0]


# ---- references


def test_kept_prefixes():
    """With room for two, the one not asked for longest goes; what is kept is what would be made."""
    model, references, _ = world(token="all")
    tail = Tail(model, [1])
    whole = tail.cut(references.tokens, references.lengths)
    size = sum(tensor[0].nbytes for tensor in whole)
    prefixes = Prefixes(tail, references.tokens, references.lengths, 2.5 * size)
    expected = [[0], [0, 1], [1, 0], [0, 2], [2, 0], [0, 1], [1, 0]]
    for index, kept in zip([[0], [1], [0], [2], [0], [1], [0]], expected, strict=True):
        close(tuple(prefixes(torch.tensor(index))), tuple(tensor[index] for tensor in whole))
        assert list(prefixes.kept) == kept and prefixes.size == size * len(kept)
    prefixes.max_bytes = 0
    close(tuple(prefixes(torch.tensor([3, 3]))), tuple(tensor[[3, 3]] for tensor in whole))
    assert prefixes.size == 0 and not prefixes.kept


def test_prefixes_stay_with_their_references():
    """A second call finds them; other layers, and changed references, do not."""
    model, references, asked = world()
    remix(model, asked, references)
    kept = references.kept
    assert len(kept.kept) > 0
    remix(model, asked, references)
    assert references.kept is kept
    remix(model, asked, references, layers="last:1")
    assert references.kept is not kept
    assert replace(references, labels=references.labels).kept is None


def test_reference_set_comes_back_from_its_file(tmp_path):
    """It knows what full forwards know, and refuses another model."""
    model, references, asked = world()
    answers = [answer_along(model, prompt) for prompt in prompts_of(references)]
    close(references.pathways[:, 0], torch.stack([pathway for _, pathway in answers]))
    best = torch.stack([logits.argmax() for logits, _ in answers])
    assert torch.equal(references.correct, best == references.labels)
    assert references.correct.sum() == 9

    path = tmp_path / "references"
    options = (references.labels[:, None] + torch.arange(3)) % V
    embeddings = torch.randn(3, 12).T  # not contiguous
    given = (prompts_of(references), references.labels, options, asked, embeddings)
    made = ReferenceSet.build(model, *given)
    made.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = ReferenceSet.load(path, model)
    for name, value in vars(made).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other

    model.blocks[1].ffns[0].experts.down.data[0, 0, 0] += 1e-9
    with pytest.raises(ValueError, match="references was made by another model"):
        ReferenceSet.load(path, model)
    safetensors.torch.save_file({"tokens": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="references is not a reference set"):
        ReferenceSet.load(path, model)


def test_options_decide_what_is_right():
    """A reference is right where its label is the best of its options."""
    model, references, _ = world()
    prompts = prompts_of(references)
    worst = torch.stack([answer_along(model, prompt)[0].argmin() for prompt in prompts])
    best = torch.stack([answer_along(model, prompt)[0].argmax() for prompt in prompts])
    pair = torch.stack([worst, best], 1)
    assert ReferenceSet.build(model, prompts, best, pair).correct.all()
    assert not ReferenceSet.build(model, prompts, worst, pair).correct.any()


# ---- bad input

SETTINGS = {
    "k is 10, but there are 9 usable": {"k": 10},
    "k is 0; it must be at least 1": {"k": 0},
    "core is 7, but there are 6": {"core": 7},
    "did you mean kernel_regression": {"method": "kernel_regresion"},
    "did you mean gaussian": {"kernel": "gauss"},
    "did you mean tfidf": {"embedding": "tfdif"},
    "expected hidden:0 to hidden:2": {"embedding": "hidden:3"},
    "needs arrays": {"embedding": "own"},
    "alpha is 1.5": {"alpha": 1.5},
    "unknown critical layers 'top:2'": {"layers": "top:2"},
    "unknown critical layers 'last:4'": {"layers": "last:4"},
    "numbers from 0 to 2": {"layers": "0,3"},
    "needs the options of the references": {"loss": "options"},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_do_not_fit(message):
    """One line says what was found and what would do."""
    with pytest.raises(ValueError, match=message) as error:
        remix(*by_order(world()), **SETTINGS[message])
    assert "\n" not in str(error.value)


def by_order(everything):
    """model, references, prompts -> as remix takes them."""
    model, references, asked = everything
    return model, asked, references


@pytest.mark.parametrize(
    ("message", "prompts", "labels", "options"),
    [
        ("the reference set is empty", [], [], {}),
        (f"labels go from 0 to {V}", [[1], [2]], [0, V], {}),
        ("2 references have 1 labels", [[1], [2]], [0], {}),
        ("not among its options", [[1], [2]], [1, 1], {"options": [[1, 2], [2, 3]]}),
        ("prompts of one length", [[1], [2, 3]], [1, 1], {"token": "all"}),
        ("did you mean last", [[1]], [1], {"token": "lats"}),
    ],
)
def test_references_that_do_not_fit(message, prompts, labels, options):
    with pytest.raises(ValueError, match=message):
        ReferenceSet.build(make_model(), prompts, labels, **options)


def test_prompts_and_models_that_do_not_fit():
    model, references, asked = world()
    repeated = prompts_of(references)[1]
    wrong = replace(references, correct=torch.zeros(12, dtype=torch.bool))
    dense = tiny(dense_layers=(0, 1, 2))
    for message, arguments in (
        ("made by another model", (make_model(), asked, references)),
        ("none of the 12 references right", (model, asked, wrong)),
        ("1 of 6 prompts are references too", (model, [*asked, repeated], references)),
        ("none empty", (model, [[1], []], references)),
        (f"tokens go from 1 to {V}", (model, [[1, V]], references)),
        ("needs references", (model, asked, None)),
    ):
        with pytest.raises(ValueError, match=message):
            remix(*arguments)
    with pytest.raises(ValueError, match="no such reference set: nowhere"):
        ReferenceSet.load("nowhere", model)
    with pytest.raises(ValueError, match="nothing to re-mix"):
        critical_layers(dense, "all")
    with pytest.raises(ValueError, match="nothing to re-mix"):
        ReferenceSet.build(dense, [[1]], [1])


def test_a_gradient_that_is_always_zero_is_refused():
    """With one expert whose weight is divided by itself, no logit matters."""
    with pytest.raises(ValueError, match="gradient zero"):
        remix(*by_order(world(top_k=1, norm_topk=True)))


def test_surrogates_share_one_signature():
    """Each is a function (core, loss, near, config) -> pathway."""
    for surrogate in (ngd, kernel_regression, mode_finding):
        names = surrogate.__code__.co_varnames[: surrogate.__code__.co_argcount]
        assert names == ("core", "loss", "near", "config")
