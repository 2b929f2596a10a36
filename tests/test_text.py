"""Text: tokens that stand for every byte, splits that do not leak, files and downloads that fail
clearly."""

from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from by_hand import refused

from cartesian import TOY
from data import TextData
from lab.tools import texts
from lab.tools.texts import END, tinystories, tokenizer, train_tokenizer
from moe import MoEConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def stories(tmp_path):
    """Fifty small documents, not all of them ASCII."""
    path = tmp_path / "stories.txt"
    lines = [f"Story {i}: the naïve café 🦊.\n{END}\n" for i in range(50)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def load(stories, tmp_path):
    """Opens a text, the fifty stories or another, in windows of 16 tokens that are bytes."""

    def opened(path=stories, valid=None, name="bytes", context=16, seed=0):
        valid = str(valid) if valid else None
        return TextData(str(path), valid, name, context, seed, cache=tmp_path / "tokens")

    return opened


# ---------------------------------------------------------------------------------- tokenizers

AWKWARD = ["", "  ", "a  ", "\n", "\r\n\r\n x", "I'm 's's'LL it'll", "½²Ⅷ٣ 12a3", "#\u0301\u00ad"]
AWKWARD += ["\x00\x1c\x85", "naïve 🦊👩‍👩‍👧", "\U0010ffff\ufeff", f"text {END}\n"]


@pytest.mark.parametrize(("name", "size"), [("tinystories", 2048), ("bytes", 257)])
def test_decoding_gives_the_text_back(name, size):
    """Every text has tokens, even one with an end-of-text mark inside, and they decode to it."""
    encoding = tokenizer(name)
    assert encoding.n_vocab == size and encoding.eot_token == size - 1
    for text in AWKWARD:
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text
        assert name != "bytes" or tokens == list(text.encode())


@pytest.mark.full
def test_training_a_tokenizer(stories, tmp_path, monkeypatch):
    """Training learns frequent words and not END, and has the bytes first."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(texts, "RANKS", tmp_path / "ranks")
    texts.RANKS.write_bytes(train_tokenizer(stories, 280))
    encoding = tokenizer("tinystories")
    tokens = [encoding.decode_single_token_bytes(token) for token in range(280)]
    assert sorted(tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert {b"Story", b" caf\xc3\xa9"} <= set(tokens) and b"endoftext" not in tokens


@pytest.mark.full
@pytest.mark.skipif(not SHARED.exists(), reason="needs TinyStories in ../shared/data")
def test_the_shipped_ranks_can_be_made_again():
    """Training on the sample of TinyStories gives the shipped file, byte for byte."""
    pytest.importorskip("tokenizers")
    assert train_tokenizer(SHARED / "tinystories" / "train.txt") == texts.RANKS.read_bytes()


def test_tokenizers_by_name(monkeypatch):
    """An unknown name is answered with the nearest; a failed download is told in one line."""
    for name, near in {"gpt-2": "gpt2", "tinystory": "tinystories"}.items():
        with refused(f"did you mean {near}"):
            tokenizer(name)

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with refused("TIKTOKEN_CACHE_DIR", error=OSError):
        tokenizer("gpt2")


# ----------------------------------------------------------------------------- splits, batches


def test_text_batches(load, stories):
    """Targets are the tokens that follow; a batch depends on (seed, step) alone; the splits hold
    every byte once."""
    text = load(seed=1)
    tokens, targets = text.batch(0, 8)
    assert tokens.shape == targets.shape == (8, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, load(seed=1).batch(0, 8)[0])
    assert not torch.equal(tokens, text.batch(1, 8)[0])
    whole = np.concatenate([text.rows[split] for split in ("train", "dev", "test")])
    without_ends = bytes(whole[whole < 256].astype(np.uint8))
    assert without_ends == stories.read_bytes().replace(f"\n{END}\n".encode(), b"")


@pytest.mark.parametrize(("held_back", "dev"), [(5, 1), (2499, 500), (3000, 500)])
def test_dev_comes_first(load, tmp_path, held_back, dev):
    """Of a validation text the first 500 documents, or the first fifth, are dev, the rest test."""
    valid = tmp_path / "valid.txt"
    lines = [f"Document number {i}\n{END}\n" for i in range(held_back)]
    valid.write_text("".join(lines), encoding="utf-8")
    text = load(valid=valid)
    assert len(text.documents("train")) == 50 and len(text.documents("dev")) == dev
    for i, row in enumerate(text.documents("dev") + text.documents("test")):
        assert row[-1] == 256
        assert text.encoding.decode(row[:-1].tolist()) == f"Document number {i}"
    assert i == held_back - 1


def test_whole_splits(load):
    """most=None gives as many windows as fit without overlap: nothing is scored twice."""
    for context in (1, 7, 16):
        text = load(context=context)
        text.rows["test"] = np.arange(110)  # tokens that tell their place
        targets = text.held_out("test", most=None)[1].flatten().tolist()
        assert len(set(targets)) == len(targets) == 109 // context * context
        assert targets[-1] == 109
        assert len(text.held_out("test", most=2)[0]) == 2


@pytest.mark.parametrize("name", ["bytes", "tinystories"])
def test_bits_per_byte(load, name):
    """The bytes of the tokens of a split are those of its text; END counts none."""
    text = load(name=name)
    for split, row in text.rows.items():
        documents = [text.encoding.decode(row[:-1].tolist()) for row in text.documents(split)]
        n_bytes = sum(len(document.encode()) for document in documents)
        assert int(text.token_bytes[row.astype(np.int64)].sum()) == n_bytes


def test_presets_start_from_the_toy():
    """On text the sizes that presets start from are those of cartesian.py."""
    sizes = vars(MoEConfig()) | TextData.settings | TextData.preset_sizes
    assert {name: sizes[name] for name in TOY} == TOY


# ------------------------------------------------------------------------------- files of tokens


def test_tokenised_once(load, stories, tmp_path, monkeypatch):
    """The second time tokens come from their file, even for a copied text."""
    first = load().rows["train"]
    assert first.dtype == np.uint16
    copy = tmp_path / "copy.txt"
    copy.write_bytes(stories.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(texts, "write_tokens", None)
        assert np.array_equal(load(copy).rows["train"], first)
    copy.write_text(f"{stories.read_text('utf-8')}One more\n{END}\n", encoding="utf-8")
    load(copy)  # another text, and another tokenizer, have files of their own
    load(name="tinystories")
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_documents_of_any_line_ends(tmp_path):
    """END ends a document only where it is alone on a line; \\r\\n is a line end, and the last END
    may be missing, however the blocks fall in which the file is read."""
    path, long = tmp_path / "text.txt", "x" * (2**20 - 8)
    text = f"{long}\n{END}\r\n a {END}\n{END} b\r\n{END} \n{END}\n\n{END}\nlast"
    path.write_bytes(text.encode())
    documents = [(long, True), (f"a {END}\n{END} b", True), ("last", True)]
    assert list(texts.documents(path)) == documents


BAD = {  # message -> the content of a text file, if there is one
    "no such text file: ": None,
    "bad.txt (0 bytes) holds no text": b"",
    "has 12 tokens; a context of 16 needs 17": b"One long text",
    "bad.txt is not UTF-8: invalid start byte 0xff; convert it": b"good\xff\xfebad",
    "has 1 tokens; a context of 16": f"too short\n{END}\n".encode() * 9,
}


@pytest.mark.full
@pytest.mark.parametrize("message", BAD)
def test_bad_text(load, tmp_path, message):
    """A text that cannot be learnt from is refused, and leaves no half file."""
    path = tmp_path / "bad.txt"
    if BAD[message] is not None:
        path.write_bytes(BAD[message])
    with refused(message):
        load(path)
    assert "a context of 16" in message or not list(tmp_path.glob("tokens/*"))


# ------------------------------------------------------------------------------------- downloads


def test_download(monkeypatch):
    """The training text comes first, then the validation text."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, repo_type: names)
    names = ("TinyStories-train.txt", "TinyStories-valid.txt")
    assert tinystories() == [("roneneldan/TinyStories", name) for name in names]


def test_failed_download(monkeypatch):
    """A download that fails is told in one line, with what to do."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "nowhere")
    hint = "check the network, or use --data-file"
    with refused("could not be downloaded", hint, error=OSError):
        tinystories()
