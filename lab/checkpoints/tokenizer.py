"""A checkpoint's tokenizer, which may be broken or hostile, as prompts and generation need it."""

import json
from pathlib import Path

from lab.checkpoints.untrusted import INSTALL, one_line, read_object
from lab.tools.checks import require
from lab.tools.cli import note
from lab.tools.files import as_json


def read_tokenizer(folder: Path, vocab_size: int):
    """tokenizer.json -> a Tokenizer of the library tokenizers; None where there is no such file.

    It puts nothing behind a text, since a prompt goes on. ValueError for one that is broken, or
    larger than the model's vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer, processors
    except ImportError:
        raise ValueError(f"{path} needs the library tokenizers: {INSTALL}") from None
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if config.is_file() else {}
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer = within_vocabulary(tokenizer, vocab_size, token_of(settings, "pad_token"), path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        before, after = around_texts(tokenizer)
    except ValueError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no readable tokenizer: {one_line(error)}") from None

    # Begin every text with the token that tokenizer_config.json asks for, and end it with none.
    bos = token_of(settings, "bos_token") if settings.get("add_bos_token") is True else None
    if bos is not None:
        before = [tokenizer.token_to_id(bos)]
        require(before != [None], f"{config}: bos_token {bos!r:.60} is no token of {path.name}")
    outside = [number for number in before if number >= vocab_size]
    require(not outside, f"{path} begins texts with {outside}, the model has {vocab_size} tokens")
    if after:
        ends = [tokenizer.id_to_token(number) for number in after]
        note(f"{path} ends every text with {ends}: left out, since a prompt goes on")
    if bos is not None or after:
        tokens = [(tokenizer.id_to_token(number), number) for number in before]
        single = [token for token, _ in tokens] + ["$A"]
        template = processors.TemplateProcessing(single=single, special_tokens=tokens)
        tokenizer.post_processor = template
    return tokenizer


def token_of(settings: dict, key: str) -> str | None:
    """A token that tokenizer_config.json names, as a text or as an object."""
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def within_vocabulary(tokenizer, vocab_size: int, padding: str | None, path: Path):
    """The tokenizer without special tokens behind the model's vocabulary, such as one for padding.

    ValueError where it has tokens there that a text makes.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = {token for token, number in vocabulary.items() if number >= vocab_size}
    if not beyond:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    unused = {token["content"] for token in content["added_tokens"] if token["special"]}
    unused = (unused | {padding}) - {content["model"].get("unk_token")}
    n_tokens = max(vocabulary.values()) + 1
    require(beyond <= unused, f"{path} has {n_tokens} tokens, the model only {vocab_size}")

    names = ", ".join(sorted(beyond))
    note(f"{path}: {names:.80} is behind the model's {vocab_size:,} tokens: left out")
    kept = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    content["added_tokens"] = kept
    entries = content["model"]["vocab"]
    if isinstance(entries, dict):
        content["model"]["vocab"] = {t: i for t, i in entries.items() if i < vocab_size}
    else:  # each with its score
        content["model"]["vocab"] = entries[:vocab_size]
    return type(tokenizer).from_str(as_json(content))


def around_texts(tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that it puts before and behind every text."""
    for number in range(tokenizer.get_vocab_size()):
        before, text, after = three_parts(tokenizer.encode(tokenizer.decode([number])))
        if text:
            return before, after
    return [], []


def three_parts(encoding) -> tuple[list[int], list[int], list[int]]:
    """The tokens that a tokenizer put before a text, those of the text, and those behind it."""
    ids, added = encoding.ids, encoding.special_tokens_mask
    own = [place for place, mark in enumerate(added) if not mark]
    if not own:
        return ids, [], []
    return ids[: own[0]], ids[own[0] : own[-1] + 1], ids[own[-1] + 1 :]
