"""One command as several processes: torchrun --nproc_per_node=N eval.py choice ...

Each process does the whole command, but of what takes long only its own share; then each is told
what all of them have found. The first one alone writes files and prints.
"""

import atexit
import os
import sys

import torch.distributed as dist


def join():
    """Join the other processes, where torchrun has started some."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
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


def gathered(value) -> list:
    """The values of all processes, in the order of their numbers, for each of them."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def rounds(work: list):
    """Work in rounds, a piece for each process. Yields the pieces of a round, and ours or None."""
    for start in range(0, len(work), count()):
        pieces = work[start : start + count()]
        yield pieces, pieces[rank()] if rank() < len(pieces) else None
