"""Re-mixing and its rivals: nobody sees a label, each does what its name says, and the numbers are counted right."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_eval import call
from test_moe import tiny

import eval as eval_py
import train_toy
from lab import cost, stats
from lab.baselines import METHODS, Arena, fine_tuning, plain, wrong_labels
from lab.contest import Outcome, summary
from remix import ReferenceSet, RemixConfig, choose, padded

SMALL = "--steps 2 --batch 2 --eval-every 2 --d-model 16 --n-layers 2 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"


@pytest.fixture
def arena(n=6, m=30):
    """Six samples of three to five tokens; of thirty references the model answers two thirds right."""
    model = tiny(context=32).eval()
    known, asked = ([torch.randint(1, 11, (3 + i % 3,)) for i in range(count)] for count in (m, n))
    asked = [torch.cat([torch.zeros(1, dtype=torch.int64), row]) for row in asked]
    (tokens, lengths), (rows, sizes) = padded(known, 11), padded(asked, 11)
    labels = model(tokens, valid=torch.arange(tokens.shape[1]) < lengths[:, None]).logits
    labels = labels[torch.arange(m), lengths - 1].argmax(-1)
    labels[::3] = (labels[::3] + 1) % 11
    config = RemixConfig(embedding="tfidf", duplicate=1.0, steps=3)
    return Arena(model, rows, torch.arange(n) % 11, ReferenceSet.build(model, known, labels), config, sizes)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_sees_a_label(arena, name):
    """Other labels, the same answers; only the oracle and its null answer otherwise. Each method is deterministic,
    keeps base apart, and leaves the model as it was."""
    method, weights = METHODS[name], [weight.clone() for weight in arena.model.parameters()]
    if name in ("router tuning", "router tuning, RoMA", "full fine-tuning"):
        method = functools.partial(method, steps=5, batch=8)
    first, again, base = method(arena), method(arena), plain(arena, arena.model)
    assert torch.equal(first.logits, again.logits) and torch.equal(first.logits_before, base.logits)
    assert all(map(torch.equal, weights, arena.model.parameters()))
    arena.labels = (arena.labels + 5) % 11
    assert torch.equal(method(arena).logits, first.logits) != name.startswith("oracle")
    if name not in ("entropy", "noisy ensemble"):
        assert not torch.equal(first.logits, first.logits_before)


def test_rivals_do_what_they_say(arena):
    """In-context learning is a longer prompt; a vote counts labels; tuned routers leave all other weights; a soft
    prompt and a prefix that take no step are their start; the null's labels are wrong."""
    found = arena.neighbours
    shown, n = METHODS["in-context"](arena), arena.lengths
    known = arena.references
    for i in range(len(n)):
        solved = [torch.cat([known.tokens[j, : known.lengths[j]], known.labels[j, None]]) for j in found.index[i]]
        long = torch.cat([*reversed(solved), arena.tokens[i, : n[i]]])
        torch.testing.assert_close(shown.logits[i], arena.model(long[None]).logits[0, -1])
        votes = torch.zeros(11).index_add(0, known.labels[found.index[i]], found.weight[i])
        torch.testing.assert_close(METHODS["kNN vote"](arena).logits[i].float(), votes)
    mean = arena.model.embedding.weight.mean(0).expand(len(n), 2, -1)
    x = torch.cat([mean, arena.model.embed(arena.tokens)], 1)
    valid = torch.arange(x.shape[1]) < n[:, None] + 2
    expected = arena.model.head(arena.model.run(x, valid))[torch.arange(len(n)), n + 1]
    for name in ("soft prompt", "prefix tuning"):
        torch.testing.assert_close(METHODS[name](arena, length=2, steps=0).logits, expected)
    assert (wrong_labels(arena) != arena.labels).all()
    moved = METHODS["best of 21 routes"](arena, noise=2.0).losses
    assert (moved[:, 1] <= moved[:, 0]).all() and (moved[:, 1] < moved[:, 0]).any()


def test_fine_tuning_learns(arena, monkeypatch):
    """Tuned weights answer the references better; only the routers move where only they were asked for."""
    kept, known, usable, deepcopy = [], arena.references, arena.references.correct, copy.deepcopy
    monkeypatch.setattr("lab.baselines.copy.deepcopy", lambda model: kept.append(deepcopy(model)) or kept[-1])

    def loss(model):
        valid = torch.arange(known.tokens.shape[1]) < known.lengths[:, None]
        logits = model(known.tokens, valid=valid).logits[torch.arange(30), known.lengths - 1]
        return F.cross_entropy(logits[usable], known.labels[usable])

    for routers in (True, False):
        fine_tuning(arena, routers, lr=1e-2, steps=10, batch=8)
        tuned = dict(kept[-1].named_parameters())
        moved = {name for name, weight in arena.model.named_parameters() if not torch.equal(weight, tuned[name])}
        assert all(("router" in name) or not routers for name in moved)
        assert {name for name in tuned if "router" in name} <= moved
        assert loss(kept[-1]) < loss(arena.model)


