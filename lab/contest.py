"""Re-mixing against all that it is compared with, on one run or several: who answers what, and how sure that is."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lab import checkpoint, cli, plots, stats
from lab.baselines import METHODS, Arena, arena_of, plain, wrong_labels
from lab.cost import counted
from lab.tasks import places
from moe import require
from remix import ReferenceSet, choose

NGD = ("NGD", "random neighbours", "shuffled labels", "unfiltered", "oracle", "oracle's null")  # they share settings
TESTS = ("base", "random neighbours", "kernel regression")  # NGD against each of them: named before any test was run
SWEEPS = {  # one setting of NGD at a time: what is shown -> changes
    "critical layers": [{"layers": v} for v in ("all", "last:1", "last:2", "last:3", "first:1", "first:2", "0,3")],
    "core experts": [{"core": v} for v in (2, 4, 6, 8, 12, 16)],
    "steps": [{"steps": v} for v in (0, 1, 2, 3, 5, 10, 20, 50)],
    "neighbours": [{"k": v} for v in (1, 2, 3, 5, 8, 16, 32)],
    "epsilon ball": [{"epsilon": v} for v in (0.6, 0.7)],  # 0.2 and 10 neighbours in the mean
    "kernel": [{"kernel": v} for v in ("gaussian", "matern", "polynomial", "linear")],
    "embedding": [
        {"embedding": v} for v in ("tfidf-places", "tfidf", "tfidf-bigrams", "hidden:1", "hidden:3", "pathway")
    ],
    "token": [{"token": v} for v in ("last", "middle", "first", "all")],
    "first step": [{"lr": v} for v in (0.1, 0.25, 0.5, 1.0, 2.0)],
    "what is moved, by which step": [
        {"space": "logits", "rule": "normed", "lr": 0.5},
        {"space": "logits", "rule": "plain", "lr": 1.0},
        {"space": "raw", "rule": "normed", "lr": 0.1},
        {"space": "raw", "rule": "plain", "lr": 0.01},  # the paper's
    ],
    "references": [{"references": v} for v in (20, 50, 100, 250, 500, 1000, 2000, 6656)],
}
SHOWN = ("kernel regression", "NGD", "soft prompt", "oracle")  # on parts of the samples
LEGEND = """\
gain: over base; fixed of the wrong, broken of the right; gap closed: gain / the oracle's; rerouted: prompts that visit
other experts; ms: for a prompt; cost: in forward passes of base; accuracy of the null: its wrong label is reached"""


class Outcome(NamedTuple):
    """How one method did on the n samples of one run."""

    answer: np.ndarray  # (n,) the token that it chose
    right: np.ndarray  # (n,) bool
    changed: np.ndarray  # (n,) bool: some layer chose other experts than before
    seconds: float  # for all samples, the references' prefixes included
    hits: float = 0.0  # share of the neighbours' prefixes that were in memory already


def judged(arena: Arena, run, target=None) -> Outcome:
    """Run a method on an arena and see what it answers."""
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    before, after = (w.topk(arena.model.config.top_k).indices.sort().values for w in result[:2])  # (n, R, K) twice
    answer = choose(result.logits, arena.options)
    right = answer == (arena.labels if target is None else target)
    changed = (before != after).flatten(1).any(1)  # (n, R, K) -> (n,)
    return Outcome(answer.numpy(), right.numpy(), changed.numpy(), seconds, result.hits)


def settings(arena: Arena, name: str, given: dict) -> dict:
    """What a method was tuned to on dev; what the user gives goes to NGD and its relatives."""
    return arena.tuned.get("NGD" if name in NGD else name, {}) | (given if name in NGD else {})


def compete(arena: Arena, names, given: dict) -> dict[str, Outcome]:
    """The model as it is, and then every method."""
    rows = {"base": judged(arena, lambda: plain(arena, arena.model))}
    for name in tqdm(names, leave=False, disable=None, desc="methods"):
        target = wrong_labels(arena) if name == "oracle's null" else None
        rows[name] = judged(arena, lambda name=name: METHODS[name](arena, **settings(arena, name, given)), target)
    return rows


def rival(folder: Path, arena: Arena) -> Outcome:
    """Another model on the same samples, not re-mixed."""
    model, train = checkpoint.load(folder)
    found = f"{folder} has seed {train['seed']}, the run beside it {arena.seed}"
    require(train["seed"] == arena.seed, f"{found}: they have learnt different tasks")
    start = time.perf_counter()
    with torch.no_grad():
        answer = model(arena.tokens).logits[:, -1].argmax(-1)  # (n, T, V) -> (n,)
    seconds = time.perf_counter() - start
    return Outcome(answer.numpy(), (answer == arena.labels).numpy(), np.zeros(len(answer), bool), seconds)


def summary(runs: list[dict[str, Outcome]], clusters: list[np.ndarray], kept=None) -> dict[str, dict]:
    """Every method over all runs, on the samples kept (for each run (n,) bool; none: all), in fractions: accuracy, gain
    over base and its interval, what it fixed of the wrong and broke of the right; and each run's accuracy."""
    kept = kept or [np.ones(len(cluster), bool) for cluster in clusters]
    parts, found = [cluster[k] for cluster, k in zip(clusters, kept, strict=True)], {}
    for name in runs[0]:
        right, base = ([run[row].right[k] for run, k in zip(runs, kept, strict=True)] for row in (name, "base"))
        gains = [r.astype(float) - b for r, b in zip(right, base, strict=True)]
        low, high = stats.bootstrap(gains, parts)
        row = {"accuracy": np.mean([r.mean() for r in right]), "gain": np.mean([g.mean() for g in gains])}
        together, before = np.concatenate(right), np.concatenate(base)
        row |= {"low": low, "high": high, "fixed": (together & ~before).sum() / max((~before).sum(), 1)}
        row["broken"] = (~together & before).sum() / max(before.sum(), 1)
        row["changed"] = np.mean([run[name].changed[k].mean() for run, k in zip(runs, kept, strict=True)])
        row["ms"] = np.mean([1e3 * run[name].seconds / len(run[name].right) for run in runs])
        found[name] = {key: float(value) for key, value in row.items()} | {"each": [float(r.mean()) for r in right]}
    return found


