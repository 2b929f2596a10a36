"""Settings of the programs: their defaults, what they mean, and what they must be.

The fields of these classes are the flags of the commands, and their texts the help. Nothing here
imports torch, so that --help and a wrong flag are answered at once.
"""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lab.tools.kinds import one_of, require, require_kinds, require_least, some_of


def defined_in(file: str, name: str):
    """The statement of a file that defines a class or a table, without importing that file."""
    source = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        target = getattr(statement, "targets", [statement])[0]
        if name in (getattr(target, "name", None), getattr(target, "id", None)):
            return statement
    raise ValueError(f"{file} defines no {name}")


def settings_of_file(file: str, name: str) -> type:
    """A class of settings out of a file that imports torch, without importing that file.

    The class is defined here once more, from its source. So MoEConfig can stand in moe.py and
    RemixConfig in remix.py, where they are read.
    """
    scope = globals() | {"Callable": Callable}  # the checks and names of this file
    exec(compile(ast.Module([defined_in(file, name)], []), file, "exec"), scope)
    return scope[name]


def names_of_file(file: str, table: str) -> tuple[str, ...]:
    """The names that stand in a table of such a file: the keys of a dictionary."""
    return tuple(key.value for key in defined_in(file, table).value.keys)


TASK_NAMES = names_of_file("data.py", "TASKS")
PRESET_NAMES = names_of_file("lab/composing/presets.py", "PRESETS")
SURROGATE_NAMES = names_of_file("remix.py", "SURROGATES")
METHOD_NAMES = names_of_file("lab/remixing/methods.py", "METHODS")
BENCHMARK_NAMES = names_of_file("lab/checkpoints/benchmarks.py", "BENCHMARKS")
KERNELS = ("gaussian", "matern", "polynomial", "linear")  # pathways/neighbours.py
TFIDF = ("tfidf", "tfidf-places", "tfidf-bigrams")  # pathways/similarity.py
EMBEDDINGS = (*TFIDF, "hidden", "pathway", "own")


# ----------------------------------------------------------------------------------------- training


@dataclass
class TrainConfig:
    """What a run learns, and how."""

    data: Annotated[Literal[TASK_NAMES], "the task, TinyStories (1.9 GB), your text"] = "skills"
    data_file: Annotated[str | None, "a UTF-8 text, <|endoftext|> behind each document"] = None
    valid_file: Annotated[str | None, "held-out text (none: the last tenth of data_file)"] = None
    tokenizer: Annotated[str, "of a text: tinystories, bytes, or one of tiktoken"] = "tinystories"
    n_functions: Annotated[int, "compositions: functions on each side"] = 16
    n_in_a_row: Annotated[int, "compositions: functions in a row"] = 2
    trained: Annotated[float, "compositions: share of the pairs that is trained"] = 0.7
    model: Annotated[Literal["moe", "dense"], "dense: as wide as what a token visits"] = "moe"
    preset: Annotated[Literal[PRESET_NAMES] | None, "another kind of model, as large"] = None
    router: Annotated[str | None, "FILE:CLASS, routers of your own; runs that file"] = None
    steps: Annotated[int, "optimiser steps"] = 500
    batch: Annotated[int, "sequences in a step"] = 64
    lr: Annotated[float, "peak learning rate"] = 3e-3
    warmup: Annotated[int, "steps of linear warm-up, before the cosine"] = 50
    final_lr: Annotated[float, "learning rate at the end, as a share of the peak"] = 0.05
    weight_decay: Annotated[float, "AdamW's weight decay, on matrices only"] = 0.1
    clip: Annotated[float, "largest norm of the gradient"] = 1.0
    balance: Annotated[float, "weight of the balance loss"] = 0.01
    z: Annotated[float, "weight of the router z-loss"] = 0.001
    seed: Annotated[int, "draws the task, the weights and the batches"] = 0
    seeds: Annotated[int, "how many seeds to run, one after the other"] = 1
    twin: Annotated[bool, "train the dense twin of every seed as well; compare in pairs"] = False
    eval_every: Annotated[int, "steps between evaluations, each with a checkpoint"] = 100
    threads: Annotated[int, "CPU threads (0: as many as torch would take)"] = 1
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute"] = "auto"
    dtype: Annotated[Literal["float32", "bfloat16"], "of a pass; weights: float32"] = "float32"
    compile: Annotated[bool, "use torch.compile"] = False
    taste: Annotated[bool, "end with a taste of re-mixing (default of a text: no)"] = True
    out: Annotated[str | None, "the run's folder (none: a new one in out/)"] = None
    resume: Annotated[str | None, "continue the run in this folder"] = None

    def __post_init__(self):
        require_kinds(self)
        for name, value in vars(self).items():
            require(value != "", f"{name} is empty; leave it out, or give it a value")
        require(self.threads <= 1024, f"threads is {self.threads}; expected at most 1024")
        require_least(self, steps=1, batch=1, seeds=1, eval_every=1)
        require_least(self, seed=0, warmup=0, threads=0, weight_decay=0, balance=0, z=0, final_lr=0)
        last = self.seed + self.seeds - 1
        require(last < 2**63, f"the last of {self.seeds} seeds is {last}; expected below 2**63")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}; it must be greater than 0")
        has_twin = self.twin or self.model == "dense"
        hint = "compare it with --preset dense"
        require(not (self.preset and has_twin), f"a preset has no dense twin: {hint}")
        named = self.data != "text" or self.data_file is not None
        require(named, "--data text needs --data-file PATH")


