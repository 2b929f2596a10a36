"""hf.py: one checkpoint in many words opens as the same model; what is another model is refused."""

import json
import re

import pytest
import torch
from by_hand import close, full, refused
from safetensors.torch import load_file, save_file
from test_hf import TIED, edit, peer, scattered

import hf
from lab.checkpoints.untrusted import read_object
from moe import MoEConfig, MoETransformer

SMALL = {"d_model": 16, "n_layers": 2, "n_experts": 4, "top_k": 2, "d_expert": 6}
FAMILIES = {  # a model of each
    "olmoe": {"clip_qkv": 0.5},
    "mixtral": {"qk_norm": "none", "norm_topk": True, "rope_theta": 500.0},
    "qwen3_moe": {"qk_norm": "head", "dense_layers": (1,)},
    "deepseek": {"qk_norm": "none", "dense_layers": (0,), "d_shared": 12},
}
MATRIX = re.compile(r"(.*(?:mlp|block_sparse_moe))\.experts\.(\d+)\.(\w+)\.weight")
MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


# ---- ways to write names: tensors -> tensors


def renamed(change):
    """Every name as change writes it."""
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def stacked(gate, down, up=None):
    """All experts of a layer in one tensor for each of these names; without up, gate has both."""

    def stack(tensors):
        others, matrices = {}, {}
        for name, tensor in tensors.items():
            match = MATRIX.fullmatch(name)
            if match is None:
                others[name.replace("block_sparse_moe", "mlp")] = tensor
                continue
            layer, _, kind = match.groups()
            layer = layer.replace("block_sparse_moe", "mlp")
            matrices.setdefault((layer, MIXTRAL.get(kind, kind)), []).append(tensor)
        for (layer, kind), experts in matrices.items():
            whole = torch.stack(experts)  # in the order of names, as there are fewer than ten
            if kind == "down_proj":
                others[f"{layer}.{down}"] = whole
            elif up is not None:
                others[f"{layer}.{gate if kind == 'gate_proj' else up}"] = whole
            elif kind == "gate_proj":
                both = [whole, torch.stack(matrices[layer, "up_proj"])]
                others[f"{layer}.{gate}"] = torch.cat(both, 1)
        return others

    return stack


def as_mixtral(name):
    """Mixtral's words for a MoE layer, or the other families' words for Mixtral's."""
    for theirs, common in MIXTRAL.items():
        if "block_sparse_moe.experts" in name:
            name = name.replace(f".{theirs}.", f".{common}.")
        elif "mlp.experts" in name:
            name = name.replace(f".{common}.", f".{theirs}.")
    swap = {"block_sparse_moe": "mlp", "mlp": "block_sparse_moe"}
    return ".".join(swap.get(part, part) for part in name.split("."))


MLX = stacked(*(f"switch_mlp.{kind}_proj.weight" for kind in ("gate", "down", "up")))
NAMES = {
    "as transformers 5 has them in memory": stacked("experts.gate_up_proj", "experts.down_proj"),
    "as MLX stacks them": MLX,
    "in another family's words": renamed(as_mixtral),
    "compiled": renamed(lambda name: f"_orig_mod.{name}"),
    "compiled in data-parallel training": renamed(lambda name: f"module._orig_mod.{name}"),
    "without the prefix": renamed(lambda name: name.removeprefix("model.")),
    "with rotary frequencies": lambda tensors: (
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    ),
}


# ---- ways to write settings: config -> config


def moved_rope(place, **others):
    """rope_theta within an object of its own, beside others."""

    def move(config):
        config[place] = {"rope_theta": config.pop("rope_theta")} | others
        return config

    return move


def numbers(kind, change):
    """Every number of a kind in another form."""
    return lambda config: {
        key: change(value) if type(value) is kind else value for key, value in config.items()
    }


def plus(**others):
    return lambda config: config | others


