"""Corrections, a surrogate of our own, and its relatives: mended pathways, corrections of anyone.

All of them ask all references, whether or not the model answers them right, and mend each once. The
rows of the table are functions (arena, **settings) -> RemixResult, as all methods are.
"""

from dataclasses import replace

import torch

from lab.remixing import controls
from lab.remixing.arena import Arena
from lab.tools.checks import annotated, progress, require
from moe import unwrapped
from pathways import Neighbours, ReferenceSet, Tail, critical_layers, frozen
from pathways.checks import require_gradient
from remix import Core, NeighbourLoss, RemixConfig, core_experts, log, ngd


@annotated
def corrections(
    model,
    references: ReferenceSet,
    config: RemixConfig | None = None,
    scale: float = 1.0,
):
    """Our own surrogate: what NGD changes on references is carried over to the prompts like them.

        method = corrections(model, references)    # once; takes a while
        result = remix(model, prompts, references, method=method)

    Every reference is mended: NGD leads its own pathway towards its own label. In logits, a prompt
    takes over the kernel mean of what was changed on its neighbours (compare section 3.2):

        z  <-  z + scale sum_i K(x_i, x) (log mended_i - log own_i) / sum_i K(x_i, x)

    References that the model gets wrong can help as well: set their `correct` to true.
    The surrogate raises ValueError where it meets other references or layers.
    """
    config = config or RemixConfig()
    own, mended = mend(model, references, config)
    change = log(mended) - log(own)  # (m, R, E)

    def corrected(core: Core, loss, near: Neighbours, config: RemixConfig):
        require(
            torch.equal(near.pathways, own),
            "these corrections belong to other references or layers; make them anew",
        )
        mean = torch.einsum("nk,nkre->nre", near.weight, change[near.index])
        return core.softmax(log(core.start) + scale * mean)

    return corrected


@annotated
def mend(model, references: ReferenceSet, config: RemixConfig):
    """NGD on each of m references, towards its own label -> pathways own and mended, (m, R, E)."""
    require_gradient(unwrapped(model))
    tail = Tail(model, critical_layers(model, config.layers), references.token)
    own = tail.pathways(references).to(tail.device)
    mended = []
    with frozen(model), torch.no_grad():
        for rows in progress(torch.arange(len(own)).split(config.batch), "mending"):
            # Each is the one neighbour of itself.
            near = Neighbours(rows[:, None], own.new_ones(len(rows), 1), None, own)
            loss = NeighbourLoss(tail, near, references, config)
            core = core_experts(own[rows], config.core)
            with torch.enable_grad():
                mended.append(ngd(core, loss, near, config))
    return own, torch.cat(mended)


def carried_corrections(arena: Arena, scale: float = 1.0, **settings):
    """The prompt's own logits and the kernel mean of its neighbours' corrections."""
    config = replace(arena.config, **settings)
    method = corrections(arena.model, arena.references, config, scale)
    return controls.unfiltered(arena, method=method, **settings)


def shuffled_corrections(arena: Arena, scale: float = 1.0, **settings):
    """The corrections of random references, weighed as those of the neighbours are."""
    config = replace(arena.config, **settings)
    method = corrections(arena.model, arena.references, config, scale)
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
