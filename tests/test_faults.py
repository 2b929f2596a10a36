"""Kills, full disks, damage, other contents: nothing is lost, and what is wrong is told.

A job is work that leaves files behind. Whatever happens to it, the work done again ends in the same
bits, or in one clear line and exit code 1 or 2. A case is drawn from its number alone:
`pytest --full tests/test_faults.py --cases 200` tries so many.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from by_hand import full, refused, tiny
from children import child, kill_at, program
from safetensors.torch import save_file

import eval as eval_py
import hf
import train_toy
from lab.tools import files, runs, texts
from lab.tools.files import digest, read_tensors, write_tensors
from moe import MoEConfig, MoETransformer, Router
from pathways import ReferenceSet, fingerprint
from remix import remix

# ---- jobs: what is done, and what comes out of it

SIZES = "--d-model 16 --n-layers 1 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"
TRAIN = f"--no-taste --steps 4 --batch 4 --eval-every 2 {SIZES} --context 16"
TRAIN += " --data-file book.txt --tokenizer bytes --out run"
CHOICE = "choice --model checkpoint --task mmlu --data-file questions.jsonl --form full --out kept"


def train() -> int:
    """Train, or continue what is there."""
    again = Path("run/state.safetensors").exists()
    return program(train_toy, "--resume run" if again else TRAIN)


def trained():
    """What a run has learnt, and what it says of it, but for the time that it took."""
    values = [json.loads(Path("run/scores.json").read_text())]
    for name in ("state", "model"):
        tensors, about = read_tensors(Path(f"run/{name}.safetensors"))
        values += [about["step"], files.tensors_digest(tensors, {})]
    for line in Path("run/log.jsonl").read_text().splitlines():
        values.append(json.loads(line)["dev"])
    return values


def tokenise():
    texts.BLOCK_SIZE = 2000  # many blocks
    return texts.read_tokens("book.txt", texts.tokenizer("tinystories"))[0].tolist()


def a_model() -> MoETransformer:
    torch.manual_seed(0)
    return tiny(vocab_size=256, context=512).float().eval()


def build_references():
    """Make references, or read those that are there, and re-mix by them."""
    model, tokens = a_model(), torch.arange(240).view(60, 4)
    if not Path("references").exists():
        labels = model(tokens).logits[:, -1].argmax(-1)
        ReferenceSet.build(model, tokens, labels).save("references")
    references = ReferenceSet.load("references", model)
    logits = remix(model, 255 - tokens[:5], references, k=2, steps=1).logits
    files.write(Path("logits"), digest(logits).encode())


class Job(NamedTuple):
    work: Callable  # -> exit code; ValueError and OSError are told in one line
    result: Callable  # what must be the same in the end
    damaged: tuple[str, ...] = ()  # files whose damage is told or mended


RUN = ("run/state.safetensors", "run/model.safetensors", "run/config.json", "book.txt")
TOKENS = "out/tokens/*.bin"
JOBS = {
    "training": Job(train, trained, (*RUN, "run/log.jsonl", TOKENS)),
    "scoring": Job(
        partial(program, eval_py, "perplexity run"),
        Path("run/perplexity-dev.json").read_text,
        (*RUN, TOKENS),
    ),
    "tokenising": Job(tokenise, tokenise, (TOKENS,)),
    "references": Job(build_references, Path("logits").read_text, ("references",)),
    "checkpoint": Job(
        lambda: Path("saved").exists() or hf.save(a_model(), "saved"),
        lambda: fingerprint(hf.load("saved")[0]),
    ),
    "answers": Job(
        partial(program, eval_py, CHOICE),
        lambda: sorted(Path("kept").read_bytes().splitlines()),
        ("kept",),
    ),
}


def prepare():
    """Write what the jobs start from into the current folder."""
    lines = [f"Story {i} tells of {i * i} foxes.\n{texts.END}\n" for i in range(300)]
    Path("book.txt").write_text("".join(lines))
    rows = []
    for i in range(12):
        choices = [f"{i}", f"{i + 1} foxes", "none", "ice"]
        rows.append(json.dumps({"question": f"{i}?", "choices": choices, "answer": i % 4}) + "\n")
    Path("questions.jsonl").write_text("".join(rows))
    hf.save(a_model(), "checkpoint")

    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.save("checkpoint/tokenizer.json")


# ---- faults


def limit_files(size: int, kill: bool):
    """No file can grow beyond a size: writing fails as on a full disk, or kills."""
    if kill:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def a_fault(rng, kind: str) -> Callable:
    """Something that happens at a random point, early ones as often as late ones."""
    if kind == "step":
        return partial(kill_at, int(10 ** rng.uniform(0, 2)))
    return partial(limit_files, int(10 ** rng.uniform(0, 5)), kind == "within a file")


# ---- damage


def cut(rng, path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(rng, path: Path):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def foreign(rng, path: Path):
    texts = ["", "[]", "{}", "5", '"text"', "[" * 100_000, "\x00\xff", '{"a": [1]}\n' * 3]
    path.write_text(rng.choice(texts), encoding="latin-1")


def remove(rng, path: Path):
    path.unlink()


def reshape(rng, path: Path):
    """Tensors of other shapes, kinds or names, or other words beside them, the checksum right."""
    tensors, about = read_tensors(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    others = [tensor[:-1], tensor[..., None], tensor.flatten(), tensor.to(torch.int32)]
    tensors |= rng.choice([*({name: other} for other in others), {"unknown": tensor}])
    if about and rng.random() < 0.3:
        words = ["5", "[]", "{}", '"six"', "[[", '[{"step": 1}]']
        about[rng.choice(sorted(about))] = rng.choice(words)
    write_tensors(path, tensors, about)


def other_kind(rng, path: Path):
    """One value of a JSON file, or of one of its lines, becomes one of another kind."""
    pieces = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(pieces))
    value = json.loads(pieces[number])
    place = value
    while True:
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if not place[key] or not isinstance(place[key], dict | list) or rng.random() < 0.2:
            break
        place = place[key]
    place[key] = rng.choice([None, "text", 5, 1e300, -1, [], {}, [None], True])
    pieces[number] = json.dumps(value)
    path.write_text("\n".join(pieces) + "\n")


def ways_to_damage(path: Path) -> list[Callable]:
    ways = [cut, foreign, remove]
    if path.suffix == ".safetensors" or path.name == "references":
        ways += [reshape, reshape]
    if path.suffix in (".json", ".jsonl"):
        ways += [other_kind, other_kind]
    return ways


# ---- nothing is lost


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """job -> the folder before it, the one after it, and its result."""
    top, done = tmp_path_factory.mktemp("jobs"), {}
    torch.set_num_threads(1)  # more would add up in another order
    with pytest.MonkeyPatch.context() as patch:
        (top / "start").mkdir()
        patch.chdir(top / "start")
        prepare()
        for name, job in JOBS.items():
            before = top / ("training" if name == "scoring" else "start")
            place = top / "place"  # where nothing is left, so that copies do not look there
            shutil.copytree(before, place)
            patch.chdir(place)
            code, said = child(job.work)
            assert code == 0, said
            done[name] = before, top / name, job.result()
            place.rename(top / name)
    return done


@pytest.fixture
def begin(states, tmp_path, monkeypatch):
    """begin(job, done) goes to a copy of the folder before a job, or after it -> its result."""

    def begun(name: str, done=False):
        before, after, result = states[name]
        folder = tempfile.mkdtemp(dir=tmp_path)
        shutil.copytree(after if done else before, folder, dirs_exist_ok=True)
        monkeypatch.chdir(folder)
        return result

    return begun


def clear(code: int, said: str) -> int:
    """There is one line of error or none, beside notes, and no traceback -> the exit code."""
    lines = [line for line in said.splitlines() if line and not line.startswith("note: ")]
    assert code in (0, 1, 2) and len(lines) == (0 if code == 0 else 1), f"{code}: {said[-600:]}"
    return code


def interrupted(rng, name: str, begin):
    """Work is cut off three times, and done again: it ends as if nothing had happened."""
    job, expected = JOBS[name], begin(name)
    for kind in ("full disk", "step", "within a file"):
        code, said = child(job.work, a_fault(rng, kind))
        if code >= 0:
            clear(code, said)
        assert kind != "full disk" or not [*Path().rglob("*.tmp")]  # it is told, and tidied up
    assert clear(*child(job.work)) == 0
    assert job.result() == expected
    assert name == "training" or not [*Path().rglob("*.tmp")]


def damaged(rng, name: str, begin):
    """Each file is damaged, and the work done again: it is mended, or told in one line."""
    begin(name, done=True)
    for path in sorted(path for names in JOBS[name].damaged for path in Path().glob(names)):
        for way in (flip, rng.choice(ways_to_damage(path))):
            expected = begin(name, done=True)
            way(rng, path)
            told = clear(*child(JOBS[name].work))
            assert told or JOBS[name].result() == expected, f"{way.__name__} {path}"


def together(rng, name: str, begin):
    """Two processes do the same at once: one of them is told, or both end well."""
    job, expected = JOBS[name], begin(name)

    def both():
        second = os.fork()
        if second == 0:
            os._exit(child(job.work)[0])
        code = clear(*child(job.work))
        return code * 10 + os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])

    code, said = child(both)
    assert code in (0, 1, 2, 10, 20), said
    assert job.result() == expected


CASES = [(damaged, name) for name in JOBS if JOBS[name].damaged]
CASES += [(what, name) for what in (interrupted, together) for name in JOBS if name != "scoring"]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        n_cases = metafunc.config.getoption("cases")
        names = [f"{what.__name__} {name}" for what, name in CASES]
        ids = [f"{names[i % len(CASES)]} {i}" for i in range(n_cases)]
        metafunc.parametrize("case", range(n_cases), ids=ids)


@pytest.mark.full
def test_work_survives(case, begin):
    """Work that is killed or done twice, and files that are damaged."""
    what, name = CASES[case % len(CASES)]
    what(random.Random(case), name, begin)


def save(step: int):
    """Save a tiny run whose norms are all `step`."""
    model = a_model()
    torch.nn.init.constant_(model.norm.weight, step)
    settings = {"model": vars(model.config), "train": {"data": "skills", "seed": 0}}
    optimizer = torch.optim.AdamW(model.parameters())
    runs.save_run(Path("run"), model, optimizer, step, settings, [{"step": step}], [])


def test_killed_at_every_step_of_a_save(tmp_path, monkeypatch):
    """What is opened is the whole last save, or the whole one before; resuming mends the files."""
    monkeypatch.setattr(os, "fsync", lambda number: None)  # it is for a loss of power
    for last_step in range(1, 60):
        monkeypatch.chdir(tempfile.mkdtemp(dir=tmp_path))
        if last_step % 2:  # else it is the first save that is cut off
            save(1)
        code, _ = child(partial(save, 2), partial(kill_at, last_step))
        if Path("run/state.safetensors").exists():
            model, _ = runs.load_run(Path("run"))
            state, about = runs.read_state(Path("run"))
            assert torch.equal(model.norm.weight, state["weight/norm.weight"])
            runs.resume(Path("run"), model, torch.optim.AdamW(model.parameters()))
            assert files.read_about(Path("run/model.safetensors"))["step"] == about["step"]
            assert f'"step": {about["step"]}' in Path("run/log.jsonl").read_text()
        if code == 0:  # the save has fewer steps
            break
    assert code == 0 and last_step > 10


def test_weights_that_do_not_fit(tmp_path, monkeypatch):
    """What is missing, unknown or of another shape is named; so are moments of another shape."""
    monkeypatch.chdir(tmp_path)
    model, state = a_model(), Path("run/state.safetensors")
    save(1)
    tensors, about = read_tensors(state)
    tensors["exp_avg/norm.weight"] = tensors["exp_avg/norm.weight"][1:]
    write_tensors(state, tensors, about)
    with refused("exp_avg/norm.weight has shape (15,)"):
        runs.resume(Path("run"), model, torch.optim.AdamW(model.parameters()))

    weights = model.state_dict()
    weights["odd"] = weights.pop("norm.weight")
    weights["embedding.weight"] = weights["embedding.weight"][1:]
    told = "embedding.weight: (255, 16), expected (256, 16); norm.weight: missing, expected (16,)"
    with refused(f"run does not fit the model: {told}", "odd: (16,), expected no such tensor"):
        runs.load_weights(model, weights, "run")


def broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


STREAMS = {
    "its reader has gone": broken_pipe,
    "closed": lambda: None,
    "full": lambda: open("/dev/full", "w"),  # noqa: SIM115
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", full(*STREAMS))
def test_output_that_cannot_be_written(name, tmp_path, monkeypatch):
    """A run ends well whatever becomes of its standard output; only a full disk is a failure."""
    monkeypatch.chdir(tmp_path)

    def work():
        sys.stdout = STREAMS[name]()
        return program(train_toy, f"--no-taste --steps 2 --batch 2 {SIZES} --context 32 --out run")

    code, said = child(work)
    full = name == "full"
    assert (code, "cannot be written" in said) == (int(full), full)
    assert runs.read_state(Path("run"))[1]["step"] == "2" and Path("run/scores.json").exists()


@pytest.mark.full
def test_names_are_taken_at_once(tmp_path):
    """Many processes that start together get a folder each; what is owned is refused to others."""
    children = []
    for _ in range(12):
        process = os.fork()
        if process == 0:
            os._exit(0 if files.new_folder(tmp_path / "out/run") else 1)
        children.append(process)
    assert [os.waitpid(process, 0)[1] for process in children] == [0] * 12
    assert len([*tmp_path.glob("out/run*")]) == 12
    run = tmp_path / "out/run"
    for _ in range(2):  # it is free again afterwards
        with files.owned_folder(run), refused("is being written to by process"):
            files.owned_folder(run).__enter__()


# ---- what was kept is not used for another content


def rewrite(path: str, old: str, new: str):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def other_weights():
    model = a_model()
    torch.nn.init.normal_(model.norm.weight)
    hf.save(model, "other")
    Path("other/model.safetensors").replace("checkpoint/model.safetensors")


FOXEN = partial(rewrite, "book.txt", "foxes", "foxen")
OTHER_TEXT = "the text is not the one of this run"
OTHER_PROMPTS = "it is about another prompts"
CHANGES = {  # what becomes another -> the job, how it becomes so, what is said or None: done anew
    "text, scored": ("scoring", FOXEN, OTHER_TEXT),
    "text, continued": ("training", FOXEN, OTHER_TEXT),
    "text, tokenised": ("tokenising", FOXEN, None),
    "settings": (
        "scoring",
        partial(rewrite, "run/config.json", '"top_k": 2', '"top_k": 1'),
        "config.json was altered",
    ),
    "weights": ("answers", other_weights, "it is about another model"),
    "questions": ("answers", partial(rewrite, "questions.jsonl", "none", "all"), OTHER_PROMPTS),
    "right answers": (
        "answers",
        partial(rewrite, "questions.jsonl", '"answer": 1', '"answer": 2'),
        OTHER_PROMPTS,
    ),
    "tokenizer": (
        "answers",
        partial(rewrite, "checkpoint/tokenizer.json", '"A": 32', '"A": 33'),
        "cannot be continued|no readable tokenizer",
    ),
}


@pytest.mark.parametrize("change", full(*CHANGES))
def test_another_content(change, begin):
    """One line names what has become another, or all is made anew."""
    name, apply, message = CHANGES[change]
    before = begin(name, done=True)
    apply()
    code, said = child(JOBS[name].work)
    assert clear(code, said) == (1 if message else 0)
    if message:
        assert any(words in said for words in message.split("|"))
    else:
        result = JOBS[name].result()
        begin(name)
        apply()
        child(JOBS[name].work)
        assert JOBS[name].result() == result != before


@pytest.mark.full
def test_another_place_is_the_same(begin, monkeypatch):
    """Only contents count: a run may be moved, and opened from where another text has the name."""
    scores = begin("scoring")
    config = Path("run/config.json")
    settings = json.loads(config.read_text())
    Path("run").rename("moved")
    os.mkdir("elsewhere")
    Path("elsewhere/book.txt").write_text("Another text\n" * 99)
    monkeypatch.chdir("elsewhere")
    Path(settings["train"]["data_file"]).parent.mkdir()
    Path("../book.txt").rename(settings["train"]["data_file"])
    assert eval_py.main(["perplexity", "../moved", "--split", "dev"]) == 0
    assert Path("../moved/perplexity-dev.json").read_text() == scores
    shutil.rmtree(Path(settings["train"]["data_file"]).parent)
    with refused(OTHER_TEXT):
        eval_py.main(["perplexity", "../moved"])


@pytest.mark.full
@pytest.mark.parametrize("name", ["scoring", "training"])
def test_runs_of_earlier_versions_open(name, begin):
    """They say nothing of their text: that is told, and they give what they gave."""
    expected = begin(name, done=True)
    for path in Path("run").glob("*.safetensors"):  # with no checksum
        tensors, about = read_tensors(path)
        about.pop("settings")
        save_file(tensors, path, about)
    settings = json.loads(Path("run/config.json").read_text())
    settings["train"].pop("content")
    Path("run/config.json").write_text(json.dumps(settings))

    code, said = child(JOBS[name].work)
    assert code == 0 and "of an earlier version" in said
    assert JOBS[name].result() == expected
    assert child(JOBS["scoring"].work)[0] == 0  # also after it was continued


class Doubting(Router):
    """A router that learns its weights as any other does, and uses half of them."""

    def scores(self, x):
        logits, probs = super().scores(x)
        return logits, probs / 2


def test_a_fingerprint_is_of_all_that_counts():
    """Weights, sizes, buffers and classes make another model; modes and copies do not."""
    plain = MoETransformer(MoEConfig())
    models = [
        plain,
        MoETransformer(MoEConfig(top_k=3)),
        MoETransformer(MoEConfig(norm_topk=True)),
        MoETransformer(MoEConfig(), Doubting),
        MoETransformer(MoEConfig()).double(),
        *(MoETransformer(MoEConfig()) for _ in range(3)),
    ]
    for model in models:
        model.load_state_dict(plain.state_dict())
    models[-1].norm.weight.data[3] += 1e-3
    models[-2].blocks[0].register_buffer("bias", torch.ones(3))
    models[-3].eval().requires_grad_(False)  # the same model
    assert len({fingerprint(model) for model in models}) == len(models) - 1
    assert fingerprint(models[-3]) == fingerprint(plain)
