"""C3PO: what may change at test time and what may not; every method beside its plain form."""

import math
from dataclasses import replace

import by_hand
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from by_hand import (
    VARIANTS,
    E,
    SigmoidRouter,
    V,
    answer_along,
    close,
    full,
    refused,
    small_preset,
    tiny,
)

from lab.remixing.corrections import corrections, mend
from moe import look_back
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
from remix import RemixConfig, ngd, remix

methods = pytest.mark.parametrize("method", ["ngd", "kernel_regression", "mode_finding"])


def make_model(name):
    """A small model: a variant, a preset, or one with another router."""
    if name == "sigmoid":
        return tiny(router=SigmoidRouter)
    return tiny(name) if name in VARIANTS else small_preset(name)


def world(model=None, token="last"):
    """A model, five prompts of 1 to 5 tokens, twelve references of which it answers nine right."""
    model = (model or tiny()).eval()
    lengths = [4] * 17 if token == "all" else [2, 3, 4, 5, 6, 7] * 2 + [1, 2, 3, 4, 5]
    prompts = [torch.randint(1, V, (length,)) for length in lengths]
    solved, asked = prompts[:12], prompts[12:]
    for prompt in asked:
        prompt[0] = 0  # no reference starts so
    labels = torch.stack([answer_along(model, prompt)[0].argmax() for prompt in solved])
    labels[::4] = (labels[::4] + 1) % V
    return model, asked, ReferenceSet.build(model, solved, labels, token=token)


def prompts_of(references):
    """The prompts of a reference set without padding."""
    rows = zip(references.tokens, references.lengths, strict=True)
    return [row[:length] for row, length in rows]


def test_a_result_explains_itself():
    """In words: the prompt, its answers before and after, the neighbours and their answers."""
    model, asked, references = world()
    result = remix(model, asked, references, k=2)

    def words(tokens):
        return "-".join(f"w{token}" for token in tokens)

    text = result.explain(3, words)
    first, *rest = text.splitlines()
    assert first == words(asked[3].tolist())
    before = result.logits_before[3].softmax(-1)
    best = int(before.argmax())
    row = next(line for line in rest if line.strip().startswith(f"w{best} "))
    assert f" {before[best]:.0%} " in row
    near = result.neighbours
    for index, weight in zip(near.index[3].tolist(), near.weight[3].tolist(), strict=True):
        length, label = int(references.lengths[index]), int(references.labels[index])
        solved = words(references.tokens[index, :length].tolist())
        assert f"{solved}: w{label} (weight {weight:.2f})" in text
    losses = result.losses[3]
    assert text.endswith(f"their loss: {losses[0]:.2f} nats, at best {losses.min():.2f}")
    assert result.explain(3).splitlines()[0] == " ".join(map(str, asked[3].tolist()))
    with pytest.raises(ValueError, match="only a result of `remix`"):
        result._replace(references=None).explain(3)


# ---- the exact form


