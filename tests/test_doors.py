"""Every public door takes what it is meant for in any form, and refuses all else in one line.

A door is a function and an example of each of its arguments. From an example follow other forms of
the same (`alike`), whose result is the same, and things of other kinds (`other`), which are
refused. A new function is one line of DOORS; flags are found by themselves.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from by_hand import V, close, full, tiny

import cartesian
import eval as eval_program
import hf
import train_toy
from data import CompositionTask, SkillsTask, TextData, passes, perplexity
from lab.remixing.corrections import corrections, mend
from lab.tools.runs import load_run
from lab.tools.settings import TrainConfig
from moe import Imposed, MoEConfig, MoETransformer
from pathways import (
    ReferenceSet,
    Tail,
    best_token,
    critical_layers,
    cross_entropy,
    find_neighbours,
    kernel,
    nearest,
    padded,
    similarity,
)
from remix import RemixConfig, core_experts, remix

torch.manual_seed(0)
MODEL = tiny().float().eval()
TOKENS = torch.tensor([[1, 2, 5], [4, 5, 6]])
LENGTHS = torch.tensor([3, 3])
LABELS = torch.tensor([1, 2])
OPTIONS = torch.tensor([[1, 2], [2, 3]])
SOLVED = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2, 4, 6]]
VALID = torch.tensor([[True, True, False], [True, True, True]])
REFERENCES = ReferenceSet.build(MODEL, SOLVED, [1, 2, 3, 4], embeddings=torch.randn(4, 2))
REFERENCES.correct[:] = True
TAIL = Tail(MODEL)
CONFIG = RemixConfig(k=2, steps=1)
NEAR = find_neighbours(TAIL, REFERENCES, TOKENS, LENGTHS, CONFIG)
OWN = TAIL.read(TOKENS, LENGTHS)[0]


class Text(str):
    """A text of which only itself will do, as a file's name."""


def imposing(row, at):
    return MODEL(TOKENS, imposed=Imposed({0: row}, at))


def given_by_surrogate(w):
    return remix(MODEL, TOKENS, REFERENCES, method=lambda *_: w, k=2).logits


def with_references(**changes):
    return remix(MODEL, TOKENS, dataclasses.replace(REFERENCES, **changes), CONFIG).logits


def with_neighbours(**changes):
    return remix(MODEL, TOKENS, REFERENCES, CONFIG, neighbours=NEAR._replace(**changes)).logits


def with_own(embeddings):
    return remix(MODEL, TOKENS, REFERENCES, CONFIG, embedding="own", embeddings=embeddings).logits


