"""The main job: what a run leaves behind, that nothing is lost, and that mistakes are told."""

import errno
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_toy
from data import Kinds, SkillsTask, Task
from lab.composing.presets import PRESETS
from lab.scores.evaluation import final_scores
from lab.scores.specialisation import specialisation
from lab.tools import cli, files, runs
from lab.tools.files import read_tensors, write_tensors
from lab.tools.settings import new_settings
from moe import MoEConfig, MoETransformer
from train_toy import TrainConfig

SMALL = (
    "--no-taste --steps 6 --batch 8 --eval-every 2 "
    "--d-model 16 --n-layers 2 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(line: str) -> int:
    """train_toy.py with these flags, as a program -> its exit code."""
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_toy.py", *line.split()])
        cli.program(train_toy.main)
    return stop.value.code


def read_log(path: str) -> list[dict]:
    """The lines of a run's log, without the time that it took."""
    lines = [json.loads(line) for line in Path(path, "log.jsonl").read_text().splitlines()]
    return [{**line, "seconds": None} for line in lines]


def test_a_run_leaves_everything(folder, capsys):
    """A run ends by itself with a table; its folder holds weights, settings, log and figures."""
    assert call(SMALL) == 0
    text = capsys.readouterr().out
    run = folder / "out/skills-s0"
    files = {"model.safetensors", "config.json", "state.safetensors", "log.jsonl", "scores.json"}
    assert {path.name for path in run.glob("[!.]*")} == files | {"loss.png", "routing.png"}
    for words in ("cross-entropy", "clear cues", "balance", "load, layer 1", "activated"):
        assert words in text
    log = read_log(run)
    assert [line["step"] for line in log] == [0, 2, 4, 6]

    # The weights are the last ones.
    model, _ = runs.load(run)
    prompts = SkillsTask(0).prompts("dev")
    right = model(prompts.tokens).logits[:, -1].argmax(-1) == prompts.labels
    assert right.float().mean() == pytest.approx(log[-1]["dev"]["accuracy"])

    # A second run never overwrites the first.
    assert call(SMALL) == 0
    assert (folder / "out/skills-s0-2").is_dir()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        pytest.param("--dropout 0.2 --dtype bfloat16 --threads 2", marks=pytest.mark.full),
        pytest.param("--preset top_p --d-expert 64 --threads 2", marks=pytest.mark.full),
    ],
    ids=["moe", "dropout and bfloat16", "top-p"],
)
def test_resume_equals_uninterrupted(monkeypatch, capsys, flags):
    """Stopped by Ctrl-C between two evaluations and continued, a run ends as if nothing had
    happened, bit by bit."""
    flags = f"{SMALL} {flags}"
    assert call(f"{flags} --out whole") == 0
    update = train_toy.update

    def interrupted(*args):
        if args[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_toy, "update", interrupted)
        assert call(f"{flags} --out parts") == 130
    assert "python train_toy.py --resume parts" in capsys.readouterr().out
    assert read_tensors(Path("parts/state.safetensors"))[1]["step"] == "3"
    assert call("--resume parts") == 0
    for name in ("model.safetensors", "state.safetensors"):
        whole, parts = load_file(f"whole/{name}"), load_file(f"parts/{name}")
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert read_log("whole") == read_log("parts")


def test_nan_keeps_the_last_good_checkpoint(monkeypatch, capsys):
    """A loss that is no longer finite stops the run, and leaves the weights saved before."""
    update = train_toy.update

    def broken(forward, model, *args):
        if args[-1] == 4:
            model.embedding.weight.data.fill_(float("nan"))
        return update(forward, model, *args)

    monkeypatch.setattr(train_toy, "update", broken)
    assert call(f"{SMALL} --out run") == 1
    error = capsys.readouterr().err
    assert re.search(r"no longer finite at step 5: run keeps .* lower --lr", error)
    tensors, meta = read_tensors(Path("run/state.safetensors"))
    assert meta["step"] == "4"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_full_disk_loses_nothing(monkeypatch, capsys, folder):
    """Where the disk is full while saving, older files stay whole, and the run can go on."""
    saves, fsync = [], os.fsync

    def full(number):
        saves.append(number)
        if len(saves) > 6:  # in the middle of the second save of four files
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert call(f"{SMALL} --out run") == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "run/log.jsonl: No space left" in error
    assert not list(folder.rglob("*.tmp"))
    steps = {}
    for name in ("state", "model"):
        steps[name] = read_tensors(Path(f"run/{name}.safetensors"))[1]["step"]
    assert steps == {"state": "2", "model": "0"}
    assert call("--resume run") == 0


