"""Loading a large checkpoint: the peak of the memory against the size of the weights, the time against its floor:
that of reading the file, and that of the first touch of as much new memory, which the system has to clear.

python -m lab.bench_load makes a random checkpoint of OLMoE's shapes with two of its layers, 2.1 GB, in a temporary
folder, and loads it. It needs Linux, which tells how much memory a process has that is not a file's.
"""

import argparse
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

    thread, began = threading.Thread(target=watch), time.perf_counter()
    thread.start()
    result, seconds = function(), time.perf_counter() - began
    done.set()
    thread.join()
    return result, seconds, max(*peaks, anonymous() - start)


def read(path: Path):
    """A plain read of a file, into a buffer of 16 MB."""
    buffer = bytearray(2**24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path):
    """Let the next read come from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of 0.8 GB each [2]")
    layers = parser.parse_args(argv).layers
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top, torch.no_grad():
        folder = Path(top, "it")
        model = MoETransformer(MoEConfig(**OLMOE, n_layers=layers, d_expert=1024)).bfloat16()
        hf.save(model, folder)
        numbers = model.n_params()
        del model
        file, rows = folder / "model.safetensors", []
        for where in ("page cache", "disk"):
            for dtype in ("bfloat16", "float32"):
                runs = []
                for _ in range(3):
                    prepare = forget if where == "disk" else read
                    prepare(file)
                    plain = watched(lambda: read(file))[1]
                    touch = watched(lambda dtype=dtype: torch.empty(numbers, dtype=getattr(torch, dtype)).zero_())[1]
                    prepare(file)
                    (loaded, _), seconds, grown = watched(lambda dtype=dtype: hf.load(folder, dtype))
                    size = sum(weight.nbytes for weight in loaded.parameters())
                    runs.append((grown / size, seconds, plain, touch, seconds / (plain + touch)))
                    del loaded
                medians = (f"{statistics.median(column):.2f}" for column in zip(*runs, strict=True))
                rows.append((f"{dtype}, from {where}", f"{size / 1e9:.2f}", *medians))
        print(f"{file.stat().st_size / 1e9:.2f} GB in bfloat16, one thread, medians of 3\n")
        print(cli.table(rows, header=["load as", "weights GB", "peak / weights", "s", "read s", "touch s", "s / both"]))
    return 0


if __name__ == "__main__":
    cli.run(main)
