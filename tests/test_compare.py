"""Comparisons, robustness and sharing: the numbers are those of slow or hand-made computations."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cartesian import slow_block, slow_experts, slow_norm, slow_route, slow_shared, small
from test_moe import V, close

import train_toy
from lab import compare, gain
from lab.robust import disturbed, noise, protocols, robustness, without
from lab.sharing import alike, composed, information, ratios, sharing, sharing_table, shuffled

WINDOWS = torch.randint(V, (2, 6, 16), generator=torch.Generator().manual_seed(0))
DATA = SimpleNamespace(held_out=lambda split, most=None: WINDOWS, token_bytes=torch.ones(V))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", ["fine_grained", "cartesian", "A", "B"])
def test_disabled_is_as_if_not_there(name, rescaled, monkeypatch):
    """A block whose first choices are disabled, in A or B or both, token by token in Python; and the shares lost."""
    model, tokens, seen = small(name if len(name) > 1 else "cartesian"), torch.randint(V, (8,)), []
    block, k = model.blocks[0], model.config.top_k
    torch.nn.init.zeros_(block.attention.o.weight)  # leaves the feed-forward part
    off = {"A": block.ffns[:1], "B": block.ffns[1:]}.get(name, block.ffns)

    def without_first(layer, z, token):
        if layer not in off:
            return slow_route(layer, z, token)
        scores = layer.router.weight @ z
        (first, *rest), probs = scores.argsort(descending=True).tolist()[: k + 1], scores.softmax(0)
        seen.append([probs[first], probs[[first, *rest[:-1]]].sum()])
        left = scores.index_fill(0, torch.tensor(first), -torch.inf).softmax(0) if rescaled else probs
        return [(left[e], e) for e in rest]

    monkeypatch.setattr("test_cartesian.slow_route", without_first)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    with torch.no_grad(), disturbed([ffn.router for ffn in off], without(1, rescaled=rescaled)) as lost:
        slow = [slow_block(block, model.config.layer, *each) for each in zip(x[0], tokens, strict=True)]
        close(model.run(x, last=1)[0], torch.stack(slow))
    first, chosen = torch.tensor(seen).unflatten(0, (8, -1)).sum(0).T  # (2, routers)
    np.testing.assert_allclose(lost, np.stack([np.full(len(off), 1 / k), first / chosen], 1), rtol=1e-5)


def test_protocols():
    """Probability 0 and no noise change nothing; a share is of a token's experts; routers are themselves again."""
    probs, k = torch.rand(400, 8, dtype=torch.float64).softmax(-1), torch.full((400, 1), 4.0)
    assert torch.equal(without(0)(probs, k), probs) and torch.equal(without(share=0.5)(probs, k), without(2)(probs, k))
    close(noise(0.0)(probs, k), probs)
    assert 60 < (without(0.25)(probs, k) == 0).sum() < 140 and ((without(1)(probs, k) == 0).sum(1) == 1).all()
    rows = robustness(model := small("cartesian", n_experts=8).float(), DATA)
    assert rows["top-1"]["experts"] == rows["a half"]["experts"] == 0.5 and rows["B"]["experts"] == 0.25
    assert all("select" not in vars(router) for router in model.routers())
    assert robustness(small("top_p").float(), DATA)["a half"]["experts"] == pytest.approx(0.5, abs=0.1)
    for name, changes, message in (("hash", {}, "no router"), ("smoe_share", {"top_k": 4}, "visits all 4 experts")):
        with pytest.raises(ValueError, match=message):
            protocols(small(name, **changes))


def test_information():
    """None where all pairs are alike, ln N where one choice is a permutation of the other, ln(N / K) where sets are."""
    one, order = torch.eye(8), torch.randperm(8)
    assert information(one.repeat(8, 1), one.repeat_interleave(8, 0)) == pytest.approx(0, abs=1e-6)
    assert information(one.repeat(5, 1), one[order].repeat(5, 1)) == pytest.approx(math.log(8), rel=1e-5)
    two = one.view(4, 2, 8).sum(1)
    assert information(two, two[[2, 0, 3, 1]]) == pytest.approx(math.log(4), rel=1e-5)
    a, b = one[torch.randint(8, (2, 4000))]
    assert [information(a, b), shuffled(a, b)] == pytest.approx([49 / 8000] * 2, abs=0.003)  # (N - 1)^2 / 2n