@pytest.mark.full
def test_seeds_and_twins(capsys):
    """--seeds runs several in a row, --twin the dense twin of each, and compares them in pairs."""
    assert call(f"{SMALL} --twin --seeds 2 --seed 4 --out pair") == 0
    text = capsys.readouterr().out
    loss = {}
    for name in ("pair-s4", "pair-s5", "pair-dense-s4", "pair-dense-s5"):
        model, train = runs.load(Path(name))
        loss[name] = final_scores(model, SkillsTask(train["seed"]))["test"]["loss"]
    first, second = loss["pair-s4"], loss["pair-s5"]
    assert "95 % interval" in text and "seeds 4 to 5" in text
    assert re.search(rf"cross-entropy \(nats\) +{(first + second) / 2:.3f}", text)
    first -= loss["pair-dense-s4"]
    second -= loss["pair-dense-s5"]
    assert "moe - dense" in text and f"{first:.3f}  {second:.3f}" in text


def test_dense_twin(capsys):
    """--model dense activates as many parameters as the MoE, to 1 %, and has no router."""
    moe = MoETransformer(MoEConfig(vocab_size=47))
    dense, _ = train_toy.start(TrainConfig(model="dense"), MoEConfig(), SkillsTask())
    assert dense.n_params() == pytest.approx(moe.n_params(activated=True), rel=0.01)
    assert not dense.routers()
    assert call(f"{SMALL} --model dense") == 0
    assert "all dense" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize(("name", "guess"), [("tinystories", "7.62"), ("bytes", "5.55")])
def test_text(folder, capsys, name, guess):
    """A text of one's own trains with our tokenizer or with bytes, and ends with three samples."""
    story = "Once upon a time there was a fox and {} cubs.\n<|endoftext|>\n"
    stories = "".join(story.format(number) for number in range(200))
    (folder / "tale.txt").write_text(stories, encoding="utf-8")
    assert call(f"{SMALL} --data-file tale.txt --context 16 --tokenizer {name}") == 0
    text = capsys.readouterr().out
    assert "perplexity per token" in text and "three samples" in text
    assert f"uniform guess: {guess}" in text  # the logarithm of the vocabulary


ROUTER = """
from moe import Router, wide
import torch.nn.functional as F

print("imported")

class Sigmoid(Router):
    def scores(self, x):
        logits = wide(F.linear(x, self.weight))
        return logits, logits.sigmoid()
"""


def test_a_router_of_your_own(folder, capsys):
    """--router trains a class of the user's file; opening the run never imports it by itself."""
    (folder / "own_rule.py").write_text(ROUTER)
    assert call(f"{SMALL} --router own_rule:Sigmoid --out run") == 0
    text = capsys.readouterr().out
    assert "imported" in text and "own_rule:Sigmoid" in text
    sys.modules.pop("own_rule")
    assert call("--resume run") == 1
    output = capsys.readouterr()
    assert "imported" not in output.out and "--router own_rule:Sigmoid" in output.err
    with pytest.raises(ValueError, match="--router own_rule:Sigmoid"):
        runs.load(Path("run"))
    assert call("--resume run --router own_rule:Sigmoid") == 0
    model, _ = runs.load(Path("run"), runs.router_class("own_rule:Sigmoid"))
    out = model(torch.arange(8)[None])
    assert torch.equal(out.routing[0].probs, out.routing[0].logits.sigmoid())


class Largest(Task):
    """A task of one's own: after each of twelve digits, say the largest so far."""

    name, vocab_size = "largest", 10

    def batch(self, step, n):
        tokens = torch.randint(10, (n, 12), generator=torch.Generator().manual_seed(step))
        return tokens, tokens.cummax(1).values

    def kinds(self, split, n_kinds=12, most=256):
        tokens, _ = self.batch(10**6, 32)
        return Kinds(tokens, tokens, [str(digit) for digit in range(10)])


