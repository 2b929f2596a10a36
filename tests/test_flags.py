"""Command lines: what they say before torch is imported, and names however they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from by_hand import full

import eval
from data import TASKS
from lab.checkpoints.benchmarks import BENCHMARKS
from lab.composing.presets import PRESETS
from lab.remixing.methods import METHODS
from lab.tools import configs, flags
from remix import SURROGATES, RemixConfig

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "matplotlib", "scipy", "tiktoken")


def programs() -> list[str]:
    """Every program, as Python is told to run it."""
    found = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py")]):
        if "cli.program(main)" in path.read_text(encoding="utf-8"):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            found.append(
                f"{name}.py" if "." not in name else "-m " + name.removesuffix(".__main__")
            )
    return found


def commands() -> list[str]:
    """Every program, and every command of eval.py."""
    return [*programs(), *(f"eval.py {name}" for name in flags.EVAL_COMMANDS)]


@pytest.fixture
def run_without(tmp_path):
    """run_without(command) runs it where importing torch and the like fails."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is imported')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths}

    def ran(command: str):
        words = [sys.executable, *command.split()]
        return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)

    return ran


@pytest.mark.parametrize("command", ["train_toy.py", *full(*commands())])
def test_help_and_errors_do_not_wait_for_torch(command, run_without):
    """--help, and a flag that does not exist, are answered before anything heavy is imported."""
    given = run_without(f"{command} --help")
    assert given.returncode == 0 and given.stderr == ""
    assert len(given.stdout) > 100
    given = run_without(f"{command} --hepl")
    assert given.returncode == 2 and given.stdout == ""
    assert given.stderr.count("\n") == 1 and "--help" in given.stderr


WRONG = {  # command -> what is said
    "train_toy.py --stpes 3": "did you mean --steps?",
    "train_toy.py --preset cartesien": "did you mean cartesian?",
    "train_toy.py --steps many": "many",
    "eval.py rmix": "did you mean remix?",
    "eval.py remix --k -1": "k is -1; it must be at least 1",
    "eval.py remix --kernel gausian": "did you mean gaussian?",
    "eval.py remix --methods NDG": "unknown method 'NDG'; did you mean NGD? (there are: mode",
    "eval.py remix --ablate --methods NGD": "do nothing with --ablate",
    "eval.py sample --temperature -1": "--temperature is -1.0",
    "eval.py choice": "--model is missing",
    "eval.py choice --model x --method NDG": "did you mean ngd?",
    "hf.py": "PATH_OR_REPO",
    "-m lab.composing.compare train --presets cartesien": "did you mean cartesian?",
    "-m lab.remixing.knowledge": "run",
}


@pytest.mark.parametrize("command", [*list(WRONG)[:2], *full(*list(WRONG)[2:])])
def test_wrong_values_do_not_wait_either(command, run_without):
    """What is wrong in itself is told in one line, with exit code 2."""
    given = run_without(command)
    assert given.returncode == 2 and WRONG[command] in given.stderr
    assert given.stderr.count("\n") == 1 and "Traceback" not in given.stderr


def test_names_are_those_that_exist():
    """configs.py has the names that stand in tables of files that import torch."""
    assert {*flags.EVAL_COMMANDS} == {*eval.COMMANDS}
    assert tuple(TASKS) == configs.TASK_NAMES
    assert tuple(PRESETS) == configs.PRESET_NAMES
    assert tuple(SURROGATES) == configs.SURROGATE_NAMES
    assert tuple(METHODS) == configs.METHOD_NAMES
    assert tuple(BENCHMARKS) == configs.BENCHMARK_NAMES
    assert len(commands()) > 20


@pytest.mark.parametrize("name", ["mode_finding", "Mode-Finding", "mode finding", "MODEFINDING"])
def test_a_name_may_be_written_in_several_ways(name):
    """Case, blanks, hyphens and underscores make no difference, in Python and in flags."""
    assert configs.one_of("method", name, ("NGD", "mode finding")) == "mode finding"
    _, values = flags.eval_flags(["remix", f"--methods={name},roma", "--kernel=Gaussian"], "")
    assert (values["methods"], values["kernel"]) == (["mode finding", "RoMA"], "gaussian")
    assert RemixConfig(method=name).method == "mode_finding"
