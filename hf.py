"""Checkpoints of the Hugging Face hub, in and out: OLMoE, DeepSeekMoE (v1), Mixtral, Qwen3-MoE.

    python hf.py PATH_OR_REPO      tell what a checkpoint is, and whether it fits here

A checkpoint is a folder of config.json, model.safetensors (or an index and several such files) and
tokenizer.json. This page has a table for the names of its tensors, loads and saves. In
lab/checkpoints, families.py makes sizes of config.json, and config.json of sizes; untrusted.py and
tokenizer.py read files that may be broken or hostile.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.checkpoint, __doc__)

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lab.checkpoints.families import FAMILIES, MIXTRAL, read_config, write_config
from lab.checkpoints.tokenizer import read_tokenizer
from lab.checkpoints.untrusted import (
    DTYPES,
    copy_tensor,
    download,
    one_line,
    read_entries,
    read_object,
    require_tensors,
    room,
    same_tensors,
)
from lab.tools.checks import annotated, progress, require_finite, torch_defaults
from lab.tools.files import as_json, whole_folder
from moe import MoETransformer, named_tensors, require, unwrapped

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
WRAPPERS = ("_orig_mod", "module")  # torch.compile and data-parallel training stand before names


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


# ---------------------------------------------------------------------------------- load and save

ABOUT = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]


@annotated
@torch_defaults()
def load(source: str | Path, dtype=None, device="cpu", cache=None, offline=False):
    """Open a checkpoint -> (model in evaluation mode, tokenizer of the library tokenizers or None).

    source: a folder, or owner/name[@revision] on the hub, which is downloaded to the folder `cache`
    (None: the hub's own) unless `offline`. dtype: float64, float32, bfloat16 or float16 (None: what
    config.json names, or float32). The files are only mapped: memory is taken for the model and
    some MB.
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


@annotated
def save(model, path: str | Path):
    """Write a model as a new folder, which `load` opens, and but for deepseek transformers, too.

    It is written whole or not at all; what only training reads is left out. An embedding_scale is
    multiplied into the embedding, and the output layer written apart from it: the same logits.
    ValueError, with the reason, for what no family can express.
    """
    path = Path(path)
    model = without_scale(unwrapped(model))
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


@torch.no_grad()
def without_scale(model: MoETransformer) -> MoETransformer:
    """A model of the same logits whose embedding_scale is 1, as no family has one."""
    scale = model.config.embedding_scale
    if scale == 1:
        return model
    model = copy.deepcopy(model)
    if model.unembedding is None:
        V, D = model.embedding.weight.shape
        model.unembedding = torch.nn.Linear(D, V, bias=False)
        model.unembedding.weight = copy.deepcopy(model.embedding.weight)
    model.embedding.weight.mul_(scale)
    model.config = replace(model.config, embedding_scale=1.0, tied=False)
    return model


@annotated
def describe(source: str | Path) -> str:
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
