"""Re-mixing and its rivals: no method sees a label, and each does what its name says."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import close, decided, full, refused
from pretended import PretendedDevice, move

import eval as eval_py
from lab.remixing import cost
from lab.remixing.arena import Arena, Outcome, judged, own_answers
from lab.remixing.contest import cases, pooled, run_contest
from lab.remixing.controls import wrong_labels
from lab.remixing.corrections import carried_corrections, mended_pathways, shuffled_corrections
from lab.remixing.methods import METHODS, Method, operations, run_method, tuned_settings
from lab.remixing.rivals import tuned_model
from lab.remixing.sweeps import run_sweeps
from lab.remixing.tables import contest_report, gain_table
from moe import MoEConfig, MoETransformer
from pathways import ReferenceSet, padded
from remix import RemixConfig


def an_arena(lengths, n_references: int, **sizes) -> Arena:
    """Six prompts of these lengths in turn; of three references the model knows two."""
    sizes = {"n_layers": 3, "n_experts": 8, "top_k": 2, "d_expert": 8} | sizes
    config = MoEConfig(11, context=32, d_model=16, **sizes)
    model = decided(MoETransformer(config)).double().eval()
    solved = [torch.randint(1, 11, (lengths[i % 3],)) for i in range(n_references)]
    asked = [torch.randint(1, 11, (lengths[i % 3],)) for i in range(6)]
    for row in asked:
        row[0] = 0  # no reference begins so
    labels = torch.stack([model(row[None]).logits[0, -1].argmax() for row in solved])
    labels[::3] = (labels[::3] + 1) % 11
    tokens, lengths = padded(asked, 11)
    references = ReferenceSet.build(model, solved, labels)
    settings = RemixConfig(embedding="tfidf", steps=3)
    return Arena(model, tokens, torch.arange(6), references, settings, lengths)


@pytest.fixture
def arena() -> Arena:
    return an_arena((3, 4, 5), 30)


def brief(name) -> dict:
    """Settings by which even what trains once is soon done."""
    trains = name in METHODS and METHODS[name].once_for_each
    return {"steps": 5, "batch": 8} if trains else {}


TAUGHT = ["NGD", "kernel regression", "in-context", "prefix for each", "oracle"]
OTHERS = [name for name in METHODS if name not in TAUGHT]


@pytest.mark.parametrize("name", [*TAUGHT, *full(*OTHERS)])
def test_no_method_sees_a_label(arena, name):
    """Other labels, the same answers; only what aims at one answers otherwise.

    Each method is deterministic, and leaves the model and its own answers as they were."""
    weights = [weight.clone() for weight in arena.model.parameters()]
    first = run_method(name, arena, **brief(name))
    assert torch.equal(first.logits, run_method(name, arena, **brief(name)).logits)
    assert torch.equal(first.logits_before, own_answers(arena).logits)
    assert all(map(torch.equal, weights, arena.model.parameters()))
    if name not in ("entropy", "noisy ensemble"):
        assert not torch.equal(first.logits, first.logits_before)

    assert (wrong_labels(arena) != arena.labels).all()
    arena.labels = (arena.labels + 5) % 11
    other = run_method(name, arena, **brief(name))
    aims = name in ("oracle", "random wrong label")
    assert torch.equal(other.logits, first.logits) != aims


def test_every_method_has_settings(arena):
    """A method has settings that were tried for it, or it shares another's; else it is refused.

    So all controls of NGD take its steps, and what a user gives reaches them too."""
    arena.task = "skills"
    for name, method in METHODS.items():
        owner = METHODS[method.like or name]
        tuned = owner.tuned["skills"]
        assert tuned in owner.tries
        expected = tuned | ({"lr": 0.7} if owner is METHODS["NGD"] else {})
        assert tuned_settings(name, arena, {"lr": 0.7}) == expected
    with refused("a method needs settings to try"):
        Method(own_answers)


def test_corrections_of_anyone(arena):
    """Corrections ask all references; shuffled ones are moved by those of others."""
    own = carried_corrections(arena, scale=1.5)
    assert not arena.references.correct[own.neighbours.index].all()
    shuffled = shuffled_corrections(arena, scale=1.5)
    assert torch.equal(shuffled.neighbours.index, own.neighbours.index)
    assert (shuffled.pathway - own.pathway).abs().amax((1, 2)).min() > 1e-3
    still = mended_pathways(arena, share=0.0)
    close(still.pathway, still.pathway_before)


def test_in_context_is_a_longer_prompt(arena):
    """The solved neighbours stand before the prompt, the nearest last. A vote counts labels."""
    logits = run_method("in-context", arena).logits
    votes = run_method("kNN vote", arena).logits
    references, near = arena.references, arena.neighbours
    for i, length in enumerate(arena.lengths):
        row = arena.tokens[i, :length]
        expected = torch.zeros(11)
        for j, weight in zip(near.index[i], near.weight[i], strict=True):
            solved = references.tokens[j, : references.lengths[j]]
            row = torch.cat([solved, references.labels[j, None], row])
            expected[references.labels[j]] += weight
        close(logits[i], arena.model(row[None]).logits[0, -1])
        close(votes[i].float(), expected, 1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name.endswith((" each", " all"))])
def test_a_prompt_before_the_prompt(arena, name):
    """Without a step both are their start: two mean embeddings before the prompt."""
    logits = run_method(name, arena, length=2, steps=0).logits
    model = arena.model
    mean = model.embedding.weight.mean(0).expand(1, 2, -1)
    for i, length in enumerate(arena.lengths):
        x = torch.cat([mean, model.embed(arena.tokens[i : i + 1, :length])], 1)
        close(logits[i], model.head(model.run_blocks(x))[0, -1])


@pytest.mark.parametrize("only_routers", [True, False], ids=["routers", "all weights"])
def test_tuning_learns_the_references(arena, only_routers):
    """Tuned weights answer the references better, and only what was to be trained moves."""
    tuned = tuned_model(arena, only_routers, lr=1e-2, steps=10, batch=8)
    references = arena.references

    def loss(model):
        valid = torch.arange(5) < references.lengths[:, None]
        logits = model(references.tokens, valid=valid).logits
        last = logits[torch.arange(len(logits)), references.lengths - 1]  # (m, V)
        return F.cross_entropy(last[references.correct], references.labels[references.correct])

    assert loss(tuned) < loss(arena.model)
    before = dict(arena.model.named_parameters())
    for name, weight in tuned.named_parameters():
        moved = not torch.equal(weight, before[name])
        assert moved or "router" not in name
        assert "router" in name or not (moved and only_routers)


def test_pooled_counts():
    """Accuracy, gain, fixed and broken of two runs, by hand; then on two of the four prompts."""
    base = np.array([True, True, False, False])
    after = np.array([True, False, True, True])
    changed = np.array([True, False, False, False])
    outcomes = (Outcome(right, right, changed, 0.004) for right in (base, after))
    run = dict(zip(("base", "NGD"), outcomes, strict=True))
    clusters = [np.arange(4)] * 2
    row = pooled([run, run], clusters)["NGD"]
    expected = {"accuracy": 0.75, "gain": 0.25, "fixed": 1, "broken": 0.5, "changed": 0.25, "ms": 1}
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    row = pooled([run, run], clusters, [base, base])["NGD"]
    assert (row["gain"], row["each"]) == (-0.5, [0.5, 0.5])


@pytest.mark.full
def test_contest_and_report(arena):
    """Three runs: a table, tests over the seeds; and the contest beside itself, in pairs."""
    names = ["NGD", "kernel regression", "oracle", "random wrong label"]
    folders = [Path(f"skills-s{seed}") for seed in range(3)]
    result = run_contest(folders, [arena] * 3, names, {}, [], "3 seeds, dev")
    assert set(json.loads(json.dumps(result))) == set(result)
    text = contest_report(result)
    assert f"{result['rows']['NGD']['accuracy']:.1%}" in text
    assert "tests in pairs, 3 seeds" in text
    assert "+0.0% (+0.0% to +0.0%)" in gain_table(result, result)


@pytest.mark.full
def test_sweeps():
    """Every variation runs; those that are NGD as it is gain the same."""
    result = run_sweeps([an_arena((3, 3, 3), 90, n_layers=4, n_experts=16)])
    gains = {value: row["gain"] for rows in result.values() for value, row in rows.items()}
    for value in ("gaussian", "last", "0.5", "logits normed 0.5", "6656"):
        assert gains[value] == gains["all"]


@pytest.mark.full
def test_formula_is_what_the_profiler_counts():
    """The formula against torch's own count of a real run; both forms find the same losses."""
    sizes = MoEConfig(97, 32, 32, 3, 2, n_experts=8, top_k=2, d_expert=32)
    T, n = 24, 2
    _, operations, apart = cost.measure_ngd(sizes, T, "last:2", 2 * n, n, torch.float64, rounds=1)
    assert apart < 1e-12

    model = MoETransformer(sizes).double().eval()
    x = model.embed(torch.zeros(1, T, dtype=torch.int64)).detach()
    with torch.no_grad():
        forward = cost.count_operations(lambda: model.head(model.run_blocks(x)[:, -1]))
    counts = [operations[name] / forward for name in ("exact", "prefixes", "naive")]
    _, steps, prefixes, naive = cost.formula(sizes, T, 2, 3, 10).values()
    assert counts == pytest.approx([steps, prefixes * (T - 1) / T, naive], rel=0.05)
    olmoe = list(cost.formula(cost.OLMOE, 100, 5, 3, 10).values())
    assert olmoe == pytest.approx([0.18, 0.25, 3.0, 40], rel=0.1)


