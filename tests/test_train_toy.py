"""The main job: what a run leaves behind, that nothing is lost, and that mistakes are told in one line."""

import errno
import json
import os
import re
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_toy
from data import SkillsTask
from lab import checkpoint, cli
from moe import MoEConfig, MoETransformer

SMALL = "--no-remix --steps 6 --batch 8 --eval-every 2 "
SMALL += "--d-model 16 --n-layers 2 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def call(line):
    """train_toy.py with these flags, as a program -> its exit code."""
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_toy.py", *line.split()])
        cli.run(train_toy.main)
    return stop.value.code


def test_a_run_leaves_everything(tmp_path, capsys):
    """A run ends by itself with a table; its folder holds the weights, the settings, the state, the log and figures."""
    assert call(SMALL) == 0
    folder, text = tmp_path / "out/skills-s0", capsys.readouterr().out
    files = {"model.safetensors", "config.json", "state.safetensors", "log.jsonl", "loss.png", "routing.png"}
    assert {path.name for path in folder.iterdir()} == files | {"scores.json"}
    for word in ("cross-entropy", "clear cues", "ambiguous cues", "balance", "load, layer 1", "activated", "a second"):
        assert word in text
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 2, 4, 6] and {"loss", "accuracy"} <= log[-1]["dev"].keys()
    model = MoETransformer(MoEConfig(**checkpoint.read_settings(folder)["model"]))
    checkpoint.load_weights(model, checkpoint.read(folder / "model.safetensors")[0], folder)
    prompts = SkillsTask(0).prompts("dev")
    right = model(prompts.tokens).logits[:, -1].argmax(-1) == prompts.labels
    assert right.float().mean().item() == pytest.approx(log[-1]["dev"]["accuracy"])  # the weights are the last ones
    assert call(SMALL) == 0 and (tmp_path / "out/skills-s0-2").is_dir()  # a second run never overwrites the first


def interrupt_at(monkeypatch, step):
    """Press Ctrl-C in the middle of this step."""
    update = train_toy.update

    def pressed(*args):
        if args[-1] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(train_toy, "update", pressed)


@pytest.mark.parametrize("flags", ["", "--dropout 0.2 --dtype bfloat16", "--preset top_p --d-expert 64"])
def test_resume_equals_uninterrupted(monkeypatch, capsys, tmp_path, flags):
    """Stopped by Ctrl-C between two evaluations and continued, a run ends as if nothing had happened: bit by bit, at 2
    threads, in weights, optimiser state and log."""
    flags += " --threads 2"
    assert call(f"{SMALL} {flags} --out whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert call(f"{SMALL} {flags} --out parts") == 130
    assert "python train_toy.py --resume parts" in capsys.readouterr().out
    assert load_file("parts/state.safetensors").keys() == load_file("whole/state.safetensors").keys()
    assert checkpoint.read(tmp_path / "parts/state.safetensors")[1]["step"] == "3"
    assert call("--resume parts") == 0
    for name in ("model.safetensors", "state.safetensors"):
        whole, parts = load_file(f"whole/{name}"), load_file(f"parts/{name}")
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines()) for run in ("whole", "parts")]
    whole, parts = ([{**line, "seconds": None} for line in log] for log in logs)
    assert whole == parts


def test_nan_keeps_the_last_good_checkpoint(monkeypatch, capsys, tmp_path):
    """A loss that is no longer finite stops the run, names the step, and leaves the weights saved before."""

    update = train_toy.update

    def broken(forward, model, *args):
        if args[-1] == 4:
            model.embedding.weight.data.fill_(float("nan"))
        return update(forward, model, *args)

    monkeypatch.setattr(train_toy, "update", broken)
    assert call(f"{SMALL} --out run") == 1
    assert re.search(r"no longer finite at step 5: run keeps .* lower --lr", capsys.readouterr().err)
    tensors, meta = checkpoint.read(tmp_path / "run/state.safetensors")
    assert meta["step"] == "4" and all(tensor.isfinite().all() for tensor in tensors.values())


def test_no_space_loses_nothing(monkeypatch, capsys, tmp_path):
    """Where the disk is full while saving, the older files stay whole, and no half-written one is left."""
    saves = []
    fsync = os.fsync

    def full(number):
        saves.append(number)
        if len(saves) > 6:  # in the middle of the second save of four files
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    assert call(f"{SMALL} --out run") == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "No space left on device" in line and "run/model.safetensors" in line
    assert not list(tmp_path.rglob("*.tmp"))
    assert checkpoint.read(tmp_path / "run/state.safetensors")[1]["step"] == "2"  # written before the disk was full
    assert checkpoint.read(tmp_path / "run/model.safetensors")[1]["step"] == "0"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert call("--resume run") == 0  # with space again, the run goes on from the newest state


def test_several_seeds(capsys):
    """--seeds runs several in a row, and tells mean, spread and interval."""
    assert call(f"{SMALL} --seeds 2 --seed 4 --out many") == 0
    text = capsys.readouterr().out
    assert "95 % interval" in text and "seeds 4 to 5" in text
    accuracies = []
    for seed in (4, 5):
        model = MoETransformer(MoEConfig(**checkpoint.read_settings(checkpoint.Path(f"many-s{seed}"))["model"]))
        checkpoint.load_weights(model, load_file(f"many-s{seed}/model.safetensors"), "")
        accuracies.append(train_toy.evaluate(model, SkillsTask(seed), "test")["accuracy"])
    assert re.search(rf"accuracy\s+{sum(accuracies) / 2:.1%}\s", text)