def costs(arena: Arena, names, given: dict, n: int) -> dict[str, float]:
    """The floating-point operations of each method, everything included, as a multiple of the base forward's. Where a
    method trains the weights, these are shared by n samples."""

    base, found = counted(lambda: plain(arena, arena.model)), {"base": 1.0}
    for name in tqdm(names, leave=False, disable=None, desc="operations"):
        found[name] = counted(lambda name=name: METHODS[name](arena, **settings(arena, name, given))) / base
        if name in ("router tuning", "router tuning, RoMA", "full fine-tuning"):
            found[name] = 1 + (found[name] - 1) * len(arena.labels) / n
    return found


def main_table(rows: dict[str, dict], multiples: dict[str, float]) -> str:
    """The methods beside each other."""
    gap, lines = rows.get("oracle", {}).get("gain"), []
    for name, row in rows.items():
        cells = [f"{row['gain']:+.1%}", f"{row['low']:+.1%} to {row['high']:+.1%}", f"{row['fixed']:.1%}"]
        cells += [f"{row['broken']:.1%}", f"{row['gain'] / gap:.0%}" if gap else "", f"{row['changed']:.0%}"]
        if name in ("base", "oracle's null"):  # the null's accuracy is how often it reaches the wrong label
            cells = [""] * 6
        times = f"{multiples[name]:.1f}" if name in multiples else ""
        lines.append([name, f"{row['accuracy']:.1%}", *cells, f"{row['ms']:.1f}", times])
    head = ["", "accuracy", "gain", "95 % interval", "fixed", "broken", "gap closed", "rerouted", "ms", "cost"]
    n = len(head) - (not multiples)
    return cli.table([line[:n] for line in lines], header=head[:n])


def subsets(arena: Arena) -> dict[str, np.ndarray]:
    """Parts of the samples on which methods may do otherwise, (n,) bool each."""
    about, index = arena.about, arena.neighbours.index
    shared = (arena.references.labels[index.clamp(min=0)] == arena.labels[:, None]) & (index >= 0)  # (n, k)
    parts = {"no neighbour has the label": ~shared.any(1)}
    if about is not None:
        cues = {"clear cues": about.clear, "ambiguous cues": ~about.clear}
        parts = cues | {"the two readings differ": about.other != about.labels} | parts
    return {name: part.numpy() for name, part in parts.items()}


def subset_table(inside: dict[str, dict], sizes: dict[str, float]) -> str:
    """Gains on parts of the samples."""
    lines = []
    for part, rows in inside.items():
        for name in ("base", *(name for name in SHOWN if name in rows)):
            row = rows[name]
            gain = ["", ""] if name == "base" else [f"{row['gain']:+.1%}", f"{row['low']:+.1%} to {row['high']:+.1%}"]
            told = f"{part} ({sizes[part]:.0%})" if name == "base" else ""
            lines.append([told, name, f"{row['accuracy']:.1%}", *gain])
    return cli.table(lines, header=["on a part of the prompts", "", "accuracy", "gain", "95 % interval"], left=2)


