"""The playground: the page computes what remix.py computes, and its buttons do what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import Browser, chromium

from data import CompositionTask, SkillsTask, TextData
from lab.composing.presets import build_model
from lab.playground.page import assemble, data_of, model_of, page_data
from lab.remixing.arena import Arena
from lab.remixing.controls import towards
from lab.tools.texts import END
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
    hint = "python -m lab.playground.animation makes it anew"
    assert page == assemble(data_of(page)), hint


def called(browser, name: str, *values):
    """What a function of playground.js returns for these values."""
    return browser.run(f"({FUNCTIONS.read_text()}).{name}(...{json.dumps(values)})")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def arena():
    """50 prompts for the model of the page in docs."""
    model, task = model_of(data_of(DOCS.read_text(encoding="utf-8"))).double(), SkillsTask(0)
    solved, asked = task.problems("reference"), task.problems("dev")
    corpus = as_tuples(*task.corpus())
    references = ReferenceSet.build(model, solved.tokens, solved.labels, corpus=corpus)
    rows = torch.arange(0, 650, 13)
    return Arena(model, asked.tokens[rows], asked.labels[rows], references)


@pytest.mark.full
@needs_browser
def test_page_equals_remix(browser, arena):
    """Neighbours, pathways and answers of every method are those of remix.py, for 50 prompts."""
    browser.open(DOCS)
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
    results["a wrong answer"] = towards(arena, wrong, {})
    results["random neighbours"] = remix(*given, neighbours=near._replace(index=others))
    assert shown[0]["answers"].keys() == {"own", *results}
    for name, result in results.items():
        for field in ("pathway", "logits"):
            numbers = torch.tensor([each["answers"][name][field] for each in shown])
            torch.testing.assert_close(numbers.double(), getattr(result, field).double(), **CLOSE)


KINDS = {
    "grouped heads, QK-norm by head": {"n_kv_heads": 2, "qk_norm": "head", "norm_topk": True},
    "a dense layer, shared experts": {"dense_layers": (0,), "d_shared": 8, "qk_norm": "none"},
    "Cartesian": {"n_sublayers": 2, "d_shared": 8, "tied": True, "embedding_scale": 3.0},
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
    model = model_of(data).double()
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


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"dense_layers": (0, 1)}, "there is no pathway"),
        ({"layer": "chain"}, "joined as chain"),
        ({"clip_qkv": 8.0}, "with clip_qkv"),
    ],
    ids=["dense", "layers", "clipping"],
)
def test_what_the_page_cannot_take(changes, fault):
    """One line says why there is no page."""
    with pytest.raises(ValueError, match=fault):
        page_data(random_model(**changes), SkillsTask(0), "random")


@pytest.mark.full
@needs_browser
def test_a_story(browser, tmp_path):
    """The page splits a text into the tokens of the tokenizer; a click on a word wants it."""
    tales, path = tmp_path / "tales.txt", tmp_path / "page.html"
    tales.write_text("".join(f"A bird saw {i} cats.\n{END}\n" for i in range(300)), "utf-8")
    task = TextData(str(tales), context=32, cache=str(tmp_path))
    data = page_data(random_model(vocab_size=2048, context=32), task, "tales")
    path.write_text(assemble(data), encoding="utf-8")
    browser.open(path)
    for text in ("She didn't  say: \"I'll go!\"\n\n", "Naïve café — 12 3…", "tabs\t and  "):
        shown = browser.run(f"speaker.encode({json.dumps(text)})")
        assert shown == [task.encoding.eot_token, *task.encoding.encode_ordinary(text)]
    browser.click(".answer:nth-child(3)")
    assert "You want" in browser.run("at('verdict').textContent")
    assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 1


# ------------------------------------------------------------------------------- pressing buttons


@pytest.fixture(params=["laptop", "phone", "dark"])
def fresh(request):
    """The page of docs as it opens, on three kinds of screen; afterwards nothing had complained."""
    screens = {
        "laptop": {},
        "phone": {"width": 390, "height": 844, "mobile": True},
        "dark": {"dark": True},
    }
    with Browser(**screens[request.param]) as browser:
        browser.open(DOCS)
        yield browser
        assert browser.problems == []


WHERE = """({
    pathway: state.pathway.map((row) => [...row]),
    sums: state.pathway.map(sum),
    verdict: at("verdict").textContent,
    score: at("score").textContent,
    losses: state.line,
    hint: document.querySelector(".hint")?.id,
    right: largest(model.forward(state.tokens, state.pathway).logits, 1)[0] === state.label,
})"""


@pytest.mark.full
@needs_browser
def test_an_expert_is_dragged(fresh):
    """The marked expert, dragged up, mends the answer; its row is still of sum 1; reset resets."""
    before = fresh.run(WHERE)
    assert not before["right"] and "✗ Right is" in before["verdict"]
    _, r, e = before["hint"].split("-")
    fresh.drag(f"#{before['hint']}", 66)  # by 60 %
    after = fresh.run(WHERE)
    share = before["pathway"][int(r)][int(e)]
    assert after["pathway"][int(r)][int(e)] == pytest.approx(share + 0.6, abs=0.02)
    assert after["sums"] == pytest.approx([1.0] * len(after["sums"]))
    assert after["right"] and after["score"] == "✓ Mended in 1 move!"
    changed = [a != b for a, b in zip(before["pathway"], after["pathway"], strict=True)]
    assert changed == [place == int(r) for place in range(len(changed))]  # no other row
    fresh.click("#own")
    assert fresh.run(WHERE)["pathway"] == before["pathway"]


@pytest.mark.full
@needs_browser
def test_an_expert_is_moved_by_keys(browser):
    """Tab leads to one expert; arrows move it and choose another one; a screen reader hears it."""
    browser.open(DOCS)
    browser.run("cellAt(0, 0).focus()")
    for key in ("ArrowRight", "PageUp", "ArrowUp", "ArrowUp"):
        browser.key(key)
    cell = "document.activeElement"
    assert browser.run(f"{cell}.id") == "cell-1-1"
    share = browser.run("state.pathway[1][1] - state.own.pathway[1][1]")
    assert share == pytest.approx(0.1)
    heard = browser.run(
        f"['role', 'aria-label', 'aria-valuetext'].map(n => {cell}.getAttribute(n))"
    )
    assert heard[:2] == ["slider", "layer 1, expert 1"] and "%" in heard[2]
    assert (
        browser.run("[...document.querySelectorAll('.cell')].filter(c => !c.tabIndex).length") == 1
    )
    assert browser.run("at('caption').textContent").startswith("layer 1, expert 1: ")
    for key, expected in {"End": 1, "Home": 0}.items():
        browser.key(key)
        assert browser.run("state.pathway[1][1]") == expected
        assert browser.run("sum(state.pathway[1])") == pytest.approx(1)


@pytest.mark.full
@needs_browser
def test_ten_steps(fresh):
    """Ten steps, one by one or all, lower the neighbours' loss, keep the best, mend the answer."""
    for _ in range(11):
        fresh.click("#step")
    by_hand = fresh.run(WHERE)
    assert len(by_hand["losses"]) == 11 and by_hand["right"]
    assert fresh.run("at('step').disabled")
    assert fresh.run("state.line[state.kept]") == min(by_hand["losses"])
    fresh.click("#again")
    assert len(fresh.run(WHERE)["losses"]) == 1
    fresh.click("#ten")
    assert fresh.run("at('ten').textContent") == "Stop"
    fresh.run(DONE)
    assert fresh.run(WHERE)["losses"] == pytest.approx(by_hand["losses"])


