"""The pages say what the results say: their tables, their figures, the numbers in between."""

import json
import re

import pytest

from lab.pages import claims
from lab.pages.__main__ import PLACE, ROOT, draw_figures, filled_pages

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMAGE = re.compile(r"!\[.*?\]\((?:docs/)?(.*?\.png)\)", re.S)
INTERVAL = re.compile(r"([+-]?\d+\.\d+) (?:points )?\(([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)\)")
SHARE = re.compile(r"(\d+\.\d) %")


def prose(path) -> str:
    """A page without its tables."""
    return PLACE.sub("", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results():
    """All results that a command wrote as JSON."""
    paths = claims.RESULTS.glob("*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_pages_are_filled_from_results():
    """`python -m lab.pages` would change no page."""
    for path, text in filled_pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name


@pytest.mark.full
def test_figures_are_drawn_from_results(tmp_path):
    """`python -m lab.pages` draws every figure that a page shows, and no other."""
    draw_figures(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    shown = {name for text in filled_pages().values() for name in IMAGE.findall(text)}
    assert shown == drawn == {path.name for path in (ROOT / "docs").glob("*.png")}


def test_a_changed_result_would_be_noticed(tmp_path, monkeypatch):
    """The claims follow the file that they come from."""
    before = claims.claims()
    for path in claims.RESULTS.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = claims.stored("remix-skills-test")
    changed["rows"]["NGD"]["gain"] += 0.01
    (tmp_path / "remix-skills-test.json").write_text(json.dumps(changed), encoding="utf-8")
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.claims() != before


def gains(results):
    """Every dict in the results that has a gain and its interval."""
    if isinstance(results, dict):
        if {"gain", "low", "high"} <= results.keys():
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
        gain, low, high = row["gain"], row["low"], row["high"]
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
    story = prose(PAGES[0]).split("## What is solid")[1].split("\n## ")[0]
    told = set(SHARE.findall(story))
    assert len(told) >= 6 and told <= measured
