"""The prompts that are made of the questions of a benchmark: letters, or the texts of choices."""

from typing import NamedTuple

import torch

from data import Problems
from lab.checkpoints.benchmarks import LETTERS, Item
from lab.checkpoints.tokenizer import three_parts
from lab.tools.cli import note
from moe import require
from pathways import padded


class Prompt(NamedTuple):
    """What the model reads at once, and what is scored there."""

    tokens: list[int]
    options: list[list[tuple[int, int]]]  # for each: the (place, token) whose nats are summed
    n_cut: int = 0  # tokens that are left out at the beginning of the text


def text_pairs(item: Item, form: str) -> list[tuple[str, str]]:
    """For each choice a text, and the end of it that is scored.

    form: "letters" lists the choices and scores a letter; "full" scores the text of a choice.
    """
    if form == "full" and item.pairs:
        return item.pairs
    letters = LETTERS[: len(item.choices)]
    lines = [f"Question: {item.question}"]
    if form == "letters":
        for letter, choice in zip(letters, item.choices, strict=True):
            lines.append(f"{letter}. {choice}")
    lines.append("Answer:")
    text = "\n".join(lines)
    ends = letters if form == "letters" else item.choices
    return [(text, f" {end}") for end in ends]


def make_prompts(item: Item, tokenizer, form: str, shots=(), context: int = 4096) -> list[Prompt]:
    """The prompts of a question: one for all of its letters, or one for the text of each choice.

    shots: solved examples to stand in front. Of a text longer than the context the beginning is
    cut, but not the token that the tokenizer puts before all texts; what it puts behind them is
    left out. ValueError where the end does not fit, or where a letter is not one token.
    """
    front = ""
    for shot in shots:
        text, end = text_pairs(shot, form)[shot.answer]
        front += f"{text}{end}\n\n"

    prompts = []
    for text, end in text_pairs(item, form):
        # Scored is what the text with its end does not share with the text alone.
        before, whole, _ = three_parts(tokenizer.encode(front + text + end))
        _, alone, _ = three_parts(tokenizer.encode(front + text))
        first = n_shared(whole, alone)
        cut = max(0, len(before) + len(whole) - 1 - context)
        asked = cut < first or (cut == 0 and len(before) > 0)
        fits = asked and first < len(whole)
        require(fits, f"{end!r:.80} does not fit into a context of {context} tokens")
        # The token at place i is predicted one place before.
        tokens = before + whole[cut:]
        start = len(tokens) - len(whole) + first
        scored = [(i - 1, tokens[i]) for i in range(start, len(tokens))]
        prompts.append(Prompt(tokens[:-1], [scored], cut))
    if form == "full":
        return prompts

    # All letters follow the same tokens.
    tokens = prompts[0].tokens
    options = [prompt.options[0] for prompt in prompts]
    single = all(len(option) == 1 for option in options)
    same = all(prompt.tokens == tokens for prompt in prompts)
    hint = "score with --form full"
    problem = f"this tokenizer has no single token for ' A', ' B' and so on; {hint}"
    require(single and same, problem)
    return [Prompt(tokens, options, prompts[0].n_cut)]


def tell_cuts(prompts: list[list[Prompt]], what: str):
    """Say how many questions lost their beginning."""
    n = sum(any(prompt.n_cut for prompt in group) for group in prompts)
    if n:
        note(f"{n} of {len(prompts)} {what} are longer than the context: their beginning is cut")


def n_shared(first: list[int], second: list[int]) -> int:
    """How many tokens two texts share at their beginning."""
    shorter = min(len(first), len(second))
    for i in range(shorter):
        if first[i] != second[i]:
            return i
    return shorter


def as_problems(prompts: list[Prompt], items: list[Item], vocab_size: int) -> Problems:
    """Prompts whose options are letters, as tensors: what re-mixing takes.

    Where a question has fewer choices than another, its first letter stands there again.
    """
    tokens, lengths = padded([prompt.tokens for prompt in prompts], vocab_size)
    most = max(len(prompt.options) for prompt in prompts)
    options, labels = [], []
    for prompt, item in zip(prompts, items, strict=True):
        letters = [token for ((_, token),) in prompt.options]
        labels.append(letters[item.answer])
        missing = most - len(letters)
        options.append(letters + letters[:1] * missing)
    return Problems(tokens, lengths, torch.tensor(labels), torch.tensor(options))
