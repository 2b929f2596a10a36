"""Kill, fill and damage what is saved, at random points:

python -m tests.faults [N] [--first NUMBER]    N cases (none: 200), as a table of what survived

A case is drawn from its number alone: `python -m tests.faults 1 --first 17` repeats number 17.
It has survived if the work, done again, ends in the same bits as without the fault, or in one clear
line and exit code 1 or 2. A traceback, a lost run or another result has not. Each case works in a
folder of its own, in child processes that are forked, because importing torch takes seconds.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import eval as eval_py
import hf
import train_toy
from lab.tools import cli, files, texts
from lab.tools.files import digest, read_tensors, write_tensors
from moe import MoEConfig, MoETransformer
from pathways import ReferenceSet, fingerprint
from remix import remix

SIZES = "--d-model 16 --n-layers 1 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8 --context 16"
TRAIN = f"--no-taste --steps 4 --batch 4 --eval-every 2 {SIZES}"
TRAIN += " --data-file book.txt --tokenizer bytes --out run"
CHOICE = "choice --model checkpoint --task mmlu --data-file questions.jsonl --form full --out kept"


# ---- what is done, and what comes out of it


def program(module, line: str) -> int:
    """Call a script as a program -> its exit code."""
    sys.argv = [f"{module.__name__}.py", *line.split()]
    try:
        cli.program(module.main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def train() -> int:
    """Train, or continue what is there."""
    again = Path("run/state.safetensors").exists()
    return program(train_toy, "--resume run" if again else TRAIN)


def trained():
    """What a run has learnt, and what it says of it, but for the time that it took."""
    values = []
    for name in ("state", "model"):
        tensors, about = read_tensors(Path(f"run/{name}.safetensors"))
        values += [about["step"], files.tensors_digest(tensors, {})]
    for line in Path("run/log.jsonl").read_text().splitlines():
        values.append(json.loads(line)["dev"])
    return [*values, json.loads(Path("run/scores.json").read_text())]


def score() -> int:
    return program(eval_py, "perplexity run")


def scored():
    return json.loads(Path("run/perplexity-dev.json").read_text())


def tokenise() -> int:
    texts.BLOCK_SIZE = 2000  # many blocks
    texts.read_tokens("book.txt", texts.tokenizer("tinystories"))
    return 0


def tokenised():
    tokens, _ = texts.read_tokens("book.txt", texts.tokenizer("tinystories"))
    return tokens.tolist()


def tiny_model() -> MoETransformer:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}
    return MoETransformer(MoEConfig(vocab_size=256, context=512, **sizes)).eval()


def build_references() -> int:
    """Make references, or read those that are there, and re-mix by them."""
    model, tokens = tiny_model(), torch.arange(240).view(60, 4)
    if not Path("references").exists():
        labels = model(tokens).logits[:, -1].argmax(-1)
        ReferenceSet.build(model, tokens, labels).save("references")
    references = ReferenceSet.load("references", model)
    prompts = 255 - tokens[:5]
    logits = remix(model, prompts, references, k=2, steps=1).logits
    files.write(Path("logits"), digest(logits).encode())
    return 0


def save_checkpoint() -> int:
    if not Path("saved").exists():
        hf.save(tiny_model(), "saved")
    return 0


def opened():
    model, _ = hf.load("saved")
    return fingerprint(model)


def answered():
    return sorted(Path("kept").read_bytes().splitlines())


class Job(NamedTuple):
    """Work that leaves files behind."""

    work: Callable  # -> exit code; ValueError and OSError are told in one line
    result: Callable  # what must be the same in the end
    steps: int  # about so many files are opened, renamed and removed
    damaged: tuple[str, ...]  # files whose damage is told or mended


RUN = ("run/state.safetensors", "run/model.safetensors", "run/config.json", "book.txt")
JOBS = {
    "training": Job(train, trained, 80, (*RUN, "run/log.jsonl", "out/tokens/*.bin")),
    "scoring": Job(score, scored, 8, (*RUN, "out/tokens/*.bin")),
    "tokenising": Job(tokenise, tokenised, 6, ("out/tokens/*.bin",)),
    "references": Job(build_references, Path("logits").read_text, 10, ("references",)),
    "checkpoint": Job(save_checkpoint, opened, 8, ()),
    "answers": Job(lambda: program(eval_py, CHOICE), answered, 6, ("kept",)),
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
    hf.save(tiny_model(), "checkpoint")

    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.save("checkpoint/tokenizer.json")


# ---- child processes, and what happens to them


def child(work: Callable, fault: Callable = lambda: None) -> tuple[int, str]:
    """Work in a child process -> its exit code, below 0 if it was killed, and what it says."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 99
        try:
            os.dup2(writing, 2)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            fault()
            code = work()
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with open(reading, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def kill_at(step: int):
    """kill -9 this process where, so many times, files are to be written, renamed or removed."""
    events = {"os.rename", "os.remove", "os.mkdir", "os.truncate"}
    seen = []

    def hook(event, values):
        writes = event == "open" and isinstance(values[2], int) and values[2] & 3
        if writes or event in events:
            seen.append(event)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_step(rng, job: Job) -> Callable:
    """kill -9 between two steps of saving."""
    return partial(kill_at, rng.randint(1, job.steps))


def kill_at_time(rng, job: Job) -> Callable:
    """A signal that kills at once, some time after the start."""
    seconds = rng.uniform(0.001, 1.0)

    def fault():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return fault


def limit(rng) -> int:
    """A size of files, in bytes: small ones as often as large ones."""
    return int(10 ** rng.uniform(0, 5))


def kill_within_a_file(rng, job: Job) -> Callable:
    """A signal that kills where a file grows beyond a size."""
    size = limit(rng)

    def fault():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return fault


def fill_the_disk(rng, job: Job) -> Callable:
    """No file can grow beyond a size: writing fails as on a full disk."""
    size = limit(rng)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


KILLS = [kill_at_step, kill_at_time, kill_within_a_file, fill_the_disk]


# ---- damage


def cut(rng, path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(rng, path: Path):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(rng, path: Path):
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    size = min(rng.randint(1, 4096), len(content) - place)
    content[place : place + size] = bytes(size)
    path.write_bytes(content)


def foreign(rng, path: Path):
    contents = [
        "",
        "[]",
        "{}",
        "null",
        "5",
        '"text"',
        "[" * 100_000,
        "\x00\xff",
        '{"a": [1]}\n' * 3,
    ]
    path.write_text(rng.choice(contents), encoding="latin-1")


def remove(rng, path: Path):
    path.unlink()


def reshape(rng, path: Path):
    """Tensors of other shapes, kinds or names, or other words beside them, the checksum right."""
    tensors, about = read_tensors(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    changes = [tensor[:-1], tensor[..., None], tensor.flatten(), tensor.to(torch.int32), None]
    change = rng.choice(changes)
    if change is None:
        del tensors[name]
        tensors["unknown"] = tensor
    else:
        tensors[name] = change
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


def damage(rng, job: Job) -> str:
    """Damage one file that a job has left -> which, and how."""
    path = rng.choice(sorted(path for name in job.damaged for path in Path().glob(name)))
    ways = [cut, flip, flip, zero, foreign, remove]
    if path.suffix == ".safetensors" or path.name == "references":
        ways += [reshape, reshape]
    if path.suffix in (".json", ".jsonl"):
        ways += [other_kind, other_kind]
    way = rng.choice(ways)
    way(rng, path)
    return f"{way.__name__} {path}"


# ---- cases


def require_clear(code: int, said: str, codes=(0, 1, 2)):
    """One line of error or none, beside notes, and no traceback."""
    lines = [line for line in said.splitlines() if line and not line.startswith("note: ")]
    clear = code in codes and len(lines) == (0 if code == 0 else 1)
    assert clear, f"exit code {code}: {said[-600:]}"


def interrupted(rng, name: str, before: Path, expected):
    """Work is killed, up to three times, and done again: it ends as if nothing had happened."""
    job = JOBS[name]
    told = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(KILLS)
        code, said = child(job.work, kind(rng, job))
        told.append(f"{kind.__name__}: {code}")
        if code >= 0:
            require_clear(code, said)
    code, said = child(job.work)
    assert code == 0, f"{told}, then exit code {code}: {said[-600:]}"
    assert job.result() == expected, f"{told}, then another result"
    leftovers = [str(path) for path in Path().rglob("*.tmp")]
    assert not leftovers or name == "training", f"{told}, then {leftovers} stay"


def damaged(rng, name: str, before: Path, expected):
    """A file is damaged, and the work done again: it is mended, or told in one line."""
    job = JOBS[name]
    how = damage(rng, job)
    code, said = child(job.work)
    try:
        require_clear(code, said)
        assert code > 0 or job.result() == expected, "another result, silently"
    except AssertionError as error:
        raise AssertionError(f"{how}: {error}") from None


def together(rng, name: str, before: Path, expected):
    """Two processes do the same at once: one of them is told, or both end well."""
    job = JOBS[name]
    codes = []

    def both():
        second = os.fork()
        if second == 0:
            os._exit(child(job.work)[0])
        code, said = child(job.work)
        require_clear(code, said)
        return max(code, 0) * 10 + os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])

    code, said = child(both)
    assert code in (0, 1, 2, 10, 20), f"exit codes {code:02}: {said[-600:]}"
    codes.append(code)
    assert job.result() == expected, f"exit codes {code:02}, and another result"


CASES = []  # what happens, to which job, and whether it has been done before
for name in JOBS:
    if name != "scoring":
        CASES += [(interrupted, name), (interrupted, name), (together, name)]
    if JOBS[name].damaged:
        CASES += [(damaged, name), (damaged, name)]


def pristine(folder: Path) -> dict[str, tuple]:
    """For each job a folder before it and one after it, and its result."""
    folder.joinpath("start").mkdir()
    os.chdir(folder / "start")
    prepare()
    states = {}
    for name, job in JOBS.items():
        before = folder / ("training-done" if name == "scoring" else "start")
        after = folder / f"{name}-done"
        place = folder / "place"  # where nothing is left, so that copies do not look there
        shutil.copytree(before, place)
        os.chdir(place)
        code, said = child(job.work)
        assert code == 0, said
        states[name] = before, after, job.result()
        place.rename(after)
    return states


def run_case(number: int, states: dict, folder: Path) -> tuple[str, str]:
    """One case -> its kind, and what went wrong, or nothing."""
    rng = random.Random(number)
    what, name = CASES[number % len(CASES)]
    before, after, expected = states[name]
    place = folder / f"case-{number}"
    shutil.copytree(after if what is damaged else before, place)
    os.chdir(place)
    kind = f"{name} {what.__name__}"
    try:
        what(rng, name, before, expected)
    except Exception as error:
        return kind, f"{type(error).__name__}: {error}"
    finally:
        os.chdir(folder)
        shutil.rmtree(place)
    return kind, ""


def run_cases(numbers) -> tuple[dict[str, Counter], list[str]]:
    """Many cases -> for each kind how many survived, and what went wrong in others."""
    here = Path.cwd()
    counts, faults = defaultdict(Counter), []
    with tempfile.TemporaryDirectory() as temporary:
        try:
            states = pristine(Path(temporary))
            for number in numbers:
                kind, fault = run_case(number, states, Path(temporary))
                counts[kind][not fault] += 1
                if fault:
                    faults.append(f"case {number}, {kind}: {fault}")
        finally:
            os.chdir(here)
    return counts, faults


def main(argv) -> int:
    """Run the cases, print the table -> the exit code."""
    parser = cli.Parser("tests.faults", description=__doc__)
    parser.add_argument("n", nargs="?", type=int, default=200, help="cases [200]")
    parser.add_argument("--first", type=int, default=0, help="number of the first [0]")
    flags = parser.parse(argv)
    torch.set_num_threads(1)
    start = time.time()
    counts, faults = run_cases(range(flags["first"], flags["first"] + flags["n"]))
    rows = [(kind, count[True], count.total()) for kind, count in sorted(counts.items())]
    rows.append(("all", flags["n"] - len(faults), flags["n"]))
    print(*faults, sep="\n")
    print(cli.table(rows, header=["what happened", "survived", "cases"]))
    print(f"\n{time.time() - start:.0f} s; a case again: python -m tests.faults 1 --first NUMBER")
    return int(bool(faults))


if __name__ == "__main__":
    cli.program(main)
