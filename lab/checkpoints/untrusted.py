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
from lab.tools.cli import note
from lab.tools.files import parse_json

MAX_JSON = 2**23  # bytes of a file
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LIMITS = {int: (1, 2**18), float: (1e-12, 1e12), bool: (False, True)}
REQUIRED = object()  # the default of a setting that has none
NEUTRAL = {  # keys that can change the result of a model -> the values that do not
    "hidden_act": ["silu", "swish"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "scoring_func": ["softmax"],
    "n_group": [1],
    "topk_group": [1],
    "topk_method": ["greedy", "group_limited_greedy"],  # the same for one group
    "routed_scaling_factor": [1],
    "partial_rotary_factor": [1],
    "quantization": [],  # as MLX says it
    "quantization_config": [],
}
ROPE = {  # the same for keys of rope_scaling and rope_parameters; others are of other rope_types
    "rope_type": ["default"],
    "factor": [1],
    "attention_factor": [1],
    "partial_rotary_factor": [1],
}
FACTORED = ("linear", "dynamic", "yarn", "llama3")  # rope_types that a factor of 1 makes neutral
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


class Settings:
    """The settings of a config.json, each checked when it is asked for. null counts as absent."""

    def __init__(self, raw: dict, path):
        self.path = path
        self.raw = {key: value for key, value in raw.items() if value is not None}
        # What stands within an object becomes a key of its own, such as rope_scaling.factor.
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.raw.get(key)
            if not isinstance(rope, dict) or any(isinstance(each, dict) for each in rope.values()):
                continue  # refused later: one rope for each kind of layer
            del self.raw[key]
            if "type" in rope:
                rope = {"rope_type": rope["type"]} | rope
            if rope.get("rope_type") in FACTORED and rope.get("factor") == 1:
                rope = rope | {"rope_type": "default"}
            for inner, value in rope.items():
                if value is not None:
                    self.raw[f"{key}.{inner}"] = value

    def get(self, kind: type, *keys: str, default=REQUIRED, low=None, high=None):
        """The value that stands under one of these keys, or under several that agree.

        kind: int, float or bool, however it is written: 16.0 is an int, 0 and 1 are bools. low,
        high: its limits. ValueError that names the key.
        """
        given = {key: self.raw[key] for key in keys if key in self.raw}
        if not given:
            missing = f"{self.path} has no {' or '.join(keys)}"
            require(default is not REQUIRED, missing)
            return default

        lowest, highest = LIMITS[kind]
        low = lowest if low is None else low
        high = highest if high is None else high
        for key, value in given.items():
            number = type(value) in (int, float) or (kind is bool and type(value) is bool)
            fits = number and low <= value <= high and kind(value) == value
            expected = f"expected {kind.__name__} from {low} to {high}"
            require(fits, f"{self.path}: {key} is {value!r:.60}; {expected}")
        return kind(self.agreed(given))

    def agreed(self, given: dict):
        """The one value of all these keys."""
        values = list(given.values())
        require(values.count(values[0]) == len(values), f"{self.path} contradicts itself: {given}")
        return values[0]

    def require_plain(self, others: dict[str, list]):
        """ValueError for a key that would change the result: of NEUTRAL, ROPE, or these others."""
        neutral = NEUTRAL | others | {"rope_scaling": [], "rope_parameters": []}
        for inner, values in ROPE.items():
            neutral |= {f"{key}.{inner}": values for key in ("rope_scaling", "rope_parameters")}
        for key, values in neutral.items():
            value = self.raw.get(key)
            expected = f"we only compute {(values or [None])[0]!r:.60}"
            plain = value in (None, {}, *values)
            require(plain, f"{self.path}: {key} is {value!r:.80}; {expected}")

    def dtype(self) -> str:
        """The numbers that the weights are saved in, by a name of torch."""
        given = {key: self.raw[key] for key in ("dtype", "torch_dtype") if key in self.raw}
        given = {key: str(value).removeprefix("torch.") for key, value in given.items()}
        return self.agreed(given) if given else "float32"

    def within_window(self, context: int) -> int:
        """The context, cut to the window of attention: up to there both see the same tokens."""
        window = self.get(int, "sliding_window", default=context, high=2**30)
        if window >= context:
            return context
        note(f"{self.path}: attention looks back {window:,} tokens: the context is cut to that")
        return window


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
