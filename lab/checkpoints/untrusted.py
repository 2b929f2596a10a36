"""Files from elsewhere: whatever stands in them, reading ends in a result or in one ValueError.

No pickle is read, because that may run any code. A size is checked before memory is taken for it.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lab.tools.checks import require, require_finite
from lab.tools.files import parse_json

MAX_JSON = 2**23  # bytes of a file
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INSTALL = 'pip install -e ".[hf]"'


def one_line(error) -> str:
    """The message of another library's exception."""
    return " ".join(str(error).split())[:200]


def download(repo: str, **options) -> Path:
    """The folder of a repository of the hub, in the hub's cache.

    OSError, in one line, where it cannot be had. options: those of snapshot_download.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise OSError(f"this needs huggingface_hub: {INSTALL}") from None
    try:
        return Path(snapshot_download(repo, **options))
    except Exception as error:  # of the hub or of its network library, by version
        raise OSError(one_line(error)) from error


# ------------------------------------------------------------------------------------------- JSON


def read_object(path: Path) -> dict:
    """A JSON object. ValueError for anything else, and for files above 8 MB."""
    require(path.is_file(), f"{path.parent} is no checkpoint: there is no {path.name}")
    size = path.stat().st_size
    require(size <= MAX_JSON, f"{path} has {size:,} bytes; expected at most {MAX_JSON:,}")
    return parse_json(path.read_bytes(), {}, str(path))


# ---------------------------------------------------------------------------------------- tensors


def read_entries(folder: Path) -> dict:
    """The tensors of a checkpoint, not read yet: name -> slice of the library safetensors.

    They stand in model.safetensors, or in several files that an index names.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    missing = f"{folder} has neither {single.name} nor {index.name}{pickle_hint(folder)}"
    require(index.is_file(), missing)

    # The index maps tensors to files. It may not lead out of the folder.
    shards = read_object(index).get("weight_map")
    usable = isinstance(shards, dict) and len(shards) > 0
    require(usable, f"{index} has no weight_map from tensors to files")
    entries = {}
    for shard in sorted({str(name) for name in shards.values()}):
        path = folder / shard
        problem = f"{index} names {shard!r:.80}, and no *.safetensors beside it is called so"
        require(path in folder.glob("*.safetensors"), f"{problem}: download it again")
        header = read_header(path)
        repeated = sorted(header.keys() & entries.keys())
        problem = f"{path} repeats tensors of another shard: {repeated[:3]!s:.200}"
        require(not repeated, problem)
        entries |= header
    return entries


def pickle_hint(folder: Path) -> str:
    """Why a checkpoint of pickles is not opened; empty where there is none."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".pt", ".pth"):
            why = "a pickle, which may run any code when it is read"
            return f"; {path.name} is {why}: convert it"
    return ""


def read_header(path: Path) -> dict:
    """The tensors of one file, not read yet: name -> slice."""
    # A small file with a long header is refused: parsed, it would take far more memory.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    problem = f"{path} is cut off, altered, or no safetensors file"
    longest = max(2**20, path.stat().st_size // 16)
    require(length <= longest, f"{problem}: its header would have {length:,} bytes")

    # The library checks the header against the size of the file.
    try:
        file = safe_open(path, "pt")
        entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{problem}: {one_line(error)}") from None

    dtypes = {name: entry.get_dtype() for name, entry in entries.items()}
    other = {name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES}
    require(not other, f"{path} has {str(other)[:120]}; expected {', '.join(DTYPES)}")
    return entries


def require_tensors(expected, entries: dict, folder, family: str):
    """ValueError that names the first tensors that are missing, misshapen or not used.

    expected: pairs (name, tensor) of a model; entries: what the files hold, by the same names.
    """
    unused = dict(entries)
    wrong = []
    for name, tensor in expected:
        entry = unused.pop(name, None)
        shape = list(tensor.shape)
        stored = "missing" if entry is None else entry.get_shape()
        if stored != shape:
            wrong.append(f"{name}: {stored!s:.60}, expected {shape}")
        if len(wrong) > 3:  # stop here: the model may be far larger than the files
            break
    if len(wrong) <= 3:
        for name in unused:
            # Some old files keep the rotary frequencies, which follow from rope_theta.
            if not name.endswith(".inv_freq"):
                wrong.append(f"{name!r:.80}: not used by {family}")
    dots = " ..." if len(wrong) > 3 else ""
    require(not wrong, f"{folder} does not fit its config.json: {'; '.join(wrong[:3])}{dots}")


def copy_tensor(name: str, weight, entry):
    """Copy a tensor of a file into a weight of its shape, about a million numbers at a time.

    ValueError where it holds no numbers, or larger ones than the weight can hold.
    """
    for rows in slices_of(entry):
        weight[rows].copy_(entry[rows])
        dtype = str(weight.dtype).removeprefix("torch.")
        require_finite(name, weight[rows], f"the file holds none, or larger than {dtype} holds")


def same_tensors(first, second) -> bool:
    """Whether two tensors of files hold the same numbers."""
    if first.get_shape() != second.get_shape():
        return False
    return all(
        torch.equal(first[rows].double(), second[rows].double()) for rows in slices_of(first)
    )


def slices_of(entry) -> Iterator[slice]:
    """The rows of a tensor of a file, in slices of about a million numbers."""
    n_rows, *width = entry.get_shape()
    step = 2**20 // max(1, math.prod(width)) + 1
    for start in range(0, n_rows, step):
        yield slice(start, start + step)


def room(device="cpu") -> float:
    """Free bytes on a device; infinity where that cannot be told."""
    kind = str(device).split(":")[0]
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    problem = f"this machine (or this build of torch) has no device {device}"
    require(available.get(kind, False), problem)
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]

    # On Linux: what the system has free, and what the container allows.
    free = [math.inf]
    meminfo = Path("/proc/meminfo")
    limit = Path("/sys/fs/cgroup/memory.max")
    if meminfo.is_file():
        kilobytes = re.findall(r"MemAvailable: +(\d+)", meminfo.read_text())
        free += [1024 * int(number) for number in kilobytes]
    if limit.is_file():
        free += [int(number) for number in re.findall(r"^\d+", limit.read_text())]
    return min(free)
