"""eval.py choice: scores are those of an independent computation, rows are read as meant."""

import gzip
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from by_hand import full, refused
from children import child
from pretended import PretendedDevice, move

import hf
from lab.checkpoints import choice, remixed
from lab.checkpoints.benchmarks import BENCHMARKS, Item, not_asked, read_items
from lab.checkpoints.questions import as_problems, make_prompts, text_pairs
from lab.checkpoints.tokenizer import read_tokenizer
from lab.remixing.arena import Arena
from lab.remixing.contest import compete
from lab.remixing.methods import METHODS
from lab.scores.cloze import answer_questions
from lab.tools.files import read_about
from lab.tools.kinds import one_of
from moe import MoEConfig, MoETransformer
from pathways import ReferenceSet, Tail, prompts, references
from remix import RemixConfig

# ---- rows of benchmarks

ARC = {
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
SHORT = ARC | {"question": "Hot?"}
SCIQ = {
    "question": "Why not?",
    "correct_answer": "so",
    "distractor1": "no",
    "distractor2": "yes",
    "distractor3": "",
}
MMLU = {"question": "1 + 1?", "choices": ["0", "1", "2", "3"], "answer": 2}
SCENE = {
    "activity_label": "Tea",
    "ctx": "A cup [x]  stands [title] It",
    "endings": ["[y] boils.", "flies."],
    "label": "1",
}
START = "Tea: A cup stands. It"
GAP = {
    "sentence": "A cup hit a jug as the _ fell.",
    "option1": "cup",
    "option2": "jug",
    "answer": "1",
}
AS_CUP = [("A cup hit a jug as the cup", " fell."), ("A cup hit a jug as the jug", " fell.")]
ENDINGS = [(START, " boils."), (START, " flies.")]
ROWS = {  # benchmark -> a row of it, and what is read
    "arc_challenge": (ARC, Item("What is hot?", ["ice", "fire", "snow"], 1)),
    "openbookqa": (
        {"question_stem": "Hot is", "choices": ARC["choices"], "answerKey": "C"},
        Item("Hot is", ["ice", "fire", "snow"], 2),
    ),
    "sciq": (SCIQ, Item("Why not?", ["yes", "no", "so"], 2)),
    "mmlu": (MMLU, Item("1 + 1?", ["0", "1", "2", "3"], 2)),
    "hellaswag": (SCENE, Item(START, ["boils.", "flies."], 1, ENDINGS)),
    "winogrande": (GAP, Item(GAP["sentence"], ["cup", "jug"], 0, AS_CUP)),
}
HIDDEN = {"answerKey": "", "correct_answer": "", "answer": "", "label": "-1"}
WRONG = {"answerKey": "F", "correct_answer": 7, "answer": 7, "label": 7}


FIRE = ["ice", "fire", "snow"]
ORIGINAL = [{"text": text, "label": letter} for text, letter in zip(FIRE, "ABC", strict=True)]
OTHER_FORMS = {  # as the authors gave them out: name of the file, benchmark, row, what is read
    "arc's own": ("x.jsonl", "arc_easy", {"stem": "Hot is", "choices": ORIGINAL}, FIRE),
    "openbookqa's own": ("x.jsonl.gz", "openbookqa", {"stem": "Hot is", "choices": ORIGINAL}, FIRE),
    "letters in mmlu": ("x.json", "mmlu", MMLU | {"answer": "C"}, MMLU["choices"]),
    "sciq's array": ("x.json", "sciq", SCIQ, ["yes", "no", "so"]),
    "two distractors": (
        "x.json.gz",
        "sciq",
        {key: text for key, text in SCIQ.items() if text},
        ["yes", "no", "so"],
    ),
}


@pytest.mark.parametrize("form", full(*OTHER_FORMS))
def test_other_forms(form, tmp_path):
    """Rows are read in the form that their authors chose, lines or an array, packed or not."""
    name, benchmark, row, choices = OTHER_FORMS[form]
    if "stem" in row:
        row = {"id": 7, "question": row, "answerKey": "C"}
    content = json.dumps(row) if "jsonl" in name else json.dumps([row], indent=1)
    path = tmp_path / name
    path.write_bytes(content.encode())
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    (item,) = read_items(benchmark, str(path))
    assert (item.choices, item.answer) == (choices, 2)


def test_other_keys(tmp_path):
    """A row of another kind is told with the keys that were expected, and those that it has."""
    path = write(tmp_path / "rows.jsonl", [{"stem": "Hot?", "options": ["ice", "fire"]}])
    expected = "expected question, choices, answer; found stem, options"
    with pytest.raises(ValueError, match=f"row 1, is no row of mmlu: {expected}$"):
        read_items("mmlu", path)
    Path(path).with_suffix(".gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"is no readable \.gz"):
        read_items("mmlu", str(Path(path).with_suffix(".gz")))


def test_splits():
    """Examples come from a split that is not scored; MMLU has none that is called train."""
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.solved == ("validation" if name == "mmlu" else "train")
        assert benchmark.solved != benchmark.split


def test_questions_that_are_asked_are_no_examples(capsys):
    """However they are spaced, and their choices are ordered."""
    asked = [Item("What is  hot?", ["ice", "fire"], 1)]
    others = [Item("What is hot?", ["ice", "snow"], 0), Item("Why?", ["ice", "fire"], 0)]
    assert not_asked([Item("what is hot?", ["Fire", "ice"], 0), *others], asked, "x") == [1, 2]
    assert "1 of 3 x are asked, too" in capsys.readouterr().err


def write(path, rows) -> str:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def changed(row, values):
    return {key: values.get(key, value) for key, value in row.items()}


@pytest.mark.parametrize("name", ["arc_challenge", *full(*list(ROWS)[1:])])
def test_row_formats(name, tmp_path):
    """A row that hides its answer is left out, one of another kind is named."""
    row, expected = ROWS[name]
    path = tmp_path / "rows.jsonl"
    hidden = changed(row, HIDDEN)
    assert read_items(name, write(path, [row, hidden])) == [expected]
    with refused("has 1 questions of ", "but no answers"):
        read_items(name, write(path, [hidden]))
    for bad in (changed(row, WRONG), {"x": 1}, [1]):
        with refused(f"row 2, is no row of {name}"):
            read_items(name, write(path, [row, bad]))
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert read_items(name, str(tmp_path / "rows.parquet")) == [expected]


# ---- a tiny checkpoint that reads words


def rows(n):
    """Rows like those of ARC, of three, four and five choices."""
    texts = ["ice and snow", "fire", "a cup", "the jug", "tea"]
    made = []
    for i in range(n):
        n_choices = 3 + i % 3
        choices = {"text": texts[:n_choices], "label": list("ABCDE")[:n_choices]}
        question = f"What is hot{'?' * (1 + i % 4)} {'Tea ' * (i % 7)}"
        made.append({"question": question, "answerKey": "ABC"[i % 3], "choices": choices})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint; its tokens are bytes and some words, the letters A to E among them."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    options = {"initial_alphabet": byte_level.alphabet(), "special_tokens": ["<s>", "</s>"]}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)
    text = "Question: What is hot? A. B. C. D. E. Answer: A B C D E"
    bpe.train_from_iterator([text] * 9, trainer)

    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}
    model = MoETransformer(MoEConfig(vocab_size=bpe.get_vocab_size(), context=128, **sizes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("choice") / "checkpoint"
    hf.save(model, folder)
    bpe.save(str(folder / "tokenizer.json"))
    settings = '{"add_bos_token": true, "bos_token": "<s>"}'
    (folder / "tokenizer_config.json").write_text(settings)
    return folder


LETTERS = """<s>Question: What is hot?
A. ice
B. fire
C. snow
Answer: B

Question: Why not?
A. yes
B. no
C. so
Answer: C"""


def test_prompts(folder):
    """What the model reads, to the letter, and what is scored: the ends of the choices."""
    tokenizer = hf.load(folder)[1]
    shot, item = ROWS["arc_challenge"][1], ROWS["sciq"][1]

    def texts(form, **options):
        """The text that is read for the last choice, and its end that is scored."""
        prompt = make_prompts(item, tokenizer, form, **options)[-1]
        option = prompt.options[-1]
        end = [token for _, token in option]
        places = [place for place, _ in option]
        n = len(prompt.tokens)
        assert places == list(range(n - len(end), n))
        read = tokenizer.decode(prompt.tokens + end[-1:], skip_special_tokens=False)
        return read, tokenizer.decode(end)

    assert texts("letters", shots=[shot]) == (LETTERS, " C")
    read, end = texts("full", shots=[shot])
    assert read == "<s>Question: What is hot?\nAnswer: fire\n\nQuestion: Why not?\nAnswer: so"
    assert end == " so"


AROUND = ["plain", "begun", "ended", "both", "in two steps", "like BERT", "like RoBERTa"]


def around(kind):
    """A post-processor of the library tokenizers, which puts tokens around every text."""
    processors = pytest.importorskip("tokenizers").processors
    start, end = ("<s>", 0), ("</s>", 1)
    single = {"begun": ["<s>", "$A"], "ended": ["$A", "</s>"], "both": ["<s>", "$A", "</s>"]}
    single["in two steps"] = single["both"]
    template = processors.TemplateProcessing(
        single=single.get(kind, ["$A"]), special_tokens=[start, end]
    )
    others = {
        "like BERT": lambda: processors.BertProcessing(end, start),
        "like RoBERTa": lambda: processors.RobertaProcessing(end, start),
        "in two steps": lambda: processors.Sequence([processors.ByteLevel(), template]),
    }
    return others[kind]() if kind in others else template


@pytest.mark.parametrize("form", ["letters", "full"])
@pytest.mark.parametrize("kind", ["plain", *full(*AROUND[1:])])
def test_prompts_in_every_context(kind, form, folder, tmp_path, capsys):
    """The beginning token, then as much of the end of the text as fits; no end token, whether the
    tokenizer comes from a folder or as it is. What is cut is counted."""
    plain, raw = hf.load(folder)[1], hf.load(folder)[1]
    plain.post_processor = around("plain")
    raw.post_processor = around(kind)
    raw.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path, 284)
    ends = kind not in ("plain", "begun")
    assert ("ends every text with ['</s>']: left out" in capsys.readouterr().err) == ends
    before = [] if kind in ("plain", "ended") else [0]
    assert read.encode("hot").ids == before + plain.encode("hot").ids

    item = ROWS["sciq"][1]
    texts = text_pairs(item, form)
    for context in range(1, 60):
        expected = []
        for text, end in texts:
            whole = plain.encode(text + end).ids
            n_scored = len(whole) - len(plain.encode(text).ids)
            room = context - len(before)
            n_cut = max(0, len(whole) - 1 - room)
            if n_cut >= len(whole) - n_scored:  # nothing of the question is left
                expected = None
                break
            expected.append((before + whole[n_cut:-1], whole[-n_scored:], n_cut))
        for tokenizer in (raw, read):
            if expected is None:
                with refused(f"does not fit into a context of {context} tokens"):
                    make_prompts(item, tokenizer, form, context=context)
                continue
            found = []
            for prompt in make_prompts(item, tokenizer, form, context=context):
                for option in prompt.options:
                    n, scored = len(prompt.tokens), [token for _, token in option]
                    assert [place for place, _ in option] == list(range(n - len(scored), n))
                    found.append((prompt.tokens, scored, prompt.n_cut))
            assert found == expected


def padded_by(*tokens):
    """Special tokens behind the vocabulary; the tokenizer pads with the first."""

    def change(tokenizer):
        number = tokenizer.get_vocab_size()
        tokenizer.add_special_tokens(list(tokens))
        tokenizer.enable_padding(pad_id=number, pad_token=tokens[0], length=99)

    return change


def begun_by(token):
    """A special token behind the vocabulary, which begins all texts."""

    def change(tokenizer):
        tokenizer.add_special_tokens([token])
        processors = pytest.importorskip("tokenizers").processors
        special = [(token, tokenizer.token_to_id(token))]
        template = processors.TemplateProcessing(single=[token, "$A"], special_tokens=special)
        tokenizer.post_processor = template

    return change


def unknown_by(token):
    """A special token behind the vocabulary, which stands for what is not in it."""

    def change(tokenizer):
        tokenizer.add_special_tokens([token])
        tokenizer.model.unk_token = token

    return change


BEHIND = {  # tokens behind the vocabulary -> what is said of them
    "one": (padded_by("<pad>"), "<pad> is behind the model's 284 tokens: left out"),
    "two": (padded_by("<pad>", "<mask>"), "<mask>, <pad> is behind the model's 284 tokens"),
    "named": (lambda tokenizer: tokenizer.add_tokens(["<pad>"]), "<pad> is behind the model's"),
    "for unknown words": (unknown_by("<unk>"), None),
    "a word": (lambda tokenizer: tokenizer.add_tokens(["fire"]), None),
    "before all texts": (begun_by("<pad>"), None),
}


@pytest.mark.parametrize("which", full(*BEHIND))
def test_tokens_behind_the_vocabulary(which, folder, tmp_path, capsys):
    """One that no text makes is left out, and that is said; others are refused."""
    change, told = BEHIND[which]
    tokenizer = hf.load(folder)[1]
    tokenizer.post_processor = around("plain")
    expected = tokenizer.encode("fire and ice").ids
    change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    if told is None:
        with refused("tokenizer.json", "the model"):
            read_tokenizer(tmp_path, 284)
        return
    read = read_tokenizer(tmp_path, 284)
    assert told in capsys.readouterr().err
    assert read.encode("fire and ice").ids == expected
    assert max(read.encode("<pad> and <mask>").ids) < 284


LONG = ARC | {"question": "What is hot? " * 40}
TOLD = {  # asked, references -> what is said of them
    "a long question": ([LONG, ARC], [], "1 of 2 questions are longer than the context: their b"),
    "a hidden answer": ([ARC, ARC | {"answerKey": ""}], [], "1 of 2 questions of arc_easy have no"),
    "long references": ([ARC], [LONG, SHORT, SHORT], "1 of 3 references are longer than the con"),
    "a known answer": ([ARC], [ARC, SHORT, SHORT], "1 of 3 references are asked, too: left out"),
}


@pytest.mark.parametrize("what", full(*TOLD))
def test_what_is_not_used_is_told(what, folder, tmp_path, monkeypatch, capsys):
    """Whatever of the rows is cut or left out is counted."""
    monkeypatch.chdir(tmp_path)
    asked, solved, message = TOLD[what]
    flags = ["--model", str(folder), "--task", "arc_easy"]
    flags += ["--data-file", write(tmp_path / "rows", asked)]
    if solved:
        flags += ["--references", "arc_easy", "--k", "1", "--steps", "1"]
        flags += ["--reference-files", write(tmp_path / "solved", solved)]
    assert choice.main(flags) == 0
    assert f"note: {message}" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("form", ["letters", "full"])
def test_scores_equal_transformers(form, folder, flags, capsys, monkeypatch):
    """Log-likelihoods are those of transformers on one prompt at a time; a rerun continues."""
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.load(folder)[1]
    monkeypatch.setattr(choice, "MOST_TOKENS", 300)  # in several batches
    out = Path("answers.jsonl")
    flags = [*flags[:6], "--form", form, "--out", str(out)]
    assert choice.main(flags) == 0
    report = capsys.readouterr().out

    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    nats = {line["item"]: line["nats"] for line in lines}
    n_right = n_right_per_byte = 0
    for i, row in enumerate(rows(12)):
        item = BENCHMARKS["arc_easy"].read(row)
        expected = []
        for prompt in make_prompts(item, tokenizer, form, context=128):
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt.tokens])).logits[0]
            log_probs = logits.log_softmax(-1)  # (T, V)
            for option in prompt.options:
                places, tokens = zip(*option, strict=True)
                expected.append(log_probs[places, tokens].sum().item())
        assert nats[i] == pytest.approx(expected, abs=2e-4)
        pairs = zip(expected, item.choices, strict=True)
        per_byte = [value / len(text) for value, text in pairs]
        n_right += expected.index(max(expected)) == item.answer
        n_right_per_byte += per_byte.index(max(per_byte)) == item.answer
    assert f"  {n_right / 12:.1%}  " in report
    assert form == "letters" or f"  {n_right_per_byte / 12:.1%}  " in report

    # As if it had been stopped within a line.
    kept = out.read_bytes()
    out.write_bytes(kept[: len(kept) // 2])
    assert choice.main(flags) == 0
    assert capsys.readouterr().out == report
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert sorted(line["item"] for line in lines) == list(range(12))


def test_letters_as_problems(folder):
    """As single-token problems the letters get the answers that their log-likelihoods give."""
    model, tokenizer = hf.load(folder)
    items = [BENCHMARKS["arc_easy"].read(row) for row in rows(9)]
    prompts = [make_prompts(item, tokenizer, "letters")[0] for item in items]
    problems = as_problems(prompts, items, model.config.vocab_size)
    nats = choice.log_likelihoods(model, prompts)
    moved, _ = hf.load(folder)
    with PretendedDevice():
        move(moved)
        there = choice.log_likelihoods(moved, prompts)
    for ours, theirs in zip(there, nats, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    expected = [problems.options[i, values.index(max(values))] for i, values in enumerate(nats)]
    assert answer_questions(model, problems).tolist() == expected
    assert tokenizer.decode(problems.options[1].tolist()) == " A B C D A"
    assert problems.labels[1] == problems.options[1, items[1].answer]


@pytest.fixture
def flags(folder, tmp_path, monkeypatch):
    """Six flags to score twelve questions, six to re-mix them by thirty solved ones."""
    monkeypatch.chdir(tmp_path)
    solved = []
    for i in range(30):
        solved.append(ARC | {"question": f"{i}{'?' * (i % 9)}", "answerKey": "ABC"[i % 3]})
    scoring = ["--model", str(folder), "--task", "arc_easy"]
    scoring += ["--data-file", write(tmp_path / "rows", rows(12))]
    remixing = ["--references", "arc_challenge", "--steps", "2"]
    return [*scoring, *remixing, "--reference-files", write(tmp_path / "solved", solved)]


def test_remixing_a_checkpoint(flags, capsys, monkeypatch):
    """Base answers as it does without C3PO. A rerun continues, and says the same."""
    monkeypatch.setattr(remixed, "BLOCK", 5)
    choice.main(flags[:6])
    share = re.search(r"letters +(\S+%)", capsys.readouterr().out)[1]

    def report():
        """What is printed, but for the column of times."""
        assert choice.main([*flags, "--method", "ngd,oracle"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [re.sub(r" +(ms|-+|[0-9.]+) *$", "", line).split() for line in lines]

    first = report()
    assert ["base", share] in first
    assert "30 references, " in " ".join(first[0])
    (path,) = Path("out/choice").glob("*-remixed-*.jsonl")
    assert len(list(Path("out/choice").glob("*-references-*.safetensors"))) == 1

    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # as if it had been stopped
    monkeypatch.setattr(ReferenceSet, "build", None)  # their file is read instead
    assert report() == first


@pytest.mark.full
def test_references_are_known_by_content(folder, flags, tmp_path, monkeypatch):
    """Other questions that are asked need no other references; another model or dtype does."""

    def reference_files():
        return set(Path("out/choice").glob("*-references-*.safetensors"))

    choice.main(flags)
    first = reference_files()
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceSet, "build", None)
        choice.main([*flags, "--limit", "3", "--task", "arc_challenge"])
    choice.main([*flags, "--dtype", "bfloat16"])
    shutil.copytree(folder, tmp_path / "checkpoint")
    model, _ = hf.load(folder)
    with torch.no_grad():
        model.norm.weight[0] += 1
    hf.save(model, tmp_path / "saved")
    shutil.copy(tmp_path / "saved/model.safetensors", tmp_path / "checkpoint")
    choice.main([*flags, "--model", str(tmp_path / "checkpoint")])
    assert len(reference_files()) == 3
    assert first < reference_files()


@pytest.mark.full
def test_references_after_a_kill(flags, monkeypatch):
    """A build that is killed half way goes on where it was, and ends in the same set."""
    monkeypatch.setattr(prompts, "MOST_TOKENS", 150)
    monkeypatch.setattr(references, "KEEP_SECONDS", 0)
    calls, read, last_call = [], Tail.read, math.inf

    def counted(*given):
        calls.append(0)
        if len(calls) == last_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*given)

    monkeypatch.setattr(Tail, "read", counted)
    choice.main(flags)
    n_calls = len(calls)
    (path,) = Path("out/choice").glob("*-references-*.safetensors")
    expected = read_about(path)  # with the checksum of all tensors
    shutil.rmtree("out")

    calls.clear()
    last_call = 4
    assert child(partial(choice.main, flags))[0] == -signal.SIGKILL
    assert not path.exists()
    assert path.with_suffix(".part").exists()
    last_call = math.inf
    choice.main(flags)
    assert len(calls) == n_calls - 3
    assert read_about(path) == expected
    assert not path.with_suffix(".part").exists()


def test_nothing_is_read_twice(folder, flags, monkeypatch):
    """Base and all methods share what they read of prompts and neighbours; answers are the same."""
    read, hashed = [], []
    cut, digest = Tail.cut, references.digest

    def counted_cut(tail, tokens, lengths):
        for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            read.append(tuple(row[:length]))
        return cut(tail, tokens, lengths)

    def counted_digest(*values):
        hashed.append(len(values) == 1)  # a weight
        return digest(*values)

    monkeypatch.setattr(Tail, "cut", counted_cut)
    monkeypatch.setattr(references, "digest", counted_digest)
    monkeypatch.setattr(remixed, "BLOCK", 5)
    methods = ["--method", "ngd,kernel_regression,oracle"]
    choice.main([*flags, *methods])
    assert len(read) == len(set(read)) >= 12
    assert sum(hashed) == len(list(hf.load(folder)[0].parameters()))


@pytest.mark.parametrize("method", ["ngd", *full("kernel_regression", "oracle")])
def test_shared_work_changes_nothing(method, folder):
    """With prefixes of prompts kept for all methods, each answers as it does by itself."""
    model, tokenizer = hf.load(folder)
    items = [BENCHMARKS["arc_easy"].read(row) for row in rows(9)]
    asked = [make_prompts(item, tokenizer, "letters")[0] for item in items]
    tokens, lengths, labels, options, *_ = as_problems(asked, items, model.config.vocab_size)
    solved = [tokens[i, : lengths[i]].flip(0) for i in range(9)]
    known = ReferenceSet.build(model, solved, labels, options)
    known.correct[:] = True
    arena = Arena(model, tokens, labels, known, RemixConfig(batch=4), lengths, options)
    names = ["base", one_of("method", method, METHODS)]
    alone = dict(compete([arena], names))
    together = dict(compete([replace(arena, prefixes={})], names))
    for name, (outcome,) in alone.items():
        for ours, theirs in zip(together[name][0][:3], outcome[:3], strict=True):
            assert (ours == theirs).all()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["scoring", "re-mixing"])
def test_two_processes(kind, flags, run_program, tmp_path):
    """Two processes share the questions: the same table, files and kept answers as of one."""
    flags = [*(flags if kind == "re-mixing" else flags[:6]), "--threads", "1"]
    program = Path(__file__).with_name("choice_in_small_blocks.py")

    def outcome(processes):
        """What is printed and kept, but for times."""
        shutil.rmtree("out", ignore_errors=True)
        printed = run_program(program, flags, processes)
        answers = {}
        for path in Path("out/choice").glob("*.jsonl"):
            for line in path.read_text().splitlines()[1:]:
                entry = json.loads(line)
                answers[entry["item"]] = str(entry["nats"])[:12]
        table = re.sub(r" +(ms|-+|[0-9.]+)\n", "\n", printed)
        return table, sorted(path.name for path in Path("out/choice").iterdir()), answers

    assert outcome(processes=2) == outcome(processes=1)


RIGHT = "--data-file rows --references arc_easy --reference-files others"
MISTAKES = {  # the flags behind --model, and what is said of them
    "--references sciq --form full": "C3PO re-mixes the token before a letter",
    "--references squiq": "unknown benchmark 'squiq'; did you mean sciq",
    "--references sciq --method ngdd": "unknown method 'ngdd'; did you mean ngd",
    "--references sciq --reference-files a,b": "one for each benchmark",
    "--shots-file rows": "--shots-file does nothing without --shots",
    "--reference-limit 9": "--reference-limit does nothing without --references",
    "--method ngd": "--method does nothing without --references",
    "--k 3": "--k does nothing without --references",
    "--shots -1": "shots is -1; it must be at least 0",
    "--threads 0": "threads is 0; it must be at least 1",
    "--data-file nowhere": "no such file: nowhere; expected rows of arc_challenge",
    "--data-file noise": "is no readable ",
    "--data-file rows --shots 3 --shots-file rows": "--shots 3, but rows has only 0 other examples",
    "--data-file rows --out noise": "cannot be continued",
    "--data-file rows --out other": "it is about another model, prompts, task",
    "--data-file rows --references arc_easy --reference-files rows": "no references are left",
    "--data-file rows --references sciq --reference-files nowhere": "no such file: nowhere",
    f"{RIGHT} --layers last:9": "unknown critical layers 'last:9'",
    f"{RIGHT} --core 9": "core is 9, but there are 4 experts",
    f"{RIGHT} --k 1 --embedding hidden:9": "unknown embedding 'hidden:9'",
    f"{RIGHT} --k 3": "k is 3, but there are 2 references",
    f"{RIGHT} --k 1": "GB to work with, and cpu has 0.00 GB free: take a larger machine",
}


@pytest.mark.full
@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, folder, tmp_path, monkeypatch):
    """A mistake is told in one line, and changes no file."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows", rows(2))
    write(tmp_path / "others", rows(4)[2:])
    Path("noise").write_text("[")
    Path("other").write_text("{}\n")
    if "--out" not in flags:
        monkeypatch.setattr(hf, "read_entries", None)  # it is told before the weights are read
        monkeypatch.setattr(hf, "room", lambda device: 10_000)
    with refused(MISTAKES[flags]):
        choice.main(["--model", str(folder), *flags.split()])
    assert Path("noise").read_text() == "["
    assert Path("other").read_text() == "{}\n"