def answer_at(model, prompt, routers, token, w=None):
    """A full forward of a prompt -> logits (V,), and its pathway as `Tail` has it.

    A pathway at all tokens is (T*R, E) there, and (R, T, E) in by_hand.py.
    """
    T, R = len(prompt), len(routers)
    places = {"last": T - 1, "middle": T // 2, "first": 0, "all": slice(None)}
    if w is not None and token == "all":
        w = w.unflatten(0, (T, R)).transpose(0, 1)
    logits, pathway = answer_along(model, prompt, w, routers, places[token])
    if token == "all":
        pathway = pathway.transpose(0, 1).flatten(0, 1)
    return logits, pathway


MODELS = {  # words -> model, critical layers, their routers
    "layers 0 and 2": ("norm-topk", "0,2", [0, 2]),
    "two routers in a block": ("cartesian", "0,2", [0, 1, 4, 5]),
    "all layers": ("default", "all", [0, 1, 2]),
    "last layer": ("grouped-query", "last:1", [2]),
    "first with a router": ("dense-layers", "first:1", [0]),
    "all with routers": ("dense-layers", "all", [0, 1]),
    "middle layer": ("shared", "middle:1", [1]),
    "last two layers": ("top-all", "last:2", [1, 2]),
    "experts by their share": ("top_p", "last:2", [1, 2]),
    "two layers side by side": ("cartesian_parallel", "last:2", [2, 3, 4, 5]),
    "two layers in a chain": ("cartesian_chain", "last:2", [2, 3, 4, 5]),
    "pairs of experts": ("cartesian_pairs", "last:2", [2, 3, 4, 5]),
}


@pytest.mark.parametrize("token", ["last", *full("middle", "first", "all")])
@pytest.mark.parametrize("name", [*list(MODELS)[:2], *full(*list(MODELS)[2:])])
def test_tail_is_exact(name, token):
    """One token through the layers above gives the logits and gradients of full forwards."""
    model_name, layers, routers = MODELS[name]
    model = make_model(model_name)
    tokens = torch.randint(V, (3, 7))
    lengths = torch.tensor([7, 7, 7] if token == "all" else [1, 7, 4])
    tail = Tail(model, critical_layers(model, layers), token)
    prefix = tail.cut(tokens, lengths)

    # To impose nothing, or the model's own pathway, changes nothing.
    own, logits = tail.own(prefix)
    close((tail(prefix), tail(prefix, own)), (logits, logits))

    # Another pathway: the same logits, the same gradients.
    w = torch.randn_like(own).softmax(-1).requires_grad_()
    expected = []
    for i, length in enumerate(lengths):
        prompt = tokens[i, :length]
        close((logits[i], own[i]), answer_at(model, prompt, routers, token))
        expected.append(answer_at(model, prompt, routers, token, w[i])[0])
    expected = torch.stack(expected)
    actual = tail(prefix, w)
    close(actual, expected, 1e-9)
    (gradient,) = torch.autograd.grad(expected, w, logits)
    close(torch.autograd.grad(actual, w, logits)[0], gradient, 1e-9)
    if token == "last":
        assert (gradient.abs().amax(2) > 1e-6).all()


@methods
@pytest.mark.parametrize(
    ("name", "layers", "routers", "token"),
    [
        ("sigmoid", "all", [0, 1, 2], "last"),
        ("cartesian", "last:2", [2, 3, 4, 5], "last"),
        *full(("default", "0,2", [0, 2], "middle"), ("default", "1", [1], "all")),
    ],
    ids=["a router of your own", "two routers in a block", "middle token", "all tokens"],
)
def test_result_is_what_full_forwards_say(name, layers, routers, token, method):
    """Full forwards along what comes back say what comes back. Without steps nothing changes."""
    model, asked, references = world(make_model(name), token)
    result = remix(model, asked, references, method=method, steps=3, layers=layers)
    for i, prompt in enumerate(asked):
        logits, _ = answer_at(model, prompt, routers, token, result.pathway[i])
        close(result.logits[i], logits)
        own = answer_at(model, prompt, routers, token)
        close((result.logits_before[i], result.pathway_before[i]), own)
    assert (result.pathway - result.pathway_before).abs().max() > 1e-3
    if method != "kernel_regression":
        still = remix(model, asked, references, method=method, steps=0, layers=layers)
        assert torch.equal(still.pathway, still.pathway_before)


# ---- each method beside its plain form

cores = pytest.mark.parametrize("core", [None, 2], ids=["all experts", "core experts"])


def full_loss(model, references, index, weights=None):
    """The loss of some references by full forwards: a function of a pathway (R, E)."""
    prompts = [prompts_of(references)[j] for j in index]
    weights = torch.ones(len(index)) if weights is None else weights
    return lambda w: by_hand.neighbour_loss(model, w, prompts, references.labels[index], weights)


@cores
def test_ngd_by_hand(core):
    """NGD equals gradient descent through full forwards of the neighbours."""
    model, asked, references = world()
    result = remix(model, asked, references, method="ngd", steps=4, lr=0.3, k=2, core=core)
    near = result.neighbours
    for i, own in enumerate(result.pathway_before):
        loss = full_loss(model, references, near.index[i], near.weight[i])
        w, losses = by_hand.ngd(own, loss, steps=4, lr=0.3, n_core=core or E)
        close((result.pathway[i], result.losses[i]), (w, torch.stack(losses)), 1e-8)
    assert result.losses.shape == (5, 5)
    assert (result.losses.amin(1) < 0.9 * result.losses[:, 0]).any()


@cores
def test_kernel_regression_by_hand(core):
    """Kernel regression equals the search over eleven mixtures by full forwards."""
    model, asked, references = world()
    result = remix(model, asked, references, method="kernel_regression", k=2, core=core)
    near = result.neighbours
    for i, own in enumerate(result.pathway_before):
        theirs = references.pathways[near.index[i], 0]  # (k, R, E)
        mean = (near.weight[i, :, None, None] * theirs).sum(0)
        loss = full_loss(model, references, near.index[i], near.weight[i])
        w, losses = by_hand.kernel_regression(own, mean, loss, n_core=core or E)
        close((result.pathway[i], result.losses[i]), (w, torch.stack(losses)), 1e-8)
    assert result.losses.shape == (5, 11)
    assert (result.losses.amin(1) < 0.95 * result.losses[:, 0]).any()


@cores
def test_mode_finding_by_hand(core):
    """Mode finding equals the walk among the usable pathways. It asks for no loss."""
    model, asked, references = world()
    settings = {"k": 2, "steps": 3, "alpha": 0.4}
    result = remix(model, asked, references, method="mode_finding", core=core, **settings)
    for i, own in enumerate(result.pathway_before):
        others = references.pathways[result.neighbours.usable[i], 0]
        w = by_hand.mode_finding(own, others, n_core=core or E, **settings)
        close(result.pathway[i], w, 1e-8)
    assert result.losses.shape == (5, 0)


@cores
def test_corrections_by_hand(core):
    """Each reference is mended through full forwards; a prompt takes over what was changed."""
    model, asked, references = world()
    references.correct[:] = True
    config = RemixConfig(steps=3, lr=0.3, k=2, core=core)
    method = corrections(model, references, config, scale=1.5)
    result = remix(model, asked, references, config, method=method)
    changes = []
    for i, own in enumerate(references.pathways[:, 0]):
        loss = full_loss(model, references, torch.tensor([i]))
        changes.append(by_hand.correction(own, loss, steps=3, lr=0.3, n_core=core or E))
    changes = torch.stack(changes)
    assert (changes.abs().amax((1, 2)) > 0.01).all()
    near = result.neighbours
    for i, own in enumerate(result.pathway_before):
        theirs = changes[near.index[i]], near.weight[i]
        w = by_hand.corrected(own, *theirs, scale=1.5, n_core=core or E)
        close(result.pathway[i], w, 1e-6)  # weights of neighbours have seven decimals
        close(result.logits[i], answer_along(model, asked[i], w)[0], 1e-5)
    assert result.losses.shape == (5, 0)


def test_corrections_that_change_nothing():
    """Neither a scale nor steps of 0 change anything; other references or layers are refused."""
    model, asked, references = world()
    config = RemixConfig(k=1, layers="last:2")
    own, mended = mend(model, references, replace(config, steps=0))
    assert torch.equal(own, mended)
    none = corrections(model, references, config, scale=0.0)
    result = remix(model, asked, references, config, method=none)
    close(result.pathway, result.pathway_before)
    others = replace(references, pathways=references.pathways.flip(0))
    for changed in ({"references": references, "layers": "first:2"}, {"references": others}):
        with refused("other references or layers"):
            remix(model, asked, config=config, method=none, **changed)


def test_a_surrogate_of_your_own():
    """`method` also takes a function; gradients are on inside of it."""
    model, asked, references = world()

    def one_step(core, loss, near, config):
        z = core.start.log().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(core.softmax(z)).sum(), z)
        return core.softmax(z - config.lr * gradient.sign())

    result = remix(model, asked, references, method=one_step)
    close(result.pathway.sum(-1), torch.ones(5, 3).double())
    assert result.losses.shape == (5, 1)
    assert (result.pathway != result.pathway_before).any()


