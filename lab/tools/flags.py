"""What can be typed behind each command -> the values of its flags.

A program reads its command line before it imports torch, which takes seconds (`cli.read_first`):
so --help and a wrong flag are answered at once. Nothing here imports torch.

Each function takes the words of a command line, and the text that --help begins with. Usage: they
are wrong.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from lab.tools import cli
from lab.tools.configs import (
    METHOD_NAMES,
    ChoiceConfig,
    CompositionConfig,
    PresetsConfig,
    RehearsalConfig,
    TrainConfig,
    settings_of_file,
)

# The classes of these files as flags need them: the fields with their texts, without torch.
MODEL_SIZES = settings_of_file("moe.py", "MoEConfig")
REMIX_SETTINGS = settings_of_file("remix.py", "RemixConfig")

FLAG_LIMITS = {
    "threads": (1, 1024),
    "tokens": (1, 2**31),
    "temperature": (0, 1e6),
    "seed": (0, 2**62),
    "most": (1, 2**62),
}


def training(argv, text: str) -> dict:
    """train_toy.py: the fields of TrainConfig and MoEConfig that are given."""
    parser = cli.Parser("train_toy.py", usage="%(prog)s [flags]", description=text)
    cli.add_flags(parser, TrainConfig, MODEL_SIZES, skip=("vocab_size",))  # the task decides
    return parser.parse(argv)


# --------------------------------------------------------------------------------------- eval.py


def eval_flags(argv, text: str) -> tuple[str, dict]:
    """eval.py: the name of the command, and its flags."""
    command, *rest = argv or [""]
    if command in ("-h", "--help"):
        print(text)
        raise SystemExit(0)
    if command not in EVAL_COMMANDS:
        found = f"no command is called {command!r}" if command else "expected a command"
        names = ", ".join(EVAL_COMMANDS)
        hint = cli.did_you_mean(command, EVAL_COMMANDS)
        raise cli.Usage(f"{found}{hint} (there are: {names}; --help tells what each does)")
    about, add = EVAL_COMMANDS[command]
    if command == "choice":
        return command, choice(rest, about)
    parser = run_parser(command, about)
    add(parser)
    values = parser.parse(rest)
    for name, (low, high) in FLAG_LIMITS.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            raise cli.Usage(f"--{name} is {value}; expected a number from {low} to {high}")
    if command == "remix":
        require_remix_flags(values)
    return command, values


def run_parser(command: str, text: str) -> cli.Parser:
    """The flags of all commands that open a run."""
    parser = cli.Parser(f"eval.py {command}", usage="%(prog)s [run] [flags]", description=text)
    what = "the run's folder (none: the newest in out/)"
    n_runs = "*" if command == "remix" else "?"
    parser.add_argument("run", nargs=n_runs, type=Path, help=what)
    if command not in ("sample", "playground"):
        options = {"type": cli.name_reader(("dev", "test")), "default": "dev"}
        parser.add_argument("--split", metavar="dev|test", help="held-out part [dev]", **options)
    what = "FILE:CLASS, for a run with routers of your own; runs that file"
    parser.add_argument("--router", help=what)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    return parser


def add_nothing(parser: cli.Parser):
    """No other flags."""


def add_sample_flags(parser: cli.Parser):
    start = "Once upon a time"
    parser.add_argument("--prompt", default=start, help=f"how the text begins [{start}]")
    what = "how many to add at most (none: up to the context)"
    parser.add_argument("--tokens", type=int, help=what)
    what = "0: always the most probable token [0.6]"
    parser.add_argument("--temperature", type=float, default=0.6, help=what)
    parser.add_argument("--seed", type=int, default=0, help="draws the text [0]")


def add_remix_flags(parser: cli.Parser):
    flag = parser.add_argument
    what = f"rows of the table, with commas (none: all): {', '.join(METHOD_NAMES)}"
    reader = cli.name_reader(METHOD_NAMES, "method", several=True)
    flag("--methods", type=reader, metavar="NAME,NAME", default=METHOD_NAMES, help=what)
    flag("--most", type=int, help="prompts of a run (none: all)")
    flag("--strict", action="store_true", help="no neighbour shares an operand with the prompt")
    what = {"metavar": "SPLIT", "help": "the split that references are from [reference]"}
    flag("--references", type=cli.name_reader(("reference", "train")), default="reference", **what)
    flag("--ablate", action="store_true", help="vary one setting of NGD after the other, instead")
    what = "runs of a larger model, not re-mixed"
    flag("--beside", nargs="*", type=Path, default=[], help=what)
    flag("--out", type=Path, help="folder for JSON and figures (none: the first run's)")
    cli.add_flags(parser, REMIX_SETTINGS, skip=("method",))


def require_remix_flags(values: dict):
    """Values of re-mixing that fit together."""
    cli.make_config(REMIX_SETTINGS, values)
    folders, beside = values["run"], values["beside"]
    if values["ablate"] and (beside or values["methods"] is not METHOD_NAMES):
        raise cli.Usage("--methods and --beside do nothing with --ablate, which varies NGD")
    if beside and len(beside) != max(1, len(folders)):
        fault = f"--beside names {len(beside)} runs for {max(1, len(folders))}"
        raise cli.Usage(f"{fault}; expected one for each, of its seed")


def remix_settings(values: dict) -> dict:
    """The fields of RemixConfig that are given."""
    names = {field.name for field in fields(REMIX_SETTINGS)} - {"method"}
    return {name: value for name, value in values.items() if name in names}


def choice(argv, text: str) -> dict:
    """eval.py choice: the fields of ChoiceConfig and RemixConfig that are given."""
    usage = "%(prog)s --model PATH_OR_REPO [flags]"
    parser = cli.Parser("eval.py choice", usage=usage, description=text)
    cli.add_flags(parser, ChoiceConfig)
    cli.add_flags(parser, REMIX_SETTINGS, skip=("method",))
    values = parser.parse(argv)
    cli.make_config(ChoiceConfig, values)
    cli.make_config(REMIX_SETTINGS, remix_settings(values))

    # What would do nothing is a mistake.
    idle = {"shots": ["shots_file"]}
    idle["references"] = ["reference_files", "reference_limit", "method", *remix_settings(values)]
    for needed, names in idle.items():
        for name in names:
            flag = "--" + name.replace("_", "-")
            if name in values and not values.get(needed):
                raise cli.Usage(f"{flag} does nothing without --{needed}")
    return values


EVAL_COMMANDS = {  # name -> what --help begins with, what adds its own flags
    "perplexity": (
        "How well a model predicts a held-out split, all of it: nats, perplexity, bits per byte.",
        add_nothing,
    ),
    "routing": (
        "Which expert does what on a held-out split: load, entropy, the tokens that each takes.",
        add_nothing,
    ),
    "sample": ("Continue a prompt, token by token as they come.", add_sample_flags),
    "cloze": (
        "Choose the last word of held-out stories among four, beside the most frequent last word.",
        add_nothing,
    ),
    "remix": (
        "C3PO: re-mix the experts of a frozen model for each prompt, beside all rivals.",
        add_remix_flags,
    ),
    "robustness": (
        "What a model loses where its routing goes wrong: disabled first choices, and noise.",
        add_nothing,
    ),
    "playground": (
        "A page that runs the model, to move its experts by hand: one file, no network.",
        add_nothing,
    ),
    "sharing": (
        "Which experts of A and B a Cartesian model composes, and how alike they are.",
        add_nothing,
    ),
    "choice": (
        "Multiple choice by log-likelihood on a checkpoint of the hub, and C3PO on it.",
        add_nothing,
    ),
}


def checkpoint(argv, text: str) -> str:
    """hf.py: the folder of a checkpoint, or its repository on the hub."""
    parser = cli.Parser("hf.py", usage="%(prog)s PATH_OR_REPO", description=text)
    what = "a folder, or owner/name or owner/name@revision on the hub"
    parser.add_argument("source", metavar="PATH_OR_REPO", help=what)
    return parser.parse(argv)["source"]


# ---------------------------------------------------------------------------------- python -m lab.


def nothing(argv, text: str):
    """A program without flags."""
    cli.Parser(None, usage=argparse.SUPPRESS, description=text).parse(argv)


def words(argv, text: str) -> list[str]:
    """A program that asks for some words."""
    parser = cli.Parser(None, usage=argparse.SUPPRESS, description=text)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser.parse(argv)["words"]


def knowledge(argv, text: str) -> dict:
    """lab.remixing.knowledge: some runs."""
    usage = "%(prog)s RUN [RUN ...] [flags]"
    parser = cli.Parser("lab.remixing.knowledge", usage=usage, description=text)
    parser.add_argument("run", nargs="+", type=Path, help="folders of runs on the skills task")
    parser.add_argument("--out", type=Path, help="folder for the JSON (none: the first run's)")
    return parser.parse(argv)


def comparison(argv, text: str) -> tuple[str, PresetsConfig]:
    """lab.composing.compare: the sub-command, and its settings."""
    usage = "%(prog)s {train,table} [flags]"
    parser = cli.Parser("lab.composing.compare", usage=usage, description=text)
    parser.add_argument("command", choices=("train", "table"), help="see above")
    cli.add_flags(parser, PresetsConfig)
    values = parser.parse(argv)
    return values.pop("command"), cli.make_config(PresetsConfig, values)


def composition(argv, text: str) -> tuple[str, list[str], CompositionConfig]:
    """lab.composing.composition: the sub-command, groups of runs, and files."""
    usage = "%(prog)s {train,table} [GROUP ...] [flags]"
    parser = cli.Parser("lab.composing.composition", usage=usage, description=text)
    parser.add_argument("command", choices=("train", "table"), help="see above")
    parser.add_argument("groups", nargs="*", help="groups of runs (none: all)")
    cli.add_flags(parser, CompositionConfig)
    values = parser.parse(argv)
    command, groups = values.pop("command"), values.pop("groups")
    return command, groups, cli.make_config(CompositionConfig, values)


def rehearsal(argv, text: str) -> RehearsalConfig:
    """lab.checkpoints.rehearsal."""
    parser = cli.Parser("lab.checkpoints.rehearsal", description=text)
    cli.add_flags(parser, RehearsalConfig)
    return cli.make_config(RehearsalConfig, parser.parse(argv))


def speed(argv, text: str) -> dict:
    """lab.speed: the number of rounds, and where to write."""
    parser = cli.Parser("lab.speed", description=text)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer [5]")
    parser.add_argument("--out", default="results/speed.json", help="where to [%(default)s]")
    values = parser.parse(argv)
    if values["rounds"] < 1:
        raise cli.Usage(f"rounds is {values['rounds']}; it must be at least 1")
    return values


def notebooks(argv, text: str) -> dict:
    """lab.pages.notebooks: the notebooks that are meant."""
    usage = "%(prog)s [NUMBER ...] [--check]"
    parser = cli.Parser("lab.pages.notebooks", usage=usage, description=text)
    parser.add_argument("names", nargs="*", help="how their names begin (none: all)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser.parse(argv)
