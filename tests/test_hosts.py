"""Whatever program is around us: an operation gives the same, and leaves all as it was.

A host is a program around an operation, a wrapper is what hosts put around a model. A new host,
wrapper or operation is one function.
"""

import contextlib
import functools
import io
import json
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from by_hand import close, full, references_of, specialisation_of, tiny

import eval as eval_py
import hf
import train_toy
from data import passes
from lab.tools import runs
from lab.tools.files import digest
from moe import unwrapped
from pathways import ReferenceSet, Tail, find_neighbours
from remix import RemixConfig, remix

# ---- hosts


@contextlib.contextmanager
def changed(change, value, before):
    """A host that has changed a setting of torch."""
    change(value)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype):
    return changed(torch.set_default_dtype, dtype, torch.float32)


def deterministic():
    return changed(torch.use_deterministic_algorithms, True, False)


@contextlib.contextmanager
def strict():
    """A host to which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def streams(stream):
    """Standard output and error that lead elsewhere, or nowhere."""
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


HOSTS = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "strict": strict,
    "redirected output": lambda: streams(io.StringIO()),
    "no output": lambda: streams(None),
    "another thread": contextlib.nullcontext,  # where no signal can be caught
}


# ---- what is around a model


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": compiled_blocks,
    "data parallel": torch.nn.DataParallel,
}

# ---- operations: a model (perhaps wrapped), the references of the plain one, a new folder

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
ASKED = [[0, 1, 2], [0, 5, 6]]
SETTINGS = {"k": 2, "steps": 2}


def forwarding(model, references, folder):
    tokens = TOKENS.int()
    rows = [out.logits for _, out in passes(model, tokens)]
    return torch.cat(rows)


def generating(model, references, folder):
    inner = getattr(model, "module", model)  # DataParallel passes no methods on
    return inner.generate(TOKENS, 3, stop=[1, 2])


def building(model, references, folder):
    folder.mkdir()
    references_of(model).save(folder / "set")
    return ReferenceSet.load(folder / "set", model).pathways


def descending(model, references, folder):
    return remix(model, ASKED, references, **SETTINGS)[:5]


def regressing(model, references, folder):
    return remix(model, ASKED, references, method="kernel_regression", **SETTINGS)[:5]


def finding_modes(model, references, folder):
    return remix(model, ASKED, references, method="mode_finding", **SETTINGS)[:5]


def finding_neighbours(model, references, folder):
    prompts = torch.tensor(ASKED, device="cpu"), torch.tensor([3, 3], device="cpu")
    tail, config = Tail(model), RemixConfig(k=2, embedding="hidden:1")
    return find_neighbours(tail, references, *prompts, config).weight


def going_to_the_hub(model, references, folder):
    hf.save(model, folder / "hub")
    loaded, _ = hf.load(folder / "hub")
    return tuple(loaded.state_dict().values())


def saving(model, references, folder):
    optimizer = torch.optim.AdamW(model.parameters())
    settings = {"model": vars(unwrapped(model).config), "train": {}}
    runs.save_run(folder, model, optimizer, 0, settings, [], [])
    runs.resume(folder, model, optimizer)
    return tuple(runs.load_run(folder)[0].state_dict().values())


def scoring(model, references, folder):
    return tuple(map(torch.from_numpy, specialisation_of(model)[:2]))


SIZES = "--d-model 16 --n-layers 1 --n-experts 4 --top-k 2 --d-expert 8 --steps 2 --no-taste"


def running_programs(model, references, folder):
    """Train, and look at the run -> its scores."""
    train_toy.main([*SIZES.split(), "--out", str(folder)])
    eval_py.main(["perplexity", str(folder)])
    return json.loads((folder / "perplexity-dev.json").read_text())


OPERATIONS = [
    forwarding,
    generating,
    building,
    descending,
    regressing,
    finding_modes,
    finding_neighbours,
    going_to_the_hub,
    saving,
    scoring,
    running_programs,
]


def model_in_training():
    """A model with dropout, in training but for one block, learning but for one weight."""
    torch.manual_seed(0)
    model = tiny(dropout=0.5).float().train()
    model.blocks[1].eval()
    model.embedding.weight.requires_grad_(False)
    return model


def surroundings(model):
    """All that an operation could leave behind."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "streams": (sys.stdout, sys.stderr),
        "training": [module.training for module in model.modules()],
        "learning": [weight.requires_grad for weight in model.parameters()],
        "gradients": [weight.grad for weight in model.parameters()],
        "weights": digest(*model.parameters()),
        "random": torch.get_rng_state().tolist(),
    }


@functools.cache
def alone(operation):
    """What an operation gives without a host."""
    model = model_in_training()
    with tempfile.TemporaryDirectory() as folder:
        return operation(model, references_of(model), Path(folder) / "alone")


TAUGHT = ["default bfloat16", "default device", "inference mode", "another thread"]
OTHERS = [host for host in HOSTS if host not in TAUGHT]
QUICK = [forwarding, descending, saving]
SLOWER = [operation for operation in OPERATIONS if operation not in QUICK]


@pytest.mark.parametrize("operation", [*QUICK, *full(*SLOWER)])
@pytest.mark.parametrize("host", [*TAUGHT, *full(*OTHERS)])
def test_hosts(host, operation, tmp_path):
    """The same result in a host, which finds itself and its model as they were."""
    expected = alone(operation)
    model = model_in_training()
    references = references_of(model_in_training())

    def hosted():
        return operation(model, references, tmp_path / "hosted")

    with HOSTS[host](), ThreadPoolExecutor(1) as pool:
        before = surroundings(model)
        result = pool.submit(hosted).result() if host == "another thread" else hosted()
        assert surroundings(model) == before
    if host == "autocast" and operation in (forwarding, generating, scoring):
        return  # this is what autocast is for
    close(result, expected, 0)


@pytest.mark.parametrize("operation", [*QUICK[1:], *full(forwarding, *SLOWER[:-1])])
@pytest.mark.parametrize("wrapper", [*full("compiled", "compiled blocks"), "data parallel"])
def test_wrappers(wrapper, operation, tmp_path):
    """A wrapped model is the model inside of it, references and files included."""
    expected = alone(operation)
    model = model_in_training()
    references = references_of(model_in_training())
    wrapped = WRAPPERS[wrapper](model)
    before = surroundings(wrapped)
    result = operation(wrapped, references, tmp_path / "wrapped")
    assert surroundings(wrapped) == before
    close(result, expected, 0)


def test_half_used():
    """A generator that is left half used leaves no trace either."""
    model = model_in_training()
    before = surroundings(model)
    next(passes(model, TOKENS.repeat(2000, 1)))
    assert surroundings(model) == before
