"""The settings of a training run: from flags, from the task, or from a run that goes on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from data import TASKS
from lab.composing.presets import PRESETS, config_class, preset
from lab.tools import cli, runs
from lab.tools.checks import require_kinds
from lab.tools.files import new_folder
from moe import MoEConfig, require

CHANGEABLE = ("resume", "device", "compile", "taste")  # flags that a resumed run may change


@dataclass
class TrainConfig:
    """What a run learns, and how."""

    data: Annotated[Literal[tuple(TASKS)], "the task, TinyStories (1.9 GB), your text"] = "skills"
    data_file: Annotated[str | None, "a UTF-8 text, <|endoftext|> behind each document"] = None
    valid_file: Annotated[str | None, "held-out text (none: the last tenth of data_file)"] = None
    tokenizer: Annotated[str, "of a text: tinystories, bytes, or one of tiktoken"] = "tinystories"
    n_functions: Annotated[int, "compositions: functions on each side"] = 16
    n_in_a_row: Annotated[int, "compositions: functions in a row"] = 2
    trained: Annotated[float, "compositions: share of the pairs that is trained"] = 0.7
    model: Annotated[Literal["moe", "dense"], "dense: as wide as what a token visits"] = "moe"
    preset: Annotated[Literal[tuple(PRESETS)] | None, "another kind of model, as large"] = None
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
        for name in ("steps", "batch", "seeds", "eval_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}; it must be greater than 0")
        for name in ("seed", "warmup", "threads", "weight_decay", "balance", "z", "final_lr"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it must be at least 0")
        has_twin = self.twin or self.model == "dense"
        hint = "compare it with --preset dense"
        require(not (self.preset and has_twin), f"a preset has no dense twin: {hint}")
        named = self.data != "text" or self.data_file is not None
        require(named, "--data text needs --data-file PATH")


def name_files_absolutely(given: dict):
    """Name files by their whole paths, so that a run can be opened from other folders."""
    for name in ("data_file", "valid_file", "tokenizer"):
        if given.get(name) and Path(given[name]).is_file():
            given[name] = str(Path(given[name]).absolute())


def new_settings(given: dict) -> tuple[TrainConfig, MoEConfig]:
    """Settings of a new run: the flags over what the task wants, over the defaults."""
    name_files_absolutely(given)
    # What the task wants, and what the flags say.
    if given.get("data_file") and "data" not in given:
        given["data"] = "text"
    task = TASKS[given.get("data", "skills")]
    values = dict(task.settings)
    if given.get("preset"):
        values |= task.preset_sizes
    values |= given
    train = cli.make_config(TrainConfig, values)
    sizes = cli.make_config(MoEConfig, values)

    # A preset starts from these sizes.
    if train.preset:
        try:
            sizes = preset(train.preset, sizes)
        except ValueError as error:
            hint = ""
            if task.preset_hint and not vars(sizes).keys() & given.keys():
                hint = f"; every preset fits {task.preset_hint}"
            raise cli.Usage(f"{error}{hint}") from error
    return train, sizes


def resumed_settings(given: dict) -> tuple[TrainConfig, MoEConfig]:
    """Settings of the run to continue. Usage names every flag that asks for something else."""
    # Most flags have to say what the run has, or nothing.
    name_files_absolutely(given)
    folder = Path(given["resume"])
    saved = runs.read_settings(folder)
    old = {**saved["model"], **saved["train"]}
    conflicts = []
    for name, value in given.items():
        if name not in CHANGEABLE and value != old.get(name):
            flag = "--" + name.replace("_", "-")
            conflicts.append(f"{flag} {value} (the run has {old.get(name)})")
    if conflicts:
        hint = "leave them out, or start a new run"
        raise cli.Usage(f"{folder} has other settings: {', '.join(conflicts)}; {hint}")
    runs.require_router(folder, saved["train"].get("router"), given.get("router"))

    # The settings that are saved, and the few that may change.
    task = TASKS[saved["train"].get("data", "skills")]
    changes = {name: given[name] for name in CHANGEABLE if name in given}
    train = cli.make_config(TrainConfig, {**task.settings, **saved["train"], **changes})
    return train, cli.make_config(config_class(saved["model"]), saved["model"])


def folder_of(train: TrainConfig, single: bool) -> Path:
    """The folder of a run: as --resume or --out says, or else a new one, out/DATA-sSEED.

    single: no other runs come with it, so that its name is just --out.
    """
    if train.resume:
        return Path(train.resume)
    kind = ""
    if train.preset:
        kind = f"-{train.preset}"
    if train.model == "dense":
        kind = "-dense"
    if train.out:
        return Path(train.out if single else f"{train.out}{kind}-s{train.seed}")
    return new_folder(Path(f"out/{train.data}{kind}-s{train.seed}"))


def require_no_run(folder: Path):
    """Usage unless a new run may be written to a folder."""
    there = [name for name in runs.FILES if (folder / name).exists()]
    if there:
        hint = f"continue it with {cli.command('--resume', folder)}, or name another --out"
        raise cli.Usage(f"{folder} holds a run already ({there[0]}); {hint}")


def commands_left(argv: list[str], train: TrainConfig, seed: int, model: str) -> list[str]:
    """The commands for the runs of --seeds and --twin that come after this one."""
    commands = []
    if train.twin and model == "moe":
        commands.append(["--no-twin", "--model", "dense", "--seed", seed, "--seeds", 1])
    n_left = train.seed + train.seeds - seed - 1
    if n_left:
        commands.append(["--seed", seed + 1, "--seeds", n_left])
    return [cli.command("python", "train_toy.py", *argv, *flags) for flags in commands]