COUNTED = ["router tuning", "corrections", *full("NGD", "prefix for all", "RoMA", "in-context")]


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_those_of_the_whole_method(name):
    """What is counted on a few references or steps is what the method does with all of them."""
    arena = an_arena((4, 4, 4), 150)
    once, each = operations(name, arena, {})
    whole = cost.count_operations(lambda: run_method(name, arena.cold()))
    assert once + 6 * each == pytest.approx(whole, rel=1e-3)
    assert (once > 0) == (name in [other for other in METHODS if METHODS[other].once_for_each])


def test_what_does_not_fit_is_left_out(arena, capsys):
    """Where the context is full a prompt stands alone, and is answered as without examples."""
    arena.model.config.context = 9  # the prompts have 3 to 5 tokens, an example 4 to 6
    result = run_method("in-context", arena)
    alone = torch.isclose(result.logits, result.logits_before, atol=1e-5).all(1)  # (6,)
    assert 0 < alone.sum() < 6
    assert f"{alone.sum()} of 6 prompts stand alone" in capsys.readouterr().err


def test_a_method_that_fails_costs_its_row_only(arena, monkeypatch, capsys):
    """The other rows are kept, and the reason is told."""

    def failing(arena, **settings):
        raise ValueError("too large")

    monkeypatch.setitem(METHODS, "entropy", Method(failing, like="NGD"))
    result = run_contest([Path("a")], [arena], ["NGD", "entropy", "oracle"], {}, [], "one run")
    assert [*result["rows"]] == ["base", "NGD", "oracle"]
    assert "no row entropy: too large" in capsys.readouterr().err
    contest_report(result)