def test_dense_twin(capsys):
    """--model dense activates as many parameters as the MoE, to 1 %, and has no router."""
    sizes = MoEConfig(vocab_size=47)
    moe, dense = MoETransformer(sizes), MoETransformer(MoEConfig(vocab_size=47, dense_layers=(0, 1, 2, 3)))
    assert dense.n_params() == pytest.approx(moe.n_params(activated=True), rel=0.01)
    assert call(f"{SMALL} --model dense") == 0
    assert "all dense" in capsys.readouterr().out


def test_text(tmp_path, capsys):
    """A text file of one's own trains with our tokenizer, or with bytes for tokens, and ends with three samples."""
    (tmp_path / "tale.txt").write_text("Once upon a time there was a fox.\n<|endoftext|>\n" * 200, encoding="utf-8")
    assert call(f"{SMALL} --data-file tale.txt --context 16") == 0
    text = capsys.readouterr().out
    assert "perplexity per token" in text and "uniform guess: 7.62" in text and "three samples" in text  # ln 2048
    assert call(f"{SMALL} --data-file tale.txt --context 16 --tokenizer bytes") == 0
    assert "uniform guess: 5.55" in capsys.readouterr().out  # ln 257


def test_twins(capsys):
    """--twin trains the dense twin of every seed as well, and gives the differences pair by pair."""
    assert call(f"{SMALL} --twin --seeds 2 --out pair") == 0
    text, runs = capsys.readouterr().out, ("pair-s0", "pair-s1", "pair-dense-s0", "pair-dense-s1")
    last = [checkpoint.load(checkpoint.Path(run))[0] for run in runs]
    loss = [train_toy.final_scores(model, SkillsTask(i % 2))["test"]["loss"] for i, model in enumerate(last)]
    assert "moe - dense" in text and f"{loss[0] - loss[2]:.3f}  {loss[1] - loss[3]:.3f}" in text


WRONG = {
    "flag": ("--step 5", 2, "unknown flag --step; did you mean --steps?"),
    "word": ("skills", 2, "unknown argument skills"),
    "choice": ("--data skils", 2, "'skils' is not one of skills, tinystories, text; did you mean skills?"),
    "number": ("--steps many", 2, "--steps: invalid int value: 'many'"),
    "negative": ("--steps 0", 2, "steps is 0; it must be at least 1"),
    "heads": ("--d-model 30 --n-heads 4", 2, "d_model 30 does not divide into 4 heads: try 32, or give head_dim"),
    "experts": ("--top-k 20", 2, "top_k 20 is more than the 16 experts"),
    "router": ("--top-k 1 --norm-topk", 2, "the router gets no gradient; use"),
    "preset": ("--preset cartesain", 2, "'cartesain' is not one of dense, dense_two"),
    "twin of a preset": ("--preset cartesian --twin", 2, "a preset has no dense twin"),
    "sizes": ("--preset hash --d-model 16", 2, "hash cannot match fine_grained's size at n_experts 15, d_expert 64"),
    "text": ("--data text", 2, "needs --data-file"),
    "missing": ("--data-file nowhere.txt", 1, "no such text file: nowhere.txt"),
    "resume": ("--resume nowhere", 1, "nowhere holds no run"),
    "lr": ("--lr -1", 2, "lr is -1.0; it must be greater than 0"),
}


@pytest.mark.parametrize(("line", "code", "message"), WRONG.values(), ids=WRONG)
def test_wrong_usage(capsys, line, code, message):
    """A mistake is told in one line: what was wrong, what was expected; exit code 2 for usage, 1 for failure."""
    assert call(line) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test asks for in vain")
def test_absent_device(capsys):
    """A device that is not there is refused, with those that are."""
    assert call("--device cuda") == 1
    assert "--device cuda: this machine (or this build of torch) has none; found: " in capsys.readouterr().err


def test_wrong_resume(capsys, tmp_path):
    """A run is only resumed with its own settings and from its own files; what does not fit is named."""
    assert call(f"{SMALL} --out run") == 0
    assert call("--out run") == 2
    assert "run holds a run already" in capsys.readouterr().err
    assert call("--resume run --lr 0.5 --batch 8 --top-k 1") == 2
    error = capsys.readouterr().err
    assert "--lr 0.5 (the run has 0.003)" in error and "--top-k 1 (the run has 2)" in error and "batch" not in error
    path = tmp_path / "run/state.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert call("--resume run") == 1 and "is not a readable safetensors file" in capsys.readouterr().err
    save_file({"other.weight": torch.zeros(2)}, path)
    assert call("--resume run") == 1 and "was not written by train_toy.py" in capsys.readouterr().err
    path.write_bytes(good)
    tensors, meta = checkpoint.read(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "exp_avg/norm.weight"}, path, meta)
    assert call("--resume run") == 1 and "for this model" in capsys.readouterr().err
    save_file({name: tensor for name, tensor in tensors.items() if name != "weight/embedding.weight"}, path, meta)
    assert call("--resume run") == 1
    assert "does not fit the model: embedding.weight: missing, expected (47, 16)" in capsys.readouterr().err
    (tmp_path / "run/config.json").write_text("[]")
    assert call("--resume run") == 1 and "was not written by train_toy.py" in capsys.readouterr().err
    (tmp_path / "run/config.json").write_text("{")
    assert call("--resume run") == 1 and "is not readable JSON" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    """--help lists each field of both dataclasses with its default."""
    assert call("--help") == 0
    text = capsys.readouterr().out
    for config in (train_toy.TrainConfig, MoEConfig):
        for name in config.__dataclass_fields__:
            assert name == "vocab_size" or f"--{name.replace('_', '-')}" in text
    assert "[0.003]" in text
