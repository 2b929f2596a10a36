"""The pages say what the results say: their tables, their figures, the numbers in between."""

import json
import re

import pytest

from lab.pages import claims, stored
from lab.pages.__main__ import PLACE, ROOT, draw_all, filled_pages

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
    "C3PO: NGD beats the model as it is": (
        "remix-skills-test",
        lambda result: result["p"].update(base=0.9),
        "**cannot be told here**",
    ),
    "so do mode finding and kernel regression": (
        "remix-skills-test",
        lambda result: [row.update(low=0.01, high=0.1) for row in result["rows"].values()],
        "points that way",
    ),
    "there is more to win: the oracle": (
        "remix-skills-test",
        lambda result: unsure(result["rows"]["oracle"]),
        "cannot be told here",
    ),
    "the last token is the one to re-mix": (
        "remix-skills-dev-ablation",
        lambda result: result["token"]["all"]["change"].update(high=-0.01),
        "points that way",
    ),
    "ten steps are enough": (
        "remix-skills-dev-ablation",
        lambda result: result["steps"]["50"]["change"].update(low=0.01),
        "points the other way",
    ),
    "the Gaussian kernel is best": (
        "remix-skills-dev-ablation",
        lambda result: result["kernel"]["linear"]["change"].update(gain=0.02, low=0.01),
        "points the other way",
    ),
}


@pytest.mark.parametrize("claim", CHANGES)
def test_verdicts_follow_the_results(claim, tmp_path, monkeypatch):
    """Another result, another verdict."""
    name, change, expected = CHANGES[claim]
    for path in stored.RESULTS.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = stored.stored_result(name)
    change(result)
    (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")

    def verdict() -> str:
        rows = [line.split(" | ") for line in claims.claims_table().splitlines()]
        return next(row[3] for row in rows if row[0] == f"| {claim}")

    before = verdict()
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    assert before != verdict() == expected


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
    """The percentages of the README's story are those of the table, the subsets or the errors."""
    contest = results["remix-skills-test"]
    measured = set()
    for row in contest["rows"].values():
        measured |= {points(row[key]) for key in ("accuracy", "fixed", "broken") if key in row}
    for shares in contest["errors"].values():
        measured |= {points(share) for share in shares}
    knowledge = results["knowledge"]
    rows = [*knowledge["variance"]["natural"].values(), *knowledge["reach"]["matched"].values()]
    measured |= {points(row["mean"]) for row in rows}
    story = prose(PAGES[0]).split("## What is solid")[1].split("\n## ")[0]
    told = set(SHARE.findall(story))
    assert len(told) >= 6 and told <= measured
