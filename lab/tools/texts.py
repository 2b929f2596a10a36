"""What is behind a text: tokenizers, files of tokens, the download of TinyStories.

data.py stands on this file, which therefore imports nothing but checks.py, cli.py,
flags.py and files.py beside it.

python -m lab.tools.texts TEXT NEW_FILE    learn a tokenizer, for train_toy.py --tokenizer NEW_FILE
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.words, __doc__)

import base64
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from lab.tools.checks import require
from lab.tools.files import digest, whole, write

END = "<|endoftext|>"  # alone on a line, it ends a document
RANKS = Path(__file__).parents[1] / "tinystories-2048.tiktoken"
GPT2 = (  # pieces of text, words mostly, that no token crosses
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"
    r"| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
# Longer runs of blanks, letters, digits or signs are cut: tiktoken panics at a million blanks.
LONGEST = 2**15
KINDS = (r"\s", r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)")
LONG_RUN = re.compile("|".join(f"{kind}{{{LONGEST}}}" for kind in KINDS))
BLOCK_SIZE = 2**22  # characters that are tokenised at once


# ---- tokenizers


def tokenizer(name: str = "tinystories") -> tiktoken.Encoding:
    """Our own `tinystories`, `bytes`, a file of ranks, or an encoding of tiktoken (a download).

    ValueError: no such name, or no ranks in the file. OSError: no download.
    """
    if name == "bytes":
        return own_encoding(name, [bytes([i]) for i in range(256)])
    if name == "tinystories":
        return own_encoding(name, read_ranks(RANKS))
    if Path(name).is_file():
        return own_encoding(Path(name).stem, read_ranks(Path(name)))
    names = ["tinystories", "bytes", *tiktoken.list_encoding_names()]
    hint = f"there are {', '.join(names)}, and files of ranks{cli.did_you_mean(name, names)}"
    require(name in names, f"no tokenizer is called {name!r}; {hint}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        fault = f"no network to download {name}, nor is it in TIKTOKEN_CACHE_DIR"
        raise OSError(f"{fault}; try tinystories") from error


def own_encoding(name: str, tokens: list[bytes]) -> tiktoken.Encoding:
    """The tokenizer of these tokens, which stand in the order of their ranks, and of END."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {END: len(ranks)}
    return tiktoken.Encoding(name, pat_str=GPT2, mergeable_ranks=ranks, special_tokens=special)


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a file of lines "base64 rank". ValueError: that is not what it holds."""
    fault = f"{path} is no file of ranks; python -m lab.tools.texts TEXT NEW_FILE makes one"
    tokens = []
    for line in path.read_bytes().splitlines():
        token, _, rank = line.partition(b" ")
        require(rank == b"%d" % len(tokens), fault)
        tokens.append(base64.b64decode(token))  # its errors are ValueErrors
    complete = {bytes([i]) for i in range(256)} <= {*tokens}
    require(complete and len({*tokens}) == len(tokens), fault)
    return tokens


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The tokens of a text. Only runs of over 32,768 alike characters are cut."""
    if len(text) < LONGEST:
        return encoding.encode_ordinary(text)
    tokens = []
    start = 0
    for run in LONG_RUN.finditer(text):
        tokens += encoding.encode_ordinary(text[start : run.end()])
        start = run.end()
    return tokens + encoding.encode_ordinary(text[start:])


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
    bpe.train_from_iterator((text for text, _ in documents(path)), trainer)
    lines = []
    for rank in range(bpe.get_vocab_size()):
        token = bytes(byte_of[letter] for letter in bpe.id_to_token(rank))
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    return b"".join(lines)


# ---- files of tokens


