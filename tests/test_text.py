"""Text: tokens that stand for every byte, each tokenised once, splits that do not leak, downloads that fail clearly."""

import hashlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from huggingface_hub import constants

import data
from data import END, TextData, tinystories, tokenizer, train_tokenizer

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture
def stories(tmp_path):
    """Fifty small documents, not all of them ASCII."""
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"Story {i}: the naïve café 🦊.\n{END}\n" for i in range(50)), encoding="utf-8")
    return path


@pytest.fixture
def load(stories, tmp_path):
    """TextData of the fifty stories, as bytes, in windows of 16, its cache in a folder of its own."""
    return lambda path=stories, valid=None, name="bytes", **options: TextData(
        str(path), valid and str(valid), name, cache=tmp_path / "tokens", **{"context": 16, **options}
    )


# ---------------------------------------------------------------------------------------------------------- tokenizers


def library(encoding):
    """The same tokenizer in the library `tokenizers`: its merges are what the ranks make of each token's bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ranks = {encoding.decode_single_token_bytes(rank): rank for rank in range(encoding.eot_token)}
    others = iter(range(256, 512))  # GPT-2's letters for the bytes: themselves, if they are printable, or chr(256) on
    letters = [chr(b if 33 <= b < 127 or 161 <= b < 173 or b >= 174 else next(others)) for b in range(256)]

    def parts(token):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def spell(token):
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(spell, parts(token))) for token in ranks if len(token) > 1]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    bpe.pre_tokenizer = level
    return bpe


AWKWARD = "# # a  #\n#\r\n\r\n x#I'm 's's'LL it'll#½²Ⅷ٣ 12a3#e\u0301\u00ad\u200b\u200d"
AWKWARD += "#\x00\x1c\x85#naïve 🦊👩‍👩‍👧#\U0010ffff\ufeff"


def scribble(rng):
    """Words, and code points from blocks all over Unicode, the first blocks most often."""
    codes = [rng.randrange(1 << rng.randint(5, 20)) for _ in range(rng.randrange(40))]
    words = [chr(code) for code in codes if not 0xD800 <= code < 0xE000] + ["Once upon", " a time", "didn't", "  ", END]
    return "".join(rng.choices(words, k=len(words)))


def test_our_tokens_are_those_of_the_library():
    """`tinystories` has 2,048 tokens, and encodes any text as the library that trained it; decoding gives it back."""
    encoding = tokenizer("tinystories")
    assert encoding.n_vocab == 2048 and encoding.eot_token == 2047
    bpe, rng = library(encoding), random.Random(0)
    for text in [*AWKWARD.split("#"), *(scribble(rng) for _ in range(2000))]:
        tokens = encoding.encode_ordinary(text)
        assert tokens == bpe.encode(text).ids and encoding.decode(tokens) == text, repr(text)


def test_training_a_tokenizer(stories, tmp_path, monkeypatch):
    """Training learns the frequent words, leaves END lines out, and has the bytes first; so does the command."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(data, "RANKS", tmp_path / "ranks")
    data.RANKS.write_bytes(train_tokenizer(stories, 280))
    assert [int(line.split()[1]) for line in data.RANKS.read_text().splitlines()] == list(range(280))
    encoding = tokenizer("tinystories")
    tokens = {encoding.decode_single_token_bytes(token) for token in range(280)}
    assert {bytes([byte]) for byte in range(256)} | {b"Story", b" caf\xc3\xa9"} <= tokens and b"endoftext" not in tokens
    run = subprocess.run([sys.executable, data.__file__, "no.txt"], capture_output=True, text=True)
    assert run.returncode == 1 and re.fullmatch(r"data.py: .*no.txt.*\n", run.stderr)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        train_tokenizer(stories)


@pytest.mark.skipif(not SHARED.exists(), reason="needs TinyStories in ../shared/data")
def test_the_shipped_ranks_can_be_made_again():
    """Training on the sample of TinyStories gives the shipped file, byte for byte."""
    pytest.importorskip("tokenizers")
    assert train_tokenizer(SHARED / "tinystories" / "train.txt") == data.RANKS.read_bytes()


def test_bytes_are_tokens(load):
    """With the tokenizer `bytes` any UTF-8 text is its bytes, and an end-of-text mark inside it is text, too."""
    encoding = tokenizer("bytes")
    text = f"naïve 🦊\n\tcafé {END}\x00"
    assert encoding.encode_ordinary(text) == list(text.encode()) and encoding.decode(list(text.encode())) == text
    document = "Story 0: the naïve café 🦊.".encode()
    assert load().rows["train"][: len(document) + 1].tolist() == [*document, 256]


def test_tokenizers_by_name(monkeypatch):
    """An unknown name is answered with the nearest; where tiktoken cannot download, one line says so."""
    for name, near in {"gpt-2": "gpt2", "tinystory": "tinystories", "?": ""}.items():
        with pytest.raises(ValueError, match=f"did you mean {near}"):
            tokenizer(name)

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer("gpt2")


