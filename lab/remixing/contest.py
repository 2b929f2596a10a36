"""All methods on one run or several: who answers what, and how sure that is.

python -m lab.remixing.contest A.json B.json    does re-mixing gain more on one kind of model than
                                                on another? Two files of eval.py remix, of runs on
                                                the same seeds; see docs/cartesian.md
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.words, __doc__)

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lab.remixing.arena import Arena, Outcome, arena_of, judged
from lab.remixing.methods import method_of, operations, run_method
from lab.remixing.rivals import larger_model
from lab.remixing.tables import DECLARED_AGAINST, SHOWN, gain_table, main_table
from lab.scores.evaluation import router_names
from lab.tools import processes, statistics
from lab.tools.checks import progress
from lab.tools.files import read_json
from moe import require
from pathways import near_copies
from pathways.checks import as_tuples


def compete(arenas: list[Arena], names, given: dict | None = None):
    """Let methods answer the prompts of some arenas. given: settings for NGD and its controls.

    Yields the name of each, "base" for the model as it is, and how it did on every arena."""
    bar = progress(None, "methods", total=len(names) * len(arenas))
    with closing(bar):
        for name in names:
            outcomes, target_of = [], method_of(name).target
            try:
                for arena in arenas:
                    target = target_of(arena) if target_of else None
                    outcomes.append(judged(arena, partial(run_method, name, given=given), target))
                    bar.update()
            except ValueError as error:  # the other rows are worth having
                cli.note(f"no row {name}: {error}")
            else:
                yield name, outcomes


def pooled(runs: list[dict[str, Outcome]], clusters: list[np.ndarray], kept=None) -> dict:
    """Every method over all runs, in fractions -> name -> row.

    clusters: for each run (n,), see `Arena.clusters`. kept: for each run (n,) bool, the prompts
    that count; None: all. Fixed: of the wrong; broken: of the right; each: each run's accuracy."""
    # What the model answers by itself, of the prompts that count.
    if kept is None:
        kept = [np.ones(len(cluster), bool) for cluster in clusters]
    clusters = [cluster[mask] for cluster, mask in zip(clusters, kept, strict=True)]
    before = [run["base"].right[mask] for run, mask in zip(runs, kept, strict=True)]

    rows = {}
    for name in [name for name in runs[0] if all(name in run for run in runs)]:
        # What a method answers, run by run.
        right, changed, ms = [], [], []
        for run, mask in zip(runs, kept, strict=True):
            outcome = run[name]
            right.append(outcome.right[mask])
            changed.append(outcome.changed[mask].mean())
            ms.append(1000 * outcome.seconds / len(outcome.right))

        # Its gain, and how sure that is.
        gains = [after.astype(float) - base for after, base in zip(right, before, strict=True)]
        low, high = statistics.bootstrap(gains, clusters)
        accuracies = [float(answers.mean()) for answers in right]
        after, base = np.concatenate(right), np.concatenate(before)
        rows[name] = {
            "accuracy": float(np.mean(accuracies)),
            "gain": float(np.mean([gain.mean() for gain in gains])),
            "low": float(low),
            "high": float(high),
            "fixed": float((after & ~base).sum() / max((~base).sum(), 1)),
            "broken": float((~after & base).sum() / max(base.sum(), 1)),
            "changed": float(np.mean(changed)),
            "ms": float(np.mean(ms)),
            "each": accuracies,
        }
    return rows


def compete_and_count(arenas: list[Arena], names, given: dict) -> tuple[dict, bool]:
    """Every method on all arenas, and what it costs on the first: name -> outcomes, operations.

    Each of several processes takes some of the methods. Of one, Ctrl-C leaves out those that are
    not finished: then the second value is true."""
    found = {}
    try:
        for name, outcomes in compete(arenas, names[processes.rank() :: processes.count()], given):
            found[name] = outcomes, *operations(name, arenas[0], given)
    except KeyboardInterrupt:
        if processes.count() > 1 or "base" not in found:
            raise
        return found, True
    for theirs in processes.gathered(found):
        found |= theirs
    return found, False


