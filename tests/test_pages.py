"""The pages say what the results say: their tables, their figures, the numbers in between."""

import json
import re
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import E, close, tiny

from lab.pages import claims, stored
from lab.pages.__main__ import PLACE, ROOT, draw_all, filled_pages
from lab.pages.declared import cartesian_test

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMAGE = re.compile(r"!\[[^]]*\]\((?:docs/)?([\w-]+\.png)\)")
INTERVAL = re.compile(r"([+-]?\d+\.\d+) (?:points )?\(([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)\)")
SHARE = re.compile(r"(\d+\.\d) %")


def prose(path) -> str:
    """A page without its tables."""
    return PLACE.sub("", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results():
    """All results that a command wrote as JSON."""
    paths = stored.RESULTS.glob("*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_pages_are_filled_from_results():
    """`python -m lab.pages` would change no page."""
    for path, text in filled_pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name


@pytest.mark.full
def test_figures_are_drawn_from_results(tmp_path):
    """`python -m lab.pages` draws every figure that a page shows, and no other."""
    draw_all(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    shown = {name for text in filled_pages().values() for name in IMAGE.findall(text)}
    assert shown == drawn == {path.name for path in (ROOT / "docs").glob("*.png")}


def unsure(row: dict):
    """An effect whose interval has 0 inside."""
    row |= {"low": -0.1, "high": 0.1}


CHANGES = {  # the claim -> results/NAME.json, what becomes of it, the verdict then
    "NGD against the model as it is": (
        "remix-skills-test",
        lambda result: result["p"].update(base=0.9),
        "**inconclusive**",
    ),
    "NGD against in-context learning": (
        "remix-skills-test",
        lambda result: result["rows"].update({"in-context": result["rows"]["oracle"]}),
        "the other way",
    ),
    "mode finding against the model as it is": (
        "remix-skills-test",
        lambda result: result["rows"].update({"mode finding": result["rows"]["NGD"]}),
        "as claimed",
    ),
    "token: first against last": (
        "remix-skills-dev-ablation",
        lambda result: unsure(result["token"]["first"]["change"]),
        "inconclusive",
    ),
    "steps: 50 against 10": (
        "remix-skills-dev-ablation",
        lambda result: result["steps"]["50"]["change"].update(low=0.01),
        "the other way",
    ),
    "kernel: linear against gaussian": (
        "remix-skills-dev-ablation",
        lambda result: result["kernel"]["linear"]["change"].update(gain=0.02, low=0.01),
        "the other way",
    ),
}


def all_rows() -> dict:
    """Every row of the tables of claims, by its claim."""
    rows = [*claims.remixing_rows(), *claims.setting_rows(), *claims.cartesian_rows()]
    return {row.claim: row for row in rows}


@pytest.mark.parametrize("claim", CHANGES)
def test_verdicts_follow_the_results(claim, tmp_path, monkeypatch):
    """Another result, another verdict."""
    name, change, expected = CHANGES[claim]
    for path in stored.RESULTS.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = stored.stored_result(name)
    change(result)
    (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    before = all_rows()[claim].verdict
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    assert before != all_rows()[claim].verdict == expected


TOLD = {  # a verdict -> how much less the loss of each Cartesian run is, and how runs scatter
    "**no difference**": (0.0, 0.0005),
    "**holds here**": (0.02, 0.0005),
    "**the other way**": (-0.02, 0.0005),
    "**inconclusive**": (0.006, 0.02),
}


@pytest.mark.parametrize("verdict", TOLD)
def test_verdicts_of_a_test_that_ended(verdict, tmp_path, monkeypatch):
    """A difference needs a small p, and *no difference* an interval inside the margin."""
    gap, scatter = TOLD[verdict]
    lines = []
    for run in stored.stored_runs("third")[:2]:
        for seed in range(38):
            loss = 2.5 + scatter * (-1) ** seed - gap * (run["preset"] == "cartesian")
            lines.append(json.dumps(run | {"seed": seed, "test": run["test"] | {"loss": loss}}))
    (tmp_path / "third.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    assert cartesian_test("third").verdict == verdict


def test_a_claim_is_ours_minus_the_rival(results):
    """The rows of claims print what NGD is ahead of a rival by, and not what the rival gains."""
    rows, each = all_rows(), results["remix-skills-test"]["rows"]
    for rival, words in claims.METHOD_WORDS.items():
        ahead = 100 * (np.mean(each["NGD"]["each"]) - np.mean(each[rival]["each"]))
        assert rows[f"NGD against {words}"].effect.startswith(f"{ahead:+.1f} (")


def test_the_readme_is_short():
    """At most 1,300 words before the results, and these in at most 8 rows."""
    text = PAGES[0].read_text(encoding="utf-8")
    before, _, after = text.partition("\n## What holds")
    assert len(before.split()) <= 1300
    table = after.split("<!-- results: claims -->")[1].split("<!-- end -->")[0]
    assert len(table.strip().splitlines()) - 2 <= 8


def code(path) -> list[str]:
    """The blocks of Python of a page."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.S | re.M)
    return [textwrap.dedent(block) for _, block in blocks]


def test_the_code_of_the_readme_runs(train, capsys):
    """Six lines re-mix and explain; the layer in twelve lines is moe.py's; NGD lowers a loss."""
    assert train() == 0
    names = {}
    for block in code(PAGES[0]):
        exec(block, names)
    assert "neighbours" in capsys.readouterr().out

    model = tiny()
    layer = model.blocks[0].ffns[0]

    def expert(e, x):
        gate, up = (x @ layer.experts.gate_up[e].T).chunk(2, -1)
        return (F.silu(gate) * up) @ layer.experts.down[e].T

    x = torch.randn(5, model.config.d_model).double()
    experts = [partial(expert, e) for e in range(E)]
    y = names["moe"](x, layer.router.weight, experts, model.config.top_k)
    close(y, layer(x[None])[0], 1e-6)

    target = torch.randn(3, 4).softmax(-1)

    def loss(w):
        return ((w - target) ** 2).sum()

    start = torch.full((3, 4), 0.25)
    assert loss(names["ngd"](start, loss)) < 0.5 * loss(start)


def test_the_code_for_your_own_data_runs(train, tmp_path):
    """On a text of one's own, with solved prompts in a file."""
    text = "".join(f"Tom saw {n} cats.\n<|endoftext|>\n" for n in range(400))
    (tmp_path / "my_text.txt").write_text(text, encoding="utf-8")
    learning = "--steps 60 --warmup 1 --lr 0.02 --eval-every 60"
    assert train(f"--data-file my_text.txt --context 8 {learning}") == 0
    for name, numbers in {"solved.tsv": range(30), "asked.tsv": range(30, 40)}.items():
        lines = [f"Tom saw {n}\tcats\n" for n in numbers]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    names = {}
    for block in code(ROOT / "docs" / "your-own-data.md"):
        exec(block, names)
    assert names["result"].logits.shape == names["control"].logits.shape


def gains(results):
    """Every gain, or other mean, with its interval in the results."""
    if isinstance(results, dict):
        if {"low", "high"} <= results.keys() and {"gain", "mean"} & results.keys():
            yield results
        for value in results.values():
            yield from gains(value)


def points(share: float) -> str:
    """A share in percent as text; nothing is minus zero."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0")


def test_intervals_in_prose_are_measured(results):
    """A gain with its interval, between the tables as well, is one that was measured."""
    measured = set()
    for row in gains(results):
        gain, low, high = row.get("gain", row.get("mean")), row["low"], row["high"]
        measured.add((points(gain), points(low), points(high)))  # "gains 9.4 (7.1 to 11.6)"
        measured.add((points(-gain), points(-high), points(-low)))  # "loses 2.0 (0.8 to 3.3)"
    n_intervals = 0
    for path in PAGES:
        text = re.sub(r"\s+", " ", prose(path))
        for match in INTERVAL.findall(text):
            told = tuple(value.lstrip("+").replace("-0.0", "0.0") for value in match)
            assert told in measured, path.name
            n_intervals += 1
    assert n_intervals > 0


def test_shares_in_the_story_are_measured(results):
    """The percentages of what is solid are those of the table, the subsets or the errors."""
    contest = results["remix-skills-test"]
    measured = set()
    for row in contest["rows"].values():
        measured |= {points(row[key]) for key in ("accuracy", "fixed", "broken") if key in row}
    for shares in contest["errors"].values():
        measured |= {points(share) for share in shares}
    knowledge = results["knowledge"]
    rows = [*knowledge["variance"]["natural"].values(), *knowledge["reach"]["matched"].values()]
    measured |= {points(row["mean"]) for row in rows}
    story = prose(ROOT / "docs" / "claims.md").split("## What is solid")[1].split("\n## ")[0]
    told = set(SHARE.findall(story))
    assert len(told) >= 6 and told <= measured