# --------------------------------------------------------------------------------------- benchmarks


@dataclass
class ChoiceConfig:
    """A benchmark, and how it is scored."""

    model: Annotated[str | None, "a folder, or owner/name or owner/name@revision on the hub"] = None
    task: Annotated[Literal[BENCHMARK_NAMES], "the benchmark"] = "arc_challenge"
    data_file: Annotated[str | None, "its rows, .jsonl or .parquet (none: download)"] = None
    form: Annotated[Literal["letters", "full"], "what of a choice is scored"] = "letters"
    shots: Annotated[int, "solved examples in front of every question"] = 0
    shots_file: Annotated[str | None, "their rows (none: download a split that has them)"] = None
    limit: Annotated[int | None, "take only so many questions (none: all)"] = None
    dtype: Annotated[Literal["stored", "float32", "bfloat16"], "the model's numbers"] = "stored"
    device: Annotated[Literal["cpu", "cuda", "mps"], "where to compute"] = "cpu"
    threads: Annotated[int | None, "CPU threads (none: all physical cores)"] = None
    references: Annotated[str | None, "re-mix, by these benchmarks, such as openbookqa,sciq"] = None
    reference_files: Annotated[str | None, "their rows, a file for each (none: download)"] = None
    reference_limit: Annotated[int | None, "take only so many of each (none: all)"] = None
    method: Annotated[str, "one or several of ngd,kernel_regression,mode_finding,oracle"] = "ngd"
    out: Annotated[str | None, "file of answers, to be continued (none: in out/choice/)"] = None

    def __post_init__(self):
        require_kinds(self)
        require(
            self.model is not None,
            "--model is missing: the folder of a checkpoint, or owner/name on the hub",
        )
        require_least(self, shots=0, threads=1, limit=1, reference_limit=1)
        require(
            self.form == "letters" or not self.references,
            "C3PO re-mixes the token before a letter; a later token of the text looks back at the "
            "re-mixed one, so that one token is not exact there",
        )
        self.methods()
        self.reference_sources()

    def methods(self) -> list[str]:
        """The methods that are named."""
        known = (*SURROGATE_NAMES, "oracle")
        return some_of("method", self.method, known)

    def reference_sources(self) -> list[tuple[str, str | None]]:
        """The benchmarks that references come from, each with its file."""
        if not self.references:
            return []
        names = some_of("benchmark", self.references, BENCHMARK_NAMES)
        files = [None] * len(names)
        if self.reference_files:
            files = self.reference_files.split(",")
        require(len(files) == len(names), "--reference-files needs one for each benchmark")
        return list(zip(names, files, strict=True))


# -------------------------------------------------------------------------------------- experiments


