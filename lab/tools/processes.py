"""One command as several processes: torchrun --nproc_per_node=N train_toy.py ...

Each process does the whole command, but of what takes long only its own share; then each is told
what all of them have found. The first one alone writes files and prints. Where one of them ends,
the others cannot go on: ValueError.
"""

import atexit
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist


def join():
    """Join the other processes, where torchrun has started some."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device_of(name: str) -> str:
    """The device of this process: each has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and count() > 1 else name


@contextmanager
def together():
    """What is done inside needs all processes."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).split("\n")[0]
        raise ValueError(f"another process has ended, and so does this one ({first})") from error


def gathered(value) -> list:
    """The values of all processes, in the order of their numbers, for each of them."""
    if count() == 1:
        return [value]
    values = [None] * count()
    with together():
        dist.all_gather_object(values, value)
    return values


def add_up(tensors):
    """Tensors of one type become, in place, their sums over all processes."""
    if count() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with together():
        dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(total.view_as(tensor))


@contextmanager
def first_one_first():
    """What is done inside is done by the first process, which may write files, and then by all."""
    if rank() > 0:
        gathered(None)
    yield
    if rank() == 0:
        gathered(None)


def rounds(work: list):
    """Work in rounds, a piece for each process. Yields the pieces of a round, and ours or None."""
    for start in range(0, len(work), count()):
        pieces = work[start : start + count()]
        yield pieces, pieces[rank()] if rank() < len(pieces) else None
