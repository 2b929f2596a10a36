"""Run folders: out/NAME/{state.safetensors, config.json, log.jsonl, model.safetensors}, figures.

A save is one thing: state.safetensors holds all of it, and is written first. The other files repeat
what others read. Where a save was cut off between two of them, opening a run takes the newer state,
and resuming it writes them again. Nothing here reads or writes a pickle, and opening a run executes
no code.
"""

import importlib
import inspect
import json
import os
import sys
from pathlib import Path

import torch

from lab.composing.presets import build_model, config_class
from lab.tools.checks import annotated, torch_defaults, undisturbed
from lab.tools.cli import command, did_you_mean, note
from lab.tools.files import (
    as_json,
    digest,
    parse_json,
    read_about,
    read_tensors,
    write,
    write_tensors,
)
from lab.tools.memory import require_memory
from moe import Router, named_tensors, require

FILES = ("state.safetensors", "config.json", "log.jsonl", "model.safetensors", "scores.json")
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


# ---- saving


def save_run(
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
    state = {f"weight/{name}": weight for name, weight in named_tensors(model).items()}
    for name, weight in learnt(model).items():
        for moment in MOMENTS:
            value = optimizer.state[weight].get(moment)
            if value is None:  # before the first step
                value = torch.zeros_like(weight)
            state[f"{moment}/{name}"] = value
    about = {"step": step, "settings": settings, "log": log, "recent": recent}
    about = {name: as_json(value) for name, value in about.items()}
    write_tensors(folder / "state.safetensors", state, about)
    write_copies(folder, state, about)


def learnt(model) -> dict[str, torch.nn.Parameter]:
    """The weights of a model, without its buffers."""
    tensors = named_tensors(model).items()
    return {name: tensor for name, tensor in tensors if isinstance(tensor, torch.nn.Parameter)}


def write_copies(folder: Path, state: dict, about: dict[str, str]):
    """Write what others read of a saved state: the settings, the log, and the weights last."""
    settings, log = json.loads(about["settings"]), json.loads(about["log"])
    write(folder / "config.json", as_json(settings, indent=2).encode())
    lines = "".join(as_json(line) + "\n" for line in log)
    write(folder / "log.jsonl", lines.encode())
    about = {"format": "pt", "step": about["step"], "settings": digest(about["settings"])}
    write_tensors(folder / "model.safetensors", weights_of(state), about)


def weights_of(state: dict) -> dict:
    """The weights of a saved state, by their names in the model."""
    prefix = "weight/"
    weights = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


# ---- opening


@annotated
@undisturbed()
def load_run(folder: Path | str, router: type | None = None):
    """Open a run -> its model in evaluation mode, and the settings of its training.

    router: the class of the run's routers, for a run that was trained with one of your own.
    ValueError where the folder holds no run, where it does not fit, or where the router is missing.
    """
    folder = Path(folder)
    settings, weights = read_last_save(folder)
    train = settings["train"]
    train.setdefault("content", {})  # earlier versions do not say what a run was made of
    require_router(folder, train.get("router"), router)
    if router and train["content"].get("router") not in (None, code_of(router)):
        note(f"the file of {train['router']} has changed since {folder} was trained")
    try:
        require_memory(config_class(settings["model"])(**settings["model"]))
        model = build_model(settings["model"], router or Router)
    except (ValueError, TypeError) as error:
        path = folder / "config.json"
        raise ValueError(f"{path} describes no model of ours: {error}") from None
    load_weights(model, weights, folder)
    return model.eval(), train


def read_last_save(folder: Path) -> tuple[dict, dict]:
    """The settings and the weights of the last save.

    They are in config.json and model.safetensors; or in the state, where the save was cut off
    before it came to these. A finished run may have no state.
    """
    state_path, path = folder / "state.safetensors", folder / "model.safetensors"
    if state_path.is_file():
        step = read_about(state_path).get("step")
        if not path.is_file() or step != read_about(path).get("step"):
            state, about = read_state(folder)
            return parse_settings(about["settings"], state_path), weights_of(state)

    config = folder / "config.json"
    require_file(config)
    text = config.read_text(encoding="utf-8", errors="replace")
    settings = parse_settings(text, config)
    require_file(path)
    weights, about = read_tensors(path)
    same = about.get("settings") in (None, digest(as_json(settings)))
    require(same, f"{config} was altered: {path.name} was saved with other settings")
    return settings, weights


def require_router(folder: Path, name: str | None, router: type | str | None):
    """ValueError unless a router is given for a run that names one, and for no other."""
    require(
        router is not None or not name,
        f"{folder} was trained with a router of your own, and opening a run executes no code: "
        f"name it again, with {command('--router', name)}",
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
    except Exception as error:  # it may do anything
        raise ValueError(f"--router {name}: {module_name} cannot be imported: {error}") from None
    finally:
        sys.path.remove(os.getcwd())

    # It has to hold a router of that name.
    router = getattr(module, class_name, None)
    hint = did_you_mean(class_name, vars(module))
    require(router is not None, f"--router {name}: {module_name} has no {class_name}{hint}")
    require(
        isinstance(router, type) and issubclass(router, Router),
        f"--router {name}: {class_name} is no subclass of moe.Router",
    )
    return router


def code_of(router: type) -> str:
    """The checksum of the file that a class is defined in."""
    return digest(Path(inspect.getfile(router)))


def newest(parent: Path = Path("out")) -> Path:
    """The run that was saved last. ValueError where there is none."""
    runs = sorted(parent.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    require(
        len(runs) > 0,
        f"no run in {parent}/: train one with python train_toy.py, or name its folder",
    )
    return runs[-1].parent


@torch_defaults()
def resume(folder: Path, model, optimizer):
    """Load the saved state into model and optimizer, bit by bit -> step, log, recent losses.

    The other files are written again, lest the last save was cut off before it came to them.
    ValueError where the state is not one of this model.
    """
    state, about = read_state(folder)
    parameters = learnt(model)
    names = {f"{moment}/{name}" for name in parameters for moment in MOMENTS}
    path = folder / "state.safetensors"
    require(names <= state.keys(), f"{path} was not written by train_toy.py for this model")
    load_weights(model, weights_of(state), folder)

    step = json.loads(about["step"])
    for name, weight in parameters.items():
        moments = {"step": torch.tensor(float(step), device=weight.device)}
        for moment in MOMENTS:
            saved = state[f"{moment}/{name}"]
            fits = saved.shape == weight.shape and saved.dtype == weight.dtype
            found = f"{moment}/{name} has shape {tuple(saved.shape)} and type {saved.dtype}"
            require(fits, f"{path}: {found}; expected {tuple(weight.shape)}, {weight.dtype}")
            moments[moment] = saved.to(weight.device)
        optimizer.state[weight] = moments
    write_copies(folder, state, about)
    return step, json.loads(about["log"]), json.loads(about["recent"])


def read_state(folder: Path):
    """The last saved state -> tensors, and what is said about them, each a text of JSON."""
    path = folder / "state.safetensors"
    require_file(path)
    state, about = read_tensors(path)
    complete = {"step", "log", "recent"} <= about.keys()
    require(complete, f"{path} was not written by train_toy.py")
    if "settings" not in about:  # an earlier version
        config = folder / "config.json"
        require_file(config)
        text = config.read_text(encoding="utf-8", errors="replace")
        about["settings"] = as_json(parse_settings(text, config))
    return state, about


def read_settings(folder: Path) -> dict:
    """The settings of a run that can be resumed: {"model": ..., "train": ..., ...}."""
    _, about = read_state(folder)
    return parse_settings(about["settings"], folder)


def parse_settings(text: str, source) -> dict:
    """The settings that a JSON text holds. ValueError: it holds none of ours."""
    return parse_json(text, {"model": {}, "train": {}}, str(source))


def require_file(path: Path):
    """ValueError unless a file of a run exists."""
    inside = sorted(other.parent.name for other in path.parent.glob("*/config.json"))
    hint = f"runs in it: {', '.join(inside[:5])}" if inside else "train_toy.py makes one"
    missing = f"{path.parent} holds no run: there is no {path.name}"
    require(path.is_file(), f"{missing}; {hint}")


def load_weights(model, weights: dict, source):
    """Copy named tensors into the model.

    ValueError names the first three that are missing, unknown or of another shape, or one that
    holds numbers of another kind.
    """
    own = named_tensors(model)
    problems = []
    for name in own | weights:
        shape = tuple(weights[name].shape) if name in weights else "missing"
        expected = tuple(own[name].shape) if name in own else "no such tensor"
        if shape != expected:
            problems.append(f"{name}: {shape}, expected {expected}")
    more = " ..." if len(problems) > 3 else ""
    require(not problems, f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")
    for name, weight in own.items():
        found, expected = weights[name].is_floating_point(), weight.is_floating_point()
        numbers = "integers" if expected else "fractions"
        require(found == expected, f"{source} does not fit the model: {name} holds {numbers}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