def run_contest(folders, arenas: list[Arena], names, given: dict, beside, title: str) -> dict:
    """All methods on all runs -> all that the report says and the figures show.

    folders: of the runs. beside: of runs of a larger model, one for each arena, or none. Where
    Ctrl-C ends it, `missing` names the methods behind the last one that was finished."""
    # What each run has found, and a larger model beside it.
    names = ["base", *names]
    found, interrupted = compete_and_count(arenas, names, given)
    runs = []
    for i, arena in enumerate(arenas):
        runs.append({name: found[name][0][i] for name in names if name in found})
        if beside:
            runs[i]["larger, dense"] = larger_model(arena, beside[i])

    # On all prompts, and on subsets of them.
    rows = pooled(runs, [arena.clusters for arena in arenas])
    gains, sizes = pooled_subsets(runs, arenas)

    # The cost in forward passes of base.
    n, forward = len(arenas[0].labels), found["base"][2]
    costs, once = {}, {}
    for name in [name for name in rows if name in found]:
        _, paid_once, each = found[name]
        costs[name] = (each + paid_once / n) / forward
        if paid_once:
            once[name] = paid_once / forward
    result = {
        "title": title,
        "runs": [folder.name for folder in folders],
        "seeds": [arena.seed for arena in arenas],
        "content": [arena.content for arena in arenas],
        "prompts": n,
        "rows": rows,
        "costs": costs,
        "once": once,
        "subsets": gains,
        "sizes": sizes,
        "duplicates": sum(dropped_copies(arena) for arena in arenas),
        "alone": sum(int((arena.neighbours.weight.sum(1) == 0).sum()) for arena in arenas),
    }

    # Where the readings differ, the declared tests, and one prompt as an example.
    if "the two readings differ" in gains:
        shown = [name for name in ("base", *SHOWN) if name in rows]
        outcomes = {name: [run[name] for run in runs] for name in shown}
        result["errors"] = {name: mistake_shares(outcomes[name], arenas) for name in shown}
    if len(runs) > 2:
        result["p"], result["ahead"] = declared_tests(rows)
    if "NGD" in rows:
        result["cases"] = cases(runs[0], arenas[0])
    if interrupted:
        return result | {"missing": names[1 + max(map(names.index, found)) :]}
    return result | {"example": largest_gain(arenas[0], given, runs[0])}


def short(text: str, most: int = 60) -> str:
    """The end of a text, of so many letters at most."""
    return text if len(text) <= most else f"...{text[3 - most :]}"


def cases(outcomes: dict[str, Outcome], arena: Arena) -> list[list[str]]:
    """Three prompts that NGD mends, and one that it breaks, drawn at random, in words: what became
    of it, the prompt, what the model answers, what it answers with NGD, the right answer."""
    before, after = outcomes["base"], outcomes["NGD"]
    prompts = as_tuples(arena.tokens, arena.lengths)
    rng = np.random.default_rng(0)
    rows = []
    for kind, kept, most in (
        ("mended", after.right & ~before.right, 3),
        ("broken", before.right & ~after.right, 1),
    ):
        for i in rng.permutation(np.flatnonzero(kept))[:most]:
            answers = (before.answer[i], after.answer[i], arena.labels[i])
            words = [arena.words([int(answer)]) for answer in answers]
            rows.append([kind, short(arena.words(list(prompts[i]))), *words])
    return rows


def pooled_subsets(runs: list[dict[str, Outcome]], arenas: list[Arena]) -> tuple[dict, dict]:
    """Every method on subsets of the prompts: subset -> the rows of `pooled`, and their sizes, the
    shares of all prompts. A subset that one of the runs lacks is left out."""
    clusters = [arena.clusters for arena in arenas]
    divided = [subset_masks(arena) for arena in arenas]
    gains, sizes = {}, {}
    for subset in divided[0]:
        kept = [masks[subset] for masks in divided]
        if all(mask.any() for mask in kept):
            gains[subset] = pooled(runs, clusters, kept)
            sizes[subset] = float(np.mean([mask.mean() for mask in kept]))
    return gains, sizes


def declared_tests(rows: dict[str, dict]) -> tuple[dict, dict]:
    """The tests named beforehand, t-tests in pairs over the seeds: rival -> p (two-sided), and
    rival -> by how much the method tested against it is ahead."""
    p, ahead = {}, {}
    for rival, method in DECLARED_AGAINST.items():
        if {rival, method} <= rows.keys():
            ours, theirs = rows[method]["each"], rows[rival]["each"]
            p[rival] = statistics.paired(ours, theirs)
            mean, half = statistics.interval(np.subtract(ours, theirs))
            ahead[rival] = {"gain": mean, "low": mean - half, "high": mean + half}
    return p, ahead