# --------------------------------------------------------------------------------------------------- splits, batches


def test_text_batches(load, stories):
    """Targets are the tokens that follow; a batch depends on (seed, step) alone; the splits hold every byte once."""
    text = load(seed=1)
    tokens, targets = text.batch(0, 8)
    assert tokens.shape == targets.shape == (8, 16) and torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, load(seed=1).batch(0, 8)[0]) and not torch.equal(tokens, text.batch(1, 8)[0])
    whole = np.concatenate([text.rows[split] for split in ("train", "dev", "test")])
    assert bytes(whole[whole < 256].astype(np.uint8)) == stories.read_bytes().replace(f"\n{END}\n".encode(), b"")
    tokens, targets = text.held_out("test")
    assert torch.equal(tokens[0], torch.from_numpy(text.rows["test"][:16].astype(np.int64)))
    assert targets[-1, -1] == text.rows["test"][-1]


@pytest.mark.parametrize(("held", "dev"), [(5, 1), (26, 6), (2499, 500), (2500, 500), (3000, 500)])
def test_dev_comes_first(load, tmp_path, stories, held, dev):
    """Of a validation text the first 500 documents (of fewer than 2,500 the first fifth) are dev, the rest test."""
    valid = tmp_path / "valid.txt"
    valid.write_text("".join(f"Document number {i}\n{END}\n" for i in range(held)), encoding="utf-8")
    text = load(valid=valid)
    splits = {split: text.documents(split) for split in ("train", "dev", "test")}
    assert {split: len(parts) for split, parts in splits.items()} == {"train": 50, "dev": dev, "test": held - dev}
    for number, row in enumerate(splits["dev"] + splits["test"]):
        assert row[-1] == 256 and text.encoding.decode(row[:-1].tolist()) == f"Document number {number}"


@pytest.mark.parametrize("context", [1, 7, 16])
def test_whole_splits(load, context):
    """most=None gives windows that do not overlap, and as many as fit: nothing is scored twice."""
    text = load(context=context)
    text.rows["test"] = np.arange(110)  # tokens that tell their place
    targets = text.held_out("test", most=None)[1].flatten()
    assert len(set(targets.tolist())) == len(targets) == 109 // context * context
    assert len(text.held_out("test", most=2)[0]) == 2 and len(text.held_out("test")[0]) == 109 // context


@pytest.mark.parametrize("name", ["bytes", "tinystories"])
def test_bits_per_byte(load, stories, name):
    """The bytes of the tokens of a split are the bytes of its text: END counts none, and letters may be split."""
    text = load(name=name)
    for split, row in text.rows.items():
        documents = [text.encoding.decode(row[:-1].tolist()) for row in text.documents(split)]
        assert int(text.token_bytes[row.astype(np.int64)].sum()) == sum(len(part.encode()) for part in documents)
    assert text.show(text.encoding.eot_token) == repr(END)


# --------------------------------------------------------------------------------------------------------- token caches


