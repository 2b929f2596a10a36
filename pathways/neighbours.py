"""Who helps: the references near a prompt, and how much each of them counts (paper, section 3.4).

Letters in the shape comments:  n prompts    m references    k neighbours    T tokens    X width
"""

import math
from typing import NamedTuple

import torch

from lab.tools.checks import annotated, require_mask, torch_defaults
from lab.tools.configs import KERNELS
from lab.tools.kinds import one_of
from pathways.checks import as_tuples, require_enough, require_prompts
from pathways.references import ReferenceSet
from pathways.similarity import near_copies, similarity
from pathways.tail import Tail, frozen

TINY = 1e-20


class Neighbours(NamedTuple):
    """The references near n prompts. A weight of 0 stands for nobody."""

    index: torch.Tensor  # (n, k) places among the references
    weight: torch.Tensor  # (n, k) how much each counts, of sum 1
    usable: torch.Tensor  # (n, m) bool: who could have been chosen
    pathways: torch.Tensor  # (m, R, E) the pathways of all references
    prompts: list | None = None  # n tuples of tokens

    def of(self, rows, device) -> "Neighbours":
        """The neighbours of some of the prompts, on a device."""
        pathways = self.pathways.to(device)
        index, weight, usable = (column[rows].to(device) for column in self[:3])
        return Neighbours(index.long(), weight.to(pathways), usable.bool(), pathways)


@annotated
@torch_defaults()
@torch.no_grad()
def find_neighbours(
    tail: Tail,
    references: ReferenceSet,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    config,
    allowed: torch.Tensor | None = None,
    embeddings=None,
) -> Neighbours:
    """The neighbourhood of prompts tokens (n, T), of lengths (n,) (paper, section 3.4).

    allowed (n, m) bool: further limits who may be chosen. embeddings (n, X): with embedding "own".
    """
    require_prompts("", tokens, lengths, tail.model.config.vocab_size)
    require_enough(references.correct, allowed, len(tokens), config.k)
    # Only references that the model answers right may help, and none that is nearly the prompt.
    usable = references.correct.bool() & ~near_copies(references, tokens, lengths)  # (n, m)
    if allowed is not None:
        usable = usable & allowed.bool()
    with frozen(tail.model):
        cosine = similarity(config.embedding, tail, references, tokens, lengths, embeddings)
    near = nearest(cosine, usable, tail.pathways(references), config)
    return near._replace(prompts=as_tuples(tokens, lengths))


@annotated
def nearest(
    cosine: torch.Tensor,
    usable: torch.Tensor,
    pathways: torch.Tensor,
    config,
) -> Neighbours:
    """The k usable references with the highest cosine (n, m) -> Neighbours."""
    require_mask("usable", usable, tuple(cosine.shape))
    distance = (2 - 2 * cosine).sqrt()  # (n, m) between unit vectors
    distance = distance.masked_fill(~usable, torch.inf)
    near, index = distance.topk(config.k, largest=False)  # (n, k) twice
    weight = kernel(config.kernel, near, cosine.gather(1, index))
    return Neighbours(index, weight.float(), usable, pathways)


@annotated
def kernel(name: str, distance: torch.Tensor, cosine: torch.Tensor):
    """How much neighbours at these distances and cosines (n, k) count: (n, k), of sum 1 (3.2).

    Distances count in units of a prompt's median one. An infinite distance is nobody: weight 0.
    """
    nobody = distance.isinf()
    median = distance.masked_fill(nobody, torch.nan).nanmedian(1, keepdim=True).values  # (n, 1)
    r = distance / median.nan_to_num(1.0).clamp(min=1e-6)
    weight = {
        "gaussian": torch.exp(-(r**2) / 2),
        "matern": (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r),
        "polynomial": (1 + cosine) ** 2,
        "linear": cosine.clamp(min=0),
    }[one_of("kernel", name, KERNELS)]
    weight = weight + TINY  # where all are 0, all are alike
    weight = weight.masked_fill(nobody, 0)
    return weight / weight.sum(1, keepdim=True).clamp(min=TINY)
