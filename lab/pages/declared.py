"""The tests that were named before their runs, for both papers: one list.

Only these have a bold verdict in the table of claims; all else is exploratory.
"""

import math
from typing import NamedTuple

from lab.composing import composition_rows
from lab.composing.declarations import DECLARATIONS
from lab.composing.effects import BASE, NO_DIFFERENCE, describe_effect
from lab.pages.stored import stored_compositions, stored_result, stored_runs
from lab.remixing.tables import DECLARED_AGAINST
from lab.tools.statistics import in_points

DECLARED_HEAD = "| declared | seeds | effect, with 95 % interval | p | asked for | verdict |\n"
# results/NAME.json -> what is said of its tests. On the seeds of today's tables the strict arm was
# not declared anew, and so is exploratory there.
ARMS = {
    "remix-first-test": "",
    "remix-first-test-strict": ", no neighbour shares an operand",
    "remix-skills-test": "",
}
UNTOLD = "inconclusive"


class Test(NamedTuple):
    """A test that was named before its runs."""

    claim: str
    seeds: list[int]
    effect: str
    p: float  # of a paired t-test, two-sided
    alpha: float  # what was asked of p
    outcome: str  # what holds if p is small enough
    running: str = ""  # where the test has not ended: how far it is

    @property
    def verdict(self) -> str:
        """What may be said of the claim."""
        if self.running:
            return self.running
        # An interval inside the margin says that there is no difference, whatever p is.
        told = self.p < self.alpha or self.outcome == NO_DIFFERENCE
        return f"**{self.outcome if told else UNTOLD}**"


def remixing_tests(name: str) -> dict[str, Test]:
    """The tests of a comparison of re-mixing: rival -> test."""
    result = stored_result(name)
    tests = {}
    for rival, p in result["p"].items():
        method, row = DECLARED_AGAINST[rival], result["ahead"][rival]
        mean, low, high = (row[key] for key in ("gain", "low", "high"))
        tests[rival] = Test(
            f"{method} is better than {rival}{ARMS[name]}",
            result["seeds"],
            f"{in_points(mean, low, high)} points",
            p,
            0.01,
            "holds here" if mean > 0 else "the other way",
        )
    return tests


def cartesian_test(name: str) -> Test:
    """The test of a comparison of presets: Cartesian against fine-grained experts."""
    declared = DECLARATIONS[name]
    lines = stored_runs(name)
    seeds, effect = declared.outcome(lines)
    claim = f"cartesian has a lower perplexity than {BASE}{declared.words}"
    if effect is None:
        return Test(claim, seeds, "-", math.nan, declared.alpha, "", declared.running(lines))
    text, _, outcome = describe_effect(effect).partition(": ")
    outcome = {"lower": "holds here", "higher": "the other way"}.get(outcome, outcome)
    return Test(claim, seeds, text, effect.p, declared.alpha, outcome)


def composition_tests() -> list[Test]:
    """The tests on pairs of functions: Cartesian against fine-grained experts."""
    lines = stored_compositions()
    tests = []
    for test in composition_rows.TESTS:
        result = composition_rows.result_of(lines, test)
        outcome = "holds here" if result.mean > 0 else "the other way"
        told = result.seeds, result.effect, result.p
        tests.append(Test(test.claim, *told, test.alpha, outcome))
    return tests


def declared_table() -> str:
    """All tests, in markdown."""
    tests = [test for name in ARMS for test in remixing_tests(name).values()]
    tests += [cartesian_test(name) for name in DECLARATIONS]
    tests += composition_tests()
    text = DECLARED_HEAD + "|---|---|---|---|---|---|\n"
    for test in tests:
        seeds = f"{test.seeds[0]} to {test.seeds[-1]}" if test.seeds else "-"
        cells = [test.claim, seeds, test.effect, p_value(test.p), f"<{test.alpha}", test.verdict]
        text += f"| {' | '.join(cells)} |\n"
    return text


def p_value(p: float) -> str:
    """A p-value, as people write it; "-" for NaN."""
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"