DONE = """new Promise((resolve) => {
    const look = () => (state.playing ? setTimeout(look, 50) : resolve());
    look();
})"""


@pytest.mark.full
@needs_browser
def test_every_guide(browser):
    """Choosing what to follow runs its method; the oracle and a wrong answer get where they aim."""
    browser.open(DOCS)
    for guide in ("random", "regression", "crowd", "oracle", "wrong"):
        browser.click(f"#guides input[value={guide}]")
        browser.run(DONE)
        assert browser.run("state.kept") is not None and len(browser.run("state.line")) == 11
    assert browser.run("state.line.at(-1) < state.line[0]")
    browser.click("#challenge")
    assert not browser.run(WHERE)["right"]
    assert browser.problems == []


@pytest.mark.full
@needs_browser
def test_a_question_of_ones_own(browser):
    """Menus ask any question, and the page knows what is right."""
    browser.open(DOCS)
    task = SkillsTask(0)
    choose(browser, dialect=2, a=3, b=4, cue=20)
    assert browser.run("state.tokens") == [45, 3, 4, 36]
    assert browser.run("state.label") == task.answer[20, 2, 3, 4]
    assert browser.run("state.other") == task.other[20, 2, 3, 4]


def choose(browser, **values):
    """Choose from the menus of a question."""
    browser.run("at('own-question').open = true")
    for name, value in values.items():
        menu = f"document.querySelector('[name={name}]')"
        browser.run(f"{menu}.value = {value}, {menu}.onchange()")


@pytest.mark.full
@needs_browser
@pytest.mark.parametrize("trained", [True, False], ids=["a trained pair", "an unseen pair"])
def test_a_composition(trained, browser, tmp_path):
    """The page says how g(f(x)) comes about, and whether the pair was trained; A and B are rows."""
    task, path = CompositionTask(0), tmp_path / "page.html"
    data = page_data(random_model(vocab_size=task.vocab_size, **KINDS["Cartesian"]), task, "pairs")
    path.write_text(assemble(data), encoding="utf-8")
    browser.open(path)
    f, g = task.pairs["train" if trained else "dev"][0].tolist()
    choose(browser, f=f, g=g, x=7)
    tokens, label = task.solved(np.array([[f, g]]), np.array([7]))
    middle = task.functions[0, f, 7]
    assert browser.run("state.tokens") == tokens[0].tolist()
    assert browser.run("state.label") == label.item()
    assert browser.run("at('said').textContent") == f"What is g{g}(f{f}(7))?"
    why = browser.run("at('why').textContent")
    assert f"f{f}(7) = {middle}, then g{g}({middle}) = {label.item()}." in why
    assert ("It was trained on these" if trained else "It never saw these") in why
    places = browser.run("[...document.querySelectorAll('.place')].map((e) => e.textContent)")
    assert places == ["layer 1 B", "layer 1 A", "layer 0 B", "layer 0 A"]

    # How many are right without NGD, of all that the page may ask.
    asked = task.problems("dev")
    with torch.no_grad():
        said = model_of(data)(asked.tokens).logits[:, -1].argmax(-1)
    share = (said == asked.labels).float().mean()
    told = browser.run("at('on-average').textContent").split()
    assert f"Of all {len(said)} the model answers {100 * share:.0f} % right" in " ".join(told)
    assert browser.problems == []
