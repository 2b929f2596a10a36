"""Checkpoints of the Hugging Face hub, in and out: OLMoE, DeepSeekMoE (v1), Mixtral, Qwen3-MoE.

    python hf.py PATH_OR_REPO      tell what a checkpoint is, and whether it fits here

A checkpoint is a folder of config.json, model.safetensors (or an index and several such files) and
tokenizer.json. A family of models differs from another in the names of its tensors and in some
settings; this page has a table for the names, reads config.json, and then loads and saves. The
files may be broken or hostile: lab/checkpoints/untrusted.py and tokenizer.py there read them.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.checkpoint, __doc__)

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lab.checkpoints.tokenizer import read_tokenizer
from lab.checkpoints.untrusted import (
    DTYPES,
    Settings,
    copy_tensor,
    download,
    one_line,
    read_entries,
    read_object,
    require_tensors,
    room,
    same_tensors,
)
from lab.tools.checks import progress, require_finite, torch_defaults
from lab.tools.files import as_json, whole_folder
from moe import (
    Experts,
    MoE,
    MoEConfig,
    MoETransformer,
    Router,
    named_tensors,
    require,
    unwrapped,
)

# ------------------------------------------------------------------------------- names of tensors

# Our name -> theirs, without .weight. Where theirs are two, ours has the rows of both.
NAMES = {
    "embedding.weight": ["model.embed_tokens"],
    "norm.weight": ["model.norm"],
    "unembedding.weight": ["lm_head"],
    # The others stand in a layer: behind blocks.3. of ours, model.layers.3. of theirs.
    "attention_norm.weight": ["input_layernorm"],
    "attention.q.weight": ["self_attn.q_proj"],
    "attention.k.weight": ["self_attn.k_proj"],
    "attention.v.weight": ["self_attn.v_proj"],
    "attention.o.weight": ["self_attn.o_proj"],
    "attention.q_norm.weight": ["self_attn.q_norm"],
    "attention.k_norm.weight": ["self_attn.k_norm"],
    "ffn_norms.0.weight": ["post_attention_layernorm"],
    # A dense layer.
    "ffns.0.gate_up.weight": ["mlp.gate_proj", "mlp.up_proj"],
    "ffns.0.down.weight": ["mlp.down_proj"],
    # A MoE layer: the router, the experts e, the shared expert.
    "ffns.0.router.weight": ["mlp.gate"],
    "ffns.0.experts.gate_up": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "ffns.0.experts.down": ["mlp.experts.{e}.down_proj"],
    "ffns.0.shared.gate_up.weight": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
    "ffns.0.shared.down.weight": ["mlp.shared_experts.down_proj"],
}
STACKED = {  # all experts in one tensor, as transformers 5 can save them, or in two, as MLX does
    "ffns.0.experts.gate_up": [
        ["mlp.experts.gate_up_proj"],
        ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"],
    ],
    "ffns.0.experts.down": [["mlp.experts.down_proj"], ["mlp.switch_mlp.down_proj"]],
}
MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
WRAPPERS = ("_orig_mod", "module")  # torch.compile and data-parallel training stand before names


class Family(NamedTuple):
    """What tells one family of checkpoints from another."""

    words: dict[str, str]  # parts of names for which it has words of its own
    qk_norm: str  # where queries and keys are normalised, see MoEConfig
    rope_theta: float  # where config.json gives none


FAMILIES = {  # by the model_type of config.json
    "olmoe": Family({}, "full", 1e4),
    "deepseek": Family({}, "none", 1e4),
    "mixtral": Family(MIXTRAL, "none", 1e6),
    "qwen3_moe": Family({}, "head", 1e4),
}


def spelt(name: str, family: str) -> str:
    """The name of a tensor, in whatever words a file has it, in those of this family.

    >>> spelt("_orig_mod.model.layers.0.mlp.experts.7.up_proj.weight", "mixtral")
    'model.layers.0.block_sparse_moe.experts.7.w3.weight'
    """
    common = {theirs: ours for ours, theirs in MIXTRAL.items()}
    words = FAMILIES[family].words
    parts = []
    for part in name.split("."):
        part = common.get(part, part)
        if part not in WRAPPERS:
            parts.append(words.get(part, part))
    if parts[0] in ("embed_tokens", "layers", "norm"):  # saved without its output layer
        parts.insert(0, "model")
    if parts[-2:-1] == ["experts"]:  # stacked ones are no layers of torch, which have a weight
        parts.append("weight")
    return ".".join(parts)


def pieces(model, family: str, stored=()) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a family's checkpoint: yields (their name, the view of our weight).

    stored: the names in its files. Where they stack experts, so does this.
    """
    for path, weight in named_tensors(model).items():
        layer, ours = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", path).groups()
        prefix = "" if layer is None else f"model.layers.{layer}."

        # Find how it is stored: by NAMES, unless we see it stacked.
        names = [spelt(f"{prefix}{name}.weight", family) for name in NAMES[ours]]
        for stack in STACKED.get(ours, []):
            others = [spelt(f"{prefix}{name}.weight", family) for name in stack]
            if others[0] in stored:
                names = others

        # Ours has the rows of all: (2F, D) -> (F, D) twice, or as it is. Theirs is a matrix for
        # each expert, or a tensor like ours: (E, 2F, D) or (E, D, F).
        weight = weight.detach()
        rows = weight.chunk(len(names), max(0, weight.dim() - 2))
        for name, view in zip(names, rows, strict=True):
            if "{e}" not in name:
                yield name, view
                continue
            for e, matrix in enumerate(view):
                yield name.format(e=e), matrix


