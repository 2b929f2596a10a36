"""Checkpoints of the Hugging Face hub, in and out: OLMoE, DeepSeekMoE (v1), Mixtral and Qwen3-MoE.

python hf.py PATH_OR_REPO    what a checkpoint is, and whether it fits here, before anything is loaded

A checkpoint is a folder of config.json, model.safetensors (or an index and shards) and tokenizer.json. It is not
trusted: no pickle is read, and every size is checked before anything is allocated, by the library safetensors and here.
"""

import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe import Experts, MoE, MoEConfig, MoETransformer, Router, require

NAMES = {  # our weights, in a block or outside -> the hub's; where those are two, they share the rows of ours
    "embedding.weight": ["model.embed_tokens"], "norm.weight": ["model.norm"], "unembedding.weight": ["lm_head"],
    "attention_norm.weight": ["input_layernorm"], "ffn_norms.0.weight": ["post_attention_layernorm"],
    **{f"attention.{x}.weight": [f"self_attn.{x}_proj"] for x in "qkvo"},
    **{f"attention.{x}_norm.weight": [f"self_attn.{x}_norm"] for x in "qk"},
    "ffns.0.gate_up.weight": ["mlp.gate_proj", "mlp.up_proj"], "ffns.0.down.weight": ["mlp.down_proj"],
    "ffns.0.router.weight": ["mlp.gate"], "ffns.0.experts.down": ["mlp.experts.{e}.down_proj"],
    "ffns.0.experts.gate_up": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "ffns.0.shared.down.weight": ["mlp.shared_experts.down_proj"],
    "ffns.0.shared.gate_up.weight": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
}  # fmt: skip
MIXTRAL = NAMES | {
    "ffns.0.router.weight": ["block_sparse_moe.gate"], "ffns.0.experts.down": ["block_sparse_moe.experts.{e}.w2"],
    "ffns.0.experts.gate_up": ["block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"],
}  # fmt: skip
FAMILIES = {  # model_type -> the names, where queries and keys are normalised, rope_theta where none is given
    "olmoe": (NAMES, "full", 1e4),
    "deepseek": (NAMES, "none", 1e4),
    "mixtral": (MIXTRAL, "none", 1e6),
    "qwen3_moe": (NAMES, "head", 1e4),
}
KEYS = {  # fields of MoEConfig -> the keys of config.json that may hold them
    "vocab_size": "vocab_size", "context": "max_position_embeddings", "d_model": "hidden_size", "clip_qkv": "clip_qkv",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "n_experts": "num_experts num_local_experts n_routed_experts", "top_k": "num_experts_per_tok",
    "norm_topk": "norm_topk_prob", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "head_dim": "head_dim",
    "rope_theta": "rope_theta rope_parameters.rope_theta rope_scaling.rope_theta",
}  # fmt: skip
OPTIONAL = {"n_kv_heads": None, "head_dim": None, "clip_qkv": None, "norm_topk": False, "tied": False}
NEUTRAL = {  # keys that would change the result, and the only value that we compute; null will do, too
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "scoring_func": "softmax", "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1, "partial_rotary_factor": 1,
    "quantization_config": None, "rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "default"},
}  # fmt: skip
SPANS = {int: (1, 2**18), float: (1e-12, 1e12), bool: (False, True)}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ABOUT = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]


def load(source, dtype=None, device="cpu", cache=None, offline=False):
    """A checkpoint -> (model in evaluation mode, tokenizer of the library tokenizers, or None where it has none).

    source: a folder, or owner/name[@revision] on the hub, downloaded to the folder `cache` (None: the hub's own) unless
    offline. dtype: float64, float32, bfloat16, float16 (None: as config.json says). Memory is taken for the model and
    some MB; the files are only mapped. ValueError or OSError, in one line, for what cannot be loaded."""
    folder = fetch(source, ABOUT, cache, offline)
    name, model, dtype = plan(folder, dtype)
    tokenizer = read_tokenizer(folder, model.config.vocab_size)
    need, free = sum(weight.nbytes for weight in model.parameters()), room(device)
    short = f"{source} takes {need / 1e9:,.2f} GB in {dtype}, and {device} has {free / 1e9:,.2f} GB free"
    require(need <= free, f"{short}: try bfloat16, or a larger machine")
    if not Path(source).is_dir():  # the weights, of the same commit
        folder = fetch(f"{str(source).split('@')[0]}@{folder.name}", [*ABOUT, "model*.safetensors"], cache, offline)
    entries = read_entries(folder)
    check(model, name, entries, folder)
    parts = dict(pieces(model.to_empty(device=device), name))
    for tensor, stored in entries.items():  # by name, as most files are ordered
        if tensor in parts:
            copy(parts[tensor], stored)
    return model.eval(), tokenizer


