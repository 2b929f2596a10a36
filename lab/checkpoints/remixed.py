"""C3PO on a benchmark: the table of `eval.py remix`, on the prompts that are scored without it.

The references are solved questions of other benchmarks. They are built once and kept, by what they
are: these questions, this model. Every block of questions is kept as well, so that a rerun
continues. Questions of alike lengths stand in one block, as padding costs what a token costs.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Problems
from lab.checkpoints.answers import kept_answers
from lab.checkpoints.benchmarks import Item, not_asked
from lab.checkpoints.questions import Prompt, as_problems, make_prompts, tell_cuts
from lab.remixing.arena import Arena, Outcome, selected
from lab.remixing.contest import compete, pooled
from lab.remixing.methods import METHODS
from lab.remixing.tables import CONTEST_LEGEND, main_table
from lab.tools import processes
from lab.tools.checks import progress, require
from lab.tools.cli import note
from lab.tools.files import digest, owned
from lab.tools.kinds import some_of
from pathways import ReferenceSet, critical_layers, fingerprint
from pathways.checks import as_tuples, require_gradient, require_layer
from pathways.prompts import MOST_TOKENS
from remix import RemixConfig

# Memory of torch's library: it keeps a thousand products' code in bfloat16.
KERNEL_BYTES = 1_300_000_000
BLOCK = 64  # questions that are re-mixed between two lines of the file of answers
SHARED = """\
Prompts and neighbours are read once for all rows: ms is what a row adds to those above it."""


# ------------------------------------------------------------------ what is known without weights


class Comparison(NamedTuple):
    """What is asked, what helps, and with which settings."""

    asked: Problems  # n questions, the longest first
    solved: Problems  # m references
    helpful: torch.Tensor  # (m', ) the places of those that are not asked
    settings: dict  # fields of RemixConfig that are not its defaults
    config: RemixConfig
    memory: int  # bytes that re-mixing takes beside what scoring takes


def plan_comparison(
    outline, prompts: list[Prompt], items: list[Item], solved, shots, methods: list[str], changes
) -> Comparison:
    """All that can be made and checked before the weights are read. ValueError.

    outline: of hf.outline. prompts: of the items that are asked. solved: the items that help; shots
    stand in front of each. methods: as --method names them. changes: fields of RemixConfig.
    """
    model, vocab_size = outline.model, outline.model.config.vocab_size
    order = sorted(range(len(items)), key=lambda i: -len(prompts[i].tokens))
    asked = as_problems([prompts[i] for i in order], [items[i] for i in order], vocab_size)
    helpful = not_asked(solved, [*items, *shots], "references")
    require(helpful, "no references are left to re-mix by")
    examples = []
    for item in solved:
        context = model.config.context
        examples += make_prompts(item, outline.tokenizer, "letters", shots, context)
    tell_cuts([[prompt] for prompt in examples], "references")

    # The settings, and whether they fit the model.
    settings = paper_settings(model) | changes
    config = RemixConfig(**settings)
    layers = critical_layers(model, config.layers)
    n_experts = model.config.n_experts
    require(
        (config.core or 0) <= n_experts,
        f"core is {config.core}, but there are {n_experts} experts",
    )
    require(config.k <= len(helpful), f"k is {config.k}, but there are {len(helpful)} references")
    kind, _, layer = config.embedding.partition(":")
    require(kind != "own", "embedding own needs vectors of your own; benchmarks have none")
    if kind == "hidden":
        require_layer(config.embedding, layer, model.config.n_layers)
    if "ngd" in methods:
        require_gradient(model)
    solved = as_problems(examples, solved, vocab_size)
    memory = remix_memory(outline, config, min(layers), asked, solved)
    return Comparison(asked, solved, torch.tensor(helpful), settings, config, memory)


def pass_memory(outline, longest: int, device: str) -> int:
    """Bytes that a pass takes above the weights, at most. longest: tokens of a prompt."""
    c = outline.model.config
    itemsize = getattr(torch, outline.dtype).itemsize
    experts = c.top_k * (2 * c.d_model + 4 * c.d_expert)  # numbers for a token
    dense = 4 * max(c.d_shared, c.d_dense if c.dense_layers else 0)
    attention = 4 * (c.n_heads + c.n_kv_heads) * c.head_dim
    numbers = max(experts + dense, attention) + 6 * c.d_model
    logits = 256 * c.vocab_size * (2 * 4 + itemsize)
    kernels = KERNEL_BYTES if (device, outline.dtype) == ("cpu", "bfloat16") else 0
    return max(MOST_TOKENS, longest) * numbers * itemsize + logits + kernels


def remix_memory(outline, config: RemixConfig, first: int, asked, solved) -> int:
    """Bytes that re-mixing takes beside a pass, at most: prefixes, pathways, tf-idf.

    first: the first critical layer.
    """
    c = outline.model.config
    itemsize = getattr(torch, outline.dtype).itemsize
    # Keys and values of a token in the layers from the first critical one up.
    token = 2 * (c.n_layers - first) * c.n_kv_heads * c.head_dim * itemsize
    prompts = BLOCK * int(asked.lengths.max()) * token
    neighbours = config.batch * config.k * int(solved.lengths.max()) * token
    rows = len(outline.model.routers()) * c.n_experts * 4
    return int(
        prompts
        + 1e6 * config.max_memory
        + 2 * neighbours  # padded; with the new token, for the gradient
        + 3 * len(solved.labels) * rows
        + 2**28  # tf-idf
    )


# ------------------------------------------------------------------------------------- with them


def remix_benchmark(model, plan: Comparison, choice) -> int:
    """Re-mix a checkpoint for every question, print the table -> the exit code.

    choice: a ChoiceConfig.
    """
    asked, solved, mark = plan.asked, plan.solved, fingerprint(model)
    n = len(asked.labels)

    source = reference_path(model, solved, choice)
    references = kept_references(source, model, solved).some(plan.helpful)

    # What the answers are answers to is known by its content, too.
    about = {
        "model": mark,
        "task": choice.task,
        "references": choice.references,
        "settings": plan.settings,
        "prompts": problems_digest(asked) + problems_digest(solved),
        "methods": choice.methods(),
        "block": BLOCK,
    }
    name = f"{Path(choice.model).name}-{choice.task}-remixed-{digest(repr(about))[:8]}"
    path = Path(choice.out or f"out/choice/{name}.jsonl")

    # Let the methods compete, block by block. A rerun continues.
    methods = ["base", *some_of("method", choice.method, METHODS)]
    blocks = dict(enumerate(torch.arange(n).split(BLOCK)))
    with kept_answers(path, about) as answers:
        left = sorted(blocks.keys() - answers.kept.keys())
        done = sum(len(blocks[i]) for i in answers.kept)
        bar = progress(None, "re-mixing", total=n, initial=done, unit="question")
        for pieces, i in processes.rounds(left):
            outcomes = {}
            if i is not None:
                block = selected(asked, blocks[i])
                tokens, lengths, labels, options, *_ = block
                arena = Arena(
                    model, tokens, labels, references, plan.config, lengths, options, prefixes={}
                )
                outcomes[i] = as_lists(compete([arena], methods))
            for theirs in processes.gathered(outcomes):
                answers.add(theirs)
            bar.update(sum(len(blocks[piece]) for piece in pieces))
        bar.close()
    outcomes = joined_blocks([answers.kept[i] for i in blocks])

    # Report.
    n_right = int(references.correct.sum())
    help_text = f"{len(references.labels):,} references, {n_right:,} answered right"
    rows = pooled([outcomes], [np.arange(n)])
    print(f"{choice.task}, {n} questions; {help_text}; {plan.settings}\n")
    print(main_table(rows, {}), CONTEST_LEGEND, SHARED, sep="\n\n", end="\n\n")
    print(f"wrote {path} and {source}")
    return 0


def reference_path(model, solved: Problems, choice) -> Path:
    """The file of references: known by the model, the token, and the solved questions."""
    folder = Path(choice.out).parent if choice.out else Path("out/choice")
    name = digest(fingerprint(model), "last", problems_digest(solved))[:16]
    return folder / f"{Path(choice.model).name}-references-{name}.safetensors"


def problems_digest(problems: Problems) -> str:
    """What tells prompts, options and answers from all others."""
    tensors = [problems.tokens, problems.lengths, problems.labels, problems.options]
    shapes = str([tuple(tensor.shape) for tensor in tensors])
    return digest(shapes, *tensors)


def paper_settings(model) -> dict:
    """The paper's for OLMoE: five critical layers, 20 core experts, where there are so many."""
    settings = {"embedding": "tfidf"}
    if model.config.n_layers - len(model.config.dense_layers) >= 5:
        settings["layers"] = "last:5"
    if model.config.n_experts >= 20:
        settings["core"] = 20
    return settings


def kept_references(path: Path, model, solved: Problems) -> ReferenceSet:
    """The references of this file, or, where it has not just these, new ones, written to it.

    While they are built, a file beside it keeps what there is.
    """
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
    first, part = processes.rank() == 0, path.with_suffix(".part")
    with owned(path.with_suffix(".lock")) if first else nullcontext():
        references = ReferenceSet.build(model, rows, solved.labels, solved.options, keep_in=part)
        if first:
            references.save(path)
            part.unlink(missing_ok=True)
    return references


def as_lists(outcomes) -> dict[str, list]:
    """The outcomes of a block, as `compete` yields them, for a line of JSON."""
    lists = {}
    for name, (outcome,) in outcomes:
        *columns, seconds = outcome
        lists[name] = [column.tolist() for column in columns] + [seconds]
    return lists


def joined_blocks(blocks: list[dict[str, list]]) -> dict[str, Outcome]:
    """The outcomes of all blocks together."""
    outcomes = {}
    for name in blocks[0]:
        parts = [block[name] for block in blocks]
        *columns, seconds = zip(*parts, strict=True)
        columns = [np.concatenate(column) for column in columns]
        outcomes[name] = Outcome(*columns, sum(seconds))
    return outcomes