SETTINGS = {
    "integers as floats": numbers(int, float),
    "truths as numbers": numbers(bool, int),
    "whole floats as integers": numbers(float, lambda value: int(value) if value >= 1 else value),
    "nulls left out": lambda config: {k: v for k, v in config.items() if v is not None},
    "swish": plus(hidden_act="swish"),
    "torch_dtype": lambda config: config | {"torch_dtype": config.pop("dtype")},
    "dtype twice": plus(dtype="torch.float32", torch_dtype="float32"),
    "dtype float": plus(dtype="float"),
    "rope null": plus(rope_scaling=None, rope_parameters=None),
    "rope empty": plus(rope_scaling={}, rope_parameters={}),
    "rope default": plus(rope_scaling={"type": "default"}),
    "rope everywhere": lambda config: (
        config | {"rope_parameters": {"rope_theta": config["rope_theta"]}}
    ),
    "theta in rope_parameters": moved_rope("rope_parameters", rope_type="default"),
    "theta in rope_scaling": moved_rope("rope_scaling", rope_type=None, factor=None),
    "all of it turned": moved_rope("rope_parameters", partial_rotary_factor=1.0, factor=1),
    "linear, by one": plus(rope_scaling={"type": "linear", "factor": 1.0}),
    "yarn, by one": plus(rope_parameters={"rope_type": "yarn", "factor": 1, "beta_fast": 32.0}),
    "one group": plus(n_group=1.0, topk_group=1, topk_method="group_limited_greedy"),
    "no scale": plus(routed_scaling_factor=1.0, scoring_func="softmax", partial_rotary_factor=1),
    "no window": plus(sliding_window=None, use_sliding_window=False, max_window_layers=1),
    "wide window": plus(sliding_window=64, use_sliding_window=True),
    "kinds of layers": plus(layer_types=["full_attention"] * 2),
    "training": plus(attention_dropout=0.1, router_jitter_noise=0.1, router_aux_loss_coef=0.01),
    "no bias": plus(attention_bias=None, mlp_bias=0),
    "bias false": plus(attention_bias=0.0, mlp_bias=False),
    "not quantised": plus(quantization=None, quantization_config={}),
}


# ---- the matrix


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module", params=["olmoe", *full(*list(FAMILIES)[1:])])
def checkpoint(request, tmp_path_factory):
    """A model of a family, its config.json and its tensors."""
    model = scattered(MoETransformer(MoEConfig(**SMALL | FAMILIES[request.param])))
    folder = tmp_path_factory.mktemp("saved") / request.param
    hf.save(model, folder)
    return model, read_object(folder / "config.json"), load_file(folder / "model.safetensors")


TOKENS = torch.arange(18).view(2, 9)


@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "tied"])
@pytest.mark.parametrize("words", [*list(NAMES)[:2], *full(*list(NAMES)[2:])])
def test_names(words, tied, checkpoint, tmp_path):
    """Whatever its tensors are called, and whether a tied one has its embedding once or twice."""
    model, config, tensors = checkpoint
    if tied:
        config = config | TIED
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        if words == "as MLX stacks them":  # and the output layer alone
            del tensors["model.embed_tokens.weight"]
    write(tmp_path / "other", config, NAMES[words](tensors))
    other, _ = hf.load(tmp_path / "other")
    assert other.config.tied == tied
    head = other if tied else model
    expected = head.head(model.run_blocks(model.embed(TOKENS)))
    assert torch.equal(other(TOKENS).logits, expected)
    assert "all, and no others" in hf.describe(tmp_path / "other")


