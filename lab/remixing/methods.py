"""Every row of the comparison: what it computes, what it is tuned to, and whose settings it shares.

A method of your own is a function (arena, **settings) -> RemixResult and an entry of METHODS:
with settings of its own, tried on dev, or like another: a control of NGD takes the steps of NGD.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lab.remixing import controls, corrections, rivals
from lab.remixing.arena import Arena, own_answers
from lab.remixing.cost import count_operations
from moe import require


@dataclass(frozen=True)
class Method:
    """A row of the table, and all that is known about it."""

    run: Callable  # (arena, **settings) -> RemixResult
    like: str | None = None  # the method whose settings it shares
    tries: list[dict] = field(default_factory=list)  # what is tried on dev
    tuned: dict[str, dict] = field(default_factory=dict)  # task -> the best of them there
    once_for_each: str | None = None  # step, reference: what is done once, for all prompts
    target: Callable | None = None  # (arena) -> (n,) what counts as right, if not the labels

    def __post_init__(self):
        problem = "a method needs settings to try, or else the name of one whose settings it shares"
        require((self.like is None) == (len(self.tries) > 0), problem)


def grid(**axes) -> list[dict]:
    """All combinations of some settings."""
    combinations = itertools.product(*axes.values())
    return [dict(zip(axes, values, strict=True)) for values in combinations]


LAYER_TRIES = ["all", "last:2"]
FIRST_STEP = [0.25, 0.5, 1.0, 2.0]

# Tuned on the dev split of seeds 10 to 12 (text: of one run, from four tries), from eight tries for
# each method: python -m lab.remixing.sweeps RUN ...
METHODS = {
    "mode finding": Method(
        partial(Arena.remix, method="mode_finding"),
        tries=grid(alpha=[0.5, 0.8], k=[3, 16], layers=LAYER_TRIES),
        tuned={"skills": {"alpha": 0.8, "k": 3, "layers": "last:2"}},
    ),
    "kernel regression": Method(
        partial(Arena.remix, method="kernel_regression"),
        tries=grid(kernel=["gaussian", "matern", "polynomial", "linear"], layers=LAYER_TRIES),
        tuned={"skills": {"kernel": "matern", "layers": "last:2"}},
    ),
    "NGD": Method(
        partial(Arena.remix, method="ngd"),
        tries=grid(lr=FIRST_STEP, layers=LAYER_TRIES),
        tuned={"skills": {"lr": 0.5, "layers": "all"}, "text": {"lr": 0.1}},
    ),
    "corrections": Method(
        corrections.carried_corrections,
        tries=grid(k=[3, 8, 16, 32], scale=[1.0, 2.0]),
        tuned={"skills": {"k": 8, "scale": 2.0}},
        once_for_each="reference",
    ),
    "mended pathways": Method(
        corrections.mended_pathways,
        tries=grid(k=[3, 8], share=[0.25, 0.5, 0.75, 1.0]),
        tuned={"skills": {"k": 8, "share": 0.75}},
        once_for_each="reference",
    ),
    "in-context": Method(
        rivals.in_context,
        tries=grid(k=[1, 2, 3, 4, 6, 8, 10, 12]),
        tuned={"skills": {"k": 2}},
    ),
    "prefix for all": Method(
        partial(rivals.for_all, kind=rivals.prefix_tuning),
        tries=grid(lr=[3e-3, 1e-2, 3e-2, 1e-1], length=[4, 16]),
        tuned={"skills": {"lr": 1e-1, "length": 16}},
        once_for_each="step",
    ),
    "soft prompt for all": Method(
        partial(rivals.for_all, kind=rivals.soft_prompt),
        tries=grid(lr=[3e-3, 1e-2, 3e-2, 1e-1], length=[4, 16]),
        tuned={"skills": {"lr": 3e-2, "length": 4}},
        once_for_each="step",
    ),
    "prefix for each": Method(
        partial(rivals.for_each, kind=rivals.prefix_tuning),
        tries=grid(lr=FIRST_STEP, length=[1, 4]),
        tuned={"skills": {"lr": 2.0, "length": 4}},
    ),
    "soft prompt for each": Method(
        partial(rivals.for_each, kind=rivals.soft_prompt),
        tries=grid(lr=FIRST_STEP, length=[1, 4]),
        tuned={"skills": {"lr": 0.5, "length": 4}},
    ),
    "router tuning": Method(
        rivals.router_tuning,
        tries=grid(lr=[1e-3, 3e-3, 1e-2, 3e-2], steps=[100, 300]),
        tuned={"skills": {"lr": 1e-2, "steps": 300}},
        once_for_each="step",
    ),
    "RoMA": Method(
        rivals.router_tuning,
        tries=grid(lr=[3e-3, 1e-2], steps=[100, 300], pull=[0.03, 0.3]),
        tuned={"skills": {"lr": 3e-3, "steps": 100, "pull": 0.03}},
        once_for_each="step",
    ),
    "full fine-tuning": Method(
        rivals.full_fine_tuning,
        tries=grid(lr=[1e-4, 3e-4, 1e-3, 3e-3], steps=[100, 300]),
        tuned={"skills": {"lr": 3e-3, "steps": 300}},
        once_for_each="step",
    ),
    "noisy ensemble": Method(
        controls.noisy_ensemble,
        tries=grid(noise=[0.1, 0.3, 1.0, 3.0], routes=[10, 21]),
        tuned={"skills": {"noise": 0.3, "routes": 10}},
    ),
    "entropy": Method(
        controls.entropy,
        tries=grid(lr=FIRST_STEP, layers=LAYER_TRIES),
        tuned={"skills": {"lr": 0.25, "layers": "last:2"}},
    ),
    "random neighbours": Method(controls.random_neighbours, like="NGD"),
    "shuffled labels": Method(controls.shuffled_labels, like="NGD"),
    "unfiltered": Method(controls.unfiltered, like="NGD"),
    "unfiltered tuned": Method(
        controls.unfiltered,
        tries=grid(k=[3, 5, 8, 16], lr=[0.5, 1.0]),
        tuned={"skills": {"k": 8, "lr": 0.5}},
    ),
    "shuffled corrections": Method(
        corrections.shuffled_corrections, like="corrections", once_for_each="reference"
    ),
    "kNN vote": Method(
        controls.knn_vote,
        tries=grid(k=[1, 3, 5, 8, 12, 16, 32, 64]),
        tuned={"skills": {"k": 8}},
    ),
    "best of 21 routes": Method(
        controls.best_route,
        tries=grid(noise=[0.3, 1.0, 2.0, 3.0], layers=LAYER_TRIES),
        tuned={"skills": {"noise": 0.3, "layers": "all"}},
    ),
    "oracle": Method(controls.oracle, like="NGD"),
    "random wrong label": Method(
        controls.random_wrong_label, like="NGD", target=controls.wrong_labels
    ),
}


def method_of(name: str) -> Method:
    """The method of this name; of "base", the model as it is."""
    base = Method(own_answers, tries=[{}])  # there is nothing to set
    return base if name == "base" else METHODS[name]


def tuned_settings(name: str, arena: Arena, given: dict | None = None) -> dict:
    """What a method was tuned to on the arena's task. What the user gives goes to NGD and to those
    that share its settings."""
    owner = method_of(name).like or name
    settings = method_of(owner).tuned.get(arena.task, {})
    if owner == "NGD":
        settings = settings | (given or {})
    return settings


def run_method(name: str, arena: Arena, given: dict | None = None, **changes):
    """Run a method with its settings, or "base", the model as it is -> RemixResult."""
    settings = tuned_settings(name, arena, given) | changes
    return method_of(name).run(arena, **settings)


def operations(name: str, arena: Arena, given: dict | None) -> tuple[float, float]:
    """The floating-point operations of a method: of what it does once, for all prompts, and of all
    that it does for a prompt besides. They are counted on a few prompts.

    What is done once is as much for every step, or for every reference: so it is counted for a
    few of these, and for twice as many."""
    method, n = partial(run_method, name, given=given), min(64, len(arena.labels))
    once_for_each = method_of(name).once_for_each
    if once_for_each is None:
        return 0.0, count_operations(partial(method, arena.only(slice(n)).cold())) / n

    # A few references, those first that are answered right; or all, if they are not many.
    m, few = len(arena.references.labels), max(64, arena.config.k)
    few = few if 2 * few <= m else m
    order = arena.references.correct.int().argsort(descending=True, stable=True)

    def count(n_prompts, times):
        some = arena.only(slice(n_prompts), order[: times * few]).cold()
        steps = {"steps": times} if once_for_each == "step" else {}
        return count_operations(partial(method, some, **steps))

    first, second, half = count(n, 1), count(n, 2), count(n // 2, 1)
    each = (first - half) / (n - n // 2)
    times = m / few
    if once_for_each == "step":
        times = tuned_settings(name, arena).get("steps", rivals.STEPS)
    return first - n * each + (times - 1) * (second - first), each
