"""The main job: what a run leaves behind, that nothing is lost, and that mistakes are told."""

import json
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from by_hand import close, full, refused
from safetensors.torch import load_file

import train_toy
from data import Kinds, SkillsTask, Task
from lab.composing.presets import PRESETS
from lab.scores.evaluation import final_scores
from lab.scores.specialisation import specialisation
from lab.tools import cli, runs
from lab.tools.files import read_tensors
from lab.tools.settings import new_settings
from moe import MoEConfig, MoETransformer, Router
from train_toy import TrainConfig


def read_log(path: str) -> list[dict]:
    """The lines of a run's log, without the time that it took."""
    lines = [json.loads(line) for line in Path(path, "log.jsonl").read_text().splitlines()]
    return [{**line, "seconds": None} for line in lines]


def test_a_run_leaves_everything(train, capsys):
    """A run ends by itself with a table; its folder holds weights, settings, log and figures."""
    assert train() == 0
    text = capsys.readouterr().out
    for words in ("cross-entropy", "clear cues", "balance", "load, layer 1", "activated"):
        assert words in text
    run = Path("out/skills-s0")
    names = {"model.safetensors", "config.json", "state.safetensors", "log.jsonl", "scores.json"}
    assert {path.name for path in run.glob("[!.]*")} == names | {"loss.png", "routing.png"}
    log = read_log(run)
    assert [line["step"] for line in log] == [0, 2, 4, 6]

    # The weights are the last ones.
    model, _ = runs.load_run(run)
    prompts = SkillsTask(0).prompts("dev")
    right = model(prompts.tokens).logits[:, -1].argmax(-1) == prompts.labels
    assert right.float().mean() == pytest.approx(log[-1]["dev"]["accuracy"])


def test_a_run_is_never_overwritten(train, call, complaint, undrawn):
    """A second one gets a folder of its own; one that was asked for by name is refused.

    A run is resumed with its own settings only; each flag that differs is named.
    """
    assert train("--steps 1") == train("--steps 1") == 0
    assert Path("out/skills-s0-2/model.safetensors").exists()
    assert train("--out out/skills-s0") == 2
    assert "skills-s0 holds a run already" in complaint()
    assert call(train_toy, "--resume out/skills-s0 --lr 0.5 --batch 8 --top-k 1") == 2
    error = complaint()
    assert "--lr 0.5 (the run has 0.003)" in error and "--top-k 1 (the run has 2)" in error
    assert "batch" not in error


FLAGS = {
    "moe": "",
    "dropout and bfloat16": "--dropout 0.2 --dtype bfloat16 --threads 2",
    "top-p": "--preset top_p --d-expert 64 --threads 2",
}


@pytest.mark.parametrize("flags", ["moe", *full("dropout and bfloat16", "top-p")])
def test_resume_equals_uninterrupted(flags, train, call, monkeypatch, capsys, undrawn):
    """Stopped by Ctrl-C between two evaluations and continued: the same run, bit by bit."""
    assert train(f"{FLAGS[flags]} --out whole") == 0
    update = train_toy.update

    def interrupted(*args):
        if args[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_toy, "update", interrupted)
        assert train(f"{FLAGS[flags]} --out parts") == 130
    assert "python train_toy.py --resume parts" in capsys.readouterr().out
    assert read_tensors(Path("parts/state.safetensors"))[1]["step"] == "3"
    assert call(train_toy, "--resume parts") == 0
    for name in ("model.safetensors", "state.safetensors"):
        whole, parts = load_file(f"whole/{name}"), load_file(f"parts/{name}")
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert read_log("whole") == read_log("parts")


