"""Corrections beside what is nearest to them: mended pathways, and corrections of anyone.

All of them ask all references, whether or not the model answers them right, and mend each once: see
`remix.corrections`. Each is a function (arena, **settings) -> RemixResult, as all methods are.
"""

from dataclasses import replace

import torch

from lab.remixing import controls
from lab.remixing.arena import Arena
from remix import corrections as corrections_of
from remix import mend


def carried_corrections(arena: Arena, scale: float = 1.0, **settings):
    """The prompt's own logits and the kernel mean of its neighbours' corrections."""
    config = replace(arena.config, **settings)
    method = corrections_of(arena.model, arena.references, config, scale)
    return controls.unfiltered(arena, method=method, **settings)


def shuffled_corrections(arena: Arena, scale: float = 1.0, **settings):
    """The corrections of random references, weighed as those of the neighbours are."""
    config = replace(arena.config, **settings)
    method = corrections_of(arena.model, arena.references, config, scale)
    order = torch.randperm(len(arena.references.labels), generator=arena.random())

    def shuffled(core, loss, near, config):
        return method(core, loss, near._replace(index=order[near.index.cpu()]), config)

    return controls.unfiltered(arena, method=shuffled, **settings)


def mended_pathways(arena: Arena, share: float = 0.5, **settings):
    """The prompt's own pathway, mixed with the kernel mean of its neighbours' mended ones.

    So does kNN-MoE (arXiv 2601.02144), where the neighbours' similarity is the share."""
    config = replace(arena.config, **settings)
    _, mended = mend(arena.model, arena.references, config)

    def mixed(core, loss, near, config):
        mean = torch.einsum("nk,nkre->nre", near.weight, mended[near.index])
        return core.rescale((1 - share) * core.start + share * mean)

    return controls.unfiltered(arena, method=mixed, **settings)
