"""The files of a checkpoint, read without trust: config.json, and the safetensors format, whole or in shards.

A safetensors file is 8 bytes with the length of its header, the header (JSON, that says where each tensor stands), and
the numbers. Headers are read and checked first; then one tensor at a time goes where it belongs, in flat memory.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from moe import require

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """Where a tensor stands."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file
    stop: int


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint, from the headers of its files alone. ValueError for files that do not fit."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")]
    why = f"; {pickles[0]} is a pickle, which may run any code when it is read: convert it" if pickles else ""
    require(index.is_file(), f"{folder} has neither {single.name} nor {index.name}{why}")
    shards, entries = read_json(index).get("weight_map"), {}
    require(isinstance(shards, dict) and shards, f"{index} has no weight_map from tensors to files")
    for shard in sorted(set(map(str, shards.values()))):
        inside = re.fullmatch(r"[^/\\:]+\.safetensors", shard)
        require(inside, f"{index} names {shard!r:.80}; expected a *.safetensors of the same folder")
        require((folder / shard).is_file(), f"{index} names {shard}, which is missing: download it again")
        part = read_header(folder / shard)
        twice = sorted(part.keys() & entries.keys())
        require(not twice, f"{folder / shard} repeats tensors of another shard: {', '.join(twice[:3])}")
        entries |= part
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes for the length of the header, the header (JSON), the numbers.

    ValueError unless they fill the file without overlap or hole, as the format demands, or for a long header in a small
    file: as Python's objects it would take far more memory than the file.
    """
    size, entries = path.stat().st_size, {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fits = 2 <= length <= min(size - 8, max(2**20, size // 16))
        require(fits, f"{path} has {size:,} bytes, its header {length:,}: it is cut off, or no safetensors file")
        header = read_json(path, file.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            try:
                dtype, shape, (start, stop) = DTYPES[about["dtype"]], tuple(about["shape"]), about["data_offsets"]
                require(len(shape) < 9 and all(type(n) is int and n >= 0 for n in (*shape, start, stop)), "")
            except (KeyError, TypeError, ValueError):
                expected = f"dtype ({', '.join(DTYPES)}), shape and data_offsets"
                raise ValueError(f"{path}: {name:.80} is {about!r:.120}; expected {expected}") from None
            entries[name] = Entry(path, dtype, shape, 8 + length + start, 8 + length + stop)
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        expected = (end, end + math.prod(entry.shape) * entry.dtype.itemsize)
        found = f"{path}: {name:.80}, {entry.shape}, stands at bytes {entry.start:,} to {entry.stop:,}"
        require(entry[-2:] == expected, "{}, expected {:,} to {:,}: an overlap or a hole".format(found, *expected))
        end = entry.stop
    require(end == size, f"{path} has {size:,} bytes, expected {end:,}: it is cut off, or altered")
    return entries


def read_into(part, file, entry: Entry):
    """Read a tensor of a file into a weight, at most a million numbers at a time."""
    file.seek(entry.start)
    same = part.is_cpu and part.dtype == entry.dtype
    for numbers in part.view(-1).split(2**20):  # (any shape) -> (many,)
        raw = numbers if same else torch.empty(len(numbers), dtype=entry.dtype)
        require(file.readinto(raw.view(torch.uint8).numpy()) == raw.nbytes, f"{entry.path} was cut off meanwhile")
        if not same:
            numbers.copy_(raw)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    """Write a safetensors file, one tensor at a time, and see to it that the disk has it."""
    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.cpu().flatten().view(torch.uint8).numpy())  # (any shape) -> (bytes,)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, data: bytes | None = None) -> dict:
    """A JSON object, from a file of up to 8 MB or from bytes of it. ValueError for anything else."""
    require(path.is_file(), f"{path.parent} is no checkpoint: there is no {path.name}")
    small = data is not None or path.stat().st_size <= 2**23
    require(small, f"{path} has {path.stat().st_size:,} bytes; expected at most {2**23:,}")
    try:
        found = json.loads(path.read_bytes() if data is None else data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no readable JSON: {error}") from None
    require(isinstance(found, dict), f"{path} holds JSON, but no object")
    return found
