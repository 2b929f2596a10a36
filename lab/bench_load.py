"""Loading a large checkpoint: the peak of the memory against the size of the weights, the time against its floor:
that of reading the file, and that of the first touch of as much new memory, which the system has to clear.

python -m lab.bench_load makes a random checkpoint of OLMoE's shapes with two of its layers, 2.1 GB, in a temporary
folder, and loads it. It needs Linux, which tells how much memory a process has that is not a file's.
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
from lab import cli
from moe import MoEConfig, MoETransformer

OLMOE = {"vocab_size": 50304, "context": 4096, "d_model": 2048, "n_heads": 16, "n_experts": 64, "top_k": 8}


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def watched(function):
    """What a call returns, its seconds, and by how many bytes its anonymous memory grew at the peak."""
    start, peaks, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peaks.append(anonymous() - start)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    result, seconds = function(), time.perf_counter() - began
    done.set()
    return result, seconds, max(*peaks, anonymous() - start)


def measure(path: Path, dtype, disk: bool, n: int):
    """A load of n weights -> their GB, peak / weights, seconds (of the load, a read, a first touch), load / both."""

    def read():
        with open(path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass
            if disk:  # forgotten at once: the next read comes from there
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    plain = [watched(read)[1] for _ in range(2)][1]
    touch = watched(lambda: torch.empty(n, dtype=dtype).zero_())[1]
    (model, _), seconds, grown = watched(lambda: hf.load(path.parent, dtype))
    size = sum(weight.nbytes for weight in model.parameters())
    return size / 1e9, grown / size, seconds, plain, touch, seconds / (plain + touch)


def main(argv) -> int:
    """Make the checkpoint, load it, and tell."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top:
        hf.save(model := MoETransformer(MoEConfig(**OLMOE, n_layers=2, d_expert=1024)).bfloat16(), Path(top, "it"))
        n, model, rows = model.n_params(), None, []  # the model's memory is free again
        for disk in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                runs = [measure(Path(top, "it/model.safetensors"), dtype, disk, n) for _ in range(3)]
                medians = (f"{statistics.median(column):.2f}" for column in zip(*runs, strict=True))
                rows.append((f"{str(dtype)[6:]}, from {'disk' if disk else 'page cache'}", *medians))
    print(f"{n * 2 / 1e9:.2f} GB in bfloat16, one thread, medians of 3\n")
    print(cli.table(rows, header=["load as", "weights GB", "peak / weights", "s", "read s", "touch s", "s / both"]))
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__)
