"""A rehearsal of a real checkpoint: everything that one does with OLMoE, on random weights.

python -m lab.checkpoints.rehearsal             OLMoE's shapes with two of its layers, 2.1 GB
python -m lab.checkpoints.rehearsal --full      all sixteen: 13.8 GB, on a machine with 24 GB

It writes a checkpoint in the hub's layout, a tokenizer and questions of mixed lengths; then it
loads, reads, generates, scores, and re-mixes, beside transformers where that is installed. It needs
Linux, which tells how much memory of a process belongs to no file.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.rehearsal, __doc__)

import gc
import io
import multiprocessing
import random
import re
import tempfile
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

import hf
from lab.checkpoints import choice, remixed
from lab.checkpoints.benchmarks import LETTERS, read_items
from lab.checkpoints.questions import make_prompts
from lab.remixing.cost import OLMOE
from lab.tools.configs import RehearsalConfig
from lab.tools.files import as_json, owned
from moe import MoEConfig, MoETransformer, require

# ------------------------------------------------------------------------ what it is rehearsed on


def write_all(folder: Path, sizes: MoEConfig, config: RehearsalConfig):
    """The checkpoint, its tokenizer, and questions."""
    torch.set_num_threads(config.threads)
    write_checkpoint(folder, sizes)
    write_words(folder, config.questions, config.references)


def write_checkpoint(folder: Path, config: MoEConfig):
    """A random checkpoint in bfloat16, a file for each layer: no more of it is in memory."""
    with torch.device("meta"):
        model = MoETransformer(config).bfloat16()
    family, raw = hf.write_config(model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(as_json(raw), encoding="utf-8")

    # The tensors of each file.
    shards = {}
    for name, weight in hf.pieces(model, family):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        shards.setdefault(layer[1] if layer else "others", {})[name] = weight
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, (_, weights) in enumerate(shards.items(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, weight in weights.items():
            tensors[name] = torch.ones(weight.shape, dtype=torch.bfloat16)  # the gain of a norm
            if weight.dim() == 2:
                tensors[name].normal_(0, weight.shape[1] ** -0.5, generator=generator)
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 2 * model.n_params()}, "weight_map": weight_map}
    index.write_text(as_json(content), encoding="utf-8")


def write_words(folder: Path, n_questions: int, n_references: int):
    """A tokenizer of random words, in the checkpoint; and questions in such words beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # Some thousand words of two to four syllables.
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(4_000)]
    text = f"Question: Answer: {' '.join(LETTERS)} {'. '.join(LETTERS)}. "
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=8_000, **options)
    tokenizer.train_from_iterator([text * 9, " ".join(words)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))

    # Rows like those of ARC: most questions are short, some are long.
    for name, n in (("asked", n_questions), ("solved", n_references)):
        lines = []
        for _ in range(n):
            length = min(160, int(draw.lognormvariate(2.8, 0.7)) + 4)
            choices = [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(4)]
            row = {"question": " ".join(draw.choices(words, k=length)) + "?"}
            row["choices"] = {"text": choices, "label": list("ABCD")}
            row["answerKey"] = draw.choice("ABCD")
            lines.append(as_json(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------ measuring


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


class Cost(NamedTuple):
    """What a step took."""

    seconds: float
    processor: float  # seconds of all threads
    growth: int  # bytes of anonymous memory, at its peak above the start


def watched(function):
    """Call a function -> its result, and a Cost."""
    start, growth, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            growth.append(anonymous() - start)

    threading.Thread(target=watch, daemon=True).start()
    began, processor = time.perf_counter(), time.process_time()
    result = function()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    done.set()
    growth.append(anonymous() - start)
    return result, Cost(seconds, processor, max(growth))


def peer_costs(folder: Path, prompts, n_tokens: int):
    """What transformers takes to load, to read prompts, and to generate: name -> Cost; logits."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.bfloat16}
    costs = {}
    model, costs["load"] = watched(lambda: AutoModelForCausalLM.from_pretrained(folder, **options))
    with torch.no_grad():
        logits, costs["forward"] = watched(lambda: [model(row[None]).logits[0] for row in prompts])
        settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
        _, costs["generate"] = watched(lambda: model.generate(prompts[0][None], **settings))
    return costs, logits


# ---------------------------------------------------------------------------------- the rehearsal


def rehearse(folder: Path, config: RehearsalConfig):
    """All steps -> name of the step -> (Cost, how many things it did); logits of some prompts."""
    values = {"model": str(folder), "task": "arc_easy", "threads": config.threads}
    values |= {"data_file": str(folder / "asked.jsonl"), "references": "arc_challenge"}
    values |= {"reference_files": str(folder / "solved.jsonl"), "out": str(folder / "out/remixed")}
    settings = choice.ChoiceConfig(**values)
    items = read_items("arc_easy", settings.data_file)
    solved = read_items("arc_challenge", settings.reference_files)
    costs = {}

    # Load, read some prompts, generate.
    outline = hf.outline(folder)
    groups = [make_prompts(item, outline.tokenizer, "letters") for item in items]
    asked = [prompt for (prompt,) in groups]
    plan = remixed.plan_comparison(outline, asked, items, solved, [], ["ngd"], {})
    model, costs["load"] = watched(lambda: hf.fill(outline))
    rows = [torch.tensor(prompt.tokens) for prompt in asked[:4]]
    with torch.no_grad():
        logits, costs["forward"] = watched(lambda: [model(row[None]).logits[0] for row in rows])
        _, costs["generate"] = watched(lambda: model.generate(rows[0][None], config.tokens))

    # Score, build references, re-mix; then again, where all is kept.
    with owned(folder / "out/plain") as file:
        answers = choice.Answers(file, {})
        _, costs["choice"] = watched(lambda: choice.score(model, groups, items, answers))
    path, costs["fingerprint"] = watched(
        lambda: remixed.reference_path(model, plan.solved, settings)
    )
    _, costs["references"] = watched(lambda: remixed.kept_references(path, model, plan.solved))
    _, costs["base and NGD"] = watched(lambda: remixed.remix_benchmark(model, plan, settings))
    model = None
    gc.collect()
    _, costs["all of it again"] = watched(lambda: choice.main(as_flags(values)))
    spare = choice.pass_memory(outline, max(map(len, rows)), "cpu"), plan.memory
    return costs, rows, logits, spare


def as_flags(values: dict) -> list[str]:
    """Settings as the command line gives them."""
    words = []
    for name, value in values.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def main(argv) -> int:
    """Write the checkpoint, rehearse, print the table."""
    config = flags.rehearsal(argv, __doc__)
    require(min(config.layers, config.questions, config.references) >= 1, "expected at least one")
    torch.set_num_threads(config.threads)
    sizes = replace(OLMOE, n_layers=16 if config.full else config.layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary, "checkpoint")
        if not folder.exists():
            # In a process of its own, whose memory is gone when ours is measured.
            writer = multiprocessing.get_context("spawn").Process(
                target=write_all, args=(folder, sizes, config)
            )
            writer.start()
            writer.join()
            require(writer.exitcode == 0, f"the checkpoint could not be written to {folder}")
        with redirect_stdout(io.StringIO()):
            costs, prompts, logits, spare = rehearse(folder, config)
        try:
            peers, theirs = peer_costs(folder, prompts, config.tokens)
        except ImportError:
            peers, theirs = {}, []
    print(costs_table(config, sizes, costs, peers, spare))
    if theirs:
        pairs = zip(logits, theirs, strict=True)
        apart = max(float((a - b.float()).abs().max()) for a, b in pairs)
        print(f"\nlogits and those of transformers, in bfloat16, differ by at most {apart:.3f}")
    return 0


def costs_table(config: RehearsalConfig, sizes: MoEConfig, costs, peers, spare) -> str:
    """The steps with what each took, for one of what it does, and beside transformers."""
    counts = {"forward": 4, "generate": config.tokens, "choice": config.questions}
    counts |= {"references": config.references, "base and NGD": config.questions}
    # A line for each step.
    lines = []
    for name, cost in costs.items():
        each = cost.processor / counts.get(name, 1)
        ratio = f"{cost.processor / peers[name].processor:.2f}" if name in peers else ""
        line = [name, f"{cost.seconds:.1f}", f"{cost.processor:.1f}", f"{each:.3f}"]
        lines.append([*line, f"{cost.growth / 1e9:.2f}", ratio])
    header = [
        f"{sizes.n_layers} layers",
        "seconds",
        "CPU s",
        "for one",
        "peak GB",
        "/ peer",
    ]
    remixing = costs["base and NGD"].processor / costs["choice"].processor
    return (
        f"{cli.table(lines, header)}\n\n{config.threads} CPU threads; for one: prompt, token, "
        "question or reference; peak: above what was there before;\npeer: CPU s of transformers; "
        f"base and NGD take {remixing:.2f} times the CPU s of choice; eval.py choice asks\nfor "
        f"{spare[0] / 1e9:.2f} GB beside the weights, and {spare[1] / 1e9:.2f} GB to re-mix"
    )


if __name__ == "__main__":
    cli.program(main)
