"""Whether a model fits into this machine, before anything is made."""

from lab.checkpoints.untrusted import room
from lab.tools.checks import require


def least_weights(sizes) -> int:
    """At least so many weights has a model of these sizes (MoEConfig)."""
    d, n_layers, n_dense = sizes.d_model, sizes.n_layers, len(sizes.dense_layers)
    heads = sizes.n_heads + sizes.n_kv_heads
    widths = (n_layers - n_dense) * sizes.d_shared + n_dense * sizes.d_dense
    if getattr(sizes, "router", "") != "none":
        widths += (n_layers - n_dense) * sizes.n_experts * sizes.d_expert
    attention = 2 * n_layers * heads * sizes.head_dim
    return d * (sizes.vocab_size + attention + 3 * widths)


def require_memory(sizes, device="cpu", batch: int = 0, length: int = 0):
    """ValueError, with what is needed and what is there, for sizes that cannot fit.

    batch, length: of a training step; 0: the model is only used. A weight in training comes with
    its gradient and two moments, a token with its logits, twice, and states in every layer.
    """
    numbers = least_weights(sizes) * (4 if batch else 1)
    numbers += batch * length * (2 * sizes.vocab_size + 8 * sizes.n_layers * sizes.d_model)
    needed, free = 4 * numbers / 1e9, room(device) / 1e9  # GB in float32
    fault = f"these sizes need at least {needed:,.1f} GB, and {device} has {free:,.1f} GB free"
    require(needed <= free, f"{fault}: take a smaller batch or model")