def errors(rows: list[Outcome], arenas: list[Arena]) -> list[float]:
    """Where the two readings of a prompt differ: the shares of right answers, the other reading, and neither."""
    shares = []
    for row, arena in zip(rows, arenas, strict=True):
        differ, other = (arena.about.other != arena.labels).numpy(), arena.about.other.numpy()
        right, wrong = row.right[differ].mean(), (row.answer == other)[differ].mean()
        shares.append((right, wrong, 1 - right - wrong))
    return [float(share) for share in np.mean(shares, 0)]


def contest(folders: list[Path], arenas: list[Arena], names, given: dict, beside: list[Path], title: str) -> dict:
    """All methods on all runs -> all that `report` tells and `figures` draws."""
    runs = []
    for arena, other in tqdm([*itertools.zip_longest(arenas, beside)], desc="runs", leave=False, disable=None):
        runs.append(compete(arena, names, given) | ({"larger, dense": rival(other, arena)} if other else {}))
    n, clusters, parts = len(arenas[0].labels), [arena.clusters for arena in arenas], [*map(subsets, arenas)]
    rows = summary(runs, clusters)
    found = {"title": title, "runs": [folder.name for folder in folders], "seeds": [arena.seed for arena in arenas]}
    found |= {"prompts": n, "rows": rows}
    found["costs"] = costs(arenas[0].first(64), names, given, n)
    found["subsets"] = {part: summary(runs, clusters, [kept[part] for kept in parts]) for part in parts[0]}
    found["sizes"] = {part: float(np.mean([kept[part].mean() for kept in parts])) for part in parts[0]}
    near = [arena.neighbours for arena in arenas]
    found["duplicates"] = sum(each.duplicates for each in near)
    found["alone"] = sum(int((each.index[:, 0] < 0).sum()) for each in near)
    if "NGD" in rows:
        found["hits"] = float(np.mean([run["NGD"].hits for run in runs]))
    if arenas[0].about is not None:
        shown = ("base", *(name for name in SHOWN if name in rows))
        found["errors"] = {name: errors([run[name] for run in runs], arenas) for name in shown}
    if len(runs) > 2 and "NGD" in rows:
        found["p"] = {name: stats.paired(rows["NGD"]["each"], rows[name]["each"]) for name in TESTS if name in rows}
    return found | {"reach": reach(arenas[0], given), "example": example(arenas[0], given)}


def report(found: dict) -> str:
    """What a contest found, as text."""
    kept = f", NGD had {found['hits']:.0%} of its prefixes in memory" if "hits" in found else ""
    near = f"{found['duplicates']:,} near-duplicates dropped, {found['alone']:,} prompts with nobody (base is kept)"
    texts = [main_table(found["rows"], found["costs"]), LEGEND, f"neighbours: {near}{kept}"]
    texts.append(subset_table(found["subsets"], found["sizes"]))
    if "errors" in found:
        lines = [[name, *(f"{share:.1%}" for share in shares)] for name, shares in found["errors"].items()]
        texts.append(cli.table(lines, header=["where the two readings differ", "right", "the other", "neither"]))
    if "p" in found:
        tests = "; ".join(f"NGD against {name} p = {p:.2g}" for name, p in found["p"].items())
        texts.append(f"paired t-tests over {len(found['runs'])} seeds, two-sided: {tests}")
    return "\n\n".join(texts)


def taste(folder: Path, most: int = 200) -> str:
    """The end of a run on the skills task: what re-mixing does to some test prompts."""
    arena = arena_of(folder, "test", most)
    if int(arena.references.correct.sum()) < 100:
        return "fewer than 100 references are answered right: too few to re-mix by"
    names = ("mode finding", "kernel regression", "NGD", "random neighbours", "oracle")
    rows = summary([compete(arena, names, {})], [arena.clusters])
    return f"re-mixing its experts, {len(arena.labels)} test prompts:\n\n{main_table(rows, {})}"


def reach(arena: Arena, given: dict) -> dict[str, list[float]]:
    """How many samples so many steps lead to their target: the right label (the oracle), a wrong one (its null)."""
    found = {"steps": [0, 1, 2, 3, 5, 10]}
    for name, target in {"oracle": arena.labels, "oracle's null": wrong_labels(arena)}.items():
        tries = (METHODS[name](arena, **settings(arena, name, given) | {"steps": step}) for step in found["steps"])
        found[name] = [float((choose(result.logits, arena.options) == target).float().mean()) for result in tries]
    return found


