"""Comparisons, robustness and sharing: the numbers are those of slow or hand-made computations."""

import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from by_hand import close, expert, refused, rms_norm, small_preset

import train_toy
from data import Kinds
from lab.composing import compare
from lab.composing.declarations import DECLARATIONS
from lab.composing.effects import describe_effect, paired_effect, unpaired_effect
from lab.composing.robustness import (
    disturbed,
    measure_robustness,
    protocols,
    with_noise,
    without_best,
)
from lab.composing.sharing import (
    composed_outputs,
    mean_cosines,
    measure_sharing,
    mutual_information,
    sharing_table,
    shuffled_information,
    use_ratios,
)
from lab.composing.verdict import comparison_report


class Windows:
    """A text of six windows of random tokens."""

    tokens, targets = torch.randint(11, (2, 6, 16), generator=torch.Generator().manual_seed(0))

    def kinds(self, split, n_kinds=12, most=256):
        return Kinds(self.tokens, None, [])

    def score(self, model, split, most=256):
        return {"loss": model(self.tokens, self.targets).loss.item()}


# ---- robustness


@torch.no_grad()
@pytest.mark.parametrize("rescaled", [False, True], ids=["as they are", "rescaled"])
def test_disabled_choice(rescaled):
    """Where the first choice is disabled, tokens visit the next k; the lost shares are told."""
    router = small_preset("fine_grained").routers()[0]
    k = router.top_k
    x = torch.randn(8, 16, dtype=torch.float64)
    logits, probs = router.scores(x)
    best = probs.topk(k + 1).indices  # (N, k + 1)
    with disturbed([router], without_best(1, rescaled=rescaled)) as lost:
        routing = router(x)
    assert torch.equal(routing.experts, best[:, 1:])
    if rescaled:
        probs = logits.scatter(1, best[:, :1], -torch.inf).softmax(-1)
    close(routing.weights, probs.gather(1, best[:, 1:]))

    intact = routing.probs.gather(1, best[:, :k])
    mass = intact[:, 0].sum() / intact.sum()
    np.testing.assert_allclose(lost, [[1 / k, mass]], rtol=1e-5)
    assert torch.equal(router(x).experts, best[:, :k])  # it is itself again


def test_changes():
    """Probability 0 and no noise change nothing; a share is one of a token's experts."""
    probs = torch.randn(400, 8, dtype=torch.float64).softmax(-1)
    k = torch.full((400, 1), 4.0)
    assert torch.equal(without_best(0)(probs, k), probs)
    assert torch.equal(without_best(share=0.5)(probs, k), without_best(2)(probs, k))
    close(with_noise(0.0)(probs, k), probs)
    disabled = (without_best(0.25)(probs, k) == 0).sum()
    assert 60 < disabled < 140


def test_robustness():
    """Every protocol has a row; A and B lose half of what both lose."""
    model = small_preset("cartesian", n_experts=8).float()
    rows = measure_robustness(model, Windows())
    assert rows["intact"]["loss"] == Windows().score(model, "test")["loss"] != rows["A"]["loss"]
    assert rows["top-1"]["experts"] == rows["a half"]["experts"] == 0.5
    assert rows["A"]["experts"] == rows["B"]["experts"] == 0.25
    half = measure_robustness(small_preset("top_p").float(), Windows())["a half"]
    assert half["experts"] == pytest.approx(0.5, abs=0.1)
    with refused("no router"):
        protocols(small_preset("hash"))
    with refused("visits all 4 experts"):
        protocols(small_preset("smoe_share", top_k=4))


# ---- sharing


def test_mutual_information():
    """0 of independent choices, ln N of a permutation, ln(N / K) of sets that are permuted."""
    one = torch.eye(8)
    every_pair = mutual_information(one.repeat(8, 1), one.repeat_interleave(8, 0))
    assert every_pair == pytest.approx(0, abs=1e-6)
    permuted = one[torch.randperm(8)].repeat(5, 1)
    assert mutual_information(one.repeat(5, 1), permuted) == pytest.approx(math.log(8), rel=1e-5)
    two = one.view(4, 2, 8).sum(1)
    permuted = two[[2, 0, 3, 1]]
    assert mutual_information(two, permuted) == pytest.approx(math.log(4), rel=1e-5)
    a, b = one[torch.randint(8, (2, 4000))]
    chance = 49 / 8000  # (N - 1)^2 / 2n
    assert mutual_information(a, b) == pytest.approx(chance, abs=0.003)
    assert shuffled_information(a, b) == pytest.approx(chance, abs=0.003)