# ------------------------------------------------------------------------------------ config.json

# Field of MoEConfig -> its kind, and the keys that may hold it; the names differ by version.
KEYS = {
    "vocab_size": (int, "vocab_size"),
    "context": (int, "max_position_embeddings"),
    "d_model": (int, "hidden_size"),
    "clip_qkv": (float, "clip_qkv"),
    "n_layers": (int, "num_hidden_layers"),
    "n_heads": (int, "num_attention_heads"),
    "n_kv_heads": (int, "num_key_value_heads"),
    "n_experts": (int, "num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": (int, "num_experts_per_tok"),
    "norm_topk": (bool, "norm_topk_prob"),
    "norm_eps": (float, "rms_norm_eps"),
    "tied": (bool, "tie_word_embeddings"),
    "head_dim": (int, "head_dim"),
    "rope_theta": (float, "rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"),
}
OPTIONAL = {
    "n_kv_heads": None,
    "head_dim": None,
    "clip_qkv": None,
    "norm_topk": False,
    "tied": False,
}
HIGH = {"n_layers": 256, "context": 2**30}


def read_config(raw: dict, path):
    """What config.json says -> (family, MoEConfig, dtype of the file).

    path: for messages. ValueError that names a key which is missing, absurd, or would change the
    result in a way that moe.py does not compute.
    """
    name = str(raw.get("model_type"))
    names = ", ".join(FAMILIES)
    require(name in FAMILIES, f"{path}: model_type is {name:.60}; known are {names}")
    settings = Settings(raw, path)

    # Read the sizes that every family has.
    family = FAMILIES[name]
    defaults = OPTIONAL | {"rope_theta": family.rope_theta}
    sizes = {"qk_norm": family.qk_norm}
    for field, (kind, *keys) in KEYS.items():
        limits = {"high": HIGH.get(field)}
        if field in defaults:
            limits["default"] = defaults[field]
        sizes[field] = settings.get(kind, *keys, **limits)

    # Refuse what we would compute wrongly.
    others = {"layer_types": [["full_attention"] * sizes["n_layers"]]}
    if name != "olmoe":  # only this family clips
        others["clip_qkv"] = []
    settings.require_plain(others)

    # Mixtral always looks within its window, others where they are told, OLMoE by default.
    told = settings.get(bool, "use_sliding_window", default=name != "qwen3_moe")
    if told or name == "mixtral":
        sizes["context"] = settings.within_window(sizes["context"])

    # Find the dense layers, and the widths.
    sizes["dense_layers"] = dense_layers(settings, sizes["n_layers"])
    n_shared = settings.get(int, "n_shared_experts", default=0, low=0)
    width = settings.get(int, "moe_intermediate_size", default=None)
    sizes["d_expert"] = width or settings.get(int, "intermediate_size")
    sizes["d_dense"] = settings.get(int, "intermediate_size", default=None)
    sizes["d_shared"] = n_shared * sizes["d_expert"]

    # Mixtral always divides the k weights by their sum. DeepSeek never divides a single one.
    if name == "mixtral":
        sizes["norm_topk"] = True
    if name == "deepseek" and sizes["top_k"] == 1:
        sizes["norm_topk"] = False

    try:
        config = MoEConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return name, config, settings.dtype()


def dense_layers(settings: Settings, n_layers: int) -> list[int]:
    """The layers that are dense; families say it in different keys."""
    every = settings.get(int, "moe_layer_freq", default=1)
    step = settings.get(int, "decoder_sparse_step", default=1)
    first = settings.get(int, "first_k_dense_replace", default=0, low=0)
    named = settings.raw.get("mlp_only_layers", [])
    valid = isinstance(named, list) and all(layer in range(n_layers) for layer in named)
    problem = f"{settings.path}: mlp_only_layers is {named!r:.60}"
    require(valid, f"{problem}; expected some of the layers 0 to {n_layers - 1}")

    layers = []
    for i in range(n_layers):
        moe = i % every == 0 and (i + 1) % step == 0
        if i < first or i in named or not moe:
            layers.append(i)
    return layers


def write_config(model):
    """The family that a model belongs to, and its config.json -> (family, dict).

    ValueError, with the reason, where no family can express it.
    """
    model = unwrapped(model)

    # A router or expert of another class computes what no family does.
    classes = {type(model)}
    for module in model.modules():
        if isinstance(module, MoE):
            classes |= {type(module.router), type(module.experts)}
    other = sorted(kind.__name__ for kind in classes - {MoETransformer, Router, Experts})
    require(not other, f"no family of the hub computes {', '.join(other)}")

    # The norm of queries and keys tells the families apart, but for two.
    c = model.config
    mixtral = c.norm_topk and c.d_shared == 0 and not c.dense_layers
    unnormed = "mixtral" if mixtral else "deepseek"
    name = {"full": "olmoe", "head": "qwen3_moe", "none": unnormed}[c.qk_norm]

    # Write what all families have, and what only this one has.
    raw = {}
    for field, (_, key, *_) in KEYS.items():
        if field not in ("clip_qkv", "head_dim"):
            raw[key] = getattr(c, field)
    raw["intermediate_size"] = c.d_expert
    if name == "olmoe":
        raw["clip_qkv"] = c.clip_qkv
    if name == "mixtral":
        raw["head_dim"] = c.head_dim
        raw["num_local_experts"] = c.n_experts
    if name == "qwen3_moe":
        raw["head_dim"] = c.head_dim
        raw["mlp_only_layers"] = list(c.dense_layers)
    if name == "deepseek":
        raw["n_routed_experts"] = c.n_experts
        raw["n_shared_experts"] = c.d_shared // c.d_expert
        raw["first_k_dense_replace"] = len(c.dense_layers)
    if name in ("qwen3_moe", "deepseek"):
        raw["intermediate_size"] = c.d_dense
        raw["moe_intermediate_size"] = c.d_expert
    class_name = name.title().replace("_", "")  # qwen3_moe -> Qwen3Moe
    raw |= {
        "model_type": name,
        "architectures": [f"{class_name}ForCausalLM"],
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }

    # Read it back: what differs cannot be expressed. Dropout is left out, and without dense layers
    # their width means nothing.
    _, back, _ = read_config(raw, "config.json")
    lost = {}
    for field, value in vars(c).items():
        unused = field == "dropout" or (field == "d_dense" and not c.dense_layers)
        if not unused and getattr(back, field) != value:
            lost[field] = value
    problem = f"with qk_norm {c.qk_norm!r} this would be {name}, which cannot have {lost}"
    require(not lost, problem)
    return name, raw


# ---------------------------------------------------------------------------------- load and save

ABOUT = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]