def fetch(source, files: list[str], cache=None, offline=False) -> Path:
    """The folder of a checkpoint; of a repository of the hub, those files are downloaded. OSError where that fails."""
    if Path(source).is_dir():
        return Path(source)
    repo = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    require(repo, f"{source} is neither a folder nor a repository of the hub, owner/name or owner/name@revision")
    try:
        from huggingface_hub import snapshot_download  # here: a folder does not need it

        options = {"revision": repo[2], "cache_dir": cache, "local_files_only": offline, "allow_patterns": files}
        return Path(snapshot_download(repo[1], **options))
    except Exception as error:  # OSError, or of the hub, or of its network library, which differs between its versions
        raise OSError(f"{source}: no folder here, nor had from the hub: {one_line(error)}") from error


def one_line(error) -> str:
    """What an exception of a library says."""
    return " ".join(str(error).split())[:200]


def plan(folder: Path, dtype=None):
    """What a checkpoint will be -> (family, model on the device meta, where tensors have no numbers, dtype)."""
    name, config, stored = read_config(read_json(folder / "config.json"), folder / "config.json")
    dtype = str(dtype or stored).removeprefix("torch.")
    require(dtype in DTYPES.values(), f"dtype is {dtype:.60}; expected one of {', '.join(DTYPES.values())}")
    with torch.device("meta"):
        return name, MoETransformer(config).to(getattr(torch, dtype)), dtype


def read_json(path: Path) -> dict:
    """A JSON object, from a file of up to 8 MB. ValueError for anything else."""
    require(path.is_file(), f"{path.parent} is no checkpoint: there is no {path.name}")
    require(path.stat().st_size <= 2**23, f"{path} has {path.stat().st_size:,} bytes; expected at most {2**23:,}")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no readable JSON: {error}") from None
    require(isinstance(found, dict), f"{path} holds JSON, but no object")
    return found


def read_entries(folder: Path) -> dict:
    """The tensors of a checkpoint, not read yet: name -> slice of the library. ValueError for files that do not fit."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")]
    why = f"; {pickles[0]} is a pickle, which may run any code when it is read: convert it" if pickles else ""
    require(index.is_file(), f"{folder} has neither {single.name} nor {index.name}{why}")
    shards, entries = read_json(index).get("weight_map"), {}
    require(isinstance(shards, dict) and shards, f"{index} has no weight_map from tensors to files")
    for shard in sorted(set(map(str, shards.values()))):
        inside = folder / shard in folder.glob("*.safetensors")
        require(inside, f"{index} names {shard!r:.80}, and no *.safetensors beside it is called so: download it again")
        part = read_header(folder / shard)
        twice = sorted(part.keys() & entries.keys())
        require(not twice, f"{folder / shard} repeats tensors of another shard: {twice[:3]!s:.200}")
        entries |= part
    return entries


def read_header(path: Path) -> dict:
    """The tensors of one file. A long header in a small file is refused: parsed, it would take far more memory."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    fits = length <= max(2**20, path.stat().st_size // 16)
    require(fits, f"{path} is cut off, altered, or no safetensors file: its header would have {length:,} bytes")
    try:
        file = safe_open(path, "pt")
        entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off, altered, or no safetensors file: {one_line(error)}") from None
    other = {name: stored.get_dtype() for name, stored in entries.items() if stored.get_dtype() not in DTYPES}
    require(not other, f"{path} has {str(other)[:120]}; expected {', '.join(DTYPES)}")
    return entries


def copy(part, stored):
    """Copy a tensor of a file into a weight, (n,) or (n, m), about a million numbers at a time."""
    step = 2**20 // part[0].numel() + 1
    for start in range(0, len(part), step):
        part[start : start + step].copy_(stored[start : start + step])


def pieces(model, name: str):
    """The tensors of a family's checkpoint, and the part of our weights that each of them is: yields (name, view)."""
    for path, weight in model.named_parameters():
        layer, ours = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", path).groups()
        prefix, theirs = "" if layer is None else f"model.layers.{layer}.", FAMILIES[name][0][ours]
        for e, matrix in enumerate(weight.detach() if weight.dim() == 3 else [weight.detach()]):
            for each, part in zip(theirs, matrix.chunk(len(theirs)), strict=True):  # (2F, D) -> (F, D) twice
                yield f"{prefix}{each.format(e=e)}.weight", part


