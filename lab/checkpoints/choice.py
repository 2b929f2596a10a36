"""Multiple choice by log-likelihood, and C3PO on it, which gets the same prompts:

python eval.py choice --model allenai/OLMoE-1B-7B-0125-Instruct --task arc_challenge
python eval.py choice ...     the same, and --references openbookqa,sciq --method ngd: re-mixed,
                              with the paper's settings

A letter is one token, so that a prompt is read once for all choices, and C3PO can re-mix its last
token. `--form full` reads the text of every choice, and also compares log-likelihoods per byte.
"""

from pathlib import Path

import torch

import hf
from lab.checkpoints.answers import Answers, kept_answers
from lab.checkpoints.benchmarks import Item, not_asked, read_items
from lab.checkpoints.questions import Prompt, make_prompts, tell_cuts, text_pairs
from lab.checkpoints.remixed import pass_memory, plan_comparison, remix_benchmark
from lab.tools import cli, flags, processes
from lab.tools.checks import progress
from lab.tools.cli import note
from lab.tools.configs import ChoiceConfig
from lab.tools.files import digest
from lab.tools.statistics import share_interval
from moe import require
from pathways import fingerprint, padded
from pathways.prompts import MOST_TOKENS


def main(argv) -> int:
    """Score a benchmark -> the exit code."""
    return answer_benchmark(flags.choice(argv, __doc__))


def answer_benchmark(values: dict) -> int:
    """Score a benchmark, keep every answer, report -> the exit code."""
    config, changes = cli.make_config(ChoiceConfig, values), flags.remix_settings(values)
    processes.join()

    # Read all questions first: what is wrong with a file is told before the weights are read.
    items = read_items(config.task, config.data_file)[: config.limit]
    shots = read_shots(config, items)
    solved = []
    for name, file in config.reference_sources():
        solved += read_items(name, file, solved=True)[: config.reference_limit]

    # Look at the checkpoint, and check all that does not need its weights.
    dtype = None if config.dtype == "stored" else config.dtype
    outline = hf.outline(config.model, dtype)
    tokenizer, context = outline.tokenizer, outline.model.config.context
    problem = f"{config.model} has no tokenizer.json, so that it cannot read words"
    require(tokenizer is not None, problem)
    prompts = [make_prompts(item, tokenizer, config.form, shots, context) for item in items]
    tell_cuts(prompts, "questions")
    longest = max(len(prompt.tokens) for group in prompts for prompt in group)
    spare = pass_memory(outline, longest, config.device)
    plan = None
    if config.references:
        asked = [prompt for (prompt,) in prompts]
        plan = plan_comparison(outline, asked, items, solved, shots, config.methods(), changes)
        spare += plan.memory

    # Read the weights.
    if config.threads:
        torch.set_num_threads(config.threads)
    n_params, threads = outline.model.n_params(), torch.get_num_threads()
    where = f"{outline.dtype} on {config.device}, {threads} CPU threads"
    note(f"{config.model}: {n_params:,} parameters in {where}; {spare / 1e9:.1f} GB to work with")
    model = hf.fill(outline, processes.device_of(config.device), spare)
    if plan is not None:
        return remix_benchmark(model, plan, config)

    # Score. What the answers are answers to is known by its content.
    about = {"model": fingerprint(model), "task": config.task}
    about["prompts"] = digest(repr((prompts, [item.answer for item in items])))[:16]
    name = f"{Path(config.model).name}-{config.task}-{config.form}-{config.shots}"
    path = Path(config.out or f"out/choice/{name}-{digest(repr(about))[:8]}.jsonl")
    with kept_answers(path, about) as answers:
        nats = score(model, prompts, items, answers)
    title = f"{config.task}, {config.shots} shots, {len(items)} questions"
    print(accuracy_table(items, nats, config.form, title))
    print(f"\nwrote {path}")
    return 0


def read_shots(config: ChoiceConfig, items: list[Item]) -> list[Item]:
    """The solved examples in front of every question; none of them is asked."""
    if not config.shots:
        return []
    examples = read_items(config.task, config.shots_file, solved=True)
    places = not_asked(examples, items, "examples")[: config.shots]
    source = config.shots_file or config.task
    problem = f"--shots {config.shots}, but {source} has only {len(places)} other examples"
    require(len(places) == config.shots, problem)
    return [examples[i] for i in places]