@torch_defaults()
def load(source, dtype=None, device="cpu", cache=None, offline=False):
    """Open a checkpoint -> (model in evaluation mode, tokenizer of the library tokenizers or None).

    source: a folder, or owner/name[@revision] on the hub, which is downloaded to the folder `cache`
    (None: the hub's own) unless `offline`. dtype: float64, float32, bfloat16 or float16 (None: as
    stored). The files are only mapped: memory is taken for the model and some MB.
    ValueError or OSError, in one line, for what cannot be loaded.
    """
    sketch = outline(source, dtype, cache, offline)
    return fill(sketch, device, 0, cache, offline), sketch.tokenizer


class Outline(NamedTuple):
    """What a checkpoint will be, before its numbers are read."""

    source: str
    folder: Path
    family: str
    model: MoETransformer  # on the device meta: without numbers
    dtype: str
    tokenizer: object | None


@torch_defaults()
def outline(source, dtype=None, cache=None, offline=False) -> Outline:
    """Look at a checkpoint without its weights; the arguments are those of `load`."""
    folder = fetch(source, ABOUT, cache, offline)
    name, model, dtype = plan(folder, dtype)
    tokenizer = read_tokenizer(folder, model.config.vocab_size)
    return Outline(str(source), folder, name, model, dtype, tokenizer)


