"""What the models ask of what they are given, and of the program around them.

Every check raises ValueError, in one line that says what was wrong and what is expected. They stand
here, so that none stands between a reader and an algorithm.
"""

import inspect
import math
import numbers
import os
import sys
import typing
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import wraps

import torch
from tqdm import tqdm

from lab.tools.kinds import fits, require, require_kind, shown

IGNORE = -100  # a target without loss


def eager(check):
    """A check that looks at numbers in tensors. torch.compile leaves it out: call it beforehand."""

    @wraps(check)
    def checked(*arguments):
        if not torch.compiler.is_compiling():
            check(*arguments)

    return checked


def annotated(function):
    """Its arguments are what its annotations say, or ValueError names one that is not."""
    names = list(inspect.signature(function).parameters)
    hints = {}  # filled at the first call: an annotation may name a class that stands below

    @wraps(function)
    def called(*arguments, **options):
        if torch.compiler.is_compiling():
            return function(*arguments, **options)
        if not hints:
            hints.update({"return": None} | typing.get_type_hints(function))
        for name, value in (*zip(names, arguments, strict=False), *options.items()):
            if name in hints and not fits(value, hints[name]):
                require_kind(name, value, hints[name])
        return function(*arguments, **options)

    return called


# ------------------------------------------------------------------------------------------ tensors


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def require_integers(what: str, tensor):
    """A tensor of integers."""
    known = torch.is_tensor(tensor) and tensor.dtype in INTEGERS
    kind = getattr(tensor, "dtype", type(tensor).__name__)
    require(known, f"{what} are {kind}; expected a tensor of integers, such as int64")


def as_integers(what: str, values, device="cpu"):
    """Integers, in lists or in a tensor -> a tensor int64. ValueError for anything else."""
    values = as_tensor(what, values, device)
    if values.numel() > 0:
        require_integers(what, values)
    return values.long()


def as_tensor(what: str, values, device="cpu"):
    """Values, in lists or in a tensor -> a tensor. ValueError for anything else."""
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):  # of torch, which has one for each mistake
        raise ValueError(f"{what} are {shown(values)}; expected a tensor, or lists alike") from None


def all_finite(tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = tensor.detach().aminmax()
    return math.isfinite(low) and math.isfinite(high)


@eager
def require_finite(what: str, tensor, reason: str):
    """A tensor without NaN and infinities."""
    if not all_finite(tensor):
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{what} {tuple(tensor.shape)} are not finite, first at {place}: {reason}")


def require_shape(what: str, tensor, *shapes: tuple):
    """A tensor of one of these shapes, in which None is any size."""
    found = tuple(tensor.shape) if torch.is_tensor(tensor) else ()
    for shape in shapes:
        pairs = zip(found, shape, strict=False)
        if len(found) == len(shape) and all(size in (own, None) for own, size in pairs):
            return
    expected = " or ".join(str(shape).replace("None", "any") for shape in shapes)
    found = found if torch.is_tensor(tensor) else type(tensor).__name__
    raise ValueError(f"the shape of {what} is {found}; expected {expected}")


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
    if tokens.numel() == 0:
        return
    low, high = (int(each) for each in tokens.aminmax())
    known = f"the vocabulary goes from 0 to {vocab_size - 1}"
    require(0 <= low <= high < vocab_size, f"{what} go from {low} to {high}; {known}")


# ---------------------------------------------------------------------------- what a model is given


@eager
def require_tokens(tokens, vocab_size: int):
    """Tokens (B, T), not empty, of the vocabulary."""
    require_integers("tokens", tokens)
    shape = tuple(tokens.shape)
    right = len(shape) == 2 and tokens.numel() > 0
    require(right, f"tokens have shape {shape}; expected (B, T), not empty")
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
def require_span(first: int, last: int, n: int):
    """Blocks first..last-1 of n."""
    if not 0 <= first <= last <= n:
        raise ValueError(f"blocks {first} to {last - 1} are asked for; there are 0 to {n - 1}")


@eager
def require_stream(x, valid, cache, d_model: int):
    """A residual stream x (B, T, D), padded on the right, and a cache of as many sequences."""
    shape = tuple(x.shape)
    right = len(shape) == 3 and shape[2] == d_model and x.is_floating_point() and x.numel() > 0
    require(right, f"x is {shown(x)}; expected (B, T, {d_model}), not empty")
    if valid is not None:
        require_mask("valid", valid, shape[:2])
        falling = bool((valid[:, 1:] <= valid[:, :-1]).all())
        require(falling, "valid is false before it is true; padding stands on the right")
    if cache is not None and cache.valid is not None:
        n = len(cache.valid)
        require(n == shape[0], f"the cache has {n} sequences; x has {shape[0]}")


@eager
def require_logits(logits, model):
    """Logits without NaN and infinities; else a weight that has some is named, if there is one."""
    if not all_finite(logits):
        reason = f"this model overflows in {model.embedding.weight.dtype}, or is damaged"
        for name, weight in model.named_parameters():
            require_finite(name, weight, reason)
        require_finite("logits", logits, reason)


@eager
def require_context(position, context: int):
    """Tokens within the context."""
    longest = int(position.max()) + 1
    fault = f"a sequence of {longest} tokens is longer than the context"
    require(longest <= context, f"{fault}, {context}")


@eager
def require_pathway(rows: dict, at, shape: tuple, n_experts: int, n_routers: int):
    """The rows of an imposed pathway that fit tokens of shape (B, T)."""
    B, T = shape
    require_mask("imposed.at", at, (B, T))
    expected = f"{(B, n_experts)} or {(B, T, n_experts)} for one of {n_routers} routers"
    for index, row in rows.items():
        shapes = ((B, n_experts), (B, T, n_experts))
        right = torch.is_tensor(row) and row.shape in shapes and row.is_floating_point()
        known = isinstance(index, numbers.Integral) and index in range(n_routers)
        found = f"a pathway {shown(row)} for router {shown(index)}"
        require(right and known, f"{found}; expected {expected}")


def require_generation(tokens, valid, n_tokens: int, temperature: float, config):
    """What `generate` is given: prompts with room for n_tokens new tokens within the context."""
    require_tokens(tokens, config.vocab_size)
    require_inputs(tokens, None, valid, config.vocab_size)
    require(n_tokens >= 1, f"n_tokens is {n_tokens}; it must be at least 1")
    longest = tokens.shape[1] if valid is None else int(valid.sum(-1).max())
    need = longest + n_tokens
    found = f"prompt and {n_tokens} new tokens are {need} tokens"
    require(need <= config.context, f"{found}; the context is {config.context}")
    expected = "0 (the most probable token) or a number above 0"
    require(temperature >= 0, f"temperature is {temperature}; expected {expected}")


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