def test_bootstrap():
    """Without spread the interval is a point; clusters count, not samples; seeds that differ widen it."""
    clusters = [np.repeat(np.arange(25), 4)] * 3
    rng = np.random.default_rng(0)
    assert stats.bootstrap([np.full(100, 0.25)] * 3, clusters) == (0.25, 0.25)
    alike = [np.repeat(rng.normal(size=25), 4) for _ in clusters]  # the four samples of a cluster are one
    (low, high), (near, far) = stats.bootstrap(alike, clusters), stats.bootstrap(alike, [np.arange(100)] * 3)
    assert high - low > 1.2 * (far - near)  # four copies are not four samples
    apart = [values + shift for values, shift in zip(alike, (-1, 0, 1), strict=True)]
    wide_low, wide_high = stats.bootstrap(apart, clusters)
    assert wide_high - wide_low > 1.5 * (high - low) and low < np.mean(alike) < high
    assert stats.paired([1, 2, 3], [0, 1.5, 1]) == pytest.approx(0.1181, abs=1e-3)


def test_summary_counts():
    """Accuracy, gain, fixed and broken of two runs, by hand."""
    base, after = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    changed, rows = np.array([1, 0, 0, 0], bool), {"base": base, "NGD": after}
    run = {name: Outcome(right, right, changed, 0.004) for name, right in rows.items()}
    row = summary([run, run], [np.arange(4)] * 2)["NGD"]
    found = [row[key] for key in ("accuracy", "gain", "fixed", "broken", "changed", "ms")]
    assert found == pytest.approx([0.75, 0.25, 1.0, 0.5, 0.25, 1.0])
    part = summary([run, run], [np.arange(4)] * 2, [base, base])["NGD"]
    assert part["gain"] == -0.5 and part["each"] == [0.5, 0.5]


def test_formula_is_what_the_profiler_counts():
    """The formula's rows against torch's own count of a real run; and both forms of NGD find the same losses."""
    sizes, T, n = cost.MoEConfig(97, 32, 32, 3, 2, n_experts=8, top_k=2, d_expert=32), 24, 2
    _, counts, apart = cost.race(sizes, T, "last:2", 2 * n, n, torch.float64, rounds=1)
    model = cost.MoETransformer(sizes).double().eval()
    with torch.no_grad():
        forward = cost.counted(lambda: model.head(model.run(model.embed(torch.zeros(1, T, dtype=torch.int64)))[:, -1]))
    rows = [*cost.formula(sizes, T, 2, 3, 10).values()]
    found = [counts[name] / forward for name in ("exact", "prefixes", "naive")]
    assert found == pytest.approx([rows[1], rows[2] * (T - 1) / T, rows[3]], rel=0.05) and apart < 1e-12
    olmoe = [*cost.formula(cost.OLMOE, 100, 5, 3, 10).values()]
    assert olmoe[:3] == pytest.approx([0.18, 0.25, 3.0], abs=0.015) and 35 < olmoe[3] < 45


def test_commands(tmp_path, monkeypatch, capsys):
    """A run ends with a taste of re-mixing; eval.py remix prints the table, and writes JSON and figures."""
    monkeypatch.chdir(tmp_path)
    assert call(train_toy.main, "train_toy.py", f"{SMALL} --out out/a") == 0
    assert "kernel regression" in capsys.readouterr().out
    line = "remix out/a --split test --most 12 --methods NGD,oracle --steps 2 --strict"
    assert call(eval_py.main, "eval.py", line) == 0
    text, found = capsys.readouterr().out, json.loads(Path("out/a/remix-test-strict.json").read_text())
    assert found["rows"].keys() == {"base", "NGD", "oracle"} and found["prompts"] == 12
    assert f"{found['rows']['NGD']['accuracy']:.1%}" in text and "clear cues" in text
    assert len([*Path("out/a").glob("remix-test-strict*.png")]) == 3
    assert call(eval_py.main, "eval.py", "remix --methods NDG") == 2
    assert call(eval_py.main, "eval.py", "remix --layers last:9") == 1
    assert call(eval_py.main, "eval.py", "remix --kernel gausian") == 2
    assert call(eval_py.main, "eval.py", "remix --beside out/a out/a") == 2
    assert call(eval_py.main, "eval.py", "remix --most 0") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 5 and "did you mean NGD?" in errors[0]


def test_choose():
    """The most probable token, or the most probable option."""
    logits, options = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[3, 1]])
    assert choose(logits).tolist() == [0] and choose(logits, options).tolist() == [1]
