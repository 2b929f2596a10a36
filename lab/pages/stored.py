"""What commands wrote to results/, read for the pages."""

import json
from pathlib import Path

from lab.composing.compare import read_runs
from lab.composing.composition import COMPOSITION_FORM

RESULTS = Path(__file__).parents[2] / "results"


def stored_result(name: str):
    """What a command wrote to results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def stored_runs(*names: str) -> list[dict]:
    """The runs of some comparisons of presets in results/."""
    lines = []
    for name in names:
        lines += read_runs(str(RESULTS / f"{name}.jsonl"))
    return lines


def stored_compositions() -> list[dict]:
    """The runs of the experiment on compositions in results/."""
    return read_runs(str(RESULTS / "composition.jsonl"), COMPOSITION_FORM)
