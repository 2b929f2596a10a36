"""What is behind a text: tokenizers, files of tokens, the download of TinyStories.

data.py stands on this file, which therefore imports nothing but moe.py and lab/tools/cli.py.

python -m lab.tools.texts PATH    learn the tokenizer `tinystories` from a text
"""

import base64
import difflib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from lab.tools.cli import Usage, program
from moe import require

END = "<|endoftext|>"  # alone on a line, it ends a document
RANKS = Path(__file__).parents[1] / "tinystories-2048.tiktoken"
GPT2 = (  # pieces of text, words mostly, that no token crosses
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"
    r"| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


# ------------------------------------------------------------------------------------- tokenizers


def tokenizer(name: str = "tinystories") -> tiktoken.Encoding:
    """Our own `tinystories`, `bytes`, or an encoding of tiktoken, which downloads it.

    ValueError: no such name. OSError: no download.
    """
    if name in ("tinystories", "bytes"):
        ranks = {bytes([i]): i for i in range(256)}
        if name == "tinystories":  # tiktoken's own reader would not notice that the file changed
            tokens = RANKS.read_bytes().split()[::2]
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokens)}
        special = {END: len(ranks)}
        return tiktoken.Encoding(name, pat_str=GPT2, mergeable_ranks=ranks, special_tokens=special)
    names = ["tinystories", "bytes", *tiktoken.list_encoding_names()]
    near = difflib.get_close_matches(name, names, 1, cutoff=0)
    require(name in names, f"no tokenizer is called {name!r}; did you mean {near[0]}?")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        what = f"no network to download {name}, nor is it in TIKTOKEN_CACHE_DIR"
        raise OSError(f"{what}; try tinystories") from error