def test_nan_keeps_the_last_good_checkpoint(train, monkeypatch, complaint):
    """A loss that is no longer finite stops the run, and leaves the weights saved before."""
    update, norms = train_toy.update, []

    def broken(forward, model, *args):
        if args[-1] == 4:
            model.embedding.weight.data.fill_(float("nan"))
            norms.extend((model.norm.weight, model.norm.weight.clone()))
        return update(forward, model, *args)

    monkeypatch.setattr(train_toy, "update", broken)
    assert train("--out run") == 1
    assert "no longer finite at step 5: run keeps" in complaint()
    assert torch.equal(*norms)
    tensors, meta = read_tensors(Path("run/state.safetensors"))
    assert meta["step"] == "4"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.full
def test_seeds_and_twins(train, capsys, undrawn):
    """--seeds runs several in a row, --twin the dense twin of each, and compares them in pairs."""
    assert train("--twin --seeds 2 --seed 4 --out pair") == 0
    text = capsys.readouterr().out
    loss = {}
    for name in ("pair-s4", "pair-s5", "pair-dense-s4", "pair-dense-s5"):
        model, train = runs.load_run(Path(name))
        loss[name] = final_scores(model, SkillsTask(train["seed"]))["test"]["loss"]
    first, second = loss["pair-s4"], loss["pair-s5"]
    assert "95 % interval" in text and "seeds 4 to 5" in text
    assert f"{(first + second) / 2:.3f}" in text.split("95 % interval")[1]
    first -= loss["pair-dense-s4"]
    second -= loss["pair-dense-s5"]
    assert "moe - dense" in text and f"{first:.3f}  {second:.3f}" in text


def test_dense_twin():
    """--model dense activates as many parameters as the MoE, to 1 %, and has no router."""
    moe = MoETransformer(MoEConfig(vocab_size=47))
    dense, _ = train_toy.start(TrainConfig(model="dense"), MoEConfig(), SkillsTask())
    assert dense.n_params() == pytest.approx(moe.n_params(activated=True), rel=0.01)
    assert not dense.routers()


GUESSES = {"tinystories": "7.62", "bytes": "5.55"}  # the logarithm of the vocabulary


@pytest.mark.parametrize("name", full(*GUESSES))
def test_text(name, train, tmp_path, capsys, undrawn):
    """A text of one's own trains with our tokenizer or with bytes, and ends with three samples."""
    stories = [f"Once there was a fox and {i} cubs.\n<|endoftext|>\n" for i in range(200)]
    (tmp_path / "tale.txt").write_text("".join(stories), encoding="utf-8")
    assert train(f"--data-file tale.txt --context 16 --tokenizer {name}") == 0
    text = capsys.readouterr().out
    assert "perplexity per token" in text and "three samples" in text
    assert f"uniform guess: {GUESSES[name]}" in text


@pytest.fixture
def own_rule(call):
    """A user's file with a router, own_rule.py, in the current folder."""
    path = Path("own_rule.py")
    path.write_text("from by_hand import SigmoidRouter, tiny\nclass Mine(SigmoidRouter): pass\n")
    yield path
    sys.modules.pop("own_rule", None)


def test_a_router_of_your_own(own_rule, train, call, complaint, capsys, undrawn):
    """--router trains a class of the user's file; opening the run never imports it by itself."""
    flag = "--router own_rule:Mine"
    assert train(f"{flag} --out run") == 0
    sys.modules.pop("own_rule")
    assert call(train_toy, "--resume run") == 1
    assert flag in complaint()
    with refused(flag):
        runs.load_run(Path("run"))
    assert "own_rule" not in sys.modules
    assert call(train_toy, f"--resume run {flag}") == 0
    model, _ = runs.load_run(Path("run"), runs.router_class("own_rule:Mine"))
    routing = model(torch.arange(8)[None]).routing[0]
    scores = routing.logits.sigmoid()
    torch.testing.assert_close(routing.probs, scores / scores.sum(-1, keepdim=True))
    assert "changed" not in capsys.readouterr().err

    # The run knows the file: a changed one is told.
    own_rule.write_text(f"{own_rule.read_text()}# another\n")
    runs.load_run(Path("run"), runs.router_class("own_rule:Mine"))
    assert "the file of own_rule:Mine has changed since run was trained" in capsys.readouterr().err

    # A run without a router of its own takes none.
    settings = runs.read_settings(Path("run"))
    settings["train"].pop("router")
    runs.save_run(Path("run"), model, torch.optim.AdamW(model.parameters()), 0, settings, [], [])
    with refused("trained with the router of moe.py; leave --router out"):
        runs.load_run(Path("run"), Router)