@torch_defaults()
def fill(sketch: Outline, device="cpu", spare: int = 0, cache=None, offline=False):
    """The model of an outline, with its weights, where so many bytes stay spare beside it."""
    source, folder, name, model, dtype, _ = sketch
    require_room(source, model, dtype, device, spare)

    # Get the weights, of the same commit, and compare them with config.json.
    if not Path(source).is_dir():
        repo = source.split("@")[0]
        files = [*ABOUT, "model*.safetensors"]
        folder = fetch(f"{repo}@{folder.name}", files, cache, offline)
    entries = stored_tensors(folder, model, name)

    # Copy them, in the order of the files.
    model = copy.deepcopy(model).to_empty(device=device)
    weights = dict(pieces(model, name, entries))
    for key, entry in progress(entries.items(), "loading", total=len(entries), unit="tensor"):
        if key in weights:
            copy_tensor(key, weights[key], entry)
    return model.eval()


def stored_tensors(folder: Path, model, family: str) -> dict:
    """The tensors of a checkpoint, which are those of this model: name -> slice, not read yet.

    ValueError that names what is missing, misshapen, not used, or there twice and not the same.
    """
    entries = {}
    for name, entry in read_entries(folder).items():
        ours = spelt(name, family)
        require(ours not in entries, f"{folder} has {ours} under several names")
        entries[ours] = entry

    # The output layer of a tied model is its embedding: a file has either, or both.
    if model.config.tied and "lm_head.weight" in entries:
        head = entries.pop("lm_head.weight")
        embedding = entries.setdefault("model.embed_tokens.weight", head)
        problem = f"{folder}: lm_head.weight is not model.embed_tokens.weight, but config.json ties"
        hint = "both: set tie_word_embeddings to false"
        require(same_tensors(embedding, head), f"{problem} {hint}")

    require_tensors(pieces(model, family, entries), entries, folder, family)
    return entries


def fetch(source, files: list[str], cache=None, offline=False) -> Path:
    """The folder of a checkpoint. From a repository of the hub these files are downloaded."""
    if Path(source).is_dir():
        return Path(source)
    repo = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    expected = "a folder nor a repository of the hub, owner/name or owner/name@revision"
    require(repo, f"{source} is neither {expected}")
    options = {"revision": repo[2], "allow_patterns": files}
    options |= {"cache_dir": cache, "local_files_only": offline}
    try:
        return download(repo[1], **options)
    except OSError as error:
        raise OSError(f"{source}: no folder here, nor had from the hub: {error}") from error


