"""Which expert does what.

Letters in the shape comments: L routers, N tokens, E experts, K top_k, R kinds of token.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from data import passes


class Specialisation(NamedTuple):
    """What the routers do with the tokens of a split."""

    load: np.ndarray  # (L, E) the share of all tokens that visit an expert
    shares: np.ndarray  # (L, R, E) the share of the tokens of a kind that do
    kinds: list[str]  # (R,)
    entropy: np.ndarray  # (L,) mean entropy of a token's probabilities, divided by its maximum ln E
    top: np.ndarray  # (L,) mean probability of the first choice


def specialisation(model, task, split: str = "test", n_kinds: int = 12) -> Specialisation:
    """Which expert does what with the held-out tokens of a split, and with each kind of them.

    The task says what kinds there are: skills, or the `n_kinds` most frequent tokens of a text.
    """
    tokens, kind, names = task.kinds(split, n_kinds)

    # Collect what each router says, and which experts it chooses, for all tokens.
    all_probs, all_experts = [], []
    for _, out in passes(model, tokens):
        probs = [routing.probs for routing in out.routing]
        experts = [routing.experts for routing in out.routing]
        all_probs.append(torch.stack(probs).cpu())
        all_experts.append(torch.stack(experts).cpu())
    probs = torch.cat(all_probs, dim=1)  # (L, N, E)
    experts = torch.cat(all_experts, dim=1)  # (L, N, K)

    # Mark each visit: 1 where a token goes to an expert, else 0.
    visits = torch.zeros_like(probs).scatter_(2, experts, 1.0)  # (L, N, E)

    # Average over all tokens, and over those of each kind.
    load = visits.mean(1)  # (L, E)
    kind = kind.flatten()  # (n, T) -> (N,)
    shares = []
    for place in range(len(names)):
        own = visits[:, kind == place]  # (L, n, E)
        shares.append(own.sum(1) / max(1, own.shape[1]))  # 0 where there is no such token
    shares = torch.stack(shares, dim=1)  # (L, R, E)

    # Measure how sure the routers are. With one expert they always are.
    surprise = -(probs * probs.clamp(min=1e-12).log()).sum(-1)  # (L, N) nats
    n_experts = probs.shape[-1]
    largest = math.log(n_experts) if n_experts > 1 else 1.0
    entropy = surprise.mean(1) / largest  # (L,)
    top = probs.max(-1).values.mean(1)  # (L,)

    return Specialisation(load.numpy(), shares.numpy(), names, entropy.numpy(), top.numpy())