def test_loss_over_options():
    """With loss "options", the cross-entropy is over the options of each reference."""
    model, asked, references = world()
    references.options = (references.labels[:, None] + torch.arange(2)) % V
    result = remix(model, asked, references, loss="options", k=2)
    least = result.losses.amin(1)
    assert (least < 0.9 * result.losses[:, 0]).any()

    solved, near = prompts_of(references), result.neighbours
    for i, w in enumerate(result.pathway):
        expected = 0.0
        for j, weight in zip(near.index[i], near.weight[i], strict=True):
            logits, _ = answer_along(model, solved[j], w)
            expected -= weight * logits[references.options[j]].log_softmax(0)[0]
        close(least[i], expected, 1e-8)


# ---- what may change


@methods
def test_nobody_near(method):
    """A prompt that nobody may help keeps the model's pathway, beside others that do not."""
    model, asked, references = world()
    allowed = torch.zeros(5, 12, dtype=torch.bool)
    allowed[1] = True
    settings = {"method": method, "alpha": 0.0, "batch": 2}
    result = remix(model, asked, references, allowed=allowed, **settings)
    alone = [0, 2, 3, 4]
    assert (result.neighbours.weight[alone] == 0).all()
    moved = (result.pathway - result.pathway_before).abs().amax((1, 2))  # (n,)
    assert (moved[alone] < 1e-12).all()
    assert moved[1] > 1e-6
    close(result.logits[alone], result.logits_before[alone])


