"""Cloze questions: choose the last word of a story among four (see `TextData.problems`)."""

import torch

from data import Problems, passes
from pathways import best_token


def answer_questions(model, problems: Problems, most: int | None = None) -> torch.Tensor:
    """The option (n,) that the model finds most probable after each prompt.

    most: it answers only so many, the first ones.
    """
    columns = (problems.tokens, problems.lengths, problems.options)
    columns = [column[:most] for column in columns]
    answers = []
    for tokens, lengths, options, out in passes(model, *columns):
        # Causal attention: the last token of a prompt does not see the padding behind it.
        row = torch.arange(len(tokens), device=tokens.device)
        logits = out.logits[row, lengths - 1]  # (n, T, V) -> (n, V)
        answers.append(best_token(logits, options).cpu())
    return torch.cat(answers)


def most_frequent(problems: Problems) -> torch.Tensor:
    """The baseline, without reading: the option (n,) that ends most training stories."""
    counts = problems.frequency[problems.options]  # (n, O)
    best = counts.argmax(1, keepdim=True)
    return problems.options.gather(1, best)[:, 0]


def share_right(answers: torch.Tensor, problems: Problems) -> float:
    """The share of right answers (n,) to the first n problems."""
    right = answers == problems.labels[: len(answers)]
    return right.double().mean().item()
