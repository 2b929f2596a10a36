"""What Cartesian experts are for: models that learn compositions, on pairs that they never saw.

python -m lab.composing.composition train tries   settings of both kinds, chosen on dev seeds
python -m lab.composing.composition train test    the runs of the declared tests
python -m lab.composing.composition train         all groups: also controls and regimes
python -m lab.composing.composition table         what the results file says

The task is `CompositionTask` of data.py. `train` trains the runs that the results file lacks, by
`train_toy.py --data composition`, and adds a line to it for each.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.composition, __doc__)

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import load_task, passes
from lab.composing.compare import append_line, read_runs, sizes_and_scores, train_in
from lab.composing.composition_rows import (
    LIKE,
    TUNED,
    Row,
    composition_table,
    draw_figure,
    planned_rows,
)
from lab.composing.robustness import visited
from lab.composing.sharing import mutual_information
from lab.scores.evaluation import router_names
from lab.tools import runs
from lab.tools.configs import CompositionConfig
from lab.tools.files import as_json
from moe import require

# What the results file says of a run, among others.
COMPOSITION_FORM = {"group": str, "preset": str, "changes": {}, "seed": int}
COMPOSITION_FORM |= {"total": int, "test": {"accuracy": float}}


def main(argv=None) -> int:
    """Execute a sub-command -> the exit code."""
    command, groups, files = flags.composition(argv, __doc__)
    groups = groups or list(planned_rows())
    for group in groups:
        hint = cli.did_you_mean(group, planned_rows())
        if group not in planned_rows():
            raise cli.Usage(f"no group is called {group!r}{hint}")
    torch.set_num_threads(1)
    if command == "train":
        return train_groups(groups, files)
    lines = read_runs(files.results, COMPOSITION_FORM)
    require(len(lines) > 0, f"{files.results} holds no runs yet: start with `train`")
    print(composition_table(lines))
    if any(line["group"] == "test" for line in lines):  # the tries alone make no figure
        path = Path(files.results).with_suffix(".png")
        draw_figure(lines, path)
        print(f"\ndrew {path}")
    return 0


# ---- train


def train_groups(groups: list[str], files: CompositionConfig) -> int:
    """Train the runs of the groups that the results file lacks, seed by seed."""
    todo = []
    for group in groups:
        for row, seeds in planned_rows()[group]:
            todo += [(seed, row) for seed in seeds]
    with cli.Interrupt() as interrupt:
        for seed, row in sorted(todo, key=lambda item: item[0]):
            line = {"group": row.group, "preset": row.preset, "changes": row.changes, "seed": seed}
            known = read_runs(files.results, COMPOSITION_FORM)
            if identity(line) in {identity(other) for other in known}:
                continue

            # Train it, from where it was cut off.
            name = f"{row.name}-s{seed}".replace(",", "").replace(" ", "-")
            folder = Path(files.out, row.group, name)
            train_in(folder, settings_of_run(row, seed), interrupt)
            if interrupt.asked:
                return 130

            # Keep what is said of it.
            line |= measure_run(folder)
            append_line(files.results, line)
            print(f"{folder}: unseen pairs {line['test']['accuracy']:.1%}", flush=True)
    return 0


def identity(line: dict) -> str:
    """What tells one run from another."""
    names = ("group", "preset", "changes", "seed")
    return as_json([line[name] for name in names])


def settings_of_run(row: Row, seed: int) -> dict:
    """What train_toy.py has to be told of a run."""
    settings = {"data": "composition", "preset": row.preset, "seed": seed}
    return settings | TUNED[LIKE.get(row.preset, row.preset)] | row.changes


def measure_run(folder: Path) -> dict:
    """All that is said of a finished run."""
    model, settings = runs.load_run(folder)
    task = load_task(settings, model.config.context)
    result = sizes_and_scores(folder, model, task, "accuracy")
    if model.routers():
        result["information"] = information(model, task)
    return result


# ---- which expert serves which function


def information(model, task) -> dict[str, list[float]]:
    """What a visit tells of the functions: for each router the mutual information, in bits, of an
    expert that the last token visits with f, and with g, over all pairs and numbers."""
    pairs = np.concatenate([task.pairs[split] for split in task.splits])
    tokens, _ = task.all_numbers(pairs)
    result = {}
    for place, visit in zip(router_names(model), last_visits(model, tokens), strict=True):
        columns = tokens[:, : task.n_in_a_row].T  # the token of each function
        result[place] = [bits_about(visit, column) for column in columns]
    return result


def last_visits(model, tokens):
    """Where the last of tokens (n, T) goes: (R, n, E), for each router the experts' shares."""
    visits = []
    for rows, out in passes(model, tokens):
        last = slice(rows.shape[1] - 1, None, rows.shape[1])
        chosen = []
        for routing in out.routing:
            columns = routing.probs, routing.weights, routing.experts
            chosen.append(visited(*(column[last] for column in columns)).cpu())
        visits.append(torch.stack(chosen))  # (R, n, E)
    visits = torch.cat(visits, dim=1)
    return visits / visits.sum(-1, keepdim=True)


def bits_about(visit, kind) -> float:
    """What an expert, drawn from visit (n, E) of sum 1, tells of kind (n,), in bits."""
    _, kind = kind.unique(return_inverse=True)
    return mutual_information(visit, F.one_hot(kind).to(visit)) / math.log(2)


if __name__ == "__main__":
    cli.program(main)
