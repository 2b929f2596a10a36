"""hf.py: a checkpoint of the hub computes here what it computes elsewhere, or is refused."""

import json
import random
import shutil
import sys

import pytest
import torch
from by_hand import SigmoidRouter, close, expert, full, refused
from safetensors.torch import load_file

import hf
from lab.checkpoints import rehearsal
from lab.checkpoints.rehearsal import watched
from lab.checkpoints.untrusted import read_object
from moe import MoEConfig, MoETransformer


def edit(path, **changes):
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scattered(model):
    """Random weights, the norms among them, so that none can stand in for another."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


# ---- from transformers, and back

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {  # odd sizes on purpose: a mistake then meets another shape, or another number
    "olmoe": {"num_experts": 5, "num_attention_heads": 10, "num_key_value_heads": 5},
    "mixtral": {"num_local_experts": 5, "head_dim": 6},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 7, "head_dim": 6},
}
TIED = {"tie_word_embeddings": True}
CASES = {
    "olmoe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "clip_qkv": 0.3,
    },
    "mixtral": {"head_dim": None},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "olmoe, divided and tied": {"norm_topk_prob": True, **TIED},
    "olmoe, all experts": {"num_experts_per_tok": 5},
    "mixtral, one expert, tied": {"num_experts_per_tok": 1, **TIED},
    "qwen3_moe, divided and tied": {"norm_topk_prob": True, "decoder_sparse_step": 2, **TIED},
    "qwen3_moe, all experts": {"num_experts_per_tok": 5},
}
FULL = full(*list(CASES)[3:])


def peer(case, dtype=torch.float64, **changes):
    """A random model of transformers."""
    transformers = pytest.importorskip("transformers")
    family = case.split(",")[0]
    sizes = SIZES | FAMILIES[family] | CASES[case] | changes
    options = {"experts_implementation": "eager", "dtype": dtype}
    config = transformers.AutoConfig.for_model(family, **sizes, **options)
    return scattered(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


@pytest.mark.parametrize("case", [*FAMILIES, *FULL])
def test_equals_transformers(case, tmp_path):
    """The same logits and greedy text, from one file or from shards."""
    theirs = peer(case)
    tokens = torch.randint(37, (2, 24))
    shards = "experts" in case
    theirs.save_pretrained(tmp_path, max_shard_size="9KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards

    ours, _ = hf.load(tmp_path)
    single, _ = hf.load(tmp_path, "float32")
    close(ours(tokens).logits, theirs(tokens).logits, 1e-6)
    close(single(tokens).logits, theirs.float()(tokens).logits, 1e-4)
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones(2, 5)}
    text = theirs.double().generate(tokens[:, :5], **options)
    assert torch.equal(ours.generate(tokens[:, :5], 9), text[:, 5:])


SMALL = {"d_model": 16, "n_layers": 2, "n_experts": 4, "top_k": 2, "d_expert": 8}
TRAINED = {"dropout": 0.1, "residual_init": 0.05}  # what no checkpoint says
TOYS = {  # family -> a model of ours that belongs to it
    "olmoe": {"norm_topk": True, "clip_qkv": 0.5, "tied": True, "n_kv_heads": 2},
    "mixtral": {"qk_norm": "none", "norm_topk": True, "head_dim": 6, "norm_eps": 1e-6},
    "qwen3_moe": {"qk_norm": "head", "dense_layers": (1,), "d_dense": 9, "head_dim": 10},
    "deepseek": {"qk_norm": "none", "dense_layers": (0,), "d_shared": 16, "context": 512},
}


@pytest.mark.parametrize("family", ["olmoe", "deepseek", *full("mixtral", "qwen3_moe")])
def test_save(family, tmp_path):
    """A model of ours opens in transformers with the same logits; here it comes back unchanged."""
    model = scattered(MoETransformer(MoEConfig(**SMALL | TRAINED | TOYS[family])))
    tokens = torch.randint(48, (2, 9))
    hf.save(model, tmp_path / "saved")
    back, _ = hf.load(tmp_path / "saved")
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert hf.write_config(back) == hf.write_config(model)
    assert hf.write_config(model)[0] == family
    if family != "deepseek":
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM
        theirs = theirs.from_pretrained(tmp_path / "saved")
        close(theirs(tokens).logits, model(tokens).logits, 1e-4)
    with refused("is there already"):
        hf.save(model, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # and no temporary folder


@torch.no_grad()
def test_save_with_embedding_scale(tmp_path):
    """The scale goes into the embedding: the same logits to 1e-6, here and in transformers."""
    config = MoEConfig(**SMALL, tied=True, embedding_scale=11.3)
    model = scattered(MoETransformer(config)).double()
    tokens = torch.randint(48, (2, 9))
    expected = model(tokens).logits
    hf.save(model, tmp_path / "saved")
    back, _ = hf.load(tmp_path / "saved")
    assert (back.config.embedding_scale, back.config.tied) == (1, False)
    close(back(tokens).logits, expected, 1e-6)
    assert torch.equal(model(tokens).logits, expected)  # saving leaves it as it was
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM
    options = {"experts_implementation": "eager", "dtype": torch.float64}
    theirs = theirs.from_pretrained(tmp_path / "saved", **options)
    close(theirs(tokens).logits, expected, 1e-6)


CANNOT = {
    "olmoe, which cannot have {'d_shared': 8}": {"d_shared": 8},
    "qwen3_moe, which cannot have {'clip_qkv': 1.0}": {"qk_norm": "head", "clip_qkv": 1.0},
    "deepseek, which cannot have {'d_shared': 9}": {"qk_norm": "none", "d_shared": 9},
    "cannot have {'dense_layers': (1,)": {"qk_norm": "none", "dense_layers": (1,)},
}


@pytest.mark.full
def test_save_refuses(tmp_path):
    """What no family can express is refused before anything is written."""
    for message, changes in CANNOT.items():
        with refused(message):
            hf.save(MoETransformer(MoEConfig(**SMALL | changes)), tmp_path / "saved")
    model = MoETransformer(MoEConfig(**SMALL), router=SigmoidRouter)
    with refused("no family of the hub computes SigmoidRouter"):
        hf.save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# ---- DeepSeekMoE, which transformers lacks


def deepseek(w, c, tokens):
    """DeepSeekMoE (arXiv 2401.06066, section 3) by the hub's names, token by token: (T, V)."""
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    width = c["hidden_size"] // heads
    half = width // 2

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name]

    def swiglu(x, name):
        gate_up = torch.cat([w[f"{name}.gate_proj.weight"], w[f"{name}.up_proj.weight"]])
        return expert(gate_up, w[f"{name}.down_proj.weight"], x)

    def turn(x, position):
        angle = position * c["rope_theta"] ** (-torch.arange(half) / half).double()
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    x = w["model.embed_tokens.weight"][tokens]  # (T, D)
    T = len(tokens)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (y @ w[f"{at}.self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = (z.view(T, -1, width) for z in (q, k, v))  # (T, heads or groups, C)
        for t in range(T):
            outputs = []
            for head in range(heads):
                group = head * groups // heads  # neighbours share their keys and values
                query = turn(q[t, head], t)
                keys = torch.stack([turn(k[s, group], s) for s in range(t + 1)])
                share = (keys @ query / width**0.5).softmax(0)
                outputs.append(share @ v[: t + 1, group])
            x[t] += w[f"{at}.self_attn.o_proj.weight"] @ torch.cat(outputs)
        y = norm(x, f"{at}.post_attention_layernorm.weight")
        for t in range(T):
            if layer < c["first_k_dense_replace"]:
                x[t] += swiglu(y[t], f"{at}.mlp")
                continue
            probs = (w[f"{at}.mlp.gate.weight"] @ y[t]).softmax(0)
            weights, experts = probs.topk(c["num_experts_per_tok"])
            if c["norm_topk_prob"] and len(experts) > 1:
                weights = weights / weights.sum()
            for weight, e in zip(weights, experts, strict=True):
                x[t] += weight * swiglu(y[t], f"{at}.mlp.experts.{e}")
            if c["n_shared_experts"]:
                x[t] += swiglu(y[t], f"{at}.mlp.shared_experts")
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    ("changes", "in_config"),
    [
        ({"dense_layers": (0,), "d_shared": 14}, {}),
        *full(
            ({"top_k": 1, "d_shared": 7}, {"norm_topk_prob": True}),  # their code passes over it
            ({"top_k": 5, "norm_topk": True, "dense_layers": (0,)}, {"n_shared_experts": None}),
        ),
    ],
    ids=["plain", "one expert", "all experts"],
)
def test_deepseek_by_hand(changes, in_config, tmp_path):
    """Equal to loops over tokens, heads and experts."""
    sizes = {"vocab_size": 37, "d_model": 24, "n_kv_heads": 2, "n_experts": 5, "top_k": 2}
    sizes |= {"d_expert": 7, "rope_theta": 300.0, "qk_norm": "none"}
    model = scattered(MoETransformer(MoEConfig(**sizes | changes)))
    hf.save(model.double(), tmp_path / "saved")
    edit(tmp_path / "saved/config.json", **in_config)
    tokens = torch.randint(37, (12,))
    weights = load_file(tmp_path / "saved/model.safetensors")
    expected = deepseek(weights, read_object(tmp_path / "saved/config.json"), tokens)
    loaded, _ = hf.load(tmp_path / "saved")
    close(loaded(tokens[None]).logits[0], expected, 1e-6)  # our rotary angles are in float32


# ---- broken and hostile files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small checkpoint, to be spoilt in a copy."""
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    hf.save(MoETransformer(MoEConfig(**SMALL)), folder)
    return folder


def cut(share):
    """Keep this share of the weights' file."""

    def spoil(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return spoil


def header(change):
    """change gets the entries of the header."""

    def spoil(folder):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])

    return spoil