@torch.no_grad()
def test_sharing():
    """Composed experts are what slow loops compose; cosines of vectors that are known; use is counted from routing."""
    model = small("cartesian")
    block, x, total = model.blocks[1], torch.randn(3, 16, dtype=torch.float64), torch.rand(2, 3, 1).double()
    (A, B), (a, b) = block.ffns, composed(block, x, *total)
    for n, i, j in [(0, 1, 2), (1, 3, 3)]:
        z = slow_norm(block.ffn_norms[0], x[n])
        close(a[n, i], total[0, n] * slow_experts(A, z)[i])
        u = slow_norm(block.ffn_norms[1], x[n] + a[n, i] + slow_shared(A, z))
        close(b[n, i, j], total[1, n] * slow_experts(B, u)[j])
    only_a = alike(torch.eye(4)[None], torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4))
    assert [pair[1] for pair in only_a.values()] == [1, 0, 0, 0]
    row, routing = sharing(model.float(), DATA)[1], model(WINDOWS[0]).routing[2:4]
    first, second = (torch.nn.functional.one_hot(r.experts, 4).sum(1).float() for r in routing)
    np.testing.assert_allclose(row["use"], first.T @ second / (96 * 4), atol=1e-5)
    assert row["most"] == pytest.approx(math.log(2))
    use = np.outer([0.2, 0.8], [0.4, 0.6]) + 0.04 * np.array([[1, -1], [-1, 1]])
    np.testing.assert_allclose(ratios(use), [[1.5, 2 / 3], [0.875, 13 / 12]])
    uneven = row | {"use": use, "most": 0.0}  # where k = E, there is no bound
    assert sharing_table([[uneven]] * 2).split("\n")[-1].split()[4:8] == ["-", "0.70", "to", "1.44"]
    with pytest.raises(ValueError, match="this model composes no experts"):
        sharing(small("dense_two"), DATA)


def line(preset, seed, loss, **changes):
    """A line of a results file."""
    robust = {name: {"loss": loss + rise, "mass": rise} for name, rise in {"intact": 0.0, "top-1": 0.5}.items()}
    run = {"preset": preset, "seed": seed, "lr": 0.01, "norm_topk": False, "dropout": 0.0, "steps": 5, "data": "abc"}
    run |= {"tokenizer": "bytes", "device": "cpu", "total": 9, "activated": 5, "step": 1.05, "robustness": robust}
    run |= {split: {"loss": loss, "bits_per_byte": 1.0} for split in ("train", "dev", "test")}
    return json.dumps(run | {"settings": {"model": {"d_model": 8}, "train": {"batch": 8}}} | changes)


