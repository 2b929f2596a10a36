"""The oracle's matched null, and what a pathway knows: each measure gives what it must on made-up
data whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data import SkillsTask
from lab.remixing.arena import Arena, own_answers
from lab.remixing.knowledge import (
    ANSWERS,
    LEVELS,
    exchange,
    knowledge_report,
    measure_knowledge,
    variance,
)
from lab.remixing.reach import RIGHT, WRONG, Targets, at_equal_priors, by_prior, targets_of
from moe import MoEConfig, MoETransformer
from pathways import ReferenceSet

SOLVED = SkillsTask(0).prompts("reference")


def made_up(seed: int, reached) -> Targets:
    """2,000 targets, of which right ones are more probable; reached: a function of prior, right."""
    rng = np.random.default_rng(seed)
    right = rng.random(2000) < 0.2
    prior = np.exp(rng.normal(np.where(right, -2, -5), 1))
    return Targets(prior, reached(prior, right), right, rng.integers(26, size=2000))


def test_matched_null_depends_on_the_prior_alone():
    """Where only the prior decides, right and wrong labels are reached alike at equal priors,
    though all in all right ones far more often; where only knowledge decides, they differ."""
    forced = [made_up(seed, lambda prior, right: prior > 0.05) for seed in range(3)]
    plain = [each.reached[each.right].mean() - each.reached[~each.right].mean() for each in forced]
    assert np.mean(plain) > 0.5
    result = at_equal_priors(forced)["difference"]
    assert abs(result["mean"]) < 0.02 and result["low"] <= 0.01
    for row in by_prior(forced):
        if row["from"] >= 0.05 or row["to"] <= 0.05:
            assert row["mean"] == (row["from"] >= 0.05)

    known = [made_up(seed, lambda prior, right: right) for seed in range(3)]
    assert at_equal_priors(known)["difference"]["low"] == 1


def directions(group) -> torch.Tensor:
    """A random vector for each group, the same for all references of the group: (m, 5)."""
    number = group.unique(dim=0, return_inverse=True)[1]
    return torch.randn(int(number.max()) + 1, 5)[number]


MADE_OF = {
    "cue": SOLVED.cue[:, None],
    "operands": SOLVED.tokens[:, 1:],
    "reading": torch.cat([SOLVED.tokens[:, 1:], SOLVED.skill[:, None]], 1),
    "dialect": SOLVED.tokens,
}


@pytest.mark.parametrize("level", LEVELS)
def test_variance_falls_to_what_it_is_made_of(level):
    """Vectors of one level are explained by it and not by smaller groups; clear cues have one
    reading, so of vectors of a reading the operands explain the share of the clear cells and, of
    two readings, what they have in common."""
    torch.manual_seed(0)
    shares = variance(directions(MADE_OF[level]), SOLVED)
    assert sum(shares.values()) == pytest.approx(1)
    if level == "reading":
        clear = float(SOLVED.clear.float().mean())
        expected = {"cue": 0, "operands": clear + (1 - clear) / 3, "dialect": 0}
        expected["reading"] = 1 - expected["operands"]
        expected = {name: pytest.approx(value, abs=0.05) for name, value in expected.items()}
    else:
        expected = {name: pytest.approx(float(name == level), abs=0.06) for name in LEVELS}
    assert shares == expected


@pytest.fixture(scope="module")
def arena() -> Arena:
    """A small model, not trained, on 40 prompts."""
    torch.manual_seed(0)
    task = SkillsTask(0)
    config = MoEConfig(task.vocab_size, d_model=16, n_layers=2, n_experts=4, top_k=1, d_expert=8)
    model = MoETransformer(config).eval()
    for router in model.routers():
        router.weight.data *= 20
    asked = task.prompts("test")
    asked = type(asked)(*(column[:40] for column in asked))
    references = ReferenceSet.build(model, SOLVED.tokens, SOLVED.labels)
    return Arena(model, asked.tokens, asked.labels, references, about=asked, task="skills")


def test_targets_are_what_is_not_answered(arena):
    """Of prompts answered wrong every label but the answer, and so the right one once."""
    base = own_answers(arena)
    answer = base.logits.argmax(-1)
    targets = targets_of(arena)
    wrong = answer != arena.labels
    assert len(targets.prior) == 16 * wrong.sum() - (answer[wrong] < 16).sum()
    assert targets.right.sum() == wrong.sum() > 0
    largest = float(base.logits.softmax(-1).max())
    assert (targets.prior > 0).all() and (targets.prior < largest).all()


def test_exchange_of_pathways(arena):
    """Along its own pathway a reference answers as it does by itself."""
    own = arena.tail.pathways(arena.references)
    shares = exchange(arena, own, own, SOLVED)
    differs = SOLVED.labels != SOLVED.other
    right = arena.references.correct[differs].float().mean()
    assert shares["natural"]["right"] == pytest.approx(float(right), abs=1e-3)
    assert shares["natural, same reading"] == shares["mended, same reading"]
    for row in shares.values():
        assert tuple(row) == ANSWERS and sum(row.values()) == pytest.approx(1)


@pytest.mark.full
def test_three_runs_make_a_report(arena):
    """All measurements, with intervals over seeds, as a table."""
    quick = replace(arena, task=None, config=replace(arena.config, steps=1))
    text = knowledge_report({"runs": ["a", "b", "c"]} | measure_knowledge([quick] * 3))
    assert all(words in text for words in (RIGHT, WRONG, "3 seeds"))
