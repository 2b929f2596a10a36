"""How a model is scored on the data it learns from, and which expert does what there."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from data import SKILLS, SkillsTask

CHUNK = 16_384  # tokens in one forward pass of an evaluation


@torch.no_grad()
def evaluate(model, data, split: str) -> dict:
    """Scores on `dev` or `test`: loss (nats per answer, or per token of text), balance_loss, and on the skills task the
    accuracy on all prompts, and on those with clear and with ambiguous cues apart (fractions)."""
    if isinstance(data, SkillsTask):
        prompts = data.prompts(split)
        logits, balance, _ = forward(model, prompts.tokens)
        logits = logits[:, -1]  # (n, 4, V) -> (n, V)
        right = logits.argmax(-1) == prompts.labels
        parts = {"accuracy": right, "clear": right[prompts.clear], "ambiguous": right[~prompts.clear]}
        scores = {"loss": F.cross_entropy(logits, prompts.labels).item()}
        scores |= {name: part.float().mean().item() for name, part in parts.items()}
    else:
        tokens, targets = data.held_out(split)
        logits, balance, _ = forward(model, tokens)
        scores = {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()}
        scores["perplexity"] = math.exp(scores["loss"])
    return scores | {"balance_loss": balance}


@torch.no_grad()
def forward(model, tokens):
    """tokens (n, T) through the model in evaluation, in chunks -> logits (n, T, V), balance loss, experts per router
    (n, T, K), all on the CPU."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parts = tokens.split(max(1, CHUNK // tokens.shape[1]))
    outs = [model(part.to(device)) for part in parts]
    model.train(training)
    balance = sum(float(out.balance_loss) * len(part) for out, part in zip(outs, parts, strict=True)) / len(tokens)
    chosen = zip(*([r.experts for r in out.routing] for out in outs), strict=True)
    experts = [torch.cat(layer).view(*tokens.shape, -1).cpu() for layer in chosen]  # (n * T, K) -> (n, T, K)
    return torch.cat([out.logits for out in outs]).cpu(), balance, experts


def specialisation(model, data, most_kinds: int = 12):
    """Which expert does what -> (shares (L, R, E), load (L, E), names of the R kinds of token), on held-out test data.

    shares: the share of the tokens of a kind that visit an expert; load: the share of all tokens. On the skills task
    the kinds are the skills, at the cue, where the work is done; on text they are the most frequent tokens.
    """
    if isinstance(data, SkillsTask):
        prompts = data.prompts("test")
        tokens, kind, names = prompts.tokens, torch.full_like(prompts.tokens, -1), list(SKILLS)
        kind[:, -1] = prompts.skill
    else:
        tokens, _ = data.held_out("test")
        common = tokens.flatten().bincount().argsort(descending=True)[:most_kinds]
        kind = (tokens[..., None] == common).int()  # (n, T, R)
        kind = torch.where(kind.any(-1), kind.argmax(-1), -1)  # (n, T, R) -> (n, T)
        names = [data.show(int(token)) for token in common]
    experts, E = forward(model, tokens)[2], model.config.n_experts
    visits = torch.stack([F.one_hot(chosen, E).sum(2).float() for chosen in experts])  # (L, n, T, K, E) -> (L, n, T, E)
    shares = torch.stack([visits[:, kind == row].mean(1) for row in range(len(names))], 1)  # (L, R, E)
    return np.asarray(shares), np.asarray(visits.mean((1, 2))), names