def plan(folder: Path, dtype=None):
    """What a checkpoint will be -> (family, model without numbers, dtype)."""
    path = folder / "config.json"
    name, config, stored = read_config(read_object(path), path)
    given = str(dtype or stored).removeprefix("torch.")
    dtype = str(getattr(torch, given, given)).removeprefix("torch.")  # half is float16
    names = ", ".join(DTYPES.values())
    require(dtype in DTYPES.values(), f"dtype is {given:.60}; expected one of {names}")
    with torch.device("meta"):
        model = MoETransformer(config).to(getattr(torch, dtype))
    return name, model, dtype


def require_room(source, model, dtype: str, device, spare: int = 0):
    """ValueError where a device has less free memory than a model and its work take."""
    need = sum(weight.nbytes for weight in model.parameters())
    free = room(device)
    hint = "take a larger machine"
    if model.n_params() * 2 + spare <= free:
        hint = "in bfloat16 it fits (dtype='bfloat16', or --dtype bfloat16)"
    work = f" and {spare / 1e9:,.2f} GB to work with" if spare else ""
    sizes = f"{need / 1e9:,.2f} GB in {dtype}{work}, and {device} has {free / 1e9:,.2f} GB free"
    require(need + spare <= free, f"{source} takes {sizes}: {hint}")


def save(model, path):
    """Write a model as a new folder, which `load` opens, and but for deepseek transformers, too.

    It is written whole or not at all. Dropout is left out. ValueError, with the reason, for what no
    family can express.
    """
    path = Path(path)
    name, raw = write_config(model)
    require(not path.exists(), f"{path} is there already; name a new folder")
    tensors = dict(pieces(model, name))
    for key, tensor in tensors.items():
        require_finite(key, tensor, f"{path} is not written")
    try:
        with whole_folder(path) as folder:
            config, weights = folder / "config.json", folder / "model.safetensors"
            config.write_text(as_json(raw, indent=2), encoding="utf-8")
            save_file(tensors, weights, {"format": "pt"})
            weights.chmod(config.stat().st_mode)  # the library lets nobody else read it
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {one_line(error)}") from error


def describe(source) -> str:
    """What a checkpoint is, and whether it fits; on the hub, from its config.json alone."""
    folder = fetch(source, ABOUT)
    name, model, stored = plan(folder)
    tensors = "on the hub"
    if Path(source).is_dir():
        entries = stored_tensors(folder, model, name)
        tensors = f"{len(entries):,}: all, and no others"

    c, n, free = model.config, model.n_params(), room()
    memory = {}
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        verdict = "fits" if n * size <= free else "too large"
        memory[dtype] = f"{n * size / 1e9:,.2f} GB: {verdict}"
    sizes = f"width {c.d_model:,}, vocabulary {c.vocab_size:,}, context {c.context:,}"
    dense = f"{len(c.dense_layers)} of them dense"
    shared = f"shared width {c.d_shared:,}"
    rows = {
        "family": f"{name}, saved in {stored}; {sizes}",
        "layers": f"{c.n_layers}, {dense}; {c.n_heads} heads of {c.head_dim}",
        "experts": f"{c.n_experts} of width {c.d_expert:,}, top {c.top_k}; {shared}",
        "parameters": f"{n:,} in all, {model.n_params(activated=True):,} activated for a token",
        "tensors": tensors,
        "bfloat16": memory["bfloat16"],
        "float32": f"{memory['float32']}; {free / 1e9:,.2f} GB are free",
    }
    return "\n".join(f"{label:12}{text}" for label, text in rows.items())


def main(argv) -> int:
    """`python hf.py PATH_OR_REPO` -> the exit code."""
    print(describe(flags.checkpoint(argv, __doc__)))
    return 0


if __name__ == "__main__":
    cli.program(main)
