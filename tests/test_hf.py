"""hf.py: a checkpoint of the hub computes here what it computes elsewhere, and a bad one is refused in one line."""

import json
import random
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import hf
from moe import MoEConfig, MoETransformer, Router
from shards import write_tensors

E, V = 5, 37  # experts and vocabulary of a tiny model
SIZES = {"vocab_size": V, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"num_experts_per_tok": 2, "intermediate_size": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
SIZES |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
FAMILIES = {  # odd sizes on purpose: what a mistake computes then has another shape, or another value
    "olmoe": {"num_experts": E, "num_attention_heads": 10, "num_key_value_heads": 5},
    "mixtral": {"num_local_experts": E, "head_dim": 6},
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": 7, "head_dim": 6},
}
CASES = {
    "olmoe": {},
    "olmoe-clip": {"clip_qkv": 0.3},
    "olmoe-norm-tied": {"norm_topk_prob": True, "tie_word_embeddings": True},
    "olmoe-top-1": {"num_experts_per_tok": 1},
    "olmoe-top-all": {"num_experts_per_tok": E, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "mixtral": {},
    "mixtral-top-1-tied": {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    "mixtral-top-all": {"num_experts_per_tok": E, "head_dim": None},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_moe-norm-tied": {"norm_topk_prob": True, "tie_word_embeddings": True, "decoder_sparse_step": 2},
    "qwen3_moe-top-1": {"num_experts_per_tok": 1},
    "qwen3_moe-top-all": {"num_experts_per_tok": E},
}


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def peer(case, dtype=torch.float64):
    """A model of transformers with random weights, the norms among them, so that none can stand in for another."""
    transformers, family = pytest.importorskip("transformers"), case.split("-")[0]
    sizes = SIZES | FAMILIES[family] | CASES[case]
    config = transformers.AutoConfig.for_model(family, **sizes, experts_implementation="eager", dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    """From the same files the same logits, in float64 to 1e-6 and in float32 to 1e-4, and the same greedy text."""
    theirs, tokens = peer(case), torch.randint(V, (2, 24))
    theirs.save_pretrained(tmp_path / "it", max_shard_size="9KB" if "top" in case else "1GB")
    assert len(list((tmp_path / "it").glob("*.safetensors"))) > 1 or "top" not in case
    with torch.no_grad():
        ours, expected = hf.load(tmp_path / "it")[0], theirs(tokens).logits
        close(ours(tokens).logits, expected, 1e-6)
        close(hf.load(tmp_path / "it", "float32")[0](tokens).logits, theirs.float()(tokens).logits, 1e-4)
    assert ours.embedding.weight.dtype == torch.float64 and expected.std() > 0.1
    said = theirs.double().generate(tokens[:, :5], max_new_tokens=9, do_sample=False, attention_mask=torch.ones(2, 5))
    assert torch.equal(ours.generate(tokens[:, :5], 9), said[:, 5:])


def deepseek(w, c, tokens):
    """DeepSeekMoE (arXiv 2401.06066, section 3; arXiv 2307.09288 for the rest) in a straight line, token by token."""
    d, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    def swiglu(x, name):
        gate, up = w[f"{name}.gate_proj.weight"] @ x, w[f"{name}.up_proj.weight"] @ x
        return w[f"{name}.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)

    def turn(x, t):  # (heads, C), rotated as the position t says
        half = x.shape[-1] // 2
        angle = t * c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    x = w["model.embed_tokens.weight"][tokens]  # (T, D)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm")
        q, k, v = ((y @ w[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, d // heads)) for n in "qkv")
        q, k = (torch.stack([turn(row, t) for t, row in enumerate(z)]) for z in (q, k))  # (T, heads, C)
        rows = []
        for t in range(len(tokens)):
            seen = []
            for h in range(heads):
                g = h * kv // heads  # heads share keys and values in neighbourly groups
                attention = (k[: t + 1, g] @ q[t, h] / (d // heads) ** 0.5).softmax(0)
                seen.append(attention @ v[: t + 1, g])
            rows.append(w[f"{at}self_attn.o_proj.weight"] @ torch.cat(seen))
        x = x + torch.stack(rows)
        for t, token in enumerate(norm(x, at + "post_attention_layernorm")):
            if layer < c["first_k_dense_replace"]:
                x[t] += swiglu(token, at + "mlp")
                continue
            weights, chosen = (w[at + "mlp.gate.weight"] @ token).softmax(0).topk(c["num_experts_per_tok"])
            if c["norm_topk_prob"] and len(chosen) > 1:
                weights = weights / weights.sum()
            for weight, e in zip(weights, chosen, strict=True):
                x[t] += weight * swiglu(token, f"{at}mlp.experts.{e}")
            if c["n_shared_experts"]:
                x[t] += swiglu(token, at + "mlp.shared_experts")
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def deepseek_folder(folder, **changes):
    """A random checkpoint in the hub's own layout, which is written here name by name -> (weights, config)."""
    c = SIZES | {"model_type": "deepseek", "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    c |= {"n_routed_experts": E, "n_shared_experts": 2, "moe_intermediate_size": 7, "first_k_dense_replace": 1}
    c |= {"norm_topk_prob": False, "rope_theta": 300.0, "torch_dtype": "float64", "scoring_func": "softmax"} | changes
    d, sizes = c["hidden_size"], {"model.embed_tokens": (V, 24), "model.norm": (24,), "lm_head": (V, 24)}
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        sizes |= {f"{at}input_layernorm": (d,), f"{at}post_attention_layernorm": (d,)}
        sizes |= {f"{at}self_attn.{n}_proj": (d if n in "qo" else 12, d) for n in "qkvo"}
        ffns = {"mlp": 12}
        if layer >= c["first_k_dense_replace"]:
            sizes[at + "mlp.gate"] = (E, d)
            ffns = {f"mlp.experts.{e}": 7 for e in range(E)}
            ffns |= {"mlp.shared_experts": 7 * c["n_shared_experts"]} if c["n_shared_experts"] else {}
        for name, width in ffns.items():
            sizes |= {f"{at}{name}.{n}_proj": (d, width) if n == "down" else (width, d) for n in ("gate", "up", "down")}
    weights = {f"{name}.weight": torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in sizes.items()}
    folder.mkdir()
    write_tensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(c))
    return weights, c


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True},
        {"norm_topk_prob": True, "num_experts_per_tok": 1, "first_k_dense_replace": 2},
        {"num_experts_per_tok": E, "n_shared_experts": None, "first_k_dense_replace": 0},
    ],
    ids=["default", "norm", "top-1", "top-all"],
)
def test_deepseek_equals_a_straight_line(changes, tmp_path):
    """transformers lacks DeepSeekMoE v1: the same logits as of a plain loop over tokens, heads and experts; and back."""
    weights, c = deepseek_folder(tmp_path / "it", **changes)
    model, tokens = hf.load(tmp_path / "it")[0], torch.randint(V, (12,))
    close(model(tokens[None]).logits[0], deepseek(weights, c, tokens), 1e-6)  # our rotary angles are in float32
    if changes.get("num_experts_per_tok") != 1:
        hf.save(model, tmp_path / "back")
        assert torch.equal(hf.load(tmp_path / "back")[0](tokens[None]).logits, model(tokens[None]).logits)


@pytest.mark.parametrize("case", ["olmoe-top-all", "mixtral", "qwen3_moe-norm-tied"])
def test_spellings(case, tmp_path):
    """Older files say the same in other words: rope_theta at the top, torch_dtype, other names for the experts."""
    theirs, tokens = peer(case), torch.randint(V, (1, 9))
    theirs.save_pretrained(tmp_path)
    path, expected = tmp_path / "config.json", hf.load(tmp_path)[0](tokens).logits
    config = json.loads(path.read_text())
    n = config.pop("num_experts", None) or config.pop("num_local_experts")
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "sliding_window": None}
    for spelling in ("num_experts", "num_local_experts"):
        path.write_text(json.dumps(config | {spelling: n, "torch_dtype": config["dtype"], "dtype": None}))
        assert torch.equal(hf.load(tmp_path)[0](tokens).logits, expected)


def test_number_formats(tmp_path):
    """bfloat16 and float16 files load as they are, as exact float32, and onto each other; a CPU runs all of them."""
    theirs, tokens = peer("olmoe", torch.bfloat16), torch.randint(V, (1, 9))
    theirs.save_pretrained(tmp_path)
    exact = theirs.float()(tokens).logits
    for dtype, tolerance in ((None, 0.1), ("bfloat16", 0.1), (torch.float32, 1e-5), ("float16", 0.02)):
        model = hf.load(tmp_path, dtype)[0]
        close(model(tokens).logits, exact, tolerance)
        assert str(model.norm.weight.dtype) == f"torch.{dtype or 'bfloat16'}".replace("torch.torch", "torch")


TOYS = {  # what a toy may be, and the family that it becomes
    "default": ({}, "olmoe"),
    "olmoe": ({"norm_topk": True, "clip_qkv": 0.5, "tied": True, "n_kv_heads": 2, "dropout": 0.1}, "olmoe"),
    "mixtral": ({"qk_norm": "none", "norm_topk": True, "head_dim": 6}, "mixtral"),
    "qwen3": ({"qk_norm": "head", "dense_layers": (1,), "d_dense": 9, "head_dim": 10}, "qwen3_moe"),
    "deepseek": ({"qk_norm": "none", "dense_layers": (0,), "d_shared": 16, "context": 512}, "deepseek"),
}


@pytest.mark.parametrize("toy", TOYS)
def test_save(toy, tmp_path):
    """A toy opens in transformers, with the same logits and the same greedy text, and here it comes back bit by bit."""
    changes, family = TOYS[toy]
    sizes = {"d_model": 16, "n_layers": 2, "n_experts": 4, "top_k": 2, "d_expert": 8, "norm_eps": 1e-6}
    model, tokens = MoETransformer(MoEConfig(**sizes | changes)).eval(), torch.randint(48, (2, 9))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    hf.save(model, tmp_path / "it")
    back = hf.load(tmp_path / "it")[0]
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert hf.express(back) == hf.express(model) and hf.express(model)[0] == family
    if family != "deepseek":
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "it")
        close(theirs(tokens).logits, model(tokens).logits, 1e-4)
        said = theirs.generate(tokens, max_new_tokens=9, do_sample=False, attention_mask=torch.ones(2, 9))
        assert torch.equal(model.generate(tokens, 9), said[:, 9:])
    with pytest.raises(ValueError, match="is there already"):
        hf.save(model, tmp_path / "it")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it"]  # no temporary folder is left


class Other(Router):
    """Another routing rule."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_shared": 8}, "olmoe, which cannot have {'d_shared': 8}"),
        ({"dense_layers": (0,)}, "olmoe, which cannot have {'dense_layers': (0,)"),
        ({"head_dim": 6}, "olmoe, which cannot have {'head_dim': 6}"),
        ({"qk_norm": "head", "clip_qkv": 1.0}, "qwen3_moe, which cannot have {'clip_qkv': 1.0}"),
        ({"qk_norm": "none", "d_shared": 9}, "deepseek, which cannot have {'d_shared': 9}"),
        ({"qk_norm": "none", "dense_layers": (1,)}, "deepseek, which cannot have {'dense_layers': (1,)"),
        ({"qk_norm": "none", "norm_topk": True, "top_k": 1, "d_shared": 8}, "cannot have {'norm_topk': True}"),
        (None, "no family of the hub computes Other"),
    ],
)
def test_save_refuses(changes, message, tmp_path):
    """What no family can express is refused, with the reason, before anything is written."""
    sizes = {"d_model": 16, "n_layers": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}
    model = MoETransformer(MoEConfig(**sizes | (changes or {})))
    if changes is None:
        model.blocks[1].ffns[0].router = Other(model.config)
    with pytest.raises(ValueError, match=re.escape(message)):
        hf.save(model, tmp_path / "it")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of 14 MB, to be spoilt."""
    folder = tmp_path_factory.mktemp("good") / "it"
    hf.save(MoETransformer(MoEConfig(d_expert=256)), folder)
    return folder


def peak(function):
    """What a call returns, and how many bytes the memory grew at its peak (0 where Linux does not tell)."""

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    if not Path("/proc/self/clear_refs").exists():
        return function(), 0
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    return function(), status("VmHWM") - before


def config(**changes):
    """The mutation that changes config.json; ... takes a key away."""

    def mutate(folder, rng):
        values = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return mutate


def data(change, name="model.safetensors"):
    """The mutation that changes the bytes of a file."""
    return lambda folder, rng: (folder / name).write_bytes(change((folder / name).read_bytes(), rng))


def header(change):
    """The mutation that changes the header, which `change` gets as a list of (name, entry) and as the random one."""

    def mutate(whole, rng):
        length = int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8 : 8 + length])
        change(entries, rng.choice(sorted(entries.keys() - {"__metadata__"})))
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    return data(mutate)


def entry(**changes):
    """The mutation that changes the entry of a tensor; a function is called with the old value."""

    def change(entries, name):
        values = {key: value(entries[name][key]) if callable(value) else value for key, value in changes.items()}
        entries[name] |= values

    return header(change)


def index(*shards, **other):
    """The mutation that turns the file into part.safetensors, with an index that names these shards."""

    def mutate(folder, rng):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder / "copy.safetensors")
        weight_map = other.get("weight_map", dict(zip("abc", shards, strict=False)))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return mutate


def pickled(name):
    """The mutation that leaves a pickle of the weights."""

    def mutate(folder, rng):
        (folder / "model.safetensors").unlink()
        torch.save({"weight": torch.zeros(4)}, folder / name)

    return mutate


def length(value):
    return data(lambda whole, rng: value.to_bytes(8, "little") + whole[8:])


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
BAD = {
    "cut in the numbers": (data(lambda b, rng: b[: rng.randrange(100_000, len(b))]), "cut off, or altered"),
    "cut in the header": (data(lambda b, rng: b[: rng.randrange(20, 20_000)]), "it is cut off, or no safetensors"),
    "cut to 7 bytes": (data(lambda b, rng: b[:7]), "has 7 bytes"),
    "empty": (data(lambda b, rng: b""), "has 0 bytes"),
    "more bytes": (data(lambda b, rng: b + b"more"), "it is cut off, or altered"),
    "zeros": (data(lambda b, rng: bytes(len(b))), "its header 0"),
    "noise": (data(lambda b, rng: b[:8] + rng.randbytes(len(b) - 8)), "no readable JSON"),
    "header length 2^63": (length(2**63), "its header 9,223,372,036,854,775,808"),
    "header as long as the file": (length(10_000_000), "its header 10,000,000"),
    "header longer by 8": (data(lambda b, rng: bytes([b[0] + 8]) + b[1:]), "no readable JSON|an overlap or a hole"),
    "header deep": (data(lambda b, rng: (10**6).to_bytes(8, "little") + b"[" * 10**6 + b), "no readable JSON"),
    "header a list": (data(lambda b, rng: (2).to_bytes(8, "little") + b"[]"), "JSON, but no object"),
    "header of numbers": (header(lambda h, name: h.update({name: 7})), "is 7; expected dtype"),
    "overlap": (entry(data_offsets=lambda span: [span[0] - 4, span[1] - 4]), "an overlap or a hole"),
    "hole": (header(lambda h, name: h.pop(name)), "an overlap or a hole|cut off, or altered"),
    "out of range": (entry(data_offsets=lambda span: [2**40, 2**40 + span[1] - span[0]]), "an overlap or a hole"),
    "negative offset": (entry(data_offsets=[-4, 0]), "expected dtype"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "expected dtype"),
    "huge shape": (entry(shape=[2**40, 2**22]), "an overlap or a hole"),
    "huge shape and offsets": (entry(shape=[2**40], data_offsets=[0, 2**42]), "an overlap or a hole"),
    "many dimensions": (entry(shape=[1] * 1000), "expected dtype"),
    "shape of fractions": (entry(shape=lambda shape: [n + 0.5 for n in shape]), "expected dtype"),
    "shape true": (entry(shape=[True]), "expected dtype"),
    "dtype of integers": (entry(dtype="I32"), r"'I32'.*expected dtype \(F64, F32, F16, BF16\)"),
    "dtype a list": (entry(dtype=[]), "expected dtype"),
    "dtype too wide": (entry(dtype="F64"), "an overlap or a hole"),
    "transposed": (header(lambda h, _: h[GATE].update(shape=[64, 256])), r"\(64, 256\), expected \(256, 64\)"),
    "renamed": (header(lambda h, name: h.update({"odd": h.pop(GATE)})), "gate_proj.weight: missing, .*odd: not used"),
    "pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle, which may run any code"),
    "pickle in disguise": (pickled("model.safetensors"), "it is cut off, or no safetensors file"),
    "no weights": (lambda folder, rng: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "shard outside": (index("part.safetensors", "../part.safetensors"), "expected a .* of the same folder"),
    "shard at the root": (index("/etc/part.safetensors"), "expected a .* of the same folder"),
    "shard of another kind": (index("pytorch_model.bin"), "expected a .* of the same folder"),
    "shard missing": (index("part.safetensors", "other.safetensors"), "other.safetensors, which is missing"),
    "shards that repeat": (index("part.safetensors", "copy.safetensors"), "repeats tensors of another shard"),
    "index without a map": (index(weight_map=["part.safetensors"]), "has no weight_map"),
    "no config": (lambda folder, rng: (folder / "config.json").unlink(), "there is no config.json"),
    "config not JSON": (data(lambda b, rng: b[: rng.randrange(9, 99)], "config.json"), "no readable JSON"),
    "config not UTF-8": (data(lambda b, rng: b"\xff\x00" + b, "config.json"), "no readable JSON"),
    "config of 9 MB": (data(lambda b, rng: b + b" " * 9_000_000, "config.json"), "expected at most 8,388,608"),
    "unknown family": (config(model_type="llama"), "llama; known are olmoe, deepseek, mixtral, qwen3_moe"),
    "run of ours": (config(model_type=..., train={}), "None; known are .* opened by lab.checkpoint"),
    "key missing": (config(hidden_size=...), "has no hidden_size"),
    "key null": (config(num_experts=None), "has no num_experts or num_local_experts or n_routed_experts"),
    "negative": (config(num_experts=-4), "num_experts is -4; expected int from 1 to"),
    "absurd": (config(hidden_size=10**12), "hidden_size is 1000000000000; expected int from 1 to 262144"),
    "absurd layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; expected int from 1 to 256"),
    "large": (config(hidden_size=2**18, num_attention_heads=2**17, head_dim=2**18), "does not fit its config|takes"),
    "text": (config(vocab_size="48"), "vocab_size is '48'; expected int"),
    "not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan; expected float"),
    "truth": (config(tie_word_embeddings="no"), "expected bool"),
    "more layers": (config(num_hidden_layers=99), "layers.4.attn.*missing|layers.4.self_attn.q_proj.weight: missing"),
    "fewer layers": (config(num_hidden_layers=3), "not used by olmoe; .* \\.\\.\\."),
    "other vocabulary": (config(vocab_size=49), r"\(48, 64\), expected \(49, 64\)"),
    "two numbers of experts": (config(num_local_experts=8), "contradicts itself: {'num_experts': 16, 'num_local"),
    "two rope_thetas": (config(rope_parameters={"rope_theta": 5.0}), "contradicts itself"),
    "more chosen than there": (config(num_experts_per_tok=17), "top_k 17 is more than the 16 experts"),
    "heads that do not divide": (config(num_attention_heads=5), "64 does not divide into 5 heads"),
    "groups that do not divide": (config(num_key_value_heads=3), "n_heads 4 is not a multiple of n_kv_heads 3"),
    "activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'; we only compute 'silu'"),
    "scores": (config(scoring_func="sigmoid"), "scoring_func is 'sigmoid'"),
    "scaling factor": (config(routed_scaling_factor=2.5), "routed_scaling_factor is 2.5"),
    "rope type": (config(rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling is {'rope_type': 'yarn'"),
    "biases": (config(attention_bias=True), "attention_bias is True"),
    "window": (config(sliding_window=8), "sliding_window 8 is below the context"),
    "layer type": (config(layer_types=["linear_attention"] * 4), "layer_types is"),
    "dense layer outside": (config(model_type="qwen3_moe", mlp_only_layers=[9]), "some of the layers 0 to 3"),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config is"),
    "dtype of the config": (config(dtype="int8"), "dtype is int8; expected one of float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints(name, good, tmp_path, capsys, monkeypatch):
    """The command line and `load` say in one line what is wrong, before they take memory for it."""
    (mutate, message), folder = BAD[name], tmp_path / "it"
    shutil.copytree(good, folder)
    mutate(folder, random.Random(name))
    monkeypatch.setattr(sys, "argv", ["hf.py", str(folder)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(hf.__file__, run_name="__main__")
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and re.search(message, said) and "\n" not in said and len(said) < 800

    def load():
        with pytest.raises(ValueError, match=message):
            hf.load(folder)

    assert peak(load)[1] <= 2 * (good / "model.safetensors").stat().st_size


def test_bytes_at_random(tmp_path):
    """Whatever a flipped byte of a header or of config.json does: the checkpoint loads, or one ValueError tells why."""
    rng, bad = random.Random(0), 0
    hf.save(
        MoETransformer(MoEConfig(d_model=8, n_layers=1, n_heads=2, n_experts=2, top_k=1, d_expert=4)), tmp_path / "it"
    )
    for i in range(200):
        path = tmp_path / "it" / ("config.json" if i % 2 else "model.safetensors")
        whole = path.read_bytes()
        at = rng.randrange(min(len(whole), 1200))
        path.write_bytes(whole[:at] + rng.randbytes(1) + whole[at + 1 :])
        try:
            hf.load(tmp_path / "it")
        except ValueError as error:
            assert "\n" not in str(error), bad
            bad += 1
        path.write_bytes(whole)
    assert 50 < bad < 200


def test_memory(good, tmp_path, monkeypatch):
    """Loading takes the memory of the weights, and a checkpoint for which there is not enough is refused before."""
    hf.save(MoETransformer(MoEConfig(d_expert=1024)).bfloat16(), tmp_path / "it")
    for dtype in ("bfloat16", "float32"):
        (model, _), grown = peak(lambda dtype=dtype: hf.load(tmp_path / "it", dtype))
        assert grown <= 1.15 * sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(hf, "room", lambda device: 10_000_000)
    with pytest.raises(ValueError, match=r"takes 0.0\d GB in float32, and cpu has 0.01 GB free: try bfloat16"):
        hf.load(good)
