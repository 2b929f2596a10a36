"""Text: tokens that stand for every byte, splits that do not leak, texts as people have them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from by_hand import full, refused

from cartesian import TOY
from data import TextData
from lab.tools import texts
from lab.tools.texts import BLOCK_SIZE, END, LONGEST, tinystories, tokenizer, train_tokenizer
from moe import MoEConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"


def stories(first: int, last: int) -> str:
    """Small documents, not all of them ASCII."""
    return "".join(f"Story {i}: the naïve café 🦊.\n{END}\n" for i in range(first, last))


FIFTY = stories(0, 50)


@pytest.fixture
def load(tmp_path):
    """Opens a text, fifty stories or another, in windows of 16 tokens that are bytes."""

    def opened(text=FIFTY, valid=None, name="bytes", context=16, seed=0):
        paths = []
        for place, content in (("text", text), ("valid", valid)):
            path = tmp_path / place
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(str(path) if path.exists() or place == "text" else None)
        return TextData(*paths, name, context, seed, cache=str(tmp_path / "tokens"))

    return opened


def held(text: TextData) -> dict[str, list[str]]:
    """The documents of each split, as texts. Every one ends with the end mark."""
    documents = {}
    for split in text.rows:
        rows = text.documents(split)
        assert all(row[-1] == text.encoding.eot_token for row in rows)
        documents[split] = [text.encoding.decode(row[:-1].tolist()) for row in rows]
    return documents


# ---------------------------------------------------------------------------------- tokenizers

SIZES = {"tinystories": 2048, "bytes": 257}

AWKWARD = ["", "  ", "a  ", "\n", "\r\n\r\n x", "I'm 's's'LL it'll", "½²Ⅷ٣ 12a3", "#\u0301\u00ad"]
AWKWARD += ["\x00\x1c\x85", "naïve 🦊👩‍👩‍👧", "\U0010ffff\ufeff", f"text {END}\n"]


@pytest.mark.parametrize("name", SIZES)
def test_decoding_gives_the_text_back(name):
    """Every text has tokens, even one with an end-of-text mark inside, and they decode to it."""
    encoding = tokenizer(name)
    assert encoding.n_vocab == SIZES[name] and encoding.eot_token == SIZES[name] - 1
    for text in AWKWARD:
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text
        assert name != "bytes" or tokens == list(text.encode())


@pytest.mark.full
def test_only_long_runs_are_cut():
    """Runs of millions of alike characters are tokenised; what has none keeps its tokens."""
    encoding = tokenizer()
    plain = "".join(f"{i} foxes, {'!' * (i % 50)}\n{' ' * (i % 99)}" for i in range(9000))
    assert texts.encode(encoding, plain) == encoding.encode_ordinary(plain)
    for character in " \n-a7é":
        text = f"so {character * (LONGEST * 40)} it is"
        assert encoding.decode(texts.encode(encoding, text)) == text


@pytest.mark.full
def test_training_a_tokenizer(tmp_path, monkeypatch):
    """Training learns frequent words and not END, and has the bytes first."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(texts, "RANKS", tmp_path / "ranks")
    (tmp_path / "text").write_text(FIFTY, encoding="utf-8")
    texts.RANKS.write_bytes(train_tokenizer(tmp_path / "text", 280))
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


def test_text_batches(load):
    """Targets are the tokens that follow; a batch depends on (seed, step) alone; the splits hold
    every document once."""
    text = load(seed=1)
    tokens, targets = text.batch(0, 8)
    assert tokens.shape == targets.shape == (8, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, load(seed=1).batch(0, 8)[0])
    assert not torch.equal(tokens, text.batch(1, 8)[0])
    documents = "".join(f"{row}\n{END}\n" for rows in held(text).values() for row in rows)
    assert documents == FIFTY


SPLITS = {  # training text, validation text -> documents of train, dev, test
    "nothing twice": (stories(0, 60), stories(60, 160), (60, 20, 80)),
    "a few": (FIFTY, stories(50, 55), (50, 1, 4)),
    "many": (FIFTY, stories(50, 3050), (50, 500, 2500)),
    "validation twice": (stories(0, 60), stories(50, 160), (60, 12, 88)),
    "twice within it": (stories(0, 60), stories(60, 110) * 2, (60, 20, 60)),
    "text twice": (stories(0, 100) + stories(0, 10) + stories(100, 110), None, (108, 1, 9)),
}


@pytest.mark.parametrize("name", [*list(SPLITS)[:3], *full(*list(SPLITS)[3:])])
def test_documents_that_are_held_out(name, load, capsys):
    """Of a validation text the first 500 documents, or the first fifth, are dev, the rest test.

    No document stands in two splits: those that would are left out, and it is said.
    """
    text, valid, sizes = SPLITS[name]
    documents = held(load(text, valid))
    for first, second in itertools.combinations(documents.values(), 2):
        assert not {*first} & {*second}
    assert tuple(len(rows) for rows in documents.values()) == sizes
    assert ("left out" in capsys.readouterr().err) == ("twice" in name and "nothing" not in name)
    if "twice" not in name:
        assert "".join(f"{row}\n{END}\n" for row in documents["dev"] + documents["test"]) == valid