WRONG = {
    "own_rule": "expected FILE:CLASS",
    "nowhere:Sigmoid": "nowhere cannot be imported: No module named 'nowhere'",
    "own_rule:Min": "has no Min; did you mean Mine?",
    "own_rule:tiny": "tiny is no subclass of moe.Router",
}


@pytest.mark.parametrize("name", full(*WRONG))
def test_wrong_routers(name, own_rule):
    """A router that cannot be had is refused."""
    with refused(WRONG[name]):
        runs.router_class(name)


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
        new_settings({"preset": "smoe_top3"})
    words = str(error.value).partition("fits ")[2].split()
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    flags = dict(zip(names, map(int, words[1::2]), strict=True))
    for name in PRESETS:
        new_settings({"preset": name, **flags})


@pytest.mark.full
def test_help_names_every_flag(call, capsys):
    """--help lists each field of both dataclasses, with its default."""
    assert call(train_toy, "--help") == 0
    text = capsys.readouterr().out
    for name in vars(TrainConfig()) | vars(MoEConfig()):
        assert name == "vocab_size" or f"--{name.replace('_', '-')}" in text
    assert "[0.003]" in text


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_in_one_piece(dtype, monkeypatch):
    """torch.compile finds one graph and no cause to warn: same losses, gradients and checks."""
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", whole)
    task = SkillsTask(0)
    train, sizes = new_settings({"dtype": dtype, "n_layers": 2, "steps": 2})
    tokens, targets = task.batch(0, train.batch)
    results = []
    for compiled in (False, True):
        train.compile = compiled
        model, _ = train_toy.start(train, sizes, task)
        forward = train_toy.make_forward(model, train)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = forward(tokens, targets)
            (out.loss + out.balance_loss + out.z_loss).backward()
        gradients = [weight.grad for weight in model.parameters()]
        results.append([out.loss.detach(), out.balance_loss.detach(), *gradients])
    close(*results, 1e-6 if dtype == "float32" else 1e-2)
    with refused("the vocabulary goes from 0 to"):
        forward(tokens + 99, targets)


@pytest.mark.full
def test_two_processes(run_program, tmp_path, monkeypatch):
    """Two processes with a half of every batch: one run, the losses of a single process.

    Where one ends the other one does, too, and says so; a single process goes on with their run.
    """
    monkeypatch.chdir(tmp_path)
    program = Path(__file__).with_name("train_that_ends.py")
    sizes = "--d-model 16 --n-layers 2 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"
    settings = f"{sizes} --no-taste --steps 6 --batch 7 --eval-every 2 --balance 1 --z 0.1"

    def losses(folder):
        lines = read_log(folder)
        return torch.tensor([[line["train_loss"] or 0, line["dev"]["loss"]] for line in lines])

    run_program(program, [*settings.split(), "--out", "alone"])
    printed = run_program(program, [*settings.split(), "--out", "two"], 2)
    assert printed.count("wrote ") == 1
    assert {path.name for path in Path("two").iterdir()} == {
        path.name for path in Path("alone").iterdir()
    }
    close(losses("two"), losses("alone"), 1e-5)

    # One of them ends.
    Path("end").touch()
    with pytest.raises(AssertionError, match="another process has ended"):
        run_program(program, [*settings.split(), "--out", "cut"], 2)
    assert [line["step"] for line in read_log("cut")] == [0, 2]
    run_program(program, ["--resume", "cut", "--no-taste"])
    close(losses("cut"), losses("alone"), 1e-5)