def test_an_interrupted_contest_keeps_its_rows(arena, call, monkeypatch, capsys):
    """Ctrl-C: the rows so far are shown and kept, and a command is named for the others."""

    def interrupt(arena, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_py, "arena_of", lambda *given: arena)
    monkeypatch.setitem(METHODS, "entropy", Method(interrupt, like="NGD"))
    assert call(eval_py, "remix a --methods oracle,entropy,NGD") == 130
    text = capsys.readouterr().out
    assert "oracle" in text and text.endswith(
        "interrupted: 2 methods are missing; for them:\n    python eval remix a --methods "
        "oracle,entropy,NGD --methods entropy,NGD --out a/rest\n"
    )
    result = json.loads(Path("a/remix-dev-interrupted.json").read_text())
    assert [*result["rows"]] == ["base", "oracle"] and result["missing"] == ["entropy", "NGD"]


def test_cases_are_in_words(arena):
    """Up to three prompts that NGD mends and one that it breaks, with what was answered."""
    right = np.array([True, False, False, False, False, True])
    before = Outcome(np.arange(6) + ~right, right, right, 0.0)
    outcomes = {
        "base": before,
        "NGD": Outcome(np.array([0, 1, 2, 3, 4, 6]), ~before.right, right, 0.0),
    }
    outcomes["NGD"].right[0] = True
    rows = cases(outcomes, arena)
    assert [row[0] for row in rows] == ["mended"] * 3 + ["broken"]
    assert rows[3] == ["broken", arena.words(arena.tokens[5, :5].tolist()), "5", "6", "5"]


@pytest.mark.full
def test_commands(train, call, capsys):
    """A run ends with a taste of re-mixing; eval.py remix prints the table and writes files."""
    assert train("--taste --steps 2 --out out/a") == 0
    flags = "--split test --most 12 --methods NGD,oracle --steps 2 --strict"
    assert call(eval_py, f"remix out/a {flags}") == 0
    text = capsys.readouterr().out
    assert "re-mixing its experts" in text
    assert "clear cues" in text
    result = json.loads(Path("out/a/remix-test-strict.json").read_text())
    assert list(result["rows"]) == ["base", "NGD", "oracle"]
    assert len(list(Path("out/a").glob("remix-test-strict*.png"))) == 2


@pytest.mark.parametrize("name", ["base", "NGD", *full(*TAUGHT[1:], *OTHERS)])
def test_another_device(arena, name):
    """A model on a device of its own is judged as on the CPU; no two devices meet in a row."""
    arena.options = torch.stack([torch.arange(6), torch.arange(6) + 4], 1)
    options = torch.stack([arena.references.labels, (arena.references.labels + 1) % 11], 1)
    arena.references = replace(arena.references, options=options)
    arena.config = replace(arena.config, loss="options")
    method = own_answers if name == "base" else partial(run_method, name, **brief(name))
    expected = judged(replace(arena), method)
    with PretendedDevice():
        move(arena.model)
        there = judged(replace(arena), method)
    for ours, theirs in zip(there[:3], expected[:3], strict=True):
        assert (ours == theirs).all()
