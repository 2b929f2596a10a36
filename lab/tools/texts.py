"""What is behind a text: tokenizers, files of tokens, the download of TinyStories.

data.py stands on this file, which therefore imports nothing but moe.py and lab/tools/cli.py.

python -m lab.tools.texts PATH    learn the tokenizer `tinystories` from a text
"""

import base64
import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from lab.tools.cli import Usage, nearest, program
from moe import require

END = "<|endoftext|>"  # alone on a line, it ends a document
RANKS = Path(__file__).parents[1] / "tinystories-2048.tiktoken"
GPT2 = (  # pieces of text, words mostly, that no token crosses
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"
    r"| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


# ---- tokenizers


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
    hint = f"there are {', '.join(names)}{nearest(name, names)}"
    require(name in names, f"no tokenizer is called {name!r}; {hint}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        fault = f"no network to download {name}, nor is it in TIKTOKEN_CACHE_DIR"
        raise OSError(f"{fault}; try tinystories") from error


def train_tokenizer(path: str, size: int = 2047) -> bytes:
    """Learn a byte-level BPE of `size` ranks from a text -> a file of lines "base64 rank"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # here: only this needs it

    # The library writes a byte as a letter: itself if it is printable, others as chr(256) on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [byte for byte in range(256) if chr(byte) in letters]
    others = [byte for byte in range(256) if chr(byte) not in letters]
    byte_of = dict(zip(letters, printable + others, strict=True))

    # Learn, and write each token in bytes.
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(documents(path), trainer)
    lines = []
    for rank in range(bpe.get_vocab_size()):
        token = bytes(byte_of[letter] for letter in bpe.id_to_token(rank))
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    return b"".join(lines)


# ---- files of tokens


def documents(path: str) -> Iterator[str]:
    """Yield the documents of a UTF-8 text of any size, stripped.

    ValueError: the text is not UTF-8, or has fewer than two documents.
    """
    hint = f"end every document with a line {END}"
    count = 0
    lines = []  # of the document that is being read
    size = 0  # its characters
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for line in itertools.chain(file, [END]):  # the last END may be missing
                if line.rstrip() != END:
                    lines.append(line)
                    size += len(line)
                    small = size <= 2**23  # so that memory does not grow with the text
                    require(small, f"{path} has a document of over 8 million characters; {hint}")
                    continue
                text = "".join(lines).strip()
                if text:
                    count += 1
                    yield text
                lines = []
                size = 0
        except UnicodeDecodeError as error:
            fault = f"{error.reason} {error.object[error.start]:#x}"
            hint = "convert it, or give a text file"
            raise ValueError(f"{path} is not UTF-8: {fault}; {hint}") from None
    n_bytes = Path(path).stat().st_size
    require(count > 1, f"{path} ({n_bytes:,} bytes) has {count} documents, expected more; {hint}")


def read_tokens(path: str, encoding: tiktoken.Encoding, cache: str = "out/tokens") -> np.ndarray:
    """The tokens of a text, END behind each document: memory-mapped (tokens,), uint16 or uint32.

    They are made once, as a file that is named by the contents of text and tokenizer. ValueError:
    a bad text.
    """
    require(Path(path).is_file(), f"no such text file: {path}; expected the path of a UTF-8 text")
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    binary = Path(cache) / f"{identify(encoding)}-{sha256(path)[:16]}.bin"
    if not binary.exists():
        write_tokens(path, encoding, dtype, binary)
    return np.memmap(binary, dtype, "r")


def write_tokens(path, encoding, dtype, binary: Path):
    """Tokenise a text in flat memory, into a file that appears whole or not at all."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    size = Path(path).stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokens", leave=False, disable=None)
    with bar, tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        temporary = Path(folder, "tokens")
        with open(temporary, "wb") as file:
            for text in documents(path):
                tokens = [*encoding.encode_ordinary(text), encoding.eot_token]
                file.write(np.array(tokens, dtype).tobytes())
                bar.update(len(text) + len(f"\n{END}\n"))  # nearly: a letter can be several bytes
        temporary.replace(binary)


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


# ---- TinyStories


def tinystories() -> list[str]:
    """Paths of TinyStories' training and validation text (1.9 GB, in the hub's cache).

    OSError: they cannot be downloaded.
    """
    try:
        from huggingface_hub import hf_hub_download  # here: only this needs it

        names = ("TinyStories-train.txt", "TinyStories-valid.txt")
        return [
            hf_hub_download("roneneldan/TinyStories", name, repo_type="dataset") for name in names
        ]
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
