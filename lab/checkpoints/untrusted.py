"""Files from elsewhere: whatever stands in them, reading ends in a result or in one ValueError.

No pickle is read, because that may run any code. A size is checked before memory is taken for it.
"""

import math
import re
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
NEUTRAL = {  # keys that would change the result of a model, and the only value that we compute
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1,
    "partial_rotary_factor": 1,
    "quantization": None,  # as MLX says it
    "quantization_config": None,
    "rope_parameters": {"rope_type": "default"},
    "rope_scaling": {"rope_type": "default"},
}
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
    """The settings of a config.json, each checked when it is asked for."""

    def __init__(self, raw: dict, path):
        self.raw = dict(raw)
        self.path = path
        # Some versions keep rope_theta inside of an object: it becomes a key of its own.
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(raw.get(key), dict):
                rope = dict(raw[key])
                if "type" in rope:
                    rope["rope_type"] = rope.pop("type")
                self.raw[f"{key}.rope_theta"] = rope.pop("rope_theta", None)
                self.raw[key] = rope or None

    def get(self, kind: type, *keys: str, default=REQUIRED, low=None, high=None):
        """The value that stands under one of these keys, or under several that agree.

        kind: int, float or bool; low, high: its limits. null counts as absent. ValueError that
        names the key.
        """
        given = {key: self.raw[key] for key in keys if self.raw.get(key) is not None}
        if not given:
            missing = f"{self.path} has no {' or '.join(keys)}"
            require(default is not REQUIRED, missing)
            return default

        lowest, highest = LIMITS[kind]
        low = lowest if low is None else low
        high = highest if high is None else high
        kinds = (int, float) if kind is float else (kind,)  # type(True) is bool, not int
        for key, value in given.items():
            fits = type(value) in kinds and low <= value <= high
            expected = f"expected {kind.__name__} from {low} to {high}"
            require(fits, f"{self.path}: {key} is {value!r:.60}; {expected}")

        values = set(given.values())
        require(len(values) == 1, f"{self.path} contradicts itself: {given}")
        return kind(values.pop())

    def require_plain(self, n_layers: int):
        """ValueError for another activation, rope or scoring, or for layers of other kinds."""
        neutral = NEUTRAL | {"layer_types": ["full_attention"] * n_layers}
        for key, only in neutral.items():
            value = self.raw.get(key)
            problem = f"{self.path}: {key} is {value!r:.80}; we only compute {only!r:.60}"
            require(value is None or value == only, problem)

    def within_window(self, context: int) -> int:
        """The context, cut to the window of attention: up to there both see the same tokens."""
        if not self.raw.get("use_sliding_window", True):
            return context
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

    expected: pairs (name, tensor) of a model; entries: what the files hold.
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
    """Copy a tensor of a file into a weight (n,) or (n, m), about a million numbers at a time.

    ValueError where it holds no numbers, or larger ones than the weight can hold.
    """
    step = 2**20 // weight[0].numel() + 1
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        weight[rows].copy_(entry[rows])
        dtype = str(weight.dtype).removeprefix("torch.")
        require_finite(name, weight[rows], f"the file holds none, or larger than {dtype} holds")


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


# -------------------------------------------------------------------------------------- tokenizer


def read_tokenizer(folder: Path, vocab_size: int):
    """tokenizer.json -> a Tokenizer of the library tokenizers; None where there is no such file.

    ValueError for one that is broken, or larger than the model's vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer, processors
    except ImportError:
        raise ValueError(f"{path} needs the library tokenizers: {INSTALL}") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no readable tokenizer: {one_line(error)}") from None
    size = tokenizer.get_vocab_size()
    require(size <= vocab_size, f"{path} has {size} tokens, the model only {vocab_size}")

    # Begin every text with the token that tokenizer_config.json asks for.
    bos = beginning(folder / "tokenizer_config.json")
    number = None if bos is None else tokenizer.token_to_id(bos)
    if number is not None:
        template = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, number)])
        tokenizer.post_processor = template
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def beginning(path: Path) -> str | None:
    """The token with which a text begins, by tokenizer_config.json; None without one."""
    raw = read_object(path) if path.is_file() else {}
    if raw.get("add_bos_token") is not True:
        return None
    bos = raw.get("bos_token")
    if isinstance(bos, dict):
        bos = bos.get("content")
    return None if bos is None else str(bos)