def test_a_task_of_your_own():
    """A class of ten lines is enough to train, and to see which expert does what."""
    task, train = Largest(), TrainConfig(batch=32, lr=1e-2, warmup=5, steps=40)
    model, optimizer = train_toy.start(train, MoEConfig(n_layers=1, d_model=32), task)
    losses = []
    for step in range(train.steps):
        losses.append(train_toy.update(model, model, optimizer, task, train, step))
    assert losses[0] == pytest.approx(2.3, abs=0.1) and losses[-1] < 1.5  # from ln 10
    special = specialisation(model, task)
    assert special.shares.shape == (1, 10, 16) and special.kinds[9] == "9"
    assert special.load.sum() == pytest.approx(4)  # experts that a token visits


def test_presets_on_the_skills_task():
    """With default flags a preset has the size of the default model, or else the error names flags
    with which all presets fit."""
    default = MoETransformer(MoEConfig())
    _, sizes = new_settings({"preset": "cartesian"})
    model, _ = train_toy.start(TrainConfig(preset="cartesian"), sizes, SkillsTask())
    assert model.n_params() == pytest.approx(default.n_params(), rel=0.01)
    with pytest.raises(cli.Usage, match="every preset fits") as error:
        new_settings({"preset": "hash"})
    words = str(error.value).partition("fits ")[2].split()
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    flags = dict(zip(names, map(int, words[1::2]), strict=True))
    for name in PRESETS:
        new_settings({"preset": name, **flags})


WRONG = {
    "flag": ("--step 5", 2, "unknown flag --step; did you mean --steps?"),
    "choice": ("--data skils", 2, "'skils' is not one of skills, tinystories, text; did you mean"),
    "negative": ("--steps 0", 2, "steps is 0; it must be at least 1"),
    "heads": ("--d-model 30 --n-heads 4", 2, "d_model 30 does not divide into 4 heads: try 32"),
    "experts": ("--top-k 20", 2, "top_k 20 is more than the 16 experts"),
    "no gradient": ("--top-k 1 --norm-topk", 2, "the router gets no gradient; use"),
    "twin of a preset": ("--preset cartesian --twin", 2, "a preset has no dense twin"),
    "sizes": ("--preset hash --d-model 16", 2, "fine_grained at n_experts 15, d_expert 64"),
    "no text": ("--data text", 2, "needs --data-file"),
    "missing router": ("--router nowhere:Mine", 1, "nowhere cannot be imported"),
}


@pytest.mark.parametrize(("line", "code", "message"), WRONG.values(), ids=WRONG)
def test_wrong_usage(capsys, line, code, message):
    """A mistake is told in one line; the exit code is 2 for usage, 1 for failure."""
    assert call(line) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_absent_device(capsys):
    """A device that is not there is refused, with those that are."""
    assert call("--device cuda") == 1
    assert "--device cuda: this machine (or this build" in capsys.readouterr().err


@pytest.mark.full
def test_resume_with_other_flags(capsys):
    """A run is resumed with its own settings only; each flag that differs is named."""
    assert call(f"{SMALL} --out run") == 0
    assert call("--out run") == 2
    assert "run holds a run already" in capsys.readouterr().err
    assert call("--resume run --lr 0.5 --batch 8 --top-k 1") == 2
    error = capsys.readouterr().err
    assert "--lr 0.5 (the run has 0.003)" in error and "--top-k 1 (the run has 2)" in error
    assert "batch" not in error


def spoil_state():
    """Drop one tensor of a run's state."""
    path = Path("run/state.safetensors")
    tensors, about = read_tensors(path)
    del tensors["weight/norm.weight"]
    write_tensors(path, tensors, about)


@pytest.mark.full
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_state, "does not fit the model: norm.weight: missing, expected (16,)"),
        (
            lambda: Path("run/state.safetensors").write_bytes(b"cut"),
            "is no readable",
        ),
    ],
    ids=["a missing tensor", "cut off"],
)
def test_resume_from_spoilt_files(capsys, spoil, message):
    """What is wrong with a run's files is told in one line."""
    assert call(f"{SMALL} --steps 1 --out run") == 0
    spoil()
    assert call("--resume run") == 1
    assert message in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    """--help lists each field of both dataclasses, with its default."""
    assert call("--help") == 0
    text = capsys.readouterr().out
    for name in vars(TrainConfig()) | vars(MoEConfig()):
        assert name == "vocab_size" or f"--{name.replace('_', '-')}" in text
    assert "[0.003]" in text
