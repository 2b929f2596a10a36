"""Whatever program is around us: an operation gives the same, and leaves all as it was.

A host is a program around an operation, a wrapper is what hosts put around a model. A new host,
wrapper or operation is one function.
"""

import contextlib
import io
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from by_hand import close, full, tiny

import eval as eval_program
import hf
import train_toy
from data import SkillsTask, passes
from lab.scores.specialisation import specialisation
from lab.tools import runs
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
def streams(*streams):
    """Standard output and error that lead elsewhere, or nowhere."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


HOSTS = {
    "nothing": contextlib.nullcontext,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "strict": strict,
    "redirected output": lambda: streams(io.StringIO(), io.StringIO()),
    "no output": lambda: streams(None, None),
}


def in_a_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


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
SOLVED = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2, 4, 6], [9, 1], [3, 3, 3]]
ASKED = [[0, 1, 2], [0, 5, 6]]
SETTINGS = {"k": 2, "steps": 2}


def references_of(model):
    references = ReferenceSet.build(model, SOLVED, torch.arange(6, device="cpu"))
    references.correct[:] = True
    return references


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
    task = SkillsTask()
    prompts = task.prompts("dev").tokens[:50] % 11
    task.kinds = lambda *_: (prompts, prompts, [str(kind) for kind in range(11)])
    return tuple(map(torch.from_numpy, specialisation(model, task)[:2]))


OPERATIONS = [
    forwarding,
    generating,
    building,
    descending,
    regressing,
    finding_neighbours,
    going_to_the_hub,
    saving,
    scoring,
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
        "random": torch.get_rng_state().tolist(),
    }


def alone(operation, folder):
    """What an operation gives without a host."""
    model = model_in_training()
    return operation(model, references_of(model), folder / "alone")


QUICK = ["default bfloat16", "default device", "inference mode", "no output"]
OTHER_HOSTS = [host for host in HOSTS if host not in QUICK]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("host", [*QUICK, *full(*OTHER_HOSTS)])
def test_hosts(host, operation, tmp_path):
    """The same result in a host, which finds itself and its model as they were."""
    expected = alone(operation, tmp_path)
    model = model_in_training()
    references = references_of(model)
    with HOSTS[host]():
        before = surroundings(model)
        result = operation(model, references, tmp_path / "hosted")
        assert surroundings(model) == before
    if host == "autocast" and operation in (forwarding, generating, scoring):
        return  # this is what autocast is for
    close(result, expected, 0)


CALLS = [forwarding, generating, scoring]  # of a wrapper itself: torch.compile takes seconds
OTHERS = [operation for operation in OPERATIONS if operation not in CALLS]


@pytest.mark.parametrize("operation", [*OTHERS, *full(*CALLS)])
@pytest.mark.parametrize("wrapper", ["compiled", "data parallel", *full("compiled blocks")])
def test_wrappers(wrapper, operation, tmp_path):
    """A wrapped model is the model inside of it, references and files included."""
    expected = alone(operation, tmp_path)
    model = model_in_training()
    references = references_of(model)
    wrapped = WRAPPERS[wrapper](model)
    before = surroundings(wrapped)
    result = operation(wrapped, references, tmp_path / "wrapped")
    assert surroundings(wrapped) == before
    close(result, expected, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_threads(operation, tmp_path):
    """The same result in another thread."""
    expected = alone(operation, tmp_path)
    model = model_in_training()
    references = references_of(model)
    result = in_a_thread(lambda: operation(model, references, tmp_path / "hosted"))
    close(result, expected, 0)


def test_half_used():
    """A generator that is left half used leaves no trace either."""
    model = model_in_training()
    before = surroundings(model)
    rows = passes(model, TOKENS.repeat(2000, 1))
    next(rows)
    assert surroundings(model) == before


# ---- programs

SIZES = "--d-model 16 --n-layers 1 --n-experts 4 --top-k 2 --d-expert 8 --steps 2 --no-taste"


def run_programs(folder):
    """Train, and look at the run -> its scores."""
    train_toy.main([*SIZES.split(), "--out", str(folder)])
    eval_program.main(["perplexity", str(folder)])
    return json.loads((folder / "perplexity-dev.json").read_text())


@pytest.mark.parametrize("host", [*QUICK[:1], *full(*QUICK[1:], *OTHER_HOSTS)])
def test_programs_in_hosts(host, tmp_path):
    """The programs give the same there, to the last digit."""
    expected = run_programs(tmp_path / "alone")
    model = model_in_training()
    with HOSTS[host]():
        before = surroundings(model)
        assert run_programs(tmp_path / "hosted") == expected
        assert surroundings(model) == before


@pytest.mark.full
def test_programs_in_a_thread(tmp_path):
    """Likewise in another thread, where no signal can be caught."""
    expected = run_programs(tmp_path / "alone")
    assert in_a_thread(lambda: run_programs(tmp_path / "hosted")) == expected
