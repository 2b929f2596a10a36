"""The settings of a training run: from flags, from the task, or from a run that goes on."""

from pathlib import Path

from data import TASKS
from lab.composing.presets import config_class, preset
from lab.tools import cli, runs
from lab.tools.configs import TrainConfig
from lab.tools.files import new_folder
from moe import MoEConfig

OF_TASKS = {  # flags that only some tasks read
    "data_file": ["text"],
    "valid_file": ["text"],
    "tokenizer": ["text", "tinystories"],
    "n_functions": ["composition"],
    "n_in_a_row": ["composition"],
    "trained": ["composition"],
}
CHANGEABLE = ("resume", "device", "compile", "taste")  # flags that a resumed run may change


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
    data = given.get("data", "skills")
    for name, users in OF_TASKS.items():
        if given.get(name) and data not in users:
            flag = "--" + name.replace("_", "-")
            raise cli.Usage(
                f"{flag} does nothing with --data {data}, but with {' or '.join(users)}"
            )
    task = TASKS[data]
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
