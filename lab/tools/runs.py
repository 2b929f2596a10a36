"""Run folders: out/NAME/{model.safetensors, config.json, state.safetensors, log.jsonl}, figures.

Every file is written under a temporary name and renamed, so that a save that fails or is cut off
leaves the last good one. state.safetensors holds by itself all that an exact resume needs.
Nothing here reads or writes a pickle, and opening a run executes no code.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from lab.composing.presets import build_model
from lab.tools.cli import nearest
from moe import Router, require

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


# ---- saving


def write(path: Path, data: bytes):
    """Write a file whole or not at all. OSError (no space, say) leaves an older file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        what = f"could not write {path} ({len(data) / 1e6:.1f} MB): {error.strerror}"
        raise OSError(f"{what}; what was saved before is untouched") from error


def save(
    folder: Path,
    model,
    optimizer,
    step: int,
    settings: dict,
    log: list[dict],
    recent: list[float],
):
    """Save a run after `step` steps.

    settings: {"model": ..., "train": ...}. log: a dict for each evaluation. recent: the training
    losses since the last of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()

    # All that an exact resume needs, in one file.
    state = {f"weight/{name}": weight for name, weight in weights.items()}
    for name, weight in model.named_parameters():
        for moment in MOMENTS:
            value = optimizer.state[weight].get(moment)
            if value is None:  # before the first step
                value = torch.zeros_like(weight)
            state[f"{moment}/{name}"] = value
    meta = {"step": str(step), "log": json.dumps(log), "recent": json.dumps(recent)}
    write(folder / "state.safetensors", safetensors.torch.save(state, meta))

    # What others read: the settings, the weights, the log.
    write(folder / "config.json", json.dumps(settings, indent=2).encode())
    meta = {"format": "pt", "step": str(step)}
    write(folder / "model.safetensors", safetensors.torch.save(weights, meta))
    lines = "".join(json.dumps(line) + "\n" for line in log)
    write(folder / "log.jsonl", lines.encode())


# ---- opening


def load(folder: Path, router: type | None = None):
    """Open a run -> its model in evaluation mode, and the settings of its training.

    router: the class of the run's routers, for a run that was trained with one of your own.
    ValueError where the folder holds no run, where it does not fit, or where the router is missing.
    """
    settings = read_settings(folder)
    require_router(folder, settings["train"].get("router"), router)
    try:
        model = build_model(settings["model"], router or Router)
    except (ValueError, TypeError) as error:
        path = folder / "config.json"
        raise ValueError(f"{path} describes no model of ours: {error}") from None
    weights, _ = read_tensors(folder / "model.safetensors")
    load_weights(model, weights, folder)
    return model.eval(), settings["train"]


def require_router(folder: Path, name: str | None, router: type | None):
    """ValueError unless a router is given for a run that names one, and for no other."""
    require(
        router is not None or not name,
        f"{folder} was trained with a router of your own, and opening a run executes no code: "
        f"name it again, with --router {name}",
    )
    require(
        router is None or bool(name),
        f"{folder} was trained with the router of moe.py; leave --router out",
    )


def router_class(name: str) -> type[Router]:
    """Import the class that "my_file:MyRouter" names, from my_file.py in the current folder.

    ValueError where there is no such file, no such class, or the class is no Router.
    """
    module_name, _, class_name = name.partition(":")
    require(
        bool(module_name and class_name),
        f"--router {name}: expected FILE:CLASS, such as my_file:MyRouter for my_file.py",
    )

    # Look into the current folder first.
    sys.path.insert(0, os.getcwd())
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--router {name}: {module_name} cannot be imported: {error}") from None
    finally:
        sys.path.remove(os.getcwd())

    router = getattr(module, class_name, None)
    hint = nearest(class_name, vars(module))
    require(router is not None, f"--router {name}: {module_name} has no {class_name}{hint}")
    require(
        isinstance(router, type) and issubclass(router, Router),
        f"--router {name}: {class_name} is no subclass of moe.Router",
    )
    return router


def newest(parent: Path = Path("out")) -> Path:
    """The run that was saved last. ValueError where there is none."""
    runs = sorted(parent.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    require(
        len(runs) > 0,
        f"no run in {parent}/: train one with python train_toy.py, or name its folder",
    )
    return runs[-1].parent


def resume(folder: Path, model, optimizer):
    """Load the saved state into model and optimizer, bit by bit -> step, log, recent losses.

    ValueError where the state is not one of this model.
    """
    path = folder / "state.safetensors"
    state, meta = read_tensors(path)
    parameters = dict(model.named_parameters())
    names = {f"{moment}/{name}" for name in parameters for moment in MOMENTS}
    complete = names <= state.keys() and {"step", "log", "recent"} <= meta.keys()
    require(complete, f"{path} was not written by train_toy.py for this model")

    prefix = "weight/"
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    load_weights(model, weights, folder)

    step = int(meta["step"])
    for name, weight in parameters.items():
        moments = {"step": torch.tensor(float(step), device=weight.device)}
        for moment in MOMENTS:
            moments[moment] = state[f"{moment}/{name}"].to(weight.device)
        optimizer.state[weight] = moments
    return step, json.loads(meta["log"]), json.loads(meta["recent"])


def require_file(path: Path):
    """ValueError unless a file of a run exists."""
    require(
        path.is_file(),
        f"{path.parent} holds no run: there is no {path.name}; train_toy.py makes one",
    )


def read_tensors(path: Path):
    """Read a safetensors file -> tensors, metadata. ValueError where it cannot be read."""
    require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        problem = f"{path} is not a readable safetensors file ({error})"
        raise ValueError(f"{problem}; it may be cut off or foreign") from None


def read_settings(folder: Path) -> dict:
    """Read config.json of a run: {"model": ..., "train": ..., ...}."""
    path = folder / "config.json"
    require_file(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    entries = settings if isinstance(settings, dict) else {}
    complete = all(isinstance(entries.get(name), dict) for name in ("model", "train"))
    require(
        complete,
        f"{path} was not written by train_toy.py: it has no entries `model` and `train`",
    )
    return settings


def load_weights(model, weights: dict, source):
    """Copy named tensors into the model.

    ValueError names the first three that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    problems = []
    for name in own | weights:
        shape = tuple(weights[name].shape) if name in weights else "missing"
        expected = tuple(own[name].shape) if name in own else "no such tensor"
        if shape != expected:
            problems.append(f"{name}: {shape}, expected {expected}")
    more = " ..." if len(problems) > 3 else ""
    require(not problems, f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