DOORS = {
    "forward": (MODEL, {"tokens": TOKENS, "targets": TOKENS, "valid": VALID}),
    "embed": (MODEL.embed, {"tokens": TOKENS}),
    "blocks": (
        MODEL.run_blocks,
        {"x": torch.randn(2, 3, 16), "valid": VALID, "first": 1, "last": 2},
    ),
    "generate": (MODEL.generate, {"tokens": TOKENS, "n_tokens": 2, "stop": LABELS, "valid": VALID}),
    "draw": (lambda **given: MODEL.generate(TOKENS, 2, **given).shape, {"temperature": 0.5}),
    "impose": (imposing, {"row": torch.ones(2, 6) / 6, "at": VALID}),
    "model": (lambda config: MoETransformer(config).config, {"config": MoEConfig(n_layers=1)}),
    "passes": (lambda tokens: list(passes(MODEL, tokens)), {"tokens": TOKENS}),
    "cartesian": (cartesian.cartesian, {"base": MoEConfig(), "n_visits": 2}),
    "fine-grained": (cartesian.fine_grained, {"base": MoEConfig()}),
    "count": (cartesian.count_parameters, {"config": MoEConfig()}),
    "remix": (
        lambda **given: remix(MODEL, **given).logits,
        {"prompts": TOKENS, "references": REFERENCES, "config": CONFIG, "allowed": NEAR.usable},
    ),
    "settings": (
        lambda **given: remix(MODEL, TOKENS, REFERENCES, **given).logits,
        {"method": "mode_finding", "k": 2, "steps": 1, "core": 3, "batch": 1, "kernel": "linear"},
    ),
    "own embeddings": (with_own, {"embeddings": torch.randn(2, 2)}),
    "surrogate": (given_by_surrogate, {"w": OWN}),
    "neighbours": (with_neighbours, NEAR._asdict()),
    "references": (
        with_references,
        {
            "tokens": REFERENCES.tokens,
            "lengths": REFERENCES.lengths,
            "labels": REFERENCES.labels,
            "correct": REFERENCES.correct,
            "pathways": REFERENCES.pathways,
        },
    ),
    "core": (core_experts, {"pathway": OWN, "n_core": 2}),
    "mend": (lambda **given: mend(MODEL, **given), {"references": REFERENCES, "config": CONFIG}),
    "corrections": (
        lambda **given: corrections(MODEL, config=CONFIG, **given).__name__,
        {"references": REFERENCES, "scale": 1.0},
    ),
    "tail": (lambda **given: Tail(MODEL, **given).routers, {"layers": [0, 2], "token": "middle"}),
    "prefix": (TAIL.cut, {"tokens": TOKENS, "lengths": LENGTHS}),
    "read": (TAIL.read, {"tokens": TOKENS, "lengths": LENGTHS}),
    "along": (TAIL, {"prefix": TAIL.cut(TOKENS, LENGTHS), "pathway": OWN}),
    "batch": (SkillsTask().batch, {"step": 1, "n": 2}),
    "layers": (lambda spec: critical_layers(MODEL, spec), {"spec": Text("last:2")}),
    "neighbourhood": (
        lambda **given: find_neighbours(TAIL, REFERENCES, config=CONFIG, **given),
        {"tokens": TOKENS, "lengths": LENGTHS, "allowed": NEAR.usable},
    ),
    "similarity": (
        lambda **given: similarity("own", TAIL, REFERENCES, TOKENS, LENGTHS, **given),
        {"own": torch.randn(2, 2)},
    ),
    "embedding": (
        lambda name: similarity(name, TAIL, REFERENCES, TOKENS, LENGTHS),
        {"name": "tfidf"},
    ),
    "nearest": (
        lambda usable: nearest(torch.rand(2, 4), usable, OWN, CONFIG).usable,
        {"usable": NEAR.usable},
    ),
    "kernel": (lambda name: kernel(name, torch.ones(2, 2), torch.ones(2, 2)), {"name": "linear"}),
    "padded": (padded, {"prompts": TOKENS, "vocab_size": V}),
    "best": (best_token, {"logits": torch.randn(2, V), "options": OPTIONS}),
    "loss": (cross_entropy, {"logits": torch.randn(2, V), "labels": LABELS, "options": OPTIONS}),
    "build": (
        lambda **given: ReferenceSet.build(MODEL, **given),
        {
            "prompts": TOKENS,
            "labels": LABELS,
            "options": OPTIONS,
            "corpus": TOKENS,
            "embeddings": torch.randn(2, 2),
            "token": "first",
        },
    ),
    "open references": (lambda path: ReferenceSet.load(path, MODEL), {"path": Text("references")}),
    "skills": (lambda seed: SkillsTask(seed).content, {"seed": 1}),
    "split": (lambda split: SkillsTask().prompts(split).tokens, {"split": "dev"}),
    "compositions": (
        lambda **given: CompositionTask(**given).content,
        {"seed": 1, "n_functions": 4, "n_in_a_row": 2, "trained": 0.5},
    ),
    "text": (
        lambda **given: TextData(tokenizer_name="bytes", **given).content,
        {"path": Text("text"), "context": 16, "seed": 1},
    ),
    "windows": (
        lambda split: TextData("text", tokenizer_name="bytes", context=16).held_out(split),
        {"split": "dev"},
    ),
    "perplexity": (perplexity, {"nats": 1.0}),
    "checkpoint": (lambda source: hf.load(source)[0].config, {"source": Text("hub")}),
    "save": (lambda path: hf.save(MODEL, path), {"path": Text("new")}),
    "run": (lambda folder: load_run(folder)[0].config, {"folder": Text("run")}),
}
FREE = {  # what is right as well: door -> forms of an argument
    "blocks": {"x of NaN", "first of zero", "last of nothing"},  # `head` sees NaN
    "along": {"pathway of nothing", "pathway of NaN"},  # likewise
    "batch": {"step of zero"},
    "passes": {"tokens of empty"},
    "remix": {"config of nothing"},
    "neighbours": {"prompts of nothing"},  # it is not said whose they are
    "generate": {"stop of scalar", "stop of deeper", "stop of flat", "stop of empty"},
    "settings": {"steps of zero"},
    "skills": {"seed of zero"},
    "compositions": {"seed of zero"},
    "text": {"seed of zero"},
    "own embeddings": {"embeddings of integers"},
    "similarity": {"own of integers"},
    "core": {"pathway of empty", "pathway of wide"},
    "save": {"path of text"},
    "build": {"embeddings of integers", "embeddings of wide"},
    "best": {"logits of NaN", "logits of wide", "options of negative", "options of outside"},
    "loss": {"logits of NaN", "logits of wide", "options of negative", "options of outside"},
}
FREE["loss"] |= {"labels of negative", "labels of outside"}  # only kinds are looked at there

