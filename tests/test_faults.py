"""Kills, full disks, damage and closed streams: nothing is lost, and what is wrong is told."""

import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import faults
import pytest
import torch

import eval as eval_py
import train_toy
from lab.tools import cli, runs
from lab.tools.files import read_about
from lab.tools.settings import TrainConfig, commands_left


@pytest.mark.full
def test_all_work_survives():
    """The short form of `python -m tests.faults`: one case of each kind, or nearly."""
    _, lost = faults.run_cases(range(0, len(faults.CASES), 2))
    assert not lost


def save(step: int) -> int:
    """Save a tiny run whose norms are all `step`."""
    model = faults.tiny_model()
    torch.nn.init.constant_(model.norm.weight, step)
    settings = {"model": vars(model.config), "train": {"data": "skills", "seed": 0}}
    log = [{"step": step}]
    runs.save_run(
        Path("run"), model, torch.optim.AdamW(model.parameters()), step, settings, log, []
    )
    return 0


def test_killed_at_every_step_of_a_save(tmp_path, monkeypatch):
    """What is opened is the whole last save, or the whole one before; resuming mends the files."""
    monkeypatch.setattr(os, "fsync", lambda number: None)  # it is for a loss of power
    for last_step in range(1, 60):
        folder = tmp_path / str(last_step)
        folder.mkdir()
        monkeypatch.chdir(folder)
        if last_step % 2:  # else it is the first save that is cut off
            save(1)
        code, _ = faults.child(partial(save, 2), partial(faults.kill_at, last_step))
        if Path("run/state.safetensors").exists():
            model, _ = runs.load_run(Path("run"))
            state, about = runs.read_state(Path("run"))
            assert torch.equal(model.norm.weight, state["weight/norm.weight"])
            runs.resume(Path("run"), model, torch.optim.AdamW(model.parameters()))
            assert read_about(Path("run/model.safetensors"))["step"] == about["step"]
            assert f'"step": {about["step"]}' in Path("run/log.jsonl").read_text()
        shutil.rmtree(folder)
        if code == 0:  # the save has fewer steps
            break
    assert code == 0 and last_step > 10


def broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


SIZES = f"{faults.SIZES} --context 32"
STREAMS = {
    "its reader has gone": (broken_pipe, 0),
    "closed": (lambda: None, 0),
    "full": (lambda: open("/dev/full", "w"), 1),  # noqa: SIM115
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", STREAMS)
def test_output_that_cannot_be_written(name, tmp_path, monkeypatch):
    """A run ends well whatever becomes of its standard output; only a full disk is a failure."""
    stream, expected = STREAMS[name]
    monkeypatch.chdir(tmp_path)

    def work():
        sys.stdout = stream()
        return faults.program(train_toy, f"--no-taste --steps 2 --batch 2 {SIZES} --out run")

    code, said = faults.child(work)
    assert code == expected and ("cannot be written" in said) == (name == "full")
    assert runs.read_state(Path("run"))[1]["step"] == "2" and Path("run/scores.json").exists()


def test_commands_are_for_a_shell():
    """What is printed can be pasted, whatever a folder is called."""
    words = ["python", "train_toy.py", "--resume", "it's my run; $HOME"]
    assert shlex.split(cli.command(*words)) == words
    train = TrainConfig(seed=4, seeds=3, twin=True)
    left = commands_left(["--out", "my run"], train, 5, "moe")
    flags = [shlex.split(line)[4:] for line in left]
    assert flags == [
        ["--no-twin", "--model", "dense", "--seed", "5", "--seeds", "1"],
        ["--seed", "6", "--seeds", "1"],
    ]


LARGE = ["--batch", "--d-model", "--n-layers", "--n-experts", "--d-expert", "--d-shared"]


@pytest.mark.parametrize("flag", LARGE)
def test_sizes_that_cannot_fit(flag, train, complaint):
    """What is needed and what is there is told before anything is made."""
    assert train(f"{flag} {2**33}") == 1
    assert "need at least" in complaint() and not Path("out").exists()


@pytest.mark.parametrize("flag", ["--resume", "--out", "--data-file", "--router"])
def test_an_empty_flag_is_no_missing_flag(flag, train, complaint):
    """An empty variable of a shell starts no other run."""
    assert train(f"{flag}=") == 2
    assert "is empty; leave it out" in complaint()


NUMBERS = ["threads 0", "threads 99999999999", "tokens 0", "temperature nan", "seed -1"]


@pytest.mark.parametrize("flag", [*NUMBERS, "temperature -1.0", f"seed {2**64}"])
def test_numbers_that_no_command_can_work_with(flag, call, complaint):
    """They are met before anything is opened."""
    name, value = flag.split()
    assert call(eval_py, f"sample --{name}={value}") == 2
    assert f"--{name} is {value}; expected a number from" in complaint()
