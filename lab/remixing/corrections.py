"""Corrections: what descent changes on a reference, carried over to the prompts that are like it.

Every reference is mended once: NGD takes its own pathway towards its own known label. A prompt
then needs no gradient, only its neighbours. In logits z = log w, by section 3.2's kernel K,

    z  <-  z + scale * sum_i K(x_i, x) (log mended_i - log own_i) / sum_i K(x_i, x).

Only what was changed is carried over, so a reference may help that the model gets wrong: all do.

Each method is a function (arena, **settings) -> RemixResult. Letters in the shape comments: see
arena.py.
"""

from dataclasses import replace

import torch

from lab.remixing.arena import Arena
from pathways import Neighbours, ReferenceSet, Tail, frozen
from pathways.checks import require_gradient
from remix import NeighbourLoss, RemixConfig, core_experts, ngd


def corrections(arena: Arena, scale: float = 1.0, **settings):
    """The prompt's own logits and the kernel mean of its neighbours' corrections."""
    own, mended = mended_of(arena, settings)
    return corrected(arena, mended.log() - own.log(), scale, settings)


def shuffled_corrections(arena: Arena, scale: float = 1.0, **settings):
    """The corrections of random references, weighed as those of the neighbours are."""
    own, mended = mended_of(arena, settings)
    order = torch.randperm(len(own), generator=arena.random())
    return corrected(arena, (mended.log() - own.log())[order], scale, settings)


def mended_pathways(arena: Arena, share: float = 0.5, **settings):
    """The prompt's own pathway, mixed with the kernel mean of its neighbours' mended ones.

    So does kNN-MoE (arXiv 2601.02144), where the neighbours' similarity is the share."""
    _, mended = mended_of(arena, settings)

    def mixed(core, loss, near, config):
        mean = torch.einsum("nk,nkre->nre", near.weight, mended[near.index])
        return core.rescale((1 - share) * core.start + share * mean)

    return arena.remix(references=everyone(arena), method=mixed, **settings)


def corrected(arena: Arena, change, scale: float, settings: dict):
    """Re-mixing by the corrections (m, R, E) of all references."""

    def surrogate(core, loss, near, config):
        mean = torch.einsum("nk,nkre->nre", near.weight, change[near.index])
        return core.softmax(core.start.log() + scale * mean)

    return arena.remix(references=everyone(arena), method=surrogate, **settings)


def everyone(arena: Arena) -> ReferenceSet:
    """The references, whether or not the model answers them right."""
    correct = torch.ones_like(arena.references.correct)
    return replace(arena.references, correct=correct)


def mended_of(arena: Arena, settings: dict):
    """The pathways of all references, own and mended, (m, R, E) each."""
    config = replace(arena.config, **settings)
    tail = arena.tail_of(config)
    require_gradient(arena.model)
    with frozen(arena.model), torch.no_grad():
        return mend(tail, arena.references, config)


def mend(tail: Tail, references: ReferenceSet, config: RemixConfig):
    """NGD on every reference, towards its own label -> pathways (m, R, E), own and mended."""
    own = tail.pathways(references).to(tail.device)
    mended = []
    for rows in torch.arange(len(own)).split(config.batch):
        # The loss of a reference is that of its one neighbour: itself.
        near = Neighbours(rows[:, None], own.new_ones(len(rows), 1), None, own)
        loss = NeighbourLoss(tail, near, references, config)
        core = core_experts(own[rows], config.core)
        with torch.enable_grad():
            mended.append(ngd(core, loss, near, config))
    return own, torch.cat(mended)