def train_tokenizer(path: str, size: int = 2047) -> bytes:
    """Learn a byte-level BPE of `size` ranks from a text -> a file of lines "base64 rank"."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        what = "training a tokenizer needs the library tokenizers"
        raise ValueError(f"{what}: pip install tokenizers") from None

    # The library writes a byte as a letter: itself if it is printable, others as chr(256) on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [byte for byte in range(256) if chr(byte) in letters]
    others = [byte for byte in range(256) if chr(byte) not in letters]
    byte_of = dict(zip(letters, printable + others, strict=True))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(documents(path), trainer)
    lines = []
    for rank in range(bpe.get_vocab_size()):
        token = bytes(byte_of[letter] for letter in bpe.id_to_token(rank))
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    return b"".join(lines)


# --------------------------------------------------------------------------------- files of tokens


def documents(path: str) -> Iterator[str]:
    """Yield the documents of a UTF-8 text of any size, stripped.

    ValueError: the text is not UTF-8, or has fewer than two documents.
    """
    end_line = re.compile(rf"(?m)^{re.escape(END)}[ \t\r]*\n")
    hint = f"end every document with a line {END}"
    count = 0
    unfinished = ""  # what stands behind the last END
    block = None
    with open(path, encoding="utf-8", newline="") as file:
        while block != "":
            try:
                block = file.read(2**20)
            except UnicodeDecodeError as error:
                place = file.buffer.tell() - len(error.object) + error.start
                fault = f"byte {place} is {error.object[error.start]:#x}"
                hint = "convert it, or give a text file"
                raise ValueError(f"{path} is not UTF-8: {fault}; {hint}") from None
            last = "" if block else f"\n{END}\n"  # it may be missing in the file
            *texts, unfinished = end_line.split(unfinished + block + last)
            small = len(unfinished) <= 2**23  # so that memory does not grow with the text
            require(small, f"{path} has a document of over 8 million characters; {hint}")
            for text in texts:
                if text.strip():
                    count += 1
                    yield text.strip()
    size = Path(path).stat().st_size
    require(count > 1, f"{path} ({size:,} bytes) has {count} documents, expected more; {hint}")


def read_tokens(path: str, encoding: tiktoken.Encoding, cache: str = "out/tokens") -> np.ndarray:
    """The tokens of a text, END behind each document: memory-mapped (tokens,), uint16 or uint32.

    They are made once, as a file of tokens and one that describes it, named by the contents of text
    and tokenizer. ValueError: a bad text, or files that are not what their names say.
    """
    require(Path(path).is_file(), f"no such text file: {path}; expected the path of a UTF-8 text")
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    identity = {"dtype": dtype.name, "tokenizer": identify(encoding), "text": sha256(path)}
    binary = Path(cache) / f"{identity['tokenizer']}-{identity['text'][:16]}.bin"
    about = binary.with_suffix(".json")
    if not (binary.exists() and about.exists()):
        write_tokens(path, encoding, binary, about, identity)
    expected = json.dumps({"size": binary.stat().st_size, **identity})
    text = about.read_text("utf-8", errors="replace")
    same = text.startswith(expected.rstrip("}"))  # counts stand behind it
    require(same, f"{about} says {text!r}, expected {expected}; delete it to make it anew")
    return np.memmap(binary, dtype, "r")


def write_tokens(path, encoding, binary: Path, about: Path, identity: dict):
    """Tokenise a text in flat memory, into two files that appear whole or not at all."""
    about.parent.mkdir(parents=True, exist_ok=True)
    counts = {"tokens": 0, "documents": 0, "bytes": 0}
    size = Path(path).stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokens", leave=False, disable=None)
    with bar, tempfile.TemporaryDirectory(dir=about.parent) as folder:
        temporary = Path(folder, "tokens")
        with open(temporary, "wb") as file:
            for text in documents(path):
                tokens = [*encoding.encode_ordinary(text), encoding.eot_token]
                file.write(np.array(tokens, identity["dtype"]).tobytes())
                counts["tokens"] += len(tokens)
                counts["documents"] += 1
                counts["bytes"] += len(text.encode())
                bar.update(len(text) + len(f"\n{END}\n"))  # nearly: a letter can be several bytes
        temporary.replace(binary)
        description = {"size": binary.stat().st_size, **identity, **counts}
        temporary.write_text(json.dumps(description), encoding="utf-8")
        temporary.replace(about)  # last: where it stands, the tokens are complete


def identify(encoding: tiktoken.Encoding) -> str:
    """The name of a tokenizer, and a checksum of its tokens."""
    digest = hashlib.sha256(GPT2.encode())
    for text in encoding.token_byte_values():
        digest.update(b"%s %d\n" % (text, encoding.encode_single_token(text)))
    return f"{encoding.name}-{digest.hexdigest()[:8]}"


def sha256(path) -> str:
    """The checksum of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- TinyStories


def tinystories() -> list[str]:
    """Paths of TinyStories' training and validation text (1.9 GB, in the hub's cache).

    OSError: they cannot be downloaded.
    """
    try:
        from huggingface_hub import hf_hub_download  # here: only this needs it

        paths = []
        for name in ("TinyStories-train.txt", "TinyStories-valid.txt"):
            path = Path(hf_hub_download("roneneldan/TinyStories", name, repo_type="dataset"))
            # A link to a file that is named by its sha256, of which the hub compares only the size.
            target = path.parent / path.readlink() if path.is_symlink() else path
            good = len(target.name) != 64 or sha256(path) == target.name
            require(good, f"{name} was altered: delete {target}")
            paths.append(str(path))
        return paths
    except Exception as error:  # of the hub, or of its network library, which varies
        reason = " ".join(str(error).split())
        hint = "check the network, or use --data-file PATH --valid-file PATH"
        raise OSError(f"TinyStories could not be downloaded ({reason}); {hint}") from error


def main(argv) -> int:
    """Learn the tokenizer `tinystories` -> the exit code."""
    if len(argv) != 1:
        raise Usage("expected the path of a text: python -m lab.tools.texts PATH")
    size = RANKS.write_bytes(train_tokenizer(argv[0]))
    print(f"wrote {size:,} bytes to {RANKS}")
    return 0


if __name__ == "__main__":
    program(main, __doc__)
