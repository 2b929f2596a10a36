"""Shared by all tests: `pytest` runs what teaches, `pytest --full` everything."""

import os
import subprocess
import sys
from pathlib import Path

# Read when torch is loaded: a thread that waits shall sleep, not spin. Otherwise a test with two
# threads takes a hundred times as long where another program keeps one of two cores busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from matplotlib.figure import Figure

# The repository's files; pytest itself adds only tests/.
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run slow and exhaustive tests")
    parser.addoption("--cases", type=int, default=15, help="of test_faults.py: kills and damages")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="slow or exhaustive: pytest --full")
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one seed, on one thread: small models would wait for the others."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(module, flags) runs a program, in a folder of its own -> the exit code."""
    monkeypatch.chdir(tmp_path)

    def called(module, flags: str = "") -> int:
        from lab.tools import cli

        monkeypatch.setattr(sys, "argv", [module.__name__, *flags.split()])
        with pytest.raises(SystemExit) as stop:
            cli.program(module.main)
        return stop.value.code

    return called


@pytest.fixture
def train(call):
    """train(flags) trains a tiny model for six steps -> the exit code."""
    sizes = "--d-model 16 --n-layers 2 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"
    steps = "--no-taste --steps 6 --batch 8 --eval-every 2"

    def trained(flags: str = "") -> int:
        import train_toy

        return call(train_toy, f"{steps} {sizes} {flags}")

    return trained


@pytest.fixture
def run_program(tmp_path):
    """run_program(path, flags, processes) runs it by itself, or by torchrun -> what is printed."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine's name may lead to

    def ran(path, flags: list[str], processes: int = 1) -> str:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        options = torchrun if processes > 1 else []
        command = [sys.executable, *options, str(path), *flags]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        return run.stdout

    return ran


@pytest.fixture
def complaint(capsys):
    """complaint() is the one line that a program wrote to stderr."""

    def one_line() -> str:
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    return one_line


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of the time of a tiny run: they are made, but not written."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)
