"""The measurement of speed: all of it runs, on tiny models, and every table has its numbers."""

import json

import pytest
import torch
from by_hand import SMALL

from lab.speed import __main__ as speed
from lab.speed import measures, peers
from lab.speed.report import cost_report, speed_figure
from moe import MoEConfig


@pytest.mark.full
def test_everything_is_measured(call, monkeypatch, capsys, tmp_path):
    """Ours and the peers compute the same, or there would be no table; the limit is a least."""
    tiny = MoEConfig(**SMALL | {"context": 160, "n_layers": 1})
    for module in (measures, peers):
        monkeypatch.setattr(module, "SMALL", tiny)
        monkeypatch.setattr(module, "LARGE", tiny)
    monkeypatch.setattr(measures, "WIDTHS", (16,))
    monkeypatch.setattr(measures, "NGD", {"tiny": (tiny, 8, "last:1", 4, 2)})
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert call(speed, "--rounds 1 --out speed.json") == 0

    text = capsys.readouterr().out
    for words in ("training step", "prompts: 8", "loading", "tokenizing", "NGD, tiny", "slope"):
        assert words in text
    result = json.loads((tmp_path / "speed.json").read_text())
    assert len(result["layers"]) == 2 * 3 * 3
    for row in result["rows"] + result["layers"]:
        assert (row["limit"] or 0) < min(row["seconds"]["ours"]), row["what"]
    assert "differ" in cost_report(result)
    speed_figure(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").exists()