def documents(path: str) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a UTF-8 text of any size, stripped, and True with each.

    A long one comes in several blocks, with False but for the last. ValueError: the text is not
    UTF-8, or holds no text.
    """
    block, size = [], 0  # lines that wait, and their characters
    inside = False  # whether blocks of this document have come before
    count = 0
    for line in lines(path):
        # Collect lines, up to the end of the document or of a block.
        ended = line == ""
        block.append(line)
        size += len(line)
        if not ended and size < BLOCK_SIZE:
            continue

        # Of a long document, keep what stands behind the cut for the next block.
        text = "".join(block)
        end = len(text) if ended else place_to_cut(text)
        block, size = [text[end:]], len(text) - end
        text = text[:end]

        # Take the blanks away around the document, but not around its blocks.
        if not inside:
            text = text.lstrip()
        if ended:
            text = text.rstrip()
        if text or inside:
            count += 1
            yield text, ended
        inside = not ended and bool(text or inside)
    n_bytes = Path(path).stat().st_size
    require(count > 0, f"{path} ({n_bytes:,} bytes) holds no text")


def lines(path: str) -> Iterator[str]:
    """Yield the lines of a text, long ones in pieces, and "" where a document ends.

    A byte-order mark is no text, and every line end is a line feed.
    """
    starting = True  # whether a line starts here
    with open(path, encoding="utf-8") as file:
        try:
            while line := file.readline(2**20):
                line = line.replace("\ufeff", "")
                ended = starting and line.rstrip() == END
                starting = line.endswith("\n")
                if ended:
                    yield ""
                elif line:
                    yield line
        except UnicodeDecodeError as error:
            fault = f"{error.reason} {error.object[error.start]:#x}"
            hint = "convert it, or give a text file"
            raise ValueError(f"{path} is not UTF-8: {fault}; {hint}") from None
    yield ""  # the last END may be missing


def place_to_cut(text: str) -> int:
    """The last place where cutting changes no token: a single line end between two words."""
    end = len(text)
    for match in re.finditer(r"\S\n(?=\S)", text):
        end = match.end()
    return end


def read_tokens(path: str, encoding: tiktoken.Encoding, cache: str = "out/tokens"):
    """The tokens of a text -> memory-mapped (tokens,), uint16 or uint32, and their checksum.

    END stands behind each document. They are made once, as a file that is named by the contents of
    text and tokenizer, and that ends with its checksum. ValueError: a bad text, or one that changed
    in the meantime.
    """
    require(Path(path).is_file(), f"no such text file: {path}; expected the path of a UTF-8 text")
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    content = digest(Path(path))
    binary = Path(cache) / f"{identify(encoding)}-{content[:16]}.bin"
    if binary.is_file() and stored_tokens(binary, dtype) is None:
        cli.note(f"{binary} is damaged: its tokens are made anew")
        binary.unlink()
    if not binary.is_file():
        write_tokens(path, encoding, dtype, binary, content)
    return stored_tokens(binary, dtype)


def stored_tokens(binary: Path, dtype):
    """The tokens of a file and their checksum; None where it does not fit."""
    size = binary.stat().st_size - 32
    if size <= 0 or size % dtype.itemsize:
        return None
    content = np.memmap(binary, np.uint8, "r")
    tokens, checksum = content[:size].view(dtype), content[size:].tobytes().hex()
    return (tokens, checksum) if digest(tokens) == checksum else None


def write_tokens(path, encoding, dtype, binary: Path, content: str):
    """Tokenise a text, whose checksum is `content`, in flat memory."""
    size = Path(path).stat().st_size
    total = sha256()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokens", leave=False, disable=None)
    with bar, whole(binary) as file:
        for text, ended in documents(path):
            tokens = encode(encoding, text)
            if ended:
                tokens.append(encoding.eot_token)
            data = np.array(tokens, dtype).tobytes()
            file.write(data)
            total.update(data)
            bar.update(len(text) + len(f"\n{END}\n"))  # nearly: a letter can be several bytes
        file.write(total.digest())
        same = digest(Path(path)) == content
        require(same, f"{path} changed while it was tokenised; run this again")


def identify(encoding: tiktoken.Encoding) -> str:
    """The name of a tokenizer, and a checksum of its tokens and of how texts are read."""
    tokens = encoding.token_byte_values()
    lines = [b"%s %d\n" % (text, encoding.encode_single_token(text)) for text in tokens]
    return f"{encoding.name}-{digest(GPT2, LONG_RUN.pattern, *lines)[:8]}"


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
    """Learn a tokenizer -> the exit code."""
    if len(argv) != 2:
        raise cli.Usage("expected a text and a new file: python -m lab.tools.texts TEXT NEW_FILE")
    text, path = argv[0], Path(argv[1])
    require(not path.exists(), f"{path} is there already; name a new file")
    ranks = train_tokenizer(text)
    write(path, ranks)
    print(f"wrote {len(ranks):,} bytes to {path}; train with --tokenizer {path}")
    return 0


if __name__ == "__main__":
    cli.program(main)
