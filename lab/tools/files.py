"""Files that are whole, that have one owner, and that are known by their content.

    digest    what tells a content from all others
    write     a file appears whole, or not at all
    owned     a file, or the folder that it stands in, belongs to one process
    new       the first name that is free, taken at once

Everything that is saved and opened again stands on these, tensors with a checksum inside.
"""

import json
import math
import os
import secrets
import shutil
import socket
from contextlib import contextmanager
from glob import escape
from hashlib import sha256
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from lab.tools.checks import require, require_finite

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out of a file
    fcntl = None

# ---------------------------------------------------------------------------------------- content


def digest(*values) -> str:
    """The SHA-256 of contents, one after the other: 64 hexadecimal digits.

    A value is a text, bytes, a tensor, an array, or the path of a file. Where two values could be
    taken for others, the caller puts their lengths or shapes between them.
    """
    total = sha256()
    for value in values:
        if isinstance(value, Path):
            with open(value, "rb") as file:
                while block := file.read(2**20):
                    total.update(block)
            continue
        if isinstance(value, str):
            value = value.encode()
        if torch.is_tensor(value):
            flat = value.detach().cpu().contiguous().flatten()
            value = flat.view(torch.uint8).numpy()
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        total.update(value)
    return total.hexdigest()


# -------------------------------------------------------------------------------------- ownership


class Busy(ValueError):
    """Another process has the file."""


def lock(file) -> bool:
    """Lock an open file, until it is closed or this process ends. False: another one has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def owned(path: Path):
    """Own a file, which is made if there is none, and yield it open for reading and appending.

    Busy: a process that lives has it. What a killed process had is free at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if not lock(file):
            raise Busy(f"another process is writing to {path}; wait until it has ended")
        yield file


@contextmanager
def owned_folder(folder: Path):
    """Own a folder: the file .lock in it says who does."""
    try:
        with owned(folder / ".lock") as file:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            yield
    except Busy:
        owner = (folder / ".lock").read_text(encoding="utf-8", errors="replace")
        raise Busy(f"{folder} is being written to by {owner or 'another process'}") from None


def new_folder(folder: Path) -> Path:
    """Make a folder of this name, or else the first NAME-2, NAME-3, ... that is free."""
    name, number = folder, 1
    while True:
        try:
            name.mkdir(parents=True)
        except FileExistsError:
            number += 1
            name = folder.with_name(f"{folder.name}-{number}")
        else:
            return name


# ------------------------------------------------------------------------------------ whole files


