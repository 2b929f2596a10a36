"""Compositions: the task, and the experiment on it."""

import json
import math

import numpy as np
import pytest
import torch

from data import CompositionTask
from lab.composing import composition, composition_rows
from lab.composing.composition import bits_about
from lab.composing.composition_rows import TESTS, Row, difference, result_of, unseen
from lab.composing.presets import preset
from lab.remixing.arena import arena_of
from moe import IGNORE, MoEConfig


@pytest.fixture(scope="module")
def task():
    return CompositionTask(seed=3)


def pairs_of(task, tokens):
    """The functions (f, g) of prompts, as a set."""
    functions = tokens[:, :-1] - task.N - task.n_functions * torch.arange(task.n_in_a_row)
    return set(map(tuple, functions.tolist()))


def test_every_answer_is_g_of_f_of_x(task):
    problems = task.problems("test")
    for (f, g, x), y in zip(problems.tokens.tolist(), problems.labels.tolist(), strict=True):
        after_f = task.functions[0, f - 16, x]
        assert y == task.functions[1, g - 32, after_f]


def test_functions_are_permutations_and_the_first_is_the_identity(task):
    numbers = np.arange(16)
    assert (np.sort(task.functions, axis=-1) == numbers).all()
    assert (task.functions[:, 0] == numbers).all()


def test_no_pair_of_real_functions_stands_in_two_splits(task):
    dealt = [pair for split in task.splits for pair in map(tuple, task.pairs[split].tolist())]
    assert len(dealt) == len(set(dealt)) == 15 * 15


def test_training_shows_trained_pairs_and_single_steps_only(task):
    trained = set(map(tuple, task.pairs["train"].tolist()))
    alone = {(f, 0) for f in range(1, 16)} | {(0, g) for g in range(1, 16)}
    seen = set()
    single = 0
    for step in range(20):
        tokens, targets = task.batch(step, 256)
        assert (targets[:, :-1] == IGNORE).all()
        seen |= pairs_of(task, tokens)
        single += int(((tokens[:, 0] == 16) | (tokens[:, 1] == 32)).sum())
    assert seen == trained | alone
    assert abs(single / (20 * 256) - 0.5) < 0.03


def test_three_functions_in_a_row():
    task = CompositionTask(seed=1, n_functions=4, n_in_a_row=3, trained=0.5)
    tokens, labels = task.all_numbers(task.pairs["dev"])
    f, g, h, x = (tokens[5] - torch.tensor([16, 20, 24, 0])).tolist()
    first, second, third = task.functions
    assert labels[5] == third[h][second[g][first[f][x]]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_functions": 1}, "n_functions is 1"),
        ({"n_in_a_row": 0}, "n_in_a_row is 0"),
        ({"trained": 1.0}, "leaves 0 unseen"),
        ({"trained": 0.0}, "trains 0"),
    ],
    ids=["one function", "none in a row", "nothing unseen", "nothing trained"],
)
def test_impossible_tasks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompositionTask(0, **settings)


def test_information_is_all_where_the_expert_is_the_kind_and_none_where_it_is_not():
    kind = torch.arange(8).repeat(16)
    visit = torch.eye(8)[kind]
    assert math.isclose(bits_about(visit, kind), 3.0, abs_tol=1e-5)
    assert abs(bits_about(visit, torch.arange(16).repeat_interleave(8))) < 1e-5


def test_differences_are_of_common_seeds():
    ours, theirs = {1: 0.9, 2: 0.8, 3: 1.0}, {1: 0.5, 2: 0.4, 3: 0.6, 4: 0.0}
    assert difference(ours, theirs).startswith("+40.0 (+40.0 to +40.0)")
    assert difference(ours, {1: 0.5, 2: 0.4, 4: 0.0}) == ""  # two make no interval


def line_of(preset_name, seed, share, **changes):
    """A line of the results file, as far as a test reads it."""
    row = Row("test", preset_name, changes)
    return row._asdict() | {"seed": seed, "test": {"accuracy": share}}


def test_a_declared_test_reads_its_own_runs_in_pairs():
    lines = [line_of("cartesian", seed, share) for seed, share in enumerate((0.9, 0.8, 1.0))]
    lines += [line_of("fine_grained", seed, share) for seed, share in enumerate((0.7, 0.7, 0.7))]
    lines.append(line_of("cartesian", 3, 0.0))  # no rival: no pair
    lines.append(line_of("cartesian", 0, 0.0, trained=0.4))  # of the other test
    result = result_of(lines, TESTS[0])
    assert result.seeds == [0, 1, 2]
    assert math.isclose(result.mean, 0.2)
    assert result.p == pytest.approx(0.0742, abs=1e-4)  # t = 0.2 / (0.1 / sqrt(3)), 2 degrees
    assert result_of(lines, TESTS[1]) is None


@pytest.mark.parametrize("name", composition_rows.LIKE)
def test_every_control_fits_the_sizes_of_the_task(task, name):
    sizes = {"n_layers": 1, "context": 16, "n_experts": 16, "d_expert": 32, "d_shared": 32}
    assert sizes.items() <= task.settings.items()
    preset(name, MoEConfig(vocab_size=task.vocab_size, top_k=2, **sizes))


@pytest.mark.full
def test_the_experiment_trains_what_its_results_lack(tmp_path, monkeypatch, capsys):
    row = Row("test", "cartesian", {"steps": 2})
    for module in (composition, composition_rows):
        monkeypatch.setattr(module, "planned_rows", lambda: {"test": [(row, range(2))]})
    results = tmp_path / "results.jsonl"
    flags = ["--results", str(results), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert composition.main(["train", "test", *flags]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert unseen(lines, row).keys() == {0, 1}
    assert set(lines[0]["information"]) == {"layer 0 A", "layer 0 B"}
    assert composition.main(["table", *flags]) == 0
    assert (tmp_path / "results.png").stat().st_size > 0
    assert "cartesian, steps 2" in capsys.readouterr().out

    # Trained pairs as references of a run, instead of unseen ones.
    [run, _] = sorted((tmp_path / "out/test").iterdir())
    references = arena_of(run, "dev", references="train").references
    task = CompositionTask(0)
    assert pairs_of(task, references.tokens) == set(map(tuple, task.pairs["train"].tolist()))
