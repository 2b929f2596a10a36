"""Loading a large checkpoint: its peak memory against the weights, its time against the floor.

The floor is the time of reading the file, and of touching as much new memory for the first time,
which the system has to clear. `python -m lab.speed.loading` makes a random checkpoint of OLMoE's
shapes with two of its layers, 2.1 GB, in a temporary folder, and loads it. It needs Linux, which
tells how much memory of a process belongs to no file.
"""

import os
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

import hf
from lab.tools import cli
from moe import MoEConfig, MoETransformer

OLMOE = {
    "vocab_size": 50304,
    "context": 4096,
    "d_model": 2048,
    "n_layers": 2,
    "n_heads": 16,
    "n_experts": 64,
    "top_k": 8,
    "d_expert": 1024,
}


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def watched(function):
    """Call a function -> its result, the seconds, the growth of anonymous memory at its peak."""
    start = anonymous()
    growth = [0]
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            growth.append(anonymous() - start)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - began
    done.set()
    growth.append(anonymous() - start)
    return result, seconds, max(growth)


def read(path: Path, disk: bool):
    """Read a file. disk: forget it at once, so that whoever reads next takes it from the disk."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass
        if disk:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: Path, dtype, disk: bool, n: int) -> list[float]:
    """Load n weights once -> GB of the weights, peak memory / weights, seconds of loading, of
    reading, of a first touch, and of loading / both."""
    read(path, disk)
    _, reading, _ = watched(lambda: read(path, disk))
    _, touching, _ = watched(lambda: torch.empty(n, dtype=dtype).zero_())
    (model, _), loading, growth = watched(lambda: hf.load(path.parent, dtype))
    size = sum(weight.nbytes for weight in model.parameters())
    floor = reading + touching
    return [size / 1e9, growth / size, loading, reading, touching, loading / floor]


def main(argv) -> int:
    """Make the checkpoint, load it, and report."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "checkpoint")
        model = MoETransformer(MoEConfig(**OLMOE)).bfloat16()
        hf.save(model, folder)
        n = model.n_params()
        del model  # its memory is free again

        for disk in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                path = folder / "model.safetensors"
                repeats = [measure(path, dtype, disk, n) for _ in range(3)]
                medians = [statistics.median(column) for column in zip(*repeats, strict=True)]
                name = str(dtype).removeprefix("torch.")
                source = "disk" if disk else "page cache"
                rows.append([f"{name}, from {source}", *(f"{value:.2f}" for value in medians)])
    print(f"{n * 2 / 1e9:.2f} GB in bfloat16, one thread, medians of 3\n")
    header = ["load as", "weights GB", "peak / weights", "s", "read s", "touch s", "s / both"]
    print(cli.table(rows, header))
    return 0


if __name__ == "__main__":
    cli.program(main, __doc__)
