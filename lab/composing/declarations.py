"""The tests on text that were declared before their runs, and when each of them ends."""

from collections.abc import Callable
from typing import NamedTuple

from lab.composing.effects import (
    BASE,
    MARGIN,
    Effect,
    group_runs,
    main_kind,
    paired_effect,
    test_losses,
    unpaired_effect,
)


class Declaration(NamedTuple):
    """A test that was declared before its runs: cartesian has a lower test perplexity than BASE.

    From `least` pairs of runs on it ends as soon as its interval is no wider than +-MARGIN, and
    with `most` pairs at the latest. Neither the effect nor its p has a say in that.
    """

    text: str
    alpha: float  # asked of p
    words: str  # what is said of the claim
    least: int
    most: int
    effect: Callable = paired_effect

    def outcome(self, lines: list[dict]) -> tuple[list[int], Effect | None]:
        """The seeds of its pairs, and their effect, None before the test has ended."""
        kinds = group_runs(lines, 2500)
        _, ours = main_kind(kinds, "cartesian")
        _, theirs = main_kind(kinds, BASE)
        seeds = sorted(ours.keys() & theirs.keys())
        if len(seeds) < self.least:
            return seeds, None
        losses = [test_losses({seed: runs[seed] for seed in seeds}) for runs in (ours, theirs)]
        effect = self.effect(*losses)
        narrow = effect.high - effect.low <= 2 * MARGIN
        return seeds, effect if narrow or len(seeds) >= self.most else None

    def running(self, lines: list[dict]) -> str:
        """How far the test is, where it has not ended."""
        seeds, effect = self.outcome(lines)
        if effect:
            return ""
        if len(seeds) < self.least:
            return f"running: {len(seeds)} of at least {self.least} pairs"
        return f"running: {len(seeds)} pairs, whose interval is wider than +-{MARGIN} %"


DECLARATIONS = {  # file in results/ -> what was declared before its runs
    "first": Declaration(
        f"Declared before any run: cartesian has a lower test perplexity than {BASE}, each with "
        "its best settings on dev; 13 pairs\nof 2500 steps, paired t-test, two-sided; "
        f'"no difference" only where the 95 % interval is inside +-{MARGIN} %.',
        0.01,
        "",
        13,
        13,
    ),
    "second": Declaration(
        "Declared before any of these runs: the same claim, at settings chosen on dev at 2500 "
        "steps; 7 pairs (seeds 1 to 7),\npaired t-test, two-sided; as the second test of one "
        "claim it asks for p < 0.005.",
        0.005,
        ", at rates chosen after 2,500 steps",
        7,
        7,
    ),
    "third": Declaration(
        f"Declared before any of its runs: cartesian has a lower test perplexity than {BASE}, both "
        "with the better start, each at its best\nsettings on dev after 2500 steps; seeds from "
        f"300 on; Welch's t-test, two-sided, p < 0.01. It ends once the 95 % interval is\n"
        f"+-{MARGIN} % or narrower, with 12 pairs at least and 38 at most; p has no say in that.",
        0.01,
        ", with the better start",
        12,
        38,
        unpaired_effect,
    ),
}
