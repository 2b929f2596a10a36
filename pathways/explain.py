"""What became of re-mixed prompts, in tensors and in words."""

from typing import NamedTuple

import torch

from lab.tools.checks import require
from pathways.neighbours import Neighbours
from pathways.references import ReferenceSet

BAR = 20  # letters of a bar of 100 %
MOST = 3  # answers shown, before and after


def numbers(tokens) -> str:
    """Tokens as they are, for want of words."""
    return " ".join(map(str, tokens))


def explained(result, i: int, words=numbers) -> str:
    """Prompt i of a RemixResult: its answers before and after, and the neighbours that it follows.

    words: a function from a list of tokens to text, such as a task's `words`. IndexError where
    there is no prompt i; ValueError where the result is not one of `remix`.
    """
    known = result.references is not None and result.neighbours.prompts is not None
    require(known, "only a result of `remix` knows its prompts")
    lines = [words(result.neighbours.prompts[i]), "", f"{'':14}{'before':26}after"]

    # The most probable answers of either, as bars.
    before, after = (logits[i].softmax(-1) for logits in (result.logits_before, result.logits))
    shown = {*before.topk(MOST).indices.tolist(), *after.topk(MOST).indices.tolist()}
    for token in sorted(shown, key=lambda token: -float(before[token])):
        line = f"{words([token]):>12}  {bar(before[token]):26}{bar(after[token])}"
        lines.append(line.rstrip())

    # The neighbours, whose answers are known.
    references, near = result.references, result.neighbours
    lines += ["", "neighbours"]
    for index, weight in zip(near.index[i].tolist(), near.weight[i].tolist(), strict=True):
        if weight > 0:
            prompt = references.tokens[index, : references.lengths[index]].tolist()
            answer = words([int(references.labels[index])])
            lines.append(f"  {words(prompt)}: {answer} (weight {weight:.2f})")
    losses = result.losses[i]
    if len(losses) > 0:
        lines.append(f"their loss: {losses[0]:.2f} nats, at best {losses.min():.2f}")
    return "\n".join(lines)


def bar(share) -> str:
    """A share as a bar and in percent."""
    return f"{'█' * round(BAR * float(share))} {share:.0%}"


class RemixResult(NamedTuple):
    """What became of n prompts; all tensors are on the CPU."""

    pathway_before: torch.Tensor  # (n, R, E) the model's own
    pathway: torch.Tensor  # (n, R, E)
    logits_before: torch.Tensor  # (n, V)
    logits: torch.Tensor  # (n, V)
    losses: torch.Tensor  # (n, calls) every loss that the surrogate asked for, in order
    neighbours: Neighbours
    references: ReferenceSet | None = None

    explain = explained  # (i, words) -> what became of prompt i, in words