@methods
def test_batches_do_not_matter(method):
    """Each prompt is re-mixed for itself, whoever stands beside it, however much is kept."""
    model, asked, references = world()
    allowed = torch.rand(5, 12) < 0.8
    settings = {"method": method, "k": 2, "steps": 30 if method == "mode_finding" else 3}
    whole = remix(model, asked, references, allowed=allowed, **settings)
    order = [3, 0, 4, 2, 1]
    prompts = [asked[i] for i in order]
    for batch, max_memory in ((1, 512.0), (2, 0.01), (1, 0.0)):
        settings |= {"batch": batch, "max_memory": max_memory, "allowed": allowed[order]}
        again = remix(model, prompts, references, **settings)
        close(again.pathway, whole.pathway[order], 1e-9)
        close(again.logits, whole.logits[order], 1e-9)


def test_frozen_is_undone_after_an_error():
    """Whatever happens inside, weights learn again afterwards."""
    model = tiny().train()
    with pytest.raises(RuntimeError), frozen(model):
        assert not model.training
        raise RuntimeError
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


@methods
def test_bfloat16(method):
    """A model in bfloat16 is re-mixed too; pathways, losses and logits are in float32."""
    model, asked, references = world(tiny().bfloat16())
    result = remix(model, asked, references, method=method, steps=2)
    for tensor in result[:5]:
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


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
        row = torch.tensor([[*weights, 0]]) / sum(weights)
        close(kernel(name, distance, cosine), row, 1e-6)
    same_place = kernel("gaussian", torch.zeros(1, 2), cosine[:, :2])
    assert same_place.tolist() == [[0.5, 0.5]]
    nobody = kernel("gaussian", torch.full((1, 2), torch.inf), cosine[:, :2])
    assert nobody.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["tfidf", *full("tfidf-places", "tfidf-bigrams")])
