"""What the models ask of what they are given, and of the program around them.

Every check raises ValueError, in one line that says what was wrong and what is expected. They stand
here, so that none stands between a reader and an algorithm.
"""

import math
import numbers
import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import wraps

import torch
from tqdm import tqdm

from lab.tools.configs import require

IGNORE = -100  # a target without loss


def eager(check):
    """A check that looks at numbers in tensors. torch.compile leaves it out: call it beforehand."""

    @wraps(check)
    def checked(*arguments):
        if not torch.compiler.is_compiling():
            check(*arguments)

    return checked


# ------------------------------------------------------------------------------------------ tensors


def require_integers(what: str, tensor):
    """A tensor of integers."""
    kind = getattr(tensor, "dtype", type(tensor).__name__)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    require(kind in integers, f"{what} are {kind}; expected a tensor of integers, such as int64")


@eager
def require_finite(what: str, tensor, reason: str):
    """A tensor without NaN and infinities."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return
    low, high = tensor.detach().aminmax()
    if math.isfinite(low) and math.isfinite(high):
        return
    place = (~tensor.isfinite()).nonzero()[0].tolist()
    raise ValueError(f"{what} {tuple(tensor.shape)} are not finite, first at {place}: {reason}")


def require_shape(what: str, tensor, *shapes: tuple):
    """A tensor of one of these shapes."""
    shape = tuple(tensor.shape)
    expected = " or ".join(str(each) for each in shapes)
    require(shape in shapes, f"the shape of {what} is {shape}; expected {expected}")


def require_mask(what: str, mask, shape: tuple):
    """A mask of this shape: bool, or integers that are 0 or 1."""
    require_shape(what, mask, shape)
    if mask.dtype != torch.bool:
        require_integers(what, mask)
        low, high = (int(each) for each in mask.aminmax())
        require(0 <= low <= high <= 1, f"{what} goes from {low} to {high}; expected bool")


def require_in_vocabulary(what: str, tokens, vocab_size: int):
    """Integers that are tokens of the vocabulary."""
    require_integers(what, tokens)
    low, high = (int(each) for each in tokens.aminmax())
    require(
        0 <= low <= high < vocab_size,
        f"{what} go from {low} to {high}; the vocabulary goes from 0 to {vocab_size - 1}",
    )


# ---------------------------------------------------------------------------- what a model is given


@eager
def require_tokens(tokens, vocab_size: int):
    """Tokens (B, T), not empty, of the vocabulary."""
    require_integers("tokens", tokens)
    shape = tuple(tokens.shape)
    require(
        len(shape) == 2 and tokens.numel() > 0,
        f"tokens have shape {shape}; expected (B, T), not empty",
    )
    require_in_vocabulary("tokens", tokens, vocab_size)


@eager
def require_inputs(tokens, targets, valid, vocab_size: int):
    """Targets that are tokens or IGNORE; in each sequence a token that is no padding."""
    shape = tuple(tokens.shape)
    if valid is not None:
        require_mask("valid", valid, shape)
        require(bool(valid.any(1).all()), "valid is false in all of a sequence: nothing is asked")
    if targets is not None:
        require_integers("targets", targets)
        require_shape("targets", targets, shape)
        counted = targets[targets != IGNORE]
        require(len(counted) > 0, f"no target counts: all are IGNORE, {IGNORE}")
        require_in_vocabulary("targets", counted, vocab_size)


@eager
def require_stream(x, valid, cache, d_model: int):
    """A residual stream x (B, T, D), padded on the right, and a cache of as many sequences."""
    shape = tuple(x.shape)
    fits = len(shape) == 3 and shape[2] == d_model and x.is_floating_point() and x.numel() > 0
    require(fits, f"x is {x.dtype} of shape {shape}; expected (B, T, {d_model}), not empty")
    if valid is not None:
        require_mask("valid", valid, shape[:2])
        falling = bool((valid[:, 1:] <= valid[:, :-1]).all())
        require(falling, "valid is false before it is true; padding stands on the right")
    if cache is not None and cache.valid is not None:
        n = len(cache.valid)
        require(n == shape[0], f"the cache has {n} sequences; x has {shape[0]}")


@eager
def require_attention(q, k):
    """Queries and keys from which attention can be computed."""
    numbers = torch.cat([q.flatten(), k.flatten()])
    require_finite("queries and keys", numbers, f"the model overflows in {q.dtype}, or is damaged")


@eager
def require_context(position, context: int):
    """Tokens within the context."""
    longest = int(position.max()) + 1
    require(
        longest <= context, f"a sequence of {longest} tokens is longer than the context, {context}"
    )


@eager
def require_pathway(rows: dict, at, shape: tuple, n_experts: int, n_routers: int):
    """The rows of an imposed pathway that fit tokens of shape (B, T)."""
    B, T = shape
    require_mask("imposed.at", at, (B, T))
    expected = f"{(B, n_experts)} or {(B, T, n_experts)} for one of {n_routers} routers"
    for index, row in rows.items():
        fits = row.shape in ((B, n_experts), (B, T, n_experts)) and row.is_floating_point()
        require(
            fits and index in range(n_routers),
            f"a pathway of shape {tuple(row.shape)} for router {index!r}; expected {expected}",
        )


def require_generation(tokens, valid, n_tokens, temperature, stop, config):
    """What `generate` is given: prompts with room for n_tokens new tokens within the context."""
    require_tokens(tokens, config.vocab_size)
    require_inputs(tokens, None, valid, config.vocab_size)
    count = isinstance(n_tokens, numbers.Integral) and n_tokens >= 1
    require(count, f"n_tokens is {n_tokens}; it must be at least 1")
    longest = tokens.shape[1] if valid is None else int(valid.sum(-1).max())
    need = longest + n_tokens
    require(
        need <= config.context,
        f"prompt and {n_tokens} new tokens are {need} tokens; the context is {config.context}",
    )
    require(
        isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf,
        f"temperature is {temperature}; expected 0 (the most probable token) or a number above 0",
    )
    if stop is not None:
        kind = torch.as_tensor(stop).dtype
        fits = kind in (torch.int64, torch.int32) or torch.as_tensor(stop).numel() == 0
        require(fits, f"stop is {stop!r:.60}; expected a token, or several")


# ---------------------------------------------------------------------------- the program around us


@contextmanager
def evaluation(model):
    """All modules of a model in evaluation; afterwards each is as it was."""
    in_training = [module for module in model.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def torch_defaults():
    """torch as it starts: float32, on the CPU, with gradients. Later it is as it was found.

    So what a program around us has set does not change what we compute.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def undisturbed():
    """For a whole program: as `torch_defaults`, and random numbers and threads stay as well.

    What is printed where there is no output goes nowhere.
    """
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        if sys.stdout is None:
            stack.enter_context(redirect_stdout(nowhere))
        if sys.stderr is None:
            stack.enter_context(redirect_stderr(nowhere))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(torch_defaults())
        yield


def progress(steps, what: str, **options):
    """The steps, with a bar where somebody looks: on a terminal, if there is any.

    steps None: only the bar, to be updated. options: those of tqdm, such as total.
    """
    first = os.environ.get("RANK", "0") == "0"  # of several processes, see lab/tools/processes.py
    hidden = None if sys.stderr and first else True
    return tqdm(steps, desc=what, leave=False, disable=hidden, **options)
