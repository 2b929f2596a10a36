"""eval.py and the scores: what is printed is what an independent computation finds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as eval_py
import train_toy
from cartesian import CartesianConfig, CartesianTransformer
from data import TextData
from lab.remixing import arena
from lab.scores.cloze import answer_questions, most_frequent, share_right
from lab.scores.evaluation import router_names
from lab.scores.specialisation import specialisation
from lab.tools import figures, runs
from lab.tools.texts import END
from moe import MoEConfig, MoETransformer

LAST = ["fox", "dog", "cat", "bed", "sun", "tree", "home", "day"]


@pytest.fixture
def tales(tmp_path):
    """A text of 300 little stories."""
    lines = []
    for i in range(300):
        word = LAST[(3 * i + i // 8) % 8]
        lines.append(f"Once upon a time there were {i} friends. They saw the {word}.\n{END}\n")
    (tmp_path / "tales.txt").write_text("".join(lines), encoding="utf-8")
    return TextData(str(tmp_path / "tales.txt"), context=32)


@pytest.fixture
def run(tales, train, undrawn):
    """The folder of a tiny model that has learnt the tales."""
    assert train("--steps 2 --data-file tales.txt --context 32 --out out/tales") == 0
    return Path("out/tales")


def test_perplexity_is_the_mean_over_all_tokens(run, tales, call, capsys):
    """Nats, perplexity and bits per byte are those of a plain loop over the windows."""
    assert call(eval_py, "perplexity --split test") == 0
    scores = json.loads((run / "perplexity-test.json").read_text())
    assert f"{scores['bits_per_byte']:.4f}" in capsys.readouterr().out
    model, _ = runs.load_run(run)
    nats = n_bytes = n_tokens = 0
    for tokens, targets in zip(*tales.held_out("test", None), strict=True):
        logits = model(tokens[None]).logits[0]
        nats -= logits.log_softmax(-1)[range(32), targets].sum().item()
        n_tokens += 32
        words = [token for token in targets.tolist() if token != tales.encoding.eot_token]
        n_bytes += len(tales.encoding.decode_bytes(words))
    close = {"rel": 5e-4}  # a near-tie may route otherwise
    assert scores["loss"] == pytest.approx(nats / n_tokens, **close)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, **close)


def test_routing_counts_every_visit(run, tales, call, capsys):
    """Loads, shares of a kind and entropy are those of a plain count."""
    assert call(eval_py, f"routing {run}") == 0
    text = capsys.readouterr().out
    assert "layer 1" in text and "share of a kind that visits it" in text
    assert (run / "routing.png").exists() and (run / "routing-dev.json").exists()

    model, _ = runs.load_run(run)
    special = specialisation(model, tales, "dev", n_kinds=100)
    tokens, _ = tales.held_out("dev")
    routing = model(tokens).routing[1]
    visits = F.one_hot(routing.experts, 4).sum(1).float()  # (N, E)
    np.testing.assert_allclose(special.load[1], visits.mean(0), atol=1e-6)
    the = tokens.flatten() == tales.encoding.encode_single_token(" the")
    shares = special.shares[1, special.kinds.index("' the'")]
    np.testing.assert_allclose(shares, visits[the].mean(0), atol=1e-6)
    entropy = torch.distributions.Categorical(routing.probs).entropy().mean() / math.log(4)
    assert special.entropy[1] == pytest.approx(entropy.item(), rel=1e-4)


def test_routing_figure_holds_with_64_experts():
    """Some experts are named, not all on top of each other; bars are the means of the rows."""
    shares = np.random.default_rng(0).random((3, 12, 64))
    kinds = [f"' word{i}'" for i in "abcdefghijkl"]
    fig = figures.routing_figure(shares, kinds, ["layer 0", "layer 1", "layer 2"], "64")
    bars, shown = fig.axes[0], fig.axes[2]
    assert len(bars.patches) == 64 and len(shown.get_xticklabels()) == 10
    heights = sorted(bar.get_height() for bar in bars.patches)
    np.testing.assert_allclose(heights, sorted(100 * shares[0].mean(0)))
    assert shown.get_yticklabels()[0].get_text() == "worda"


def test_routers_have_places():
    """Layers are counted as blocks, dense ones too; a block with two routers has A and B."""
    moe = MoETransformer(MoEConfig(n_layers=3, dense_layers=(0,)))
    assert router_names(moe) == ["layer 1", "layer 2"]
    two = CartesianTransformer(CartesianConfig(n_layers=2, dense_layers=(0,)))
    assert router_names(two) == ["layer 1 A", "layer 1 B"]


@pytest.mark.full
def test_two_routers_in_reports(tales, call, capsys):
    """A Cartesian run has A and B in its report and tables, and every command works on it."""
    sizes = "--n-layers 2 --d-model 32 --n-experts 4 --d-expert 32 --d-shared 32"
    text = "--data-file tales.txt --context 32"
    flags = f"--steps 1 --batch 2 --preset cartesian {sizes} {text} --out out/c"
    assert call(train_toy, flags) == 0
    for command in ("routing", "robustness", "sharing"):
        assert call(eval_py, f"{command} out/c") == 0
        assert Path(f"out/c/{command}-dev.json").exists()
    text = capsys.readouterr().out
    assert text.count("layer 1 B") == 3 and "noise 0.5" in text and "share neither" in text


def test_sample_shows_what_generate_returns(run, tales, call, capsys, complaint):
    """A story comes token by token, the same that `generate` returns, without its end mark."""
    capsys.readouterr()
    assert call(eval_py, f"sample {run} --prompt Once --temperature 0 --tokens 12") == 0
    shown = capsys.readouterr().out.split("parameters\n\n")[1]
    model, _ = runs.load_run(run)
    end = tales.encoding.eot_token
    prompt = [end, *tales.encoding.encode_ordinary("Once")]
    tokens = model.generate(torch.tensor([prompt]), 12, stop=end)[0].tolist()
    story = tales.encoding.decode([token for token in tokens if token != end])
    assert shown == f"Once{story}\n"
    assert call(eval_py, f"sample {run} --prompt {'long' * 99}") == 1
    assert "the prompt has" in complaint()
    assert call(eval_py, f"sample {run} --split test") == 2  # it looks at no split
    capsys.readouterr()
    assert call(eval_py, f"sample {run} --prompt Once --temperature 0 --tokens 999") == 0
    fits = f"the context of 32 tokens has room for {32 - len(prompt)}: no more are added"
    assert complaint() == f"note: {fits}"


def test_cloze_questions_are_fair(tales):
    """The answer is the story's last word, the others end other stories, places are shuffled, and
    the prompt stops before the word."""
    questions, decode = tales.problems("test"), tales.encoding.decode
    stories = [decode(story.tolist()[:-1]) for story in tales.documents("test")]
    for i, story in enumerate(stories):
        prompt = decode(questions.tokens[i, 1 : questions.lengths[i]].tolist())
        word = decode([int(questions.labels[i])])
        assert f"{prompt}{word}." == story
        choices = {decode([token]).strip() for token in questions.options[i].tolist()}
        assert word.strip() in choices <= set(LAST) and len(choices) == 4
    place = (questions.options == questions.labels[:, None]).int().argmax(1)
    assert len(stories) == len(place) >= 20 and (place.bincount(minlength=4) > 0).all()
    again = tales.problems("test")  # the same questions for every model
    assert torch.equal(again.options, questions.options)


def test_long_stories_are_told(tales, tmp_path, capsys):
    """A story that does not fit into the context loses its beginning, and that is counted."""
    whole = tales.problems("test")
    assert "longer than" not in capsys.readouterr().err
    short = TextData(str(tmp_path / "tales.txt"), context=int(whole.lengths.max()) - 1)
    questions = short.problems("test")
    n_long = int((whole.lengths > short.context).sum())
    told = f"{n_long} of {len(whole.labels)} stories of test are longer than the context, "
    assert told in capsys.readouterr().err
    for i, length in enumerate(whole.lengths):
        start = max(0, int(length) - short.context)
        kept = questions.tokens[i, : questions.lengths[i]]
        assert torch.equal(kept, whole.tokens[i, start:length])


def test_cloze_answers(tales):
    """A batch of prompts of many lengths has the answers of one prompt at a time; the baseline
    takes the word that ends most training stories."""
    model = MoETransformer(MoEConfig(vocab_size=2048, context=32)).eval()
    questions = tales.problems("test")
    lengths = questions.lengths - torch.arange(len(questions.lengths)) % 5
    questions = questions._replace(lengths=lengths)
    answers = answer_questions(model, questions)
    endings = [tales.encoding.decode(row.tolist()[-3:-2]) for row in tales.documents("train")]
    for i, options in enumerate(questions.options):
        logits = model(questions.tokens[i : i + 1, : lengths[i]]).logits[0, -1]
        assert answers[i] == options[logits[options].argmax()]
        counts = [endings.count(tales.encoding.decode([token])) for token in options.tolist()]
        frequent = tales.encoding.decode([int(most_frequent(questions)[i])])
        assert endings.count(frequent) == max(counts) > 0
    assert share_right(questions.labels, questions) == 1
    assert share_right(questions.labels[:2] - 1, questions) == 0


def test_references_that_are_asked_are_left_out(train, undrawn, monkeypatch, capsys):
    """Where a story of the training text begins as one that is asked, it does not help."""
    lines = []
    for i in range(400):
        begin = f"{i if i < 390 else i % 3} friends saw the {LAST[(i + i // 7) % 4]}"
        lines.append(f"{begin}{'!' * (i > 389)}\n{END}\n")
    Path("tales.txt").write_text("".join(lines))
    assert train("--steps 1 --data-file tales.txt --context 32 --out run") == 0
    made = arena.arena_of(Path("run"), "test")
    asked = {tuple(row) for row in arena.as_tuples(made.tokens, made.lengths)}
    helping = arena.as_tuples(made.references.tokens, made.references.lengths)
    assert not asked & {*helping}
    assert "references of run are asked, too" in capsys.readouterr().err


@pytest.mark.full
def test_commands_that_a_run_cannot_answer(train, call, capsys, complaint, undrawn):
    """A dense model has no routing, a skills model tells no stories, a MoE composes nothing."""
    assert train("--steps 2 --model dense --out out/dense") == 0
    assert "all dense" in capsys.readouterr().out
    assert train("--steps 2 --out out/moe") == 0
    answers = {
        "routing out/dense": "is a dense model",
        "sample out/dense": "knows no text",
        "cloze out/moe": "knows no stories",
        "sharing out/moe": "composes no experts",
        "perplexity out/moe --router mine:Mine": "mine cannot be imported",
    }
    for flags, answer in answers.items():
        assert call(eval_py, flags) == 1
        assert answer in complaint()
    assert call(eval_py, "perplexity out/dense --split test") == 0
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.full
def test_remix_in_two_processes(train, run_program, tmp_path, undrawn):
    """Two processes share the methods: the same table as of one."""
    train("--out run")
    flags = ["remix", "run", "--most", "25", "--methods", "NGD,random neighbours,oracle"]
    tables = []
    for processes in (1, 2):
        printed = run_program(eval_py.__file__, flags, processes)
        report = json.loads((tmp_path / "run/remix-dev.json").read_text())
        for row in report["rows"].values():
            row.pop("ms")
        title = printed.splitlines()[0]  # below it the widths of columns depend on times
        tables.append((report["rows"], report["costs"], title))
    assert tables[0] == tables[1]