def read_config(raw: dict, path):
    """What config.json says -> (family, MoEConfig, dtype). ValueError that names a key that we cannot compute."""
    name, raw = str(raw.get("model_type")), dict(raw)
    require(name in FAMILIES, f"{path}: model_type is {name:.60}; known are {', '.join(FAMILIES)}")
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(key), dict):
            rope = {"rope_type" if k == "type" else k: v for k, v in raw[key].items()}
            raw |= {f"{key}.rope_theta": rope.pop("rope_theta", None), key: rope or None}

    def get(kind, keys, default=..., low=None, high=None):
        """The value of one of these keys, or of several that agree."""
        found = {key: raw[key] for key in keys.split() if raw.get(key) is not None}
        require(found or default is not ..., f"{path} has no {' or '.join(keys.split())}")
        low, high = SPANS[kind][0] if low is None else low, high or SPANS[kind][1]
        for key, value in found.items():
            fits = type(value) in ((int, float) if kind is float else (kind,)) and low <= value <= high
            require(fits, f"{path}: {key} is {value!r:.60}; expected {kind.__name__} from {low} to {high}")
        require(len(set(found.values())) <= 1, f"{path} contradicts itself: {found}")
        return kind(next(iter(found.values()))) if found else default

    default, high = OPTIONAL | {"rope_theta": FAMILIES[name][2]}, {"n_layers": 256, "context": 2**30}
    kinds = {field: (get_args(hint) or [hint])[0] for field, hint in get_type_hints(MoEConfig).items()}
    c = {f: get(kinds[f], keys, default.get(f, ...), high=high.get(f)) for f, keys in KEYS.items()}
    L, only = c["n_layers"], raw.get("mlp_only_layers") or []
    for key, value in (NEUTRAL | {"layer_types": ["full_attention"] * L}).items():
        require(raw.get(key) in (None, value), f"{path}: {key} is {raw.get(key)!r:.80}; we only compute {value!r:.60}")
    window = get(int, "sliding_window", None, high=2**30) if raw.get("use_sliding_window", True) else None
    require(window is None or window >= c["context"], f"{path}: sliding_window {window} is below the context")
    every, step = (get(int, key, 1) for key in ("moe_layer_freq", "decoder_sparse_step"))
    first, shared = (get(int, key, 0, low=0) for key in ("first_k_dense_replace", "n_shared_experts"))
    inside = isinstance(only, list) and all(layer in range(L) for layer in only)
    require(inside, f"{path}: mlp_only_layers is {only!r:.60}; expected some of the layers 0 to {L - 1}")
    c["dense_layers"] = [i for i in range(L) if i < first or i % every or (i + 1) % step or i in only]
    c["d_expert"] = get(int, "moe_intermediate_size", None) or get(int, "intermediate_size")
    c["d_dense"], c["d_shared"] = get(int, "intermediate_size", None), shared * c["d_expert"]
    divided = name != "deepseek" or c["top_k"] > 1  # DeepSeek's code never divides a single weight by itself
    c["norm_topk"] = name == "mixtral" or (c["norm_topk"] and divided)
    try:
        return name, MoEConfig(**c, qk_norm=FAMILIES[name][1]), raw.get("dtype") or raw.get("torch_dtype") or "float32"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check(model, name: str, entries: dict, folder):
    """ValueError that names the first few tensors that are missing, misshapen or not used, if there are any."""
    left, wrong = dict(entries), []
    for tensor, part in pieces(model, name):
        stored, shape = left.pop(tensor, None), [*part.shape]
        found = "missing" if stored is None else stored.get_shape()
        if found != shape:
            wrong.append(f"{tensor}: {found!s:.60}, expected {shape}")
        if len(wrong) > 3:  # at once: the model may be far larger than the files
            break
    else:  # some old files keep the rotary frequencies, which follow from rope_theta
        wrong += [f"{tensor!r:.80}: not used by {name}" for tensor in left if not tensor.endswith(".inv_freq")]
    require(not wrong, f"{folder} does not fit its config.json: {'; '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}")