@contextmanager
def whole(path: Path):
    """Yield an open file. What is written to it becomes the file at `path`, whole or not at all.

    It has a name of its own until then. OSError (no space, say) leaves an older file as it was.
    """
    remove_leftovers(path)
    file = temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(file.name, path)
    except BaseException as error:
        Path(file.name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            what = f"could not write {path}: {error.strerror or error}"
            raise OSError(f"{what}; what was saved before is untouched") from error
        raise


def temporary(path: Path):
    """A new file beside `path`, open and locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(f"{path}.{secrets.token_hex(4)}.tmp", "xb")  # noqa: SIM115
        # Before it was locked, another process may have taken it for a leftover.
        if lock(file) and Path(file.name).exists():
            return file
        file.close()


@contextmanager
def whole_folder(path: Path):
    """Yield a new folder. It becomes the folder at `path`, whole or not at all.

    OSError where something is there, at the end at the latest.
    """
    remove_leftovers(path)
    folder = new_folder(Path(f"{path}.{secrets.token_hex(4)}.tmp"))
    try:
        with owned_folder(folder):
            yield folder
            (folder / ".lock").unlink()
            folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(path: Path):
    """Remove temporary files or folders of `path` that nobody owns: their process was killed."""
    if fcntl is None:
        return
    for leftover in path.parent.glob(f"{escape(path.name)}.*.tmp"):
        try:
            with open(leftover / ".lock" if leftover.is_dir() else leftover, "ab") as file:
                if not lock(file):
                    continue
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another process was faster


def write(path: Path, data: bytes):
    """Write a file, whole or not at all."""
    with whole(path) as file:
        file.write(data)


# ------------------------------------------------------------------------------------------- JSON


def as_json(value, **options) -> str:
    """A value as JSON, all of whose numbers are numbers. options: those of json.dumps.

    ValueError, with its place, for NaN and infinities, which other readers of JSON refuse.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        place, number = next(odd_numbers(value, ""))
        raise ValueError(f"not kept: {place or 'the value'} is {number}, no number") from None


def odd_numbers(value, place: str):
    """Yield the NaN and infinities of a value for JSON: (place, number)."""
    items = {}
    if isinstance(value, dict):
        items = value
    if isinstance(value, list | tuple):
        items = dict(enumerate(value))
    for name, inner in items.items():
        yield from odd_numbers(inner, f"{place}, {name}" if place else str(name))
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value


def read_json(path: Path, form):
    """What a JSON file says. ValueError where it is missing, unreadable, or has another form."""
    require(path.is_file(), f"no such file: {path}")
    return parse_json(path.read_text(encoding="utf-8", errors="replace"), form, str(path))


def parse_json(text: str | bytes, form, place: str):
    """What a JSON text says. place: for messages. ValueError where it has another form.

    A form is a type; [form], a list of such; {"name": form, ...}, an object with these entries and
    perhaps others; or {str: form}, one whose entries all are such. A float is any finite number.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not readable JSON: {error}") from None
    require_form(value, form, place)
    return value


def require_form(value, form, place: str):
    """ValueError, with its place, for what has another form."""
    kind = form if isinstance(form, type) else type(form)
    fits = type(value) is kind
    if kind is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    require(fits, f"{place} is {value!r:.40}; expected {kind.__name__}")
    if isinstance(form, list):
        for number, item in enumerate(value):
            require_form(item, form[0], f"{place}, {number}")
    if isinstance(form, dict):
        every = form.get(str)
        for name, inner in dict.fromkeys(value, every).items() if every else form.items():
            require(name in value, f"{place} has no {name}")
            require_form(value[name], inner, f"{place}, {name}")


# ---------------------------------------------------------------------------------------- tensors


def write_tensors(path: Path, tensors: dict, about: dict[str, str]):
    """Write a safetensors file with a checksum. about: what its metadata shall say."""
    copies = {}  # the library refuses views
    for name, tensor in tensors.items():
        require_finite(name, tensor, f"{path} is not written")
        copies[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    about = about | {"digest": tensors_digest(copies, about)}
    write(path, safetensors.torch.save(copies, about))


def read_tensors(path: Path, what: str = "safetensors file"):
    """Read a safetensors file -> tensors, metadata.

    ValueError where it is missing, cut off, foreign, or not what was written. Files of earlier
    versions have no checksum.
    """
    about, tensors = read_about(path, what), {}
    with safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    expected = about.pop("digest", None)
    same = expected is None or expected == tensors_digest(tensors, about)
    require(same, f"{path} was altered: it is not what its checksum says")
    for name, tensor in tensors.items():
        require_finite(name, tensor, f"{path} is damaged")
    return tensors, about


def read_about(path: Path, what: str = "safetensors file") -> dict[str, str]:
    """The metadata of a safetensors file. ValueError where it is missing, cut off or foreign."""
    require(path.is_file(), f"no such {what}: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        problem = f"{path} is no readable {what} ({error})"
        raise ValueError(f"{problem}; it may be cut off or foreign") from None


def tensors_digest(tensors: dict, about: dict[str, str]) -> str:
    """The checksum of named tensors and of what is said about them."""
    values = []
    for name in sorted(about):
        values.append(f"{name!r} {about[name]!r} ")
    for name in sorted(tensors):
        tensor = tensors[name]
        values += [f"{name!r} {tuple(tensor.shape)} {tensor.dtype} ", tensor]
    return digest(*values)
