"""What is timed: models of ours, and transformers' OLMoE with the same sizes and weights."""

import torch

from moe import MoEConfig, MoETransformer, require

T = 128  # tokens of a sequence in training
BALANCE = 0.01  # coefficient of the balance loss
SMALL = MoEConfig(
    vocab_size=2048,
    context=T,
    d_model=128,
    n_layers=4,
    n_heads=4,
    n_experts=16,
    top_k=4,
    d_expert=64,
)
LARGE = MoEConfig(
    vocab_size=8192,
    context=T,
    d_model=512,
    n_layers=8,
    n_heads=8,
    n_experts=32,
    top_k=4,
    d_expert=256,
)
# Implementations of transformers' experts. Not batched_mm: it copies an expert's matrices for every
# token, and takes 30 times as long as grouped_mm. The others need a GPU.
EXPERTS = ("eager", "grouped_mm")


def olmoe():
    """The module of transformers that has OLMoE."""
    try:
        from transformers.models.olmoe import modeling_olmoe
    except ImportError:
        raise ValueError('the peers need transformers: pip install -e ".[dev]"') from None
    return modeling_olmoe


def peer_config(sizes: MoEConfig, experts: str):
    """The same sizes for transformers. experts: one of EXPERTS."""
    return olmoe().OlmoeConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_expert,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        max_position_embeddings=sizes.context,
        num_experts=sizes.n_experts,
        num_experts_per_tok=sizes.top_k,
        pad_token_id=None,
        eos_token_id=None,
        output_router_logits=True,
        router_aux_loss_coef=BALANCE,
        experts_implementation=experts,
    )


def models(sizes: MoEConfig) -> dict:
    """Our model, and then the peers, all with the same weights."""
    torch.manual_seed(0)
    named = {"ours": MoETransformer(sizes)}
    for experts in EXPERTS:
        peer = olmoe().OlmoeForCausalLM(peer_config(sizes, experts))
        copy_matrices(named["ours"], peer)
        named[f"transformers {experts}"] = peer
    return named


def copy_matrices(ours, theirs):
    """Equal weights route alike. Norms start at 1 in both; matrices come in the same order."""
    matrices = [[w.data for w in model.parameters() if w.dim() > 1] for model in (ours, theirs)]
    for own, other in zip(*matrices, strict=True):
        other.copy_(own)
    sizes = [sum(w.numel() for w in model.parameters()) for model in (ours, theirs)]
    require(sizes[0] == sizes[1], f"the models differ in size: {sizes}")
