"""The playground: a trained model as one HTML file that runs it, without network or library.

`python eval.py playground` writes it. The page computes everything live, from the run's weights in
half precision: model.js and remix.js do there what moe.py and remix.py do here. It takes every run
whose routers choose by softmax; `require_playable` names what it cannot take.
"""

import base64
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data import SKILLS, Problems
from lab.composing.presets import build_model
from lab.remixing.arena import references_of, selected
from lab.remixing.methods import METHODS
from lab.scores.evaluation import router_names
from lab.scores.specialisation import specialisation
from lab.tools.files import as_json
from moe import require
from pathways import ReferenceSet
from pathways.checks import as_tuples
from remix import RemixConfig, RemixResult, remix

FOLDER = Path(__file__).parent
SOURCES = ("style.css", "model.js", "remix.js", "words.js", "app.js", "draw.js")
DATA = re.compile(r'(?<=<script type="application/json" id="data">).*?(?=</script>)', re.S)
PAGE_SETTINGS = ("k", "embedding", "steps", "lr", "alpha")
MOST_WEIGHTS = 30_000_000  # a page of 80 MB
MOST_STORIES = 40  # to choose from


# ------------------------------------------------------------------------------------- the page


def assemble(data: dict) -> str:
    """The page: page.html, with the other files and the data in their places."""
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    for name in SOURCES:
        page = page.replace(f"/* {name} */", (FOLDER / name).read_text(encoding="utf-8"))
    text = as_json(data, separators=(",", ":"))
    return page.replace("/* data */", text.replace("</", "<\\/"))


def data_of(page: str) -> dict:
    """The data of a page that `assemble` made."""
    return json.loads(DATA.search(page)[0])


# ----------------------------------------------------------------------------------- what it knows


def page_data(model, task, name: str) -> dict:
    """All that the page of a model knows. ValueError for a model that it cannot take.

    The model's weights become those of the page: they are rounded to half precision.
    """
    require_playable(model, task)
    halve(model)
    weights = dict(model.named_parameters())
    halves = torch.cat([weight.detach().flatten() for weight in weights.values()]).half()
    settings = RemixConfig(**task.remix_settings | METHODS["NGD"].tuned.get(task.name, {}))
    references, asked, on_average = helpers_of(model, task), problems_of(task), None
    if task.encoding is None:
        result = remix(model, asked.tokens, references, settings)
        on_average = shares_right(asked, result)
        asked = selected(asked, helped_most(asked, result))
    return {
        "name": name,
        "task": task.name,
        "parameters": model.n_params(),
        "config": asdict(model.config),
        "places": router_names(model),
        "shapes": {name: list(weight.shape) for name, weight in weights.items()},
        "weights": packed(halves.view(torch.int16)),
        "settings": {key: getattr(settings, key) for key in PAGE_SETTINGS},
        "references": reference_data(references, settings.k),
        "prompts": packed_prompts(asked.tokens, asked.lengths),
        "labels": asked.labels.tolist(),
        "onAverage": on_average,
        "favourites": favourites(model, task),
        "words": TASK_WORDS[task.name](task),
    }


def require_playable(model, task):
    """ValueError, in one line, for a run that the page cannot take."""
    fault = "the playground cannot take this run:"
    config, routers = model.config, model.routers()
    require(len(routers) > 0, f"{fault} it is dense, or routes by hash, so there is no pathway")
    own = {type(router).__name__ for router in routers} - {"Router", "TopPRouter"}
    require(not own, f"{fault} it has routers of your own, {', '.join(own)}")
    layer = getattr(config, "layer", "moe")
    require(layer in ("moe", "cartesian", "parallel"), f"{fault} its layers are joined as {layer}")
    require(config.clip_qkv is None, f"{fault} it was trained with clip_qkv")
    n = model.n_params()
    require(n <= MOST_WEIGHTS, f"{fault} it has {n:,} weights, more than {MOST_WEIGHTS:,}")
    tokenizer = getattr(task.encoding, "name", "bytes")
    require(tokenizer in ("tinystories", "bytes"), f"{fault} its tokenizer is {tokenizer}")


@torch.no_grad()
def halve(model):
    """Round all weights to half precision, in place."""
    for weight in model.parameters():
        weight.copy_(weight.half())


@torch.no_grad()
def model_of(data: dict):
    """The model of a page, from its data."""
    model = build_model(data["config"]).eval()
    halves = torch.from_numpy(unpacked(data["weights"]).view(np.float16))
    sizes = [weight.numel() for weight in model.parameters()]
    for weight, half in zip(model.parameters(), halves.split(sizes), strict=True):
        weight.copy_(half.view(weight.shape))
    return model