@torch.no_grad()
def log_likelihoods(model, prompts: list[Prompt]) -> list[list[float]]:
    """The log-probability (nats) of each option of each prompt, by a model in evaluation mode."""
    device = next(model.parameters()).device
    tokens, lengths = padded([prompt.tokens for prompt in prompts], model.config.vocab_size)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
    x = model.run_blocks(model.embed(tokens.to(device)), valid.to(device))  # (B, T, D)

    # List the tokens that are scored, option by option.
    rows, places, targets = [], [], []
    for row, prompt in enumerate(prompts):
        for option in prompt.options:
            for place, token in option:
                rows.append(row)
                places.append(place)
                targets.append(token)
    targets = torch.tensor(targets)[:, None].to(device)  # (M, 1)

    # Predict them, in portions: the vocabulary may be large.
    nats = []
    hidden = x[torch.tensor(rows), torch.tensor(places)]  # (B, T, D) -> (M, D)
    for states, target in zip(hidden.split(256), targets.split(256), strict=True):
        log_probs = model.head(states).log_softmax(-1)  # (256, V)
        nats.append(log_probs.gather(1, target)[:, 0])

    # Sum over the tokens of each option.
    sizes = [len(option) for prompt in prompts for option in prompt.options]
    sums = [tokens.sum().item() for tokens in torch.cat(nats).cpu().split(sizes)]
    likelihoods = []
    for prompt in prompts:
        n = len(prompt.options)
        likelihoods.append(sums[:n])
        sums = sums[n:]
    return likelihoods


def score(model, prompts: list[list[Prompt]], items: list[Item], answers: Answers):
    """The log-likelihood of every choice of every item: a list of lists.

    Batch by batch they join the file of answers. What it already has is not computed again.
    """
    labels = {i: item.answer for i, item in enumerate(items)}
    lengths = [max(len(prompt.tokens) for prompt in group) for group in prompts]
    todo = [i for i in range(len(items)) if i not in answers.kept]
    todo.sort(key=lambda i: -lengths[i])  # alike lengths together: little padding
    right = sum(best_place(nats) == labels[i] for i, nats in answers.kept.items())

    batches = []
    while todo:
        most = max(len(prompts[i]) for i in todo)
        n = max(1, MOST_TOKENS // (lengths[todo[0]] * most))
        batches.append(todo[:n])
        todo = todo[n:]

    options = {"total": len(items), "initial": len(answers.kept), "unit": "question"}
    with progress(None, "choice", **options) as bar:
        for _, batch in processes.rounds(batches):
            nats = score_batch(model, prompts, batch or [])
            for theirs in processes.gathered(nats):
                answers.add(theirs, labels)
                right += sum(best_place(values) == labels[i] for i, values in theirs.items())
                bar.update(len(theirs))
            bar.set_postfix(accuracy=f"{right / len(answers.kept):.1%}", refresh=False)
    return [answers.kept[i] for i in range(len(items))]


def score_batch(model, prompts: list[list[Prompt]], batch: list[int]) -> dict:
    """The log-likelihoods of the choices of some items, by their places."""
    if not batch:
        return {}
    flat = [prompt for i in batch for prompt in prompts[i]]
    likelihoods = iter(log_likelihoods(model, flat))
    nats = {}
    for i in batch:
        # One prompt with several options, or several prompts with one.
        nats[i] = []
        for _ in prompts[i]:
            nats[i] += next(likelihoods)
    return nats


def best_place(values: list[float]) -> int:
    """Where the largest value stands."""
    return values.index(max(values))


def accuracy_table(items: list[Item], nats: list[list[float]], form: str, title: str) -> str:
    """A table of accuracies with their 95 % intervals, and chance beside them."""
    picked = {"letters" if form == "letters" else "log-likelihood": nats}
    if form == "full":
        per_byte = []
        for item, values in zip(items, nats, strict=True):
            ends = [end.strip().encode() for _, end in text_pairs(item, form)]
            pairs = zip(values, ends, strict=True)
            per_byte.append([value / max(1, len(end)) for value, end in pairs])
        picked["log-likelihood per byte"] = per_byte

    n = len(items)
    rows = []
    for name, values in picked.items():
        pairs = zip(values, items, strict=True)
        right = sum(best_place(scores) == item.answer for scores, item in pairs)
        low, high = share_interval(right, n)
        rows.append((name, f"{right / n:.1%}", f"{low:.1%} to {high:.1%}"))
    chance = sum(1 / len(item.choices) for item in items) / n
    rows.append(("chance", f"{chance:.1%}", ""))
    return cli.table(rows, header=[title, "right", "95 % interval"])
