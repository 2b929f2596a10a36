"""Known by content: what a run, references, answers or a cache depend on, and held-out that is."""

import itertools
import json
import os
from pathlib import Path

import faults
import pytest
import torch
from by_hand import full, refused
from safetensors.torch import save_file

import eval as eval_py
import hf
import train_toy
from data import TextData
from lab.checkpoints.benchmarks import Item, not_asked
from lab.remixing import arena
from lab.tools import files, texts
from lab.tools.texts import BLOCK_SIZE, END, LONGEST, documents, encode, tokenizer
from moe import MoEConfig, MoETransformer, Router
from pathways import ReferenceSet, fingerprint

# ---- a change of what a result depends on is told, or the result is made anew


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The jobs of tests/faults.py: job -> the folder before it, the one after it, its result."""
    here = Path.cwd()
    yield faults.pristine(tmp_path_factory.mktemp("jobs"))
    os.chdir(here)


def rewrite(path: str, old: str, new: str):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def other_weights():
    for path in Path("checkpoint").glob("*.safetensors"):
        path.unlink()
    model = faults.tiny_model()
    torch.nn.init.normal_(model.norm.weight)
    hf.save(model, "other")
    Path("other/model.safetensors").rename("checkpoint/model.safetensors")


def older_weights():
    """Files as earlier versions wrote them: with neither checksums nor what the run was made of."""
    for name in ("state", "model"):
        path = Path(f"run/{name}.safetensors")
        tensors, about = files.read_tensors(path)
        about.pop("settings")
        save_file(tensors, path, about)
    settings = json.loads(Path("run/config.json").read_text())
    settings["train"].pop("content")
    Path("run/config.json").write_text(json.dumps(settings))


CHANGES = {  # what becomes another -> the job, how it becomes so, what is said or None: done anew
    "text, scored": (
        "scoring",
        lambda: rewrite("book.txt", "foxes", "foxen"),
        "the text is not the one of this run",
    ),
    "text, continued": (
        "training",
        lambda: rewrite("book.txt", "foxes", "foxen"),
        "the text is not the one of this run",
    ),
    "text, tokenised": ("tokenising", lambda: rewrite("book.txt", "foxes", "ants"), None),
    "settings": (
        "scoring",
        lambda: rewrite("run/config.json", '"top_k": 2', '"top_k": 1'),
        "config.json was altered",
    ),
    "weights": ("answers", other_weights, "it is about another model"),
    "questions": (
        "answers",
        lambda: rewrite("questions.jsonl", "none", "all"),
        "it is about another prompts",
    ),
    "right answers": (
        "answers",
        lambda: rewrite("questions.jsonl", '"answer": 1', '"answer": 2'),
        "it is about another prompts",
    ),
    "tokenizer": (
        "answers",
        lambda: rewrite("checkpoint/tokenizer.json", '"A": 32', '"A": 33'),
        "cannot be continued|no readable tokenizer",
    ),
}


@pytest.mark.parametrize("change", ["text, scored", *full(*list(CHANGES)[1:])])
def test_another_content(change, states, tmp_path, monkeypatch):
    """What was kept is not used for another content: one line names it, or all is made anew."""
    name, apply, message = CHANGES[change]
    job, (before, after, expected) = faults.JOBS[name], states[name]
    for folder, source in (("used", after), ("fresh", before)):
        faults.shutil.copytree(source, tmp_path / folder)
    monkeypatch.chdir(tmp_path / "used")
    apply()
    code, said = faults.child(job.work)
    faults.require_clear(code, said)
    if message:
        assert code == 1 and any(words in said for words in message.split("|"))
        return
    assert code == 0
    result = job.result()
    monkeypatch.chdir(tmp_path / "fresh")
    apply()
    assert faults.child(job.work)[0] == 0
    assert job.result() == result != expected


def test_a_text_that_grows_is_not_kept(tmp_path, monkeypatch):
    """Tokens of a text that changes while it is read have no name: they are made again."""
    path = tmp_path / "book.txt"
    path.write_text(stories(0, 50))

    def growing(path):
        for document in documents(path):
            yield document
            path.write_text(stories(0, 60))

    with monkeypatch.context() as patch:
        patch.setattr(texts, "documents", growing)
        with refused("changed while it was tokenised"):
            texts.read_tokens(path, tokenizer("bytes"), tmp_path / "tokens")
    assert not [*tmp_path.glob("tokens/*")]
    tokens, _ = texts.read_tokens(path, tokenizer("bytes"), tmp_path / "tokens")
    assert (tokens == 256).sum() == 60


@pytest.mark.full
def test_another_place_is_the_same(train, call, monkeypatch, undrawn):
    """Only contents count: a run may be moved, and opened from where another text has the name."""
    Path("book.txt").write_text(stories(0, 300))
    assert train("--data-file book.txt --context 16 --out run") == 0
    assert call(eval_py, "perplexity run") == 0
    scores = Path("run/perplexity-dev.json").read_text()
    Path("run").rename("moved")
    os.mkdir("elsewhere")
    Path("elsewhere/book.txt").write_text(stories(7, 99))
    monkeypatch.chdir("elsewhere")
    assert eval_py.main(["perplexity", "../moved", "--split", "dev"]) == 0
    assert Path("../moved/perplexity-dev.json").read_text() == scores
    Path("../book.txt").rename("../other.txt")
    with refused("the text is not the one of this run"):
        eval_py.main(["perplexity", "../moved"])


@pytest.mark.full
@pytest.mark.parametrize("name", ["scoring", "training"])
def test_runs_of_earlier_versions_open(name, states, tmp_path, monkeypatch):
    """They say nothing of their text: that is told, and they give what they gave."""
    job, (_, after, expected) = faults.JOBS[name], states[name]
    faults.shutil.copytree(after, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    older_weights()
    code, said = faults.child(job.work)
    assert code == 0 and "of an earlier version" in said
    assert job.result() == expected
    assert faults.child(faults.score)[0] == 0  # also after it was continued


class Doubting(Router):
    """A router that learns its weights as any other does, and uses half of them."""

    def scores(self, x):
        logits, probs = super().scores(x)
        return logits, probs / 2


def test_a_fingerprint_is_of_all_that_counts():
    """Weights, sizes, buffers and classes make another model; modes, names and copies do not."""
    torch.manual_seed(0)
    models = {"as it is": MoETransformer(MoEConfig())}
    weights = models["as it is"].state_dict()
    for name, config, router in (
        ("sizes", MoEConfig(top_k=3), Router),
        ("norm", MoEConfig(norm_topk=True), Router),
        ("router", MoEConfig(), Doubting),
        ("one weight", MoEConfig(), Router),
        ("buffer", MoEConfig(), Router),
    ):
        models[name] = MoETransformer(config, router)
        models[name].load_state_dict(weights)
    models["one weight"].norm.weight.data[3] += 1e-3
    models["buffer"].blocks[0].register_buffer("bias", torch.ones(3))
    models["numbers"] = MoETransformer(MoEConfig()).double()
    models["numbers"].load_state_dict(weights)
    assert len({fingerprint(model) for model in models.values()}) == len(models)

    same = MoETransformer(MoEConfig()).eval().requires_grad_(False)
    same.load_state_dict(weights)
    assert fingerprint(same) == fingerprint(models["as it is"])


def test_references_of_another_router(tmp_path):
    """References know the class of the routers, not only their weights."""
    model = MoETransformer(MoEConfig()).eval()
    ReferenceSet.build(model, torch.arange(40).view(10, 4), torch.arange(10)).save(tmp_path / "r")
    other = MoETransformer(MoEConfig(), Doubting).eval()
    other.load_state_dict(model.state_dict())
    assert len(ReferenceSet.load(tmp_path / "r", model).labels) == 10
    with refused("was made by another model"):
        ReferenceSet.load(tmp_path / "r", other)


@pytest.mark.full
def test_a_changed_router_is_told(train, call, capsys, undrawn):
    """A run with a router of one's own remembers its file."""
    code = "from moe import Router\n\nclass Mine(Router):\n    pass\n"
    Path("mine_rule.py").write_text(code)
    assert train("--router mine_rule:Mine --out run") == 0
    assert call(eval_py, "perplexity run --router mine_rule:Mine") == 0
    assert "changed" not in capsys.readouterr().err
    Path("mine_rule.py").write_text(f"{code}# another\n")
    assert call(eval_py, "perplexity run --router mine_rule:Mine") == 0
    assert "the file of mine_rule:Mine has changed since run was trained" in capsys.readouterr().err


