"""The settings of a training run: from flags, from the task, or from a run that goes on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from data import TASKS
from lab.composing.presets import PRESETS, config_class, preset
from lab.tools import cli, runs
from moe import MoEConfig, require

CHANGEABLE = ("resume", "device", "compile", "taste")  # flags that a resumed run may change


@dataclass
class TrainConfig:
    """What a run learns, and how."""

    data: Annotated[Literal[tuple(TASKS)], "the task, TinyStories (1.9 GB), your text"] = "skills"
    data_file: Annotated[str | None, "a UTF-8 text, <|endoftext|> behind each document"] = None
    valid_file: Annotated[str | None, "held-out text (none: the last tenth of data_file)"] = None
    tokenizer: Annotated[str, "of a text: tinystories, bytes, or one of tiktoken"] = "tinystories"
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
        for name in ("steps", "batch", "seeds", "eval_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}; it must be greater than 0")
        smallest = min(self.seed, self.warmup, self.threads)
        require(smallest >= 0, "seed, warmup and threads must be at least 0")
        has_twin = self.twin or self.model == "dense"
        hint = "compare it with --preset dense"
        require(not (self.preset and has_twin), f"a preset has no dense twin: {hint}")
        named = self.data != "text" or self.data_file is not None
        require(named, "--data text needs --data-file PATH")


def new_settings(given: dict) -> tuple[TrainConfig, MoEConfig]:
    """Settings of a new run: the flags over what the task wants, over the defaults."""
    # What the task wants, and what the flags say.
    if given.get("data_file") and "data" not in given:
        given["data"] = "text"
    task = TASKS[given.get("data", "skills")]
    values = dict(task.settings)
    if given.get("preset"):
        values |= task.preset_sizes
    values |= given
    train = cli.fill(TrainConfig, values)
    sizes = cli.fill(MoEConfig, values)

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
    train = cli.fill(TrainConfig, {**task.settings, **saved["train"], **changes})
    return train, cli.fill(config_class(saved["model"]), saved["model"])


def new_folder(train: TrainConfig, single: bool) -> Path:
    """out/DATA-sSEED, or the next free name; --out names another, which may not hold a run yet."""
    kind = ""
    if train.preset:
        kind = f"-{train.preset}"
    if train.model == "dense":
        kind = "-dense"

    # Without --out: the first name that is free.
    if not train.out:
        name = f"{train.data}{kind}-s{train.seed}"
        folder = Path("out", name)
        number = 1
        while folder.exists():
            number += 1
            folder = Path("out", f"{name}-{number}")
        return folder

    folder = Path(train.out if single else f"{train.out}{kind}-s{train.seed}")
    if (folder / "config.json").exists():
        hint = f"continue it with --resume {folder}, or name another --out"
        raise cli.Usage(f"{folder} holds a run already; {hint}")
    return folder