@torch.no_grad()
def test_composed_outputs():
    """What composed experts add is what slow loops add."""
    block = small_preset("cartesian").blocks[1]
    A, B = block.ffns
    x = torch.randn(3, 16, dtype=torch.float64)
    mass_a, mass_b = torch.rand(2, 3, 1, dtype=torch.float64)
    a, b = composed_outputs(block, x, mass_a, mass_b)
    for n, i, j in [(0, 1, 2), (1, 3, 3)]:
        z = rms_norm(block.ffn_norms[0], x[n])
        close(a[n, i], mass_a[n] * expert(A.experts.gate_up[i], A.experts.down[i], z))
        u = x[n] + a[n, i] + A.shared(z)
        v = rms_norm(block.ffn_norms[1], u)
        close(b[n, i, j], mass_b[n] * expert(B.experts.gate_up[j], B.experts.down[j], v))


def test_sharing():
    """Cosines of known vectors; use is counted from the routing; what has no answer is "-"."""
    cosines = mean_cosines(torch.eye(4)[None], torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4))
    assert [among_all for _, among_all in cosines.values()] == [1, 0, 0, 0]

    model = small_preset("cartesian").float()
    row = measure_sharing(model, Windows())[1]
    a, b = model(Windows.tokens).routing[2:4]
    use = torch.zeros(4, 4)
    for experts_a, experts_b in zip(a.experts, b.experts, strict=True):
        for i in experts_a:
            use[i, experts_b] += 1
    np.testing.assert_allclose(row["use"], use / use.sum(), atol=1e-5)
    assert row["most"] == pytest.approx(math.log(2))

    use = [[0.12, 0.08], [0.28, 0.52]]
    np.testing.assert_allclose(use_ratios(use), [[1.5, 2 / 3], [0.875, 13 / 12]])
    last = sharing_table([[row | {"use": use, "most": 0.0}]]).splitlines()[-1]
    assert last.split()[4:8] == ["-", "0.70", "to", "1.44"]
    with refused("this model composes no experts"):
        measure_sharing(small_preset("dense_two"), Windows())


# ---- the results file


def line(preset, seed, loss, **changes):
    """A line of a results file."""
    rows = {"intact": {"loss": loss, "mass": 0.0}, "top-1": {"loss": loss + 0.5, "mass": 0.5}}
    run = {"preset": preset, "seed": seed, "lr": 0.01, "norm_topk": False, "dropout": 0.0}
    run |= {"steps": 5, "data": "abc", "tokenizer": "bytes", "device": "cpu"}
    run |= {"embedding_scale": 1.0, "residual_init": 0.5, "sizes": "toy"}
    run |= {"total": 9, "activated": 5, "step": 1.05, "robustness": rows}
    run |= {split: {"loss": loss, "bits_per_byte": 1.0} for split in ("train", "dev", "test")}
    return run | {"settings": {"model": {"d_model": 8}, "train": {"batch": 8}}} | changes


def table_of(path, lines, steps=5):
    """Write a results file, and show its table."""
    path.write_text("\n".join(json.dumps(run) for run in lines))
    return compare.main(["table", f"--steps={steps}", f"--results={path}"])


def test_pairs_or_all_runs():
    """What seeds have in common falls out of pairs; which is whose seed is nothing to Welch's test.
    Two runs are two numbers."""
    a = dict(enumerate((2.0, 2.6, 2.3)))
    b = {seed: loss + 0.01 + 0.001 * seed for seed, loss in a.items()}
    narrow, wide = paired_effect(b, a), unpaired_effect(b, a)
    assert narrow.low > 0 > wide.low and narrow.middle == pytest.approx(wide.middle)
    turned = dict(zip((2, 0, 1), b.values(), strict=True))
    assert unpaired_effect(turned, a) == wide and paired_effect(turned, a).low < 0
    two = paired_effect({0: 2.0, 1: 2.1}, {0: 2.0, 1: 2.0})
    assert describe_effect(two) == "+0.00 % and +10.52 %, 2 pairs"


@pytest.mark.filterwarnings("ignore:Precision loss")  # runs of one loss
def test_table(tmp_path, capsys):
    """Effects, by hand, and what they allow to say; tests; other steps; figures."""
    gaps = {
        "cartesian": (-0.02, -0.03, -0.04),
        "smoe_share": (0.001, 0.002, 0.0),
        "top_p": (0.1, -0.1, 0.0),
        "hash": (0.002, 0.003, 0.0025),
        "fine_grained": (0.0, 0.0, 0.0),
    }
    lines = [line("cartesian", 0, 3.0, steps=9)]
    for name, losses in gaps.items():
        lines += [line(name, seed, 2 + gap) for seed, gap in enumerate(losses)]
    lines += [line("cartesian", seed, 2.07, dropout=0.1) for seed in range(2)]
    lines.append(line("dense", 9, 2.0))
    del lines[-1]["robustness"]
    assert table_of(tmp_path / "r", lines) == 0
    text = capsys.readouterr().out

    half = 4.30265 * 0.01 / math.sqrt(3)  # Student's t with two degrees of freedom
    low, middle, high = (100 * math.expm1(-0.03 + x) for x in (-half, 0, half))
    effect = f"{middle:+.2f} % ({low:+.2f} to {high:+.2f}): lower"
    assert text.count(effect) == 7  # table, test, two protocols, three masses
    assert "p = 0.035, 3 pairs" in text
    assert "9 steps, cartesian against none: no pairs" in text
    dropout = f"{100 * math.expm1(0.1):+.2f} %"
    assert f"dropout 0.1 against cartesian: {dropout} and {dropout}, 2 and 3 runs" in text

    first = {}  # the first line that starts with a word
    for row in text.splitlines():
        first.setdefault(row.split(" ")[0], row)
    cells = ["20%", "of", "the", "mass", f"{math.exp(2.2):.2f}", "(20%)", f"{math.exp(2.17):.2f}"]
    assert first["20%"].split()[:7] == cells
    assert first["smoe_share"].endswith("no difference")
    assert first["top_p"].endswith("inconclusive")
    assert first["hash"].endswith("higher, inside the margin")
    assert {file.name for file in tmp_path.glob("*.png")} == {"effects.png", "robustness.png"}


