"""hf.py: a checkpoint of the hub computes here what it computes elsewhere, and a bad one is refused in one line."""

import json
import random
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hf
from moe import MoEConfig, MoETransformer, Router
from shards import read_header, write_tensors

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
        print((ours(tokens).logits - expected).abs().max(), expected.std())
        close(ours(tokens).logits, expected, 1e-6)
        close(hf.load(tmp_path / "it", "float32")[0](tokens).logits, theirs.float()(tokens).logits, 1e-4)
    assert ours.embedding.weight.dtype == torch.float64 and expected.std() > 0.1
    said = theirs.double().generate(tokens[:, :5], max_new_tokens=9, do_sample=False, attention_mask=torch.ones(2, 5))
    assert torch.equal(ours.generate(tokens[:, :5], 9), said[:, 5:])