def example(arena: Arena, given: dict) -> dict:
    """The prompt that NGD helps most: its tokens, the right answer's probability before and after, and pathways."""
    result = arena.remix(method="ngd", **settings(arena, "NGD", given))
    right = [part.softmax(-1).gather(1, arena.labels[:, None])[:, 0] for part in (result.logits_before, result.logits)]
    best = int((right[1] - right[0]).argmax())
    near = arena.tail.pathways(arena.references)[result.neighbours.index[best]]  # (k, R, E)
    panels = {"the model's own": result.pathway_before[best], "after NGD": result.pathway[best]}
    panels |= {f"neighbour {i + 1}": w for i, w in enumerate(near)}
    found = {"tokens": arena.tokens[best, -4:].tolist(), "right": [float(part[best]) for part in right]}
    found["rows"] = [places(arena.model)[router] for router in arena.tail.routers]
    return found | {"panels": {name: w.double().numpy().round(4).tolist() for name, w in panels.items()}}


def figures(found: dict, stem: str) -> list[Path]:
    """Accuracy by method; the oracle against its null; a pathway before and after."""
    paths, title = [Path(f"{stem}{part}.png") for part in ("", "-oracle", "-pathway")], found["title"]
    plots.methods_figure(found["rows"], f"Accuracy by method: {title}", paths[0])
    way, last = dict(found["reach"]), found["example"]
    where = f"Where ten steps lead: {title.split(',')[-1].strip()}, one seed"
    plots.oracle_figure(way.pop("steps"), way, where, paths[1])
    shares = "P(right answer) goes from {:.0%} to {:.0%}".format(*last["right"])
    text = f"The prompt that NGD helps most (tokens {' '.join(map(str, last['tokens']))}): {shares}"
    panels = {name: np.array(w) for name, w in [*last["panels"].items()][:3]}  # of the neighbours the nearest
    plots.pathway_figure(panels, last["rows"], text, paths[2])
    return paths


def varied(arena: Arena, changes: dict) -> Outcome:
    """NGD on an arena with some settings changed; also with fewer references, and with the pathway of another token."""
    changes = settings(arena, "NGD", {}) | changes
    if "references" in changes:
        usable = arena.references.correct.nonzero()[:, 0]
        few = usable[torch.randperm(len(usable), generator=arena.random())[: changes.pop("references")]]
        allowed = torch.zeros(len(arena.labels), len(arena.references.labels), dtype=torch.bool)
        allowed[:, few] = True
        arena = replace(arena, allowed=allowed if arena.allowed is None else allowed & arena.allowed)
    if "token" in changes:
        old = arena.references
        rest = (old.tokens, old.labels, old.options, old.corpus, None, changes["token"])
        arena = replace(arena, references=ReferenceSet.build(arena.model, *rest))
    return judged(arena, lambda: arena.remix(method="ngd", **changes))


def sweeps(arenas: list[Arena]) -> dict[str, dict]:
    """NGD with one setting varied at a time -> {what: {value: {"gain", "low", "high", "accuracy"}}}."""
    found, clusters = {}, [arena.clusters for arena in arenas]
    bases = [judged(arena, lambda arena=arena: plain(arena, arena.model)) for arena in arenas]
    for what, tries in tqdm(SWEEPS.items(), leave=False, disable=None, desc="sweeps"):
        for changes in tries:
            runs = [{"base": base, "NGD": varied(arena, changes)} for arena, base in zip(arenas, bases, strict=True)]
            row = summary(runs, clusters)["NGD"]
            value = " ".join(str(value) for value in changes.values())
            found.setdefault(what, {})[value] = {key: row[key] for key in ("accuracy", "gain", "low", "high", "ms")}
    return found


def sweep_table(found: dict[str, dict]) -> str:
    """A line for every setting."""
    lines = []
    for what, rows in found.items():
        for i, (value, row) in enumerate(rows.items()):
            gain = [f"{row['gain']:+.1%}", f"{row['low']:+.1%} to {row['high']:+.1%}", f"{row['ms']:.1f}"]
            lines.append(["" if i else what, value, f"{row['accuracy']:.1%}", *gain])
    return cli.table(lines, header=["NGD with other", "", "accuracy", "gain", "95 % interval", "ms"], left=2)