# ---- held-out that is held out


def stories(first: int, last: int) -> str:
    return "".join(f"Story {i} of {i * i} foxes\n{END}\n" for i in range(first, last))


REPEATED = {  # training text, validation text -> documents of train, dev, test
    "nothing": (stories(0, 60), stories(60, 160), (60, 20, 80)),
    "validation": (stories(0, 60), stories(50, 160), (60, 12, 88)),
    "within it": (stories(0, 60), stories(60, 110) * 2, (60, 20, 60)),
    "the text itself": (stories(0, 100) + stories(0, 10) + stories(100, 110), None, (108, 1, 9)),
}


@pytest.mark.parametrize(("text", "valid", "sizes"), REPEATED.values(), ids=REPEATED)
def test_documents_that_are_held_out(text, valid, sizes, tmp_path, capsys):
    """No document stands in two splits: those that would are left out, and it is said."""
    paths = [tmp_path / "text", tmp_path / "valid"]
    paths[0].write_text(text)
    if valid:
        paths[1].write_text(valid)
    given = [str(paths[0]), str(paths[1]) if valid else None]
    task = TextData(*given, "bytes", context=8, cache=str(tmp_path))
    held = {split: [row.tobytes() for row in task.documents(split)] for split in task.rows}
    for first, second in itertools.combinations(held, 2):
        assert not {*held[first]} & {*held[second]}
    assert tuple(len(rows) for rows in held.values()) == sizes
    assert ("left out" in capsys.readouterr().err) == (sizes != (60, 20, 80))


