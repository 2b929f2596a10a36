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
from safetensors.torch import load_file

import hf
from lab.bench_load import watched
from moe import MoEConfig, MoETransformer, Router

E, V = 5, 37  # experts and vocabulary of a tiny model
SIZES = {"vocab_size": V, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
         "num_experts_per_tok": 2, "intermediate_size": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))}  # fmt: skip
FAMILIES = {  # odd sizes on purpose: a mistake then meets another shape, or another number
    "olmoe": {"num_experts": E, "num_attention_heads": 10, "num_key_value_heads": 5},
    "mixtral": {"num_local_experts": E, "head_dim": 6},
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": 7, "head_dim": 6},
}
CASES = {
    "olmoe": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "olmoe-clip": {"clip_qkv": 0.3},
    "olmoe-norm-tied": {"norm_topk_prob": True, "tie_word_embeddings": True},
    "olmoe-top-1": {"num_experts_per_tok": 1},
    "olmoe-top-all": {"num_experts_per_tok": E},
    "mixtral": {"head_dim": None},
    "mixtral-top-1-tied": {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    "mixtral-top-all": {"num_experts_per_tok": E},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_moe-norm-tied": {"norm_topk_prob": True, "tie_word_embeddings": True, "decoder_sparse_step": 2},
    "qwen3_moe-top-1": {"num_experts_per_tok": 1},
    "qwen3_moe-top-all": {"num_experts_per_tok": E},
}


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def edit(path, change):
    """Change a JSON file; a value ... takes its key away."""
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def scatter(model, std=0.3):
    """Random weights, the norms among them, so that none can stand in for another."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std)
    return model.eval()


def peer(case, dtype=torch.float64):
    """A model of transformers."""
    transformers, family = pytest.importorskip("transformers"), case.split("-")[0]
    sizes = SIZES | FAMILIES[family] | CASES[case]
    config = transformers.AutoConfig.for_model(family, **sizes, experts_implementation="eager", dtype=dtype)
    return scatter(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    """From the same files, whole or in shards, the same logits, in float64 to 1e-6 and in float32 to 1e-4, and the same
    greedy text; and again from a config.json in the words of older versions."""
    theirs, tokens = peer(case), torch.randint(V, (2, 24))
    theirs.save_pretrained(tmp_path, max_shard_size="9KB" if "top" in case else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "top" not in case
    with torch.no_grad():
        ours, expected = hf.load(tmp_path)[0], theirs(tokens).logits
        close(ours(tokens).logits, expected, 1e-6)
        close(hf.load(tmp_path, "float32")[0](tokens).logits, theirs.float()(tokens).logits, 1e-4)
    assert ours.norm.weight.dtype == torch.float64 and expected.std() > 0.1
    said = theirs.double().generate(tokens[:, :5], max_new_tokens=9, do_sample=False, attention_mask=torch.ones(2, 5))
    assert torch.equal(ours.generate(tokens[:, :5], 9), said[:, 5:])
    old = {"rope_theta": theirs.config.rope_parameters["rope_theta"], "rope_parameters": ..., "rope_scaling": None}
    old |= {"num_experts": ..., "num_local_experts": E, "dtype": ..., "torch_dtype": "float64", "sliding_window": None}
    edit(tmp_path / "config.json", old)
    assert torch.equal(hf.load(tmp_path)[0](tokens).logits, ours(tokens).logits)


def deepseek(w, c, tokens):
    """DeepSeekMoE (arXiv 2401.06066, section 3) by the hub's names, in a straight line: (T,) -> (T, V)."""
    d, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    def swiglu(x, name):
        gate, up = w[f"{name}.gate_proj.weight"] @ x, w[f"{name}.up_proj.weight"] @ x
        return w[f"{name}.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)

    def turn(x, t):  # (heads, C), rotated as position t demands
        half = x.shape[1] // 2
        angle = t * c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    x = w["model.embed_tokens.weight"][tokens]  # (T, D)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm")
        q, k, v = ((y @ w[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, d // heads)) for n in "qkv")
        q, k = (torch.stack([turn(row, t) for t, row in enumerate(z)]) for z in (q, k))  # (T, heads, C)
        for t in range(len(tokens)):
            groups = [h * kv // heads for h in range(heads)]  # neighbours share their keys and values
            shares = [(k[: t + 1, g] @ q[t, h] / (d // heads) ** 0.5).softmax(0) for h, g in enumerate(groups)]
            seen = torch.cat([share @ v[: t + 1, g] for share, g in zip(shares, groups, strict=True)])
            x[t] += w[f"{at}self_attn.o_proj.weight"] @ seen
        for t, token in enumerate(norm(x, at + "post_attention_layernorm")):
            if layer < c["first_k_dense_replace"]:
                x[t] += swiglu(token, at + "mlp")
                continue
            weights, chosen = (w[at + "mlp.gate.weight"] @ token).softmax(0).topk(c["num_experts_per_tok"])
            if c["norm_topk_prob"] and len(chosen) > 1:
                weights = weights / weights.sum()
            x[t] += sum(a * swiglu(token, f"{at}mlp.experts.{e}") for a, e in zip(weights, chosen, strict=True))
            x[t] += swiglu(token, at + "mlp.shared_experts") if c["n_shared_experts"] else 0
    return norm(x, "model.norm") @ w["lm_head.weight"].T


DEEPSEEK = {  # changes of our model, and of its config.json
    "default": ({"dense_layers": (0,), "d_shared": 14}, {}),
    "norm": ({"dense_layers": (0, 1), "d_shared": 7, "norm_topk": True}, {}),
    "top-1": ({"top_k": 1, "d_shared": 7}, {"norm_topk_prob": True}),  # which DeepSeek's code then passes over
    "top-all": ({"top_k": E}, {"n_shared_experts": None}),
}


@pytest.mark.parametrize(("changes", "config"), DEEPSEEK.values(), ids=DEEPSEEK)
def test_deepseek_equals_a_straight_line(changes, config, tmp_path):
    """transformers lacks DeepSeekMoE v1; here are the same logits as of plain loops over tokens, heads and experts."""
    sizes = {"vocab_size": V, "d_model": 24, "n_kv_heads": 2, "n_experts": E, "top_k": 2, "d_expert": 7}
    sizes |= {"rope_theta": 300.0, "qk_norm": "none"}
    model, tokens = MoETransformer(MoEConfig(**sizes | changes)), torch.randint(V, (12,))
    hf.save(scatter(model).double(), tmp_path / "it")
    edit(tmp_path / "it/config.json", config)
    weights, c = load_file(tmp_path / "it/model.safetensors"), json.loads((tmp_path / "it/config.json").read_text())
    found = hf.load(tmp_path / "it")[0](tokens[None]).logits[0]
    close(found, deepseek(weights, c, tokens), 1e-6)  # our rotary angles are in float32


def test_number_formats(tmp_path):
    """A bfloat16 file is read as it is, exactly as float32, or as float16; a CPU runs all of them."""
    theirs, tokens = peer("olmoe", torch.bfloat16), torch.randint(V, (1, 9))
    theirs.save_pretrained(tmp_path)
    exact = theirs.float()(tokens).logits
    for dtype, tolerance in ((None, 0.1), (torch.bfloat16, 0.1), (torch.float32, 1e-5), ("float16", 0.02)):
        model = hf.load(tmp_path, dtype)[0]
        close(model(tokens).logits, exact, tolerance)
        assert str(model.norm.weight.dtype).endswith(str(dtype or "bfloat16"))


SMALL = {"d_model": 16, "n_layers": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}
TOYS = {  # what a toy may be, and the family that it then belongs to
    "default": ({}, "olmoe"),
    "olmoe": ({"norm_topk": True, "clip_qkv": 0.5, "tied": True, "n_kv_heads": 2, "dropout": 0.1}, "olmoe"),
    "mixtral": ({"qk_norm": "none", "norm_topk": True, "head_dim": 6, "norm_eps": 1e-6}, "mixtral"),
    "qwen3": ({"qk_norm": "head", "dense_layers": (1,), "d_dense": 9, "head_dim": 10}, "qwen3_moe"),
    "deepseek": ({"qk_norm": "none", "dense_layers": (0,), "d_shared": 16, "context": 512}, "deepseek"),
}


@pytest.mark.parametrize("toy", TOYS)
def test_save(toy, tmp_path):
    """A toy opens in transformers, with the same logits and the same greedy text; here it comes back bit by bit."""
    changes, family = TOYS[toy]
    model, tokens = scatter(MoETransformer(MoEConfig(**SMALL | changes))), torch.randint(48, (2, 9))
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
    assert [path.name for path in tmp_path.iterdir()] == ["it"]  # and no temporary folder


class Other(Router):
    """Another routing rule."""


REFUSED = [
    ({"d_shared": 8}, "olmoe, which cannot have {'d_shared': 8}"),
    ({"dense_layers": (0,)}, "olmoe, which cannot have {'dense_layers': (0,)"),
    ({"head_dim": 6}, "olmoe, which cannot have {'head_dim': 6}"),
    ({"qk_norm": "head", "clip_qkv": 1.0}, "qwen3_moe, which cannot have {'clip_qkv': 1.0}"),
    ({"qk_norm": "none", "d_shared": 9}, "deepseek, which cannot have {'d_shared': 9}"),
    ({"qk_norm": "none", "dense_layers": (1,)}, "deepseek, which cannot have {'dense_layers': (1,)"),
    ({"qk_norm": "none", "norm_topk": True, "top_k": 1, "d_shared": 8}, "cannot have {'norm_topk': True}"),
    (None, "no family of the hub computes Other"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_save_refuses(changes, message, tmp_path):
    """What no family can express is refused, with the reason, before anything is written."""
    model = MoETransformer(MoEConfig(**SMALL | (changes or {})))
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
    """What a call returns, and by how many bytes the memory grew at its peak (0 where no Linux tells)."""
    linux, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not linux.exists():
        return function(), 0
    linux.write_text("5")  # forget earlier peaks
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    return function(), (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before) * 1024


# Mutations: functions of the folder and a random number generator.
def config(**changes):
    return lambda folder, rng: edit(folder / "config.json", changes)


def data(change, name="model.safetensors"):
    return lambda folder, rng: (folder / name).write_bytes(change((folder / name).read_bytes(), rng))


def length(n, text=b""):
    """Another length of the header, and another header."""
    return data(lambda whole, rng: n.to_bytes(8, "little") + text + whole[8:])


def header(change):
    """change gets the entries of the header by name, and the name of one of them."""

    def mutate(whole, rng):
        n = int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8 : 8 + n])
        change(entries, rng.choice(sorted(entries.keys() - {"__metadata__"})))
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + n :]

    return data(mutate)


def entry(**changes):
    return header(lambda entries, name: entries[name].update(changes))


def index(weight_map):
    """The weights in a shard, a copy of them in another, and this index."""

    def mutate(folder, rng):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder / "copy.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return mutate


def pickled(name):
    def mutate(folder, rng):
        (folder / "model.safetensors").unlink()
        torch.save({"weight": torch.zeros(4)}, folder / name)

    return mutate


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
SWELLING = b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[0%b]}}' % (b",0" * 2 * 10**6)  # parsed, 34 times as much
NO_SAFETENSORS = {
    "cut in the numbers": data(lambda b, rng: b[: rng.randrange(100_000, len(b))]),
    "cut in the header": data(lambda b, rng: b[: rng.randrange(20, 20_000)]),
    "cut to 7 bytes": data(lambda b, rng: b[:7]),
    "cut to 0 bytes": data(lambda b, rng: b""),
    "more bytes": data(lambda b, rng: b + b"more"),
    "noise": data(lambda b, rng: b[:8] + rng.randbytes(len(b) - 8)),
    "header length 0": length(0),
    "header length 2^63": length(2**63),
    "header longer by 8": data(lambda b, rng: bytes([b[0] + 8]) + b[1:]),
    "header deep": length(10**6, b"[" * 10**6),
    "header that swells": length(len(SWELLING), SWELLING),
    "overlap": header(lambda h, _: h[GATE].update(data_offsets=h["lm_head.weight"]["data_offsets"])),
    "hole": header(lambda h, _: h.pop(GATE)),
    "out of range": entry(data_offsets=[2**40, 2**40 + 4]),
    "negative offset": entry(data_offsets=[-4, 0]),
    "huge shape": entry(shape=[2**40, 2**22]),
    "huge shape and offsets": entry(shape=[2**40], data_offsets=[0, 2**42]),
    "unknown dtype": entry(dtype="F7\n"),
    "pickle in disguise": pickled("model.safetensors"),
}
BAD = {name: (case, "/model.safetensors is cut off, altered, or no safetens") for name, case in NO_SAFETENSORS.items()}
BAD |= {
    "integers": (entry(dtype="I32"), r"'I32'}; expected F64, F32, F16, BF16"),
    "fp8": (header(lambda h, _: h[GATE].update(dtype="F8_E4M3", shape=[256, 256])), r"'F8_E4M3'}; expected F64, F32"),
    "transposed": (header(lambda h, _: h[GATE].update(shape=[64, 256])), r"\[64, 256\], expected \[256, 64\]"),
    "renamed": (header(lambda h, _: h.update({"odd": h.pop(GATE)})), "gate_proj.weight: missing, .*'odd': not used"),
    "pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle, which may run any code"),
    "no weights": (lambda folder, rng: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "shard outside": (index({"a": "../part.safetensors"}), r"'../part\.safetensors', and no .* beside it is called"),
    "shard of another kind": (index({"a": "pytorch_model.bin"}), "'pytorch_model.bin', and no .* beside it is called"),
    "shard missing": (index({"a": "other.safetensors"}), "'other.safetensors', and no .*: download it again"),
    "shards that repeat": (index({"a": "part.safetensors", "b": "copy.safetensors"}), "repeats tensors of another"),
    "index without a map": (index(["part.safetensors"]), "has no weight_map"),
    "no config": (lambda folder, rng: (folder / "config.json").unlink(), "there is no config.json"),
    "config cut": (data(lambda b, rng: b[: rng.randrange(9, 99)], "config.json"), "no readable JSON"),
    "config not UTF-8": (data(lambda b, rng: b"\xff\x00" + b, "config.json"), "no readable JSON"),
    "config of 9 MB": (data(lambda b, rng: b + b" " * 9_000_000, "config.json"), "expected at most 8,388,608"),
    "unknown family": (config(model_type="llama"), "llama; known are olmoe, deepseek, mixtral, qwen3_moe"),
    "run of ours": (config(model_type=..., train={}), "model_type is None; known are olmoe"),
    "key missing": (config(hidden_size=...), "has no hidden_size"),
    "negative": (config(num_experts=-4), "num_experts is -4; expected int from 1 to"),
    "absurd width": (config(hidden_size=10**12), "hidden_size is 1000000000000; expected int from 1 to 262144"),
    "absurd depth": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; expected int from 1 to 256"),
    "a petabyte": (config(intermediate_size=2**18, vocab_size=2**18), "does not fit its config.json|GB in float32"),
    "not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan; expected float"),
    "more layers": (config(num_hidden_layers=9), "layers.4.input_layernorm.weight: missing|layers.4.*missing"),
    "fewer layers": (config(num_hidden_layers=3), r"not used by olmoe; .* \.\.\."),
    "other vocabulary": (config(vocab_size=49), r"\[48, 64\], expected \[49, 64\]"),
    "two numbers of experts": (config(num_local_experts=8), "contradicts itself: {'num_experts': 16, 'num_local"),
    "more chosen than there": (config(num_experts_per_tok=17), "top_k 17 is more than the 16 experts"),
    "activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'; we only compute 'silu'"),
    "scores": (config(scoring_func="sigmoid"), "scoring_func is 'sigmoid'"),
    "rope type": (config(rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling is {'rope_type': 'yarn'"),
    "window": (config(sliding_window=8), "sliding_window 8 is below the context"),
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
    """Whatever another byte in a header or in config.json does: the checkpoint loads, or one ValueError tells why."""
    rng, bad, sizes = random.Random(0), 0, {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_experts": 2, "top_k": 1}
    hf.save(MoETransformer(MoEConfig(**sizes, d_expert=4)), tmp_path / "it")
    for i in range(200):
        path = tmp_path / "it" / ("config.json" if i % 2 else "model.safetensors")
        whole = path.read_bytes()
        at = rng.randrange(min(len(whole), 1200))
        path.write_bytes(whole[:at] + rng.randbytes(1) + whole[at + 1 :])
        try:
            hf.load(tmp_path / "it")
        except ValueError as error:
            assert "\n" not in str(error)
            bad += 1
        path.write_bytes(whole)
    assert 50 < bad < 200


def test_memory(good, tmp_path, monkeypatch):
    """Loading takes the memory of the weights, and a checkpoint for which there is too little is refused before."""
    saved = MoETransformer(MoEConfig(d_expert=1024, vocab_size=20_001)).bfloat16()  # some tensors come in two pieces
    hf.save(saved, tmp_path / "it")
    for dtype in ("bfloat16", "float32"):
        (model, _), _, grown = watched(lambda dtype=dtype: hf.load(tmp_path / "it", dtype))
        assert grown <= 1.15 * sum(weight.nbytes for weight in model.parameters())
        assert all(map(torch.equal, model.to(torch.bfloat16).parameters(), saved.parameters()))
    monkeypatch.setattr(hf, "room", lambda device: 10_000_000)
    with pytest.raises(ValueError, match=r"takes 0.01 GB in float32, and cpu has 0.01 GB free: try bfloat16"):
        hf.load(good)


def test_hub(good, tmp_path):
    """owner/name@revision is looked for in the hub's cache, and what is not there is told in one line."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(good, tmp_path / "models--some--model/snapshots" / commit)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text(commit)
    for source in ("some/model", "some/model@main", f"some/model@{commit}"):
        model, tokenizer = hf.load(source, cache=tmp_path, offline=True)
        assert model.n_params() == hf.load(good)[0].n_params() and tokenizer is None
    with pytest.raises(OSError, match=r"some/other: no folder here, nor had from the hub: .+"):
        hf.load("some/other", cache=tmp_path, offline=True)
    with pytest.raises(ValueError, match="nowhere is neither a folder nor a repository of the hub"):
        hf.load("nowhere")


REAL = {  # sizes, in the order of the keys below; billions of parameters, in all and activated
    "olmoe": (2048, 16, 16, 16, 64, 8, 50304, {"intermediate_size": 1024}, 6.9, 1.3),
    "deepseek": (2048, 28, 16, 16, 64, 6, 102400, {"intermediate_size": 10944, "moe_intermediate_size": 1408,
                 "n_shared_experts": 2, "first_k_dense_replace": 1}, 16.4, 2.8),
}  # fmt: skip


@pytest.mark.parametrize("family", REAL)
def test_describe(family, good, tmp_path):
    """The real checkpoints have as many parameters as their authors say, by their config.json alone."""
    *sizes, widths, n, activated = REAL[family]
    keys = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts"]
    keys += ["num_experts_per_tok", "vocab_size"]
    values = dict(zip(keys, sizes, strict=True)) | {"model_type": family, "max_position_embeddings": 4096} | widths
    (tmp_path / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}))
    name, model, dtype = hf.plan(tmp_path)
    assert (name, round(model.n_params() / 1e9, 1), dtype) == (family, n, "bfloat16")
    assert round(model.n_params(activated=True) / 1e9, 1) == activated
    text, toy = hf.describe(good), hf.load(good)[0]
    assert f"{toy.n_params():,} in all, {toy.n_params(activated=True):,} activated" in text and "olmoe" in text


def test_tokenizer(good, tmp_path):
    """Texts begin with the token that tokenizer_config.json asks for; a tokenizer that does not fit is refused."""
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(good, tmp_path / "it")
    words = tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "it/tokenizer.json"))
    assert hf.load(tmp_path / "it")[1].encode("a b a b").ids == [1, 2, 1, 2]
    (tmp_path / "it/tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": {"content": "<s>"}}')
    assert hf.load(tmp_path / "it")[1].encode("a b").ids == [0, 1, 2]
    (tmp_path / "it/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no readable tokenizer"):
        hf.load(tmp_path / "it")
    tokenizer.add_tokens([f"t{i}" for i in range(50)])
    tokenizer.save(str(tmp_path / "it/tokenizer.json"))
    with pytest.raises(ValueError, match="has 53 tokens, the model only 48"):
        hf.load(tmp_path / "it")