OPTIONAL = {"targets", "valid", "stop", "n_visits", "at", "allowed", "core", "n_core", "layers"}
OPTIONAL |= {"options", "corpus", "embeddings"}
NOTHINGS = {"nothing": None, "object": object(), "dict": {}}
NUMBERS = {"NaN": math.nan, "infinite": math.inf, "digit": "7", "bool": True, "huge": 10**400}


def alike(value):
    """Other forms of the same."""
    if torch.is_tensor(value):
        if value.dtype == torch.int64:
            return {"int32": value.int(), "int16": value.short()}
        return {"copy": value.clone()}
    if isinstance(value, bool) or type(value) is Text:
        return {}
    if isinstance(value, int):
        return {"numpy": np.int32(value)}
    if isinstance(value, float):
        return {"numpy": np.float32(value)}
    if isinstance(value, str):
        return {"capitals": value.upper()}
    return {}


def other(value):
    """What is of another kind, or of another shape."""
    wrong = NOTHINGS | {"text": "abc", "list of texts": ["a"]}
    if torch.is_tensor(value):
        wrong |= {"numbers": 1.5, "scalar": torch.tensor(1), "deeper": value[None]}
        wrong |= {"flat": value.flatten()[:1], "empty": value[:0], "complex": value + 1j}
        wrong |= {"huge": [[2**70]]}
        if value.dtype == torch.int64:
            wrong |= {"floats": value + 0.5, "whole floats": value.float(), "bools": value > 0}
            wrong |= {"negative": -value, "outside": value + 1000}
        if value.dtype == torch.bool:
            wrong |= {"floats": value.float(), "counts": value.int() * 3}
        if value.is_floating_point():
            wrong |= {
                "NaN": value * math.nan,
                "integers": value.long(),
                "wide": torch.cat([value, value], -1),
            }
    elif isinstance(value, str):
        wrong |= {"number": 7, "list": [value]}
    elif isinstance(value, int | float):
        wrong |= NUMBERS | {"list": [value]}
        if isinstance(value, int):
            wrong |= {"half": value + 0.5, "zero": 0, "negative": -1, "large": 2**63}
    else:
        wrong |= {"number": 7, "NaN": math.nan, "tensor": torch.ones(2), "list": [7.5]}
    return wrong


def leaves(result):
    """All numbers and texts of a result."""
    if torch.is_tensor(result):
        return [result.double()]
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [leaf for each in result for leaf in leaves(each)]
    return [result] if isinstance(result, int | float | str) else []


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """A folder with what doors open."""
    from lab.tools.runs import save_run

    monkeypatch.chdir(tmp_path)
    REFERENCES.save("references")
    stories = [f"story {i} of a fox, a hen and {i * i} trees" for i in range(200)]
    (tmp_path / "text").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    settings = {"model": vars(MODEL.config), "train": {"data": "skills", "seed": 0}}
    (tmp_path / "run").mkdir()
    hf.save(MODEL, "hub")
    save_run(tmp_path / "run", MODEL, torch.optim.AdamW(MODEL.parameters()), 0, settings, [], [])


