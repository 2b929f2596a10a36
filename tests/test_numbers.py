"""Numbers that are no numbers never go on: they stop what meets them, and no file holds one."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from by_hand import full, references_of, specialisation_of, tiny

import eval as eval_py
import hf
import train_toy
from data import SkillsTask, passes, perplexity
from lab.checkpoints.answers import Answers
from lab.checkpoints.choice import ChoiceConfig, Prompt, log_likelihoods
from lab.composing.compare import append_line
from lab.composing.layers import ComposedConfig
from lab.composing.robustness import robustness_table
from lab.remixing.methods import METHODS
from lab.tools import runs, statistics
from lab.tools.settings import TrainConfig
from moe import MoEConfig
from remix import RemixConfig, remix

ROOT = Path(__file__).parent.parent
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
NAN = float("nan")

# ---- a model that overflows, or is damaged


OPERATIONS = {
    "forward": lambda model: model(TOKENS),
    "generate": lambda model: model.generate(TOKENS, 2),
    "draw": lambda model: model.generate(TOKENS, 2, 1.0),
    "score": lambda model: list(passes(model.train(), TOKENS)),
    "specialisation": specialisation_of,
    "choice": lambda model: log_likelihoods(model, [Prompt([1, 2], [[(1, 3)], [(1, 4)]])]),
    "build": references_of,
}


@pytest.mark.parametrize("operation", ["forward", "build", *full(*list(OPERATIONS)[1:-1])])
@pytest.mark.parametrize("value", [NAN, *full(math.inf)], ids=str)
def test_damaged_models(operation, value):
    """Whichever weight is damaged: what a model says is refused, in evaluation."""
    model = tiny().float().eval()
    for name, weight in model.named_parameters():
        kept = weight.detach().clone()
        weight.data.fill_(value)
        with pytest.raises(ValueError, match="not finite"):
            print(name, OPERATIONS[operation](model))
        weight.data.copy_(kept)
    OPERATIONS[operation](model)


def test_overflow():
    """A model that overflows in float16, and one that answers along a pathway that is none."""
    model = tiny().eval()
    references = references_of(model)
    for bad in (NAN, math.inf):
        surrogate = lambda core, *_, bad=bad: core.start * bad  # noqa: E731
        with pytest.raises(ValueError, match="not finite"):
            remix(model, [[1, 2]], references, method=surrogate, k=1)
    with pytest.raises(ValueError, match="not finite"):
        remix(model, [[5]], dataclasses.replace(references, embeddings=torch.full((6, 2), NAN)),
              embedding="own", embeddings=[[1.0, 0.0]], k=1)  # fmt: skip
    model.embedding.weight.data.mul_(1e5)
    model.blocks[0].attention.v.weight.data.mul_(1e4)
    with pytest.raises(ValueError, match="overflows in torch"):
        model.half().generate(TOKENS, 2)


# ---- files


def broken():
    """A model with a weight that holds no number."""
    model = tiny().float()
    model.norm.weight.data[0] = NAN
    return model


def save_run(folder, value):
    model = tiny().float()
    settings = {"model": vars(model.config), "train": {}}
    log = [{"step": 0, "seconds": 0.0, "train_loss": None, "dev": {"loss": value}}]
    runs.save_run(folder, model, torch.optim.AdamW(model.parameters()), 0, settings, log, [])


def save_answers(folder, value):
    with open(folder / "answers", "a+b") as file:
        Answers(file, {}).add({0: [0.0, value]})


WRITERS = {  # what writes a number into the folder
    "a run's log": save_run,
    "scores": lambda folder, value: eval_py.save_scores(folder, "x", {"a": [{"b": value}]}),
    "answers": save_answers,
    "results": lambda folder, value: append_line(str(folder / "x.jsonl"), {"loss": value}),
}


@pytest.mark.parametrize("writer", ["a run's log", *full(*list(WRITERS)[1:])])
def test_writers(writer, tmp_path):
    """No file of JSON holds NaN or an infinity; an older file stays."""
    WRITERS[writer](tmp_path, 1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for value in (NAN, math.inf, -math.inf):
        with pytest.raises(ValueError, match="no number"):
            WRITERS[writer](tmp_path, value)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def save_hub(folder, model):
    hf.save(model, folder / "hub")


def save_weights(folder, model):
    settings = {"model": vars(model.config), "train": {}}
    runs.save_run(folder, model, torch.optim.AdamW(model.parameters()), 0, settings, [], [])


SAVED = {  # how a model, or what is made of it, is saved, and opened again
    "hub": (save_hub, lambda folder: hf.load(folder / "hub")),
    "float16": (save_hub, lambda folder: hf.load(folder / "hub", "float16")),
    "run": (save_weights, runs.load_run),
}


@pytest.mark.parametrize("kind", ["run", *full("hub", "float16")])
def test_tensors(kind, tmp_path):
    """No tensor with such a number is saved, and none is opened, whichever it is."""
    save, load = SAVED[kind]
    with pytest.raises(ValueError, match=r"norm.weight.* not finite"):
        save(tmp_path, broken())
    save(tmp_path, tiny().float())
    load(tmp_path)
    [path] = tmp_path.rglob("model.safetensors")
    tensors = safetensors.torch.load_file(path)
    value = 7e4 if kind == "float16" else NAN
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        safetensors.torch.save_file(tensors | {name: changed}, path, {"step": "0"})
        with pytest.raises(ValueError, match="not finite"):
            load(tmp_path)


def test_only_one_place_writes_json():
    """All JSON is written by as_json, and e is raised to a loss only by `perplexity`."""
    places = {"json.dumps": {"lab/tools/files.py"}, "json.dump": set()}
    places["math.exp"] = {"data.py", "lab/tools/report.py"}  # the second: of a negative number
    found = {name: set() for name in places}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("pathways/*.py"), *ROOT.glob("lab/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name in places:
                found[name].add(path.relative_to(ROOT).as_posix())
    assert found == places


# ---- settings

CONFIGS = [MoEConfig, ComposedConfig, RemixConfig, TrainConfig, ChoiceConfig]
ODD = [NAN, math.inf, -math.inf, 2**70, -(2**70), -1, 1.5, "7", None, True, [1], torch.ones(2)]


@pytest.mark.parametrize("config", [MoEConfig, *full(*CONFIGS[1:])])
def test_settings(config):
    """A field takes what it is meant for, or one line says what is wrong with it."""
    given = {"model": "x"} if config is ChoiceConfig else {}
    for field in dataclasses.fields(config):
        for value in ODD:
            try:
                filled = config(**given | {field.name: value})
            except ValueError as error:
                assert any(word in str(error) for word in (field.name, "layer", "benchmark"))
                assert "\n" not in str(error)
                continue
            kept = getattr(filled, field.name)
            if isinstance(kept, float):
                assert math.isfinite(kept)


# ---- what statistics and tables do at the edge


def test_perplexity():
    """However bad a model is, its perplexity is a number."""
    assert perplexity(1.0) == math.e
    assert perplexity(709.9) == perplexity(1e30) < math.inf
    rows = {"intact": {"loss": 1e9, "perplexity": 1.0, "experts": 0.0, "mass": 0.0}}
    robustness_table(rows)


def test_differences_without_spread():
    """Seeds that never differ, or always by the same, have a p-value too."""
    pytest.importorskip("scipy")
    assert statistics.paired([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]) == 1
    assert statistics.paired([0.75, 0.5, 0.25], [0.5, 0.25, 0.0]) == 0


RUNS = {
    "one expert": "--n-experts 1 --top-k 1",
    "all experts": "--n-experts 4 --top-k 4",
    "one layer": "--n-layers 1",
    "dense": "--model dense",
    "cartesian": "--preset cartesian --n-experts 6 --top-k 2 --d-expert 144 --d-shared 144",
}
COMMANDS = [["perplexity"], ["routing"], ["robustness"], ["sharing"]]
COMMANDS.append(["remix", "--most", "2", "--k", "1", "--methods", "NGD,oracle,router tuning"])


@pytest.mark.parametrize("run", full(*RUNS))
def test_small_models(run, call, monkeypatch):
    """The commands write numbers about models of the least sizes, or say what is missing."""
    monkeypatch.setattr(SkillsTask, "N", 4)  # numbers, of 16: it is quick
    monkeypatch.setitem(METHODS["router tuning"].tuned, "skills", {"lr": 1e-2, "steps": 5})
    sizes = f"--d-model 16 --n-layers 2 --steps 30 --no-taste {RUNS[run]}"
    assert call(train_toy, f"{sizes} --out run") == 0
    for command, *flags in COMMANDS:
        try:
            eval_py.main([command, "run", *flags])
        except ValueError as error:
            assert "\n" not in str(error)
            assert "no number" not in str(error)

    def refuse(number):
        raise AssertionError(number)

    for path in Path().rglob("*.json*"):
        lines = path.suffix == ".jsonl"
        for text in path.read_text().splitlines() if lines else [path.read_text()]:
            json.loads(text, parse_constant=refuse)
