"""Where the time of a training step goes, and that of a new token, by torch's profiler."""

import re
import time
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from lab.speed.measures import adam, training_step
from lab.speed.peers import SMALL
from moe import MoETransformer

# Time belongs to the first row whose pattern is in the name of its operator, or of one that called
# it. So clearing the gradient of the cross-entropy counts as cross-entropy, and `memory` is what no
# other row caused.
REMAINDER = "the rest: Python, autograd, views, profiler"
PROFILE = {
    "optimiser": "Optimizer",
    "norms (forward; backward is element-wise)": "rms_norm",
    "attention kernel": "_scaled_dot_product",
    "matrix products": r"aten::(mm|addmm|addmv_?|mv|bmm|_grouped_mm)\b",
    "softmax, cross-entropy over the vocabulary": "log_softmax|nll_loss",
    "gathers, sort": r"Dispatch|Combine|index_select|embedding|"
    r"aten::(sort|topk|searchsorted|\w*scatter)",
    "memory: fill, copy, concatenate": r"aten::(fill_|copy_|cat)\b",
    "element-wise, sums": "aten::_?"
    "(mul|add|sub|div|floor|neg|silu|pow|exp|log|amax|sum|softmax|sin|cos|dot)",
    REMAINDER: "",
}


def where_time_goes(call, n: int) -> dict[str, float]:
    """Milliseconds of a call for each row of PROFILE."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        for _ in range(n):
            call()
        wall = 1000 * (time.perf_counter() - start) / n
    ms = dict.fromkeys(PROFILE, 0.0)
    for event in record.events():
        names, caller = [], event
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        text = " ".join(names)
        row = next(row for row, pattern in PROFILE.items() if re.search(pattern, text))
        ms[row] += event.self_cpu_time_total / 1000 / n
    ms[REMAINDER] += wall - sum(ms.values())  # what ran between operators
    return ms


def step_profiles() -> dict:
    """Where the time of a training step goes, eager and compiled, and that of a new token."""
    model = MoETransformer(SMALL)
    profiles = {}
    for name, forward in (("a", model), ("a compiled", torch.compile(model))):
        step = partial(training_step, model, forward, adam(model))
        step()
        profiles[f"{name} training step"] = where_time_goes(step, 3)

    # For one prompt.
    prompt = torch.randint(SMALL.vocab_size, (1, 16))
    token = where_time_goes(partial(model.generate, prompt, 64), 1)
    return profiles | {"a new token": {name: ms / 64 for name, ms in token.items()}}