@pytest.mark.parametrize("words", [*list(SETTINGS)[:3], *full(*list(SETTINGS)[3:])])
def test_settings(words, checkpoint, tmp_path):
    """Whatever neutral settings it has, and however they are written."""
    model, config, tensors = checkpoint
    write(tmp_path / "other", SETTINGS[words](dict(config)), tensors)
    other, _ = hf.load(tmp_path / "other")
    assert other.config == hf.read_config(config, "")[1]
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "case", ["olmoe", *full("mixtral", "qwen3_moe", "olmoe, divided and tied")]
)
def test_transformers_own_words(case, tmp_path):
    """What transformers saves as it has it in memory opens with the same logits, as does its body
    alone where it is tied."""
    theirs = peer(case)
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked/model.safetensors").keys()
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    expected = theirs(TOKENS).logits
    close(hf.load(tmp_path / "stacked")[0](TOKENS).logits, expected, 1e-6)
    if theirs.config.tie_word_embeddings:
        theirs.model.save_pretrained(tmp_path / "body")
        close(hf.load(tmp_path / "body")[0](TOKENS).logits, expected, 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_ropes_by_one(kind, tmp_path):
    """A rope that is scaled by one is plain in transformers, too."""
    rope = {"rope_type": kind, "factor": 1.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
    theirs = peer("mixtral", rope_parameters=rope, head_dim=6)
    theirs.save_pretrained(tmp_path / "saved")
    close(hf.load(tmp_path / "saved")[0](TOKENS).logits, theirs(TOKENS).logits, 1e-6)


# ---- what is another model


OTHERS = [  # (settings, the key that is named)
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; we only compute 'silu'"),
    ({"hidden_act": "SwiGLU"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": 1}, "mlp_bias"),
    ({"scoring_func": "sigmoid"}, "scoring_func"),
    ({"n_group": 4}, "n_group"),
    ({"topk_group": 2}, "topk_group"),
    ({"topk_method": "noaux_tc"}, "topk_method"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization": {"bits": 4}}, "quantization is {'bits': 4}"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"num_local_experts": 8, "num_experts": 4}, "contradicts itself: {'num_experts': 4, 'num_lo"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_parameters.rope_theta"),
    ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype"),
    ({"model_type": "llama"}, "model_type is llama; known are olmoe, deepseek, mixtral"),
    ({"hidden_size": None}, "has no hidden_size"),
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000; expected int from 1 to"),
    ({"hidden_size": 16.5}, "hidden_size is 16.5"),
    ({"hidden_size": "16"}, "hidden_size is '16'"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected float"),
    ({"rope_theta": [1e4]}, "rope_theta"),
    ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ({"sliding_window": 0, "use_sliding_window": True}, "sliding_window is 0; expected int from 1"),
    ({"num_experts_per_tok": 5}, "top_k 5 is more than the 4 experts"),
    ({"mlp_only_layers": [2]}, "mlp_only_layers"),
]
ROPES = [  # (what stands in rope_scaling or rope_parameters, the key within)
    ({"type": "yarn"}, "rope_type"),
    ({"rope_type": "linear", "factor": 2.0}, "rope_type"),
    ({"rope_type": "linear"}, "rope_type"),
    ({"rope_type": "dynamic", "factor": 4}, "rope_type"),
    ({"rope_type": "longrope", "factor": 1.0, "short_factor": [2.0]}, "rope_type"),
    ({"factor": 8.0}, "factor"),
    ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ({"rope_type": "yarn", "factor": 1.0, "attention_factor": 0.5}, "attention_factor"),
    ({"full_attention": {"rope_type": "default"}}, ""),
    ("linear", ""),
    (2.0, ""),
]


def test_other_models(checkpoint):
    """What config.json asks for and we do not compute is refused by the name of its key."""
    _, config, _ = checkpoint
    cases = list(OTHERS)
    for rope, key in ROPES:
        for place in ("rope_scaling", "rope_parameters"):
            cases.append(({place: rope}, f"{place}.{key}" if key else f"{place} is "))
    if config["model_type"] != "olmoe":
        cases.append(({"clip_qkv": 8.0}, "clip_qkv is 8.0"))
    for changes, message in cases:
        with refused(message):
            hf.read_config(config | changes, "config.json")


def test_other_tensors(checkpoint, tmp_path):
    """Tied, and yet two; stacked, and yet one by one; under two names; transposed."""
    _, config, tensors = checkpoint
    write(tmp_path / "tied", config | TIED, tensors)
    with refused("lm_head.weight is not model.embed_tokens.weight", "tie_word_embeddings"):
        hf.load(tmp_path / "tied")
    alone = stacked("experts.gate_up_proj", "experts.down_proj")(tensors)
    write(tmp_path / "both", config, tensors | alone)
    mixtral = config["model_type"] == "mixtral"  # its router has two names now
    with refused("under several names" if mixtral else "not used by"):
        hf.load(tmp_path / "both")
    write(
        tmp_path / "twice", config, tensors | {"module.lm_head.weight": tensors["lm_head.weight"]}
    )
    with refused("has lm_head.weight under several names"):
        hf.load(tmp_path / "twice")
    turned = {k: v.transpose(1, 2) if v.dim() == 3 else v for k, v in alone.items()}
    write(tmp_path / "turned", config, turned)
    with refused("[4, 16, 12], expected [4, 12, 16]"):
        hf.load(tmp_path / "turned")


def test_windows(tmp_path, capsys):
    """A model whose attention looks back a few tokens is exact up to so many, and says so."""
    theirs = peer("mixtral", sliding_window=8)
    theirs.save_pretrained(tmp_path)
    ours, _ = hf.load(tmp_path)
    tokens = torch.randint(37, (2, 9))
    close(ours(tokens[:, :8]).logits, theirs(tokens[:, :8]).logits, 1e-6)
    assert "attention looks back 8 tokens: the context is cut to that" in capsys.readouterr().err
    with refused("longer than the context, 8"):
        ours(tokens)

    # Who else looks through a window, and when.
    edit(tmp_path / "config.json", use_sliding_window=False)  # Mixtral knows no such key
    raw = read_object(tmp_path / "config.json")
    for family, told, context in [
        ("mixtral", False, 8),
        ("olmoe", None, 8),
        ("olmoe", False, 64),
        ("qwen3_moe", None, 64),
        ("qwen3_moe", True, 8),
    ]:
        changed = raw | {"model_type": family, "use_sliding_window": told}
        assert hf.read_config(changed, "")[1].context == context
