"""eval.py and the scores: what is printed is what an independent computation finds."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as eval_py
import train_toy
from cartesian import CartesianConfig, CartesianTransformer, counts
from data import END, TextData
from lab import checkpoint, cli
from lab.stats import interval, share_interval
from lab.tasks import accuracy, choose, cloze, evaluate, most_frequent, places, specialisation
from moe import MoEConfig, MoETransformer

SMALL = "--no-remix --steps 2 --batch 2 --eval-every 2 "
SMALL += "--d-model 16 --n-layers 2 --n-heads 2 --n-experts 4 --top-k 2 --d-expert 8"
LAST = ["fox", "dog", "cat", "bed", "sun", "tree", "home", "day"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own, with a text of 300 little stories."""
    monkeypatch.chdir(tmp_path)
    lines = [
        f"Once upon a time there were {i} friends. They saw the {LAST[(3 * i + i // 8) % 8]}.\n{END}\n"
        for i in range(300)
    ]
    (tmp_path / "tales.txt").write_text("".join(lines), encoding="utf-8")


def call(main, name, line):
    """A script with these flags, as a program -> its exit code."""
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *line.split()])
        cli.run(main)
    return stop.value.code


def text_run():
    """Train a tiny model on the tales -> its folder."""
    assert call(train_toy.main, "train_toy.py", f"{SMALL} --data-file tales.txt --context 32 --out out/tales") == 0
    return checkpoint.Path("out/tales")


def test_perplexity_is_the_mean_over_all_tokens(capsys):
    """Nats, perplexity and bits per byte of a split, against a plain loop over its windows, one at a time."""
    folder = text_run()
    assert call(eval_py.main, "eval.py", "perplexity --split test") == 0
    scores = json.loads((folder / "perplexity-test.json").read_text())
    model, _ = checkpoint.load(folder)
    data = TextData("tales.txt", context=32)
    nats = n_bytes = n_tokens = 0
    for tokens, targets in zip(*data.held_out("test", None), strict=True):
        logits = model(tokens[None]).logits[0]
        nats -= logits.log_softmax(-1)[range(32), targets].sum().item()
        n_tokens += 32
        texts = data.encoding.decode_tokens_bytes([t for t in targets.tolist() if t != data.encoding.eot_token])
        n_bytes += sum(map(len, texts))
    assert scores["loss"] == pytest.approx(nats / n_tokens, rel=5e-4)  # a near-tie may route otherwise
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=5e-4)
    assert f"{scores['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_routing_counts_every_visit(capsys):
    """Loads sum to k, co-activation is a conditional share, and the table and both figures come out."""
    folder = text_run()
    assert call(eval_py.main, "eval.py", f"routing {folder}") == 0
    model, data = checkpoint.load(folder)[0], TextData("tales.txt", context=32)
    special = specialisation(model, data, "dev", n_kinds=100)
    tokens, _ = data.held_out("dev")
    routing = model(tokens).routing
    visits = F.one_hot(routing[1].experts, 4).sum(1).float()  # (N, E)
    np.testing.assert_allclose(special.load[1], visits.mean(0), atol=1e-6)
    assert special.load.sum(1) == pytest.approx([2, 2])  # every token visits top_k experts
    both = (visits[:, 0] * visits[:, 3]).sum() / visits[:, 0].sum()
    assert special.together[1, 0, 3] == pytest.approx(both.item())
    the = tokens.flatten() == data.encoding.encode_single_token(" the")
    np.testing.assert_allclose(special.shares[1, special.kinds.index("' the'")], visits[the].mean(0), atol=1e-6)
    entropy = torch.distributions.Categorical(routing[1].probs).entropy().mean() / math.log(4)
    assert special.entropy[1] == pytest.approx(entropy.item(), rel=1e-4)
    text = capsys.readouterr().out
    assert "layer 1" in text and "takes most of" in text
    assert (folder / "together.png").stat().st_size > 10_000 and (folder / "routing-dev.json").exists()


def test_routers_have_places():
    """Layers are counted as blocks, the dense ones too; a block with two routers has A and B."""
    assert places(MoETransformer(MoEConfig(n_layers=3, dense_layers=(0,)))) == ["layer 1", "layer 2"]
    two = CartesianTransformer(CartesianConfig(n_layers=2, dense_layers=(0,)))
    assert places(two) == ["layer 1 A", "layer 1 B"] and len(two.routers()) == 2


def test_two_routers_in_reports(capsys):
    """A Cartesian run: A and B in its report and tables; robustness and sharing, refused where they have no answer; on
    the skills task its size is the default's."""
    two = "--steps 1 --batch 2 --preset cartesian --n-layers 2 --d-model 32 --n-experts 4 --d-expert 32 --d-shared 32"
    assert call(train_toy.main, "train_toy.py", f"{two} --data-file tales.txt --context 32 --out out/c") == 0
    for command in ("routing", "robustness", "sharing"):
        assert call(eval_py.main, "eval.py", f"{command} out/c") == 0 and Path(f"out/c/{command}-dev.json").exists()
    text = capsys.readouterr().out
    assert text.count("layer 1 B") == 3 and "noise 0.5" in text and "share neither" in text
    assert counts(train_toy.fresh({"preset": "cartesian"})[1])[0] == pytest.approx(
        MoETransformer(MoEConfig()).n_params(), rel=0.01
    )
    assert call(train_toy.main, "train_toy.py", f"{SMALL} --out out/moe") == 0
    assert call(eval_py.main, "eval.py", "sharing out/moe") == 1
    assert "composes no experts" in capsys.readouterr().err