def test_table(tmp_path, capsys):
    """Effects in pairs, by hand, and what they allow to say; the declared test; other steps; dropout; figures."""
    gaps = {"cartesian": (-0.02, -0.03, -0.04), "smoe_share": (0.001, 0.002, 0.0), "top_p": (0.1, -0.1, 0.0)}
    gaps["hash"] = (0.002, 0.003, 0.0025)
    lines = [line("fine_grained", seed, 2 + seed) for seed in range(3)] + [line("cartesian", 0, 3.0, steps=9)]
    lines += [line(name, seed, 2 + seed + gap) for name, each in gaps.items() for seed, gap in enumerate(each)]
    lines += [line("cartesian", seed, 2.07 + seed, dropout=0.1) for seed in range(2)]
    (tmp_path / "r").write_text("\n".join([*lines, line("dense", 9, 2.0).replace("robustness", "-")]))
    assert compare.main(["table", "--steps", "5", f"--results={tmp_path / 'r'}"]) == 0
    half = 4.30265 * 0.01 / math.sqrt(3)  # Student's t with two degrees of freedom
    text, (low, middle, high) = capsys.readouterr().out, [100 * math.expm1(-0.03 + x) for x in (-half, 0, half)]
    told = f"{middle:+.2f} % ({low:+.2f} to {high:+.2f}): lower"
    assert text.count(told) == 7  # table, test, two protocols, three masses
    assert "p = 0.035, 3 pairs" in text and "9 steps, cartesian lr 0.01 against none: no pairs" in text
    assert f"dropout 0.1 against cartesian lr 0.01: {100 * math.expm1(0.095):+.2f} % (+3.20" in text
    ends = {row.split()[0]: row for row in reversed(text.splitlines()) if row}
    assert ends["20%"].split()[4:8] == [f"{math.exp(3.2):.2f}", "(20%)", f"{math.exp(3.17):.2f}", "(20%)"]
    assert ends["smoe_share"].endswith("no difference") and ends["top_p"].endswith("cannot be told here")
    assert ends["hash"].endswith("higher, inside the margin")
    assert {file.name for file in tmp_path.glob("*.png")} == {"effects.png", "robustness.png"}
    base, more, less = ({"each": each, "low": 0.1, "high": 0.2} for each in ([0.5, 0.6], [0.6, 0.8], [0.4, 0.7]))
    told = {"runs": ["a-s0", "a-s1"], "seeds": [0, 1]}
    text = gain.compared(*(told | {"rows": {"base": base, "NGD": ngd}} for ngd in (more, less)))
    assert "+15.0% (+10.0% to +20.0%)  +0.0% (+10.0% to +20.0%)  +15.0% (-48.5% to +78.5%)" in text


def test_refused_files(tmp_path):
    """Runs that cannot be compared are not."""
    one, other = line("hash", 0, 2.0), line("hash", 1, 2.0, data="xyz")
    cases = {r"data abc \(1 runs\), xyz \(1 runs\); name another": [one, other], "line 2 is no run of": [one, "{"]}
    cases |= {r"batch 4 \(1 runs\), 8 \(1 runs\)": [one.replace('"batch": 8', '"batch": 4'), line("hash", 3, 2.0)]}
    cases |= {"line 2 is a run that another line has": [one, one], "unknown: cartesain": [line("cartesain", 0, 2.0)]}
    cases |= {"missing or unknown: step": [one.replace('"step":', '"stop":')]}
    cases |= {"missing or unknown: model": [line("hash", 0, 2.0, settings={"train": {}})]}
    for message, lines in (cases | {r"no run has 7 steps; there are runs of \[5\]": [one]}).items():
        (tmp_path / "r").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            compare.main(["table", "--steps", "7", f"--results={tmp_path / 'r'}"])


def test_train(tmp_path, monkeypatch, capsys):
    """A run becomes a line, once; what another process works at is left to it; other data do not join the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "race", lambda names, turns: np.ones((turns, 2)))
    monkeypatch.setattr(compare.subprocess, "call", lambda argv, **_: train_toy.main(argv[3:]))
    for name in ("fox", "dog"):
        (tmp_path / name).write_text(f"There were many friends of the {name}.\n<|endoftext|>\n" * 999)
    flags = ["train", "--steps=1", "--presets=cartesian", "--results=r", "--data-file=fox"]
    assert [compare.main([*flags, "--seeds=0"]) for _ in "ab"] == [0, 0]
    (found,), (folder,) = compare.read("r"), (tmp_path / "out/compare").iterdir()
    assert {"train", "dev", "robustness", "sharing", "curve"} <= found.keys() and found["total"] == 1_419_904
    (folder / "lock").touch()
    assert compare.main([*flags, "--seeds=0"]) == 0 and "another process is at it" in capsys.readouterr().out
    with pytest.raises(ValueError, match="would mix runs that cannot be compared: data"):
        compare.main([*flags, "--data-file=dog"])
