"""The data: labels that are right, splits that do not leak, batches that depend on (seed, step) alone."""

import numpy as np
import pytest
import torch

from data import SKILLS, SkillsTask
from moe import IGNORE

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
    """(cue, a, b) of the tokens marker, a, b, cue."""
    _, a, b, cue = prompt
    return cue - 16, a, b


def readings(task, cue, a, b):
    """The answers that a cue can have, with the dialects in which it has them."""
    names = list(SKILLS)
    return {d: PLAIN[names[task.meaning[cue, d]]](a, b) for d in range(4)}


@pytest.mark.parametrize("split", SkillsTask.splits)
def test_labels_are_right(split):
    """Every label is what the marker's dialect makes of the cue; `other` is what the other dialects make of it."""
    task = SkillsTask(3)
    prompts = task.prompts(split)
    for tokens, label, other, skill, clear in zip(
        *(t.tolist() for t in (prompts.tokens, prompts.labels, prompts.other, prompts.skill, prompts.clear)),
        strict=True,
    ):
        (cue, a, b), dialect = cell(tokens), tokens[0] - 43
        answers = readings(task, cue, a, b)
        assert label == answers[dialect] == PLAIN[list(SKILLS)[skill]](a, b)
        swapped = [d for d in range(4) if task.meaning[cue, d] != task.meaning[cue, dialect]]
        assert clear == (not swapped) and len(swapped) in (0, 2)  # two dialects read an ambiguous cue the other way
        assert other == (answers[swapped[0]] if swapped else label)


def test_no_cell_in_two_splits():
    """A model is never asked about operands of a cue that it, or its references, have seen: in whatever dialect."""
    task = SkillsTask(1)
    cells = {split: {cell(p) for p in task.prompts(split).tokens.tolist()} for split in task.splits}
    assert [len(cells[split]) for split in task.splits] == [3328, 1664, 666, 998]
    assert len(set.union(*cells.values())) == 26 * 16 * 16  # so no cell is in two of them
    seen = {cell(p[:4]) for p in torch.cat([task.batch(step, 512)[0] for step in range(20)]).view(-1, 5).tolist()}
    assert seen <= cells["train"] and len(seen) > 3300
    assert [len(task.prompts(split).labels) for split in task.splits] == [4 * 3328, 4 * 1664, 666, 998]


def test_every_cue_is_used_as_declared():
    """Ten clear cues share out the ten skills; sixteen ambiguous ones have two skills, in two dialects each."""
    meaning = SkillsTask(2).meaning
    assert sorted(meaning[:10, 0]) == list(range(10)) and (meaning[:10] == meaning[:10, :1]).all()
    for row in meaning[10:]:
        assert sorted(np.unique(row, return_counts=True)[1]) == [2, 2]


def test_training_sequences():
    """Four solved examples in a row, loss at the answers only, the dialect shown in 5 % and one cue in 25 % of them."""
    task = SkillsTask(0)
    tokens, targets = task.batch(7, 20_000)
    examples, wanted = tokens.view(-1, 4, 5), targets.view(-1, 4, 5)
    assert (wanted[..., 3] == examples[..., 4]).all() and (wanted[..., [0, 1, 2, 4]] == IGNORE).all()
    shown = examples[..., 0] > task.NONE
    assert abs(shown.float().mean() - 0.05) < 0.005
    same = (examples[..., 3] == examples[:, :1, 3]).all(1).float().mean()
    assert abs(same - 0.25) < 0.015
    for marker, a, b, cue, y in examples[:500].reshape(-1, 5).tolist():
        answers = readings(task, cue - 16, a, b)
        assert y in answers.values() if marker == task.NONE else y == answers[marker - 43]


def test_a_batch_depends_on_seed_and_step_alone():
    """Batches can be had in any order, again and again: that is what makes an exact resume simple."""
    first = SkillsTask(5).batch(3, 8)
    later = SkillsTask(5)
    later.batch(0, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, later.batch(3, 8), strict=True))
    assert not torch.equal(first[0], later.batch(4, 8)[0]) and not torch.equal(first[0], SkillsTask(6).batch(3, 8)[0])


def test_bad_names():
    """An unknown split is answered with the known ones."""
    with pytest.raises(ValueError, match="it has train, reference, dev, test"):
        SkillsTask().prompts("valid")