def subset_masks(arena: Arena) -> dict[str, np.ndarray]:
    """Subsets of the prompts on which methods may do otherwise, (n,) bool each."""
    about, near = arena.about, arena.neighbours
    masks = {}
    if about is not None:
        masks["clear cues"] = about.clear
        masks["ambiguous cues"] = ~about.clear
        masks["the two readings differ"] = about.other != about.labels
    same = arena.references.labels[near.index] == arena.labels[:, None]  # (n, k)
    has_label = (same & (near.weight > 0)).any(1)
    masks["no neighbour has the label"] = ~has_label
    return {name: mask.numpy() for name, mask in masks.items()}


def dropped_copies(arena: Arena) -> int:
    """Pairs (prompt, reference) that were too alike for the reference to be a neighbour."""
    references = arena.references
    copies = near_copies(references, arena.tokens, arena.lengths) & references.correct
    if arena.allowed is not None:
        copies = copies & arena.allowed
    return int(copies.sum())


def mistake_shares(outcomes: list[Outcome], arenas: list[Arena]) -> list[float]:
    """Where the two readings of a prompt differ: shares of the right answer, the other reading's,
    and neither, in the mean of the runs."""
    shares = []
    for outcome, arena in zip(outcomes, arenas, strict=True):
        other = arena.about.other.numpy()
        differ = other != arena.labels.numpy()
        right = outcome.right[differ].mean()
        misread = (outcome.answer == other)[differ].mean()
        shares.append((right, misread, 1 - right - misread))
    return np.mean(shares, 0).tolist()


def largest_gain(arena: Arena, given: dict, outcomes: dict[str, Outcome]) -> dict:
    """The prompt that NGD helps most, of those that it mends: its last tokens, the right answer's
    probability before and after, and pathways. outcomes: none, and it is looked for among all."""
    if "NGD" in outcomes:
        mended = outcomes["NGD"].right & ~outcomes["base"].right
        if mended.any():
            arena = arena.only(torch.from_numpy(mended))
    result = run_method("NGD", arena, given)
    label = arena.labels[:, None]  # (n, 1)
    before = result.logits_before.softmax(-1).gather(1, label)[:, 0]  # (n,)
    after = result.logits.softmax(-1).gather(1, label)[:, 0]
    best = int((after - before).argmax())

    # Its pathways, and those of its neighbours.
    pathways = {
        "the model's own": result.pathway_before[best],
        "after NGD": result.pathway[best],
    }
    near = result.neighbours
    for i, index in enumerate(near.index[best], 1):
        pathways[f"neighbour {i}"] = near.pathways[index]
    panels = {}
    for name, pathway in pathways.items():
        panels[name] = pathway.double().numpy().round(4).tolist()
    names = router_names(arena.model)
    return {
        "tokens": arena.tokens[best, -4:].tolist(),
        "words": short(arena.words(list(as_tuples(arena.tokens, arena.lengths)[best]))),
        "top_k": arena.model.config.top_k,
        "right": [float(before[best]), float(after[best])],
        "rows": [names[router] for router in arena.tail.routers],
        "panels": panels,
    }


def taste_of_remixing(folder: Path, router: type | None = None) -> str:
    """What re-mixing does to 200 test prompts of a run on the skills task: a small table."""
    arena = arena_of(folder, "test", most=200, router=router)
    if int(arena.references.correct.sum()) < 100:
        return "fewer than 100 references are answered right: too few to re-mix by"
    names = ("mode finding", "kernel regression", "NGD", "random neighbours", "oracle")
    outcomes = {name: outcome for name, (outcome,) in compete([arena], ["base", *names])}
    rows = pooled([outcomes], [arena.clusters])
    return f"re-mixing its experts, {len(arena.labels)} test prompts:\n\n{main_table(rows, {})}"


# ------------------------------------------------------------------------- two kinds of models


ROW = {"low": float, "high": float, "each": [float]}  # a number for each seed
REPORT_FORM = {"runs": [str], "seeds": [int], "prompts": int, "rows": {str: ROW}}  # of a report


def main(argv) -> int:
    """Two reports of eval.py remix, side by side."""
    if len(argv) != 2:
        raise cli.Usage("expected two files of eval.py remix: A.json B.json")
    first, second = (read_json(Path(path), REPORT_FORM) for path in argv)
    for name in ("seeds", "prompts", "content"):
        ours, theirs = first.get(name), second.get(name)
        unknown = name == "content" and None in (ours, theirs)  # of earlier versions
        problem = f"their {name} are {ours} and {theirs}: these runs make no pairs"
        require(ours == theirs or unknown, problem)
    print(gain_table(first, second))
    return 0


if __name__ == "__main__":
    cli.program(main)
