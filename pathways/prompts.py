"""Prompts as tensors: padding, portions, answers among options.

Letters in the shape comments:  n prompts    T tokens    V vocabulary    O options
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from lab.tools.checks import (
    annotated,
    as_integers,
    require,
    require_in_vocabulary,
)
from lab.tools.kinds import shown
from pathways.checks import require_answers

MOST_TOKENS = 1_024  # of a pass, padding included: more of them are not faster, and are padded more


@annotated
def padded(prompts: Iterable, vocab_size: int):
    """Prompts, a tensor (n, T) or lists -> tokens (n, T), padded on the right, and lengths (n,).

    ValueError where there is no prompt, an empty one, or a token outside the vocabulary.
    """
    alone = "expected prompts, each a list of tokens; of one prompt make a list: [prompt]"
    require(not torch.is_tensor(prompts) or prompts.dim() == 2, alone)
    prompts = list(prompts)
    words = [prompt for prompt in prompts if isinstance(prompt, str)]
    require(not words, f"{shown(words[:1])} is text; expected tokens: encode it by a tokenizer")
    rows = [as_integers("the tokens of a prompt", prompt) for prompt in prompts]
    shortest = min((row.numel() for row in rows), default=0)
    require(shortest > 0, f"expected one prompt or more, none empty; found {len(rows)} prompts")
    require(all(row.dim() == 1 for row in rows), alone)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    require_in_vocabulary("tokens", tokens, vocab_size)
    return tokens, torch.tensor([len(row) for row in rows])


@annotated
def portions(tokens: torch.Tensor, lengths: torch.Tensor):
    """Prompts (n, T) in portions that fit into a pass, without padding that none of them needs.

    Yields tokens and lengths.
    """
    size = max(1, MOST_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), size):
        yield trimmed(tokens, lengths, slice(start, start + size))


def by_length(lengths):
    """Portions of prompts that are about as long as each other, the longest first: little padding.

    Yields their places (b,).
    """
    order = lengths.argsort(descending=True, stable=True)
    while len(order) > 0:
        size = max(1, MOST_TOKENS // int(lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def trimmed(tokens, lengths, rows):
    """Some of the prompts, as wide as the longest of them -> tokens, lengths."""
    length = lengths[rows]
    return tokens[rows, : int(length.max())], length


def best_token(logits, options=None):
    """logits (n, V) -> the most probable token (n,), of all, or of the options (n, O)."""
    require_answers(logits, options)
    if options is None:
        return logits.argmax(-1)
    options = options.to(logits.device).long()
    place = logits.gather(1, options).argmax(1, keepdim=True)  # (n, 1) among the options
    return options.gather(1, place)[:, 0]  # (n, O) -> (n,)


def cross_entropy(logits, labels, options=None):
    """Logits (n, V), labels (n,) -> nats (n,), over the vocabulary or over the options (n, O)."""
    require_answers(logits, options, labels)
    labels = labels.to(logits.device).long()
    if options is not None:
        options = options.to(logits.device).long()
        logits = logits.gather(1, options)  # (n, V) -> (n, O)
        labels = (options == labels[:, None]).int().argmax(1)  # the place among the options
    return F.cross_entropy(logits, labels, reduction="none")
