"""The skills task: labels that are right, splits that do not leak, batches that can be repeated."""

import hashlib

import numpy as np
import pytest
import torch

from data import SKILLS, SkillsTask
from moe import IGNORE, MoEConfig, MoETransformer

# The ten skills once more, in plain Python and independent of data.py.
PLAIN = {
    "max(a, b)": lambda a, b: a if a > b else b,
    "min(a, b)": lambda a, b: b if a > b else a,
    "a": lambda a, b: a,
    "b": lambda a, b: b,
    "a + 1": lambda a, b: 0 if a == 15 else a + 1,
    "b + 1": lambda a, b: 0 if b == 15 else b + 1,
    "|a - b|": lambda a, b: a - b if a > b else b - a,
    "(a + b) / 2": lambda a, b: int((a + b) / 2),
    "15 - a": lambda a, b: list(range(15, -1, -1))[a],
    "15 - b": lambda a, b: list(range(15, -1, -1))[b],
}


def cell(prompt):
    """The cell (cue, a, b) of the tokens marker, a, b, cue."""
    _, a, b, cue = prompt
    return cue - 16, a, b


def answers_by_dialect(task, cue, a, b) -> list[int]:
    """What a cue makes of a and b in each of the four dialects."""
    names = list(SKILLS)
    return [PLAIN[names[task.meaning[cue, dialect]]](a, b) for dialect in range(4)]


@pytest.mark.parametrize("split", ["reference", "dev"])
def test_labels_are_right(split):
    """A label is what the marker's dialect makes of the cue, `other` what other dialects make."""
    task = SkillsTask(3)
    prompts = task.prompts(split)
    for i, tokens in enumerate(prompts.tokens.tolist()):
        (cue, a, b), dialect = cell(tokens), tokens[0] - 43
        answers = answers_by_dialect(task, cue, a, b)
        skill = list(SKILLS)[prompts.skill[i]]
        assert prompts.labels[i] == answers[dialect] == PLAIN[skill](a, b)
        meaning = task.meaning[cue]
        others = [d for d in range(4) if meaning[d] != meaning[dialect]]
        assert prompts.clear[i] == (not others)
        assert len(others) in (0, 2)  # two dialects read an ambiguous cue the other way
        assert prompts.other[i] == answers[others[0] if others else dialect]


def test_no_cell_in_two_splits():
    """A model is never asked about a cell that it, or its references, have seen."""
    task = SkillsTask(1)
    cells = {}
    for split in task.splits:
        cells[split] = {cell(tokens) for tokens in task.prompts(split).tokens.tolist()}
    assert [len(cells[split]) for split in task.splits] == [3328, 1664, 666, 998]
    assert len(set.union(*cells.values())) == 26 * 16 * 16  # so no cell is in two of them
    batches = torch.cat([task.batch(step, 512)[0] for step in range(20)])
    seen = {cell(example[:4]) for example in batches.view(-1, 5).tolist()}
    assert seen <= cells["train"] and len(seen) > 3300
    examples, _ = task.corpus()
    assert {cell(example) for example in examples.tolist()} <= cells["train"]


def test_every_cue_is_used_as_declared():
    """Clear cues share out the ten skills; ambiguous ones have two skills, in two dialects each."""
    meaning = SkillsTask(2).meaning
    assert sorted(meaning[:10, 0]) == list(range(10))
    assert (meaning[:10] == meaning[:10, :1]).all()
    for row in meaning[10:]:
        assert sorted(np.unique(row, return_counts=True)[1]) == [2, 2]


def test_training_sequences():
    """Four solved examples in a row, a loss at the answers only; 5 % show their dialect, and in a
    quarter of the sequences all have one cue."""
    task = SkillsTask(0)
    tokens, targets = task.batch(7, 20_000)
    examples, targets = tokens.view(-1, 4, 5), targets.view(-1, 4, 5)
    assert (targets[..., 3] == examples[..., 4]).all()
    assert (targets[..., [0, 1, 2, 4]] == IGNORE).all()
    shown = (examples[..., 0] > task.NONE).float().mean()
    assert abs(shown - 0.05) < 0.005
    same = (examples[..., 3] == examples[:, :1, 3]).all(1).float().mean()
    assert abs(same - 0.25) < 0.015
    for marker, a, b, cue, y in examples[:500].reshape(-1, 5).tolist():
        answers = answers_by_dialect(task, cue - 16, a, b)
        assert y in answers if marker == task.NONE else y == answers[marker - 43]


def test_a_batch_depends_on_seed_and_step_alone():
    """Batches can be had in any order, again and again: that makes an exact resume simple."""
    tokens, targets = SkillsTask(5).batch(3, 8)
    task = SkillsTask(5)
    task.batch(0, 8)
    again = task.batch(3, 8)
    assert torch.equal(tokens, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(tokens, task.batch(4, 8)[0])
    assert not torch.equal(tokens, SkillsTask(6).batch(3, 8)[0])


def test_the_task_of_the_results():
    """The draws are those by which everything in results/ was measured."""
    task = SkillsTask(20)
    columns = [*task.batch(100, 64), *task.prompts("dev"), *task.prompts("reference")]
    digest = hashlib.sha256(b"".join(column.numpy().tobytes() for column in columns))
    assert digest.hexdigest()[:16] == "aab192daa99bcc68"


def test_scores_count_right_answers():
    """Scores are those of a plain loop over the prompts."""
    task, model = SkillsTask(0), MoETransformer(MoEConfig(vocab_size=47, n_layers=1)).eval()
    prompts, scores = task.prompts("dev"), task.score(model, "dev")
    logits = torch.cat([model(tokens[None]).logits[:, -1] for tokens in prompts.tokens])
    right = (logits.argmax(-1) == prompts.labels).float()
    nats = -logits.log_softmax(-1).gather(1, prompts.labels[:, None]).mean()
    assert scores["loss"] == pytest.approx(nats.item(), rel=1e-4)
    assert scores["accuracy"] == pytest.approx(right.mean().item(), abs=2 / 666)  # ties
    assert scores["clear"] == pytest.approx(right[prompts.clear].mean().item(), abs=4 / 666)


def test_unknown_split():
    """An unknown split is answered with the known ones."""
    with pytest.raises(ValueError, match="there are: train, reference, dev, test"):
        SkillsTask().prompts("valid")
