"""The playground: the page computes what remix.py computes, and its buttons do what they say."""

import base64
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from browser import Browser, chromium

from data import SkillsTask
from lab.composing.presets import build_model
from lab.playground.page import assemble, data_of, page_data
from lab.remixing.arena import Arena
from lab.remixing.controls import towards
from pathways import ReferenceSet, Tail, similarity
from pathways.checks import as_tuples
from remix import SURROGATES, remix

DOCS = Path(__file__).parent.parent / "docs" / "playground.html"
FUNCTIONS = Path(__file__).with_name("playground.js")  # the page's functions, called from here
CLOSE = {"rtol": 0, "atol": 1e-4}
needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")


def test_the_page_in_docs_is_of_now():
    """The page of the default run is small, and made of the sources as they are now."""
    page = DOCS.read_text(encoding="utf-8")
    assert len(page.encode()) < 3e6
    hint = "python -m lab.playground.page docs/playground.html"
    assert page == assemble(data_of(page)), hint


def torch_model(data: dict):
    """The model of a page, in float64."""
    model = build_model(data["config"]).double().eval()
    halves = torch.frombuffer(bytearray(base64.b64decode(data["weights"])), dtype=torch.float16)
    sizes = [weight.numel() for weight in model.parameters()]
    with torch.no_grad():
        for weight, half in zip(model.parameters(), halves.split(sizes), strict=True):
            weight.copy_(half.view(weight.shape))
    return model


def called(browser, name: str, *values):
    """What a function of playground.js returns for these values."""
    return browser.run(f"({FUNCTIONS.read_text()}).{name}(...{json.dumps(values)})")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        browser.open(DOCS)
        yield browser


@pytest.fixture(scope="module")
def arena():
    """50 prompts for the model of the page in docs."""
    model, task = torch_model(data_of(DOCS.read_text(encoding="utf-8"))), SkillsTask(0)
    solved, asked = task.problems("reference"), task.problems("dev")
    corpus = as_tuples(*task.corpus())
    references = ReferenceSet.build(model, solved.tokens, solved.labels, corpus=corpus)
    rows = torch.arange(0, 650, 13)
    return Arena(model, asked.tokens[rows], asked.labels[rows], references)


@pytest.mark.full
@needs_browser
def test_page_equals_remix(browser, arena):
    """Neighbours, pathways and answers of every method are those of remix.py, for 50 prompts."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels, near = arena.tokens, arena.labels, arena.neighbours
    wrong = (labels + torch.randint(1, 16, labels.shape, generator=generator)) % 16
    others = torch.multinomial(near.usable.float(), 3, generator=generator)
    columns = [each.tolist() for each in (tokens, labels, wrong, others)]
    shown = [called(browser, "everything", *row) for row in zip(*columns, strict=True)]

    # Which of two references, exactly as near, comes first is left open.
    places = torch.tensor([each["near"] for each in shown])
    cosine = similarity("tfidf-places", arena.tail, arena.references, tokens, arena.lengths)
    torch.testing.assert_close(cosine.gather(1, places), cosine.gather(1, near.index))
    assert near.usable.gather(1, places).all()
    near = near._replace(index=places)

    # All methods, and the controls that the page has.
    given = (arena.model, tokens, arena.references)
    results = {name: remix(*given, method=name, neighbours=near) for name in SURROGATES}
    results["oracle"] = towards(arena, labels, {})
    results["oracle's null"] = towards(arena, wrong, {})
    results["random neighbours"] = remix(*given, neighbours=near._replace(index=others))
    assert shown[0]["answers"].keys() == {"own", *results}
    for name, result in results.items():
        for field in ("pathway", "logits"):
            numbers = torch.tensor([each["answers"][name][field] for each in shown])
            torch.testing.assert_close(numbers.double(), getattr(result, field).double(), **CLOSE)


KINDS = {
    "grouped heads, QK-norm by head": {"n_kv_heads": 2, "qk_norm": "head", "norm_topk": True},
    "a dense layer, shared experts": {"dense_layers": (0,), "d_shared": 8, "qk_norm": "none"},
    "Cartesian": {"n_sublayers": 2, "d_shared": 8, "tied": True},
    "side by side": {"layer": "parallel", "norm_topk": True},
    "top-p": {"layer": "moe", "router": "top_p", "norm_topk": True},
}


def random_model(**changes):
    """A small model with decided routers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 47, "d_model": 16, "n_layers": 2, "n_experts": 5, "top_k": 2}
    model = build_model(sizes | {"d_expert": 8, "head_dim": 6} | changes)
    with torch.no_grad():
        for router in model.routers():
            router.weight.mul_(30)
    return model


@pytest.mark.full
@needs_browser
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind, browser, tmp_path):
    """The answer, and the gradient of its loss in an imposed pathway, are those of autograd."""
    task, path = SkillsTask(0), tmp_path / "page.html"
    data = page_data(random_model(**KINDS[kind]), task, "random")
    path.write_text(assemble(data), encoding="utf-8")
    browser.open(path)
    model = torch_model(data)
    tail = Tail(model)
    tokens, lengths = torch.tensor([[43, 2, 7, 20, 9, 44]]), torch.tensor([6])
    prefix = tail.cut(tokens, lengths)
    pathway = torch.rand(1, len(tail.routers), 5, dtype=torch.float64).softmax(-1).requires_grad_()
    logits = tail(prefix, pathway)
    F.cross_entropy(logits, torch.tensor([3])).backward()

    shown = called(browser, "gradient", tokens[0].tolist(), 3, pathway[0].tolist())
    expected = {"own": model(tokens).logits[0, -1], "logits": logits[0], "rows": pathway.grad[0]}
    for name, numbers in expected.items():
        torch.testing.assert_close(torch.tensor(shown[name]).double(), numbers, **CLOSE)