def shards(*names):
    """The weights in two equal shards, and an index that names these files."""

    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder / "copy.safetensors")
        weight_map = {str(i): name for i, name in enumerate(names)}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def pickled(name):
    """A pickle instead of the weights."""

    def spoil(folder):
        (folder / "model.safetensors").unlink()
        torch.save({"weight": torch.zeros(4)}, folder / name)

    return spoil


def swell(folder):
    """A header of 4 MB, which would take 34 times as much when it is parsed."""
    text = b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[0%b]}}' % (b",0" * 2 * 10**6)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"  # (8, 16)
NO_FILE = "cut off, altered, or no safetensors file"
BAD_FILES = {
    "cut in the header": (cut(0.01), NO_FILE),
    "cut in the numbers": (cut(0.9), NO_FILE),
    "header that swells": (swell, NO_FILE),
    "overlap": (header(lambda h: h[GATE].update(h["lm_head.weight"])), NO_FILE),
    "huge shape": (header(lambda h: h[GATE].update(shape=[2**40, 2**22])), NO_FILE),
    "integers": (header(lambda h: h[GATE].update(dtype="I32")), "'I32'}; expected F64, F32"),
    "transposed": (header(lambda h: h[GATE].update(shape=[16, 8])), "[16, 8], expected [8, 16]"),
    "renamed": (header(lambda h: h.update({"odd": h.pop(GATE)})), "'odd': not used by olmoe"),
    "pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle, which may run any"),
    "shard outside": (shards("../part.safetensors"), "and no *.safetensors beside it is called"),
    "shards that repeat": (shards("part.safetensors", "copy.safetensors"), "repeats tensors of"),
    "empty index": (shards(), "has no weight_map"),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=9), "layers.2.input_lay"),
    "petabytes": (lambda f: edit(f / "config.json", intermediate_size=2**18), "does not fit its"),
    "other dtype": (lambda f: edit(f / "config.json", dtype="int8"), "dtype is int8; expected"),
    "large config": (lambda f: (f / "config.json").write_bytes(bytes(2**24)), "at most 8,388,608"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, good, tmp_path, call, complaint):
    """The command line and `load` say in one line what is wrong, and take no memory for it."""
    spoil, message = BAD_FILES[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    spoil(folder)
    assert call(hf, str(folder)) == 1
    assert message in complaint()

    def load():
        with refused(message):
            hf.load(folder)

    _, cost = watched(load)
    assert cost.growth < 2**23


@pytest.mark.full
def test_bytes_at_random(good, tmp_path):
    """Whatever another byte does: the checkpoint loads, or one ValueError tells why not."""
    generator, n_bad = random.Random(0), 0
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    for i in range(200):
        path = folder / ("config.json" if i % 2 else "model.safetensors")
        whole = path.read_bytes()
        place = generator.randrange(min(len(whole), 1200))
        path.write_bytes(whole[:place] + generator.randbytes(1) + whole[place + 1 :])
        try:
            hf.load(folder)
        except ValueError as error:
            assert "\n" not in str(error)
            n_bad += 1
        path.write_bytes(whole)
    assert 50 < n_bad < 200


@pytest.mark.full
def test_memory(good, tmp_path, monkeypatch):
    """Loading takes the memory of the weights; where there is too little, it does not begin."""
    config = MoEConfig(d_expert=1024, vocab_size=20_001)  # some tensors come in two pieces
    saved = MoETransformer(config).bfloat16()
    hf.save(saved, tmp_path / "saved")
    for dtype in ("bfloat16", "float32", "float16"):
        (model, _), cost = watched(lambda dtype=dtype: hf.load(tmp_path / "saved", dtype))
        assert str(model.norm.weight.dtype) == f"torch.{dtype}"
        assert cost.growth <= 1.15 * sum(weight.nbytes for weight in model.parameters())
        for weight, expected in zip(model.parameters(), saved.parameters(), strict=True):
            assert torch.equal(weight, expected.to(weight.dtype))
    monkeypatch.setattr(hf, "room", lambda device: 3 * model.n_params())
    with refused("free: in bfloat16 it fits (dtype='bfloat16', or --dtype bfloat16)"):
        hf.load(tmp_path / "saved", "float32")
    monkeypatch.setattr(hf, "room", lambda device: 10_000)
    with refused("GB in float32, and cpu has 0.00 GB free: take a larger machine"):
        hf.load(good)


# ---- the hub, descriptions, tokenizers


def test_hub(good, tmp_path, monkeypatch):
    """owner/name@revision is looked for in the hub's cache; what fails is told in one line."""
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(good, tmp_path / "models--some--model/snapshots" / commit)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text(commit)
    for source in ("some/model", "some/model@main", f"some/model@{commit}"):
        model, tokenizer = hf.load(source, cache=tmp_path, offline=True)
        assert model.n_params() == hf.load(good)[0].n_params()
        assert tokenizer is None
    with refused("some/other: no folder here, nor had from the hub: ", error=OSError):
        hf.load("some/other", cache=tmp_path, offline=True)
    with refused("nowhere is neither a folder nor a repository"):
        hf.load("nowhere")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert hf.load(good)[1] is None
    with refused('this needs huggingface_hub: pip install -e ".[hf]"', error=OSError):
        hf.load("some/model", cache=tmp_path, offline=True)


OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def test_describe(good, tmp_path):
    """OLMoE-1B-7B has as many parameters as its authors say, by its config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    family, model, dtype = hf.plan(tmp_path)
    assert (family, dtype) == ("olmoe", "bfloat16")
    assert model.n_params() == 6_919_161_856
    assert model.n_params(activated=True) == 1_282_017_280
    model, _ = hf.load(good)
    text = hf.describe(good)
    assert "family      olmoe, saved in float32" in text
    assert f"{model.n_params():,} in all, {model.n_params(activated=True):,} activated" in text


def test_tokenizer(good, tmp_path):
    """Texts begin as tokenizer_config.json asks; a tokenizer that does not fit is refused."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    path = folder / "tokenizer.json"
    words = tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    assert hf.load(folder)[1].encode("a b a b").ids == [1, 2, 1, 2]
    settings = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert hf.load(folder)[1].encode("a b").ids == [0, 1, 2]
    settings["bos_token"] = "<bos>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with refused("bos_token '<bos>' is no token of tokenizer.json"):
        hf.load(folder)
    tokenizer.add_tokens([f"t{i}" for i in range(50)])
    tokenizer.save(str(path))
    with refused("has 53 tokens, the model only 48"):
        hf.load(folder)
    path.write_text("{}")
    with refused("tokenizer.json is no readable tokenizer"):
        hf.load(folder)


@pytest.mark.full
def test_rehearsal(tmp_path, monkeypatch, capsys):
    """A random checkpoint of small shapes, a file for each layer, goes through all steps."""
    pytest.importorskip("tokenizers")
    small = MoEConfig(9_000, 512, 32, 6, 2, n_experts=24, top_k=4, d_expert=16)
    monkeypatch.setattr(rehearsal, "OLMOE", small)
    flags = ["--layers", "6", "--questions", "6", "--references", "30", "--folder", str(tmp_path)]
    assert rehearsal.main(flags) == 0
    text = capsys.readouterr().out
    for step in ("load", "forward", "generate", "choice", "references", "base and NGD", "again"):
        assert step in text
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) == 7
