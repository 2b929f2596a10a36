"""C3PO on a benchmark: the table of `eval.py remix`, on the prompts that are scored without it.

The references are solved questions of other benchmarks. They are built once and kept. Every block
of questions is kept as well, so that a rerun continues.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checks import require
from lab.checkpoints.answers import Answers
from lab.checkpoints.benchmarks import (
    Item,
    Prompt,
    as_problems,
    make_prompts,
    read_items,
    without_asked,
)
from lab.remixing.arena import Arena, Outcome
from lab.remixing.contest import compete, pooled
from lab.remixing.tables import LEGEND, main_table
from lab.tools.cli import note
from lab.tools.files import digest, owned
from pathways import ReferenceSet, fingerprint
from pathways.checks import as_tuples
from remix import RemixConfig

BLOCK = 64  # questions that are re-mixed between two lines of the file of answers
SURROGATES = {  # as --method names them -> as the table does
    "mode_finding": "mode finding",
    "kernel_regression": "kernel regression",
    "ngd": "NGD",
    "oracle": "oracle",
}


def remix_benchmark(model, tokenizer, items: list[Item], shots, choice, changes: dict) -> int:
    """Re-mix a checkpoint for every question, print the table -> the exit code.

    shots: solved examples in front of each. choice: a ChoiceConfig. changes: fields of RemixConfig.
    """

    def prompts_of(questions: list[Item]) -> list[Prompt]:
        context, prompts = model.config.context, []
        for item in questions:
            prompts += make_prompts(item, tokenizer, "letters", shots, context)
        return prompts

    # What is asked, what helps, and with which settings.
    solved_items = []
    for name, file in choice.reference_sources():
        solved_items += read_items(name, file, solved=True)[: choice.reference_limit]
    solved_items = without_asked(solved_items, [*items, *shots], "references")
    require(solved_items, "no references are left to re-mix by")
    asked, solved = prompts_of(items), prompts_of(solved_items)
    settings = paper_settings(model) | changes
    config = RemixConfig(**settings)

    # What the answers are answers to is known by its content.
    about = {
        "model": fingerprint(model),
        "task": choice.task,
        "references": choice.references,
        "settings": settings,
        "prompts": digest(repr((asked, solved, [item.answer for item in items + solved_items]))),
        "methods": choice.method,
        "block": BLOCK,
    }
    stem = f"out/choice/{Path(choice.model).name}-{choice.task}"
    path = Path(choice.out or f"{stem}-remixed-{digest(repr(about))[:8]}.jsonl")
    name = digest(about["model"], repr((solved, [item.answer for item in solved_items])))[:8]
    reference_path = Path(f"{stem}-references-{name}.safetensors")
    references = kept_references(reference_path, model, solved, solved_items)

    # Let the methods compete, block by block. A rerun continues.
    methods = [SURROGATES[name] for name in choice.methods()]
    starts = range(0, len(items), BLOCK)
    bar = {"unit_scale": BLOCK, "unit": "question", "desc": "re-mixing", "disable": None}
    with owned(path) as file:
        answers = Answers(file, about)
        for start in tqdm(starts, **bar):
            if start not in answers.kept:
                block = slice(start, start + BLOCK)
                tokens, lengths, labels, options, *_ = as_problems(
                    asked[block], items[block], model.config.vocab_size
                )
                arena = Arena(model, tokens, labels, references, config, lengths, options)
                answers.add({start: as_lists(compete(arena, methods))})
    outcomes = joined([answers.kept[start] for start in starts])

    # Report.
    n_right = int(references.correct.sum())
    help_text = f"{len(solved):,} references, {n_right:,} answered right"
    rows = pooled([outcomes], [np.arange(len(items))])
    print(f"{choice.task}, {len(items)} questions; {help_text}; {settings}\n")
    print(main_table(rows, {}), LEGEND, sep="\n\n", end="\n\n")
    print(f"wrote {path} and {reference_path}")
    return 0


def paper_settings(model) -> dict:
    """The paper's for OLMoE: five critical layers, 20 core experts, where there are so many."""
    settings = {"embedding": "tfidf", "batch": 8}
    if model.config.n_layers - len(model.config.dense_layers) >= 5:
        settings["layers"] = "last:5"
    if model.config.n_experts >= 20:
        settings["core"] = 20
    return settings


def kept_references(path: Path, model, prompts: list[Prompt], items: list[Item]) -> ReferenceSet:
    """The references of this file, or, where it has not just these, new ones, written to it."""
    solved = as_problems(prompts, items, model.config.vocab_size)
    if path.exists():
        try:
            references = ReferenceSet.load(path, model)
            for name in ("tokens", "lengths", "labels", "options"):
                same = torch.equal(getattr(references, name), getattr(solved, name))
                require(same, f"{path} has other {name}")
            return references
        except ValueError as error:
            note(f"{error}; its references are made anew")
    rows = as_tuples(solved.tokens, solved.lengths)
    references = ReferenceSet.build(model, rows, solved.labels, solved.options)
    references.save(path)
    return references


def as_lists(outcomes: dict[str, Outcome]) -> dict[str, list]:
    """The outcomes of a block, for a line of JSON."""
    lists = {}
    for name, outcome in outcomes.items():
        *columns, seconds = outcome
        lists[name] = [column.tolist() for column in columns] + [seconds]
    return lists


def joined(blocks: list[dict[str, list]]) -> dict[str, Outcome]:
    """The outcomes of all blocks together."""
    outcomes = {}
    for name in blocks[0]:
        parts = [block[name] for block in blocks]
        *columns, seconds = zip(*parts, strict=True)
        columns = [np.concatenate(column) for column in columns]
        outcomes[name] = Outcome(*columns, sum(seconds))
    return outcomes