def test_tfidf_by_hand(kind):
    """Prompt 1 3 1 against references 2 1 and 3; all three are the corpus."""
    # A term of two prompts counts a, a term of one counts b.
    a, b = 1 + math.log(4 / 3), 1 + math.log(4 / 2)
    expected = {
        # Vectors over the tokens 1, 2, 3: (2a, 0, a), (a, b, 0), (0, 0, a).
        "tfidf": [2 * a * a / (math.hypot(2 * a, a) * math.hypot(a, b)), a / math.hypot(2 * a, a)],
        # Two prompts end with 1; all else stands at a place of its own.
        "tfidf-places": [a * a / (math.hypot(b, b, a) * math.hypot(b, a)), 0],
        # No pair of tokens is in two prompts.
        "tfidf-bigrams": [
            2 * a * a / (math.hypot(2 * a, a, b, b) * math.hypot(a, b, b)),
            a / math.hypot(2 * a, a, b, b),
        ],
    }
    _, _, references = world()
    tokens, lengths = padded([[2, 1], [3]], V)
    references = replace(references, tokens=tokens, lengths=lengths)
    references.corpus, references.corpus_lengths = padded([[1, 3, 1], [2, 1], [3]], V)
    cosine = similarity(kind, None, references, *padded([[1, 3, 1]], V))
    close(cosine, torch.tensor([expected[kind]], dtype=torch.float64), 1e-12)


@torch.no_grad()
def test_embeddings_from_the_model():
    """The state of the last token as it enters a layer, or the critical pathway."""
    model, asked, references = world()
    tail = Tail(model, [1, 2])
    prompts = [*asked, *prompts_of(references)]

    def cosines(vectors):
        """Of five prompts with twelve references."""
        unit = torch.stack([F.normalize(vector, dim=0) for vector in vectors])
        return unit[:5] @ unit[5:].T

    expected = {"pathway": cosines([answer_along(model, p)[1][1:].flatten() for p in prompts])}
    for layer in (0, 2):
        states = [model.run_blocks(model.embed(p[None]), last=layer)[0, -1] for p in prompts]
        expected[f"hidden:{layer}"] = cosines(states)
    for name, cosine in expected.items():
        close(similarity(name, tail, references, *padded(asked, V)), cosine)


def test_neighbours_by_hand():
    """A prompt at 0 degrees of a circle, references at 10 (wrong), 20 (a copy), 30, 40, ..."""
    model, _, references = world()
    angle = torch.arange(10, 130, 10).deg2rad()
    on_a_circle = torch.stack([angle.cos(), angle.sin()], 1)
    correct = torch.arange(12) > 0
    references = replace(references, correct=correct, embeddings=on_a_circle)
    question = prompts_of(references)[1][None], references.lengths[1:2]
    assert near_copies(references, *question).nonzero().tolist() == [[0, 1]]

    def nearest_two(references, allowed=None):
        config = RemixConfig(embedding="own", k=2)
        own = torch.tensor([[3.0, 0.0]])
        return find_neighbours(Tail(model), references, *question, config, allowed, own)

    near = nearest_two(references)
    assert near.index.tolist() == [[2, 3]]
    assert near.usable.tolist() == [[False, False] + [True] * 10]
    # The distance of angles d is 2 sin(d / 2); the lower median of two is the nearer one.
    ratio = math.sin(math.radians(20)) / math.sin(math.radians(15))
    a, b = math.exp(-1 / 2), math.exp(-(ratio**2) / 2)
    close(near.weight[0].tolist(), [a / (a + b), b / (a + b)], 1e-6)

    # Were wrong answers no matter, the first would help. Where one is left, it has all the weight.
    unfiltered = replace(references, correct=torch.ones_like(correct))
    assert nearest_two(unfiltered).index.tolist() == [[0, 2]]
    few = torch.zeros(1, 12, dtype=torch.bool)
    few[0, [0, 1, 5]] = True
    near = nearest_two(references, few)
    assert near.index[0, 0] == 5
    assert near.weight.tolist() == [[1.0, 0.0]]


# ---- references


