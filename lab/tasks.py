"""How a model is scored on the data it learns from, which expert does what there, and multiple choice."""

import math
import textwrap
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import SKILLS, SkillsTask, TextData, tinystories
from moe import Router

CHUNK = 8_192  # tokens in one forward pass of an evaluation


def load_data(train: dict, context: int):
    """What a run with these settings learns from: the skills task of its seed, TinyStories, or the user's text."""
    if train["data"] == "skills":
        return SkillsTask(train["seed"])
    path, valid = (train["data_file"], train["valid_file"]) if train["data"] == "text" else tinystories()
    return TextData(path, valid, train["tokenizer"], context, train["seed"])


@torch.no_grad()
def passes(model, *tensors):
    """Tensors (n, T), the first of them tokens, through the model in evaluation: yields their parts and the Output."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for parts in zip(*(tensor.split(max(1, CHUNK // tensors[0].shape[1])) for tensor in tensors), strict=True):
            parts = [part.to(device) for part in parts]
            yield *parts, model(parts[0])
    finally:
        model.train(training)


def evaluate(model, data, split: str, most: int | None = 256) -> dict:
    """Scores on `dev` or `test`, on text on up to `most` windows of it (None: all).

    loss: nats per answer, or per token of text; there also perplexity and bits_per_byte; on the skills task accuracy,
    and that on clear and on ambiguous cues (fractions); balance_loss where the model has routers.
    """
    nats = balance = count = n_bytes = 0
    if isinstance(data, SkillsTask):
        prompts, right = data.prompts(split), []
        for _, labels, out in passes(model, prompts.tokens, prompts.labels[:, None]):
            logits, labels = out.logits[:, -1], labels[:, 0]  # (n, 4, V) -> (n, V)
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            right.append((logits.argmax(-1) == labels).cpu())
            balance, count = balance + len(labels) * float(out.balance_loss), count + len(labels)
        right = torch.cat(right).float()
        groups = {"accuracy": right, "clear": right[prompts.clear], "ambiguous": right[~prompts.clear]}
        scores = {"loss": nats / count} | {name: group.mean().item() for name, group in groups.items()}
    else:
        for tokens, targets, out in passes(model, *data.held_out(split, most)):
            nats += F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            balance, count = balance + tokens.numel() * float(out.balance_loss), count + tokens.numel()
            n_bytes += int(data.token_bytes[targets.cpu()].sum())
        scores = {"loss": nats / count, "perplexity": math.exp(nats / count)}
        scores["bits_per_byte"] = nats / math.log(2) / n_bytes
    return scores | ({"balance_loss": balance / count} if model.routers() else {})


def places(model) -> list[str]:
    """Where each router stands: "layer 2", or "layer 2 A" and "layer 2 B" where a block has two."""
    blocks = [[module for module in block.modules() if isinstance(module, Router)] for block in model.blocks]
    letters = [("",) if len(routers) == 1 else (" A", " B")[: len(routers)] for routers in blocks]
    return [f"layer {i}{letter}" for i, each in enumerate(letters) for letter in each]


class Specialisation(NamedTuple):
    """Which expert does what, over L routers and E experts; see `specialisation`."""

    load: np.ndarray  # (L, E) share of all tokens that visit an expert
    shares: np.ndarray  # (L, R, E) share of the tokens of a kind that do
    kinds: list[str]  # (R,)
    together: np.ndarray  # (L, E, E) share of the tokens of expert i that also visit expert j
    entropy: np.ndarray  # (L,) mean entropy of a token's routing probabilities, as a share of the largest, ln E
    top: np.ndarray  # (L,) mean probability of the first choice


def specialisation(model, data, split: str = "test", n_kinds: int = 12) -> Specialisation:
    """What the routers do with the held-out tokens of a split.

    On the skills task the kinds of token are the skills, at the cue, where the work is done; on text they are the
    most frequent tokens.
    """
    if isinstance(data, SkillsTask):
        prompts = data.prompts(split)
        tokens, kind, names = prompts.tokens, torch.full_like(prompts.tokens, -1), list(SKILLS)
        kind[:, -1] = prompts.skill
    else:
        tokens, _ = data.held_out(split)
        common = tokens.flatten().bincount().argsort(descending=True)[:n_kinds]
        kind = (tokens[..., None] == common).int()  # (n, T, R)
        kind = torch.where(kind.any(-1), kind.argmax(-1), -1)  # (n, T, R) -> (n, T)
        names = [data.show(int(token)) for token in common]
    outs = [out.routing for *_, out in passes(model, tokens)]
    probs = torch.stack([torch.cat([r.probs for r in layer]) for layer in zip(*outs, strict=True)]).cpu()  # (L, N, E)
    chosen = [torch.cat([routing.experts for routing in layer]) for layer in zip(*outs, strict=True)]  # (N, K) each
    chosen = torch.stack(chosen).cpu()  # (L, N, K)
    visits, E = torch.zeros_like(probs).scatter_(2, chosen, 1.0), probs.shape[-1]  # (L, N, E) 1 where a token goes
    shares = torch.stack([visits[:, kind.flatten() == row].mean(1) for row in range(len(names))], 1)  # (L, R, E)
    together = visits.mT @ visits / visits.sum(1)[..., None].clamp(min=1)  # (L, E, E)
    entropy = -(probs * probs.clamp(min=1e-12).log()).sum(-1).mean(1) / math.log(E)  # (L,)
    top = probs.max(-1).values.mean(1)  # (L,)
    return Specialisation(*map(np.asarray, (visits.mean(1), shares)), names, *map(np.asarray, (together, entropy, top)))


class Question(NamedTuple):
    """A multiple-choice question whose choices are single tokens."""

    prompt: list[int]
    choices: list[int]
    answer: int  # the place among the choices


def cloze(data: TextData, split: str, seed: int = 0) -> list[Question]:
    """Choose the true last word of a story among four, each one token; chance is 25 %.

    A distractor is the last word of another story of the split, drawn at random: words that end stories often are
    often distractors, too, so that frequency does not tell them apart. No questions where there are not four words.
    """
    wordly = {t: data.encoding.decode_single_token_bytes(t) for t in range(data.vocab_size) if data.token_bytes[t] > 0}
    words = {t for t, word in wordly.items() if word[:1] == b" " and word[1:].isalpha()}
    inside = {t for t, word in wordly.items() if word[:1].isalpha() or word[:1] > b"\x7f"}  # goes on with a word
    stories = []
    for story in data.documents(split):
        last = next((i for i in range(len(story) - 2, 0, -1) if int(story[i]) in words), 0)  # the last token is END
        ends = all(int(token) not in words | inside for token in story[last + 1 :])
        if last and ends:
            stories.append(([data.encoding.eot_token, *story[:last].tolist()][-data.context :], int(story[last])))
    rng, questions = np.random.default_rng([seed, 2]), []
    for prompt, word in stories if len({word for _, word in stories}) >= 4 else []:
        choices = [word]
        while len(choices) < 4:
            other = stories[rng.integers(len(stories))][1]
            choices += [other] if other not in choices else []
        order = rng.permutation(4)
        questions.append(Question(prompt, [choices[i] for i in order], int(np.argmin(order))))
    return questions


@torch.no_grad()
def choose(model, questions: list[Question]) -> np.ndarray:
    """The choice that a model in evaluation finds most probable after each prompt: (n,)."""
    picked, n = [], max(1, CHUNK // model.config.context)
    device = next(model.parameters()).device
    for start in range(0, len(questions), n):
        part = questions[start : start + n]
        longest = max(len(question.prompt) for question in part)
        tokens = torch.tensor([q.prompt + [0] * (longest - len(q.prompt)) for q in part], device=device)  # (n, T)
        length = torch.tensor([len(q.prompt) for q in part], device=device)
        valid = torch.arange(longest, device=device) < length[:, None]  # (n, T)
        logits = model(tokens, valid=valid).logits[torch.arange(len(part)), length - 1]  # (n, T, V) -> (n, V)
        picked.append(logits.gather(1, torch.tensor([q.choices for q in part], device=device)).argmax(1))  # (n, 4)
    return torch.cat(picked).cpu().numpy()


def accuracy(picked: np.ndarray, questions: list[Question]) -> float:
    """The share of the questions (n,) whose answer was picked (n,)."""
    return float(np.mean(picked == [question.answer for question in questions]))


def most_frequent(data: TextData, questions: list[Question]) -> np.ndarray:
    """The baseline of `cloze`, without reading: the choice that ends most stories of the training text, (n,)."""
    row = data.rows["train"]
    ends = data.starts(row)[1:] - 1  # where END stands; the last word is among the three tokens before
    counts = sum(np.bincount(row[np.maximum(ends - i, 0)], minlength=data.vocab_size) for i in (1, 2, 3))  # (V,)
    return np.array([np.argmax(counts[question.choices]) for question in questions])


def final_scores(model, data) -> dict[str, dict]:
    """The scores on dev and test; on stories also those of the cloze task and its baseline (fractions).

    Of a large text up to 4,096 windows and 2,000 questions, so that a run ends in minutes; eval.py takes all.
    """
    scores = {split: evaluate(model, data, split, most=4096) for split in ("dev", "test")}
    for split in scores if isinstance(data, TextData) else ():
        questions = cloze(data, split)[:2000]
        if len(questions) >= 20:  # else a text of another kind
            scores[split]["cloze"] = accuracy(choose(model.eval(), questions), questions)
            scores[split]["frequent"] = accuracy(most_frequent(data, questions), questions)
    return scores


def stories(model, data, n: int = 3) -> str:
    """n texts sampled from nothing but the end of another text, at temperature 0.6, as the model tells them."""
    stop, device = data.encoding.eot_token, next(model.parameters()).device
    start, generator = torch.full((n, 1), stop, device=device), torch.Generator(device).manual_seed(0)
    told = model.generate(start, model.config.context - 1, 0.6, stop, generator=generator).tolist()
    texts = [data.encoding.decode([token for token in row if token != stop]) for row in told]
    return "\n\n".join(textwrap.fill(" ".join(text.split()), 110) for text in texts)
