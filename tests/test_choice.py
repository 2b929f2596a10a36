"""eval.py choice: its scores are those of an independent computation, and every row format is read as it is meant."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_eval import call

import eval as eval_py
import hf
from data import SkillsTask
from lab import choice
from lab.benchmarks import TASKS, Item, read_items
from lab.tasks import choose
from moe import MoEConfig, MoETransformer
from remix import ReferenceSet, remix

THREE = {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]}
ARC = {"question": "What is hot?", "choices": THREE, "answerKey": "B"}
FIVE = ARC | {"choices": {"text": list("abcde"), "label": list("12345")}, "answerKey": 4}
SCIQ = {"question": "Why not?", "correct_answer": "so", "distractor1": "no", "distractor2": "yes", "distractor3": ""}
MMLU = {"question": "1 + 1?", "subject": "maths", "choices": ["0", "1", "2", "3"], "answer": 2}
SCENE = {
    "activity_label": "Tea",
    "ctx": "A cup [x]  stands [title] It",
    "endings": ["[y] boils.", "flies."],
    "label": "1",
}
PIQA = {"goal": "Cool tea", "sol1": "blow", "sol2": "sing", "label": 0}
GAP = {"sentence": "A cup hit a jug as the _ fell.", "option1": "cup", "option2": "jug", "answer": "1"}
ROWS = {  # a task, a row of it, and what is read
    "arc": ("arc_challenge", ARC, Item("What is hot?", ["ice", "fire", "snow"], 1)),
    "arc-five": ("arc_easy", FIVE, Item("What is hot?", list("abcde"), 3)),
    "openbookqa": ("openbookqa", ARC | {"question_stem": "Hot is"}, Item("Hot is", ["ice", "fire", "snow"], 1)),
    "sciq": ("sciq", SCIQ, Item("Why not?", ["yes", "no", "so"], 2)),
    "mmlu": ("mmlu", MMLU, Item("1 + 1?", ["0", "1", "2", "3"], 2)),
    "hellaswag": ("hellaswag", SCENE, Item("Tea: A cup stands. It", ["boils.", "flies."], 1,
                  [("Tea: A cup stands. It", " boils."), ("Tea: A cup stands. It", " flies.")])),
    "piqa": ("piqa", PIQA, Item("Cool tea", ["blow", "sing"], 0)),
    "winogrande": ("winogrande", GAP, Item(GAP["sentence"], ["cup", "jug"], 0,
                   [("A cup hit a jug as the cup", " fell."), ("A cup hit a jug as the jug", " fell.")])),
}  # fmt: skip
HIDDEN = {"answerKey": "", "correct_answer": "", "answer": "", "label": "-1"}
WRONG = {"answerKey": "F", "correct_answer": 7, "answer": 7, "label": 7}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_row_formats(name, tmp_path):
    """JSON lines and parquet alike; a row that hides its answer is left out, one of another kind is named."""
    task, row, expected = ROWS[name]
    hidden, wrong = ({k: new.get(k, v) for k, v in row.items()} for new in (HIDDEN, WRONG))
    assert read_items(task, write(tmp_path / "rows.jsonl", [row, hidden])) == [expected]
    with pytest.raises(ValueError, match=r"has 1 questions of .*, but no answers"):
        read_items(task, write(tmp_path / "hidden.jsonl", [hidden]))
    for bad in (wrong, {"x": 1}, [1]):
        with pytest.raises(ValueError, match=f"row 2, is no row of {task}"):
            read_items(task, write(tmp_path / "bad.jsonl", [row, bad]))
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert read_items(task, str(tmp_path / "rows.parquet")) == [expected]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random checkpoint, with a tokenizer of bytes and some words, the letters A to E among them."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe, byte_level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    bpe.pre_tokenizer, bpe.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    options = {"initial_alphabet": byte_level.alphabet(), "special_tokens": ["<s>"], "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, **options)
    bpe.train_from_iterator(["Question: What is hot? A. B. C. D. E. Answer: A B C D E"] * 9, trainer)
    torch.manual_seed(0)
    sizes = {"context": 128, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}
    model = MoETransformer(MoEConfig(vocab_size=bpe.get_vocab_size(), **sizes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("choice") / "it"
    hf.save(model, folder)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    return folder


def rows(n):
    """n rows like those of ARC, of three, four and five choices."""
    texts = ["ice and snow", "fire", "a cup", "the jug", "tea"]
    some = [{"text": texts[: 3 + i % 3], "label": list("ABCDE")[: 3 + i % 3]} for i in range(n)]
    asked = [f"What is hot{'?' * (1 + i % 4)} {'Tea ' * (i % 7)}" for i in range(n)]
    return [{"question": asked[i], "answerKey": "ABC"[i % 3], "choices": some[i]} for i in range(n)]


def run(line, code=0):
    """eval.py as a program."""
    assert call(eval_py.main, "eval.py", line) == code


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("form", ["letters", "full"])
def test_scores_equal_transformers(form, shots, folder, tmp_path, capsys, monkeypatch):
    """Log-likelihoods and accuracies, against transformers on one text at a time; a rerun goes on where one stopped."""
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)
    file, train, out = write(tmp_path / "arc", rows(12)), write(tmp_path / "train", rows(3)), tmp_path / "answers.jsonl"
    line = f"choice --model {folder} --task arc_easy --data-file {file} --form {form} --out {out} --shots {shots}"
    monkeypatch.setattr(choice, "CHUNK", 300)  # in several batches
    run(line + f" --shots-file {train}")
    said, encode, front, expected, right = capsys.readouterr().out, hf.load(folder)[1].encode, "", [], [0, 0]
    for i, row in enumerate([*rows(shots), *rows(12)]):
        texts, text, answer = row["choices"]["text"], f"Question: {row['question']}\n", "ABC".index(row["answerKey"])
        if form == "letters":
            text += "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", texts, strict=False))
        ends = list("ABCDE")[: len(texts)] if form == "letters" else texts
        if i < shots:
            front += f"{text}Answer: {ends[answer]}\n\n"
            continue
        nats = []
        for end in ends:
            n, whole = len(encode(f"{front}{text}Answer:").ids), encode(f"{front}{text}Answer: {end}").ids
            logp = theirs(torch.tensor([whole[:-1][-128:]])).logits[0].log_softmax(-1)  # the context is 128
            nats.append(sum(logp[j - len(whole), whole[j]].item() for j in range(n, len(whole))))
        expected.append(nats)
        for k, values in enumerate((nats, [value / len(end) for value, end in zip(nats, ends, strict=True)])):
            right[k] += max(range(len(nats)), key=values.__getitem__) == answer
    first, *found = map(json.loads, out.read_text().splitlines())
    assert whole[0] == 0 and first["task"] == "arc_easy" and max(map(len, said.splitlines())) <= 100
    for one in sorted(found, key=lambda one: one["item"]):
        assert one["nats"] == pytest.approx(expected[one["item"]], abs=2e-4)
    for share in right[: 1 + (form == "full")]:
        assert f"  {share / 12:.1%}  " in said
    kept = out.read_bytes()
    out.write_bytes(kept[: len(kept) // 2])  # as if it had been stopped within a line
    run(line + f" --shots-file {train}")
    items = [json.loads(one)["item"] for one in out.read_text().splitlines()[1:]]
    assert sorted(items) == list(range(12)) and out.read_bytes().startswith(kept[: len(kept) // 3])


def test_questions_for_a_remixer(folder):
    """The letters form as single-token questions, to which the cloze task's `choose` gives the same answers."""
    items, (model, tokenizer) = [TASKS["arc_easy"].read(row) for row in rows(9)[1::3]], hf.load(folder)
    asked = choice.questions(items, tokenizer)
    nats = [choice.log_likelihoods(model, choice.rows(item, tokenizer, "letters"))[0] for item in items]
    assert choose(model, asked).tolist() == [choice.best(values) for values in nats]
    assert tokenizer.decode(asked[0].choices) == " A B C D" and asked[0].answer == items[0].answer