def test_kept_prefixes():
    """With room for two, the one not asked for longest goes; what is kept is what would be made."""
    model, _, references = world(token="all")
    tail = Tail(model, [1])
    whole = tail.cut(references.tokens, references.lengths)
    size = sum(tensor[0].nbytes for tensor in whole)
    prefixes = Prefixes(tail, references.tokens, references.lengths, 2.5 * size)
    history = [(0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (0, [2, 0]), (1, [0, 1])]
    for asked, kept in history:
        close(tuple(prefixes(torch.tensor([asked]))), tuple(tensor[[asked]] for tensor in whole))
        assert list(prefixes.kept) == kept
        assert prefixes.size == size * len(kept)
    prefixes.max_bytes = 0
    twice = [3, 3]
    close(tuple(prefixes(torch.tensor(twice))), tuple(tensor[twice] for tensor in whole))
    assert prefixes.size == len(prefixes.kept) == 0


@pytest.mark.parametrize("token", ["last", *full("middle", "all")])
def test_prefixes_of_many_tokens_are_made_in_portions(token, monkeypatch):
    """Portions of alike lengths, padded together, are what one pass makes."""
    model, _, references = world(token=token)
    tail = Tail(model, [1], token)
    lengths = references.lengths.clone()
    lengths[::2] -= 1
    whole = tail.cut(references.tokens, lengths)
    monkeypatch.setattr("pathways.tail.MOST_TOKENS", 7)
    monkeypatch.setattr("pathways.prompts.MOST_TOKENS", 7)
    parts = tail.cut(references.tokens, lengths)
    assert torch.equal(parts.valid, whole.valid) and torch.equal(parts.past, whole.past)
    close(
        tail.own(parts)[1], tail.own(whole)[1]
    )  # pathways at padding differ, and count for nothing


def test_prefixes_stay_with_their_references():
    """A second call finds them; other layers, and changed references, do not."""
    model, asked, references = world()
    remix(model, asked, references)
    first = references.kept
    assert len(first.kept) > 0
    remix(model, asked, references)
    assert references.kept is first
    remix(model, asked, references, layers="last:1")
    assert references.kept is not first
    assert replace(references, labels=references.labels).kept is None


def test_references_know_what_full_forwards_know():
    """Pathways, and what the model answers right: of all tokens, or of the options."""
    model, _, references = world()
    prompts = prompts_of(references)
    answers = [answer_along(model, prompt) for prompt in prompts]
    close(references.pathways[:, 0], torch.stack([pathway for _, pathway in answers]))
    logits = torch.stack([logits for logits, _ in answers])
    worst, best = logits.argmin(1), logits.argmax(1)
    assert torch.equal(references.correct, best == references.labels)
    assert references.correct.sum() == 9
    pair = torch.stack([worst, best], 1)
    assert ReferenceSet.build(model, prompts, best, pair).correct.all()
    assert not ReferenceSet.build(model, prompts, worst, pair).correct.any()


def test_references_come_back_from_their_file(tmp_path):
    """With all that can be given, some of it a column of a table; but to their model only."""
    model, asked, references = world()
    path = tmp_path / "references"
    options = torch.randint(V, (3, 12)).T
    embeddings = torch.randn(3, 12).T
    given = (prompts_of(references), options[:, 1], options, asked, embeddings)
    made = ReferenceSet.build(model, *given)
    made.save(path)
    assert list(tmp_path.iterdir()) == [path]
    for name, value in vars(ReferenceSet.load(path, model)).items():
        expected = getattr(made, name)
        assert torch.equal(value, expected) if torch.is_tensor(value) else value == expected

    model.blocks[1].ffns[0].experts.down.data[0, 0, 0] += 1e-9
    with refused("references was made by another model"):
        ReferenceSet.load(path, model)
    safetensors.torch.save_file({"tokens": torch.zeros(2), "weight": torch.zeros(2)}, path)
    with refused("references is not a reference set"):
        ReferenceSet.load(path, model)


# ---- what is refused

SETTINGS = {
    "k is 10, but there are 9 usable references": {"k": 10},
    "core is 7, but there are 6 experts": {"core": 7},
    "'kernel_regresion'; did you mean kernel_regression?": {"method": "kernel_regresion"},
    "'hidden:3'; expected hidden:0 to hidden:2": {"embedding": "hidden:3"},
    "embedding own needs arrays": {"embedding": "own"},
    "unknown critical layers 'top:2'; expected all, last:2": {"layers": "top:2"},
    "numbers from 0 to 2": {"layers": "0,3"},
    "needs the options of the references": {"loss": "options"},
}
LABELS = torch.arange(5)
NONE = torch.zeros(12, dtype=torch.bool)
CALLS = {  # message -> what is asked of a model m, prompts p and references r
    "made by another model": lambda m, p, r: remix(tiny(), p, r),
    "none of the 12 references right": lambda m, p, r: remix(m, p, replace(r, correct=NONE)),
    "1 of 6 prompts are references too": lambda m, p, r: remix(m, [*p, prompts_of(r)[1]], r),
    "none empty; found 2 prompts": lambda m, p, r: remix(m, [[1], []], r),
    "no such reference set: nowhere": lambda m, p, r: ReferenceSet.load("nowhere", m),
    "it is dense, or routes by hash": lambda m, p, r: critical_layers(dense(), "all"),
    "nothing to re-mix": lambda m, p, r: ReferenceSet.build(dense(), [[1]], [1]),
    "2 references have 1 labels": lambda m, p, r: ReferenceSet.build(m, [[1], [2]], [0]),
    "not among its options": lambda m, p, r: ReferenceSet.build(m, [[1]], [1], [[2, 3]]),
    "config is 'ngd'; expected a RemixConfig": lambda m, p, r: remix(m, p, r, "ngd"),
    "of one prompt make a list": lambda m, p, r: remix(m, [1, 2, 3], r),
    "neighbours are of other prompts": lambda m, p, r: remix(
        m, p, r, neighbours=remix(m, p[::-1], r, steps=0).neighbours
    ),
    "these have 1 to 5": lambda m, p, r: remix(m, p, replace(r, token="all")),
    "one length, here 1 tokens": lambda m, p, r: ReferenceSet.build(m, p, LABELS, token="all"),
}


def dense():
    return tiny(dense_layers=(0, 1, 2))


@pytest.mark.parametrize("message", full(*SETTINGS, *CALLS))
def test_what_does_not_fit(message):
    """Settings that nothing can be done with, and what does not belong together, are refused."""
    with refused(message):
        if message in SETTINGS:
            remix(*world(), **SETTINGS[message])
        else:
            CALLS[message](*world())


def test_one_expert_of_weight_1():
    """Divided by itself it is always 1: a gradient would be zero, kernel regression has none."""
    model, asked, references = world(tiny(top_k=1, norm_topk=True))
    for method in ("ngd", ngd):
        with refused("gradient zero"):
            remix(model, asked, references, method=method)
    losses = remix(model, asked, references, method="kernel_regression").losses
    assert (losses.amin(1) < 0.9 * losses[:, 0]).any()


@pytest.mark.parametrize("groups", [4, 2], ids=["a key for each head", "shared keys"])
def test_look_back(groups):
    """One token's attention to a fixed past is torch's over both together, gradients included."""
    past = torch.randn(2, 3, groups, 7, 6).double()  # keys and values of 3 prompts of 7 tokens
    q = torch.randn(3, 4, 1, 6).double().requires_grad_()
    k, v = (torch.randn(3, groups, 1, 6).double().requires_grad_() for _ in range(2))
    mask = torch.arange(8) >= torch.tensor([0, 2, 7])[:, None, None, None]
    options = {"attn_mask": mask, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(
        q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2), **options
    )
    found = look_back(q, k, v, *past, mask)
    close(found, expected, 1e-12)
    slope = torch.randn_like(found)
    ours = torch.autograd.grad(found, (q, k, v), slope)
    theirs = torch.autograd.grad(expected, (q, k, v), slope)
    for gradient, peer in zip(ours, theirs, strict=True):
        close(gradient, peer, 1e-12)