def test_a_book_is_split_by_place(load, capsys):
    """One long document, or few or short ones: all of it is used once, and it is said."""
    book = "".join(f"line {i}\n" for i in range(500))
    task = load(book)
    tokens = [token for row in task.rows.values() for token in row.tolist()]
    assert bytes(tokens[:-1]) == book.strip().encode() and tokens[-1] == 256
    assert [len(row) for row in task.rows.values()] == [3951, 87, 352]
    assert "text is split by place" in capsys.readouterr().err
    assert len(task.problems("dev").labels) == 0


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
    for split, documents in held(text).items():
        tokens = text.rows[split].astype(np.int64)
        assert int(text.token_bytes[tokens].sum()) == len("".join(documents).encode())


def test_presets_start_from_the_toy():
    """On text the sizes that presets start from are those of cartesian.py."""
    sizes = vars(MoEConfig()) | TextData.settings | TextData.preset_sizes
    assert {name: sizes[name] for name in TOY} == TOY


# ------------------------------------------------------------------------------- files of tokens


def test_tokenised_once(load, tmp_path, monkeypatch):
    """The second time tokens come from their file, even for a copied text."""
    first = load().rows["train"]
    assert first.dtype == np.uint16
    (tmp_path / "text").rename(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(texts, "write_tokens", None)
        assert np.array_equal(load().rows["train"], first)
    load(stories(0, 51))  # another text, and another tokenizer, have files of their own
    load(name="tinystories")
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_a_text_that_grows_is_not_kept(load, tmp_path, monkeypatch):
    """Tokens of a text that changes while it is read have no name: they are made again."""
    documents = texts.documents

    def growing(path):
        for document in documents(path):
            yield document
            Path(path).write_text(stories(0, 60), encoding="utf-8")

    with monkeypatch.context() as patch:
        patch.setattr(texts, "documents", growing)
        with refused("changed while it was tokenised"):
            load()
    assert not [*tmp_path.glob("tokens/*")]
    assert sum(map(len, held(load(None)).values())) == 60


PIECE = "x" * 2**20  # of a long line, as it is read
LONG = PIECE[8:]
UGLY = {  # bytes -> the documents that they hold
    "byte-order mark": (b"\xef\xbb\xbf<|endoftext|>\n\xef\xbb\xbfone\n", ["one"]),
    "line ends": (b"one\r\ntwo\r\n<|endoftext|>\r\nthree\rfour", ["one\ntwo", "three\nfour"]),
    "blanks": (b" " * (BLOCK_SIZE + 5) + b"one" + b"\n" * BLOCK_SIZE + b"<|endoftext|>\n", ["one"]),
    "long lines": (b"word " * BLOCK_SIZE, ["word " * (BLOCK_SIZE - 1) + "word"]),
    "many lines": (b"word\n" * BLOCK_SIZE, ["word\n" * (BLOCK_SIZE - 1) + "word"]),
    "end marks": (
        f"{LONG}\n{END}\r\n a {END}\n{END} b\r\n{END} \n{END}\n\n{END}\nlast".encode(),
        [LONG, f"a {END}\n{END} b", "last"],
    ),
    "end mark behind a piece": (f"{PIECE}{END}\nlast".encode(), [f"{PIECE}{END}\nlast"]),
}


@pytest.mark.parametrize("name", [*list(UGLY)[:2], *full(*list(UGLY)[2:])])
def test_texts_as_people_have_them(name, tmp_path):
    """Marks, line ends and blanks are no text. END ends a document where it is alone on a line, and
    the last may be missing. A document of any size comes in blocks, wherever they fall."""
    content, expected = UGLY[name]
    (tmp_path / "text").write_bytes(content)
    documents, text = [], ""
    for block, ended in texts.documents(tmp_path / "text"):
        assert len(block) <= BLOCK_SIZE + 2**20
        text += block
        if ended:
            documents.append(text)
            text = ""
    assert text == "" and [words.rstrip() for words in documents] == expected


BAD = {  # message -> the content of a text file, if there is one
    "no such text file: ": None,
    "text (0 bytes) holds no text": b"",
    "has 12 tokens; a context of 16 needs 17": b"One long text",
    "text is not UTF-8: invalid start byte 0xff; convert it": b"good\xff\xfebad",
    "has 1 tokens; a context of 16": f"too short\n{END}\n".encode() * 9,
}


@pytest.mark.parametrize("message", full(*BAD))
def test_bad_text(message, load, tmp_path):
    """A text that cannot be learnt from is refused, and leaves no half file."""
    with refused(message):
        load(BAD[message])
    assert "a context of 16" in message or not list(tmp_path.glob("tokens/*"))


# ------------------------------------------------------------------------------------- downloads


def test_download(monkeypatch):
    """The training text comes first, then the validation text; a failure is told in one line."""
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "hf_hub_download", lambda *names, repo_type: names)
        names = ("TinyStories-train.txt", "TinyStories-valid.txt")
        assert tinystories() == [("roneneldan/TinyStories", name) for name in names]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "nowhere")
    hint = "check the network, or use --data-file"
    with refused("could not be downloaded", hint, error=OSError):
        tinystories()