def room(device="cpu") -> float:
    """Free bytes on a device; infinity where that cannot be told."""
    kind, there = str(device).split(":")[0], {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    require(kind == "cpu" or there.get(kind, bool)(), f"this machine (or this build of torch) has no device {device}")
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    numbers = re.findall(r"MemAvailable: +(\d+)", free.read_text()) if free.is_file() else []
    limit = container.read_text().strip() if container.is_file() else ""
    return min([*(int(n) * 1024 for n in numbers), *([int(limit)] if limit.isdigit() else []), math.inf])


def read_tokenizer(folder: Path, vocab_size: int):
    """tokenizer.json -> a Tokenizer of the library tokenizers; None if there is none. ValueError if it does not fit."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer, processors  # an extra

        tokenizer = Tokenizer.from_file(str(path))
    except ImportError:
        raise ValueError(f"{path} needs the library tokenizers: pip install tokenizers") from None
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no readable tokenizer: {one_line(error)}") from None
    n, raw = tokenizer.get_vocab_size(), read_json(settings) if settings.is_file() else {}
    require(n <= vocab_size, f"{path} has {n} tokens, the model only {vocab_size}")
    bos = str(bos.get("content") if isinstance(bos := raw.get("bos_token"), dict) else bos)
    if raw.get("add_bos_token") is True and (first := tokenizer.token_to_id(bos)) is not None:  # begins every text
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, first)])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save(model, path):
    """Write a model as a new folder, whole or not at all, which `load` opens and, but for deepseek, transformers, too.

    Dropout is left out. ValueError, with the reason, for what no family can express."""
    path, (name, settings) = Path(path), express(model)
    require(not path.exists(), f"{path} is there already; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as outer:
            folder = Path(outer, path.name)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
            save_file(dict(pieces(model, name)), weights := folder / "model.safetensors", {"format": "pt"})
            weights.chmod((folder / "config.json").stat().st_mode)  # the library lets nobody else read it
            folder.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {one_line(error)}") from error


def express(model):
    """The family that a model belongs to, and its config.json -> (name, dict). ValueError where there is none."""
    c, sparse = model.config, [module for module in model.modules() if isinstance(module, MoE)]
    parts = {type(model), *(type(part) for layer in sparse for part in (layer.router, layer.experts))}
    other = sorted(kind.__name__ for kind in parts - {MoETransformer, Router, Experts})
    require(not other, f"no family of the hub computes {', '.join(other)}")
    simple = c.norm_topk and not c.d_shared and not c.dense_layers
    name = {"full": "olmoe", "head": "qwen3_moe", "none": "mixtral" if simple else "deepseek"}[c.qk_norm]
    widths = {"moe_intermediate_size": c.d_expert, "intermediate_size": c.d_dense}
    first = {"first_k_dense_replace": len(c.dense_layers), "n_shared_experts": c.d_shared // c.d_expert}
    own = {
        "olmoe": {"intermediate_size": c.d_expert, "clip_qkv": c.clip_qkv},
        "mixtral": {"intermediate_size": c.d_expert, "head_dim": c.head_dim, "num_local_experts": c.n_experts},
        "qwen3_moe": {**widths, "head_dim": c.head_dim, "mlp_only_layers": list(c.dense_layers)},
        "deepseek": {**widths, **first, "n_routed_experts": c.n_experts},
    }
    settings = {k.split()[0]: getattr(c, f) for f, k in KEYS.items() if f not in ("clip_qkv", "head_dim")} | own[name]
    class_name = name.title().replace("_", "") + "ForCausalLM"  # qwen3_moe -> Qwen3MoeForCausalLM
    settings |= {"model_type": name, "architectures": [class_name], "hidden_act": "silu"}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    back, same = vars(read_config(settings, "config.json")[1]), ("dropout", *(() if c.dense_layers else ("d_dense",)))
    lost = {field: value for field, value in vars(c).items() if back[field] != value and field not in same}
    require(not lost, f"with qk_norm {c.qk_norm!r} this would be {name}, which cannot have {lost}")
    return name, settings


def describe(source) -> str:
    """What a checkpoint is: family, sizes, parameters, tensors, memory; on the hub, from its config.json alone."""
    folder = fetch(source, ABOUT)
    name, model, stored = plan(folder)
    c, n, free, tensors = model.config, model.n_params(), room(), "on the hub"
    if Path(source).is_dir():
        entries = read_entries(folder)
        check(model, name, entries, folder)
        tensors = f"{len(entries):,}: all, and no others"
    rows = {
        "family": f"{name}, saved in {stored}; width {c.d_model:,}, vocabulary {c.vocab_size:,}, context {c.context:,}",
        "layers": f"{c.n_layers}, {len(c.dense_layers)} of them dense; {c.n_heads} heads of {c.head_dim}",
        "experts": f"{c.n_experts} of width {c.d_expert:,}, top {c.top_k}; shared width {c.d_shared:,}",
        "parameters": f"{n:,} in all, {model.n_params(activated=True):,} activated for a token",
        "tensors": tensors,
        "bfloat16": f"{n * 2 / 1e9:,.2f} GB: {'fits' if n * 2 <= free else 'too large'}",
        "float32": f"{n * 4 / 1e9:,.2f} GB: {'fits' if n * 4 <= free else 'too large'}; {free / 1e9:,.2f} GB are free",
    }
    return "\n".join(f"{label:12}{text}" for label, text in rows.items())


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        require(len(sys.argv) == 2, "usage: python hf.py PATH_OR_REPO")
        print(describe(sys.argv[1]))
    except (ValueError, OSError) as error:
        print(f"hf.py: {error}", file=sys.stderr)
        sys.exit(1 if len(sys.argv) == 2 else 2)