def test_tokenised_once(load, stories, tmp_path, monkeypatch):
    """The second time tokens come from the cache, even for a copied file; another text or tokenizer has its own."""
    first = load().rows["train"]
    files = {file.suffix: file for file in (tmp_path / "tokens").iterdir()}
    assert files.keys() == {".bin", ".json"} and isinstance(first, np.memmap) and first.dtype == np.uint16
    about, texts = json.loads(files[".json"].read_text(encoding="utf-8")), list(data.documents(stories))
    assert about["text"] == hashlib.sha256(stories.read_bytes()).hexdigest() and about["documents"] == 50
    assert about["bytes"] == sum(len(text.encode()) for text in texts) == about["tokens"] - 50
    copy = tmp_path / "copy.txt"
    copy.write_bytes(stories.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_tokens", None)
        assert np.array_equal(load(copy).rows["train"], first)
    copy.write_text(stories.read_text(encoding="utf-8") + f"One more\n{END}\n", encoding="utf-8")
    load(copy), load(name="tinystories")
    assert len(list((tmp_path / "tokens").iterdir())) == 6


def test_large_vocabularies_take_four_bytes(stories, tmp_path):
    """Beyond 65,536 tokens a row is of uint32."""
    ranks = {bytes([i]): i for i in range(256)}
    large = tiktoken.Encoding("large", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={END: 70_000})
    row = data.read_tokens(stories, large, tmp_path / "tokens")
    assert row.dtype == np.uint32 and row[-1] == 70_000


def test_documents_of_any_line_ends(tmp_path):
    """END ends a document only where it has a line to itself; \\r\\n is a line end, and the last END may be missing,
    however the pieces fall in which the file is read."""
    path, long = tmp_path / "text.txt", "x" * (2**20 - 8)
    path.write_bytes(f"{long}\n{END}\r\n a {END}\n{END} b\r\n{END} \n{END}\n\n{END}\nlast".encode())
    assert list(data.documents(path)) == [long, f"a {END}\n{END} b", "last"]


@pytest.mark.parametrize(
    ("suffix", "old", "new", "found"),
    [
        (".bin", rb"...$", b"", '"size": 3277'),
        (".json", b"bytes-", b"gpt2-", "gpt2-"),
        (".json", b"^{", b"\xff", "says"),
    ],
    ids=["cut off", "another tokenizer", "unreadable"],
)
def test_bad_caches(load, tmp_path, suffix, old, new, found):
    """A cache that is cut off, of another tokenizer, or unreadable is refused, and made again once it is deleted."""
    good = load().rows["train"].tolist()
    [file] = (tmp_path / "tokens").glob("*" + suffix)
    file.write_bytes(re.sub(old, new, file.read_bytes(), flags=re.DOTALL))
    with pytest.raises(ValueError, match=f"{found}.*delete it") as error:
        load()
    assert "\n" not in str(error.value)
    Path(str(error.value).split(" says ")[0]).unlink()
    assert load().rows["train"].tolist() == good


def test_a_failure_leaves_no_half_cache(load, tmp_path, stories):
    """Where tokenising breaks off, nothing is left that could be taken for a cache."""
    stories.write_bytes(stories.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load()
    assert list((tmp_path / "tokens").iterdir()) == []


FAR = "ü".encode() * 20_000  # further than Python decodes at once
BAD = {
    "missing": (None, "no such text file: .*bad.txt"),
    "empty": (b"", f"bad.txt .0 bytes. has 0 documents.* end every document with a line {re.escape(END)}"),
    "white": (f" \n{END}\n".encode() * 3, "has 0 documents"),
    "no end": (b"One long text", "has 1 documents, expected more; end every document with a line"),
    "latin": (b"good\xff\xfebad", "bad.txt is not UTF-8: byte 4 is 0xff; convert it"),
    "far": (b"." + FAR + b"\xe9t\xe9", "byte 40001 is 0xe9"),
    "cut": (FAR[:-1], "byte 39998 is 0xc3"),
    "endless": (b"word " * 2_000_000, "has a document of over 8 million characters"),
    "short": (f"too short\n{END}\n".encode() * 9, "dev, from .*bad.txt, has 10 tokens; a context of 16 needs 17"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_text(load, tmp_path, content, message):
    """A text that cannot be learnt from is refused in one line that names it, and says what is wrong."""
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ downloads


class Hub(BaseHTTPRequestHandler):
    """A hub with two files, which can be told to fail."""

    bodies = {part: f"A story to {part}.\n{END}\n".encode() * 100 for part in ("train", "valid")}  # noqa: RUF012

    def do_HEAD(self):
        asked = re.fullmatch("/datasets/roneneldan/TinyStories/resolve/main/TinyStories-(train|valid).txt", self.path)
        if asked is None or self.server.fault == "404":
            return self.send_error(404)
        part = asked[1]
        body = self.bodies[part]
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if self.command == "GET" and self.server.fault == "altered":
            body = body.replace(b"A", b"B")
        if self.command == "GET" and self.server.fault == "short":
            body = body[:-1]
        if start and self.server.fault == "gone":
            return self.send_error(503)
        self.server.asked.append((self.command, part, start))
        self.send_response(206 if start else 200)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        for name, value in {**headers, "Content-Length": len(body) - start}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            end = len(body) // 2 if self.server.fault in ("cut", "gone") and not start else len(body)
            self.wfile.write(body[start:end])

    do_GET = do_HEAD

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and a client that knows no other, with an empty cache, and without waits."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fault, server.asked = None, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what it writes, and resumes from
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", [None, "cut"])
def test_download(hub, fault):
    """Both files arrive whole, also when the connection breaks on the way, and the next time nothing is downloaded."""
    hub.fault = fault
    paths = tinystories()
    assert [Path(path).read_bytes() for path in paths] == list(Hub.bodies.values())
    assert any(start for _, _, start in hub.asked) == (fault == "cut")  # what had come was not asked for again
    hub.asked.clear()
    assert tinystories() == paths and all(command == "HEAD" for command, _, _ in hub.asked)


@pytest.mark.parametrize("fault", ["gone", "short", "altered", "404", "closed", "offline"])
def test_failed_download(hub, monkeypatch, fault):
    """A download that fails is told in one line, with what to do; never does a wrong file pass for the right one."""
    hub.fault = fault
    if fault == "closed":
        hub.server_close()
    if fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"could not be downloaded \(.*\); check the network, or use --data-file"
    ) as error:
        tinystories()
    assert "\n" not in str(error.value)
    with pytest.raises(OSError):  # nor does it the second time
        tinystories()
