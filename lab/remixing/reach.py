"""The oracle's matched null: can a pathway be found for wrong labels as well as for the right one?

The oracle descends towards the right label of a prompt. That it gets there shows that the model
knew the label only if the same steps do not lead to wrong labels that were as probable beforehand.
So here, for every prompt that is answered wrong, the steps aim at each label but the model's own
answer: the right one, and all other wrong ones. The *prior* of such a target is its probability
along the model's own pathway.

Letters in the shape comments, beside those of remix.py:  Y labels    t targets
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from lab.remixing.arena import Arena, own_answers
from lab.remixing.controls import towards
from lab.remixing.methods import tuned_settings
from lab.tools import cli, statistics
from lab.tools.checks import progress
from lab.tools.statistics import with_interval
from pathways import best_token

RIGHT, WRONG = "right label", "wrong label"
EDGES = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # bins of the prior
NEAREST = 10  # so many wrong labels are matched to a right one


class Targets(NamedTuple):
    """Labels that the oracle's steps were to lead to, and what came of it."""

    prior: np.ndarray  # (t,) the label's probability along the model's own pathway
    reached: np.ndarray  # (t,) bool: the label became the answer
    right: np.ndarray  # (t,) bool: it is the true label
    cluster: np.ndarray  # (t,) what prompts share, see `Arena.clusters`

    def where(self, kept) -> "Targets":
        """Some of them."""
        return Targets(*(column[kept] for column in self))


def targets_of(arena: Arena) -> Targets:
    """Let the oracle's steps aim at every label but the answer of each prompt answered wrong."""
    base = own_answers(arena)
    answer = best_token(base.logits, arena.options)  # (n,)
    wrong = answer != arena.labels
    clusters = arena.clusters[wrong.numpy()]
    arena, answer = arena.only(wrong), answer[wrong]
    probs = base.logits[wrong].softmax(-1)  # (n, V)
    settings = tuned_settings("oracle", arena)

    # One label after the other, for all prompts: columns (n,).
    prior, reached, right, other = [], [], [], []
    for label in progress(arena.references.labels.unique(), "labels"):
        result = towards(arena, label.expand(len(answer)), settings)
        prior.append(probs[:, label])
        reached.append(best_token(result.logits, arena.options) == label)
        right.append(arena.labels == label)
        other.append(answer != label)

    # Of these (Y, n), keep those that are not answered anyway.
    cluster = np.tile(clusters, (len(prior), 1))
    columns = [torch.stack(rows).numpy() for rows in (prior, reached, right)]
    kept = torch.stack(other).numpy()
    return Targets(*(column[kept] for column in (*columns, cluster)))


def measure_reach(seeds: list[Targets]) -> dict:
    """How often right and wrong labels are reached, by their prior and at equal priors.

    In fractions, means over seeds, with intervals by bootstrap over seeds and cues.
    """
    right = [each.where(each.right) for each in seeds]
    wrong = [each.where(~each.right) for each in seeds]
    medians = {}
    for name, targets in ((RIGHT, right), (WRONG, wrong)):
        medians[name] = float(np.median(np.concatenate([each.prior for each in targets])))
    return {
        RIGHT: by_prior(right),
        WRONG: by_prior(wrong),
        "median prior": medians,
        "matched": at_equal_priors(seeds),
    }


def by_prior(seeds: list[Targets]) -> list[dict]:
    """How often targets are reached, for each bin of the prior."""
    rows = []
    for low, high in pairwise(EDGES):
        inside = [each.where((each.prior >= low) & (each.prior < high)) for each in seeds]
        inside = [each for each in inside if len(each.prior)]
        row = {"from": low, "to": high, "targets": sum(len(each.prior) for each in inside)}
        if inside:
            row |= mean_share([each.reached for each in inside], [each.cluster for each in inside])
            row["prior"] = float(np.median(np.concatenate([each.prior for each in inside])))
        rows.append(row)
    return rows


def at_equal_priors(seeds: list[Targets]) -> dict[str, dict]:
    """Right labels, and beside each the wrong ones of its run that are nearest in log prior."""
    right, wrong, clusters = [], [], []
    for each in seeds:
        ours, others = each.where(each.right), each.where(~each.right)
        gap = np.abs(np.log(ours.prior)[:, None] - np.log(others.prior))  # (right, wrong)
        nearest = np.argpartition(gap, NEAREST, axis=1)[:, :NEAREST]
        right.append(ours.reached.astype(float))
        wrong.append(others.reached[nearest].mean(1))
        clusters.append(ours.cluster)
    differences = [a - b for a, b in zip(right, wrong, strict=True)]
    shares = {RIGHT: right, WRONG: wrong, "difference": differences}
    return {name: mean_share(values, clusters) for name, values in shares.items()}


def mean_share(values: list, clusters: list) -> dict[str, float]:
    """The mean over seeds, and its interval."""
    low, high = statistics.bootstrap(values, clusters)
    mean = float(np.mean([value.mean() for value in values]))
    return {"mean": mean, "low": float(low), "high": float(high)}


def reach_table(result: dict) -> str:
    """Right labels beside wrong ones."""
    rows = []
    for ours, theirs in zip(result[RIGHT], result[WRONG], strict=True):
        row = [f"{ours['from']:g} to {ours['to']:g}"]
        for each in (ours, theirs):
            row += [f"{each['targets']:,}", with_interval(each) if "mean" in each else ""]
        rows.append(row)
    shares = {name: with_interval(row) for name, row in result["matched"].items()}
    rows.append(["at equal priors", "", shares[RIGHT], "", shares[WRONG]])
    header = ["probability beforehand", "targets", f"{RIGHT}: reached"]
    return cli.table(rows, [*header, "targets", f"{WRONG}: reached"])