QUICK = ["forward", "generate", "remix", "build"]


@pytest.mark.parametrize("door", [*QUICK, *full(*(door for door in DOORS if door not in QUICK))])
def test_doors(door):
    """The same in another form gives the same; all else is refused in one line."""
    function, given = DOORS[door]
    expected = leaves(function(**given))
    silent, loud = [], []
    for name, value in given.items():
        for changed in alike(value).values():
            found = leaves(function(**given | {name: changed}))
            for leaf, known in zip(found, expected, strict=True):
                if torch.is_tensor(known):
                    close(leaf, known, 1e-5)
                else:
                    assert leaf == known
        for form, changed in other(value).items():
            case = f"{name} of {form}"
            if case in FREE.get(door, ()) or (form == "nothing" and name in OPTIONAL):
                continue
            try:
                result = function(**given | {name: changed})
                silent.append(f"{case}: {str(result)[:60]}")
            except (ValueError, OSError) as error:
                if "\n" in str(error) or not str(error):
                    loud.append(f"{case}: {error}")
            except Exception as error:
                loud.append(f"{case}: {type(error).__name__}: {str(error)[:90]}")
    assert (silent, loud) == ([], [])


# ---- flags

ODD = ["0", "-1", "nan", "inf", "1e30", "1e-45", "1.5", "text", "", "none", "1,2"]
ODD += [str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(10**30)]
SIZES = "--d-model 16 --n-layers 1 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"
TRAINING = [*vars(TrainConfig()), *vars(MoEConfig())]
EVALUATION = {
    "sample": ["tokens", "temperature", "seed", "threads"],
    "perplexity": ["split", "threads"],
    "remix": [*vars(CONFIG), "most", "methods", "beside", "threads"],
}


class Begun(KeyboardInterrupt):
    """The work has begun."""


def begin(*given, **options):
    raise Begun


def answers(program, argv) -> str:
    """What a program says to flags: nothing where it begins, or one line."""
    try:
        program.main(argv)
    except Begun:
        return ""
    except (ValueError, OSError, MemoryError) as error:
        line = str(error)
        assert line and "\n" not in line
        return line
    return ""


@pytest.mark.parametrize("flag", [*full(*TRAINING)])
def test_flags_of_training(flag, monkeypatch):
    """Whatever number a flag gets: training makes its first step, or one line says why not."""
    name = "--" + flag.replace("_", "-")
    monkeypatch.setattr(SkillsTask, "N", 4)  # of 16 numbers: it is quick
    monkeypatch.setattr(train_toy, "finish", begin)
    update = train_toy.update

    def updated(*given):
        loss = update(*given)
        if math.isfinite(loss):
            raise Begun
        return loss

    monkeypatch.setattr(train_toy, "update", updated)
    for number, value in enumerate(ODD):
        answers(train_toy, [*SIZES.split(), "--out", f"new{number}", f"{name}={value}"])


@pytest.mark.full
@pytest.mark.parametrize("command", EVALUATION)
def test_flags_of_evaluation(command, monkeypatch):
    """Likewise: a command opens its run, or one line says why not."""
    for module, name in ((eval_program, "load_task"), (eval_program, "arena_of")):
        monkeypatch.setattr(module, name, begin)
    for flag in EVALUATION[command]:
        for value in ODD:
            answers(eval_program, [command, "run", f"--{flag.replace('_', '-')}={value}"])


def test_seeds():
    """The last of several seeds is as good as the first, or none is trained."""
    argv = ["--seed", str(2**63 - 1), "--seeds", "2"]
    assert "the last of 2 seeds" in answers(train_toy, [*SIZES.split(), *argv])