def test_sample_streams_what_generate_returns(capsys):
    """A story comes token by token, the same that `generate` would return at once, and never says its end mark."""
    folder = text_run()
    capsys.readouterr()
    assert call(eval_py.main, "eval.py", f"sample {folder} --prompt Once --temperature 0 --tokens 12") == 0
    told = capsys.readouterr().out.split("parameters\n\n")[1]
    model, data = checkpoint.load(folder)[0], TextData("tales.txt", context=32)
    start = [data.encoding.eot_token, *data.encoding.encode_ordinary("Once")]
    new = model.generate(torch.tensor([start]), 12, stop=data.encoding.eot_token)[0].tolist()
    assert told == "Once" + data.encoding.decode([t for t in new if t != data.encoding.eot_token]) + "\n"
    assert call(eval_py.main, "eval.py", f"sample {folder} --prompt {'long' * 99}") == 1
    assert "the prompt has" in capsys.readouterr().err


def test_cloze_questions_are_fair():
    """The answer is the story's last word, the choices differ and end other stories, places are shuffled, and the
    prompt stops before the word."""
    data = TextData("tales.txt", context=32)
    questions = cloze(data, "test")
    word = data.encoding.decode_single_token_bytes
    for question, story in zip(questions, data.documents("test"), strict=True):
        text = data.encoding.decode(story.tolist()[:-1])
        choices = [word(choice).decode().strip() for choice in question.choices]
        assert text.endswith(f" {choices[question.answer]}.") and len(set(choices)) == 4 and set(choices) <= set(LAST)
        assert data.encoding.decode(question.prompt[1:]) + f" {choices[question.answer]}." == text
    places = np.bincount([question.answer for question in questions], minlength=4)
    assert len(questions) >= 20 and (places > 0).all()
    assert cloze(data, "test") == questions  # the same questions for every model


def test_choose_takes_the_most_probable_word():
    """Batched over prompts of different lengths, the choice is that of one prompt at a time; a model that knows the
    answer gets it right, and accuracy counts it."""
    data, model = TextData("tales.txt", context=32), MoETransformer(MoEConfig(vocab_size=2048, context=32)).eval()
    questions = [q._replace(prompt=q.prompt[i % 5 :]) for i, q in enumerate(cloze(data, "test"))]
    alone = [model(torch.tensor([q.prompt])).logits[0, -1, q.choices].argmax().item() for q in questions]
    assert choose(model, questions).tolist() == alone
    assert accuracy(np.array([q.answer for q in questions]), questions) == 1
    assert accuracy(np.array([(q.answer + 1) % 4 for q in questions]), questions) == 0
    endings = [data.encoding.decode(d.tolist()[:-1]).split()[-1].rstrip(".") for d in data.documents("train")]
    picked = most_frequent(data, questions)
    word = data.encoding.decode_single_token_bytes
    for question, pick in zip(questions, picked, strict=True):
        counts = [endings.count(word(choice).decode().strip()) for choice in question.choices]
        assert counts[pick] == max(counts)


def test_evaluation_leaves_the_model_as_it_was():
    """Scores are deterministic whatever the mode, and training goes on in training mode."""
    data = TextData("tales.txt", context=32)
    model = MoETransformer(MoEConfig(vocab_size=2048, context=32, dropout=0.5)).train()
    assert evaluate(model, data, "dev") == evaluate(model, data, "dev") and model.training


def test_intervals():
    """Textbook values: Student's t on three numbers, Wilson's interval of 8 out of 10."""
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(ValueError, match="at least 2 values"):
        interval([1.0])


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("", 2, "expected a command: perplexity, routing, sample, cloze"),
        ("rooting", 2, "did you mean routing?"),
        ("routing --spilt test", 2, "unknown flag --spilt; did you mean --split?"),
        ("perplexity", 1, "no run in out/: train one with python train_toy.py"),
        ("perplexity nowhere", 1, "nowhere holds no run"),
    ],
)
def test_wrong_usage(capsys, line, code, message):
    """A mistake is told in one line."""
    assert call(eval_py.main, "eval.py", line) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_wrong_runs(capsys):
    """A dense model has no routing, a skills model tells no stories: both are said plainly."""
    assert call(train_toy.main, "train_toy.py", f"{SMALL} --model dense --out out/dense") == 0
    assert call(eval_py.main, "eval.py", "routing") == 1
    assert "is a dense model" in capsys.readouterr().err
    assert call(eval_py.main, "eval.py", "sample") == 1
    assert "knows no text" in capsys.readouterr().err
    assert call(eval_py.main, "eval.py", "perplexity out/dense --split test") == 0  # the skills task has scores, too
    assert "accuracy" in capsys.readouterr().out