def test_remixing_a_checkpoint(folder, tmp_path, capsys, monkeypatch):
    """C3PO on a benchmark: base answers as `choice` does without it; a rerun goes on where one stopped, its references
    come from their file, and its report is the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choice, "BLOCK", 5)
    file, known = (
        write(tmp_path / "arc", rows(12)),
        write(tmp_path / "known", [FIVE | {"question": f"{i}?", "answerKey": 1 + i % 5} for i in range(30)]),
    )
    line = f"choice --model {folder} --task arc_easy --data-file {file}"
    run(line)
    share = re.search(r"letters +(\S+%)", capsys.readouterr().out)[1]
    line += (
        f" --references arc_challenge --reference-files {known} --core none --layers all --method ngd,oracle --steps 3"
    )
    run(line)
    said = capsys.readouterr().out
    assert re.search(r"^base +(\S+%)", said, re.M)[1] == share and "30 references" in said
    (path,), (made,) = (
        Path("out/choice").glob("*-remixed-*.jsonl"),
        Path("out/choice").glob("*-references-*.safetensors"),
    )
    kept = path.read_bytes().splitlines(keepends=True)
    assert len(kept) == 4 and made.exists()
    path.write_bytes(b"".join(kept[:2]) + kept[2][:9])  # as if it had been stopped within a line
    monkeypatch.setattr(choice.ReferenceSet, "build", None)
    run(line)
    reports = (said, capsys.readouterr().out)
    numbers = [[re.sub(r" +(ms|-+|[0-9.]+) *$", "", one).split() for one in text.splitlines()] for text in reports]
    assert numbers[0] == numbers[1]  # but for the time


def test_a_trained_model_survives_the_hub(tmp_path):
    """Trained here, saved, loaded back, re-mixed: the same numbers."""
    data = SkillsTask(0)
    model = MoETransformer(
        MoEConfig(vocab_size=data.vocab_size, d_model=16, n_layers=2, n_heads=2, n_experts=4, top_k=2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        model(*data.batch(step, 16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hf.save(model, tmp_path / "saved")
    known, asked, found = data.prompts("reference"), data.prompts("dev"), []
    for each in (model, hf.load(tmp_path / "saved")[0]):
        references = ReferenceSet.build(each, known.tokens[::20], known.labels[::20])
        found.append(remix(each, asked.tokens[::30], references))
    assert torch.equal(found[0].logits, found[1].logits) and torch.equal(found[0].pathway, found[1].pathway)
    assert not torch.equal(found[0].logits, found[0].logits_before)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("", 2, "--model is missing"),
        ("--model IT --references sciq --form full", 2, "C3PO re-mixes the token before a letter"),
        ("--model IT --references squiq", 2, "unknown benchmark 'squiq'; did you mean sciq"),
        ("--model IT --references sciq --method ngdd", 2, "unknown method 'ngdd'; did you mean ngd"),
        ("--model IT --references sciq --reference-files ARC,ARC", 2, "one for each benchmark"),
        ("--model IT --data-file ARC --references sciq --reference-files ARC", 1, "row 1, is no row of sciq"),
        ("--model IT --data-file ARC --references arc_easy --reference-files ARC --k 1", 1, "are references too"),
        ("--model IT --task arc", 2, "'arc' is not one of"),
        ("--model IT --shots -1", 2, "--shots must be at least 0"),
        ("--model IT --data-file nowhere.jsonl", 1, "no such file: nowhere.jsonl; expected rows of arc_challenge"),
        ("--model IT --data-file IT/config.json", 1, "is no readable .json"),
        ("--model IT --data-file ARC --shots 3 --shots-file ARC", 1, "--shots 3, but .* has only 2 examples"),
        ("--model nowhere --data-file ARC", 1, "nowhere is neither a folder nor a repository"),
        ("--model IT --data-file ARC --out IT/config.json", 1, "cannot be continued"),
        ("--model IT --data-file ARC --out OTHER", 1, "it is about another dtype, model, prompts, task"),
    ],
)
def test_wrong_usage(line, code, message, folder, tmp_path, capsys, monkeypatch):
    """A mistake is told in one line, and changes no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("{}\n")
    names = {"IT": folder, "ARC": write(tmp_path / "arc.jsonl", rows(2)), "OTHER": tmp_path / "other"}
    before = (folder / "config.json").read_bytes()
    run("choice " + " ".join(re.sub("^[A-Z]+", lambda m: str(names[m[0]]), word) for word in line.split()), code)
    said = capsys.readouterr().err.strip()
    assert re.search(message, said) and "\n" not in said
    assert (folder / "config.json").read_bytes() == before and (tmp_path / "other").read_text() == "{}\n"