def test_questions_that_are_asked_are_no_examples(capsys):
    """However they are spaced, and their choices are ordered."""
    asked = [Item("What is  hot?", ["ice", "fire"], 1)]
    others = [Item("What is hot?", ["ice", "snow"], 0), Item("Why?", ["ice", "fire"], 0)]
    assert not_asked([Item("what is hot?", ["Fire", "ice"], 0), *others], asked, "x") == [1, 2]
    assert "1 of 3 x are asked, too" in capsys.readouterr().err


def test_references_that_are_asked_are_left_out(train, undrawn, monkeypatch, capsys):
    """Where a story of the training text begins as one that is asked, it does not help."""
    lines = []
    for i in range(400):
        word = ("fox", "dog", "cat", "bed")[(i + i // 7) % 4]
        lines.append(
            f"{i % 390 if i < 390 else i % 3} friends saw the {word}{'!' * (i > 389)}\n{END}\n"
        )
    Path("tales.txt").write_text("".join(lines))
    assert train("--steps 1 --data-file tales.txt --context 32 --out run") == 0
    made = arena.arena_of(Path("run"), "test")
    asked = {tuple(row) for row in arena.as_tuples(made.tokens, made.lengths)}
    helping = arena.as_tuples(made.references.tokens, made.references.lengths)
    assert not asked & {*helping}
    assert "references of run are asked, too" in capsys.readouterr().err


# ---- texts as people have them


def test_a_book_is_split_by_place(tmp_path, capsys):
    """One long document, or few or short ones: all of it is used once, and it is said."""
    path = tmp_path / "book.txt"
    book = "".join(f"line {i}\n" for i in range(500))
    path.write_text(book)
    task = TextData(str(path), None, "bytes", context=16, cache=str(tmp_path))
    tokens = [token for row in task.rows.values() for token in row.tolist()]
    assert bytes(tokens[:-1]) == book.strip().encode() and tokens[-1] == 256
    assert [len(row) for row in task.rows.values()] == [3951, 87, 352]
    assert "book.txt is split by place" in capsys.readouterr().err
    assert len(task.problems("dev").labels) == 0


UGLY = {  # bytes -> the documents that they hold
    "byte-order mark": (b"\xef\xbb\xbf<|endoftext|>\n\xef\xbb\xbfone\n", ["one"]),
    "line ends": (b"one\r\ntwo\r\n<|endoftext|>\r\nthree\rfour", ["one\ntwo", "three\nfour"]),
    "blanks": (b" " * (BLOCK_SIZE + 5) + b"one" + b"\n" * BLOCK_SIZE + b"<|endoftext|>\n", ["one"]),
    "long lines": (b"word " * BLOCK_SIZE, ["word " * (BLOCK_SIZE - 1) + "word"]),
    "many lines": (b"word\n" * BLOCK_SIZE, ["word\n" * (BLOCK_SIZE - 1) + "word"]),
}


@pytest.mark.parametrize(("content", "expected"), UGLY.values(), ids=UGLY)
def test_texts_as_people_have_them(content, expected, tmp_path):
    """Marks, line ends and blanks are no text; a document of any size comes in blocks."""
    (tmp_path / "text").write_bytes(content)
    found, text = [], ""
    for block, ended in documents(tmp_path / "text"):
        assert len(block) <= BLOCK_SIZE + 2**20
        text += block
        if ended:
            found.append(text)
            text = ""
    assert [words.rstrip() for words in found] == expected


def test_only_long_runs_are_cut():
    """Runs of millions of alike characters are tokenised; what has none keeps its tokens."""
    encoding = tokenizer()
    plain = "".join(f"{i} foxes, {'!' * (i % 50)}\n{' ' * (i % 99)}" for i in range(9000))
    assert encode(encoding, plain) == encoding.encode_ordinary(plain)
    for character in " \n-a7é":
        text = f"so {character * (LONGEST * 40)} it is"
        assert encoding.decode(encode(encoding, text)) == text


# ---- one owner


def test_names_are_taken_at_once(tmp_path):
    """Many processes that start together get a folder each; what is owned is refused to others."""
    for _ in range(12):
        if os.fork() == 0:
            os._exit(0 if files.new_folder(tmp_path / "out/run") else 1)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(12)]
    assert codes == [0] * 12 and len([*tmp_path.glob("out/run*")]) == 12
    with files.owned_folder(tmp_path / "out/run"):
        code, said = faults.child(lambda: train_toy.main(["--resume", str(tmp_path / "out/run")]))
        assert code == 1 and "holds no run" in said
        with refused("is being written to by process"), files.owned_folder(tmp_path / "out/run"):
            pass
    with files.owned_folder(tmp_path / "out/run"):
        pass
