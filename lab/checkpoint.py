"""Run folders: out/NAME/{model.safetensors, config.json, state.safetensors, log.jsonl} and figures.

Every file is written under a temporary name and renamed, so that a save that fails or is cut off leaves the last good
one. state.safetensors holds by itself all that an exact resume needs. Nothing here reads or writes a pickle.
"""

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from cartesian import build
from moe import require

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


def write(path: Path, data: bytes):
    """Write a file whole or not at all. OSError where that fails (no space, say); an older file stays as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        what = f"{path} ({len(data) / 1e6:.1f} MB)"
        raise OSError(f"could not write {what}: {error.strerror}; what was saved before is untouched") from error


def save(folder: Path, model, optimizer, step: int, settings: dict, log: list[dict], recent: list[float]):
    """Save a run after `step` steps: the state for resume, with the losses since the last line of the log; the model
    and its settings; the log."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    state = {f"weight/{name}": weight for name, weight in weights.items()}
    for name, weight in model.named_parameters():
        for moment in MOMENTS:
            kept = optimizer.state[weight].get(moment)  # nothing before the first step
            state[f"{moment}/{name}"] = torch.zeros_like(weight) if kept is None else kept
    meta = {"step": str(step), "log": json.dumps(log), "recent": json.dumps(recent)}
    write(folder / "state.safetensors", safetensors.torch.save(state, meta))
    write(folder / "config.json", json.dumps(settings, indent=2).encode())
    write(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt", "step": str(step)}))
    write(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())


def load(folder: Path):
    """The model of a run, in evaluation mode, and the settings of its training -> (model, settings)."""
    settings = read_settings(folder)
    try:
        model = build(settings["model"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no model of ours: {error}") from None
    load_weights(model, read(folder / "model.safetensors")[0], folder)
    return model.eval(), settings["train"]


def newest(parent: Path = Path("out")) -> Path:
    """The run that was saved last. ValueError where there is none."""
    runs = sorted(parent.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    require(len(runs) > 0, f"no run in {parent}/: train one with python train_toy.py, or name its folder")
    return runs[-1].parent


def resume(folder: Path, model, optimizer):
    """Load the saved state into model and optimizer, bit by bit -> (step, log, recent)."""
    state, meta = read(folder / "state.safetensors")
    names = {f"{moment}/{name}" for name, _ in model.named_parameters() for moment in MOMENTS}
    ours = {"step", "log", "recent"} <= meta.keys() and names <= state.keys()
    require(ours, f"{folder / 'state.safetensors'} was not written by train_toy.py for this model")
    step = int(meta["step"])
    load_weights(model, {n.removeprefix("weight/"): t for n, t in state.items() if n.startswith("weight/")}, folder)
    for name, weight in model.named_parameters():
        moments = {moment: state[f"{moment}/{name}"].to(weight.device) for moment in MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(step), device=weight.device), **moments}
    return step, json.loads(meta["log"]), json.loads(meta["recent"])


def read(path: Path):
    """A safetensors file -> (tensors, metadata). ValueError, in one line, for what is missing or cannot be read."""
    require(path.is_file(), f"{path.parent} holds no run: there is no {path.name}; train_toy.py makes one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); it may be cut off or foreign") from None


def read_settings(folder: Path) -> dict:
    """config.json of a run: {"model": ..., "train": ..., ...}."""
    path = folder / "config.json"
    require(path.is_file(), f"{folder} holds no run: there is no config.json; train_toy.py makes one")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    ours = isinstance(settings, dict) and all(isinstance(settings.get(name), dict) for name in ("model", "train"))
    require(ours, f"{path} was not written by train_toy.py: it has no entries `model` and `train`")
    return settings


def load_weights(model, weights: dict, source):
    """Copy named tensors into the model. ValueError that names the first few that are missing, unknown or misshapen."""
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = [f"{n}: {found.get(n, 'missing')}, expected {expected.get(n, 'no such tensor')}" for n in expected | found
             if found.get(n) != expected.get(n)]  # fmt: skip
    require(not wrong, f"{source} does not fit the model: {'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(weights[name])