@dataclass
class PresetsConfig:
    """What to train, or to show."""

    data_file: Annotated[str | None, "the text, its documents ended by <|endoftext|>"] = None
    valid_file: Annotated[str | None, "held-out text (none: the last tenth of data_file)"] = None
    tokenizer: Annotated[str, "as in train_toy.py"] = "tinystories"
    presets: Annotated[str, "names of presets, with commas"] = "cartesian,fine_grained"
    seeds: Annotated[str, "such as 0-12, or 0,5"] = "0-2"
    steps: Annotated[int, "optimiser steps"] = 2500
    lr: Annotated[float, "peak learning rate"] = 6e-3
    norm_topk: Annotated[bool, "divide the k routing weights by their sum"] = True
    dropout: Annotated[float, "dropout on the embedding and on what sub-layers add"] = 0.0
    embedding_scale: Annotated[float, "embeddings enter the stream times this"] = 11.3
    residual_init: Annotated[float, "what sub-layers add starts at this / sqrt(fan-in)"] = 0.05
    sizes: Annotated[Literal["toy", "paper"], "of the toy, or the paper's proportions"] = "toy"
    device: Annotated[Literal["cpu", "cuda"], "where to train"] = "cpu"
    until_told: Annotated[bool, "stop where the file's declared test has ended"] = False
    results: Annotated[str, "the file of results"] = "results/compare.jsonl"
    out: Annotated[str, "where the folders of the runs are"] = "out/compare"

    def __post_init__(self):
        self.seed_list = []
        for text in self.seeds.split(","):
            ends = text.split("-")
            digits = all(end.isdigit() for end in ends)
            require(digits, f"seeds are {self.seeds!r}; expected numbers, such as 0-12 or 0,5")
            self.seed_list += range(int(ends[0]), int(ends[-1]) + 1)
        self.preset_list = some_of("preset", self.presets, PRESET_NAMES)


@dataclass
class CompositionConfig:
    """Where results and runs are."""

    results: Annotated[str, "the file of results"] = "results/composition.jsonl"
    out: Annotated[str, "where the folders of the runs are"] = "out/composition"


@dataclass
class RehearsalConfig:
    """What is rehearsed, and how often."""

    layers: Annotated[int, "layers of OLMoE's shapes"] = 2
    full: Annotated[bool, "all of its 16 layers"] = False
    questions: Annotated[int, "questions that are asked"] = 64
    references: Annotated[int, "solved questions that help"] = 256
    tokens: Annotated[int, "tokens that are generated"] = 16
    threads: Annotated[int, "CPU threads"] = 1
    folder: Annotated[str | None, "where the checkpoint is kept (none: a temporary folder)"] = None


# ------------------------------------------------------------------------------------------- checks


def require_sizes(config):
    """The sizes of a model (MoEConfig): of the right kind, and fitting together."""
    require_kinds(config)
    require_least(config, d_shared=0, dropout=0)
    for name, value in vars(config).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name not in ("d_shared", "dropout"):
            require(value > 0, f"{name} is {value}; it must be greater than 0")
    require(config.dropout < 1, f"dropout is {config.dropout}; it must be below 1")

    # Attention.
    d, heads = config.d_model, config.n_heads
    near = max(1, round(d / heads)) * heads
    require(
        config.head_dim is not None or d % heads == 0,
        f"d_model {d} does not divide into {heads} heads: try {near}, or give head_dim",
    )
    width, groups = config.head_dim or d // heads, config.n_kv_heads or heads
    require(width % 2 == 0, f"head_dim is {width}; rotary positions need pairs, an even width")
    require(heads % groups == 0, f"n_heads {heads} is not a multiple of n_kv_heads {groups}")

    # Experts.
    require(
        config.top_k <= config.n_experts,
        f"top_k {config.top_k} is more than the {config.n_experts} experts there are",
    )
    outside = [layer for layer in config.dense_layers if layer not in range(config.n_layers)]
    last = config.n_layers - 1
    require(not outside, f"dense_layers names {outside!s:.60}; the layers are 0 to {last}")


def require_remixing(config):
    """The values of a RemixConfig."""
    require_kinds(config)
    if not callable(config.method):
        config.method = one_of("method", config.method, SURROGATE_NAMES)
    kind, colon, layer = config.embedding.partition(":")
    config.embedding = one_of("embedding", kind, EMBEDDINGS) + colon + layer
    require_least(config, k=1, batch=1, core=1, steps=0, lr=0, alpha=0, max_memory=0)
    require(config.alpha <= 1, f"alpha is {config.alpha}; it must be at most 1")