# ---- prompts


def problems_of(task) -> Problems:
    """The problems to choose from: those of dev, or a few stories of test, if it has any."""
    if task.encoding is None:
        return task.problems("dev")
    asked = task.problems("test")
    if len(asked.labels) <= MOST_STORIES:
        return asked
    return selected(asked, torch.arange(MOST_STORIES))


def helpers_of(model, task) -> ReferenceSet | None:
    """Solved problems that may help: of a text those of dev; None where it has no questions."""
    solved = task.problems("reference" if task.encoding is None else "dev")
    if len(solved.labels) == 0:
        return None
    return references_of(model, task, solved)


def reference_data(references: ReferenceSet | None, k: int) -> dict | None:
    """References as the page has them; None where not k of them may help."""
    if references is None or int(references.correct.sum()) < k:
        return None
    data = {
        "prompts": packed_prompts(references.tokens, references.lengths),
        "labels": packed(references.labels),
        "correct": packed(references.correct),
    }
    if references.options is not None:
        data["options"] = references.options.tolist()
    if references.corpus is not None:
        data["corpus"] = packed_prompts(references.corpus, references.corpus_lengths)
    return data


def packed_prompts(tokens, lengths) -> dict:
    """Prompts (n, T) of lengths (n,), one behind the other."""
    prompts = as_tuples(tokens, lengths)
    return {"lengths": packed(lengths), "tokens": packed([t for prompt in prompts for t in prompt])}


def packed(numbers) -> str:
    """Whole numbers below 2^16 as base64, little-endian."""
    numbers = np.asarray(numbers).astype("<u2")
    return base64.b64encode(numbers.tobytes()).decode()


def helped_most(asked: Problems, result: RemixResult):
    """Prompts in order: first those answered wrong (skills: misread) that NGD helped most."""
    said = result.logits_before.argmax(-1)
    wrong = said != asked.labels
    if asked.about is not None:  # what is wrong by the cue's other meaning
        wrong &= said == asked.about.other
    before, after = result.logits_before.softmax(-1), result.logits.softmax(-1)  # (n, V)
    gain = (after - before).gather(1, asked.labels[:, None])[:, 0]  # (n,)
    return (gain * wrong).argsort(descending=True)


def shares_right(asked: Problems, result: RemixResult) -> dict:
    """How many prompts there are, and which shares are answered right before and after NGD: what
    is shown first is what it helped most."""
    shares = {}
    for name, logits in (("before", result.logits_before), ("after", result.logits)):
        shares[name] = (logits.argmax(-1) == asked.labels).float().mean().item()
    return {"prompts": len(asked.labels)} | shares


def unpacked(text: str) -> np.ndarray:
    """What `packed` packed."""
    return np.frombuffer(bytearray(base64.b64decode(text)), "<u2")


# ---- words


def favourites(model, task) -> list[list[list]]:
    """For each router and expert the three kinds of token that visit it most: name and per cent."""
    special = specialisation(model, task, "dev", n_kinds=100)
    rows = []
    for shares in special.shares:  # (kinds, E)
        best = np.argsort(-shares, axis=0, kind="stable")[:3].T  # (E, 3)
        row = []
        for expert, kinds in enumerate(best):
            names = [special.kinds[i].strip("' ") for i in kinds]  # words come as "' the'"
            often = [round(100 * share) for share in shares[kinds, expert]]
            row.append([list(pair) for pair in zip(names, often, strict=True)])
        rows.append(row)
    return rows


def skills_words(task) -> dict:
    """What the cues mean, and the results of all skills."""
    a, b = np.meshgrid(np.arange(task.N), np.arange(task.N), indexing="ij")
    results = [skill(a, b).flatten().tolist() for skill in SKILLS.values()]
    return {
        "skills": list(SKILLS),
        "results": results,
        "meaning": task.meaning.tolist(),
        "numbers": task.N,
        "firstCue": task.FIRST_CUE,
        "none": task.NONE,
    }


def composition_words(task) -> dict:
    """The functions as tables, and which of them were trained together."""
    return {
        "functions": task.functions.tolist(),
        "numbers": task.N,
        "trained": task.pairs["train"].tolist(),
    }


def text_words(task) -> dict:
    """The bytes of every token, and the token that ends a text."""
    encoding = task.encoding
    tokens = sorted(encoding.token_byte_values(), key=encoding.encode_single_token)
    return {
        "vocabulary": [base64.b64encode(token).decode() for token in tokens],
        "end": encoding.eot_token,
    }


TASK_WORDS = {"skills": skills_words, "composition": composition_words, "text": text_words}
