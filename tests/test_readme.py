"""The pages say what the results say: tables and figures are made of them, and so are the numbers in between."""

import json
import re

import pytest

from lab import claims, readme

ROOT, RESULTS = readme.ROOT, claims.RESULTS
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INTERVAL = re.compile(r"([+-]?\d+\.\d+) (?:points )?\(([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)\)")
SHARE = re.compile(r"(\d+\.\d) %")


def rows(found):
    """Every dict in what was found that has a mean and an interval."""
    if isinstance(found, dict):
        if {"gain", "low", "high"} <= found.keys():
            yield found
        for part in found.values():
            yield from rows(part)


@pytest.fixture(scope="module")
def results():
    """All results that a command wrote as JSON."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}


def test_pages_are_filled_from_results(tmp_path):
    """`python -m lab.readme` would change nothing, and draws every figure that a page shows, and no other."""
    filled = readme.pages()
    assert {path: path.read_text(encoding="utf-8") for path in PAGES} == filled
    readme.draw(tmp_path)
    shown = {image for text in filled.values() for image in re.findall(r"!\[.*?\]\((?:docs/)?(.*?\.png)\)", text)}
    assert (
        shown == {path.name for path in tmp_path.glob("*.png")} == {path.name for path in (ROOT / "docs").glob("*.png")}
    )


def test_a_changed_result_would_be_noticed(tmp_path, monkeypatch):
    """The claims follow the file that they come from."""
    for path in RESULTS.glob("*.json*"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    changed = json.loads((RESULTS / "remix-skills-test.json").read_text(encoding="utf-8"))
    changed["rows"]["NGD"]["gain"] += 0.01
    (tmp_path / "remix-skills-test.json").write_text(json.dumps(changed), encoding="utf-8")
    before = claims.claims()
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.claims() != before


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_intervals_in_prose_are_measured(path, results):
    """A gain with its interval, between the tables as well, is one that was found; and so is a share in percent."""
    known = set()
    for row in rows(results):
        for sign in (1, -1):  # "gains 9.4 (7.1 to 11.6)", "loses 2.0 (0.8 to 3.3)"
            ends = sorted(sign * 100 * row[key] for key in ("low", "high"))
            known.add(tuple(f"{value:.1f}".replace("-0.0", "0.0") for value in (sign * 100 * row["gain"], *ends)))
    text = readme.PAGE.sub("", path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", text)
    told = {tuple(value.lstrip("+").replace("-0.0", "0.0") for value in match) for match in INTERVAL.findall(text)}
    assert told - known == set()


def test_shares_in_the_story_are_measured(results):
    """The percentages of the README's story are those of the table, the subsets or the errors."""
    found = results["remix-skills-test"]
    known = [
        value for row in found["rows"].values() for key, value in row.items() if key in ("accuracy", "fixed", "broken")
    ]
    known += [share for shares in found["errors"].values() for share in shares]
    text = readme.PAGE.sub("", PAGES[0].read_text(encoding="utf-8")).split("## What is solid")[1].split("\n## ")[0]
    told = set(SHARE.findall(text))
    assert len(told) >= 6 and told <= {f"{100 * value:.1f}" for value in known}
