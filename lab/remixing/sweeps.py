"""NGD with one setting varied at a time, and the settings of every method tried on dev.

python -m lab.remixing.sweeps [METHOD ...] RUN [RUN ...]     tries the settings of every method, or
                                                             of those named, on the dev split
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.words, __doc__)

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lab.remixing.arena import Arena, arena_of, judged, own_answers
from lab.remixing.contest import pooled
from lab.remixing.methods import METHODS, tuned_settings
from lab.remixing.rivals import descend
from lab.tools.checks import progress
from lab.tools.kinds import one_of
from pathways import ReferenceSet, frozen, nearest, similarity
from pathways.checks import as_tuples
from pathways.tail import TOKENS

# ------------------------------------------------------------ variations: functions of an arena


def with_settings(arena: Arena, **changes):
    """NGD with other settings than those it was tuned to."""
    return arena.remix(**tuned_settings("NGD", arena) | changes)


def within_ball(arena: Arena, epsilon: float):
    """NGD with all references within a distance (0 to 2) as neighbours (paper, section 3.4)."""
    embedding, prompts = arena.config.embedding, (arena.tokens, arena.lengths)
    with frozen(arena.model), torch.no_grad():
        cosine = similarity(embedding, arena.tail, arena.references, *prompts)  # (n, m)
    distance = (2 - 2 * cosine).sqrt()
    usable = arena.neighbours.usable & (distance <= epsilon)
    config = replace(arena.config, k=max(1, int(usable.sum(1).max())))
    near = nearest(cosine, usable, arena.neighbours.pathways, config)
    return with_settings(arena, neighbours=near)


def at_token(arena: Arena, token: str):
    """NGD on the pathway of another token, or of all."""
    old = arena.references
    prompts = as_tuples(old.tokens, old.lengths)
    labels = old.labels, old.options
    references = ReferenceSet.build(arena.model, prompts, *labels, token=token)
    references.corpus = old.corpus
    references.corpus_lengths = old.corpus_lengths
    return with_settings(replace(arena, references=references))


def with_references(arena: Arena, count: int):
    """NGD with only so many of the usable references, drawn at random."""
    usable = arena.references.correct.nonzero()[:, 0]
    order = torch.randperm(len(usable), generator=arena.random())
    drawn = usable[order[:count]]
    allowed = torch.zeros_like(arena.neighbours.usable)  # (n, m)
    allowed[:, drawn] = True
    if arena.allowed is not None:
        allowed = allowed & arena.allowed
    return with_settings(replace(arena, allowed=allowed))


def plain_ngd(core, loss, near, config):
    """NGD by steps as long as the gradient: lr * g."""
    start = core.start.clamp(min=1e-20).log()
    best = descend(lambda z: loss(core.softmax(z)), start, config, normed=False)
    return core.softmax(best)


def raw_ngd(core, loss, near, config, normed=True):
    """NGD on raw weights. After a step they are clipped at 0 and rescaled (the paper: neither)."""

    def clipped(weights):
        return core.rescale(weights.clamp(min=0))

    return descend(loss, core.start, config, normed, project=clipped)


plain_raw_ngd = partial(raw_ngd, normed=False)  # the paper's


def varied(setting: str, values) -> dict:
    """A variation for every value of a setting."""
    return {str(value): partial(with_settings, **{setting: value}) for value in values}


LAYERS = ("all", "last:1", "last:2", "last:3", "first:1", "first:2", "0,3")
ALIKE_BY = ("tfidf-places", "tfidf", "tfidf-bigrams", "hidden:1", "hidden:3", "pathway")
COUNTS = (20, 50, 100, 250, 500, 1000, 2000, 6656)
SWEEPS = {  # what is varied -> value -> (arena) -> RemixResult
    "critical layers": varied("layers", LAYERS),
    "core experts": varied("core", (2, 4, 6, 8, 12, 16)),
    "steps": varied("steps", (0, 1, 2, 3, 5, 10, 20, 50)),
    "neighbours": varied("k", (1, 2, 3, 5, 8, 16, 32)),
    "epsilon ball": {  # 0.2 and 10 neighbours in the mean
        "0.6": partial(within_ball, epsilon=0.6),
        "0.7": partial(within_ball, epsilon=0.7),
    },
    "kernel": varied("kernel", ("gaussian", "matern", "polynomial", "linear")),
    "embedding": varied("embedding", ALIKE_BY),
    "token": {token: partial(at_token, token=token) for token in TOKENS},
    "first step": varied("lr", (0.1, 0.25, 0.5, 1.0, 2.0)),
    "what is moved, by which step": {
        "logits normed 0.5": partial(with_settings, lr=0.5),
        "logits plain 1.0": partial(with_settings, method=plain_ngd, lr=1.0),
        "raw normed 0.1": partial(with_settings, method=raw_ngd, lr=0.1),
        "raw plain 0.01": partial(with_settings, method=plain_raw_ngd, lr=0.01),
    },
    "references": {str(count): partial(with_references, count=count) for count in COUNTS},
}


def run_sweeps(arenas: list[Arena]) -> dict[str, dict]:
    """NGD with one setting varied at a time -> what is varied -> value -> accuracy, gain, ...

    change: what it gains over NGD as it was tuned."""
    clusters = [arena.clusters for arena in arenas]
    bases = [judged(arena, own_answers) for arena in arenas]
    tuned = [judged(arena, with_settings) for arena in arenas]
    result = {}
    for what, variations in progress(SWEEPS.items(), "sweeps"):
        result[what] = {}
        for value, variation in variations.items():
            outcomes = [judged(arena, variation) for arena in arenas]
            row = compared(outcomes, bases, clusters)
            result[what][value] = row | {"change": compared(outcomes, tuned, clusters)}
    return result


def compared(outcomes, others, clusters) -> dict[str, float]:
    """The accuracy of some outcomes, and their gain over others on the same prompts."""
    runs = []
    for outcome, other in zip(outcomes, others, strict=True):
        runs.append({"base": other, "NGD": outcome})
    row = pooled(runs, clusters)["NGD"]
    return {key: row[key] for key in ("accuracy", "gain", "low", "high")}


# ------------------------------------------------------------------------------ tuning on dev


def main(argv) -> int:
    """Try the settings of every method, or of those named, on the dev split of some runs."""
    # The words of the command line are names of methods, or folders.
    tunable = [name for name, method in METHODS.items() if method.tries]
    folders = [Path(word) for word in argv if Path(word).is_dir()]
    others = [word for word in argv if not Path(word).is_dir()]
    named = [one_of("method or folder", word, tunable) for word in others]
    if not folders:
        raise cli.Usage("expected the folders of some runs: [METHOD ...] RUN [RUN ...]")
    arenas = [arena_of(folder, "dev") for folder in folders]

    # Every method with each of its settings: the mean accuracy of all runs.
    base = np.mean([arena.accuracy(own_answers(arena)) for arena in arenas])
    rows = [["base", f"{base:.1%}", "", ""]]
    for name in progress(named or tunable, "methods"):
        method = METHODS[name]
        shares = []
        for settings in method.tries:
            results = [arena.accuracy(method.run(arena, **settings)) for arena in arenas]
            shares.append(np.mean(results))
        best = int(np.argmax(shares))
        every = "  ".join(f"{100 * share:.1f}" for share in shares)
        rows.append([name, f"{shares[best]:.1%}", str(method.tries[best]), every])
    header = ["on dev", "best", "with", "all tries (%), in the order of METHODS"]
    print(cli.table(rows, header, left=3))
    return 0


if __name__ == "__main__":
    cli.program(main)