def test_when_a_declared_test_ends():
    """By the width of its interval alone, within its limits; before that nothing is said."""

    def ended(n, scatter, gap=0.0):
        lines = []
        for seed in range(n):
            noise = scatter * (-1) ** seed
            lines.append(line("cartesian", seed, 2 + gap + noise, steps=2500))
            lines.append(line("fine_grained", seed, 2 - noise, steps=2500))
        seeds, effect = DECLARATIONS["third"].outcome(lines)
        assert seeds == list(range(n))
        report = comparison_report(lines, 2500, DECLARATIONS["third"])
        far = f"{n} of at least 12 pairs" if n < 12 else f"{n} pairs, whose interval is wider"
        assert (f"\n  running: {far}" in report) == (effect is None)
        return effect is not None

    for gap in (0.0, 0.02):
        assert not ended(0, 0.001) and not ended(11, 0.001, gap) and ended(12, 0.001, gap)
        assert not ended(12, 0.01, gap) and ended(36, 0.01, gap)
        assert not ended(37, 0.1, gap) and ended(38, 0.1, gap)


HASH = line("hash", 0, 2.0)
REFUSED = {
    "data abc, xyz; name": line("hash", 1, 2.0, data="xyz"),
    "batch 4, 8": line("hash", 1, 2.0, settings={"model": {}, "train": {"batch": 4}}),
    "no run has 7 steps; there are runs of [5]": line("hash", 1, 2.0),
}


@pytest.mark.full
@pytest.mark.parametrize("message", REFUSED)
def test_refused_file(message, tmp_path):
    """Runs that cannot be compared are not."""
    with refused(message):
        table_of(tmp_path / "r", [HASH, REFUSED[message]], steps=7)


def test_table_without_runs(tmp_path):
    """Where there is no results file, `table` says what to do."""
    with refused("missing has no runs: train some"):
        compare.main(["table", f"--results={tmp_path / 'missing'}"])


def test_a_run_that_is_killed(tmp_path, monkeypatch):
    """It is said to be, but where the same signal asked to stop."""
    monkeypatch.setattr(compare.subprocess, "call", lambda argv, **_: -15)
    interrupt = mock.Mock(asked=False)
    with refused("run: ended by signal 15"):
        compare.train_in(tmp_path / "run", {"seed": 1}, interrupt)
    interrupt.asked = True
    compare.train_in(tmp_path / "run", {"seed": 1}, interrupt)


@pytest.mark.full
def test_train(tmp_path, monkeypatch):
    """A run becomes a line, once; a line that was cut off, or other data, is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "race", lambda calls, rounds: np.ones((2, rounds)))
    monkeypatch.setattr(compare.subprocess, "call", lambda argv, **_: train_toy.main(argv[3:]))
    for animal in ("fox", "dog"):
        stories = [f"{i} friends of the {animal}.\n<|endoftext|>\n" for i in range(999)]
        (tmp_path / animal).write_text("".join(stories))
    flags = ["train", "--steps=1", "--seeds=0", "--presets=cartesian", "--results=r"]
    assert compare.main([*flags, "--data-file=fox"]) == 0
    assert compare.main([*flags, "--data-file=fox"]) == 0
    (run,) = compare.read_runs("r")
    assert {"train", "dev", "robustness", "sharing", "curve"} <= run.keys()
    assert run["total"] == 1_419_904

    ended = mock.Mock(**{"outcome.return_value": ([], True)})  # a declared test
    monkeypatch.setitem(compare.DECLARATIONS, "r", ended)
    assert compare.main([*flags, "--data-file=fox", "--seeds=1", "--until-told"]) == 0
    assert len(compare.read_runs("r")) == 1

    with refused("would mix runs that cannot be compared: data"):
        compare.main([*flags, "--data-file=dog"])
    with open("r", "a") as file:
        file.write('{"preset": "cartes')
    with refused("r: line 2 is not readable JSON"):
        compare.read_runs("r")
