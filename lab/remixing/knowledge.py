"""What does a pathway know, and what can it be made to say? Measured on the skills task:

python -m lab.remixing.knowledge RUN [RUN ...]     prints three tables, and writes knowledge.json

1. reach      How often do the oracle's steps lead to a label, against its probability beforehand?
              (reach.py)
2. variance   How much of a reference's pathway do cue, operands and reading explain? Of natural
              pathways; of mended ones, by the oracle's steps towards the reference's own label; and
              of corrections, log(mended) - log(natural).
3. exchange   What does a reference answer along the pathway that the same cue and operands have in
              another dialect?

Letters in the shape comments, beside those of remix.py:  X width of a vector    C cells (cue, a, b)
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.knowledge, __doc__)

from dataclasses import replace

import torch

from data import Prompts, SkillsTask
from lab.remixing.arena import Arena, arena_of
from lab.remixing.corrections import mend
from lab.remixing.methods import tuned_settings
from lab.remixing.reach import measure_reach, reach_table, targets_of
from lab.tools.checks import progress
from lab.tools.files import as_json, write
from lab.tools.statistics import mean_interval, with_interval
from moe import require
from pathways import frozen
from pathways.prompts import trimmed

LEVELS = ("cue", "operands", "reading", "dialect")
ANSWERS = ("right", "the other reading's", "neither")


def main(argv=None) -> int:
    """Measure some runs -> the exit code."""
    values = flags.knowledge(argv, __doc__)
    folders = values["run"]
    torch.set_num_threads(1)

    arenas = [arena_of(folder, "test") for folder in folders]
    result = {"runs": [folder.name for folder in folders]} | measure_knowledge(arenas)
    print(knowledge_report(result))
    path = (values["out"] or folders[0]) / "knowledge.json"
    write(path, as_json(result, indent=2).encode())
    print(f"\nwrote {path}")
    return 0


def measure_knowledge(arenas: list[Arena]) -> dict:
    """All three measurements on several runs, in fractions, with 95 % intervals."""
    targets, shares, answers = [], [], []
    for arena in progress(arenas, "runs"):
        require(arena.about is not None, "only prompts of the skills task have cue and operands")
        targets.append(targets_of(arena))
        solved = SkillsTask(arena.seed).prompts("reference")
        config = replace(arena.config, **tuned_settings("oracle", arena))
        natural, mended = mend(arena.model, arena.references, config)
        shares.append(variances(natural, mended, solved))
        answers.append(exchange(arena, natural, mended, solved))
    return {
        "reach": measure_reach(targets),
        "variance": over_seeds(shares),
        "exchange": over_seeds(answers),
    }


def over_seeds(seeds: list[dict]) -> dict:
    """Of each seed name -> key -> value: the same of their means, with intervals."""
    return {
        name: {key: mean_interval([seed[name][key] for seed in seeds]) for key in keys}
        for name, keys in seeds[0].items()
    }


# -------------------------------------------------------------------------------------- variance


def variances(natural, mended, solved: Prompts) -> dict[str, dict]:
    """What explains the pathways (m, R, E) of all references, and their corrections."""
    corrections = mended.log() - natural.log()
    vectors = {"natural": natural, "mended": mended, "corrections": corrections}
    return {name: variance(vector, solved) for name, vector in vectors.items()}


def variance(vectors, solved: Prompts) -> dict[str, float]:
    """The shares of the variance of vectors (m, ...) that each of LEVELS explains beyond those
    before it.

    Adjusted for the number of groups, since many small ones would explain much by chance: what m
    groups explain is 1 - mean square within groups / mean square of all. To the dialect falls what
    the others leave.
    """
    vectors = vectors.flatten(1).double()
    cell = solved.tokens[:, 1:]  # (m, 3): a, b, cue
    levels = {
        "cue": solved.cue[:, None],
        "operands": cell,
        "reading": torch.cat([cell, solved.skill[:, None]], 1),
    }
    whole = mean_square(vectors, torch.zeros_like(solved.cue)[:, None])
    shares, before = {}, 0.0
    for name, keys in levels.items():
        explained = 1 - mean_square(vectors, keys) / whole
        shares[name] = explained - before
        before = explained
    shares["dialect"] = 1 - before
    return shares


def mean_square(vectors, keys) -> float:
    """The variance of vectors (m, X) within groups: equal rows of keys (m, any) make a group."""
    group = keys.unique(dim=0, return_inverse=True)[1]  # (m,)
    size = group.bincount()  # (groups,)
    sums = torch.zeros(len(size), vectors.shape[1], dtype=vectors.dtype)
    mean = sums.index_add_(0, group, vectors) / size[:, None]
    squares = (vectors - mean[group]).square().sum()
    return float(squares) / (len(vectors) - len(size))


# -------------------------------------------------------------------------------------- exchange


def exchange(arena: Arena, natural, mended, solved: Prompts) -> dict[str, dict]:
    """What references answer along the pathways of their cell's other dialects.

    Only of cells whose two readings have different answers. The four dialects of a cell stand
    together, and two of them mean the same.
    """
    # The cells whose dialects differ in their answers.
    label = solved.labels.view(-1, 4)  # (C, 4)
    differs = label[:, :, None] != label[:, None]  # (C, 4, 4)
    itself = torch.eye(4, dtype=torch.bool)
    asked = differs.any((1, 2))  # (C,)
    place = torch.arange(len(solved.labels)).view(-1, 4)[asked]  # (C, 4), of fewer cells now
    differs = differs[asked]

    # The dialect that means the same, and one that means the other thing.
    same = place.gather(1, (~differs & ~itself).int().argmax(2)).flatten()
    other = place.gather(1, differs.int().argmax(2)).flatten()
    place = place.flatten()

    # The answers along the pathways of each.
    pathways = {
        "natural": natural[place],
        "natural, same reading": natural[same],
        "natural, other reading": natural[other],
        "mended, same reading": mended[same],
        "mended, other reading": mended[other],
    }
    shares = {}
    for name, pathway in pathways.items():
        answer = answers_along(arena, place, pathway)
        right = float((answer == solved.labels[place]).float().mean())
        misread = float((answer == solved.other[place]).float().mean())
        shares[name] = dict(zip(ANSWERS, (right, misread, 1 - right - misread), strict=True))
    return shares


def answers_along(arena: Arena, place, pathway):
    """The answers (n,) of references, at these places (n,), along pathways (n, R, E)."""
    references, tail = arena.references, arena.tail
    answers = []
    with frozen(arena.model), torch.no_grad():
        for rows in torch.arange(len(place)).split(256):
            prefix = tail.cut(*trimmed(references.tokens, references.lengths, place[rows]))
            answers.append(tail(prefix, pathway[rows]).argmax(-1).cpu())
    return torch.cat(answers)


# ---------------------------------------------------------------------------------------- tables


def knowledge_report(result: dict) -> str:
    """All three measurements as text."""
    return f"{reach_table(result['reach'])}\n\n{pathway_tables(result)}"


def pathway_tables(result: dict) -> str:
    """What explains pathways, and what is answered along them."""
    variance = share_table(result["variance"], "share of the variance", LEVELS)
    answers = share_table(result["exchange"], "along the pathway", ANSWERS)
    n = len(result["runs"])
    return f"{variance}\n\n{answers}\n\n{n} seeds; intervals of 95 % over seeds"


def share_table(rows: dict[str, dict], title: str, columns: tuple) -> str:
    """Shares: a line for each name, a column for each key."""
    lines = []
    for name, shares in rows.items():
        lines.append([name, *(with_interval(shares[column]) for column in columns)])
    return cli.table(lines, [title, *columns])


if __name__ == "__main__":
    cli.program(main)
