"""What torch.compile asks of the grouped product of moe.py on a CPU."""

import torch
import torch.nn.functional as F


@torch.library.custom_op("remix_moe::grouped_mm", mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """F.grouped_mm, which torch.compile would take in bfloat16 only: it sees no further than this.

    a (M, I) and b (E, I, O) -> (M, O); or a (I, M) and b (M, O) -> (E, I, O). offs (E,): the ends
    of groups in M.
    """
    return F.grouped_mm(a, b, offs=offs)


@grouped_mm.register_fake
def shape(a, b, offs):
    """An empty tensor of the result's shape."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    """The gradients of rows and matrices: grouped products, too."""
    a, b, offs = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, b.mT, offs), grouped_mm(a.mT, grad, offs), None


grouped_mm.register_autograd(backward, setup_context=setup_context)
